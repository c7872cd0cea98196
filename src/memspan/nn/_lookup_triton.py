# mypy: disable-error-code="no-untyped-call,no-untyped-def,untyped-decorator"
"""The CUDA kernels behind :mod:`memspan.nn.lookup`, in Triton.

Forward: one program a block of tokens and a block of outputs; it walks the K tables and keeps its sums in
float32 registers. Where no gradient is wanted, one kernel hashes and sums: a program a token and a block of
outputs, many tables at once, so that many rows are on their way together; with few tokens the tables are
split over further programs, whose float32 sums are added in a fixed order. Backward: gradients of weights by
token and table; gradients of tables by atomic addition into float32, since tokens that share a row add to it
in no fixed order.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["gradients", "lacks", "lookup", "lookup_hashed"]

TOKENS, OUTPUTS = 16, 128  # of one program
TABLES = 64  # read together by a program that hashes; with 64 outputs


def lacks() -> str:
    """Why these kernels cannot run here; empty where they can (a CUDA device, or Triton's interpreter)."""
    if torch.cuda.is_available() or triton.knobs.runtime.interpret:
        return ""
    return "Triton's kernels need a CUDA device"


def lookup(code: Tensor, weight: Tensor, tables: Tensor) -> Tensor:
    """Weighted sum of rows: code (int32) and weight (float32) (n, K), tables (K, R, out) to (n, out)."""
    (n, count), (_, rows, out) = code.shape, tables.shape
    y = torch.empty(n, out, dtype=tables.dtype, device=tables.device)
    if n:
        grid = (triton.cdiv(n, TOKENS), triton.cdiv(out, OUTPUTS))
        _forward[grid](code, weight, tables, y, n, count, rows, out, TOKENS, OUTPUTS)
    return y


def gradients(
    code: Tensor,
    weight: Tensor,
    tables: Tensor,
    dy: Tensor,
    place: Tensor | None,
    visited: int,
    *,
    of_weight: bool,
    of_tables: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of weights and tables; ``place`` (K, R) says where rows go among ``visited`` compact ones."""
    (n, count), (_, rows, out) = code.shape, tables.shape
    dweight, dtables = None, None
    blocks = triton.cdiv(n, TOKENS)
    if of_weight:
        dweight = torch.empty_like(weight)
        if n:
            _of_weight[blocks, count](code, tables, dy, dweight, n, count, rows, out, TOKENS, OUTPUTS)
    if of_tables:
        dense = place is None
        if place is None:
            place, visited = torch.arange(count * rows, device=tables.device), count * rows
        sums = torch.zeros(visited, out, dtype=torch.float32, device=tables.device)
        if n:
            _of_tables[blocks, count, triton.cdiv(out, OUTPUTS)](
                code, weight, dy, place, sums, n, count, rows, out, TOKENS, OUTPUTS
            )
        dtables = sums.to(tables.dtype)
        dtables = dtables.view_as(tables) if dense else dtables
    return dweight, dtables


def lookup_hashed(
    x: Tensor, tables: Tensor, bias: Tensor | None, bits: int, steep: float, scaled: bool
) -> Tensor:
    """Hash x (n, K bits) by its signs, sum rows of tables (K, R, out), add a bias: (n, out), no gradient."""
    x, tables = x.contiguous(), tables.contiguous()
    n, (count, rows, out) = len(x), tables.shape
    y = torch.empty(n, out, dtype=tables.dtype, device=tables.device)
    if not n:
        return y
    at_once = min(TABLES, triton.next_power_of_2(count))
    wide = 64 if at_once * 64 <= 4096 else 32
    blocks = triton.cdiv(out, wide)
    turns = triton.cdiv(count, at_once)
    splits = min(turns, max(1, 2 * _processors(x.device.index or 0) // (n * blocks)))
    turns = triton.cdiv(turns, splits)
    to = y if splits == 1 else torch.empty(splits, n, out, dtype=torch.float32, device=x.device)
    _hashed[n, blocks, splits](
        x, tables, y if bias is None else bias, to, steep, n, count, rows, out, bits, scaled,
        bias is not None, turns, at_once, wide,
    )  # fmt: skip
    return y if splits == 1 else torch.sum(to, 0, dtype=torch.float32).to(y.dtype)


@functools.cache
def _processors(device: int) -> int:
    if not torch.cuda.is_available():
        return 8  # under the interpreter
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def _forward(
    code,
    weight,
    tables,
    y,
    n,
    count: tl.constexpr,
    rows: tl.constexpr,
    out: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    here, inside = token < n, column < out
    total = tl.zeros((TOKENS, OUTPUTS), dtype=tl.float32)
    for k in range(count):
        slot = tl.load(code + token * count + k, mask=here, other=0)
        share = tl.load(weight + token * count + k, mask=here, other=0.0)
        known = (slot >= 0) & (slot < rows)  # a code outside reads nothing and shows as NaN
        at = (k * rows + slot.to(tl.int64)) * out
        mask = (here & known)[:, None] & inside[None, :]
        row = tl.load(tables + at[:, None] + column[None, :], mask=mask, other=float("nan"))
        total += share[:, None] * row.to(tl.float32)
    where = here[:, None] & inside[None, :]
    tl.store(y + token[:, None] * out + column[None, :], total.to(y.dtype.element_ty), mask=where)


@triton.jit
def _hashed(
    x,
    tables,
    bias,
    y,
    steep,
    n,
    count: tl.constexpr,
    rows: tl.constexpr,
    out: tl.constexpr,
    bits: tl.constexpr,
    scaled: tl.constexpr,
    biased: tl.constexpr,
    turns: tl.constexpr,
    TABLES: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    split = tl.program_id(2)
    inside = column < out
    total = tl.zeros((OUTPUTS,), dtype=tl.float32)
    for turn in range(turns):
        k = (split * turns + turn) * TABLES + tl.arange(0, TABLES)
        here = k < count
        slot = tl.zeros((TABLES,), dtype=tl.int32)
        share = tl.full((TABLES,), 1.0, dtype=tl.float32)
        length = tl.zeros((TABLES,), dtype=tl.float32)
        for i in tl.static_range(bits):
            z = tl.load(x + token * count * bits + k * bits + i, mask=here, other=0.0).to(tl.float32)
            slot += tl.where(z >= 0, 1 << i, 0)
            size = tl.abs(z)
            share *= 1.0 / (1.0 + tl.exp(-steep * size))
            length += size
        if scaled:
            share *= length
        at = (k * rows + slot).to(tl.int64) * out
        row = tl.load(tables + at[:, None] + column[None, :], mask=here[:, None] & inside[None, :], other=0.0)
        total += tl.sum(tl.where(here, share, 0.0)[:, None] * row.to(tl.float32), axis=0)
    if biased:
        added = tl.load(bias + column, mask=inside & (split == 0), other=0.0)
        total += added.to(tl.float32)
    place = (split.to(tl.int64) * n + token) * out + column
    tl.store(y + place, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _of_weight(
    code,
    tables,
    dy,
    dweight,
    n,
    count: tl.constexpr,
    rows: tl.constexpr,
    out: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    k = tl.program_id(1)
    here = token < n
    slot = tl.load(code + token * count + k, mask=here, other=0)
    at = (k * rows + slot.to(tl.int64)) * out
    known = here & (slot >= 0) & (slot < rows)
    total = tl.zeros((TOKENS,), dtype=tl.float32)
    for first in range(0, out, OUTPUTS):
        column = first + tl.arange(0, OUTPUTS)
        mask = known[:, None] & (column < out)[None, :]
        row = tl.load(tables + at[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
        gradient = tl.load(dy + token[:, None] * out + column[None, :], mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(row * gradient, axis=1)
    tl.store(dweight + token * count + k, total, mask=here)


@triton.jit
def _of_tables(
    code,
    weight,
    dy,
    place,
    sums,
    n,
    count: tl.constexpr,
    rows: tl.constexpr,
    out: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    k = tl.program_id(1)
    column = tl.program_id(2) * OUTPUTS + tl.arange(0, OUTPUTS)
    here = token < n
    slot = tl.load(code + token * count + k, mask=here, other=0)
    known = here & (slot >= 0) & (slot < rows)
    share = tl.load(weight + token * count + k, mask=known, other=0.0)
    row = tl.load(place + k * rows + slot.to(tl.int64), mask=known, other=0)
    mask = known[:, None] & (column < out)[None, :]
    gradient = tl.load(dy + token[:, None] * out + column[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.atomic_add(sums + row[:, None] * out + column[None, :], share[:, None] * gradient, mask=mask)
