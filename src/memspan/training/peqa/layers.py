"""Layers whose weight is packed integers and whose only trained numbers are scales, and their one kernel.

Written plainly, ``x @ ((unpack(q) - z) * s).T`` makes autograd keep the float weight twice: more than full
fine-tuning holds. :func:`quant_matmul` keeps the packed integers it was given and x (or one number an
output), and builds the float weight again in the backward pass, one tile of rows at a time. On CUDA the
kernels in ``_kernels_triton.py`` read the packed integers, where Triton is installed; a tile is a whole layer
there, since a launch costs more than the memory.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from memspan.base import refuse
from memspan.nn.bits import packed_length, unpack_bits
from memspan.training.peqa.grids import dequantize, groups_of

__all__ = [
    "BITS",
    "QuantConv2d",
    "QuantEmbedding",
    "QuantLinear",
    "Quantized",
    "quant_matmul",
    "quant_matmul_naive",
]

BITS = (2, 3, 4, 8)
TILE_BYTES = 4 << 20  # what a processor's cache holds
CUDA_TILE_BYTES = 256 << 20  # a whole layer of most models: many small launches take longer than the product
FEW_ROWS = 16  # of x at most, for which CUDA multiplies by the packed integers and builds no weight

Save = Literal["input", "output"]


def quant_matmul(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bits: int,
    m: int,
    bias: Tensor | None = None,
    *,
    tile_bytes: int | None = None,
    save: Save = "input",
) -> Tensor:
    """``x Ŵᵀ + bias`` with ``Ŵ = s (q - z)``, where at most a tile of Ŵ exists at a time.

    Args:
        x: (..., m) floating. Tiles and products are in its dtype.
        qweight: (n, ⌈m · bits / 8⌉) uint8, see :func:`~memspan.nn.bits.pack_bits`.
        scales: (n, groups) floating; trained.
        zeros: (n, groups) uint8.
        bits: 2, 3, 4 or 8.
        m: inputs.
        bias: (n,) or None.
        tile_bytes: of float weight that exist at once; None: 4 MiB on the CPU, 256 MiB on CUDA.
        save: what is kept for the scales' gradient: ``"input"`` keeps x, once for layers that share it;
            ``"output"`` keeps ``x (q - z)ᵀ`` and spares the backward pass a product (one scale a row only).

    Returns:
        (..., n) in x's dtype. Gradients reach x, scales and bias: ``dL/ds = Σ G (q - z)`` over a group with
        ``G = dYᵀ X``, and ``dL/dX = dY Ŵ``.

    Example:
        >>> from memspan.nn.bits import pack_bits
        >>> q = torch.tensor([[0, 1, 3]])
        >>> s, z = torch.tensor([[0.5]]), torch.tensor([[1]], dtype=torch.uint8)
        >>> quant_matmul(torch.ones(2, 3), pack_bits(q, 2), s, z, 2, 3).tolist()
        [[0.5], [0.5]]
    """
    if tile_bytes is None:
        tile_bytes = CUDA_TILE_BYTES if x.device.type == "cuda" else TILE_BYTES
    kernels = _kernels(x, qweight, scales) if x.numel() <= FEW_ROWS * m else None
    if kernels is not None and not _wants_gradient(x, scales, bias) and not _counts_arithmetic():
        few: Tensor = kernels.product(x.reshape(-1, m), qweight, scales, zeros, bits, bias)
        return few.view(*x.shape[:-1], len(qweight))
    groups = scales.shape[1]
    keep_product = save == "output" and groups == 1 and x.dtype != torch.float16 and scales.requires_grad
    y: Tensor = _QuantMatmul.apply(
        x, qweight, scales, zeros, bias, bits, m, tile_bytes, keep_product and torch.is_grad_enabled()
    )  # type: ignore[no-untyped-call]
    return y


def quant_matmul_naive(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bits: int,
    m: int,
    bias: Tensor | None = None,
) -> Tensor:
    """The same numbers by plain autograd, the reference: keeps the float weight twice for backward."""
    n, groups = scales.shape
    integers = unpack_bits(qweight, bits, m).view(n, groups, -1).to(scales.dtype)
    weight = (integers - zeros.unsqueeze(-1)) * scales.unsqueeze(-1)
    return F.linear(x, weight.view(n, m).to(x.dtype), None if bias is None else bias.to(x.dtype))


class _QuantMatmul(torch.autograd.Function):
    """See :func:`quant_matmul`. One scale a row is applied to the outputs, more to the tile of weights.

    A trace on fake tensors runs the first tile alone: the others would take its place.

    In float16 the unscaled product could overflow, so that scales always go to the tile there; so they do in
    the device's kernels, which scale for nothing, unless the product is to be kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        qweight: Tensor,
        scales: Tensor,
        zeros: Tensor,
        bias: Tensor | None,
        bits: int,
        m: int,
        tile_bytes: int,
        keep_product: bool,
    ) -> Tensor:
        rows = x.reshape(-1, m)
        kernels = _kernels(x, qweight, scales)
        ctx.bias_dtype = None if bias is None else bias.dtype
        n, late = len(qweight), keep_product if kernels else _scale_late(scales, x.dtype)
        added = (
            bias if kernels is not None and not late and bias is not None and bias.dtype == x.dtype else None
        )
        y: Tensor | None = None
        for part in _tiles(qweight, m, x.element_size(), tile_bytes):
            if y is None and part != slice(0, n):
                y = rows.new_empty(len(rows), n)
            tile = _tile(
                kernels, qweight[part], zeros[part], None if late else scales[part], bits, m, x.dtype
            )
            if y is None and added is not None:
                y, bias = torch.addmm(added, rows, tile.t()), None
            elif y is None:
                y = rows @ tile.t()
            else:
                torch.mm(rows, tile.t(), out=y[:, part])
            del tile
        assert y is not None
        product = y if keep_product else None
        if late:
            y = y * scales.t() if keep_product else y.mul_(scales.t())
            y = y if y.dtype == x.dtype else y.to(x.dtype)
        if bias is not None:
            y.add_(bias)
        need_x, need_s = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        kept = (product if keep_product else rows) if need_s else None
        ctx.save_for_backward(kept, qweight, scales, zeros)
        ctx.bits, ctx.m, ctx.tile_bytes, ctx.keep_product = bits, m, tile_bytes, keep_product
        ctx.shape, ctx.need_x, ctx.need_s = x.shape, need_x, need_s
        # Not view: what stands behind may work in place, which autograd refuses on views made here.
        return torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], n)) if x.dim() != 2 else y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        kept, qweight, scales, zeros = ctx.saved_tensors
        dy = dy.reshape(-1, len(qweight))
        kernels = _kernels(dy, qweight, scales)
        late = kernels is None and _scale_late(scales, dy.dtype)
        dx = ds = db = None
        if ctx.needs_input_grad[4]:
            db = dy.sum(0).to(ctx.bias_dtype)
        if ctx.need_s and ctx.keep_product:
            ds = (dy * kept).sum(0, dtype=scales.dtype).unsqueeze(1)
        recompute = ctx.need_s and not ctx.keep_product
        if recompute:
            ds = torch.empty_like(scales)
        if ctx.need_x or recompute:
            dx = dy.new_zeros(len(dy), ctx.m) if ctx.need_x and kernels is None else None
            for part in _tiles(qweight, ctx.m, dy.element_size(), ctx.tile_bytes):
                if kernels is not None:  # the weight's gradient is gone before the weight comes
                    ours, packed, zero = dy[:, part], qweight[part], zeros[part]
                    if ds is not None and recompute:
                        ds[part] = kernels.scale_gradient(ours.t() @ kept, packed, zero, ctx.bits, ds.dtype)
                    if ctx.need_x:
                        tile = _tile(kernels, packed, zero, scales[part], ctx.bits, ctx.m, dy.dtype)
                        dx = ours @ tile if dx is None else dx.addmm_(ours, tile)
                        del tile
                    continue
                tile = _integers(qweight[part], zeros[part], ctx.bits, ctx.m, dy.dtype)
                ours = dy[:, part]
                if recompute:
                    assert ds is not None
                    ds[part] = _scale_gradient(ours, kept, tile, scales[part], late)
                if dx is not None:
                    if late:
                        scaled = (ours * scales[part].t()).to(dy.dtype)
                        dx.addmm_(scaled, tile)
                        del scaled
                    else:
                        dx.addmm_(ours, _scale_(tile, scales[part]))
                del tile
        return (None if dx is None else dx.view(ctx.shape), None, ds, None, db, None, None, None, None)


def _scale_gradient(dy: Tensor, x: Tensor, tile: Tensor, scales: Tensor, late: bool) -> Tensor:
    """``Σ_j G_ij (q_ij - z_i)`` of some rows; with one scale a row through the outputs, which take less."""
    if late:
        return (x @ tile.t()).mul_(dy).sum(0, dtype=scales.dtype).unsqueeze(1)
    full = dy.t() @ x
    if full.dtype != torch.float16:
        return full.mul_(tile).view(len(tile), scales.shape[1], -1).sum(-1, dtype=scales.dtype)
    # Times an integer of 8 bits a gradient may pass 65,504: in float32, some rows at a time.
    step = max(1, len(full) // 8)
    pieces = (full[i : i + step].float().mul_(tile[i : i + step]) for i in range(0, len(full), step))
    return torch.cat([one.view(len(one), scales.shape[1], -1).sum(-1, dtype=scales.dtype) for one in pieces])


def _tile(
    kernels: ModuleType | None,
    qweight: Tensor,
    zeros: Tensor,
    scales: Tensor | None,
    bits: int,
    m: int,
    dtype: torch.dtype,
) -> Tensor:
    """``q - z``, or with scales ``s (q - z)``, of some rows."""
    if kernels is not None:
        found: Tensor = kernels.integers(qweight, zeros, scales, bits, m, dtype)
        return found
    tile = _integers(qweight, zeros, bits, m, dtype)
    return tile if scales is None else _scale_(tile, scales)


def _integers(qweight: Tensor, zeros: Tensor, bits: int, m: int, dtype: torch.dtype) -> Tensor:
    """``q - z`` as floating numbers; exact in every dtype, as 8 bits fit any significand here."""
    n, groups = zeros.shape
    tile = unpack_bits(qweight, bits, m).to(dtype)
    tile.view(n, groups, -1).sub_(zeros.unsqueeze(-1))
    return tile


def _scale_(tile: Tensor, scales: Tensor) -> Tensor:
    tile.view(*scales.shape, -1).mul_(scales.unsqueeze(-1))
    return tile


def _scale_late(scales: Tensor, dtype: torch.dtype) -> bool:
    return scales.shape[1] == 1 and dtype != torch.float16


def _tiles(qweight: Tensor, m: int, itemsize: int, tile_bytes: int) -> Iterator[slice]:
    n = len(qweight)
    step = max(1, tile_bytes // max(1, m * itemsize))
    # Compiled code decides for itself what exists at once; one who counts arithmetic wants all of it.
    if torch.compiler.is_compiling() or (isinstance(qweight, FakeTensor) and _counts_arithmetic()):
        step = n
    for start in range(0, n, max(1, step)):
        yield slice(start, min(n, start + step))
        if isinstance(qweight, FakeTensor):
            return


_transforms = torch._C._functorch.peek_interpreter_stack  # None outside vmap, grad and others of torch.func
_PLAIN = frozenset((Tensor, nn.Parameter, FakeTensor))  # other subclasses have no address to give
_KINDS = frozenset((torch.float32, torch.float16, torch.bfloat16))


def _kernels(x: Tensor, qweight: Tensor, scales: Tensor) -> ModuleType | None:
    """The device's kernels where they can take these tensors; None: torch's operators do.

    They take fake tensors too, for which they only allocate: a trace then finds the memory of a run.
    """
    if torch.compiler.is_compiling() or not _on_device(x) or _transforms() is not None:
        return None
    if not (x.dtype in _KINDS and scales.dtype in _KINDS and type(x) in _PLAIN and type(scales) in _PLAIN):
        return None
    # One who records operators (make_fx) would not see a launch.
    if type(qweight) not in _PLAIN or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY):
        return None
    return _triton()


def _wants_gradient(*tensors: Tensor | None) -> bool:
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in tensors)


def _on_device(x: Tensor) -> bool:
    return x.is_cuda


@functools.cache
def _triton() -> ModuleType | None:
    try:
        from memspan.training.peqa import _kernels_triton
    except ImportError:
        return None
    return None if _kernels_triton.lacks() else _kernels_triton


def _counts_arithmetic() -> bool:
    return any("FlopCounter" in type(mode).__name__ for mode in _get_current_dispatch_mode_stack())


class Quantized(nn.Module):
    """What the quantized layers have in common: packed integers, zero points, trained scales.

    Args:
        in_features: m, inputs (a row's length).
        out_features: n, outputs (rows).
        bits: 2, 3, 4 or 8.
        group_size: inputs that share a scale; None: all of a row.
        bias: whether there is one; it is frozen as a rule.
        device: of all tensors.
        scale_dtype: of the scales.
        dtype: of the bias.

    Attributes:
        qweight: (n, ⌈m · bits / 8⌉) uint8 buffer.
        zeros: (n, m / group_size) uint8 buffer.
        scales: (n, m / group_size) parameter.
        perm: (m,) int64 buffer or None: the order in which the columns were quantized.
        error: ``||W - Ŵ|| / ||W||`` when it was quantized, or NaN where that is not known.
    """

    qweight: Tensor
    zeros: Tensor
    perm: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        group_size: int | None = None,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        scale_dtype: torch.dtype = torch.float32,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if bits not in BITS or isinstance(bits, bool):
            refuse("bits", bits, "use 2, 3, 4 or 8")
        groups = groups_of(in_features, group_size)
        self.in_features, self.out_features, self.bits, self.groups = in_features, out_features, bits, groups
        packed = torch.zeros(out_features, packed_length(in_features, bits), dtype=torch.uint8, device=device)
        zeros = torch.zeros(out_features, groups, dtype=torch.uint8, device=device)
        self.register_buffer("qweight", packed)
        self.register_buffer("zeros", zeros)
        self.register_buffer("perm", None)
        self.scales = nn.Parameter(torch.ones(out_features, groups, dtype=scale_dtype, device=device))
        empty = torch.zeros(out_features, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if empty is None else nn.Parameter(empty, requires_grad=False))
        self.error = math.nan

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""
        return self.in_features // self.groups

    @property
    def weight(self) -> Tensor:
        """Ŵ (n, m), built anew at each access; for looking at, not for computing with."""
        return self.dequantized()

    def dequantized(self) -> Tensor:
        """Ŵ (n, m) in the scales' dtype; gradients reach the scales."""
        q = unpack_bits(self.qweight, self.bits, self.in_features)
        if self.scales.requires_grad and torch.is_grad_enabled():
            integers = q.view(*self.scales.shape, -1).to(self.scales.dtype) - self.zeros.unsqueeze(-1)
            found = (integers * self.scales.unsqueeze(-1)).view(q.shape)
        else:
            found = dequantize(q, self.scales.detach(), self.zeros)
        return found if self.perm is None else found[:, torch.argsort(self.perm)]

    def packed_weights(self) -> dict[str, int]:
        """Buffers that hold the weights, and how many each stands for."""
        return {"qweight": self.in_features * self.out_features, "zeros": 0, "perm": 0}

    def memory_bytes(self) -> dict[str, int]:
        """Bytes held: scales and bias as ``parameters``, integers and zeros as ``parameters.packed``."""
        held = [self.qweight, self.zeros, *([] if self.perm is None else [self.perm])]
        own = [self.scales, *([] if self.bias is None else [self.bias])]
        return {"parameters": sum(t.nbytes for t in own), "parameters.packed": sum(t.nbytes for t in held)}

    def extra_repr(self) -> str:
        """Sizes."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size if self.groups > 1 else None}, bias={self.bias is not None}"
        )


class QuantLinear(Quantized):
    """A linear layer of packed integers whose scales are its trained numbers.

    Arguments as :class:`Quantized`; a fresh layer gives its bias alone until integers are loaded or
    :func:`~memspan.training.peqa.quantize_` makes it from a ``Linear``.

    Attributes:
        save: what the backward pass keeps, see :func:`quant_matmul`; ``"output"`` where a layer has fewer
            outputs than inputs.

    Example:
        >>> layer = QuantLinear(192, 64, bits=3)
        >>> layer(torch.zeros(5, 192)).shape, layer.qweight.shape, layer.scales.shape
        (torch.Size([5, 64]), torch.Size([64, 72]), torch.Size([64, 1]))
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.save: Save = "output" if self.out_features < self.in_features and self.groups == 1 else "input"

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if self.perm is not None:
            x = x.index_select(-1, self.perm)
        return quant_matmul(
            x, self.qweight, self.scales, self.zeros, self.bits, self.in_features, self.bias, save=self.save
        )


class QuantConv2d(QuantLinear):
    """A 1 x 1 convolution as a :class:`QuantLinear` over channels. x: (B, C, H, W) or (C, H, W).

    Attributes:
        stride: (rows, columns) between outputs.
    """

    stride: tuple[int, int] = (1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C, H, W) to (..., out_features, H', W')."""
        x = x[..., :: self.stride[0], :: self.stride[1]]
        return super().forward(x.movedim(-3, -1)).movedim(-1, -3)


class QuantEmbedding(Quantized):
    """An embedding of packed integers: a row's scales are trained, its integers are not.

    Example:
        >>> QuantEmbedding(8, 100, bits=4, bias=False)(torch.tensor([[1, 2]])).shape
        torch.Size([1, 2, 8])
    """

    padding_idx: int | None = None

    @property
    def num_embeddings(self) -> int:
        """Rows, as ``nn.Embedding`` names them."""
        return self.out_features

    @property
    def embedding_dim(self) -> int:
        """A row's length, likewise."""
        return self.in_features

    def forward(self, ids: Tensor) -> Tensor:
        """Integer ids (...) to (..., in_features)."""
        q = unpack_bits(self.qweight[ids], self.bits, self.in_features)
        integers = q.view(*ids.shape, self.groups, -1).to(self.scales.dtype)
        found = (integers - self.zeros[ids].unsqueeze(-1)) * F.embedding(
            ids, self.scales, self.padding_idx
        ).unsqueeze(-1)
        return found.flatten(-2)
