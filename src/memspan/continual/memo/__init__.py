"""MEMO: keep learning new classes within N bytes; a model or 603 exemplars?

A classifier meets classes task by task and may keep only so many bytes. Two answers compete. *Replay* keeps
old images. *Expansion* keeps old networks: it freezes each task's network and adds another. Published
comparisons gave both the same number of images and left the networks unpaid. Count both in one budget, and
expansion must win back what its networks cost: a ResNet-32 costs as much as 603 CIFAR images.

MEMO (A Model or 603 Exemplars: Towards Memory-Efficient Class-Incremental Learning, ICLR 2023) observes
that shallow layers hardly change between tasks. It holds them once (g) and adds only a deep block (s_b) a
task::

    features = [s_1(g(x)), ..., s_b(g(x))]        logits = W · features + bias

The newest block starts as a copy of the last one and learns with an auxiliary head (old classes against
each new class); old blocks stay frozen; new rows of W are then scaled to the old rows' mean norm.

The larger product is the bench: :func:`budget_sweep` runs any learner over a stream at aligned budgets,
pays for every byte that survives between tasks, and gives accuracy against bytes.

    >>> from memspan.continual.memo import MEMOClassifier
    >>> learner = MEMOClassifier("resnet8", budget="2MiB", epochs=8, align="always")
    >>> learner.predict_bytes(tasks=5, classes=10, shape=(28, 28))["parameters.head"]
    12840

When not to use it: small budgets (a nearest-mean reading of replay, :class:`ICaRL`, is ahead), images that
compress well (``codec="jpeg:75"`` keeps several times more), and wherever a strong pretrained backbone
fits: :class:`SimpleNCM`.
"""

from memspan.continual.analysis import layer_drift, linear_cka
from memspan.continual.buffers import ExemplarSet, herding
from memspan.continual.memo.baselines import WA, BiC, ICaRL, Joint, NeverUpdate, SimpleNCM
from memspan.continual.memo.heads import align_weights_, grow_linear_
from memspan.continual.memo.inputs import to_input
from memspan.continual.memo.learners import (
    ExpandableRepresentation,
    Finetune,
    MEMOClassifier,
    Replay,
    TaskLearner,
)
from memspan.continual.memo.nets import ExpandableNet, aux_targets, split_backbone
from memspan.continual.memo.sweep import (
    Learner,
    StreamRun,
    Sweep,
    aligned_budgets,
    apm,
    area,
    budget_sweep,
    held_bytes,
    run_stream,
)

__all__ = [
    "WA",
    "BiC",
    "ExemplarSet",
    "ExpandableNet",
    "ExpandableRepresentation",
    "Finetune",
    "ICaRL",
    "Joint",
    "Learner",
    "MEMOClassifier",
    "NeverUpdate",
    "Replay",
    "SimpleNCM",
    "StreamRun",
    "Sweep",
    "TaskLearner",
    "align_weights_",
    "aligned_budgets",
    "apm",
    "area",
    "aux_targets",
    "budget_sweep",
    "grow_linear_",
    "held_bytes",
    "herding",
    "layer_drift",
    "linear_cka",
    "run_stream",
    "split_backbone",
    "to_input",
]
