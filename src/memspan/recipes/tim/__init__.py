"""Think-in-Memory: do facts buy more than transcripts, are they found however one asks, does hashing pay?

Facts are read by rules; no language model is called. Rows "turns" and "TiM" are the shipped policies
MemoryBank and Think-in-Memory, told every turn.
"""

from memspan.recipes.engine import Recipe

from .claims import figures, judge
from .measure import Options, run

RECIPE = Recipe(
    name="tim",
    title="Think-in-Memory: facts instead of transcripts, and what a hash of angles finds",
    paper="Think-in-Memory: Recalling and Post-thinking Enable LLMs with Long-Term Memory, arXiv 2311.08719",
    room="recall",
    component="memspan.recall.TiMPolicy",
    problem="recall conclusions instead of transcripts",
    answer="one fact a sentence, with evidence and validity, tidied by checked edits",
    quick_cost="about 1 min",
    options=Options,
    quick=Options(),
    full=Options(conversations="locomo", vectors=100_000, draws=50, streams=50),
    tiny=Options("generated", (100,), "hashing", draws=2, vectors=0, streams=2),
    run=run,
    judge=judge,
    figures=figures,
    control="random turns",
    seeds=(1, 1),
    extras=("recipes", "recall"),
    devices=("cpu",),
)
