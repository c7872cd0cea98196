"""Self-controlled memory: how much of an answer is in a prompt of fixed length; what survives a long summary?

Coverage needs no language model: the share of the gold answer's content words, less the question's, that
stand in the context. The row "SCM" is the shipped policy, told every turn. Summaries pick sentences, so that
the
long-document part tests the plumbing and the law of lengths, not prose.
"""

from memspan.recipes.engine import Recipe

from .claims import judge
from .measure import WINDOW, Options, run

RECIPE = Recipe(
    name="scm",
    title="Self-controlled memory: answers covered by a prompt of fixed length",
    paper="Enhancing Large Language Model with Self-Controlled Memory Framework, arXiv 2304.13343",
    room="recall",
    component="memspan.recall.SCMPolicy",
    problem="converse for hundreds of turns with a small window",
    answer="a controller decides which turns go in whole, as summaries, or not at all",
    quick_cost="about 30 s",
    options=Options,
    quick=Options(),
    full=Options(novel_words=130_000),
    tiny=Options(dialogues="generated", budgets=(200, 300), novel_words=2000, embedder="hashing"),
    run=run,
    judge=judge,
    control=WINDOW,
    seeds=(1, 1),
    extras=("recipes", "recall"),
    devices=("cpu",),
)
