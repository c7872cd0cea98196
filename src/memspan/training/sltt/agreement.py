"""Before training: how far SLTT's gradient is from backpropagation's, on the user's weights and data."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from memspan.base import refuse
from memspan.nn.spiking import holders
from memspan.training.sltt.convert import convert_, is_online, restore_
from memspan.training.sltt.steps import At, BPTTStep, OnlineStep, TimeDropout

__all__ = ["Agreement", "gradient_agreement"]


class Agreement(NamedTuple):
    """One parameter tensor, or one layer of neurons.

    Attributes:
        layer: its name.
        cosine: of the two gradients; NaN where one is zero, or for neurons.
        norm_ratio: length of SLTT's gradient over that of BPTT's.
        dead: of neurons, the share without any gradient in the whole batch; NaN for parameters.
    """

    layer: str
    cosine: float
    norm_ratio: float
    dead: float


def gradient_agreement(
    net: nn.Module,
    x_seq: Tensor,
    y: Any,
    loss_fn: Callable[[Tensor, Any], Tensor] = nn.functional.cross_entropy,
    *,
    loss_at: At = "all",
    time_dim: int = 0,
) -> list[Agreement]:
    """SLTT against BPTT, gradient by gradient, on a copy of the network.

    A cosine near 1 says that nothing is lost by dropping time; it falls with the decay and with T. The norm
    ratio tells a difference in effective learning rate.

    Args:
        net: a network of one time step, converted or not; not changed.
        x_seq: (T, B, ...).
        y: what ``loss_fn`` takes.
        loss_fn: loss of one step's output.
        loss_at: ``"all"`` steps or the ``"last"``.
        time_dim: where time stands.

    Returns:
        A row for each trained parameter and one for each layer of neurons (``pandas.DataFrame(rows)`` has
        them as a table).

    Raises:
        BadInput: as the two steps do.

    Example:
        >>> from memspan.nn.spiking import LIF
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(4, 32), LIF(tau=1.1), nn.Linear(32, 2))
        >>> rows = gradient_agreement(net, torch.randn(6, 16, 4), torch.arange(16) % 2)
        >>> [(row.layer, row.cosine > 0.9) for row in rows][:2]
        [('0.weight', True), ('0.bias', True)]
    """
    copied = copy.deepcopy(net).train()
    if any(isinstance(part, TimeDropout | nn.modules.dropout._DropoutNd) for part in copied.modules()):
        for part in copied.modules():  # a mask would differ between the two passes
            if isinstance(part, TimeDropout | nn.modules.dropout._DropoutNd):
                part.eval()
    if is_online(copied):
        restore_(copied)
    neurons = {name: copied.get_submodule(name) for name in holders(copied)}
    touched: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            current = inputs[0]
            if isinstance(current, Tensor) and current.requires_grad:
                seen = touched.setdefault(name, torch.zeros_like(current[0], dtype=torch.bool))

                def note(grad: Tensor) -> None:
                    seen.logical_or_((grad != 0).any(0))

                current.register_hook(note)  # type: ignore[no-untyped-call]

        return hook

    def gradients(step: Any) -> dict[str, Tensor]:
        copied.zero_grad()
        step(x_seq, y)
        named = dict(copied.named_parameters())
        return {n: p.grad.detach().clone() for n, p in named.items() if p.grad is not None}

    options: dict[str, Any] = {"loss_at": loss_at, "time_dim": time_dim}
    exact = gradients(BPTTStep(copied, loss_fn, **options))
    convert_(copied, max_decay=1.0)
    hooks = [part.register_forward_pre_hook(watch(name)) for name, part in neurons.items()]
    ours = gradients(OnlineStep(copied, loss_fn, **options))
    for handle in hooks:
        handle.remove()
    if not exact:
        refuse("net", type(net).__name__, "no parameter of it is trained")
    rows = []
    for name, one in exact.items():
        other = ours.get(name, torch.zeros_like(one))
        norms = one.double().norm(), other.double().norm()
        product = float(norms[0] * norms[1])
        cosine = float((one.double() * other.double()).sum()) / product if product else float("nan")
        ratio = float(norms[1] / norms[0]) if norms[0] else float("nan")
        rows.append(Agreement(name, cosine, ratio, float("nan")))
    for name, seen in touched.items():
        share = 1 - float(seen.double().mean())
        rows.append(Agreement(name or "itself", float("nan"), float("nan"), share))
    return rows
