"""SLTT against backpropagation through time: what a step keeps, what it takes, and where time matters.

Six parts. Bytes that the graph keeps, for several lengths. Seconds of a gradient, interleaved with
SpikingJelly and snnTorch. Then accuracy, paired by seed (same first weights, same order of data): digits as
still images under a leaky network, where dropping time costs nothing; the same digits as camera events under
three leaks; spoken digits under a slow leak; and a task of delayed recall, which SLTT cannot learn by
construction. The finding is the pattern: what SLTT loses grows with the share of the potential that stays.
"""

from memspan.recipes.engine import Recipe

from .claims import figures, judge
from .measure import CONTROL, FULL, TINY, Options, run

RECIPE = Recipe(
    name="sltt",
    title="SLTT: train a spiking network in memory that does not grow with time",
    paper="Towards Memory- and Time-Efficient Backpropagation for Spiking Neural Networks, ICCV 2023",
    room="training",
    component="memspan.training.sltt.OnlineStep",
    problem="train a spiking network on long sequences without running out of memory",
    answer="one time step is differentiated and freed at a time: activations of 1 step instead of T",
    quick_cost="about 3 min",
    options=Options,
    quick=Options(),
    full=FULL,
    tiny=TINY,
    run=run,
    judge=judge,
    figures=figures,
    control=CONTROL,
    seeds=(1, 1),
    extras=("recipes",),
    devices=("cpu",),
    in_tour=False,
    threads=1,
)
