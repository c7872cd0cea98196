"""All measurements of a run, with the few questions that claims and figures ask."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import overload

from memspan.base import nearest, refuse
from memspan.report.schema import Measurement

__all__ = ["Measurements"]


class Measurements(Sequence[Measurement]):
    """A sequence of measurements that can be narrowed and read by metric.

    Example:
        >>> rows = [
        ...     Measurement(method=m, seed=s, setting={"budget": 8}, quality={"accuracy": a},
        ...                 bytes={"w": 4}, seconds={})
        ...     for m, s, a in (("A", 0, 0.5), ("A", 1, 0.75), ("B", 0, 0.25))
        ... ]
        >>> found = Measurements(rows)
        >>> found.methods, found.seeds, found.where(method="A", budget=8).values("accuracy")
        (('A', 'B'), (0, 1), [0.5, 0.75])
        >>> found.one(method="B").bytes, found.points("accuracy")
        ({'w': 4}, {'A': [(8, 0.5), (8, 0.75)], 'B': [(8, 0.25)]})
    """

    def __init__(self, items: Iterable[Measurement] = ()) -> None:
        self._items = tuple(items)

    @overload
    def __getitem__(self, index: int) -> Measurement: ...
    @overload
    def __getitem__(self, index: slice) -> Measurements: ...
    def __getitem__(self, index: int | slice) -> Measurement | Measurements:
        return Measurements(self._items[index]) if isinstance(index, slice) else self._items[index]

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Measurement]:
        return iter(self._items)

    @property
    def methods(self) -> tuple[str, ...]:
        """Method names in the order in which they were measured."""
        return tuple(dict.fromkeys(one.method for one in self._items))

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds in the order in which they were measured."""
        return tuple(dict.fromkeys(one.seed for one in self._items))

    def settings(self, key: str) -> tuple[str | int | float, ...]:
        """The values that a setting took, in order of appearance."""
        return tuple(dict.fromkeys(one.setting[key] for one in self._items if key in one.setting))

    def where(
        self, *, method: str | None = None, seed: int | None = None, **setting: str | int | float
    ) -> Measurements:
        """Those of a method, a seed and setting values; may be empty."""
        return Measurements(
            one
            for one in self._items
            if (method is None or one.method == method)
            and (seed is None or one.seed == seed)
            and all(one.setting.get(key) == value for key, value in setting.items())
        )

    def one(
        self, *, method: str | None = None, seed: int | None = None, **setting: str | int | float
    ) -> Measurement:
        """The only one that :meth:`where` finds.

        Raises:
            BadInput: none, or several.
        """
        found = self.where(method=method, seed=seed, **setting)
        if len(found) != 1:
            asked = {"method": method, "seed": seed} | setting
            refuse("where", asked, f"{len(found)} measurements match, one is needed")
        return found[0]

    def values(self, metric: str) -> list[float]:
        """The metric of each measurement, in order.

        Raises:
            BadInput: one of them lacks the metric.
        """
        for one in self._items:
            if metric not in one.quality:
                refuse("metric", metric, f"{one.method} did not measure it; {nearest(metric, one.quality)}")
        return [one.quality[metric] for one in self._items]

    def points(self, metric: str, x: str = "budget") -> dict[str, list[tuple[float, float]]]:
        """By method, pairs (place, metric) as ``Frontier`` takes them.

        Args:
            metric: the quality read.
            x: the setting that gives the place, such as ``"budget"``; ``"bytes"`` takes the bytes held.
        """
        found: dict[str, list[tuple[float, float]]] = {}
        for one in self._items:
            if metric in one.quality and (x == "bytes" or x in one.setting):
                place = sum(one.bytes.values()) if x == "bytes" else one.setting[x]
                if isinstance(place, str):
                    refuse("x", x, "choose a setting that is a number")
                found.setdefault(one.method, []).append((place, one.quality[metric]))
        return found
