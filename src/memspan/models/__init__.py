"""Networks that spend bytes and operations well.

- :mod:`memspan.models.efficientvit`: image backbones whose speed is set by memory traffic, not by FLOPs.
- :mod:`memspan.models.memoryformer`: tables indexed by signs in the place of matrices: more bytes, fewer
  multiply-adds.
- :mod:`memspan.models.lm`: a small dense language model, the network that others are compared with.

Names are loaded when first used, so that importing one network does not load the others.
"""

from importlib import import_module
from typing import TYPE_CHECKING

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

_HOMES = {
    "CascadedGroupAttention": "efficientvit",
    "CausalLM": "lm",
    "EfficientViT": "efficientvit",
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
    "memory_cost": "memoryformer",
}

__all__ = [
    "CascadedGroupAttention",
    "CausalLM",
    "EfficientViT",
    "MemoryBlock",
    "MemoryFormerConfig",
    "MemoryFormerLM",
    "MemoryLinear",
    "MultiMemoryLinear",
    "RowAdam",
    "efficientvit_m0",
    "efficientvit_m1",
    "efficientvit_m2",
    "efficientvit_m3",
    "efficientvit_m4",
    "efficientvit_m5",
    "memory_cost",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
