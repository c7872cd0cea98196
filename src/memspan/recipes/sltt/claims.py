"""The paper's claims over what was measured, and the pictures."""

from __future__ import annotations

from memspan.recipes.engine import Measurements
from memspan.report import claim, gain
from memspan.report.figures import Bars, Figure, Lines, Series
from memspan.report.schema import Claim
from memspan.report.stats import Interval, mean_interval

from .measure import JELLY, JELLY_SLTT, SNN, TAUS, Options

PAPER = "SLTT, ICCV 2023"
LEAK = "SLTT drops paths of weight decay^d over d steps, and here the decay is {:.2f}"


def judge(found: Measurements, options: Options) -> list[Claim]:
    """Bytes, time, accuracy by leak, and where SLTT fails by construction."""
    claims = []
    for T in options.steps:
        rows = found.where(part="bytes", T=T)
        value = rows.one(method="BPTT").quality["saved"] / rows.one(method="SLTT").quality["saved"] / T
        text = f"BPTT keeps T times the bytes of SLTT at T = {T} (share of T)"
        claims.append(claim(text, PAPER, Interval(value, value, value, 1), ">= 0.99", "x", exact=True))
    sizes = {one.quality["saved"] for one in found.where(part="bytes", method="SLTT")}
    spread = max(sizes) - min(sizes)
    text = f"what SLTT keeps is the same for T = {options.steps[0]} and {options.steps[-1]}"
    claims.append(claim(text, PAPER, Interval(spread, spread, spread, 1), "<= 0", "bytes", exact=True))
    fast, small = (found.where(part="time", network=name) for name in ("convolutional", "fully connected"))
    starts = "T small backward passes cost more to start than they save"
    claims += [
        timed("SLTT-1 takes at most 0.6 x BPTT's time, convolutional", fast, "SLTT-1", "BPTT", 0.6),
        timed("SLTT takes at most BPTT's time, convolutional", fast, "SLTT", "BPTT", 1.0),
        timed(
            "SLTT takes at most BPTT's time, small and fully connected", small, "SLTT", "BPTT", 1.0, starts
        ),
        timed("our BPTT is no slower than SpikingJelly's, single step", fast, "BPTT", JELLY, 1.0),
        timed("our BPTT is no slower than snnTorch's", fast, "BPTT", SNN, 1.0),
        timed("our SLTT is no slower than SpikingJelly's", fast, "SLTT", JELLY_SLTT, 1.0),
    ]
    claims.append(within("digits as still images, tau 1.1", found.where(part="images", tau=1.1)))
    for tau in TAUS:
        why = "" if tau == 1.1 else LEAK.format(1 - 1 / tau)
        claims.append(within(f"digits as events, tau {tau:g}", found.where(part="events", tau=tau), why))
    sound = found.where(part="sound", tau=20.0)
    claims.append(within("spoken digits, tau 20", sound, LEAK.format(0.95)))
    once = found.where(part="events", tau=2.0)
    span = paired(once, "SLTT-1, unbiased", "SLTT-1")
    text = "SLTT-1 with an unbiased loss is as accurate as with the published scale, or more"
    claims.append(claim(text, PAPER, span, ">= 0", "points"))
    memory = found.where(part="recall", T=10, tau=20.0)
    accuracy = {name: memory.where(method=name).values("accuracy") for name in ("BPTT", "SLTT")}
    text = "delayed recall: BPTT answers 0.9 or more"
    claims.append(claim(text, PAPER, mean_interval(accuracy["BPTT"]), ">= 0.9", "share"))
    text = "delayed recall: SLTT stays within 0.1 of chance, 0.25"
    claims.append(claim(text, PAPER, mean_interval(accuracy["SLTT"]), "in [0.15, 0.35]", "share"))
    worst = max(memory.where(method="SLTT").values("cue gradient"))
    text = "delayed recall: SLTT's gradient of the cue is exactly 0"
    claims.append(claim(text, PAPER, Interval(worst, worst, worst, 1), "in [0, 0]", "", exact=True))
    return claims


def timed(text: str, rows: Measurements, ours: str, rival: str, most: float, why: str = "") -> Claim:
    """A ratio of seconds taken in the same rounds."""
    pairs = [one.seconds[ours] / one.seconds[rival] for one in rows if rival in one.seconds]
    span = mean_interval(pairs) if pairs else None
    return claim(text, PAPER, span, f"<= {most}", "x", expected=not why, why=why)


def within(text: str, rows: Measurements, why: str = "") -> Claim:
    """SLTT against BPTT, paired by seed."""
    told = f"{text}: SLTT is less than a point below BPTT"
    return claim(told, PAPER, paired(rows, "SLTT", "BPTT"), "> -1", "points", expected=not why, why=why)


def paired(rows: Measurements, ours: str, rival: str) -> Interval | None:
    """Points of accuracy over the seeds that both have."""
    return gain(rows.where(method=ours), rows.where(method=rival), metric="accuracy", scale=100)


def figures(found: Measurements, options: Options) -> list[Figure]:
    """What is kept by length, and what is lost by leak."""
    kept = {}
    for name in ("BPTT", "SLTT"):
        rows = found.where(part="bytes", method=name)
        kept[name] = Series([one.setting["T"] for one in rows], rows.values("saved"))  # type: ignore[misc]
    shown: list[Figure] = [
        Lines("What the graph of a convolutional network keeps", "time steps", "bytes", kept, y_unit="bytes")
    ]
    spans = {tau: paired(found.where(part="events", tau=tau), "SLTT", "BPTT") for tau in TAUS}
    there = {1 - 1 / tau: span for tau, span in spans.items() if span is not None}
    means = [span.mean for span in there.values()]
    ends = ([span.low for span in there.values()], [span.high for span in there.values()])
    known = len(means) > 1 and all(abs(end) < 1e6 for side in ends for end in side)
    series = Series(list(there), means, *(ends if known else (None, None)))
    shown.append(
        Lines(
            "Accuracy of SLTT less that of BPTT, digits as events",
            "share of the potential that stays",
            "points",
            {"SLTT - BPTT": series},
        )
    )
    rows = found.where(part="events", tau=2.0)
    means_of = {
        name: {"accuracy": sum(v) / len(v)}
        for name in rows.methods
        if (v := rows.where(method=name).values("accuracy"))
    }
    shown.append(Bars("Digits as events, tau 2", "share of right answers", means_of))
    return shown
