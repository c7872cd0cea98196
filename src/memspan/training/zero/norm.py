"""A gradient norm that has the same bits however the gradients are cut over ranks.

A sum of floating-point numbers depends on its order, and a norm put together from per-rank sums depends on
the number of ranks; clipping then carries the difference into every weight. Here each square is split into
parts that lie on a common grid, so that their sums are exact in any order (Demmel and Nguyen 2015, "Parallel
Reproducible Summation"; three folds).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from memspan.base import refuse

__all__ = ["clip_grad_norm_", "exact_norm", "scale_to_norm_"]

_CHUNK = 1 << 18  # elements squared at a time: float64 temporaries stay below 8 MiB
_FOLDS = 3


def clip_grad_norm_(parameters: Iterable[Tensor] | Tensor, max_norm: float) -> Tensor:
    """Scale gradients so that their 2-norm is at most ``max_norm``; the same bits as over ranks.

    What :meth:`ZeroOptimizer.clip_grad_norm_` does over shards, in one process: the reference of a run with
    ``deterministic=True``. ``torch.nn.utils.clip_grad_norm_`` sums in float32 and is about 1e-7 away.

    Args:
        parameters: those without a gradient are left out.
        max_norm: above 0.

    Returns:
        The norm before clipping: float64, 0-dimensional; inf or nan where a gradient is.

    Raises:
        BadInput: ``max_norm`` is not above 0.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> clip_grad_norm_([weight], 1.0).item()
        5.0
        >>> weight.grad.norm().item() <= 1
        True
    """
    given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    gradients = [parameter.grad for parameter in given if parameter.grad is not None]
    total = exact_norm(gradients, sum(gradient.numel() for gradient in gradients))
    scale_to_norm_(gradients, total, max_norm)
    return total


def exact_norm(tensors: Iterable[Tensor], count: int, group: Any = None) -> Tensor:
    """The 2-norm of tensors that lie on one rank or on all, to about 1e-15, the same bits for any split.

    Args:
        tensors: this rank's part. Squares are exact for up to 32-bit floats.
        count: elements on all ranks together.
        group: process group of the ranks; None for this process alone.

    Returns:
        float64, 0-dimensional, the same on every rank.
    """
    parts = list(tensors)
    device = parts[0].device if parts else _home(group)
    largest = torch.zeros((), dtype=torch.float64, device=device)
    for square in _squares(parts):
        largest = torch.maximum(largest, square.amax())
    # MAX over ranks treats nan as each backend likes: inf stands for both until the plain sum tells which.
    largest = torch.where(torch.isfinite(largest), largest, torch.full_like(largest, torch.inf))
    if group is not None:
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    finite = torch.isfinite(largest)
    exponent = torch.frexp(torch.where(finite, largest, torch.ones_like(largest)))[1].long()
    spare = max(count - 1, 0).bit_length() + 1  # 2**spare is at least twice the count
    sums = torch.zeros(_FOLDS + 1, dtype=torch.float64, device=device)
    for square in _squares(parts):
        sums[_FOLDS] += square.sum()
        for fold in range(_FOLDS):
            big = 1.5 * _power_of_two(exponent + spare - fold * (53 - spare))
            high = (square + big) - big
            sums[fold] += high.sum()
            square = square - high
    if group is not None:
        dist.all_reduce(sums, group=group)
    exact = (sums[2] + sums[1]) + sums[0]
    return torch.where(finite, exact, sums[_FOLDS]).sqrt()


def scale_to_norm_(gradients: Iterable[Tensor], total: Tensor, max_norm: float) -> None:
    """Multiply gradients by ``max_norm / total`` where that is below 1; no value is read."""
    if not max_norm > 0:
        refuse("max_norm", max_norm, "give a number above 0")
    factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    for gradient in gradients:
        gradient.mul_(factor.to(gradient.device, gradient.dtype))


def _squares(tensors: list[Tensor]) -> Iterator[Tensor]:
    for tensor in tensors:
        for chunk in tensor.detach().reshape(-1).split(_CHUNK):  # type: ignore[no-untyped-call]
            if chunk.numel():
                yield chunk.double().square_()


def _power_of_two(exponent: Tensor) -> Tensor:
    """2**exponent from its bits: ``pow`` may be off in the last one."""
    return ((exponent.clamp(-1022, 1023) + 1023) << 52).view(torch.float64)


def _home(group: Any) -> torch.device:
    nccl = group is not None and dist.get_backend(group) == "nccl"
    return torch.device("cuda" if nccl else "cpu")
