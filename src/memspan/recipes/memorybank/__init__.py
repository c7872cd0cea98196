"""MemoryBank: does recall find what was said, does it beat no memory, and what should a full store forget?

Nothing here needs a language model: evidence turns are known, so that retrieval is measured without a judge.
Answers are measured only where an endpoint is given. Rows of ours (memorybank, tim, scm) are the shipped
policies.
"""

from memspan.recipes.engine import Recipe

from .claims import figures, judge
from .measure import Options, price, run

RECIPE = Recipe(
    name="memorybank",
    title="MemoryBank: recall without a judge, and what a full store should forget",
    paper="MemoryBank: Enhancing Large Language Models with Long-Term Memory, AAAI 2024",
    room="recall",
    component="memspan.recall.MemoryBankPolicy",
    problem="give a chat application a memory of its user within N bytes",
    answer="turns are recalled by words and likeness; what is used again lasts longer",
    quick_cost="about 1 min",
    options=Options,
    quick=Options(),
    full=Options(
        conversations="locomo",
        compare=("tim", "scm", "fts", "bm25", "minilm", "rrf", "mem0"),
        simulated_users=100,
    ),
    tiny=Options(conversations="generated", compare=("fts",), embedder="hashing", simulated_users=2),
    run=run,
    judge=judge,
    figures=figures,
    price=price,
    control="random",
    seeds=(1, 1),
    extras=("recipes", "recall"),
    devices=("cpu",),
    in_tour=False,
)
