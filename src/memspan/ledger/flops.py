"""How much arithmetic a function does, counted on the operators that it really calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from memspan.base import refuse

__all__ = ["flops", "macs"]


def flops(function: Callable[..., Any], *inputs: Any, **options: Any) -> int:
    """Floating point operations of ``function(*inputs, **options)``: 2 per multiply-add.

    Matrix products, convolutions and attention are counted (a backward pass inside the function too);
    elementwise work is not. The function really runs: give fake tensors to count without running.

    Args:
        function: a module or any callable.
        inputs: what it is called with.
        options: named arguments of the call.

    Raises:
        BadInput: not callable.

    Example:
        >>> import torch
        >>> flops(torch.nn.Linear(8, 4), torch.zeros(2, 8)), macs(torch.nn.Linear(8, 4), torch.zeros(2, 8))
        (128, 64)
    """
    if not callable(function):
        refuse("function", function, "give a module or a function, then its inputs")
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        function(*inputs, **options)
    return int(counter.get_total_flops())


def macs(function: Callable[..., Any], *inputs: Any, **options: Any) -> int:
    """Multiply-adds of ``function(*inputs, **options)``: half of :func:`flops`."""
    return flops(function, *inputs, **options) // 2


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Two products: scores, then weights by values; shapes are (batch, heads, length, width)."""
    batch, heads, rows, width = query
    return int(2 * batch * heads * rows * key[2] * (width + value[3]))


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Five products: scores again, gradients of weights and values, gradients of queries and keys."""
    batch, heads, rows, width = query
    return int(2 * batch * heads * rows * key[2] * (3 * width + 2 * value[3]))


# torch counts the CUDA kernels of fused attention but not the one it takes on the CPU.
_CPU_ATTENTION: dict[Any, Any] = {
    getattr(torch.ops.aten, name): count
    for name, count in (
        ("_scaled_dot_product_flash_attention_for_cpu", _attention),
        ("_scaled_dot_product_flash_attention_for_cpu_backward", _attention_backward),
    )
    if hasattr(torch.ops.aten, name)
}
