"""MEMO against replay and expansion, every byte paid: which buys more accuracy, old images or old networks?

Ten classes come in five tasks. All methods get the same budgets; networks, heads, statistics, labels, class
means and exemplars are paid from them. Budgets are computed from the network and the images at hand.
"""

from memspan.recipes.engine import Recipe

from .claims import figures, judge
from .measure import Options, run

RECIPE = Recipe(
    name="memo",
    title="MEMO: keep images or keep networks, in one byte budget",
    paper="A Model or 603 Exemplars: Towards Memory-Efficient Class-Incremental Learning, ICLR 2023",
    room="continual",
    component="memspan.continual.memo.MEMOClassifier",
    problem="keep learning new classes within N bytes",
    answer="shallow layers are held once, a deep block a task; and every method pays for all its bytes",
    quick_cost="about 2 min",
    full_cost="a day on a GPU; with --seeds 3 about 7 min",
    options=Options,
    quick=Options(),
    tour=Options(rivals="few"),
    full=Options(per_class=5000, epochs=30, batch_size=128, width=16, stem_stride=1, points=5, rivals="all"),
    threads=1,
    tiny=Options(images="digits", per_class=24, steps=2, points=2, rivals="few"),
    run=run,
    judge=judge,
    figures=figures,
    control="never update",
    extras=("recipes",),
    takes_budget=True,
    seeds=(1, 5),
    in_tour=True,
)
