"""Parts that the library code of two or more rooms needs.

Surgery, lean frozen layers, reversible chains, lookups, bits, pools, spiking neurons.
"""

from memspan.nn.lean import freeze_lean_
from memspan.nn.lookup import lookup_sum, slot_usage
from memspan.nn.pool import class_means, masked_mean
from memspan.nn.reversible import (
    ReversibleBlock,
    ReversibleSequential,
    StackedReversible,
    frozen_statistics,
    reconstruction_error,
)
from memspan.nn.surgery import FeatureTap, find_blocks, recast_, restore_, select, split_at, swap_

__all__ = [
    "FeatureTap",
    "ReversibleBlock",
    "ReversibleSequential",
    "StackedReversible",
    "class_means",
    "find_blocks",
    "freeze_lean_",
    "frozen_statistics",
    "lookup_sum",
    "masked_mean",
    "recast_",
    "reconstruction_error",
    "restore_",
    "select",
    "slot_usage",
    "split_at",
    "swap_",
]
