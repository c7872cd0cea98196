"""A claim is decided by an interval, never by a point: the whole of it must agree, or nothing is decided."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

import numpy as np

from memspan.base import refuse
from memspan.report.schema import Claim
from memspan.report.stats import Interval
from memspan.report.units import number

__all__ = ["claim"]

ENOUGH = 5  # units without any spread that are believed
_NUMBER = r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)"


def claim(
    text: str,
    paper: str,
    interval: Interval | None,
    holds_if: str | Callable[[float], bool],
    unit: str = "",
    *,
    expected: bool = True,
    why: str = "",
    exact: bool = False,
    least: Mapping[str, tuple[float, float]] | None = None,
) -> Claim:
    """Build a claim of the result schema and decide it.

    ``holds`` is True when every value of the interval satisfies the condition, False when none does, and None
    (not decided at this size) otherwise, as with fewer than two independent units, or fewer than five that
    agree to the last digit: so few equal values say nothing about spread. Below its least size a claim is not
    judged at all.

    Args:
        text: the statement, for a reader who does not know the paper.
        paper: where it is made.
        interval: what was measured; None where this run measured nothing that bears on it.
        holds_if: ``"> 0"``, ``">= 0.99"``, ``"< 1"``, ``"<= 1"``, ``"in [0.99, 1.01]"``; or a function from a
            value to a bool, which is tried on 1,001 points of the interval.
        unit: of the measured value, such as ``"points"``, ``"bytes"``, ``"x"``.
        expected: False for a published claim known not to survive an honest protocol; needs ``why``.
        why: the reason; where a claim fails and none is given, the figures are.
        exact: the value has no sampling error (a count of bytes, a closed form), so that one unit decides.
        least: the size at which the claim is tested, by what is counted: ``{"steps": (this run's, needed)}``.

    Raises:
        BadInput: a condition that cannot be read, or ``expected=False`` without ``why``.

    Example:
        >>> claim("ours is ahead", "A paper, 2023", Interval(2.0, 0.5, 3.5, n=5), "> 0", "points").mark
        '✓'
        >>> claim("ours is ahead", "A paper, 2023", Interval(2.0, -0.5, 4.5, n=5), "> 0", "points").mark
        '?'
        >>> claim("ours is far ahead", "A paper, 2023", Interval(2.0, 0.5, 3.5, n=5), "> 9", "points").why
        'measured 2 points (0.5 to 3.5), which is not > 9'
        >>> gain = Interval(2.0, 0.5, 3.5, n=5)
        >>> small = claim("ours is ahead", "A paper, 2023", gain, "> 0", least={"steps": (60, 400)})
        >>> small.mark, small.needs
        ('–', '400 steps (60 here)')
    """
    if not expected and not why:
        refuse("why", why, "tell why this published claim is not expected to hold")
    _decide(Interval(0.0, 0.0, 0.0, 2), holds_if)  # a condition that cannot be read is always refused
    short = {name: sizes for name, sizes in (least or {}).items() if sizes[0] < sizes[1]}
    if short:
        needs = ", ".join(
            f"{number(most)} {name} ({number(here)} here)" for name, (here, most) in short.items()
        )
        return Claim(
            text=text,
            paper=paper,
            measured=None,
            unit=unit,
            expected=expected,
            holds=None,
            why=why,
            needs=needs,
        )
    if interval is None:
        return Claim(
            text=text, paper=paper, measured=None, unit=unit, expected=expected, holds=None,
            why=why or "this run measured nothing that bears on it",
        )  # fmt: skip
    span = Interval(interval.mean, interval.mean, interval.mean, interval.n) if exact else interval
    known = interval.n >= 2 and (interval.low < interval.high or interval.n >= ENOUGH)
    holds = _decide(span, holds_if) if exact or known else None
    finite = math.isfinite(interval.low) and math.isfinite(interval.high)
    if holds is None and not why:
        why = (
            f"{interval.n} independent unit says nothing about spread"
            if interval.n < 2
            else f"{interval.n} equal units say nothing about spread"
            if interval.low == interval.high and interval.n < ENOUGH
            else "the interval reaches across the threshold"
        )
    if holds is False and not why:
        spread = f" ({number(interval.low)} to {number(interval.high)})" if finite and not exact else ""
        shown = holds_if if isinstance(holds_if, str) else "what the claim asks"
        why = f"measured {number(interval.mean)}{' ' + unit if unit else ''}{spread}, which is not {shown}"
    return Claim(
        text=text, paper=paper, measured=interval.mean, unit=unit, expected=expected, holds=holds, why=why,
        low=interval.low if finite else None, high=interval.high if finite else None,
    )  # fmt: skip


def _decide(span: Interval, holds_if: str | Callable[[float], bool]) -> bool | None:
    if callable(holds_if):
        if not (math.isfinite(span.low) and math.isfinite(span.high)):
            return None
        values = {*np.linspace(span.low, span.high, 1001).tolist(), span.mean}
        answers = {bool(holds_if(value)) for value in values}
        return answers.pop() if len(answers) == 1 else None
    one = re.fullmatch(rf"\s*(>=|<=|>|<)\s*{_NUMBER}\s*", holds_if)
    if one:
        sign, bound = one[1], float(one[2])
        tests: dict[str, Callable[[float], bool]] = {
            ">": lambda v: v > bound, ">=": lambda v: v >= bound,
            "<": lambda v: v < bound, "<=": lambda v: v <= bound,
        }  # fmt: skip
        test = tests[sign]
        ends = {test(span.low), test(span.high)}
        return ends.pop() if len(ends) == 1 else None
    two = re.fullmatch(rf"\s*in\s*\[\s*{_NUMBER}\s*,\s*{_NUMBER}\s*\]\s*", holds_if)
    if not two or float(two[1]) > float(two[2]):
        refuse(
            "holds_if",
            holds_if,
            'write "> 0", ">= 0", "< 1", "<= 1" or "in [0.99, 1.01]", or give a function',
        )
    low, high = float(two[1]), float(two[2])
    if low <= span.low and span.high <= high:
        return True
    return False if span.high < low or span.low > high else None
