"""Quality against bytes: the picture in which every recipe ends, as numbers.

A method is a curve through (bytes, quality). The area under it compares methods over a range of budgets,
where a single budget can be chosen to please. What lies outside the measured range is refused, not guessed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

from memspan.base import nearest, refuse

__all__ = ["Frontier", "Point"]


class Point(NamedTuple):
    """One point of the Pareto front: bytes held, quality reached, by which method."""

    bytes: float
    quality: float
    method: str


@dataclass(frozen=True, init=False)
class Frontier:
    """Curves of quality against bytes, one for each method.

    Points of one method at the same bytes (several seeds) are averaged; their order does not matter.

    Attributes:
        points: method -> (bytes, quality) pairs, bytes rising.
        higher_is_better: False for losses and errors.

    Raises:
        BadInput: a method without points, or a point that is not finite or has negative bytes.

    Example:
        >>> curve = Frontier({"small": [(1, 0.5), (3, 0.7)], "large": [(3, 0.9), (1, 0.1)]})
        >>> curve.at(2)
        {'small': 0.6, 'large': 0.5}
        >>> {name: round(area, 6) for name, area in curve.area(normalize=True).items()}
        {'small': 0.6, 'large': 0.5}
        >>> curve.front()
        [Point(bytes=1.0, quality=0.5, method='small'), Point(bytes=3.0, quality=0.9, method='large')]
    """

    points: dict[str, tuple[tuple[float, float], ...]]
    higher_is_better: bool

    def __init__(
        self, points: Mapping[str, Sequence[tuple[float, float]]], *, higher_is_better: bool = True
    ) -> None:
        curves = {}
        for method, pairs in points.items():
            at: dict[float, list[float]] = {}
            for held, quality in pairs:
                if not (math.isfinite(held) and math.isfinite(quality) and held >= 0):
                    refuse("points", (method, held, quality), "give finite numbers and 0 or more bytes")
                at.setdefault(float(held), []).append(float(quality))
            if not at:
                refuse("points", {method: pairs}, "give each method one (bytes, quality) pair or more")
            curves[method] = tuple((held, math.fsum(at[held]) / len(at[held])) for held in sorted(at))
        object.__setattr__(self, "points", curves)
        object.__setattr__(self, "higher_is_better", higher_is_better)

    def area(
        self,
        scale: Literal["linear", "log"] = "linear",
        normalize: bool = False,
        *,
        over: tuple[float, float] | None = None,
    ) -> dict[str, float]:
        """Area under each curve, by trapezoids.

        Args:
            scale: of the bytes: ``"linear"`` (quality times bytes), or ``"log"`` (quality times doublings of
                bytes), in which small budgets weigh as much as large ones. The two rank methods differently.
            normalize: divide by the width of the range, so that the area is a mean quality.
            over: the range of bytes to take; None takes each method's own. Methods are comparable over one
                range alone: give it where they do not share theirs.

        Raises:
            BadInput: a method with one point, a range that a method did not measure, 0 bytes on a log scale.
        """
        if scale not in ("linear", "log"):
            refuse("scale", scale, 'use "linear" or "log"')
        areas = {}
        for method, pairs in self.points.items():
            if len(pairs) < 2:
                refuse("points", {method: pairs}, "an area needs two budgets or more")
            curve = list(pairs)
            if over is not None:
                low, high = over
                if not low < high:
                    refuse("over", over, "give (smallest, largest) bytes")
                inside = [pair for pair in pairs if low < pair[0] < high]
                curve = [(low, self.value(method, low)), *inside, (high, self.value(method, high))]
            if scale == "log":
                if curve[0][0] <= 0:
                    refuse("scale", scale, f"{method} has a point at 0 bytes; use the linear scale")
                curve = [(math.log2(held), quality) for held, quality in curve]
            pieces = [(x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in pairwise(curve)]
            width = curve[-1][0] - curve[0][0]
            areas[method] = math.fsum(pieces) / (width if normalize else 1.0)
        return areas

    def at(self, budget: float) -> dict[str, float]:
        """Quality of each method at a budget, piecewise linear between measured points.

        Raises:
            BadInput: the budget lies outside what some method measured; names the method and its range.
        """
        return {method: self.value(method, budget) for method in self.points}

    def value(self, method: str, budget: float) -> float:
        """Quality of one method at a budget; see :meth:`at`."""
        if method not in self.points:
            refuse("method", method, nearest(method, self.points))
        pairs = self.points[method]
        if not pairs[0][0] <= budget <= pairs[-1][0]:
            refuse(
                "budget",
                budget,
                f"{method} was measured from {pairs[0][0]:,.0f} to {pairs[-1][0]:,.0f} bytes",
            )
        for held, quality in pairs:
            if held == budget:
                return quality
        x1, y1 = next(pair for pair in pairs if pair[0] > budget)
        x0, y0 = next(pair for pair in reversed(pairs) if pair[0] < budget)
        return y0 + (y1 - y0) * (budget - x0) / (x1 - x0)

    def front(self) -> list[Point]:
        """The points that no other point beats with as few bytes, bytes rising; on ties the first named."""
        sign = 1.0 if self.higher_is_better else -1.0
        every = [Point(*pair, method) for method, pairs in self.points.items() for pair in pairs]
        front: list[Point] = []
        for point in sorted(every, key=lambda point: (point.bytes, -sign * point.quality)):
            if not front or sign * point.quality > sign * front[-1].quality:
                front.append(point)
        return front
