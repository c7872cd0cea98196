"""Parts that the library code of two or more rooms needs: surgery on models, pools."""

from memspan.nn.pool import class_means, masked_mean
from memspan.nn.surgery import FeatureTap, find_blocks, restore_, select, split_at, swap_

__all__ = [
    "FeatureTap",
    "class_means",
    "find_blocks",
    "masked_mean",
    "restore_",
    "select",
    "split_at",
    "swap_",
]
