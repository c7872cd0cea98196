"""The register of training methods: how each converts a model, and how many bytes it will hold.

A room offers its methods through the entry point group ``memspan.methods``; the planner combines what is
registered and knows no method by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from typing import NamedTuple

from torch import nn
from torch.optim import Optimizer

from memspan.base import nearest, refuse

__all__ = ["Method", "method", "methods"]


class Method(NamedTuple):
    """A way to train in fewer bytes, as the planner sees it.

    Attributes:
        name: the name users type.
        convert_: ``convert_(model, **options) -> model``, in place.
        predict_bytes: closed form by category, or None when only a trace tells.
        optimizer: makes the optimizer the method needs, or None for the caller's own.
        conflicts: names of methods that cannot be combined with this one.
    """

    name: str
    convert_: Callable[..., nn.Module]
    predict_bytes: Callable[..., dict[str, int]] | None
    optimizer: Callable[..., Optimizer] | None = None
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
