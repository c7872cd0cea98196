# mypy: disable-error-code="no-untyped-call"
"""Tables indexed by codes: a weighted sum of one row from each of K tables, fast forward and backward.

``y = sum over k of weight[k] * tables[k, code[k]]``. Written with gather it makes a tensor K times the
output; with ``embedding_bag`` its backward pass is slow. Here are kernels for the CPU (compiled when first
used) and for CUDA (Triton), as operators of torch, so that tracers, exporters and ``torch.func`` follow them.
:func:`hash_codes` makes codes from signs, :func:`slot_usage` tells how evenly rows are used.

Sources: MemoryFormer, NeurIPS 2024, section 3 (hashing by signs, its weight, the sum over tables).
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from memspan.base import refuse
from memspan.nn import _lookup_cpu as cpu
from memspan.nn import _lookup_ops as ops
from memspan.nn._lookup_ops import hash_codes_reference, lookup_sum_reference, refuse_outside

__all__ = [
    "BACKENDS",
    "Backend",
    "SlotUsage",
    "Weight",
    "available",
    "hash_codes",
    "hash_codes_reference",
    "hashed_lookup_sum",
    "lookup_sum",
    "lookup_sum_reference",
    "slot_usage",
]

Backend = Literal["auto", "reference", "embedding_bag", "cpu", "triton"]
Weight = Literal["prob", "scaled"]
BACKENDS: tuple[Backend, ...] = ("auto", "reference", "embedding_bag", "cpu", "triton")
MAX_BITS = 16
_FEW = 1 << 27  # numbers read; where the two kernels break even on an H200
_PLAIN = frozenset(
    (Tensor, nn.Parameter)
)  # subclasses (fake, distributed, quantised) have no address to give


def lookup_sum(
    code: Tensor,
    weight: Tensor,
    tables: Tensor,
    *,
    backend: Backend = "auto",
    sparse: bool = False,
) -> Tensor:
    """Sum over K tables of one row each, times its weight.

    Args:
        code: (..., K), int32 or int64: the row of each table, 0 to R - 1.
        weight: (..., K), floating.
        tables: (K, R, out), floating, on the device of ``code``.
        backend: ``"auto"`` takes the kernel of the device where there is one and torch's ``embedding_bag``
            elsewhere. ``"reference"`` alone can be differentiated twice.
        sparse: the gradient of the tables holds visited rows alone (sparse COO, two sparse dimensions), as
            :class:`memspan.models.optim.RowAdam` and ``torch.optim.SparseAdam`` take it.

    Returns:
        (..., out), of the tables' dtype; rows of two bytes an entry are summed in float32.

    Raises:
        BadInput: shapes or types that do not fit, codes outside the tables (not looked at on CUDA), more than
            2**31 rows in all, a backend that this machine lacks.

    Example:
        >>> tables = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[10.0, 0.0], [0.0, 10.0]]])  # K = R = out = 2
        >>> lookup_sum(torch.tensor([[0, 1]]), torch.tensor([[1.0, 0.5]]), tables).tolist()
        [[1.0, 5.0]]
    """
    _check(code, weight, tables, backend)
    if backend == "reference" and not _looks_only(code):
        refuse_outside(code, tables.shape[1])
    lead = code.shape[:-1]
    code, weight = code.reshape(-1, code.shape[-1]), weight.reshape(-1, code.shape[-1])
    return _sum(code, weight, tables, backend, sparse).view(*lead, tables.shape[2])


def hash_codes(
    x: Tensor,
    bits: int,
    *,
    temperature: float = 1.0,
    weight: Weight = "prob",
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Code and weight of each chunk of ``bits`` entries: the corner it points to, and how surely.

    Bit i of a code is 1 where entry i of the chunk is 0 or more (the first entry is the lowest bit; -0.0
    counts as 0). The weight ``"prob"`` is the softmax over all corners c of <z, c>/temperature at the chosen
    corner, ``prod_i sigmoid(2|z_i|/temperature)``; ``"scaled"`` multiplies it by ``sum_i |z_i|``. Codes pass
    no gradient, weights do.

    Args:
        x: (..., d), floating, d divisible by ``bits``.
        bits: entries of a chunk, 1 to 16.
        temperature: above 0.
        weight: which form.
        backend: ``"reference"`` for torch's operators alone.

    Returns:
        Codes (..., d / bits), int32, and weights of the same shape (float32, or float64 where x is).

    Raises:
        BadInput: x not floating or not divisible, bits outside 1 to 16, a temperature that is not above 0;
            NaN in x while ``torch.autograd.set_detect_anomaly`` is on (else NaN comes out as the weight).

    Example:
        >>> code, weight = hash_codes(torch.tensor([[0.7, -0.1]]), bits=2)
        >>> code.tolist(), round(float(weight), 4)
        ([[1]], 0.4411)
    """
    check_hash(x, bits, temperature, weight)
    if not torch.compiler.is_compiling() and torch.is_anomaly_enabled() and bool(x.isnan().any()):
        refuse("x", "NaN", "NaN hashes to row 0 of its table; find where it comes from")
    steep, scaled = 2.0 / temperature, weight == "scaled"
    if backend == "reference" or x.is_cuda or _derives():
        return hash_codes_reference(x, bits, steep, scaled)
    code, share = ops.hash_signs(x.reshape(-1, x.shape[-1]), bits, steep, scaled)
    shape = (*x.shape[:-1], x.shape[-1] // bits)
    return code.view(shape), share.view(shape)


def hashed_lookup_sum(
    x: Tensor,
    tables: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    weight: Weight = "prob",
    backend: Backend = "auto",
    sparse: bool = False,
) -> Tensor:
    """``bias + lookup_sum(*hash_codes(x), tables)``; one kernel where no gradient is wanted.

    Args:
        x: (..., K · bits), floating; tables have 2**bits rows.
        tables: (K, 2**bits, out).
        bias: (out,), or None.
        temperature: as :func:`hash_codes`.
        weight: likewise.
        backend: as :func:`lookup_sum`.
        sparse: likewise.

    Raises:
        BadInput: tables whose rows are no power of two, or an input of another width.

    Example:
        >>> hashed_lookup_sum(torch.zeros(1, 2), torch.ones(1, 4, 3)).tolist()
        [[0.25, 0.25, 0.25]]
    """
    if backend in ("auto", "cpu") and runs_whole(x) and type(tables) in _PLAIN and tables.is_cpu:
        ready = cpu.Ready.of(tables, bias, temperature, weight)
        y = None if ready is None else ready(x, tables, bias)
        if y is not None:
            return y
    count, rows, out = tables.shape
    bits = int(rows).bit_length() - 1  # jit.trace gives sizes as tensors
    if x.dim() < 1 or x.shape[-1] != count * bits or rows != 1 << bits:
        refuse("x", tuple(x.shape), f"tables {tuple(tables.shape)} take (..., {count} · log2 of their rows)")
    if (backend == "triton" or (backend == "auto" and tables.is_cuda)) and _hashes_whole(x, tables):
        from memspan.nn import _lookup_triton

        check_hash(x, bits, temperature, weight)
        rows_of_x, scaled = x.reshape(-1, x.shape[-1]), weight == "scaled"
        y = _lookup_triton.lookup_hashed(rows_of_x, tables, bias, bits, 2.0 / temperature, scaled)
        return y.view(*x.shape[:-1], out)
    code, share = hash_codes(
        x,
        bits,
        temperature=temperature,
        weight=weight,
        backend="reference" if backend == "reference" else "auto",
    )
    flat = code.view(-1, code.shape[-1]), share.view(-1, code.shape[-1])
    y = _sum(*flat, tables, backend, sparse).view(*code.shape[:-1], out)
    return y if bias is None else y + bias


class SlotUsage(NamedTuple):
    """How the rows of each table are used.

    Attributes:
        shares: (K, R), the share of items that read each row; sums to 1 along rows.
        perplexity: (K,), 2 to the entropy of the shares: R where all rows are used alike, 1 where one is.
        dead: (K,), rows that no item reads.
    """

    shares: Tensor
    perplexity: Tensor
    dead: Tensor

    @property
    def entropy_bits(self) -> Tensor:
        """Entropy of the shares in bits, (K,)."""
        return self.perplexity.log2()


def slot_usage(code: Tensor, n_slots: int | None = None) -> SlotUsage:
    """Shares, perplexity and dead rows of tables, from what items read.

    Args:
        code: (..., K) integers, the row that each item reads in each table; or (..., K, R) floating, the
            share of its reading that each item gives to each row (soft reads).
        n_slots: R; needed with integers.

    Raises:
        BadInput: no item, codes outside 0 to R - 1, negative or NaN shares, shares that are all 0.

    Example:
        >>> usage = slot_usage(torch.tensor([[0], [0], [1], [1]]), n_slots=4)
        >>> usage.shares.tolist(), usage.perplexity.tolist(), usage.dead.tolist()
        ([[0.5, 0.5, 0.0, 0.0]], [2.0], [2])
    """
    if code.is_floating_point():
        if code.dim() < 2 or not code.numel() or bool((~(code >= 0)).any()):
            refuse("code", tuple(code.shape), "soft reads are (..., K, R), one item or more, each 0 or more")
        counts = code.double().flatten(0, -3).sum(0) if code.dim() > 2 else code.double()
    else:
        if n_slots is None or n_slots < 1 or code.dim() < 1 or not code.numel():
            refuse("n_slots", n_slots, "codes are (..., K), one item or more; say how many rows a table has")
        refuse_outside(code, n_slots)
        tables = code.shape[-1]
        flat = code.reshape(-1, tables).long() + n_slots * torch.arange(tables, device=code.device)
        counts = torch.bincount(flat.flatten(), minlength=tables * n_slots).view(tables, n_slots).double()
    totals = counts.sum(-1, keepdim=True)
    if not bool((totals > 0).all()):
        refuse("code", "all shares are 0", "give items that read something")
    shares = counts / totals
    entropy = torch.special.entr(shares).sum(-1)
    return SlotUsage(shares.float(), entropy.exp().float(), (counts == 0).sum(-1))


def available() -> dict[str, str]:
    """Backends by name: an empty text where one can be used on this machine, else the reason why not.

    Compiles the CPU kernel where that has not happened yet.

    Example:
        >>> available()["reference"]
        ''
    """
    try:
        cpu.library()
        compiled = ""
    except cpu.CannotCompile as error:
        compiled = str(error)
    return {"reference": "", "embedding_bag": "", "cpu": compiled, "triton": ops.lacks_triton()}


def runs_whole(x: Tensor) -> bool:
    """Whether one kernel may hash ``x`` and sum: a plain tensor in CPU memory, and no gradient is wanted.

    A call past torch's dispatcher saves half of a decoded token's time, and nobody who watches the dispatcher
    (a tracer, a mode that counts) would see it: then the operators below do the same work.
    """
    return (
        (type(x) is Tensor or type(x) is nn.Parameter)
        and x.is_cpu
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and _transforms() is None
        and torch._C._get_tracing_state() is None
        and not torch._C._len_torch_dispatch_stack()
        and not torch.is_anomaly_enabled()
    )


def _hashes_whole(x: Tensor, tables: Tensor) -> bool:
    """Whether Triton's kernel that hashes and sums may run: few tokens, no gradient wanted, plain tensors.

    It takes one token at a time; with many the other kernel, which takes 16, moves fewer bytes.
    """
    return (
        x.shape[:-1].numel() * tables.shape[0] * tables.shape[2] <= _FEW
        and type(x) in _PLAIN
        and type(tables) in _PLAIN
        and x.device == tables.device
        and tables.dtype != torch.float64
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and _transforms() is None
        and torch._C._get_tracing_state() is None
        and not torch._C._len_torch_dispatch_stack()
        and not torch.is_anomaly_enabled()
        and not ops.lacks_triton()
    )


def check_hash(x: Tensor, bits: int, temperature: float, weight: str) -> None:
    """Refuse what cannot be hashed."""
    check_bits(bits)
    if not x.is_floating_point():
        refuse("x", x.dtype, "give a floating tensor (..., d)")
    if x.dim() < 1 or x.shape[-1] % bits or not x.shape[-1]:
        refuse(
            "x", tuple(x.shape), f"the last dimension must be a multiple of bits = {bits}, at least {bits}"
        )
    if not (temperature > 0 and math.isfinite(temperature)):
        refuse("temperature", temperature, "give a finite number above 0; 1 is the paper's")
    if weight not in ("prob", "scaled"):
        refuse("weight", weight, 'use "prob" (the paper) or "scaled" (times the chunk\'s sum of sizes)')


def check_bits(bits: int) -> None:
    """Refuse numbers of bits that no table can have."""
    if isinstance(bits, bool) or not isinstance(bits, int) or bits < 1:
        refuse("bits", bits, f"give a whole number from 1 to {MAX_BITS}")
    if bits > MAX_BITS:
        refuse(
            "bits",
            bits,
            f"a table would have {2**bits:,} rows, {4 * 2**bits:,} bytes for each output in float32; "
            f"{MAX_BITS} bits are the most",
        )


def _check(code: Tensor, weight: Tensor, tables: Tensor, backend: str) -> None:
    if backend not in BACKENDS:
        refuse("backend", backend, f"use {', '.join(BACKENDS)}")
    if tables.dim() != 3 or not tables.is_floating_point() or not tables.numel():
        refuse(
            "tables",
            f"{tables.dtype} {tuple(tables.shape)}",
            "give floating tables (K, rows, out), none empty",
        )
    if code.dtype not in (torch.int32, torch.int64) or not code.dim() or code.shape[-1] != tables.shape[0]:
        refuse(
            "code",
            f"{code.dtype} {tuple(code.shape)}",
            f"give integers (..., {tables.shape[0]}), one a table",
        )
    if weight.shape != code.shape or not weight.is_floating_point():
        refuse("weight", f"{weight.dtype} {tuple(weight.shape)}", f"give floats of shape {tuple(code.shape)}")
    if tables.shape[0] * tables.shape[1] > 2**31:
        refuse("tables", tuple(tables.shape), "K times rows must stay below 2**31, what an int32 can name")


def _looks_only(code: Tensor) -> bool:
    """Whether values cannot or should not be read: on CUDA that waits, while tracing there are none."""
    traced = torch.compiler.is_compiling() or _transforms() is not None
    return traced or code.is_cuda or type(code) is not Tensor


def _derives() -> bool:
    """Whether ``torch.func`` takes derivatives: torch runs no operator with gradients of its own under it."""
    if torch.compiler.is_compiling():
        return False
    kinds = (one.key() for one in torch._C._functorch.get_interpreter_stack() or ())
    return any(kind != torch._C._functorch.TransformType.Vmap for kind in kinds)


_transforms = torch._C._functorch.peek_interpreter_stack  # None outside vmap, grad and others of torch.func


def _sum(code: Tensor, weight: Tensor, tables: Tensor, backend: Backend, sparse: bool) -> Tensor:
    """``code`` and ``weight`` are (n, K)."""
    if backend == "reference" or _derives():
        return lookup_sum_reference(code, weight, tables)
    if backend == "embedding_bag":
        return _embedding_bag(code, weight, tables, sparse)
    if backend == "cpu":
        trains = torch.is_grad_enabled() and (tables.requires_grad or weight.requires_grad)
        if not tables.is_cpu or ("sum", tables.dtype) not in ops.kernels():
            refuse("backend", backend, f"{available()['cpu'] or 'it takes tensors in CPU memory'}; use auto")
        if trains and ("gradient", tables.dtype) not in ops.kernels():
            refuse("backend", backend, f"it has gradients for float32 and float64, not for {tables.dtype}")
    if backend == "triton" and ops.lacks_triton():
        refuse("backend", backend, f"{ops.lacks_triton()}; use auto")
    return ops.lookup(code, weight, tables, sparse, backend)  # type: ignore[no-any-return]


def _embedding_bag(code: Tensor, weight: Tensor, tables: Tensor, sparse: bool) -> Tensor:
    """By torch's own operator, as its users would write it."""
    if not _looks_only(code):
        refuse_outside(code, tables.shape[1])
    if tables.element_size() == 2 and not tables.is_cuda:
        return lookup_sum_reference(code, weight, tables)
    count, rows, out = tables.shape
    index = code.long() + rows * torch.arange(count, device=code.device)
    # Through a view a sparse gradient would become dense again.
    flat = _Flat.apply(tables) if sparse else tables.reshape(count * rows, out)
    return F.embedding_bag(index, flat, mode="sum", per_sample_weights=weight.to(tables.dtype), sparse=sparse)


class _Flat(Function):
    """(K, R, out) as (K·R, out), with a sparse gradient that stays sparse."""

    @staticmethod
    def forward(ctx: Any, tables: Tensor) -> Tensor:
        ctx.shape = tables.shape
        return tables.reshape(-1, tables.shape[2]).detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.coalesce()
        index, rows = gradient.indices()[0], ctx.shape[1]
        place = torch.stack([index // rows, index % rows])
        return torch.sparse_coo_tensor(
            place, gradient.values(), ctx.shape, is_coalesced=True, check_invariants=False
        )
