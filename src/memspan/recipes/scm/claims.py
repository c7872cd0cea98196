"""What the figures are held to."""

from __future__ import annotations

from typing import Any

import numpy as np

from memspan.recipes.engine import Measurements
from memspan.report import claim
from memspan.report.schema import Claim
from memspan.report.stats import Interval, bootstrap, paired_difference, wilson

from .measure import IN_TIME, OURS, PAPER, SIMILAR, WINDOW, Options


def judge(found: Measurements, options: Options) -> list[Claim]:
    """Claims A and B on coverage, the gate, and the metric's check on the paper's own answers."""
    rows = found.where(part="coverage", language="English")
    claims = []
    budget = max(options.budgets)

    def row(method: str, at: int) -> Any:
        return rows.one(method=method, tokens=at)

    if rows:
        ours, window = row(OURS, budget), row(WINDOW, budget)
        for name, flag in (("several turns", 1.0), ("one turn", 0.0)):
            mask = np.array(ours.series["multi"]) == flag
            if mask.sum() < 2:
                continue
            pairs = np.stack([ours.series["coverage"], window.series["coverage"]], axis=1)[mask]
            ratio = bootstrap(pairs, lambda r: float(r[:, 0].mean() / max(r[:, 1].mean(), 1e-3)))
            text = f"activation memory covers at least twice what the last window does (questions on {name})"
            claims.append(claim(text, f"{PAPER}, table 2", ratio, ">= 2", "x"))
        for at in options.budgets:
            rival = max((SIMILAR, IN_TIME), key=lambda m: row(m, at).quality["coverage"])
            gain = paired_difference(row(OURS, at).series["coverage"], row(rival, at).series["coverage"])
            text = f"the policy covers at least what naive top-k retrieval does, at {at} tokens"
            claims.append(claim(text, f"{PAPER}, table 3", gain.scaled(100), ">= 0", "points"))
    for gate in found.where(part="gate"):
        yes = gate.series["yes"]
        span = wilson(sum(p >= 0.5 for p in yes), len(yes))
        claims.append(
            claim(
                "the gate lets through most messages that need memory", f"{PAPER}, section 3.1", span, "> 0.5"
            )
        )
    for system, wanted in (("scm_davinci_answer", 0.7558), ("scm_turbo_answer", 0.5111)):
        for one in found.where(method=system):
            value = one.quality["answer_f1"]
            text = f"the answer metric gives the paper's own {system.split('_')[1]} answers their known score"
            span = Interval(value, value, value, 2)
            claims.append(
                claim(text, "check of the metric", span, f"in [{wanted - 5e-4}, {wanted + 5e-4}]", exact=True)
            )
    novel_rows = found.where(part="novel")
    if len(novel_rows) == 4:
        a, b = (novel_rows.one(method=m).series["facts"] for m in ("map-reduce, background", "truncate"))
        text = "more planted facts survive divide and conquer than truncation (sentences are picked)"
        claims.append(
            claim(
                text,
                f"{PAPER}, section 4.3",
                paired_difference(a, b).scaled(100),
                "> 0",
                "points",
                expected=False,
                why="sentences are picked for likeness to the whole, planted facts are unlike it",
            )
        )
    return claims
