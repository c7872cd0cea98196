"""Cut a network's state from its past at every step, whoever wrote its neurons."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from memspan.base import refuse
from memspan.nn import surgery
from memspan.nn.spiking import LIF, Stateful, detach_, holders

__all__ = ["MAX_DECAY", "convert_", "is_online", "restore_"]

MAX_DECAY = 0.5  # of the potential from step to step; what SLTT loses grows with it


def convert_(module: nn.Module, max_decay: float = MAX_DECAY) -> nn.Module:
    """Online mode: every neuron's state is detached before it is used, nothing else changes.

    Ours get a flag, SpikingJelly's and snnTorch's neurons a subclass of their own class; parameters, names
    and optimizers stay as they are. :func:`restore_` undoes it.

    Args:
        module: a network of one time step, changed in place.
        max_decay: neurons that keep more than this share of their potential are refused, because the paths
            that SLTT drops weigh ``decay ** d``: measure :func:`gradient_agreement` first, then allow them
            with ``max_decay=1``.

    Returns:
        The module.

    Raises:
        BadInput: no neurons; a recurrent network of torch inside, whose path through time cannot be cut; a
            neuron that takes whole sequences; a decay above ``max_decay``; converted already.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), LIF(tau=20.0))
        >>> convert_(net)
        Traceback (most recent call last):
        memspan.base.refusal.BadInput: max_decay=0.5: 1: LIF keeps 0.95 of its potential: measure
        sltt.gradient_agreement, then allow it with max_decay=1
        >>> convert_(net, max_decay=1)[1].online, restore_(net)[1].online
        (True, False)
    """
    found = holders(module)
    if not found:
        refuse("module", type(module).__name__, "it has no neurons that hold a state: nothing would be cut")
    for name, part in module.named_modules():
        if isinstance(part, nn.RNNBase):
            told = f"{name or 'itself'}: {type(part).__name__}"
            refuse("module", told, "its path through time lies inside and cannot be cut; replace it")
    neurons = {name: module.get_submodule(name) for name in found}
    for name, part in neurons.items():
        told = f"{name or 'itself'}: {type(part).__name__}"
        if vars(part).get("multi_step") or vars(part).get("_step_mode", "s") == "m":
            refuse("module", told, 'it takes whole sequences; make it take one step (step_mode="s")')
        decay = _decay(part)
        if decay is not None and decay > max_decay + 1e-6:
            remedy = "measure sltt.gradient_agreement, then allow it with max_decay=1"
            refuse("max_decay", max_decay, f"{told} keeps {decay:.3g} of its potential: {remedy}")
    changes = [
        (part, None, {"online": True}) if isinstance(part, LIF) else (part, _online(type(part)), {})  # type: ignore[arg-type]
        for part in neurons.values()
        if not isinstance(part, Stateful) or isinstance(part, LIF)  # a dropout mask has no past to cut
    ]
    return surgery.recast_(module, changes, by="sltt")  # type: ignore[arg-type]


def restore_(module: nn.Module) -> nn.Module:
    """Undo :func:`convert_`: gradients flow through time again.

    Raises:
        BadInput: it was not converted.
    """
    return surgery.restore_(module, by="sltt")


def is_online(module: nn.Module) -> bool:
    """Whether all of a network's neurons were cut from their past."""
    parts = [module.get_submodule(name) for name in holders(module)]
    neurons = [part for part in parts if not isinstance(part, Stateful) or isinstance(part, LIF)]
    return all(part.online if isinstance(part, LIF) else isinstance(part, _Cut) for part in neurons)


class _Cut:
    """Marks the subclasses that detach their own state."""


@functools.cache
def _online(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a foreign neuron's class that detaches its state before each step."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        detach_(self)
        return kind.forward(self, *args, **kwargs)

    return type(f"Online{kind.__name__}", (_Cut, kind), {"forward": forward})


def _decay(part: nn.Module) -> float | None:
    """The largest share of its potential that a neuron keeps, where it is known."""
    if isinstance(part, LIF):
        return float(torch.as_tensor(part.decay).detach())
    known = vars(part)
    if "beta" in part._buffers or "beta" in part._parameters:  # snnTorch
        return float(torch.as_tensor(part.get_buffer("beta") if "beta" in part._buffers else
                                     part.get_parameter("beta")).detach().clamp(0, 1).max())  # fmt: skip
    if isinstance(known.get("tau"), int | float):  # SpikingJelly
        return 1 - 1 / float(known["tau"])
    if "w" in part._parameters and part.get_parameter("w").numel() == 1:  # SpikingJelly's learnt 1 / tau
        return 1 - float(torch.sigmoid(part.get_parameter("w").detach()))
    return None
