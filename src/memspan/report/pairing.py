"""Ours against a rival: the same seeds on both sides, the difference at each, and an interval over them.

Two methods that were measured with the same seeds (splits, class orders, first weights) differ by less
noise than two that were not, so a recipe compares them seed by seed. A seed that one side lacks is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import numpy as np

from memspan.base import nearest, refuse
from memspan.report.schema import Measurement
from memspan.report.stats import Interval, mean_interval, paired_difference

__all__ = ["gain", "gain_over_items"]

Value: TypeAlias = str | Callable[[Sequence[Measurement]], float]


def gain(
    ours: Iterable[Measurement], *rivals: Iterable[Measurement], metric: Value, scale: float = 1.0
) -> Interval | None:
    """Ours less the rival, paired over seeds; with several rivals, less the best of them at each seed.

    Args:
        ours: rows of our method; several of one seed count as their mean.
        rivals: rows of each rival.
        metric: of ``quality``; or a function from one side's rows of one seed to a number, such as an area.
        scale: multiplies the difference, such as 100 for points. Below 0 for a metric that falls as it gets
            better: the best rival is then the lowest, and a positive gain is ours ahead all the same.

    Returns:
        The interval over the seeds that all sides have; None where there is none.

    Example:
        >>> def row(method, seed, value):
        ...     return Measurement(method=method, seed=seed, quality={"acc": value}, bytes={}, seconds={})
        >>> ours = [row("A", seed, 0.5 + 0.25 * seed) for seed in range(3)]
        >>> rival = [row("B", seed, 0.25 * seed) for seed in (2, 1, 7)]
        >>> gain(ours, rival, metric="acc", scale=100)
        Interval(mean=50.0, low=50.0, high=50.0, n=2)
        >>> gain(ours, [], metric="acc") is None
        True
    """
    if not rivals:
        refuse("rivals", rivals, "give the rows of one rival or more")
    sides = [_by_seed(rows) for rows in (ours, *rivals)]
    common = [seed for seed in sides[0] if all(seed in side for side in sides[1:])]
    differences = []
    for seed in common:
        mine, *others = (scale * _value(side[seed], metric) for side in sides)
        differences.append(mine - max(others))
    return mean_interval(differences) if differences else None


def gain_over_items(
    ours: Iterable[Measurement],
    rival: Iterable[Measurement],
    series: str,
    *,
    units: str | None = None,
    scale: float = 1.0,
) -> Interval | None:
    """Ours less the rival, paired over the items that both answered, such as test examples.

    Args:
        ours: rows of our method; with several seeds an item counts as its mean over those of both sides.
        rival: rows of the rival.
        series: one value an item, in the same order on both sides.
        units: the series that tells to which independent unit (a user, a conversation) an item belongs; None:
            each item is one.
        scale: multiplies the difference.

    Returns:
        The interval over items (or units); None where no seed is common.

    Raises:
        BadInput: the sides have not the same items.
    """
    sides = [_by_seed(ours), _by_seed(rival)]
    common = [seed for seed in sides[0] if seed in sides[1]]
    if not common:
        return None
    rows = [[row for seed in common for row in side[seed]] for side in sides]
    curves = [[row.series[series] for row in side] for side in rows]
    lengths = {len(curve) for side in curves for curve in side}
    if len(lengths) != 1:
        refuse("series", series, f"both sides need the same items; found {sorted(lengths)} of them")
    means = [np.mean(side, axis=0) for side in curves]
    labels = None if units is None else [int(unit) for unit in rows[0][0].series[units]]
    return paired_difference(means[0], means[1], labels).scaled(scale)


def _by_seed(rows: Iterable[Measurement]) -> dict[int, list[Measurement]]:
    found: dict[int, list[Measurement]] = {}
    for row in rows:
        found.setdefault(row.seed, []).append(row)
    return found


def _value(rows: Sequence[Measurement], metric: Value) -> float:
    if callable(metric):
        return metric(rows)
    for row in rows:
        if metric not in row.quality:
            refuse("metric", metric, f"{row.method} did not measure it; {nearest(metric, row.quality)}")
    return float(np.mean([row.quality[metric] for row in rows]))
