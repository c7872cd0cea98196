# mypy: disable-error-code="no-untyped-call,no-untyped-def,untyped-decorator"
"""The CUDA kernels behind :mod:`memspan.training.peqa.layers`, in Triton: they read the packed integers.

A weight is built in one launch (:func:`integers`), the gradient of its scales takes one more
(:func:`scale_gradient`), and a few rows of x are multiplied without any weight in memory (:func:`product`).
Arithmetic is in float32, rounded once to the dtype that is asked for. On fake tensors nothing is launched, so
that a trace finds the same memory as a run.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["integers", "lacks", "product", "scale_gradient"]

VALUES = 1024  # of one row that a program reads at once
PROGRAMS = 132  # at least, where a layer allows: one for each multiprocessor of a large GPU


def lacks() -> str:
    """Why these kernels cannot run here; empty where they can (a CUDA device, or Triton's interpreter)."""
    if torch.cuda.is_available() or triton.knobs.runtime.interpret:
        return ""
    return "Triton's kernels need a CUDA device"


def integers(
    qweight: Tensor, zeros: Tensor, scales: Tensor | None, bits: int, m: int, dtype: torch.dtype
) -> Tensor:
    """``q - z``, or ``s (q - z)``, as (n, m) of a dtype: what torch's operators give, bit for bit."""
    n, groups = zeros.shape
    tile = torch.empty(n, m, dtype=dtype, device=qweight.device)
    if tile.numel() and not isinstance(qweight, FakeTensor):
        values, size = _values(m), m // groups
        rows = max(1, 4 * VALUES // values)
        grid = (triton.cdiv(n, rows), triton.cdiv(m, values))
        given = zeros if scales is None else scales.contiguous()
        with _on(qweight):
            _integers[grid](
                qweight.contiguous(),
                zeros.contiguous(),
                given,
                tile,
                n,
                m,
                qweight.shape[1],
                groups,
                size,
                bits,
                scales is not None,
                rows,
                values,
                _span(size, groups, values),
            )
    return tile


def scale_gradient(dweight: Tensor, qweight: Tensor, zeros: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """``Σ dW (q - z)`` over each group, (n, groups), from the gradient (n, m) of the weight."""
    (n, m), groups = dweight.shape, zeros.shape[1]
    found = torch.empty(n, groups, dtype=dtype, device=qweight.device)
    if found.numel() and not isinstance(qweight, FakeTensor):
        size = m // groups
        values = _values(size)
        rows = max(1, VALUES // values)
        with _on(qweight):
            _of_scales[(triton.cdiv(n, rows) * groups,)](
                dweight.contiguous(),
                qweight.contiguous(),
                zeros.contiguous(),
                found,
                n,
                m,
                qweight.shape[1],
                groups,
                size,
                bits,
                triton.cdiv(size, values),
                rows,
                values,
            )
    return found


def product(
    x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor, bits: int, bias: Tensor | None
) -> Tensor:
    """``x (s (q - z))ᵀ + bias`` for a few rows of x, (t, m) to (t, n): each packed byte is read once."""
    (t, m), (n, groups) = x.shape, zeros.shape
    values, size = _values(m), m // groups
    rows = 8
    while rows > 1 and n < 2 * rows * PROGRAMS:
        rows //= 2
    # A short layer with long rows: several programs share a row, and their sums are added afterwards.
    chunks = triton.cdiv(m, values)
    parts = min(chunks, triton.cdiv(PROGRAMS, n)) if n < PROGRAMS and chunks >= 8 else 1
    y = torch.empty(
        (parts, t, n) if parts > 1 else (t, n), dtype=torch.float32 if parts > 1 else x.dtype, device=x.device
    )
    if y.numel() and not isinstance(qweight, FakeTensor):
        with _on(qweight):
            _product[(triton.cdiv(n, rows), parts)](
                x.contiguous(),
                qweight.contiguous(),
                scales.contiguous(),
                zeros.contiguous(),
                zeros if bias is None else bias,
                y,
                t,
                n,
                m,
                qweight.shape[1],
                groups,
                size,
                bits,
                bias is not None and parts == 1,
                triton.cdiv(chunks, parts),
                triton.next_power_of_2(t),
                rows,
                values,
                _span(size, groups, values),
            )
    if parts > 1:
        y = y.sum(0)
        y = (y if bias is None else y.add_(bias)).to(x.dtype)
    return y


def _values(length: int) -> int:
    """Values of a row that a program reads at once: a power of two, in whole groups of packed bytes."""
    return int(min(VALUES, max(16, triton.next_power_of_2(length))))


def _span(size: int, groups: int, values: int) -> int:
    """The longest run, a power of two, that never crosses from one group into the next."""
    return values if groups == 1 else min(values, size & -size)


def _on(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()


@triton.jit
def _integers(
    qweight,
    zeros,
    scales,
    tile,
    n,
    m,
    width,
    groups,
    size,
    BITS: tl.constexpr,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    VALUES: tl.constexpr,
    SPAN: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * VALUES
    here = row < n
    found = _centred(qweight, zeros, row, here, first, m, width, groups, size, BITS, ROWS, VALUES, SPAN)
    if SCALED:
        found = _scaled(found, scales, row, here, first, m, groups, size, ROWS, VALUES, SPAN)
    column = first + tl.arange(0, VALUES)
    found = tl.reshape(found, (ROWS, VALUES)).to(tile.dtype.element_ty)
    tl.store(tile + row[:, None] * m + column[None, :], found, mask=here[:, None] & (column < m)[None, :])


@triton.jit
def _product(
    x,
    qweight,
    scales,
    zeros,
    bias,
    y,
    tokens,
    n,
    m,
    width,
    groups,
    size,
    BITS: tl.constexpr,
    BIAS: tl.constexpr,
    STEPS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    VALUES: tl.constexpr,
    SPAN: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = row < n
    token = tl.arange(0, TOKENS)
    total = tl.zeros((TOKENS, ROWS), dtype=tl.float32)
    for step in range(STEPS):
        first = (tl.program_id(1) * STEPS + step) * VALUES
        found = _centred(qweight, zeros, row, here, first, m, width, groups, size, BITS, ROWS, VALUES, SPAN)
        found = _scaled(found, scales, row, here, first, m, groups, size, ROWS, VALUES, SPAN)
        weight = tl.reshape(found, (ROWS, VALUES))
        column = first + tl.arange(0, VALUES)
        for t in tl.static_range(TOKENS):
            entry = tl.load(x + t * m + column, mask=(column < m) & (t < tokens), other=0.0).to(tl.float32)
            one = tl.sum(weight * entry[None, :], axis=1)
            total += tl.where(token[:, None] == t, one[None, :], 0.0)
    if BIAS:
        total += tl.load(bias + row, mask=here, other=0.0).to(tl.float32)[None, :]
    at = (tl.program_id(1) * tokens + token).to(tl.int64)[:, None] * n + row[None, :]
    mask = (token < tokens)[:, None] & here[None, :]
    tl.store(y + at, total.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _of_scales(
    dweight,
    qweight,
    zeros,
    found,
    n,
    m,
    width,
    groups,
    size,
    BITS: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    VALUES: tl.constexpr,
):
    group = tl.program_id(0) % groups
    row = (tl.program_id(0) // groups).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = row < n
    zero = tl.load(zeros + row * groups + group, mask=here, other=0).to(tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for step in range(STEPS):
        place = step * VALUES + tl.arange(0, VALUES)
        column = group * size + place
        mask = here[:, None] & (place < size)[None, :]
        # Groups may begin within a byte, so that each value is looked up alone.
        byte, shift = column * BITS // 8, column * BITS % 8
        at = row[:, None] * width + byte[None, :]
        word = tl.load(qweight + at, mask=mask, other=0).to(tl.int32)
        if BITS == 3:
            more = tl.load(qweight + at + 1, mask=mask & (byte + 1 < width)[None, :], other=0)
            word = word | (more.to(tl.int32) << 8)
        q = (word >> shift[None, :]) & ((1 << BITS) - 1)
        gradient = tl.load(dweight + row[:, None] * m + column[None, :], mask=mask, other=0.0)
        total += tl.sum(gradient.to(tl.float32) * (q.to(tl.float32) - zero[:, None]), axis=1)
    tl.store(found + row * groups + group, total.to(found.dtype.element_ty), mask=here)


@triton.jit
def _centred(
    qweight,
    zeros,
    row,
    here,
    first,
    m,
    width,
    groups,
    size,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    VALUES: tl.constexpr,
    SPAN: tl.constexpr,
):
    """``q - z`` from column ``first`` on, float32, as (ROWS, spans, SPAN): a span lies within one group."""
    q = _unpacked(qweight, row, here, first, width, BITS, VALUES).to(tl.float32)
    start = first + SPAN * tl.arange(0, VALUES // SPAN)
    mask = here[:, None] & (start < m)[None, :]
    zero = tl.load(zeros + row[:, None] * groups + (start // size)[None, :], mask=mask, other=0)
    return tl.reshape(q, (ROWS, VALUES // SPAN, SPAN)) - zero.to(tl.float32)[:, :, None]


@triton.jit
def _scaled(
    found,
    scales,
    row,
    here,
    first,
    m,
    groups,
    size,
    ROWS: tl.constexpr,
    VALUES: tl.constexpr,
    SPAN: tl.constexpr,
):
    start = first + SPAN * tl.arange(0, VALUES // SPAN)
    mask = here[:, None] & (start < m)[None, :]
    scale = tl.load(scales + row[:, None] * groups + (start // size)[None, :], mask=mask, other=0.0)
    return found * scale.to(tl.float32)[:, :, None]


@triton.jit
def _unpacked(qweight, row, here, first, width, BITS: tl.constexpr, VALUES: tl.constexpr):
    """Integers (ROWS, VALUES) from column ``first`` on; bytes are loaded side by side, then taken apart."""
    at = qweight + row[:, None] * width
    if BITS == 3:
        byte = first // 8 * 3 + 3 * tl.arange(0, VALUES // 8)
        word = tl.load(at + byte[None, :], mask=here[:, None] & (byte < width)[None, :], other=0).to(tl.int32)
        for k in tl.static_range(1, 3):
            inside = here[:, None] & (byte + k < width)[None, :]
            more = tl.load(at + (byte + k)[None, :], mask=inside, other=0).to(tl.int32)
            word = word | (more << (8 * k))
        even = _four(word & 7, (word >> 6) & 7, (word >> 12) & 7, (word >> 18) & 7)
        odd = _four((word >> 3) & 7, (word >> 9) & 7, (word >> 15) & 7, (word >> 21) & 7)
        found = tl.interleave(even, odd)
    else:
        byte = first * BITS // 8 + tl.arange(0, VALUES * BITS // 8)
        word = tl.load(at + byte[None, :], mask=here[:, None] & (byte < width)[None, :], other=0)
        if BITS == 8:
            found = word
        elif BITS == 4:
            found = tl.interleave(word & 15, word >> 4)
        else:
            found = _four(word & 3, (word >> 2) & 3, (word >> 4) & 3, word >> 6)
    return found


@triton.jit
def _four(a, b, c, d):
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
