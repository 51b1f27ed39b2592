"`python -m plant_mlops` is `plant-mlops`, for whoever knows only the interpreter."
from plant_mlops.cli.main import main

if __name__ == '__main__': main()
