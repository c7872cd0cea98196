"""Frozen layers that keep nothing for the backward pass but masks.

A weight's gradient needs its layer's input. A frozen layer needs no such gradient; it only passes one on, for
which a convolution needs its weight, a batch norm one scale per channel, a ReLU one bit per element. PyTorch
saves the whole input of a frozen convolution, batch norm or pool all the same. The functions here do not, and
:func:`freeze_lean_` puts them into a user's own network.

Sources: Cai et al. 2020, "TinyTL" (what a frozen layer must keep); Bhatia and Dangel 2024, "Lowering
PyTorch's memory consumption for selective differentiation" (that PyTorch keeps more).
"""

from __future__ import annotations

import math
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from memspan.base import refuse
from memspan.nn.bits import pack_bits, unpack_bits
from memspan.nn.surgery import recast_

__all__ = [
    "Statistics",
    "freeze_lean_",
    "frozen_batchnorm",
    "frozen_conv2d",
    "frozen_convolution",
    "frozen_linear",
    "lean_avg_pool2d",
    "lean_max_pool2d",
    "lean_relu",
]

#: Which statistics a frozen batch norm takes.
Statistics = Literal["source", "batch", "batch_detached"]


def freeze_lean_(module: nn.Module, stats: Statistics = "source") -> nn.Module:
    """Freeze a network and let it keep nothing but masks; ``memspan.nn.surgery.restore_`` undoes it.

    Convolutions (also transposed), Linear, BatchNorm, ReLU, ReLU6, Hardtanh, LeakyReLU, max and average
    pools are replaced by their lean twins; outputs are the same numbers. What changes the gradient in other
    ways (GELU, LayerNorm, attention) is frozen and left as it is: the ledger names what it keeps. Buffers
    never change.

    Args:
        module: changed in place; all its parameters stop training. It may be a part of a network.
        stats: what BatchNorm does in training mode *and* in eval mode. ``"source"``: running statistics, a
            fixed affine map. ``"batch_detached"``: statistics of the batch, constants for the gradient.
            ``"batch"``: statistics of the batch with their gradient, which costs the input.

    Returns:
        The module.

    Raises:
        BadInput: unknown ``stats``, or a part of it is lean already.

    Example:
        >>> from memspan.ledger import saved_bytes
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> x = torch.randn(2, 3, 16, 16, requires_grad=True)
        >>> before = saved_bytes(net.requires_grad_(False)(x))
        >>> before, saved_bytes(freeze_lean_(net)(x), exclude=[net])  # 4,096 bits and 8 scales
        (38976, 544)
    """
    if stats not in ("source", "batch", "batch_detached"):
        refuse("stats", stats, "use 'source', 'batch' or 'batch_detached'")
    if any(isinstance(part, _Lean) for part in module.modules()):
        refuse("module", type(module).__name__, "parts of it are lean already; restore_ first")
    changes: list[tuple[nn.Module, type[nn.Module], dict[str, Any]]] = []
    for part in module.modules():
        kind = _lean_kind(part)
        if kind is not None:
            norm = isinstance(part, nn.modules.batchnorm._BatchNorm)
            changes.append((part, kind, {"lean_stats": stats} if norm else {}))
    return recast_(module, changes, by="freeze_lean_", freeze=True)


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x Wᵀ + b`` with constants W and b; keeps the weight alone, as PyTorch does once W needs no gradient.

    Args:
        x: (..., in).
        weight: (out, in).
        bias: (out,) or None.

    Returns:
        (..., out).

    Example:
        >>> frozen_linear(torch.ones(1, 2), torch.tensor([[1.0, 2.0]]))
        tensor([[3.]])
    """
    return F.linear(x, weight.detach(), None if bias is None else bias.detach())


def frozen_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> Tensor:
    """A convolution with a constant weight: keeps the weight, not the input.

    Args:
        x: (B, C, H, W).
        weight: (out, C / groups, kH, kW).
        bias: (out,) or None.
        stride: as in ``torch.nn.functional.conv2d``.
        padding: numbers; pad first where the two sides differ.
        dilation: likewise.
        groups: likewise.

    Returns:
        (B, out, H', W').

    Example:
        >>> x = torch.ones(1, 1, 2, 2, requires_grad=True)
        >>> frozen_conv2d(x, torch.ones(1, 1, 2, 2)).sum().backward()
        >>> x.grad.sum()
        tensor(4.)
    """
    return frozen_convolution(x, weight, bias, stride, padding, dilation, groups)


def frozen_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    *,
    transposed: bool = False,
    output_padding: int | tuple[int, ...] = 0,
) -> Tensor:
    """A convolution of 1 to 3 dimensions, also transposed, with a constant weight.

    Example:
        >>> frozen_convolution(torch.ones(1, 1, 3), torch.ones(1, 1, 2), transposed=True)
        tensor([[[1., 2., 2., 1.]]])
    """
    n = weight.dim() - 2
    if x.dim() != n + 2:
        refuse(
            "x", tuple(x.shape), f"give a batch of {n + 2} dimensions for a weight of {tuple(weight.shape)}"
        )
    settings = (
        _each(stride, n), _each(padding, n), _each(dilation, n), transposed, _each(output_padding, n), groups,
    )  # fmt: skip
    held = None if bias is None else bias.detach()
    return _run(_Convolution, x, weight.detach(), held, settings)


def frozen_batchnorm(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    stats: Statistics = "source",
) -> Tensor:
    """Batch norm with constant weight and bias; running statistics are read and never changed.

    Args:
        x: (B, C, ...).
        mean: (C,) running mean; None with statistics of the batch.
        var: (C,) running variance; likewise.
        weight: (C,) or None.
        bias: (C,) or None.
        eps: added to the variance.
        stats: see :func:`freeze_lean_`. ``"batch"`` keeps x; the other two one number a channel.

    Returns:
        As x.

    Raises:
        BadInput: ``"source"`` without running statistics, or a batch of one value a channel.

    Example:
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> frozen_batchnorm(x, torch.tensor([1.0]), torch.tensor([4.0]), eps=0.0).flatten().tolist()
        [0.0, 1.0]
    """
    weight, bias = (None if t is None else t.detach() for t in (weight, bias))
    if stats == "source":
        if mean is None or var is None:
            refuse(
                "stats", stats, "this batch norm has no running statistics; use 'batch' or 'batch_detached'"
            )
        return _run(_FixedNorm, x, mean, var, weight, bias, eps)
    if x.numel() // x.shape[1] < 2:
        refuse("x", tuple(x.shape), "statistics of a batch need two values a channel; use stats='source'")
    if stats == "batch":
        return F.batch_norm(x, None, None, weight, bias, True, 0.0, eps)
    axes = [0, *range(2, x.dim())]
    var, mean = torch.var_mean(x.detach(), dim=axes, correction=0)
    return _run(_FixedNorm, x, mean, var, weight, bias, eps)


def lean_relu(x: Tensor, ceiling: float = math.inf, slope: float = 0.0, *, inplace: bool = False) -> Tensor:
    """ReLU that keeps one bit per element; with a ceiling ReLU6, with a slope leaky.

    Args:
        x: any shape.
        ceiling: largest output.
        slope: factor below 0.
        inplace: overwrite x.

    Returns:
        ``min(max(x, slope · x), ceiling)``, as x.

    Example:
        >>> x = torch.tensor([-1.0, 2.0, 9.0], requires_grad=True)
        >>> lean_relu(x, ceiling=6.0).sum().backward()
        >>> x.grad
        tensor([0., 1., 0.])
    """
    return _run(_Rectify, x, 0.0, ceiling, slope, inplace)


def lean_max_pool2d(
    x: Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """Max pool that keeps the place inside the window: one byte per output.

    Args:
        x: (B, C, H, W).
        kernel_size: at most 256 places; larger windows go to torch.
        stride: as in ``torch.nn.functional.max_pool2d``.
        padding: likewise.
        dilation: likewise.
        ceil_mode: likewise.

    Returns:
        (B, C, H', W').

    Example:
        >>> x = torch.arange(4.0).view(1, 1, 2, 2).requires_grad_()
        >>> lean_max_pool2d(x, 2).sum().backward()
        >>> x.grad.flatten().tolist()
        [0.0, 0.0, 0.0, 1.0]
    """
    kernel = cast(tuple[int, int], _each(kernel_size, 2))
    steps = kernel if stride is None else cast(tuple[int, int], _each(stride, 2))
    settings = (kernel, steps, _each(padding, 2), _each(dilation, 2), ceil_mode)
    if kernel[0] * kernel[1] > 256 or x.dim() != 4:
        return F.max_pool2d(x, *settings)
    return _run(_MaxPool, x, settings)


def lean_avg_pool2d(
    x: Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Average pool that keeps nothing; arguments as ``torch.nn.functional.avg_pool2d``.

    Example:
        >>> lean_avg_pool2d(torch.arange(4.0).view(1, 1, 2, 2), 2).item()
        1.5
    """
    kernel = _each(kernel_size, 2)
    steps = kernel if stride is None else _each(stride, 2)
    settings = (kernel, steps, _each(padding, 2), ceil_mode, count_include_pad, divisor_override)
    return _run(_AveragePool, x, settings)


def _run(function: type[torch.autograd.Function], *arguments: object) -> Tensor:
    return cast(Tensor, function.apply(*arguments))  # type: ignore[no-untyped-call]


# ---- how each passes a gradient on -----------------------------------------------------------------------


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, settings: tuple[Any, ...]
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.settings = x.shape, settings
        return torch.ops.aten.convolution(x, weight, bias, *settings)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        shape_only = grad.new_empty(1).expand(ctx.shape)  # values of the input play no part
        wanted = (True, False, False)
        passed = torch.ops.aten.convolution_backward(grad, shape_only, weight, None, *ctx.settings, wanted)
        return passed[0], None, None, None


class _FixedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        scale = torch.rsqrt(var + eps)
        ctx.save_for_backward(scale if weight is None else scale * weight)
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = ctx.saved_tensors
        wide = scale.view(-1, *[1] * (grad.dim() - 2)).to(grad.dtype)
        return grad * wide, None, None, None, None, None


class _Rectify(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, floor: float, ceiling: float, slope: float, inplace: bool) -> Tensor:
        if ctx.needs_input_grad[0]:
            passes = x > floor
            if ceiling < math.inf:
                passes &= x < ceiling
            ctx.save_for_backward(pack_bits(passes.flatten(), 1, check=False))
        ctx.shape, ctx.slope = x.shape, slope
        target = x if inplace else None
        if inplace:
            ctx.mark_dirty(x)
        if slope:
            return F.leaky_relu_(x, slope) if inplace else F.leaky_relu(x, slope)
        if ceiling == math.inf and floor == 0.0:
            return torch.relu_(x) if inplace else torch.relu(x)
        return torch.clamp(x, floor, ceiling, out=target)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (packed,) = ctx.saved_tensors
        passes = unpack_bits(packed, 1, ctx.shape.numel()).view(ctx.shape)
        passed = torch.where(passes.bool(), grad, grad * ctx.slope) if ctx.slope else grad * passes
        return passed, None, None, None, None


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, settings: tuple[Any, ...]) -> Tensor:
        if not ctx.needs_input_grad[0]:
            return cast(Tensor, F.max_pool2d(x, *settings))
        pooled, flat = F.max_pool2d(x, *settings, return_indices=True)
        kernel, _, _, dilation, _ = settings
        rows, columns = _window_starts(pooled, settings)
        row = (flat // x.shape[3] - rows) // dilation[0]
        column = (flat % x.shape[3] - columns) // dilation[1]
        ctx.save_for_backward((row * kernel[1] + column).to(torch.uint8))
        ctx.shape, ctx.settings = x.shape, settings
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (place,) = ctx.saved_tensors
        kernel, _, _, dilation, _ = ctx.settings
        rows, columns = _window_starts(grad, ctx.settings)
        place = place.long()
        flat = (rows + place // kernel[1] * dilation[0]) * ctx.shape[3] + columns
        flat += place % kernel[1] * dilation[1]
        passed = grad.new_zeros(ctx.shape).flatten(2)
        passed.scatter_add_(2, flat.flatten(2), grad.flatten(2))
        return passed.view(ctx.shape), None


class _AveragePool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, settings: tuple[Any, ...]) -> Tensor:
        ctx.shape, ctx.settings = x.shape, settings
        return F.avg_pool2d(x, *settings)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        shape_only = grad.new_empty(1).expand(ctx.shape)
        return torch.ops.aten.avg_pool2d_backward(grad, shape_only, *ctx.settings), None


def _window_starts(pooled: Tensor, settings: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    _, stride, padding, _, _ = settings
    rows = torch.arange(pooled.shape[2], device=pooled.device) * stride[0] - padding[0]
    columns = torch.arange(pooled.shape[3], device=pooled.device) * stride[1] - padding[1]
    return rows[:, None], columns


def _each(value: int | tuple[int, ...], n: int) -> tuple[int, ...]:
    return (value,) * n if isinstance(value, int) else tuple(value)


# ---- the modules that freeze_lean_ makes of a user's own ---------------------------------------------------


class _Lean:
    """Marks a lean twin."""


class LeanLinear(_Lean, nn.Linear):
    """A frozen ``nn.Linear``."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return frozen_linear(x, self.weight, self.bias)


class _LeanConvolution(_Lean):
    def forward(self: Any, x: Tensor) -> Tensor:
        """(B, C, ...) -> (B, out, ...)."""
        if x.dim() != self.weight.dim():  # no batch dimension
            return cast(Tensor, self.forward(x.unsqueeze(0)).squeeze(0))
        padding = self.padding
        if isinstance(padding, str):
            twice = self._reversed_padding_repeated_twice
            x, padding = F.pad(x, twice) if any(twice) else x, 0
        return frozen_convolution(x, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)


class LeanConv1d(_LeanConvolution, nn.Conv1d):
    """A frozen ``nn.Conv1d``."""


class LeanConv2d(_LeanConvolution, nn.Conv2d):
    """A frozen ``nn.Conv2d``."""


class LeanConv3d(_LeanConvolution, nn.Conv3d):
    """A frozen ``nn.Conv3d``."""


class LeanSameConv2d(_Lean, nn.Conv2d):
    """A frozen convolution with TensorFlow's padding: output size = ceil(input size / stride)."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out, ceil(H / stride), ceil(W / stride))."""
        sides = []
        for size, kernel, stride, dilation in zip(
            x.shape[2:], self.kernel_size, self.stride, self.dilation, strict=True
        ):
            sides.append(max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0))
        high, wide = sides
        padding = (high // 2, wide // 2)
        if high % 2 or wide % 2:
            x, padding = F.pad(x, (wide // 2, wide - wide // 2, high // 2, high - high // 2)), (0, 0)
        return frozen_conv2d(x, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)


class _LeanTransposed(_Lean):
    def forward(self: Any, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(B, C, ...) -> (B, out, ...)."""
        n = self.weight.dim() - 2
        extra = self._output_padding(
            x, output_size, self.stride, self.padding, self.kernel_size, n, self.dilation
        )
        settings = (self.stride, self.padding, self.dilation, self.groups)
        return frozen_convolution(
            x, self.weight, self.bias, *settings, transposed=True, output_padding=tuple(extra)
        )


class LeanConvTranspose1d(_LeanTransposed, nn.ConvTranspose1d):
    """A frozen ``nn.ConvTranspose1d``."""


class LeanConvTranspose2d(_LeanTransposed, nn.ConvTranspose2d):
    """A frozen ``nn.ConvTranspose2d``."""


class LeanConvTranspose3d(_LeanTransposed, nn.ConvTranspose3d):
    """A frozen ``nn.ConvTranspose3d``."""


class _LeanBatchNorm(_Lean):
    lean_stats: Statistics

    def forward(self: Any, x: Tensor) -> Tensor:
        """(B, C, ...) -> the same shape."""
        self._check_input_dim(x)
        return frozen_batchnorm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.eps, stats=self.lean_stats
        )


class LeanBatchNorm1d(_LeanBatchNorm, nn.BatchNorm1d):
    """A frozen ``nn.BatchNorm1d``."""


class LeanBatchNorm2d(_LeanBatchNorm, nn.BatchNorm2d):
    """A frozen ``nn.BatchNorm2d``."""


class LeanBatchNorm3d(_LeanBatchNorm, nn.BatchNorm3d):
    """A frozen ``nn.BatchNorm3d``."""


class LeanBatchNormAct2d(LeanBatchNorm2d):
    """A frozen batch norm of timm's that holds its activation."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        parts: Any = self
        y: Tensor = parts.act(parts.drop(super().forward(x)))
        return y


class LeanReLU(_Lean, nn.ReLU):
    """``nn.ReLU`` that keeps one bit per element."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return lean_relu(x, inplace=self.inplace)


class LeanHardtanh(_Lean, nn.Hardtanh):
    """``nn.Hardtanh`` or ``nn.ReLU6`` that keeps one bit per element."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return _run(_Rectify, x, float(self.min_val), float(self.max_val), 0.0, self.inplace)


class LeanLeakyReLU(_Lean, nn.LeakyReLU):
    """``nn.LeakyReLU`` that keeps one bit per element."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return lean_relu(x, slope=self.negative_slope, inplace=self.inplace)


class LeanMaxPool2d(_Lean, nn.MaxPool2d):
    """``nn.MaxPool2d`` that keeps one byte per output."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H', W')."""
        sizes: tuple[Any, Any, Any, Any] = (self.kernel_size, self.stride, self.padding, self.dilation)
        return lean_max_pool2d(x, *sizes, self.ceil_mode)


class LeanAvgPool2d(_Lean, nn.AvgPool2d):
    """``nn.AvgPool2d`` that keeps nothing."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H', W')."""
        sizes: tuple[Any, Any, Any] = (self.kernel_size, self.stride, self.padding)
        return lean_avg_pool2d(x, *sizes, self.ceil_mode, self.count_include_pad, self.divisor_override)


_TWINS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: LeanLinear,
    nn.Conv1d: LeanConv1d,
    nn.Conv2d: LeanConv2d,
    nn.Conv3d: LeanConv3d,
    nn.ConvTranspose1d: LeanConvTranspose1d,
    nn.ConvTranspose2d: LeanConvTranspose2d,
    nn.ConvTranspose3d: LeanConvTranspose3d,
    nn.BatchNorm1d: LeanBatchNorm1d,
    nn.BatchNorm2d: LeanBatchNorm2d,
    nn.BatchNorm3d: LeanBatchNorm3d,
    nn.ReLU: LeanReLU,
    nn.ReLU6: LeanHardtanh,
    nn.Hardtanh: LeanHardtanh,
    nn.LeakyReLU: LeanLeakyReLU,
    nn.MaxPool2d: LeanMaxPool2d,
    nn.AvgPool2d: LeanAvgPool2d,
}
_BY_NAME: dict[str, type[nn.Module]] = {  # of memspan.data and timm: neither is imported here
    "SameConv2d": LeanSameConv2d,
    "Conv2dSame": LeanSameConv2d,
    "BatchNormAct2d": LeanBatchNormAct2d,
}


def _lean_kind(part: nn.Module) -> type[nn.Module] | None:
    kind = _TWINS.get(type(part), _BY_NAME.get(type(part).__name__))
    if isinstance(part, nn.modules.conv._ConvNd) and part.padding_mode != "zeros":
        return None
    if isinstance(part, nn.MaxPool2d) and part.return_indices:
        return None
    return kind
