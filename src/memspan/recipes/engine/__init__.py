"""What every recipe stands on, so that a recipe is only its data, its methods and its claims.

A recipe declares typed options, cuts its work into cells with :meth:`Task.measure`, and judges its own
measurements. The engine turns the options into a command line, seeds each cell from its name, stores each
finished cell whole, continues after a kill to the same numbers, and writes ``result.json`` and
``report.html``.
"""

from memspan.recipes.engine.measurements import Measurements
from memspan.recipes.engine.options import option
from memspan.recipes.engine.recipe import Calls, Recipe
from memspan.recipes.engine.run import Finished, execute
from memspan.recipes.engine.task import Cell, Outcome, Task
from memspan.recipes.engine.trained import trained_once

__all__ = [
    "Calls",
    "Cell",
    "Finished",
    "Measurements",
    "Outcome",
    "Recipe",
    "Task",
    "execute",
    "option",
    "trained_once",
]
