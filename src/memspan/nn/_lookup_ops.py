# mypy: disable-error-code="no-untyped-call"
"""The operators behind :mod:`memspan.nn.lookup`, each beside its naive reference.

``memspan::hash_signs`` and ``memspan::lookup_sum`` are operators of torch like its own: with a form for
fake tensors, gradients, a rule for vmap, a count of operations and, for exporters, a decomposition into
gather and sum. Whoever watches a network (``jit.trace``, ``torch.export``, ``torch.compile``, modes) sees the
operator and not the values that one input gave. Which kernel does the work is chosen when the operator runs,
and by where its tensors lie.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._decomp import register_decomposition
from torch.utils.flop_counter import register_flop_formula

from memspan.base import refuse
from memspan.nn import _lookup_cpu as cpu

__all__ = ["hash_codes_reference", "hash_signs", "kernels", "lacks_triton", "lookup", "lookup_sum_reference"]


def hash_codes_reference(
    x: Tensor, bits: int, steep: float = 2.0, scaled: bool = False
) -> tuple[Tensor, Tensor]:
    """What :func:`memspan.nn.lookup.hash_codes` computes, by torch alone; ``steep`` is 2/temperature."""
    z = x.unflatten(-1, (x.shape[-1] // bits, bits))
    powers = 2 ** torch.arange(bits, dtype=torch.int32, device=x.device)
    code = ((z >= 0).to(torch.int32) * powers).sum(-1, dtype=torch.int32)
    size = z.to(torch.promote_types(x.dtype, torch.float32)).abs()
    weight = torch.sigmoid(steep * size).prod(-1)
    return code, weight * size.sum(-1) if scaled else weight


def lookup_sum_reference(code: Tensor, weight: Tensor, tables: Tensor) -> Tensor:
    """What :func:`memspan.nn.lookup.lookup_sum` computes, in one line of gather; holds K times the output."""
    rows = tables[torch.arange(tables.shape[0], device=tables.device), code.long()]
    wide = torch.promote_types(tables.dtype, torch.float32)
    return (weight.to(wide)[..., None] * rows.to(wide)).sum(-2).to(tables.dtype)


@torch.library.custom_op("memspan::hash_signs", mutates_args=())
def hash_signs(x: Tensor, bits: int, steep: float, scaled: bool) -> tuple[Tensor, Tensor]:
    """Codes and weights, both (n, K), of ``x`` (n, K·bits)."""
    if x.is_cpu and ("hash", x.dtype) in kernels():
        return cpu.hash_rows(x.contiguous(), bits, steep, scaled)
    return hash_codes_reference(x, bits, steep, scaled)


@torch.library.custom_op("memspan::hash_signs_backward", mutates_args=())
def _hash_signs_backward(x: Tensor, dweight: Tensor, bits: int, steep: float, scaled: bool) -> Tensor:
    wide, dweight = x.to(dweight.dtype).contiguous(), dweight.contiguous()
    if x.is_cpu and ("hash_gradient", wide.dtype) in kernels():
        return cpu.hash_gradient(wide, dweight, bits, steep, scaled).to(x.dtype)
    z = wide.unflatten(-1, (-1, bits))
    size, sign = z.abs(), z.sign()
    share = torch.sigmoid(steep * size)
    weight = share.prod(-1, keepdim=True)
    slope = steep * (1 - share) * weight
    if scaled:
        slope = slope * size.sum(-1, keepdim=True) + weight
    return (dweight[..., None] * slope * sign).flatten(-2).to(x.dtype)  # type: ignore[no-any-return]


@torch.library.custom_op("memspan::lookup_sum", mutates_args=())
def lookup(code: Tensor, weight: Tensor, tables: Tensor, sparse: bool, kernel: str) -> Tensor:
    """Weighted sum of rows: code and weight (n, K), tables (K, R, out) to (n, out)."""
    chosen = _choose(kernel, tables)
    code, weight, tables = code.to(torch.int32).contiguous(), _wide(weight, tables), tables.contiguous()
    if chosen == "triton":
        from memspan.nn import _lookup_triton

        return _lookup_triton.lookup(code, weight.float(), tables)
    if chosen == "cpu":
        y = cpu.lookup(code, weight, tables, None)
        if y is not None:
            return y
    if not code.is_cuda:
        refuse_outside(code, tables.shape[1])
    if tables.element_size() == 2 and not tables.is_cuda:  # embedding_bag would sum in two bytes
        return lookup_sum_reference(code, weight, tables)
    return F.embedding_bag(
        _places(code, tables), tables.flatten(0, 1), mode="sum", per_sample_weights=weight.to(tables.dtype)
    )


@torch.library.custom_op("memspan::lookup_sum_backward", mutates_args=())
def _lookup_backward(
    code: Tensor,
    weight: Tensor,
    tables: Tensor,
    dy: Tensor,
    place: Tensor | None,
    rows: int,
    of_weight: bool,
    of_tables: bool,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of weights and tables; ``place`` (K, R) says where rows go among ``rows`` compact ones."""
    chosen = _choose(kernel, tables)
    code, share, tables = code.to(torch.int32).contiguous(), _wide(weight, tables), tables.contiguous()
    wanted = {"of_weight": of_weight, "of_tables": of_tables}
    if chosen == "triton":
        from memspan.nn import _lookup_triton

        dweight, dtables = _lookup_triton.gradients(
            code, share.float(), tables, dy.contiguous(), place, rows, **wanted
        )
    elif chosen == "cpu" and ("gradient", tables.dtype) in kernels():
        dtables, dweight = cpu.lookup_gradient(
            code, share, tables, dy.contiguous(), place=place, rows=rows, **wanted
        )
    else:
        dweight, dtables = _gradients_by_torch(code, share, tables, dy, place, rows, **wanted)
    none = tables.new_empty(0)
    return none if dweight is None else dweight.to(weight.dtype), none if dtables is None else dtables


def _gradients_by_torch(
    code: Tensor,
    weight: Tensor,
    tables: Tensor,
    dy: Tensor,
    place: Tensor | None,
    rows: int,
    *,
    of_weight: bool,
    of_tables: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Table by table, so that no more than one output's size is held beside the gradients."""
    count, slots, out = tables.shape
    wide = dy.to(weight.dtype)
    dweight = torch.empty_like(weight) if of_weight else None
    dtables = wide.new_zeros(count * slots if place is None else rows, out) if of_tables else None
    for k, slot in enumerate(code.long().unbind(1)):
        if dweight is not None:
            dweight[:, k] = (tables[k, slot].to(weight.dtype) * wide).sum(-1)
        if dtables is not None:
            to = slot + k * slots if place is None else place[k, slot]
            dtables.index_add_(0, to, weight[:, k, None] * wide)
    if dtables is not None:
        dtables = dtables.to(tables.dtype)
        dtables = dtables.view_as(tables) if place is None else dtables
    return dweight, dtables


# ---- what torch is told of the operators -----------------------------------------------------------------


@hash_signs.register_fake
def _(x: Tensor, bits: int, steep: float, scaled: bool) -> tuple[Tensor, Tensor]:
    shape = x.shape[0], x.shape[1] // bits
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(shape, dtype=torch.int32), x.new_empty(shape, dtype=wide)


@_hash_signs_backward.register_fake
def _(x: Tensor, dweight: Tensor, bits: int, steep: float, scaled: bool) -> Tensor:
    return x.new_empty(x.shape)


@lookup.register_fake
def _(code: Tensor, weight: Tensor, tables: Tensor, sparse: bool, kernel: str) -> Tensor:
    return tables.new_empty(code.shape[0], tables.shape[2])


@_lookup_backward.register_fake
def _(
    code: Tensor, weight: Tensor, tables: Tensor, dy: Tensor, place: Tensor | None, rows: int,
    of_weight: bool, of_tables: bool, kernel: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = tables.shape if place is None else (rows, tables.shape[2])
    return (
        weight.new_empty(weight.shape) if of_weight else tables.new_empty(0),
        tables.new_empty(shape if of_tables else (0,)),
    )


def _keep_hashed(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *ctx.way = inputs
    ctx.save_for_backward(x)


def _hash_gradient(ctx: Any, _: Tensor, dweight: Tensor) -> tuple[Tensor, None, None, None]:
    return _hash_signs_backward(ctx.saved_tensors[0], dweight, *ctx.way), None, None, None


def _keep_looked_up(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.sparse, ctx.kernel = inputs
    ctx.save_for_backward(*tensors)


def _lookup_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    code, weight, tables = ctx.saved_tensors
    _, of_weight, of_tables, *_ = ctx.needs_input_grad
    visited, place, rows = None, None, 0
    if ctx.sparse and of_tables:
        visited, place = visited_rows(code, tables.shape[1])
        rows = visited.shape[1]
    dweight, dtables = _lookup_backward(
        code, weight, tables, dy, place, rows, of_weight, of_tables, ctx.kernel
    )
    if visited is not None:
        dtables = torch.sparse_coo_tensor(
            visited, dtables, tables.shape, is_coalesced=True, check_invariants=False
        )
    return None, dweight if of_weight else None, dtables if of_tables else None, None, None


hash_signs.register_autograd(_hash_gradient, setup_context=_keep_hashed)
lookup.register_autograd(_lookup_gradient, setup_context=_keep_looked_up)


@hash_signs.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], x: Tensor, *way: Any) -> tuple[Any, Any]:
    x = x.movedim(in_dims[0] or 0, 0)
    code, weight = hash_signs(x.flatten(0, 1), *way)
    shape = (*x.shape[:2], -1)
    return (code.view(shape), weight.view(shape)), (0, 0)


@lookup.register_vmap
def _(
    info: Any, in_dims: tuple[int | None, ...], code: Tensor, weight: Tensor, *rest: Any
) -> tuple[Any, Any]:
    if in_dims[2] is not None:  # each its own tables
        return _one_by_one(lookup, info.batch_size, in_dims, (code, weight, *rest)), 0
    each = [
        part.movedim(dim, 0) if dim is not None else part.expand(info.batch_size, *part.shape)
        for part, dim in zip((code, weight), in_dims, strict=False)
    ]
    y = lookup(*(part.flatten(0, 1) for part in each), *rest)
    return y.view(info.batch_size, -1, y.shape[-1]), 0


@_hash_signs_backward.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *given: Any) -> tuple[Any, Any]:
    return _one_by_one(_hash_signs_backward, info.batch_size, in_dims, given), 0


@_lookup_backward.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *given: Any) -> tuple[Any, Any]:
    return _one_by_one(_lookup_backward, info.batch_size, in_dims, given), (0, 0)


def _one_by_one(operator: Any, size: int, in_dims: tuple[int | None, ...], given: tuple[Any, ...]) -> Any:
    found = []
    for i in range(size):
        one = (part if dim is None else part.select(dim, i) for part, dim in zip(given, in_dims, strict=True))
        found.append(operator(*one))
    if isinstance(found[0], Tensor):
        return torch.stack(found)
    return tuple(torch.stack(parts) for parts in zip(*found, strict=True))


@register_flop_formula(torch.ops.memspan.lookup_sum)
def _lookup_flops(code: Any, weight: Any, tables: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """One multiplication and one addition for each number read."""
    return int(2 * code[0] * code[1] * tables[2])


@register_flop_formula(torch.ops.memspan.lookup_sum_backward)
def _gradient_flops(
    code: Any, weight: Any, tables: Any, dy: Any, place: Any, rows: int, of_weight: bool, of_tables: bool,
    *_: Any, out_shape: Any = None, **__: Any,
) -> int:  # fmt: skip
    return int(2 * code[0] * code[1] * tables[2]) * (of_weight + of_tables)


# Exporters to formats without these operators take gather and sum.
register_decomposition([torch.ops.memspan.hash_signs.default])(hash_codes_reference)


@register_decomposition([torch.ops.memspan.lookup_sum.default])
def _lookup_decomposed(code: Tensor, weight: Tensor, tables: Tensor, sparse: bool, kernel: str) -> Tensor:
    return lookup_sum_reference(code, weight, tables)


# ---- which kernel ----------------------------------------------------------------------------------------


def refuse_outside(code: Tensor, rows: int) -> None:
    """Refuse codes outside 0 to rows - 1; reads them all."""
    if code.numel():
        low, high = (int(v) for v in code.aminmax())
        if low < 0 or high >= rows:
            refuse("code", (low, high), f"the tables have rows 0 to {rows - 1}")


@functools.cache
def kernels() -> frozenset[tuple[str, torch.dtype]]:
    """Kernels of the CPU that can be used; compiled now. Where they cannot, a warning says so once."""
    try:
        return frozenset(cpu.library())
    except cpu.CannotCompile as error:
        warnings.warn(
            f"lookup tables run without their CPU kernel, slower: {error}", RuntimeWarning, stacklevel=4
        )
        return frozenset()


@functools.cache
def lacks_triton() -> str:
    """Why Triton's kernels cannot run here; empty where they can."""
    try:
        from memspan.nn import _lookup_triton

        return _lookup_triton.lacks()
    except ImportError as error:
        return str(error)


def visited_rows(code: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Rows that codes (n, K) read: (2, count) of (table, row), and each one's place in it by (K, R)."""
    count = code.shape[1]
    seen = torch.zeros(count, rows, dtype=torch.bool, device=code.device)
    seen[torch.arange(count, device=code.device), code.long()] = True
    place = seen.flatten().cumsum(0).view(count, rows) - 1
    return seen.nonzero().T.contiguous(), place


def _choose(kernel: str, tables: Tensor) -> str:
    """``cpu``, ``triton`` or ``torch``."""
    if kernel == "auto":
        if tables.is_cuda:
            kernel = "torch" if tables.dtype == torch.float64 or lacks_triton() else "triton"
        else:
            kernel = "cpu" if ("sum", tables.dtype) in kernels() and tables.is_cpu else "torch"
    return kernel


def _wide(weight: Tensor, tables: Tensor) -> Tensor:
    return weight.to(torch.promote_types(tables.dtype, torch.float32)).contiguous()


def _places(code: Tensor, tables: Tensor) -> Tensor:
    return code.long() + tables.shape[1] * torch.arange(tables.shape[0], device=code.device)
