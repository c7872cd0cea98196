"""A training step that holds fewer bytes: the methods, and the baselines they are compared with."""

from memspan.ledger.methods import Method
from memspan.training.baselines import (
    autocast_,
    bitfit_,
    checkpoint_,
    linear_probe_,
    lora_,
    unautocast_,
    uncheckpoint_,
    unfreeze_,
    unlora_,
)

__all__ = [
    "METHODS",
    "autocast_",
    "bitfit_",
    "checkpoint_",
    "linear_probe_",
    "lora_",
    "unautocast_",
    "uncheckpoint_",
    "unfreeze_",
    "unlora_",
]

_TRAIN_LITTLE = frozenset({"bitfit", "linear_probe", "lora"})

#: What this room offers to the planner (entry point ``memspan.methods``).
METHODS = [
    Method("checkpoint", checkpoint_, None),
    Method("autocast", autocast_, None),
    Method("bitfit", bitfit_, None, conflicts=_TRAIN_LITTLE - {"bitfit"}),
    Method("linear_probe", linear_probe_, None, conflicts=_TRAIN_LITTLE - {"linear_probe"}),
    Method("lora", lora_, None, conflicts=_TRAIN_LITTLE - {"lora"}),
]
