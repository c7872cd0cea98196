"""Gradients that meet: autograd adds in place where nobody else holds the first, and so does the book."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from memspan.ledger import AllocatorPeak, Ledger

ROWS, WIDE, NARROW = 4096, 64, 4
kept: list[Tensor] = []


class Held(torch.autograd.Function):
    """A product whose input's gradient somebody keeps."""

    @staticmethod
    def forward(ctx: object, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)  # type: ignore[attr-defined]
        return x @ w

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors  # type: ignore[attr-defined]
        kept.append(grads[0] @ w.T)
        return kept[-1], x.T @ grads[0]


class Adding(Held):
    """One that adds two gradients for itself: out of place, as it is written."""

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors  # type: ignore[attr-defined]
        return grads[0] @ w.T + grads[0] @ w.T, x.T @ grads[0]


class Fan(nn.Module):
    """One hidden tensor, read three times."""

    def __init__(self, product: Callable[..., Tensor]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(WIDE, NARROW) for _ in range(3))
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        h = x * 1.0
        return torch.cat([self.product(h, w) for w in self.weights], dim=1)


@pytest.mark.parametrize("product", [torch.matmul, Held.apply, Adding.apply])
def test_the_book_tells_the_peak_of_the_step_without_a_ledger(product: Callable[..., Tensor]) -> None:
    model, x = Fan(product), torch.randn(ROWS, WIDE, requires_grad=True)
    upstream = torch.ones(ROWS, 3 * NARROW)

    def step() -> None:
        kept.clear()
        x.grad = None
        model.zero_grad()
        model(x).backward(upstream)

    step()
    kept.clear()
    x.grad = None
    model.zero_grad()
    held = x.nbytes + upstream.nbytes + sum(p.nbytes for p in model.parameters())
    with AllocatorPeak("cpu", before=held) as truth:
        step()
    for level in ("peak", "timeline"):
        kept.clear()
        x.grad = None
        model.zero_grad()
        with Ledger(model, inputs=(x, upstream), level=level, allocator=True) as led:  # type: ignore[arg-type]
            step()
        assert led.peak.attributed == pytest.approx(truth.peak, abs=64)
        assert led.peak.allocator == pytest.approx(truth.peak, abs=64)  # as if no ledger had been there
        assert led.current.total == held + sum(p.nbytes for p in model.parameters()) + x.nbytes + sum(
            one.nbytes for one in kept
        )
    assert max(point.total for point in led.timeline()) == led.peak.attributed
