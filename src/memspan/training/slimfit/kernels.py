"""Operators that give exact outputs and keep compressed copies for the backward pass.

Forward values never change. What a layer saves is coded (:mod:`memspan.training.slimfit.codes`), and the
gradient is computed from the codes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from memspan.training.slimfit import codes
from memspan.training.slimfit.codes import (
    GELU_GRID,
    SOFTMAX_GRID,
    Coded,
    CompressionPolicy,
    top_k,
)

__all__ = [
    "compressed_attention",
    "compressed_dropout",
    "compressed_gelu",
    "compressed_layer_norm",
    "compressed_linear",
    "compressed_silu",
]

_SCORES = 1 << 18  # attention scores held at once, see codes.at_once


def compressed_gelu(x: Tensor, approximate: str = "none", bits: int | None = 4) -> Tensor:
    """GELU that keeps its input on a grid of 16 values, two in a byte (paper, section 4.2).

    Args:
        x: any shape.
        approximate: ``"none"`` or ``"tanh"``.
        bits: 4 (steps of 1/2 in [-4, 3.5]), 8 (steps of 1/16 in [-8, 7.94]) or None. Beyond the range the
            gradient is that of its end.

    Returns:
        ``gelu(x)``, exact; the gradient is off by at most 0.2 at 4 bits.

    Example:
        >>> x = torch.tensor([0.1, 3.0], requires_grad=True)
        >>> compressed_gelu(x).sum().backward()
        >>> x.grad        # 0.1 was kept as 0
        tensor([0.5000, 1.0119])
    """
    return F.gelu(x, approximate=approximate) if bits is None else _run(_Pointwise, x, approximate, bits)


def compressed_silu(x: Tensor, bits: int | None = 4) -> Tensor:
    """SiLU, its input kept as in :func:`compressed_gelu`.

    Example:
        >>> compressed_silu(torch.zeros(2)).tolist()
        [0.0, 0.0]
    """
    return F.silu(x) if bits is None else _run(_Pointwise, x, "silu", bits)


def compressed_linear(x: Tensor, weight: Tensor, bias: Tensor | None, policy: CompressionPolicy) -> Tensor:
    """``x Wᵀ + b`` that keeps x in 8 bits when the weight trains, and nothing of it when it does not.

    Args:
        x: (..., in).
        weight: (out, in).
        bias: (out,) or None.
        policy: ``wide_linear`` and ``scale`` count.

    Returns:
        (..., out), exact. The gradient of x is exact, that of the weight is off by at most
        ``(1/32) · Σ|dY|`` in each row while x stays within ±7.9.
    """
    if policy.wide_linear is None or not weight.requires_grad or not torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    return _run(_Linear, x, weight, bias, policy)


def compressed_layer_norm(
    x: Tensor,
    shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    policy: CompressionPolicy,
) -> Tensor:
    """LayerNorm that, with a frozen weight, keeps the largest elements of its normalised input alone.

    Args:
        x: any rank.
        shape: normalised shape, the last dimensions of x.
        weight: of that shape or None; one that trains makes this torch's own LayerNorm.
        bias: likewise; it may train, since that costs nothing.
        eps: added to the variance, also in the backward pass.
        policy: ``layernorm_keep`` and ``per_token`` count.

    Returns:
        As x, exact.
    """
    trains = weight is not None and weight.requires_grad
    if policy.layernorm_keep is None or trains or not torch.is_grad_enabled():
        return F.layer_norm(x, tuple(shape), weight, bias, eps)
    return _run(_LayerNorm, x, weight, bias, tuple(shape), eps, policy)


def compressed_dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """Dropout that keeps one byte per element on every device (torch keeps four on a CPU).

    Example:
        >>> compressed_dropout(torch.ones(3), 0.0).tolist()
        [1.0, 1.0, 1.0]
    """
    if not training or p == 0.0:
        return x
    return _run(_Dropout, x, p)


def compressed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    dropout: float = 0.0,
    causal: bool = False,
    scale: float | None = None,
    policy: CompressionPolicy | None = None,
) -> Tensor:
    """``softmax(scale · q kᵀ + mask) v`` with compressed operands.

    Dropout falls on v instead of the probabilities, so that softmax and product are one operator which keeps
    the probabilities once and the scores never.

    Args:
        q: (B, A, T, d).
        k: (B, A, S, d).
        v: (B, A, S, e).
        mask: bool (True attends) or added to the scores; broadcasts to (B, A, T, S). One that needs a
            gradient makes this plain attention.
        dropout: share of v that is dropped.
        causal: position t attends to s <= t.
        scale: None is 1/sqrt(d).
        policy: the kernel (``attention``), bits and scale; None is the paper's.

    Returns:
        (B, A, T, e), exact but for the place of the dropout.

    Example:
        >>> q = k = v = torch.zeros(1, 1, 2, 4)
        >>> compressed_attention(q, k, v).shape
        torch.Size([1, 1, 2, 4])
    """
    policy = policy or CompressionPolicy()
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if mask is not None and mask.requires_grad:  # a learned bias of positions
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=scale)
    dropped = torch.empty_like(v, dtype=torch.bool).bernoulli_(1 - dropout) if dropout else None
    kernel = _Eager if policy.attention == "eager" else _Fused
    return _run(kernel, q, k, v, mask, dropped, dropout, causal, scale, policy)


# ---- pointwise, norm, linear, dropout ---------------------------------------------------------------------


class _Pointwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: str, bits: int) -> Tensor:
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(codes.encode_packed(x, GELU_GRID[bits]))
            ctx.kind, ctx.bits = kind, bits
        return F.silu(x) if kind == "silu" else F.gelu(x, approximate=kind)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (packed,) = ctx.saved_tensors
        grid = GELU_GRID[ctx.bits]
        table = slopes(ctx.kind, ctx.bits).to(grad)
        return codes.multiply_by_table(grad, packed, table, grid), None, None


def slopes(kind: str, bits: int) -> Tensor:
    """The activation's derivative at each value of its grid, float64, lowest first."""
    grid = GELU_GRID[bits]
    with torch.inference_mode(False), torch.enable_grad():
        at = torch.arange(grid.low, grid.high + 1, dtype=torch.float64) * 2.0**-grid.frac_bits
        at.requires_grad_()
        value = F.silu(at) if kind == "silu" else F.gelu(at, approximate=kind)
        return torch.autograd.grad(value.sum(), at)[0]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, policy: CompressionPolicy
    ) -> Tensor:
        kept = codes.keep(x, policy.wide_linear, policy.scale)
        ctx.save_for_backward(*kept, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *kept, weight = ctx.saved_tensors
        for_x, for_weight, for_bias, _ = ctx.needs_input_grad
        flat = grad.reshape(-1, grad.shape[-1])
        passed = grad @ weight.to(grad.dtype) if for_x else None
        dw = None
        if for_weight:
            x = codes.read(Coded(*kept), grad.dtype).reshape(-1, weight.shape[1])
            dw = (flat.T @ x).to(weight.dtype)
        return passed, dw, flat.sum(0) if for_bias else None, None


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        shape: tuple[int, ...],
        eps: float,
        policy: CompressionPolicy,
    ) -> Tensor:
        y, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        if ctx.needs_input_grad[0]:
            assert policy.layernorm_keep is not None
            width = math.prod(shape)
            normal = (x - mean).mul_(rstd).reshape(-1, width)
            kept = top_k(normal, policy.layernorm_keep, per_token=policy.per_token)
            ctx.save_for_backward(*kept, rstd.reshape(-1), weight)
        ctx.width = math.prod(shape)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows = grad.reshape(-1, ctx.width).contiguous()
        db = None
        if ctx.needs_input_grad[2]:
            db = rows.sum(0)
        if not ctx.needs_input_grad[0]:
            return None, None, db, None, None, None
        index, values, rstd, weight = ctx.saved_tensors
        g = rows.clone() if weight is None else rows * weight.reshape(-1).to(rows.dtype)
        place = index.long()
        row = place // ctx.width
        # The product with the sparse normalised input, without ever making it dense.
        along = values.new_zeros(rows.shape[0]).index_add_(0, row, g.view(-1)[place] * values)
        g -= g.mean(dim=1, keepdim=True)
        g.view(-1).index_add_(0, place, values * along[row], alpha=-1 / ctx.width)
        return (g * rstd[:, None]).to(grad.dtype).view(grad.shape), None, db, None, None, None


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        stays = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p)
        ctx.save_for_backward(stays)
        ctx.factor = 1 / (1 - p) if p < 1 else 0.0
        return (x * stays).mul_(ctx.factor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (stays,) = ctx.saved_tensors
        return (grad * stays).mul_(ctx.factor), None


# ---- attention -------------------------------------------------------------------------------------------


class _Eager(torch.autograd.Function):
    """The paper's kernel: probabilities are kept in 8 bits."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        dropped: Tensor | None,
        dropout: float,
        causal: bool,
        scale: float,
        policy: CompressionPolicy,
    ) -> Tensor:
        saves = any(ctx.needs_input_grad)
        shape = (*q.shape[:3], k.shape[2])
        out = _out_for(q, v.shape[-1])
        held: Tensor | None = None
        if saves:
            held = q.new_empty(shape, dtype=torch.uint8 if policy.softmax else q.dtype)
        for part in _parts(shape, q.device):
            p = _probabilities(q[part], k[part], _of(mask, part), causal, scale)
            out[part] = p @ _dropped(v[part], _of(dropped, part), dropout)
            if held is not None:
                held[part] = codes.encode(p, SOFTMAX_GRID) if policy.softmax else p
        if saves:
            ctx.save_for_backward(*_kept(ctx, (q, k, v), policy), held, dropped)
            ctx.dropout, ctx.scale = dropout, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *kept, held, dropped = ctx.saved_tensors
        operands, (dq, dk, dv) = _read_back(ctx, kept, grad)
        for part in _parts(held.shape, held.device):
            q, k, v = (codes.read(_coded(one, part), grad.dtype) for one in operands)
            p = held[part]
            p = p if p.is_floating_point() else codes.from_fixed_point(p, SOFTMAX_GRID.frac_bits, grad.dtype)
            stays, g = _of(dropped, part), grad[part]
            dv[part] = _dropped(p.transpose(-1, -2) @ g, stays, ctx.dropout)
            ds = g @ _dropped(v, stays, ctx.dropout).transpose(-1, -2)
            ds.mul_(p)
            ds.addcmul_(p, ds.sum(dim=-1, keepdim=True), value=-1)
            dq[part] = (ds @ k).mul_(ctx.scale)
            dk[part] = (ds.transpose(-1, -2) @ q).mul_(ctx.scale)
        return dq, dk, dv, None, None, None, None, None, None


class _Fused(torch.autograd.Function):
    """No probabilities are kept: output and normaliser are computed again from the coded operands.

    The normaliser has to come from the same operands as the scores; mixed with the exact one, rows of
    probabilities would not sum to 1.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        dropped: Tensor | None,
        dropout: float,
        causal: bool,
        scale: float,
        policy: CompressionPolicy,
    ) -> Tensor:
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(*_kept(ctx, (q, k, v), policy), mask, dropped)
            ctx.setting = dropout, causal, scale
        v = _dropped(v, dropped, dropout)
        return F.scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *kept, mask, dropped = ctx.saved_tensors
        dropout, causal, scale = ctx.setting
        operands, found = _read_back(ctx, kept, grad)
        shape = (*grad.shape[:3], operands[1].codes.shape[2])
        for part in _parts(shape, grad.device):
            inputs = [codes.read(_coded(one, part), grad.dtype).detach().requires_grad_() for one in operands]
            with torch.enable_grad():
                v = _dropped(inputs[2], _of(dropped, part), dropout)
                again = F.scaled_dot_product_attention(
                    inputs[0], inputs[1], v, _of(mask, part), 0.0, causal, scale=scale
                )
            for out, one in zip(found, torch.autograd.grad(again, inputs, grad[part]), strict=True):
                out[part] = one
        return *found, None, None, None, None, None, None


def _kept(ctx: Any, operands: Sequence[Tensor], policy: CompressionPolicy) -> list[Tensor | None]:
    """Codes and scales of queries, keys and values, one after the other; their layout goes to the context."""
    ctx.like = [(x.shape, x.stride()) for x in operands]
    return [one for x in operands for one in codes.keep(x, policy.matmul, policy.scale)]


def _read_back(ctx: Any, kept: Sequence[Any], grad: Tensor) -> tuple[list[Coded], list[Tensor]]:
    """What :func:`_kept` gave, coded still, and an empty gradient of each operand."""
    operands = [Coded(*kept[i : i + 2]) for i in (0, 2, 4)]
    return operands, [_empty(layout, grad) for layout in ctx.like]


def _probabilities(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    scores = (q @ k.transpose(-1, -2)).mul_(scale)
    lowest = torch.finfo(scores.dtype).min
    if mask is not None:
        scores = scores.masked_fill_(~mask, lowest) if mask.dtype == torch.bool else scores.add_(mask)
    if causal:
        after = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(1)
        scores.masked_fill_(after, lowest)
    return scores.softmax(dim=-1)


def _dropped(v: Tensor, stays: Tensor | None, p: float) -> Tensor:
    if stays is None:
        return v
    return (v * stays).mul_(1 / (1 - p) if p < 1 else 0.0) if not v.requires_grad else v * stays / (1 - p)


def _parts(shape: Sequence[int], device: torch.device) -> list[slice]:
    """Slices of the batch, so that few scores exist at once."""
    size = max(1, codes.at_once(device, _SCORES) // max(1, math.prod(shape[1:])))
    return [slice(start, start + size) for start in range(0, shape[0], size)]


def _of(tensor: Tensor | None, part: slice) -> Tensor | None:
    """A part of what may broadcast over the batch."""
    if tensor is None or tensor.dim() < 4 or tensor.shape[0] == 1:
        return tensor
    return tensor[part]


def _coded(kept: Coded, part: slice) -> Coded:
    return Coded(kept.codes[part], None if kept.scale is None else kept.scale[part])


def _empty(layout: tuple[torch.Size, tuple[int, ...]], like: Tensor) -> Tensor:
    """An empty gradient whose dimensions lie in memory as those of its tensor, without gaps."""
    shape, stride = layout
    order = sorted(range(len(shape)), key=lambda d: -stride[d])
    back = [order.index(d) for d in range(len(shape))]
    return like.new_empty([shape[d] for d in order]).permute(back)


def _out_for(q: Tensor, width: int) -> Tensor:
    """Heads lie beside each other in memory, so that joining them again is no copy."""
    batch, heads, length, _ = q.shape
    return q.new_empty(batch, length, heads, width).transpose(1, 2)


def _run(function: type[torch.autograd.Function], *arguments: object) -> Tensor:
    return cast(Tensor, function.apply(*arguments))  # type: ignore[no-untyped-call]
