"""What a saved activation becomes: fixed-point codes, packed in bytes, or its largest elements.

Large tensors are coded piece by piece, so that the pieces stay in the processor's cache and no second float
copy of the tensor ever exists. On CUDA pieces are larger (:func:`at_once`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from memspan.base import refuse
from memspan.nn.bits import pack_bits

__all__ = ["CompressionPolicy", "Grid", "Sparse", "fixed_point", "from_fixed_point", "top_k"]

_PIECE = 1 << 17  # elements: 0.5 MB of float32
_CUDA = 1 << 22  # elements: 16 MiB of float32


class Grid(NamedTuple):
    """A fixed-point grid: one sign bit where signed, bits before and after the point."""

    int_bits: int
    frac_bits: int
    signed: bool

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.int_bits + self.frac_bits + self.signed

    @property
    def low(self) -> int:
        """Smallest code."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def high(self) -> int:
        """Largest code."""
        return (1 << (self.bits - self.signed)) - 1


GELU_GRID = {4: Grid(2, 1, True), 8: Grid(3, 4, True)}  # [-4, 3.5] in halves
MATMUL_GRID = Grid(3, 4, True)  # [-8, 7.94] in sixteenths
SOFTMAX_GRID = Grid(0, 8, False)  # [0, 255 / 256]


@dataclass(frozen=True)
class CompressionPolicy:
    """How each kind of saved activation is kept; None keeps it as it is.

    Attributes:
        gelu: bits of the input of GELU and SiLU: 4, 8 or None.
        matmul: bits of queries, keys and values: 8 or None.
        softmax: bits of the attention probabilities of the eager kernel: 8 or None.
        wide_linear: bits of the input of the second linear layer of a feed-forward part: 8 or None.
        layernorm_keep: share of the normalised input that a frozen LayerNorm keeps, in (0, 1], or None.
        per_token: keep that share in every row, in place of the largest of the whole tensor.
        scale: ``"fixed"`` has the range ±8 for the 8-bit operands; ``"dynamic"`` takes the largest magnitude
            of each row, for models whose activations exceed it (4 more bytes a row).
        attention: ``"eager"`` keeps coded probabilities as the paper does; ``"sdpa"`` keeps coded queries,
            keys and values only and computes the rest again from them.

    Raises:
        BadInput: a value that is not listed.

    Example:
        >>> CompressionPolicy.paper().gelu, CompressionPolicy.none().gelu
        (4, None)
    """

    gelu: int | None = 4
    matmul: int | None = 8
    softmax: int | None = 8
    wide_linear: int | None = 8
    layernorm_keep: float | None = 0.1
    per_token: bool = False
    scale: Literal["fixed", "dynamic"] = "fixed"
    attention: Literal["eager", "sdpa"] = "eager"

    def __post_init__(self) -> None:
        if self.gelu not in (4, 8, None):
            refuse("gelu", self.gelu, "use 4, 8 or None")
        for name in ("matmul", "softmax", "wide_linear"):
            if getattr(self, name) not in (8, None):
                refuse(name, getattr(self, name), "use 8 or None")
        keep = self.layernorm_keep
        if keep is not None and not 0 < keep <= 1:
            refuse("layernorm_keep", keep, "give a share in (0, 1], or None")
        if self.scale not in ("fixed", "dynamic"):
            refuse("scale", self.scale, "use 'fixed' or 'dynamic'")
        if self.attention not in ("eager", "sdpa"):
            refuse("attention", self.attention, "use 'eager' or 'sdpa'")

    @classmethod
    def paper(cls, **changes: Any) -> CompressionPolicy:
        """The paper's table, with changes by name."""
        return replace(cls(), **changes)

    @classmethod
    def none(cls) -> CompressionPolicy:
        """Nothing is compressed; the modules are exact."""
        return cls(gelu=None, matmul=None, softmax=None, wide_linear=None, layernorm_keep=None)


def fixed_point(x: Tensor, int_bits: int, frac_bits: int, signed: bool = True) -> Tensor:
    """Fixed-point codes: ``round(x · 2^frac_bits)``, clamped to the grid; halves go to the even code.

    Args:
        x: any shape, floating.
        int_bits: bits before the point.
        frac_bits: bits after it.
        signed: whether there is a sign bit; all together at most 8 bits.

    Returns:
        As x, int8 (signed) or uint8.

    Raises:
        BadInput: no bits, or more than 8.

    Example:
        >>> fixed_point(torch.tensor([-9.0, 0.3, 2.0]), int_bits=2, frac_bits=1).tolist()
        [-8, 1, 4]
    """
    grid = Grid(int_bits, frac_bits, signed)
    if not 1 <= grid.bits <= 8 or min(int_bits, frac_bits) < 0:
        refuse("int_bits, frac_bits", (int_bits, frac_bits), "give 1 to 8 bits in all, the sign included")
    return encode(x, grid)


def from_fixed_point(codes: Tensor, frac_bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers that codes stand for: ``codes / 2^frac_bits``.

    Example:
        >>> from_fixed_point(torch.tensor([-8, 1, 4], dtype=torch.int8), 1).tolist()
        [-4.0, 0.5, 2.0]
    """
    return codes.to(dtype).mul_(2.0**-frac_bits)


def encode(x: Tensor, grid: Grid) -> Tensor:
    """Codes of x on a grid, in x's shape and order in memory."""
    ordered, back = _dense(x)
    out = torch.empty(ordered.shape, dtype=torch.int8 if grid.signed else torch.uint8, device=x.device)
    flat = out.view(-1)
    for piece, codes in _rounded(ordered.reshape(-1), grid):
        flat[piece].copy_(codes)
    return out if back is None else out.permute(back)


def encode_packed(x: Tensor, grid: Grid) -> Tensor:
    """Codes of x, shifted to start at 0 and packed; flat."""
    flat = x.reshape(-1)
    per_byte = 8 // grid.bits
    out = torch.empty(-(-flat.numel() // per_byte), dtype=torch.uint8, device=x.device)
    for piece, codes in _rounded(flat, grid):
        start = piece.start // per_byte
        packed = pack_bits(codes.sub_(grid.low).to(torch.uint8), grid.bits, check=False)
        out[start : start + packed.numel()] = packed
    return out


def multiply_by_table(grad: Tensor, packed: Tensor, table: Tensor, grid: Grid) -> Tensor:
    """``grad · table[code]`` for packed codes, a byte (one or two codes) at a time.

    Args:
        grad: any shape.
        packed: as :func:`encode_packed` makes it.
        table: (2^bits,) one factor for each code.
        grid: of the codes.

    Returns:
        As grad.
    """
    per_byte = 8 // grid.bits
    if per_byte == 2:  # one row for each byte: the factors of its low and its high code
        byte = torch.arange(256, device=table.device)
        table = torch.stack((table[byte % 16], table[byte // 16]), dim=1)
    flat = grad.reshape(-1)
    out = torch.empty_like(flat)
    for piece in _pieces(flat.numel(), flat.device):
        places = packed[piece.start // per_byte : -(-piece.stop // per_byte)].int()
        factors = table.index_select(0, places).view(-1)[: piece.stop - piece.start]
        torch.mul(flat[piece], factors, out=out[piece])
    return out.view(grad.shape)


def at_once(device: torch.device, elsewhere: int) -> int:
    """Elements that are worked on together: what a cache holds, and more on CUDA.

    Small pieces are thousands of launches a step there, each of which costs more than its work. The larger
    temporaries are still few beside a step's activations.

    Example:
        >>> at_once(torch.device("cpu"), 1 << 17)
        131072
    """
    return max(_CUDA, elsewhere) if device.type == "cuda" else elsewhere


class Coded(NamedTuple):
    """An operand as it is saved: codes (or the tensor itself) and, with a dynamic scale, one number a row."""

    codes: Tensor
    scale: Tensor | None


def keep(x: Tensor, bits: int | None, scale: str) -> Coded:
    """Code an 8-bit operand, by the fixed grid or by the largest magnitude of each row."""
    if bits is None:
        return Coded(x, None)
    if scale == "fixed":
        return Coded(encode(x, MATMUL_GRID), None)
    largest = x.detach().abs().amax(dim=-1, keepdim=True).float().clamp_min_(1e-30).div_(127)
    return Coded((x / largest).round_().clamp_(-127, 127).to(torch.int8), largest)


def read(kept: Coded, dtype: torch.dtype) -> Tensor:
    """The operand that :func:`keep` saved, as far as it is known."""
    if kept.codes.is_floating_point():
        return kept.codes
    if kept.scale is not None:
        return kept.codes.to(dtype).mul_(kept.scale)
    return from_fixed_point(kept.codes, MATMUL_GRID.frac_bits, dtype)


class Sparse(NamedTuple):
    """The largest elements of a tensor: where they are in the flat tensor, and what they are."""

    places: Tensor  # int32
    values: Tensor

    def dense(self, shape: torch.Size) -> Tensor:
        """The tensor with all other elements 0."""
        flat = self.values.new_zeros(shape.numel())
        return flat.index_copy_(0, self.places.long(), self.values).view(shape)


def top_k(x: Tensor, keep: float, *, per_token: bool = False) -> Sparse:
    """The elements of largest magnitude.

    Args:
        x: (..., H).
        keep: share to keep, in (0, 1]: ``int(keep · numel)`` elements, at least one; with ``per_token``
            ``⌈keep · H⌉`` of each row.
        per_token: see ``keep``.

    Returns:
        int32 indices into the flat tensor, and values.

    Example:
        >>> top_k(torch.tensor([1.0, -5.0, 2.0, 0.5]), keep=0.5).dense(torch.Size([4])).tolist()
        [0.0, -5.0, 2.0, 0.0]
    """
    width = x.shape[-1]
    if per_token:
        count = math.ceil(keep * width - 1e-9)
        places = x.reshape(-1, width).abs().topk(count, dim=1, sorted=False).indices
        places = (places + torch.arange(places.shape[0], device=x.device)[:, None] * width).view(-1)
    else:
        count = max(1, int(keep * x.numel()))
        places = x.reshape(-1).abs().topk(count, sorted=False).indices
    return Sparse(places.int(), x.reshape(-1).index_select(0, places))


def _rounded(flat: Tensor, grid: Grid) -> Iterator[tuple[slice, Tensor]]:
    """Pieces of a flat tensor and their codes, as floats in a buffer that the next piece overwrites."""
    factor = float(1 << grid.frac_bits)
    buffer: Tensor | None = None
    for piece in _pieces(flat.numel(), flat.device):
        if buffer is None:
            buffer = torch.empty(piece.stop - piece.start, dtype=flat.dtype, device=flat.device)
        codes = buffer[: piece.stop - piece.start]
        torch.mul(flat[piece], factor, out=codes)
        yield piece, codes.round_().clamp_(grid.low, grid.high)


def _pieces(length: int, device: torch.device) -> Iterator[slice]:
    size = at_once(device, _PIECE)
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def _dense(x: Tensor) -> tuple[Tensor, tuple[int, ...] | None]:
    """X with its dimensions in the order of memory, and the permutation that takes it back."""
    if x.is_contiguous():
        return x, None
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    back = tuple(order.index(d) for d in range(x.dim()))
    ordered = x.permute(order)
    return (ordered, back) if ordered.is_contiguous() else (x.contiguous(), None)
