"""Adam for tables of which a step reads few rows: moments and decay touch those rows alone.

Dense Adam reads and writes three times the whole table at every step, and its decay shrinks rows that
nothing has read. With row-sparse gradients (``sparse=True`` in a lookup layer, ``nn.Embedding`` or
``EmbeddingBag``) a step costs what its rows cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from memspan.base import refuse

__all__ = ["RowAdam"]


class RowAdam(Optimizer):
    """AdamW whose state moves only for rows with a gradient.

    For sparse gradients it is ``torch.optim.SparseAdam`` with decoupled weight decay on the rows of the
    step; for dense ones it is ``torch.optim.AdamW``. So one optimizer serves a whole model. Moments are not
    decayed while a row is not read ("lazy"), and the bias correction counts steps, not visits.

    Args:
        params: parameters or groups; a sparse gradient may have one or more sparse dimensions, first ones.
        lr: step size.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled, times lr.

    Raises:
        BadInput: a number outside its range.

    Example:
        >>> table = torch.nn.Parameter(torch.ones(3, 2))
        >>> optimizer = RowAdam([table], lr=0.1)
        >>> table.grad = torch.sparse_coo_tensor([[1]], [[1.0, 1.0]], (3, 2))
        >>> optimizer.step()
        >>> [[round(value, 2) for value in row] for row in table.tolist()]
        [[1.0, 1.0], [0.9, 0.9], [1.0, 1.0]]
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if not lr >= 0 or not all(0 <= beta < 1 for beta in betas) or not eps > 0 or not weight_decay >= 0:
            refuse(
                "lr, betas, eps, weight_decay", (lr, betas, eps, weight_decay),
                "give lr and weight_decay of 0 or more, betas in [0, 1), eps above 0",
            )  # fmt: skip
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step; a closure that gives the loss is called first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)
        return loss

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
        state["step"] += 1
        if not gradient.is_sparse:
            _adam(parameter, gradient, state["exp_avg"], state["exp_avg_sq"], state["step"], group)
            return
        gradient = gradient.coalesce()
        lead, values = gradient.sparse_dim(), gradient.values()
        if not values.shape[0]:
            return
        rows = torch.zeros_like(gradient.indices()[0])
        for size, index in zip(parameter.shape[:lead], gradient.indices(), strict=True):
            rows = rows * size + index
        whole = [
            tensor.view(-1, *tensor.shape[lead:])
            for tensor in (parameter, state["exp_avg"], state["exp_avg_sq"])
        ]
        parts = [tensor[rows] for tensor in whole]
        _adam(parts[0], values, parts[1], parts[2], state["step"], group)
        for tensor, part in zip(whole, parts, strict=True):
            tensor[rows] = part


def _adam(
    x: Tensor, gradient: Tensor, first: Tensor, second: Tensor, step: int, group: dict[str, Any]
) -> None:
    """AdamW's update, in place on all but the gradient."""
    beta, gamma = group["betas"]
    if group["weight_decay"]:
        x.mul_(1 - group["lr"] * group["weight_decay"])
    first.lerp_(gradient, 1 - beta)
    second.mul_(gamma).addcmul_(gradient, gradient, value=1 - gamma)
    root = second.sqrt().div_(math.sqrt(1 - gamma**step)).add_(group["eps"])
    x.addcdiv_(first, root, value=-group["lr"] / (1 - beta**step))
