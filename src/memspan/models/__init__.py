"""Networks that spend bytes and operations well.

- :mod:`memspan.models.efficientvit`: image backbones whose speed is set by memory traffic, not by FLOPs.
- :mod:`memspan.models.memoryformer`: tables indexed by signs in the place of matrices: more bytes, fewer
  multiply-adds.
- :mod:`memspan.models.lm`: a small dense language model, the network that others are compared with.
- :mod:`memspan.models.unet3d`: a reversible 3-D U-Net whose activations do not grow with depth.

Names are loaded when first used, so that importing one network does not load the others.
"""

from typing import TYPE_CHECKING

from memspan.base.lazy import lazy_names

if TYPE_CHECKING:
    from memspan.models.efficientvit import (
        CascadedGroupAttention,
        EfficientViT,
        efficientvit_m0,
        efficientvit_m1,
        efficientvit_m2,
        efficientvit_m3,
        efficientvit_m4,
        efficientvit_m5,
    )
    from memspan.models.lm import CausalLM
    from memspan.models.memoryformer import (
        MemoryBlock,
        MemoryFormerConfig,
        MemoryFormerLM,
        MemoryLinear,
        MultiMemoryLinear,
        memory_cost,
    )
    from memspan.models.optim import RowAdam
    from memspan.models.unet3d import (
        MBConv3d,
        ReversibleMBConv3d,
        ReversibleUNet3d,
        nested_regions,
        plan_volume,
        soft_dice_loss,
    )

_HOMES = {
    "CascadedGroupAttention": "efficientvit",
    "CausalLM": "lm",
    "EfficientViT": "efficientvit",
    "MBConv3d": "unet3d",
    "ReversibleMBConv3d": "unet3d",
    "ReversibleUNet3d": "unet3d",
    "MemoryBlock": "memoryformer",
    "MemoryFormerConfig": "memoryformer",
    "MemoryFormerLM": "memoryformer",
    "MemoryLinear": "memoryformer",
    "MultiMemoryLinear": "memoryformer",
    "RowAdam": "optim",
    "efficientvit_m0": "efficientvit",
    "efficientvit_m1": "efficientvit",
    "efficientvit_m2": "efficientvit",
    "efficientvit_m3": "efficientvit",
    "efficientvit_m4": "efficientvit",
    "efficientvit_m5": "efficientvit",
    "nested_regions": "unet3d",
    "plan_volume": "unet3d",
    "soft_dice_loss": "unet3d",
    "memory_cost": "memoryformer",
}

__all__ = [
    "CascadedGroupAttention",
    "CausalLM",
    "EfficientViT",
    "MBConv3d",
    "MemoryBlock",
    "MemoryFormerConfig",
    "MemoryFormerLM",
    "MemoryLinear",
    "MultiMemoryLinear",
    "ReversibleMBConv3d",
    "ReversibleUNet3d",
    "RowAdam",
    "efficientvit_m0",
    "efficientvit_m1",
    "efficientvit_m2",
    "efficientvit_m3",
    "efficientvit_m4",
    "efficientvit_m5",
    "memory_cost",
    "nested_regions",
    "plan_volume",
    "soft_dice_loss",
]


__getattr__, __dir__ = lazy_names(__name__, _HOMES)
