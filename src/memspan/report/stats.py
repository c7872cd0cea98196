"""Intervals for what a run measured: over seeds, over paired units, over counts.

A recipe has few independent units (seeds, class orders) and often many correlated items in each. So the
default is what stays honest with few: differences are averaged inside a unit, and Student's t over the units
gives the interval. The percentile bootstrap, the usual choice, covers 95 % only in name with 5 units (about
84 % here), so it serves from 30 units on, where normality is no longer worth assuming.

Sources: Student 1908; Efron 1987 (BCa); Davison and Hinkley 1997, section 3.8 (resampling of whole units);
Wilson 1927; Brown, Cai, DasGupta 2001.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from memspan.base import refuse
from memspan.base.rng import rng

__all__ = ["Interval", "bootstrap", "mean_interval", "paired_difference", "student_quantile", "wilson"]

Array = NDArray[np.float64]
FEW = 30  # units below which Student's t is used


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval.

    Attributes:
        mean: the estimate (a mean, a difference of means, a share, or the statistic that was bootstrapped).
        low: lower end; ``-inf`` where one unit alone says nothing about spread.
        high: upper end; ``inf`` likewise.
        n: independent units behind it.

    Example:
        >>> Interval(1.0, 0.5, 1.5, n=5).excludes(0)
        True
    """

    mean: float
    low: float
    high: float
    n: int

    def __post_init__(self) -> None:
        if math.isnan(self.mean) or not self.low <= self.high:
            refuse("interval", (self.mean, self.low, self.high), "give a number and low <= high")

    def excludes(self, value: float) -> bool:
        """Whether the value lies outside the interval."""
        return value < self.low or value > self.high

    def scaled(self, factor: float) -> Interval:
        """The interval in another unit, such as percentage points.

        Example:
            >>> Interval(0.5, 0.25, 0.75, n=4).scaled(100)
            Interval(mean=50.0, low=25.0, high=75.0, n=4)
        """
        ends = sorted((self.low * factor, self.high * factor))
        return Interval(self.mean * factor, ends[0], ends[1], self.n)


def paired_difference(
    a: ArrayLike,
    b: ArrayLike,
    units: Sequence[Hashable] | None = None,
    *,
    level: float = 0.95,
    method: Literal["auto", "student", "bootstrap"] = "auto",
    samples: int = 5000,
    seed: int = 0,
) -> Interval:
    """Mean of ``a - b`` over pairs, with a confidence interval over independent units.

    Args:
        a: values of one method, shape (n,).
        b: values of the other on the same items, shape (n,), in the same order.
        units: for each pair the unit (seed, class order, user) it belongs to. Pairs of one unit are not
            independent: each unit enters as its mean, all with equal weight. None: each pair is a unit.
        level: of confidence.
        method: ``"auto"`` takes Student's t below 30 units and the BCa bootstrap over units from there on.
            Units are resampled whole: resampling inside them too would count their inner noise twice.
        samples: resamples of the bootstrap.
        seed: of the bootstrap's draws.

    Returns:
        The interval; with one unit its ends are infinite.

    Raises:
        BadInput: lengths differ, nothing given, values not finite.

    Example:
        >>> gain = paired_difference([0.84, 0.82, 0.85], [0.80, 0.79, 0.80])
        >>> round(gain.mean, 3), round(gain.low, 3), round(gain.high, 3), gain.n
        (0.04, 0.015, 0.065, 3)
    """
    left, right = _vector("a", a), _vector("b", b)
    if left.shape != right.shape:
        refuse("b", right.shape, f"give one value for each of a's {left.size}, in the same order")
    return mean_interval(left - right, units, level=level, method=method, samples=samples, seed=seed)


def mean_interval(
    values: ArrayLike,
    units: Sequence[Hashable] | None = None,
    *,
    level: float = 0.95,
    method: Literal["auto", "student", "bootstrap"] = "auto",
    samples: int = 5000,
    seed: int = 0,
) -> Interval:
    """Mean with a confidence interval over independent units; arguments as :func:`paired_difference`.

    Example:
        >>> mean_interval([2.0, 2.0, 2.0])
        Interval(mean=2.0, low=2.0, high=2.0, n=3)
        >>> mean_interval([2.0]).low
        -inf
    """
    vector = _unit_means(_vector("values", values), units)
    _check_level(level)
    n, mean = vector.size, float(vector.mean())
    if n == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    if np.ptp(vector) == 0:
        value = float(vector[0])
        return Interval(value, value, value, n)
    if method == "bootstrap" or (method == "auto" and n >= FEW):
        return bootstrap(vector, level=level, samples=samples, seed=seed)
    half = student_quantile(0.5 + level / 2, n - 1) * float(vector.std(ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def bootstrap(
    values: ArrayLike,
    statistic: Callable[[NDArray[Any]], float] | None = None,
    *,
    units: Sequence[Hashable] | None = None,
    crossed: Sequence[Sequence[Hashable]] | None = None,
    level: float = 0.95,
    method: Literal["bca", "percentile"] = "bca",
    samples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Bootstrap interval of any statistic.

    Args:
        values: shape (n, ...); rows are resampled.
        statistic: takes resampled rows, gives a number; None is the mean.
        units: for each row the independent unit it belongs to; units are then resampled whole.
        crossed: for each row its units of two or more crossed kinds, such as ``("array 3", "digit 7")``; each
            kind is resampled by itself, and a row counts as often as the product of its units' draws
            (Owen 2007, the pigeonhole bootstrap, which errs to the wide side). A row may name several units
            of one kind as a tuple (a pair of digits): it then counts by the product over them. The statistic
            is the mean, the method the percentile, ``n`` the number of units of the smallest kind.
        level: of confidence.
        method: ``"bca"`` corrects bias and skewness (n more evaluations), ``"percentile"`` does not.
        samples: resamples.
        seed: same seed, same interval.

    Raises:
        BadInput: no rows, values not finite, samples below 100, or the statistic gives NaN.

    Example:
        >>> spread = bootstrap([1.0, 2.0, 3.0, 4.0, 10.0], np.median)
        >>> spread.mean, 1.0 <= spread.low < spread.high <= 10.0
        (3.0, True)
        >>> values = [0.25 * array + digit for array in range(3) for digit in range(5)]
        >>> where = [(array, digit) for array in range(3) for digit in range(5)]
        >>> both, digits_alone = bootstrap(values, crossed=where), bootstrap(values)
        >>> both.n, both.high - both.low > digits_alone.high - digits_alone.low
        (3, True)
    """
    rows = np.asarray(values, dtype=np.float64)
    if rows.ndim == 0 or not len(rows) or not np.isfinite(rows).all():
        refuse("values", values, "give one or more finite rows")
    if samples < 100:
        refuse("samples", samples, "use 100 or more; 2000 is usual")
    _check_level(level)
    if crossed is not None:
        if statistic is not None or units is not None or rows.ndim != 1:
            refuse("crossed", "two kinds of units", "they go with the mean of single values and no units")
        return _crossed(rows, crossed, level, samples, seed)
    groups = _groups(len(rows), units)
    measure: Callable[[NDArray[Any]], float] = statistic if statistic is not None else np.mean  # type: ignore[assignment]
    estimate = float(measure(rows))
    n = len(groups)
    if n == 1:
        return Interval(estimate, -math.inf, math.inf, 1)
    draws = rng("report.bootstrap", seed).integers(n, size=(samples, n))
    if statistic is None and rows.ndim == 1 and units is None:
        drawn = rows[draws].mean(axis=1)
    else:
        drawn = np.array([float(measure(rows[np.concatenate([groups[i] for i in draw])])) for draw in draws])
    if np.isnan(drawn).any() or math.isnan(estimate):
        refuse("statistic", statistic, "gave NaN on a resample; use a statistic that every resample has")
    tails = np.array([0.5 - level / 2, 0.5 + level / 2])
    if method == "bca":
        tails = _bca(tails, rows, groups, measure, drawn, estimate)
    low, high = np.quantile(drawn, tails)
    return Interval(estimate, float(low), float(high), n)


def _crossed(
    rows: Array, crossed: Sequence[Sequence[Hashable]], level: float, samples: int, seed: int
) -> Interval:
    """The pigeonhole bootstrap of a mean: every kind of unit is drawn by itself."""
    kinds = len(crossed[0]) if len(crossed) else 0
    if len(crossed) != len(rows) or kinds < 2 or any(len(row) != kinds for row in crossed):
        refuse(
            "crossed", f"{len(crossed)} rows", f"give two or more units for each of the {len(rows)} values"
        )
    weights = np.ones((samples, len(rows)))
    counts = []
    for kind in range(kinds):
        named: list[tuple[Hashable, ...]] = [
            row[kind] if isinstance(row[kind], tuple) else (row[kind],)  # type: ignore[misc]
            for row in crossed
        ]
        known = {unit: place for place, unit in enumerate(dict.fromkeys(u for row in named for u in row))}
        counts.append(len(known))
        draws = rng("report.bootstrap", seed, kind).integers(len(known), size=(samples, len(known)))
        drawn = np.stack([(draws == place).sum(axis=1) for place in range(len(known))], axis=1)
        for place, row in enumerate(named):
            for unit in row:
                weights[:, place] *= drawn[:, known[unit]]
    estimate = float(rows.mean())
    if min(counts) == 1:
        return Interval(estimate, -math.inf, math.inf, 1)
    total = weights.sum(axis=1)
    means = (weights[total > 0] @ rows) / total[total > 0]
    low, high = np.quantile(means, [0.5 - level / 2, 0.5 + level / 2])
    return Interval(estimate, float(low), float(high), min(counts))


def wilson(k: int, n: int, *, level: float = 0.95) -> Interval:
    """Wilson's score interval of a share: ``k`` of ``n`` independent trials.

    Never leaves [0, 1], and has a width at 0 of n too, where the textbook interval claims certainty.

    Raises:
        BadInput: not 0 <= k <= n with n >= 1.

    Example:
        >>> share = wilson(0, 10)
        >>> share.mean, share.low, round(share.high, 4)
        (0.0, 0.0, 0.2775)
    """
    if not 0 <= k <= n or n < 1:
        refuse("k, n", (k, n), "give 0 <= k <= n and n >= 1")
    _check_level(level)
    z2 = NormalDist().inv_cdf(0.5 + level / 2) ** 2
    share = k / n
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2) / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return Interval(
        share, 0.0 if k == 0 else max(0.0, middle - half), 1.0 if k == n else min(1.0, middle + half), n
    )


def student_quantile(p: float, df: int) -> float:
    """Quantile of Student's t for whole degrees of freedom.

    The distribution function is the finite sum of Abramowitz and Stegun 26.7.3-4, inverted by bisection.

    Example:
        >>> round(student_quantile(0.975, 4), 4), round(student_quantile(0.975, 1), 3)
        (2.7764, 12.706)
    """
    if not 0 < p < 1 or df < 1:
        refuse("p, df", (p, df), "give 0 < p < 1 and 1 or more degrees of freedom")
    if p < 0.5:
        return -student_quantile(1 - p, df)
    low, high = 0.0, 1.0
    while _student_cdf(high, df) < p and high < 1e12:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if _student_cdf(middle, df) < p else (low, middle)
    return (low + high) / 2


def _student_cdf(t: float, df: int) -> float:
    angle = math.atan2(t, math.sqrt(df))
    sine, cosine = math.sin(angle), math.cos(angle)
    if df % 2:
        term, total = cosine, 0.0
        for k in range(1, df - 1, 2):
            total += term
            term *= cosine * cosine * (k + 1) / (k + 2)
        inside = 2 / math.pi * (angle + sine * total)
    else:
        term, total = 1.0, 0.0
        for k in range(0, df - 1, 2):
            total += term
            term *= cosine * cosine * (k + 1) / (k + 2)
        inside = sine * total
    return 0.5 + inside / 2


def _bca(
    tails: Array,
    rows: NDArray[Any],
    groups: list[NDArray[np.intp]],
    measure: Callable[[NDArray[Any]], float],
    drawn: Array,
    estimate: float,
) -> Array:
    """Quantiles of the resamples that BCa takes in place of the plain tails."""
    normal = NormalDist()
    below = ((drawn < estimate).mean() + (drawn <= estimate).mean()) / 2
    if not 0 < below < 1:
        return tails
    bias = normal.inv_cdf(float(below))
    left_out = np.array(
        [
            float(measure(rows[np.concatenate([g for j, g in enumerate(groups) if j != i])]))
            for i in range(len(groups))
        ]
    )
    gaps = left_out.mean() - left_out
    spread = float((gaps**2).sum())
    acceleration = float((gaps**3).sum()) / (6 * spread**1.5) if spread > 0 else 0.0
    shifted = []
    for tail in tails:
        z = bias + normal.inv_cdf(float(tail))
        shifted.append(normal.cdf(bias + z / (1 - acceleration * z)))
    return np.array(shifted)


def _groups(n: int, units: Sequence[Hashable] | None) -> list[NDArray[np.intp]]:
    if units is None:
        return [np.array([i]) for i in range(n)]
    if len(units) != n:
        refuse("units", f"{len(units)} labels", f"give one for each of the {n} values")
    places: dict[Hashable, list[int]] = {}
    for place, unit in enumerate(units):
        places.setdefault(unit, []).append(place)
    return [np.array(place) for place in places.values()]


def _unit_means(vector: Array, units: Sequence[Hashable] | None) -> Array:
    if units is None:
        return vector
    return np.array([vector[group].mean() for group in _groups(vector.size, units)])


def _vector(name: str, values: ArrayLike) -> Array:
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1 or not vector.size or not np.isfinite(vector).all():
        refuse(name, values, "give one or more finite numbers, shape (n,)")
    return vector


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        refuse("level", level, "give a share such as 0.95")
