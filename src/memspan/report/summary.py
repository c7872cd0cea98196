"""One result condensed: a row for each method and setting, with means over seeds and their spread.

The terminal, the page and the collated documents all say what this module says.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from memspan.report.schema import Measurement, Result
from memspan.report.stats import Interval, mean_interval
from memspan.report.units import human_bytes, number

__all__ = ["Group", "byte_heads", "metric_label", "mode_label", "sentence", "summarize", "tally"]


class Group(NamedTuple):
    """All measurements of one method in one setting.

    Attributes:
        method: its name.
        setting: what tells it from others, as text; what all measurements share is left out.
        quality: metric -> interval over seeds.
        bytes: category -> mean bytes held.
        seconds: mean seconds in all.
        trained: mean of the numbers that a row trained, None where not told.
        flops: mean operations, None where not counted.
        seeds: the seeds behind it.
    """

    method: str
    setting: str
    quality: dict[str, Interval]
    bytes: dict[str, float]
    seconds: float
    trained: float | None
    flops: float | None
    seeds: tuple[int, ...]

    @property
    def total(self) -> float:
        """Bytes held in all."""
        return math.fsum(self.bytes.values())

    def heads(self) -> dict[str, float]:
        """Bytes by category, parts (``replay.exemplars``) added to their head."""
        sums: dict[str, float] = {}
        for name, count in self.bytes.items():
            head = name.split(".")[0]
            sums[head] = sums.get(head, 0.0) + count
        return sums

    def show(self, metric: str) -> str:
        """A metric with half the width of its interval, where there is one."""
        if metric not in self.quality:
            return "–"
        span = self.quality[metric]
        half = (span.high - span.low) / 2
        spread = math.isfinite(half) and half > 0
        if metric.endswith("bytes"):
            return human_bytes(span.mean) + (f" ± {human_bytes(half)}" if spread else "")
        if not spread or not 1e-9 < half < 1e9:
            return number(span.mean)
        # No more digits than the spread allows: two of its own.
        digits = max(0, 1 - math.floor(math.log10(half)))
        return f"{span.mean:,.{digits}f} ± {half:,.{digits}f}"


def summarize(result: Result) -> list[Group]:
    """Condense a result, in the order in which methods and settings first appear.

    Example:
        >>> rows = [Measurement(method="A", seed=s, quality={"acc": a}, bytes={"w": 4}, seconds={"train": 1})
        ...         for s, a in ((0, 0.5), (1, 0.7))]
        >>> result = Result(recipe="r", mode="quick", config={}, environment={}, data=[], claims=[],
        ...     measurements=rows)
        >>> group, = summarize(result)
        >>> group.method, round(group.quality["acc"].mean, 6), group.total, group.seeds
        ('A', 0.6, 4.0, (0, 1))
    """
    settings = [one.setting for one in result.measurements]
    varying = [
        key
        for key in dict.fromkeys(key for setting in settings for key in setting)
        if len({repr(setting.get(key)) for setting in settings}) > 1
    ]
    cells: dict[tuple[str, str], list[Measurement]] = {}
    for one in result.measurements:
        label = " · ".join(_setting(key, one.setting[key]) for key in varying if key in one.setting)
        cells.setdefault((one.method, label), []).append(one)
    groups = []
    for (method, label), members in cells.items():
        metrics = dict.fromkeys(name for one in members for name in one.quality)
        categories = dict.fromkeys(name for one in members for name in one.bytes)
        trained = [one.trained for one in members if one.trained is not None]
        flops = [one.flops for one in members if one.flops is not None]
        groups.append(
            Group(
                method,
                label,
                {
                    name: mean_interval([one.quality[name] for one in members if name in one.quality])
                    for name in metrics
                },
                {name: _mean(one.bytes.get(name, 0) for one in members) for name in categories},
                _mean(math.fsum(one.seconds.values()) for one in members),
                _mean(trained) if trained else None,
                _mean(flops) if flops else None,
                tuple(dict.fromkeys(one.seed for one in members)),
            )
        )
    return groups


def byte_heads(groups: Sequence[Group]) -> list[str]:
    """Categories that any group holds bytes in, largest first."""
    sums: dict[str, float] = {}
    for group in groups:
        for name, count in group.heads().items():
            sums[name] = sums.get(name, 0.0) + count
    return [name for name, count in sorted(sums.items(), key=lambda item: -item[1]) if count]


def tally(results: Iterable[Result]) -> dict[str, int]:
    """How many claims hold, do not, and are open.

    ``"known"`` counts failures that were expected, ``"later"`` claims whose least size is above this run's.

    Example:
        >>> tally([])
        {'holds': 0, 'fails': 0, 'open': 0, 'known': 0, 'later': 0}
    """
    counts = {"holds": 0, "fails": 0, "open": 0, "known": 0, "later": 0}
    for result in results:
        for claim in result.claims:
            if claim.holds is None:
                counts["later" if claim.needs else "open"] += 1
            elif claim.holds:
                counts["holds"] += 1
            else:
                counts["known" if not claim.expected else "fails"] += 1
    return counts


def sentence(result: Result) -> str:
    """What came out, in one sentence.

    Example:
        >>> sentence(Result(recipe="r", mode="quick", config={}, environment={}, data=[], measurements=[],
        ...     claims=[]))
        'This run makes no claims.'
    """
    counts = tally([result])
    total = len(result.claims)
    if not total:
        return "This run makes no claims."
    if counts["holds"] == total:
        return "The claim holds in this run." if total == 1 else f"All {total} claims hold in this run."
    parts = [f"{counts['holds']} of {total} claims {'holds' if counts['holds'] == 1 else 'hold'}"]
    if counts["fails"]:
        parts.append(f"{counts['fails']} {'does' if counts['fails'] == 1 else 'do'} not")
    if counts["known"]:
        parts.append(f"{counts['known']} {'fails' if counts['known'] == 1 else 'fail'} as expected")
    if counts["open"]:
        parts.append(f"{counts['open']} {'is' if counts['open'] == 1 else 'are'} not decided at this size")
    if counts["later"]:
        parts.append(f"{counts['later']} {'needs' if counts['later'] == 1 else 'need'} a larger run")
    return (", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else parts[0]) + "."


def mode_label(result: Result) -> str:
    """The mode of a run, a custom one with the options that make it so.

    Example:
        >>> mode_label(Result(recipe="r", mode="custom", changed={"full": True, "steps": 60}, config={},
        ...     environment={}, data=[], measurements=[], claims=[]))
        'custom: --full --steps 60'
    """
    told = []
    for name, value in result.changed.items():
        flag = f"--{name.replace('_', '-')}"
        items = value if isinstance(value, list) else [value]
        told.append(flag if value is True else f"{flag} {','.join(map(str, items))}")
    return f"{result.mode}: {' '.join(told)}" if told else result.mode


def metric_label(name: str) -> str:
    """A metric's name for people.

    Example:
        >>> metric_label("average_accuracy")
        'average accuracy'
    """
    return name.replace("_", " ")


def _setting(key: str, value: str | int | float) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool) and ("byte" in key or "budget" in key):
        return human_bytes(value)
    if isinstance(value, str):
        return value
    return f"{key.replace('_', ' ')} {number(value)}"


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return math.fsum(listed) / len(listed)
