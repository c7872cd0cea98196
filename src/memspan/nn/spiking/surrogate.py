"""Spikes that have a derivative: 1 where ``x >= 0`` in the forward pass, a bump around 0 in the backward.

``x`` is the potential less the threshold. Each bump has area 1; ``width`` stretches it along ``x`` and
lowers it by the same factor. At width 1 they are those of the literature: the triangle of Bellec et al. 2018
(SpikingJelly's ``PiecewiseQuadratic(1.0)``), the rectangle of Wu et al. 2018, the sigmoid with slope 4 and
the arctangent with slope 2 (SpikingJelly's and snnTorch's defaults).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from memspan.base import nearest, refuse

__all__ = ["DERIVATIVES", "atan", "derivative", "rectangle", "sigmoid", "triangle"]


def triangle(x: Tensor, width: float = 1.0) -> Tensor:
    """Spikes with the derivative ``max(0, 1 - |x / width|) / width``.

    Args:
        x: potential less threshold, any shape.
        width: half of the base of the triangle.

    Example:
        >>> x = torch.tensor([-2.0, -0.5, 0.0, 0.25], requires_grad=True)
        >>> spikes = triangle(x)
        >>> spikes.sum().backward()
        >>> spikes.tolist(), x.grad.tolist()
        ([0.0, 0.0, 1.0, 1.0], [0.0, 0.5, 1.0, 0.75])
    """
    return _Spike.apply(x, "triangle", width)  # type: ignore[no-any-return, no-untyped-call]


def rectangle(x: Tensor, width: float = 1.0) -> Tensor:
    """Spikes with the derivative ``1 / width`` where ``|x| <= width / 2``; arguments as :func:`triangle`.

    Example:
        >>> x = torch.tensor([-0.6, 0.5], requires_grad=True)
        >>> rectangle(x).sum().backward()
        >>> x.grad.tolist()
        [0.0, 1.0]
    """
    return _Spike.apply(x, "rectangle", width)  # type: ignore[no-any-return, no-untyped-call]


def sigmoid(x: Tensor, width: float = 1.0) -> Tensor:
    """Spikes with the derivative of ``sigmoid(4 x / width)``; arguments as :func:`triangle`.

    Example:
        >>> x = torch.zeros(1, requires_grad=True)
        >>> sigmoid(x).sum().backward()
        >>> x.grad.item()
        1.0
    """
    return _Spike.apply(x, "sigmoid", width)  # type: ignore[no-any-return, no-untyped-call]


def atan(x: Tensor, width: float = 1.0) -> Tensor:
    """Spikes with the derivative ``1 / (1 + (pi x / width)^2) / width``; arguments as :func:`triangle`.

    Example:
        >>> x = torch.zeros(1, requires_grad=True)
        >>> atan(x, width=2.0).sum().backward()
        >>> x.grad.item()
        0.5
    """
    return _Spike.apply(x, "atan", width)  # type: ignore[no-any-return, no-untyped-call]


def derivative(name: str, x: Tensor, width: float = 1.0) -> Tensor:
    """The derivative that a surrogate puts in the place of the step's.

    Raises:
        BadInput: an unknown name, or a width that is not above 0.

    Example:
        >>> derivative("triangle", torch.tensor([0.5, 3.0]), width=2.0).tolist()
        [0.375, 0.0]
    """
    if name not in DERIVATIVES:
        refuse("surrogate", name, nearest(name, DERIVATIVES))
    if not width > 0:
        refuse("width", width, "give a width above 0; 1 is usual")
    return DERIVATIVES[name](x if width == 1 else x / width, width)


def _triangle(x: Tensor, width: float) -> Tensor:
    return x.abs().neg_().add_(1).clamp_(min=0).div_(width)


def _rectangle(x: Tensor, width: float) -> Tensor:
    return (x.abs() <= 0.5).to(x.dtype).div_(width)


def _sigmoid(x: Tensor, width: float) -> Tensor:
    s = torch.sigmoid(4 * x)
    return 4 / width * s * (1 - s)


def _atan(x: Tensor, width: float) -> Tensor:
    return (x * math.pi).square_().add_(1).reciprocal_().div_(width)


#: Derivatives by name: of ``x / width``, and of ``width``.
DERIVATIVES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "triangle": _triangle,
    "rectangle": _rectangle,
    "sigmoid": _sigmoid,
    "atan": _atan,
}


class _Spike(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, name: str, width: float) -> Tensor:
        return (x >= 0).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.name, ctx.width = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return grad[0] * derivative(ctx.name, x, ctx.width), None, None
