"""The register of training methods: how each converts a model and, where it differs, its step and optimizer.

A room offers its methods through the entry point group ``memspan.methods``; the planner combines what is
registered and knows no method by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from typing import NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from memspan.base import nearest, refuse

__all__ = ["Method", "method", "methods"]


class Method(NamedTuple):
    """A way to train in fewer bytes, as the planner sees it.

    Attributes:
        name: the name users type.
        convert_: ``convert_(model, **options) -> model``, in place; where ``ranks`` is true it also takes
            ``mesh=``, a device mesh of one dimension, or None on one rank, and shards the model itself.
        step: ``step(model, batch, loss, scale, **options)`` runs a micro-batch's forward and backward where a
            step is not one of each; it multiplies the loss by ``scale`` before the backward pass and gives
            it back, detached and unscaled. ``loss`` is as in :func:`~memspan.ledger.training_step`. None:
            one forward and one backward pass.
        optimizer: ``optimizer(model, make)`` makes the optimizer the method needs, where ``make`` is the
            caller's own, from parameters; or None for the caller's own over what is trained.
        ranks: whether ``convert_`` takes a device mesh.
        conflicts: names of methods that cannot be combined with this one.
    """

    name: str
    convert_: Callable[..., nn.Module]
    step: Callable[..., Tensor] | None = None
    optimizer: Callable[..., Optimizer] | None = None
    ranks: bool = False
    conflicts: frozenset[str] = frozenset()


def methods() -> dict[str, Method]:
    """All registered methods by name, in the order of their rooms' names."""
    found: dict[str, Method] = {}
    for entry in sorted(entry_points(group="memspan.methods"), key=lambda entry: entry.name):
        offered: Iterable[Method] = entry.load()
        for item in offered:
            if item.name in found:
                refuse(
                    "method",
                    item.name,
                    f"two rooms register this name (the second is {entry.value}); rename one",
                )
            found[item.name] = item
    return found


def method(name: str) -> Method:
    """The registered method of this name.

    Raises:
        BadInput: no room registers it; the nearest names are offered.
    """
    known = methods()
    if name not in known:
        refuse("method", name, nearest(name, known))
    return known[name]
