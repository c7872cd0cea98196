"""What the figures are held to, and the picture of what a byte buys."""

from __future__ import annotations

import numpy as np

from memspan.recipes.engine import Measurements
from memspan.report import claim
from memspan.report.figures import Figure, Lines, Series
from memspan.report.schema import Claim
from memspan.report.stats import Interval, bootstrap, mean_interval, paired_difference, wilson

from .measure import KEEPERS, PAPER, Options


def judge(found: Measurements, options: Options) -> list[Claim]:
    """Retrieval by Wilson, ratios and differences by resampling users."""
    claims = []
    rows = found.where(method="memorybank", part="retrieval")
    hits = rows[0].series["hit@6"] if rows else []
    span = wilson(int(sum(hits)), len(hits)) if hits else None
    claims.append(
        claim(
            "recall finds an evidence turn among six for four questions in five",
            f"{PAPER}, table 2",
            span,
            ">= 0.8",
        )
    )
    context = found.where(part="context")
    ratio: Interval | None = None
    if len(context) == 4:
        ours, window = (context.one(method=name) for name in ("memorybank, k=6", "last 6 turns"))
        pairs = np.stack([ours.series["coverage"], window.series["coverage"]], axis=1)
        units = [int(u) for u in ours.series["unit"]]
        ratio = bootstrap(pairs, lambda r: float(r[:, 0].mean() / max(r[:, 1].mean(), 1e-3)), units=units)
    text = "six recalled turns hold more than twice as many of the answer's words as the last six turns"
    claims.append(claim(text, "not in the paper, which has no row without memory", ratio, "> 2", "x"))
    for rival in options.compare:
        other = found.where(method=rival, part="retrieval")
        if other and rows:
            a, b = rows[0].series, other[0].series
            gain = paired_difference(a["recall@10"], b["recall@10"], [int(u) for u in a["unit"]])
            why = (
                ""
                if rival in ("tim", "scm", "mem0")
                else "a strong baseline; the default weighs words above vectors"
            )
            text = f"recall@10 is above that of {rival}"
            told = claim(text, "not in the paper", gain.scaled(100), "> 0", "points",
                         expected=not why, why=why)  # fmt: skip
            claims.append(told)
    law = found.where(part="law")
    if law:
        share = law.one(days=1).quality["share"]
        text = "with a time scale of one day under 2 % of the paper's turns survive until it asks about them"
        claims.append(
            claim(text, f"{PAPER}, section 3.3", Interval(share, share, share, 2), "< 0.02", exact=True)
        )
    year_rows = found.where(part="year", share=0.25)
    for rival in ("FIFO", "random", "LRU"):
        gain_span = None
        if year_rows.where(method=rival):
            ours, other_row = year_rows.one(method="Ebbinghaus"), year_rows.one(method=rival)
            gain_span = mean_interval(np.subtract(ours.series["recall"], other_row.series["recall"])).scaled(
                100
            )
        text = f"at a quarter of the bytes, forgetting by retention keeps more asked-for facts than {rival}"
        claims.append(claim(text, f"{PAPER}, section 3.3", gain_span, "> 0", "points"))
    return claims


def figures(found: Measurements, options: Options) -> list[Figure]:
    """What a byte buys: asked-for facts still held against the share of bytes kept."""
    curves = {}
    for name in KEEPERS:
        rows = sorted(found.where(method=name, part="year"), key=lambda row: float(row.setting["share"]))
        if rows:
            curves[name] = Series(
                [float(r.setting["share"]) for r in rows], [r.quality["recall"] for r in rows]
            )
    if not curves:
        return []
    return [
        Lines(
            "Asked-for facts still held, in the last quarter of a year",
            "share of all bytes",
            "share of asks",
            curves,
        )
    ]
