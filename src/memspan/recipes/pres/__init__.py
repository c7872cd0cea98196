"""PRES and its rivals over a batch sweep: what a larger batch costs a dynamic graph network, and what helps.

A stream of interactions trains a JODIE-style network (``--model tgn``: TGN) at three batch sizes. Two tables
tell two causes apart: at equal *epochs* a large batch takes few steps, at equal *steps* it only sees less.
Beside PRES stand its halves, a learning rate scaled with the batch, and four rules without a network, one of
which beats every network on CollegeMsg. Selection is by validation alone; the tests' batch is 200 whatever
the training's.

Data: CollegeMsg and Bitcoin-OTC from MEMSPAN_DATA; else MovieLens-100K (recbole's wheel, read in place); else
the clock changes of the world's time zones, a real stream inside the package ``tzdata``.
"""

from __future__ import annotations

from memspan.recipes.engine import Recipe

from .claims import figures, judge
from .measure import CONTROL, Options, run

__all__ = ["RECIPE"]

RECIPE = Recipe(
    name="pres",
    title="PRES: memory-based dynamic graph networks in large batches, and the remedies that work",
    paper="PRES: Toward Scalable Memory-Based Dynamic Graph Neural Networks, ICLR 2024",
    room="banks",
    component="memspan.banks.temporal.PRES",
    problem="train a temporal graph network on a stream of interactions with larger batches",
    answer="what a batch size hides, told before training; PRES, a scaled rate, or a rule without a network",
    quick_cost="about 2 min",
    full_cost="about 45 min",
    options=Options,
    quick=Options(),
    full=Options(data="both", steps=420),
    tiny=Options(data="clock-changes", batches=(50, 200), epochs=1, steps=8, dim=8, events=600, speed=0),
    run=run,
    judge=judge,
    figures=figures,
    control=CONTROL,
    seeds=(3, 5),
    extras=("recipes",),
)
