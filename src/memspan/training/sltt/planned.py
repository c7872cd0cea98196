"""SLTT for the planner: what it does in the place of one forward and one backward pass, and its closed form.

The model is :class:`~memspan.nn.spiking.Unrolled`, the loss takes (B, T, C) outputs as a mean over T.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from memspan.base import refuse
from memspan.ledger import saved_bytes
from memspan.nn.spiking import Unrolled, detach_, reset_
from memspan.training.sltt.convert import MAX_DECAY, convert_
from memspan.training.sltt.steps import Scale, chosen_steps

__all__ = ["planned_convert_", "planned_step", "planned_tbptt_", "planned_tbptt_step", "predict_bytes"]


def planned_convert_(
    model: nn.Module, k: int | None = None, loss_scale: Scale = "reference", max_decay: float = MAX_DECAY
) -> nn.Module:
    """:func:`convert_` with the options of :func:`planned_step` beside its own.

    Raises:
        BadInput: the model is no ``Unrolled``, or K is below 1.
    """
    _unrolled(model)
    if k is not None and k < 1:
        refuse("k", k, "differentiate 1 step or more, or None for all")
    return convert_(model, max_decay)


def planned_step(
    model: nn.Module,
    batch: Any,
    loss: Any,
    scale: float,
    k: int | None = None,
    loss_scale: Scale = "reference",
    max_decay: float = MAX_DECAY,
) -> Tensor:
    """Forward and backward passes of one batch, step by step (``Method.step``).

    Args:
        model: ``Unrolled``, converted.
        batch: ``(x, target)`` with x (B, T, ...).
        loss: of (B, 1, C) outputs and the target.
        scale: of the gradients, 1 over the number of micro-batches.
        k: see :class:`OnlineStep`, as is ``loss_scale``.
        loss_scale: see there.
        max_decay: of :func:`convert_`.

    Returns:
        The detached mean loss.
    """
    unrolled, x, target = _parts(model, batch, loss)
    T = x.shape[unrolled.time_dim]
    drawn = chosen_steps(T, k, 0, 0)
    share = scale / (len(drawn) if loss_scale == "unbiased" else T)
    total: Any = 0.0
    reset_(unrolled)
    for t in range(T):
        with torch.set_grad_enabled(t in drawn):
            value = loss(unrolled(x.narrow(unrolled.time_dim, t, 1), keep=True), target)
            if t in drawn:
                (value * share).backward()
        total = total + value.detach()
        del value
    reset_(unrolled)
    return total / T  # type: ignore[no-any-return]


def planned_tbptt_(model: nn.Module, window: int = 4) -> nn.Module:
    """Truncated backpropagation changes nothing in a model; it is checked.

    Raises:
        BadInput: the model is no ``Unrolled``, or the window is below 1.
    """
    _unrolled(model)
    if window < 1:
        refuse("window", window, "give the number of steps between cuts, 1 or more")
    return model


def planned_tbptt_step(model: nn.Module, batch: Any, loss: Any, scale: float, window: int = 4) -> Tensor:
    """Like :func:`planned_step`, by windows of time that are kept whole."""
    unrolled, x, target = _parts(model, batch, loss)
    T = x.shape[unrolled.time_dim]
    total: Any = 0.0
    reset_(unrolled)
    for begin in range(0, T, window):
        size = min(window, T - begin)
        value = loss(unrolled(x.narrow(unrolled.time_dim, begin, size), keep=True), target) * (size / T)
        (value * scale).backward()
        total = total + value.detach()
        del value
        detach_(unrolled)
    reset_(unrolled)
    return total  # type: ignore[no-any-return]


def predict_bytes(net: nn.Module, x: Tensor, steps: int, *, method: str = "sltt") -> dict[str, int]:
    """What the graph keeps at once, in closed form: one step for SLTT, all of them for BPTT.

    Args:
        net: a network of one time step.
        x: the input of one step (B, ...); only its shape and dtype count.
        steps: T.
        method: ``"sltt"`` or ``"bptt"``.

    Returns:
        Bytes of ``saved_activations`` (one step is traced on tensors that hold no bytes), ``parameters``,
        ``gradients`` and ``inputs`` of the sequence.

    Example:
        >>> from memspan.nn.spiking import LIF
        >>> net = nn.Sequential(nn.Linear(4, 8), LIF(), nn.Linear(8, 2))
        >>> x = torch.zeros(16, 4)
        >>> [predict_bytes(net, x, 10, method=name)["saved_activations"] for name in ("sltt", "bptt")]
        [1024, 10240]
    """
    if method not in ("sltt", "bptt"):
        refuse("method", method, 'use "sltt" or "bptt"')
    if steps < 1:
        refuse("steps", steps, "a sequence has 1 step or more")
    traced = copy.deepcopy(net).train()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(x)
        kept = saved_bytes(traced(fake), exclude=[fake])
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    return {
        "saved_activations": kept * (1 if method == "sltt" else steps),
        "parameters": sum(parameter.nbytes for parameter in net.parameters()),
        "gradients": sum(parameter.nbytes for parameter in trained),
        "inputs": x.nbytes * steps,
    }


def _unrolled(model: nn.Module) -> Unrolled:
    if not isinstance(model, Unrolled):
        remedy = "this method works step by step: give memspan.nn.spiking.Unrolled(net of one step)"
        refuse("model", type(model).__name__, remedy)
    return model


def _parts(model: nn.Module, batch: Any, loss: Any) -> tuple[Unrolled, Tensor, Any]:
    unrolled = _unrolled(model)
    if loss is None:
        refuse("loss", loss, "this method needs loss=function(outputs (B, T, C), target), a mean over T")
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        refuse("batch", type(batch).__name__, "this method takes (x (B, T, ...), target)")
    return unrolled, batch[0], batch[1]
