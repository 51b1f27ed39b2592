"The command `plant-mlops`, also as `python -m plant_mlops`."

def main():
    "Run the command line. Its import is here because worker processes import this module again, and do not need it."
    from plant_mlops.cli.main import main
    main()

if __name__ == '__main__': main()
