"""Layers that look their answer up: tables indexed by the signs of the input in the place of a matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from memspan.base import refuse
from memspan.nn._lookup_cpu import Ready
from memspan.nn.lookup import (
    Weight,
    check_bits,
    check_hash,
    hash_codes,
    hashed_lookup_sum,
    lookup_sum,
    runs_whole,
)
from memspan.nn.surgery import select, swap_

__all__ = [
    "MAX_BYTES",
    "MemoryBlock",
    "MemoryLinear",
    "MultiMemoryLinear",
    "convert_",
    "flip_bit_order",
    "from_linear",
]

MAX_BYTES = 2 * 2**30


class MemoryLinear(nn.Module):
    """In the place of ``nn.Linear``: ``y = bias + sum over k of p(z_k) * T_k[code(z_k)]``.

    The input is cut into K = in_features / bits chunks z_k. The signs of a chunk choose one row of its
    table, the sizes say how much of the row counts (see :func:`memspan.nn.lookup.hash_codes`). A token costs
    K·out multiply-adds and reads K·out numbers, a matrix ``bits`` times as many of both; the tables hold
    2**bits / bits times as many numbers as the matrix. Put a norm before it: signs must be even.

    Args:
        in_features: width of the input, a multiple of ``bits``.
        out_features: width of the output.
        bits: entries of a chunk, 1 to 16; tables have 2**bits rows.
        temperature: divides the sizes; 1 in the paper.
        weight: ``"prob"`` (the paper) or ``"scaled"`` (its published code: times the chunk's sum of sizes).
        bias: add a vector.
        sparse: gradients of tables hold visited rows alone: for ``RowAdam`` or ``torch.optim.SparseAdam``.
        max_bytes: refuse larger tables before they are made.
        dtype: of the parameters.
        device: where they lie.

    Attributes:
        tables: (K, 2**bits, out_features), drawn from N(0, 0.02²).
        bias: (out_features,), drawn from N(0, 0.001²), or None.

    Raises:
        BadInput: widths that do not divide (near numbers of bits are told), bits outside 1 to 16, tables
            above ``max_bytes`` or with more than 2**31 rows.

    Example:
        >>> layer = MemoryLinear(512, 512, bits=8)
        >>> layer(torch.randn(3, 512)).shape, layer.tables.shape
        (torch.Size([3, 512]), torch.Size([64, 256, 512]))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int = 8,
        *,
        temperature: float = 1.0,
        weight: Weight = "prob",
        bias: bool = True,
        sparse: bool = False,
        max_bytes: int = MAX_BYTES,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(in_features, out_features, bits, max_bytes, dtype)
        check_hash(torch.empty(1, in_features, device="meta"), bits, temperature, weight)
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        self.temperature, self.weight, self.sparse = temperature, weight, sparse
        self._ready: Ready | None = None
        shape = (in_features // bits, 2**bits, out_features)
        self.tables = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw the tables from N(0, std²) and the bias from N(0, 0.001²)."""
        nn.init.normal_(self.tables, std=std)
        if self.bias is not None:
            nn.init.normal_(self.bias, std=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in_features)`` to ``(..., out_features)``."""
        own, ready = self._parameters, self._ready  # decoding a token is a matter of microseconds
        if ready is not None and runs_whole(x) and ready.way == (self.temperature, self.weight):
            y = ready(x, own.get("tables"), own.get("bias"))
            if y is not None:
                return y
        return self._made_ready(x)

    def _made_ready(self, x: Tensor) -> Tensor:
        tables, bias = self.tables, self.bias
        if self._parameters.get("tables") is tables and runs_whole(x) and runs_whole(tables):
            self._ready = Ready.of(tables, bias, self.temperature, self.weight)
        return hashed_lookup_sum(
            x,
            tables,
            bias,
            temperature=self.temperature,
            weight=self.weight,
            sparse=self.sparse,
        )

    def hash(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and weights (..., K) of an input, which layers of the same width and bits can share."""
        return hash_codes(x, self.bits, temperature=self.temperature, weight=self.weight)

    def forward_hashed(self, code: Tensor, weight: Tensor) -> Tensor:
        """The output for given codes and weights, both (..., K)."""
        y = lookup_sum(code, weight, self.tables, sparse=self.sparse)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """Sizes and bytes, for ``print(model)``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"bias={self.bias is not None}, tables={self.tables.nbytes:,} bytes"
        )


class MultiMemoryLinear(MemoryLinear):
    """Several :class:`MemoryLinear` of one input: hashed once, and one row holds what all of them read.

    Args:
        in_features: width of the input.
        out_features: widths of the outputs, e.g. ``[d, d, d]`` for queries, keys and values.
        bits: as :class:`MemoryLinear`, like all further arguments.

    Example:
        >>> q, k, v = MultiMemoryLinear(32, [32, 16, 16], bits=4)(torch.randn(2, 32))
        >>> q.shape, v.shape
        (torch.Size([2, 32]), torch.Size([2, 16]))
    """

    def __init__(self, in_features: int, out_features: Sequence[int], bits: int = 8, **options: Any) -> None:
        if not out_features:
            refuse("out_features", out_features, "give one width or more")
        super().__init__(in_features, sum(out_features), bits, **options)
        self.widths = tuple(out_features)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Map ``(..., in_features)`` to one tensor a width."""
        return torch.split(super().forward(x), list(self.widths), dim=-1)  # type: ignore[no-any-return,no-untyped-call]


class MemoryBlock(nn.Module):
    """In the place of a feed-forward layer: two memory layers with a norm, and no activation, between.

    The first widens each chunk by ``expand_bits`` bits, so that the second has tables of 2**(bits +
    expand_bits) rows. The norm between is vital: it centres the values whose signs are hashed.

    Args:
        d_model: width.
        bits: of the first layer; divides ``d_model``.
        expand_bits: bits added for the second; 2 in the paper.
        norm: makes the norm between from its width.
        options: for both layers, as :class:`MemoryLinear` takes them.
    """

    def __init__(
        self,
        d_model: int,
        bits: int = 8,
        expand_bits: int = 2,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        **options: Any,
    ) -> None:
        super().__init__()
        check_bits(bits + expand_bits)
        inner = d_model // bits * (bits + expand_bits)
        self.first = MemoryLinear(d_model, inner, bits, **options)
        self.norm = norm(inner)
        self.second = MemoryLinear(inner, d_model, bits + expand_bits, **options)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., d_model)`` to the same shape."""
        return self.second(self.norm(self.first(x)))  # type: ignore[no-any-return]


@torch.no_grad()
def from_linear(linear: nn.Linear, x: Tensor, bits: int = 8, **options: Any) -> MemoryLinear:
    """A memory layer fitted to a trained linear layer on inputs that it sees.

    Chunk by chunk, each row is the least-squares fit of W_k z over the inputs z in its bucket:
    ``W_k · mean(p z) / mean(p²)``. A bucket that no input reaches takes the corner of its signs at the mean
    sizes. A beginning for fine-tuning, not a copy: within a bucket the layer is constant but for p.

    Args:
        linear: in_features divisible by ``bits``.
        x: (..., in_features), calibration inputs, the more the better: there are 2**bits buckets.
        bits: as :class:`MemoryLinear`, like all options.
        options: further arguments of :class:`MemoryLinear`.

    Raises:
        BadInput: not a linear layer, no inputs, inputs of another width or not finite.

    Example:
        >>> linear = nn.Linear(8, 3)
        >>> x = torch.tensor([[1.0, -1.0, 1.0, 1.0, -1.0, -1.0, 1.0, -1.0]])
        >>> bool(torch.allclose(from_linear(linear, x, bits=4)(x), linear(x), atol=1e-5))
        True
    """
    if not isinstance(linear, nn.Linear):
        refuse("linear", type(linear).__name__, "give an nn.Linear")
    if x.shape[-1:] != (linear.in_features,) or not x.numel() or not bool(torch.isfinite(x).all()):
        refuse("x", tuple(x.shape), f"give finite inputs (..., {linear.in_features}), one or more")
    like = linear.weight
    layer = MemoryLinear(
        linear.in_features, linear.out_features, bits, bias=linear.bias is not None, dtype=like.dtype,
        device=like.device, **options,
    )  # fmt: skip
    x = x.reshape(-1, linear.in_features).to(like.device, torch.promote_types(like.dtype, torch.float32))
    code, share = layer.hash(x)
    count, rows = x.shape[1] // bits, 2**bits
    z = x.view(-1, count, bits)
    place = (code.long() + rows * torch.arange(count, device=x.device)).flatten()
    sums = x.new_zeros(count * rows, bits).index_add_(0, place, (share[..., None] * z).flatten(0, 1))
    squares = x.new_zeros(count * rows).index_add_(0, place, share.square().flatten())
    codes, places = torch.arange(rows, device=x.device), torch.arange(bits, device=x.device)
    corners = 2.0 * (codes[:, None] >> places & 1) - 1
    typical = (z.abs().mean(0)[:, None] * corners).flatten(0, 1)  # (count · rows, bits)
    typical_share = hash_codes(typical, bits, temperature=layer.temperature, weight=layer.weight)[1]
    known = squares > 0
    inputs = torch.where(
        known[:, None], sums / squares.clamp_min(1e-30)[:, None],
        typical / typical_share.clamp_min(1e-30),
    )  # fmt: skip
    weight = like.to(x.dtype).view(linear.out_features, count, bits)
    layer.tables.copy_(torch.einsum("krb,okb->kro", inputs.view(count, rows, bits), weight))
    if layer.bias is not None:
        layer.bias.copy_(linear.bias)
    return layer


def convert_(
    model: nn.Module,
    patterns: str | Sequence[str],
    inputs: Iterable[Any],
    bits: int = 8,
    *,
    max_rows: int = 8192,
    **options: Any,
) -> nn.Module:
    """Put fitted memory layers in the place of a model's linear layers; ``nn.surgery.restore_`` undoes it.

    Args:
        model: changed in place; its other parts stay as they are.
        patterns: shell patterns over module names; what is no ``nn.Linear`` among them is passed over.
        inputs: what the model is called with, one item a call (a tuple gives several arguments).
        bits: of every layer, as :class:`MemoryLinear` takes it.
        max_rows: calibration rows kept of each layer.
        options: further arguments of :class:`MemoryLinear`.

    Returns:
        The model.

    Raises:
        BadInput: no linear layer by these names, one that the inputs never reach, one that
            :func:`from_linear` refuses; the model is as it was.

    Example:
        >>> model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> type(convert_(model, "1", [torch.randn(64, 8)], bits=4)[1]).__name__
        'MemoryLinear'
    """
    chosen = {name: part for name, part in select(model, patterns).items() if isinstance(part, nn.Linear)}
    if not chosen:
        refuse("patterns", patterns, "no nn.Linear has such a name")
    for part in chosen.values():
        _check_sizes(part.in_features, part.out_features, bits, options.get("max_bytes", MAX_BYTES), None)
    seen: dict[str, list[Tensor]] = {name: [] for name in chosen}

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            rows = arguments[0].detach().reshape(-1, arguments[0].shape[-1])
            room = max_rows - sum(len(part) for part in seen[name])
            seen[name].append(rows[:room].clone())

        return hook

    handles = [part.register_forward_pre_hook(keep(name)) for name, part in chosen.items()]
    try:
        with torch.no_grad():
            for item in inputs:
                model(*item) if isinstance(item, tuple) else model(item)
    finally:
        for handle in handles:
            handle.remove()
    for name, rows in seen.items():
        if not rows:
            refuse("inputs", name, "no input reached this layer; give more, or leave it out of patterns")
    fitted = {
        name: from_linear(part, torch.cat(seen[name]), bits, **options) for name, part in chosen.items()
    }
    return swap_(model, fitted)


def flip_bit_order(tables: Tensor) -> Tensor:
    """Relabel the rows of tables (K, 2**bits, out) made for codes whose first entry is the highest bit.

    The published code writes codes so; here the first entry is the lowest bit. Nothing else changes.

    Example:
        >>> flip_bit_order(torch.arange(4.0).view(1, 4, 1)).flatten().tolist()
        [0.0, 2.0, 1.0, 3.0]
    """
    bits = tables.shape[1].bit_length() - 1
    if tables.dim() != 3 or 2**bits != tables.shape[1]:
        refuse("tables", tuple(tables.shape), "give (K, 2**bits, out)")
    codes = torch.arange(tables.shape[1], device=tables.device)
    flipped = sum(((codes >> i & 1) << (bits - 1 - i) for i in range(bits)), torch.zeros_like(codes))
    return tables[:, flipped]


def _check_sizes(
    in_features: int, out_features: int, bits: int, max_bytes: int, dtype: torch.dtype | None
) -> None:
    check_bits(bits)
    if min(in_features, out_features) < 1:
        refuse("in_features, out_features", (in_features, out_features), "give 1 or more")
    if in_features % bits:
        fitting = sorted((b for b in range(1, 17) if in_features % b == 0), key=lambda b: abs(b - bits))
        near = " or ".join(map(str, sorted(fitting[:2])))
        refuse("bits", bits, f"it does not divide in_features = {in_features}; near are {near}")
    count, rows = in_features // bits, 2**bits
    if count * rows > 2**31:
        refuse(
            "bits", bits, f"{count} tables of {rows:,} rows are more than an int32 can name: use fewer bits"
        )
    size = (dtype or torch.get_default_dtype()).itemsize
    total = count * rows * out_features * size
    if total > max_bytes:
        refuse(
            "max_bytes",
            max_bytes,
            f"the tables would hold {total:,} bytes ({count} x {rows:,} rows x {out_features} x {size}): "
            f"use fewer bits than {bits}, or raise max_bytes",
        )
