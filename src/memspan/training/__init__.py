"""A training step that holds fewer bytes: the methods, and the baselines they are compared with."""

import functools

from memspan.ledger.methods import Method
from memspan.training import slimfit, sltt
from memspan.training.baselines import (
    BottleneckAdapter,
    adapter_,
    autocast_,
    bitfit_,
    checkpoint_,
    linear_probe_,
    lisa_,
    lora_,
    unadapter_,
    unautocast_,
    uncheckpoint_,
    unfreeze_,
    unlora_,
)
from memspan.training.peqa import quantize_
from memspan.training.peqa.qlora import qlora_, unqlora_
from memspan.training.unipt import side_tune_, unside_
from memspan.training.zero.methods import METHODS as _ZERO

__all__ = [
    "METHODS",
    "BottleneckAdapter",
    "adapter_",
    "autocast_",
    "bitfit_",
    "checkpoint_",
    "linear_probe_",
    "lisa_",
    "lora_",
    "qlora_",
    "side_tune_",
    "unadapter_",
    "unautocast_",
    "uncheckpoint_",
    "unfreeze_",
    "unlora_",
    "unqlora_",
    "unside_",
]

_TRAIN_LITTLE = frozenset({"adapter", "bitfit", "linear_probe", "lora", "lst", "peqa", "qlora", "unipt"})

#: What this room offers to the planner (entry point ``memspan.methods``).
METHODS = [
    Method("checkpoint", checkpoint_),
    Method("autocast", autocast_),
    Method("bitfit", bitfit_, conflicts=_TRAIN_LITTLE - {"bitfit"}),
    Method("linear_probe", linear_probe_, conflicts=_TRAIN_LITTLE - {"linear_probe"}),
    Method("lora", lora_, conflicts=_TRAIN_LITTLE - {"lora"}),
    Method("peqa", quantize_, conflicts=_TRAIN_LITTLE - {"peqa"}),
    Method("qlora", qlora_, conflicts=_TRAIN_LITTLE - {"qlora"}),
    Method("adapter", adapter_, conflicts=_TRAIN_LITTLE - {"adapter"}),
    Method("unipt", side_tune_, conflicts=_TRAIN_LITTLE - {"unipt"}),
    Method("lst", functools.partial(side_tune_, side="lst"), conflicts=_TRAIN_LITTLE - {"lst"}),
    Method(
        "slimfit",
        slimfit.convert_,
        optimizer=slimfit.optimizer_for,
        conflicts=_TRAIN_LITTLE - {"peqa"} | {"checkpoint"},
    ),
    *_ZERO,
    Method(
        "sltt",
        sltt.planned_convert_,
        step=sltt.planned_step,
        conflicts=frozenset({"checkpoint"}),
    ),
    Method(
        "tbptt",
        sltt.planned_tbptt_,
        step=sltt.planned_tbptt_step,
        conflicts=frozenset({"checkpoint"}),
    ),
]
