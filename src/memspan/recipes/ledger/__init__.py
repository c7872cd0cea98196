"""Planner, ledger and allocator on one step: does a prediction before the run tell the bytes of the run?

For each model and each way to train it, one step (the second) is predicted on fake tensors, and while it runs
it is counted by the dispatch ledger and read from the allocator. Three public rules of thumb stand beside it.
"""

from memspan.recipes.engine import Recipe

from .claims import figures, judge
from .measure import Options, run

RECIPE = Recipe(
    name="ledger",
    title="Ledger: predicted, counted and allocated bytes of a training step",
    paper="none: foundation of the library",
    room="ledger",
    component="memspan.ledger.plan",
    problem="know what a training step will hold before it runs out of memory",
    answer="a trace on tensors without bytes tells the step's peak; rules of thumb do not",
    quick_cost="about 90 s",
    options=Options,
    quick=Options(),
    full=Options(scale=4, everything=True),
    tour=Options(models=("MLP", "CNN", "GPT", "BERT")),
    tiny=Options(models=("MLP",), tokens=16),
    run=run,
    judge=judge,
    figures=figures,
    control="plain",
    seeds=(1, 1),
    extras=("recipes",),
    in_tour=True,
)
