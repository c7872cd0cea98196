"""Grids: scales and zero points of a weight matrix, and its integers. Each initialiser is usable alone.

A row of W (n, m) is cut into groups of g consecutive inputs, each with a scale s and a zero point z:
``q = clamp(round(W / s) + z, 0, 2^b - 1)`` and ``Ŵ = s (q - z)``. A weight of 0 comes back as exactly 0.

Sources: range search as in Frantar et al., "OPTQ" (GPTQ), ICLR 2023; OPTQ is their Algorithm 1.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from memspan.base import refuse

__all__ = [
    "Grid",
    "dequantize",
    "groups_of",
    "minmax_grid",
    "optq_",
    "quantize",
    "rtn_grid",
]

_CHUNK = 1 << 18  # weights looked at together: what a processor's cache holds
_SHRINK = tuple(p / 100 for p in range(99, 19, -1))


class Grid(NamedTuple):
    """Integers of a weight matrix and what they mean.

    Attributes:
        q: (n, m) uint8, from 0 to 2^bits - 1, in the order of ``perm`` where there is one.
        scales: (n, m / g) floating.
        zeros: (n, m / g) uint8.
        perm: (m,) int64 or None: column j of ``q`` is input ``perm[j]`` of the layer.
    """

    q: Tensor
    scales: Tensor
    zeros: Tensor
    perm: Tensor | None = None


def groups_of(m: int, group_size: int | None) -> int:
    """Groups in a row of m inputs.

    Raises:
        BadInput: the size does not divide m; the divisors are named.

    Example:
        >>> groups_of(192, 64), groups_of(192, None)
        (3, 1)
        >>> groups_of(192, 100)
        Traceback (most recent call last):
        memspan.base.refusal.BadInput: group_size=100: rows have 192 inputs; use None (per channel) or one of
        1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 192
    """
    if group_size is None:
        return 1
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1 or m % group_size:
        divisors = ", ".join(str(d) for d in range(1, m + 1) if m % d == 0)
        refuse("group_size", group_size, f"rows have {m} inputs; use None (per channel) or one of {divisors}")
    return m // group_size


def minmax_grid(
    weight: Tensor, bits: int, group_size: int | None = None, *, symmetric: bool = False
) -> tuple[Tensor, Tensor]:
    """Scales and zero points that span each group's whole range (0 always inside).

    Args:
        weight: (n, m) floating.
        bits: 2, 3, 4 or 8.
        group_size: inputs a group; None takes the whole row.
        symmetric: zero point fixed at the middle, ``2^(bits - 1)``.

    Returns:
        scales (n, m / g) in the weight's dtype, zeros (n, m / g) uint8. A group of zeros gets scale 1.

    Example:
        >>> scales, zeros = minmax_grid(torch.tensor([[-1.0, 0.0, 2.0]]), 2)
        >>> scales.tolist(), zeros.tolist()
        ([[1.0]], [[1]])
    """
    grouped = weight.reshape(weight.shape[0], groups_of(weight.shape[1], group_size), -1)
    if symmetric:
        top = (1 << (bits - 1)) - 1
        scales = grouped.abs().amax(-1) / top
        zeros = torch.full_like(scales, 1 << (bits - 1))
        scales = torch.where(scales > 0, scales, 1.0)
    else:
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        scales = (high - low) / ((1 << bits) - 1)
        scales = torch.where(scales > 0, scales, 1.0)
        zeros = torch.round(-low / scales)
    return scales, zeros.to(torch.uint8)


def rtn_grid(
    weight: Tensor, bits: int, group_size: int | None = None, *, symmetric: bool = False
) -> tuple[Tensor, Tensor]:
    """The min-max grid, its range shrunk by the factor of 1, 0.99, ..., 0.2 of least squared error.

    Each group takes its own factor; 1 is always tried, so that no group is worse than with
    :func:`minmax_grid`. Arguments and returns are the same. Works through the rows in parts: its temporaries
    are a few of 2^18 numbers, whatever the layer.

    Example:
        >>> weight = torch.cat((torch.linspace(-1, 1, 99), torch.tensor([9.0]))).view(1, -1)
        >>> bool(rtn_grid(weight, 2)[0] < minmax_grid(weight, 2)[0])
        True
    """
    n, m = weight.shape
    groups = groups_of(m, group_size)
    scales = weight.new_empty(n, groups)
    zeros = torch.empty(n, groups, dtype=torch.uint8, device=weight.device)
    step = max(1, _CHUNK // m)
    for start in range(0, n, step):
        part = weight[start : start + step]
        full, zero = minmax_grid(part, bits, group_size, symmetric=symmetric)
        grouped, z = part.reshape(len(part), groups, -1), zero.to(part.dtype).unsqueeze(-1)
        best, least = full, _squared_error(grouped, full, z, bits)
        for p in _SHRINK:
            tried = full * p  # range and step shrink together, so that the zero point stays
            error = _squared_error(grouped, tried, z, bits)
            better = error < least
            best, least = torch.where(better, tried, best), torch.where(better, error, least)
        scales[start : start + step], zeros[start : start + step] = best, zero
    return scales, zeros


def quantize(weight: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """Integers (n, m) uint8 of a weight matrix on a grid: ``clamp(round(W / s) + z, 0, 2^bits - 1)``.

    Example:
        >>> quantize(torch.tensor([[-1.0, 0.4, 2.6]]), torch.ones(1, 1), torch.ones(1, 1), 2).tolist()
        [[0, 1, 3]]
    """
    grouped = weight.reshape(weight.shape[0], scales.shape[1], -1)
    q = torch.round(grouped / scales.unsqueeze(-1)).add_(zeros.unsqueeze(-1)).clamp_(0, (1 << bits) - 1)
    return q.to(torch.uint8).view(weight.shape)


def dequantize(q: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """Weights (n, m) in the scales' dtype: ``s (q - z)``.

    Example:
        >>> dequantize(torch.tensor([[0, 1, 3]]), torch.tensor([[0.5]]), torch.tensor([[1]])).tolist()
        [[-0.5, 0.0, 1.0]]
    """
    grouped = q.reshape(q.shape[0], scales.shape[1], -1).to(scales.dtype)
    return grouped.sub_(zeros.unsqueeze(-1)).mul_(scales.unsqueeze(-1)).view(q.shape)


@torch.no_grad()
def optq_(
    weight: Tensor,
    hessian: Tensor,
    bits: int,
    group_size: int | None = None,
    *,
    grid: Literal["rtn", "minmax"] = "rtn",
    symmetric: bool = False,
    act_order: bool = False,
    block: int = 128,
) -> Grid:
    """Round column by column, each time moving what is lost onto the columns not rounded yet (OPTQ, GPTQ).

    Minimises ``||X (W - Ŵ)ᵀ||²`` rather than ``||W - Ŵ||²``: inputs that vary together make up for each
    other.
    A group's grid is set when its first column is reached, on the weights as they are by then.

    Args:
        weight: (n, m) float32 or float64; **becomes Ŵ in place**.
        hessian: (m, m), ``XᵀX`` over calibration inputs X (k, m); any positive multiple of it does.
        bits: 2, 3, 4 or 8.
        group_size: see :func:`minmax_grid`.
        grid: how the grid of a group is set.
        symmetric: see :func:`minmax_grid`.
        act_order: visit inputs of large ``XᵀX`` first. With groups these are then of columns in that order,
            which ``perm`` of the result tells.
        block: columns between two updates of all that remain; changes speed alone.

    Returns:
        The grid; ``dequantize(q, scales, zeros)`` is Ŵ (its columns in the order ``perm``).

    Raises:
        BadInput: shapes that do not agree, or a Hessian that is not finite.

    Example:
        >>> w, x = torch.randn(8, 16), torch.randn(64, 4) @ torch.randn(4, 16)
        >>> plain = dequantize(quantize(w, *rtn_grid(w, 3), 3), *rtn_grid(w, 3))
        >>> lost = (x @ (w - plain).T).square().sum()
        >>> old = w.clone()
        >>> _ = optq_(w, x.T @ x, 3)
        >>> bool((x @ (old - w).T).square().sum() < lost)
        True
    """
    n, m = weight.shape
    groups = groups_of(m, group_size)
    if hessian.shape != (m, m):
        refuse("hessian", tuple(hessian.shape), f"give ({m}, {m}): XᵀX over inputs of {m} features")
    if not bool(torch.isfinite(hessian).all()):
        refuse("hessian", "not finite", "calibration inputs hold NaN or infinity: look for them in the batch")
    h = hessian.to(weight.dtype).clone()
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1
    w = weight.clone()
    w[:, dead] = 0
    perm = torch.argsort(h.diagonal(), descending=True, stable=True) if act_order else None
    if perm is not None:
        w, h = w[:, perm], h[perm][:, perm]
    upper = _inverse_factor(h)
    size = m // groups
    make = rtn_grid if grid == "rtn" else minmax_grid
    scales = w.new_empty(n, groups)
    zeros = torch.empty(n, groups, dtype=torch.uint8, device=w.device)
    if groups == 1:
        scales, zeros = make(w, bits, None, symmetric=symmetric)
    q = torch.empty(n, m, dtype=torch.uint8, device=w.device)
    for start in range(0, m, block):
        end = min(start + block, m)
        lost = w.new_empty(n, end - start)
        for j in range(start, end):
            group = j // size
            if groups > 1 and j % size == 0:
                # The rest of the group may lie past this block: bring it up to date before its grid is set.
                current = w[:, j : j + size].clone()
                if j + size > end:
                    current[:, end - j :] -= lost[:, : j - start] @ upper[start:j, end : j + size]
                one = make(current, bits, None, symmetric=symmetric)
                scales[:, group : group + 1], zeros[:, group : group + 1] = one
            column = w[:, j : j + 1]
            s, z = scales[:, group : group + 1], zeros[:, group : group + 1]
            q[:, j : j + 1] = quantize(column, s, z, bits)
            error = (column - dequantize(q[:, j : j + 1], s, z)) / upper[j, j]
            w[:, j + 1 : end] -= error * upper[j, j + 1 : end]
            lost[:, j - start : j - start + 1] = error
        w[:, end:] -= lost @ upper[start:end, end:]
    found = dequantize(q, scales, zeros)
    if perm is None:
        weight.copy_(found)
        return Grid(q, scales, zeros)
    weight[:, perm] = found
    if groups > 1:
        return Grid(q, scales, zeros, perm)
    back = torch.argsort(perm)  # one grid a row: the order of columns says nothing any more
    return Grid(q[:, back], scales, zeros)


def _inverse_factor(h: Tensor) -> Tensor:
    """U, upper triangular, with ``UᵀU = (H + λI)⁻¹``; λ is 0.01 of the mean diagonal, more if needed."""
    damping = 0.01 * float(h.diagonal().mean())
    for _ in range(8):
        damped = h.clone()
        damped.diagonal().add_(damping)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            inverse = torch.cholesky_inverse(factor)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not int(failed) and math.isfinite(float(upper.diagonal().sum())):
                found: Tensor = upper
                return found
        damping *= 10
    refuse("hessian", "not positive", "give XᵀX of real calibration inputs, at least a few hundred rows")


def _squared_error(grouped: Tensor, scales: Tensor, z: Tensor, bits: int) -> Tensor:
    s = scales.unsqueeze(-1)
    rounded = (grouped / s).round_().add_(z).clamp_(0, (1 << bits) - 1).sub_(z).mul_(s)
    return rounded.sub_(grouped).square_().sum(-1)
