"""What the figures are held to, and where hashing pays."""

from __future__ import annotations

import numpy as np

from memspan.recipes.engine import Measurements
from memspan.report import claim
from memspan.report.figures import Figure, Lines, Series
from memspan.report.schema import Claim
from memspan.report.stats import Interval, bootstrap, mean_interval, paired_difference

from .measure import BUCKETS, METHODS, PAPER, PARAPHRASES, SIZES, Options


def judge(found: Measurements, options: Options) -> list[Claim]:
    """The form of the memory, agreement between wordings, and what hashing buys."""
    claims = []
    low = min(options.budgets)
    rows = found.where(part="form", tokens=low)
    ratio = None
    if rows:
        a, b = (rows.one(method=name).series for name in ("thoughts alone", "turns"))
        pairs = np.stack([a["per_token"], b["per_token"]], axis=1)
        units = [int(u) for u in a["unit"]]
        ratio = bootstrap(pairs, lambda r: float(r[:, 0].mean() / max(r[:, 1].mean(), 1e-6)), units=units)
    text = (
        f"a token of thoughts covers at least 1.5 times the answer words of a token of turns, at {low} tokens"
    )
    why = ""
    if rows and ratio is not None and ratio.high < 1.5:
        had = rows.one(method="turns").quality["coverage"]
        why = f"turns hold {had:.0%} of these words in a prompt this long: at best {1 / had:.2g} times can be"
        why += "; a fact keeps the point of a turn and few of its words"
    claims.append(claim(text, f"{PAPER}, table 4", ratio, ">= 1.5", "x", why=why))
    gain = None
    if rows:
        a, b = (rows.one(method=name).series for name in ("TiM", "turns"))
        gain = paired_difference(a["evidence"], b["evidence"], [int(u) for u in a["unit"]]).scaled(100)
    text = f"thoughts and turns in one ranking find no less of the evidence than turns alone, at {low} tokens"
    claims.append(claim(text, "not in the paper", gain, ">= -2", "points"))
    for language in PARAPHRASES:
        same = found.where(part="consistency", language=language)
        if not same:
            continue
        a, b = (same.one(method=name).series for name in ("TiM", "turns"))
        gap = paired_difference(a["agreement"], b["agreement"], [int(u) for u in a["unit"]])
        text = (
            f"five {language} wordings of a question find the same turns by thoughts at least as often"
            " as without them"
        )
        claims.append(claim(text, f"{PAPER}, section 1", gap, ">= 0"))
    for buckets in BUCKETS[1:]:
        for row in found.where(method="one bucket", buckets=buckets):
            text = f"one bucket, as in the paper, misses over half of the true neighbours ({buckets} buckets)"
            claims.append(claim(text, f"{PAPER}, section 3.2", mean_interval(row.series["recall"]), "< 0.5"))
    timed_rows = sorted(found.where(part="time"), key=lambda row: int(row.setting["n"]))
    for row in {int(r.setting["n"]): r for r in (timed_rows[:1] + timed_rows[-1:])}.values():
        n = int(row.setting["n"])
        why = "exact search over so few vectors takes less than computing a hash" if n == SIZES[0] else ""
        text = f"hashing at recall .9 is faster than exact search at {n:,} vectors"
        span = bootstrap(row.series["hash over exact"], np.median)
        claims.append(claim(text, f"{PAPER}, table 6", span, "< 1", "x", expected=not why, why=why))
    for row in timed_rows[-1:]:
        if "hash over usearch" in row.series:
            span = bootstrap(row.series["hash over usearch"], np.median)
            text = f"hashing at recall .9 is faster than usearch's graph at {int(row.setting['n']):,} vectors"
            why = "a graph compares a small part of what the buckets hold"
            claims.append(claim(text, "not in the paper", span, "< 1", "x", expected=False, why=why))
    for row in found.where(method="TiM", part="tidy"):
        kept = row.quality["latest kept"]
        text = "of facts that change again and again the latest value is held, and no other"
        claims.append(
            claim(text, f"{PAPER}, section 3.3", Interval(kept, kept, kept, 2), ">= 0.99", exact=True)
        )
    return claims


def figures(found: Measurements, options: Options) -> list[Figure]:
    """Where hashing pays, and what the form of the memory covers for its tokens."""
    shown: list[Figure] = []
    rows = sorted(found.where(part="time"), key=lambda row: int(row.setting["n"]))
    curves = {}
    for name in ("hash", "exact", "usearch"):
        points = [(float(r.setting["n"]), r.quality[f"{name} ms"]) for r in rows if f"{name} ms" in r.quality]
        if points:
            curves[name] = Series([n for n, _ in points], [ms for _, ms in points])
    if curves:
        title = "Time of a query at recall@10 of .9, by number of vectors"
        shown.append(Lines(title, "vectors", "milliseconds", curves, x_scale="log"))
    forms = {}
    for name in METHODS:
        held = sorted(found.where(part="form", method=name), key=lambda row: int(row.setting["tokens"]))
        if held:
            forms[name] = Series([r.quality["tokens"] for r in held], [r.quality["evidence"] for r in held])
    if forms:
        shown.append(Lines("Evidence found, by tokens of the prompt", "tokens", "share of evidence", forms))
    return shown
