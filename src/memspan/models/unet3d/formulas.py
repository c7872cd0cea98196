"""Bytes of a training step before it is run, and the largest cube that fits in a budget.

With u_l = (batch) x (channels) x (voxels) elements at level l, d_l couplings in each of its two chains and
k = 3 + 6t elements of u that autograd keeps of a coupling of MBConv blocks (3 of dense ones), the step keeps

- plain: Σ u_l (2 k d_l + 3) - u_last: all that is inside, and each chain's input and output (2 in place of
  3 in batches, where group norm copies the half of the input that it reads);
- checkpoint: Σ u_l (2 d_l + 2) - u_last: each coupling's input;
- reversible: Σ 2 u_l: each chain's output, whatever the depth;

in all cases with what pooling and the convolutions between levels keep. Running a coupling again adds, at its
level, one part (reversible) or both (checkpoint), and the gradients on their way.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from torch import nn

from memspan.base import refuse
from memspan.ledger import Budget
from memspan.models.unet3d.network import MBConv3d, ReversibleUNet3d, _SqueezeExcite
from memspan.nn.reversible import MEMORY, Memory, ReversibleBlock

__all__ = ["plan_volume", "predict_bytes"]


def predict_bytes(
    model: ReversibleUNet3d,
    size: Sequence[int],
    *,
    batch: int = 1,
    memory: Memory | None = None,
    optimizer_states: int = 2,
) -> dict[str, int]:
    """Bytes at the peak of a training step, by category.

    Args:
        model: its parameters' dtype is that of the activations.
        size: (D, H, W) of the volume.
        batch: volumes in a step.
        memory: as of the model; None takes the model's.
        optimizer_states: tensors that the optimizer keeps of each parameter; 2 for Adam, 0 leaves it out.

    Returns:
        ``parameters``, ``gradients``, ``optimizer_state``, ``inputs``, ``saved_activations`` and
        ``temporaries``. Loss, convolution workspaces and the allocator's rounding are not in it.

    Raises:
        BadInput: a size that the model refuses, an unknown way.

    Example:
        >>> net = ReversibleUNet3d(1, 3, channels=(16, 32, 64), depth=4)
        >>> plain, ours = (predict_bytes(net, (32, 32, 32), memory=m) for m in ("store", "reversible"))
        >>> round(sum(plain.values()) / sum(ours.values()), 1)
        10.9
    """
    if len(size) != 3 or any(side < 1 or side % model.multiple for side in size):
        refuse("size", tuple(size), f"give three sides, multiples of {model.multiple}")
    if batch < 1:
        refuse("batch", batch, "use 1 or more")
    way = model.memory if memory is None else memory
    if way not in MEMORY:
        refuse("memory", way, f"use one of {', '.join(map(repr, MEMORY))}")
    first = next(model.parameters())
    element = first.element_size()
    copies = batch > 1 and isinstance(_first_part(model)[0], nn.GroupNorm)
    ends = 2 if copies else 3
    levels = range(len(model.channels))
    u = [batch * model.channels[level] * prod(size) // 8**level for level in levels]
    kept, widened = _of_a_coupling(model)
    saved = -u[-1] if way != "reversible" else 0
    for level in levels:
        depth = model.depths[level]
        times = {"store": 2 * kept * depth + ends, "checkpoint": 2 * depth + 2, "reversible": 2}
        saved += u[level] * times[way]
    saved_bytes = element * saved
    for level in levels[:-1]:
        pooled = u[level] // 8
        saved_bytes += pooled * (8 + element)  # positions of the maxima (int64), and the convolution's input
        saved_bytes += 2 * u[level] * element if model.skip == "concat" else 0
    again = {"store": 0.0, "checkpoint": kept, "reversible": kept / 2}[way]
    moving = {"store": 2.0, "checkpoint": 2.0, "reversible": 4.0 + widened / 2}[way]
    # On CPU a dense convolution unfolds its input: 27 c voxels, in place of the 3 c that it will keep.
    columns = 12.0 if model.block == "conv" and first.device.type == "cpu" else 0.0
    temporaries = max(one * (again + widened / 2 + moving + columns) for one in u)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    return {
        "parameters": weights,
        "gradients": trained,
        "optimizer_state": optimizer_states * trained,
        "inputs": batch * model.in_channels * prod(size) * element,
        "saved_activations": saved_bytes,
        "temporaries": int(element * temporaries),
    }


def plan_volume(
    model: ReversibleUNet3d, budget: Budget | str | int, *, batch: int = 1, optimizer_states: int = 2
) -> int:
    """The side of the largest cube that a training step holds within a budget, in voxels.

    Args:
        model: as it is, with its ``memory``.
        budget: bytes, such as ``"8GiB"``.
        batch: volumes in a step.
        optimizer_states: as in :func:`predict_bytes`.

    Returns:
        A multiple of ``model.multiple``.

    Raises:
        BadInput: not even the smallest cube fits; the bytes that it needs are told.

    Example:
        >>> net = ReversibleUNet3d(1, 3, channels=(16, 32, 64), depth=4)
        >>> sides = {}
        >>> for net.memory in ("store", "reversible"):
        ...     sides[net.memory] = plan_volume(net, "1GiB")
        >>> sides
        {'store': 36, 'reversible': 84}
    """
    allowed, step = Budget.parse(budget), int(model.multiple)

    def needs(sides: int) -> int:
        size = (sides * step,) * 3
        told: dict[str, Any] = {"batch": batch, "optimizer_states": optimizer_states}
        return sum(predict_bytes(model, size, **told).values())

    if needs(1) > allowed.bytes:
        remedy = f"a cube of {step} voxels needs {Budget(needs(1))}; give more, or fewer channels"
        refuse("budget", str(allowed), remedy)
    low, high = 1, 2
    while needs(high) <= allowed.bytes:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if needs(middle) <= allowed.bytes else (low, middle)
    return low * step


def _first_part(model: ReversibleUNet3d) -> nn.Sequential:
    block = next(model.chains()).blocks[0]
    assert isinstance(block, ReversibleBlock)
    assert isinstance(block.f, nn.Sequential)
    return block.f


def _of_a_coupling(model: ReversibleUNet3d) -> tuple[float, float]:
    """Elements over u that autograd keeps of a coupling run plainly; inner width over outer."""
    part = _first_part(model)
    if not isinstance(part, MBConv3d):
        return 3.0, 1.0
    expansion = float(part.expansion)
    squeezed = any(isinstance(layer, _SqueezeExcite) for layer in part)
    return 3 + 6 * expansion + (expansion if squeezed else 0), expansion
