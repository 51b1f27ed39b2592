"A complete MLOps system for image classification, written as notebooks."
from importlib.metadata import version

__version__ = version('plant_mlops')
