"""What a long run will take, before it begins: memory, disk and time of every step.

sizes.py     the numbers of a model and of a text
hollow.py    a layer without its matrix products, for the time of all else
rates.py     what this machine does in a second, measured with the functions that the steps use
memory.py    what a step holds, by formula
steps.py     the steps: memory, bytes read and written, and seconds by what takes them
whole.py     all steps of a run, against the room that is there
recipe_run.py  what `smoothquant run` would make
"""

from recipes.estimate.sizes import Tokens
from recipes.estimate.whole import CALIBRATE, SEARCH, Estimate, EstimatedRun, Export, estimate

__all__ = ["CALIBRATE", "SEARCH", "Estimate", "EstimatedRun", "Export", "Tokens", "estimate"]
