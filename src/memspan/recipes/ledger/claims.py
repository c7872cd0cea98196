"""Whether prediction, ledger and allocator agree on every step, and how far rules of thumb are off."""

from __future__ import annotations

import math

from memspan.ledger import rules_of_thumb
from memspan.recipes.engine import Measurements
from memspan.report import claim
from memspan.report.figures import Bars, Figure
from memspan.report.schema import Claim
from memspan.report.stats import Interval

from .measure import Options

PAPER = "none: a promise of the ledger"


def judge(found: Measurements, options: Options) -> list[Claim]:
    """The claims over all models and methods measured; an interval is the range over them."""
    claims = [
        _within("predicted and counted bytes agree exactly", found, "error to ledger", 0.0),
        _within("counted within 0.1 % of the allocator", found, "counted, error to allocator", 0.001),
        _within("predicted within 1 % of the allocator, every model", found, "error to allocator", 0.01),
    ]
    for rule in rules_of_thumb(1):
        worst = [math.exp(abs(math.log(v))) for v in found.values(f"{rule}, over allocated")]
        top = Interval(max(worst), max(worst), max(worst), len(worst))
        claims.append(claim(f"{rule} is off by more than 2 x somewhere", PAPER, top, "> 2", "x", exact=True))
    return claims


def figures(found: Measurements, options: Options) -> list[Figure]:
    """Who holds the peak, by model, and how far each estimate is from the allocator."""
    shown = []
    for name in found.settings("model"):
        rows = {one.method: dict(one.bytes) for one in found.where(model=name) if one.seed == found.seeds[0]}
        shown.append(Bars(f"{name}: who holds the peak of a training step", "bytes", rows))
    return list(shown)


def _within(text: str, found: Measurements, metric: str, most: float) -> Claim:
    """The worst unit decides: bytes are counted, so there is no sampling error; the interval is the range."""
    errors = [100 * value for value in found.values(metric)]
    span = Interval(max(errors, key=abs), min(errors), max(errors), len(errors)) if errors else None
    holds = f"in [{-100 * most:g}, {100 * most:g}]"
    return claim(text, PAPER, span, holds, "%", exact=True)
