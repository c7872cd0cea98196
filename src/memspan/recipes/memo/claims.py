"""The paper's claims, paired over class orders, those on bytes in every run; and accuracy against bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from memspan.continual import nets
from memspan.continual.budget import aligned_budget, aligned_exemplars, model_bytes
from memspan.recipes.engine import Measurements
from memspan.report import Frontier, claim, gain
from memspan.report.figures import Figure, Lines, Series
from memspan.report.schema import Claim, Measurement
from memspan.report.stats import Interval, mean_interval

from .measure import BOUNDS, ONE_NETWORK, Options

Points = dict[str, list[tuple[float, float]]]
CIL = "A Model or 603 Exemplars, ICLR 2023"
ORDERS = 3  # class orders at which a claim on accuracy is tested


def judge(found: Measurements, options: Options) -> list[Claim]:
    """Bytes are counted and judged in any run; accuracy needs class orders. Areas: budgets that all fit."""
    least = {"class orders": (len(found.seeds), ORDERS)}
    layers = [row for row in found.where(method="Replay") if "cka.stage1" in row.series]
    # One unit a class order: the tasks and budgets of one order are not independent.
    gaps = [
        float(np.mean([np.subtract(row.series["cka.stage1"], row.series["cka.stage3"]) for row in rows]))
        for rows in ([row for row in layers if row.seed == seed] for seed in found.seeds)
        if rows
    ]
    alike = "shallow layers stay more alike from task to task than deep ones (linear CKA)"
    similar = mean_interval(gaps) if gaps else None
    steps = found.where(table="equal steps")
    return [
        *bytes_claims(found),
        *(one for align in ("final", "always") for one in budget_claims(steps, align, least)),
        claim(alike, f"{CIL}, section 4", similar, "> 0", "CKA", least=least),
    ]


def bytes_claims(found: Measurements) -> list[Claim]:
    """What is counted, not sampled."""
    network, image = sum(p.numel() for p in nets.build("resnet32").parameters()), (32, 32, 3)
    images = aligned_exemplars(model_bytes(network), 0, image)
    ten = aligned_budget(10 * network, 2000, image)
    paid = [row for row in found if "budget" in row.setting and row.method != "frozen features"]
    held = [max(row.series["bytes"]) / float(row.setting["budget"]) for row in paid]
    pairs = [
        (_network(one), _network(two))
        for one in found.where(method="MEMO", table="equal steps")
        for two in found.where(method="expandable", table="equal steps", seed=one.seed)
        if one.setting == two.setting
    ]
    share = max((ours / whole for ours, whole in pairs), default=None)
    return [
        claim("a ResNet-32 takes the bytes of 603 CIFAR images", CIL, _exactly(images), "in [603, 603]",
              "images", exact=True),
        claim("ten of them beside 2,000 images hold what one holds beside 7,431", f"{CIL}, section 3.1",
              _exactly(aligned_exemplars(ten, network, image)), "in [7431, 7431]", "images", exact=True),
        claim("every method keeps within its budget, after every task", "memspan",
              _exactly(max(held)) if held else None, "<= 1", "of the budget", exact=True),
        claim("MEMO's networks take fewer bytes than whole ones", f"{CIL}, section 4",
              None if share is None else _exactly(share), "< 1", "x", exact=True),
    ]  # fmt: skip


def budget_claims(found: Measurements, align: str, least: Mapping[str, tuple[int, int]]) -> list[Claim]:
    """Claims 1 to 4 with one alignment of budgets, and JPEG exemplars as a rival."""
    budgets = sorted(int(b) for b in found.where(method="expandable", align=align).settings("budget"))
    end = "" if align == "final" else " (exemplars aligned at every task)"

    def rows(name: str) -> list[Measurement]:
        """At the budgets that whole networks fit; a method that never grows ran with one alignment alone."""
        listed = found.where(method=name)
        return [row for row in listed.where(align=align) or listed if row.setting["budget"] in budgets]

    def area(side: Sequence[Measurement]) -> float:
        pairs = [(float(row.setting["budget"]), row.quality["average_accuracy"]) for row in side]
        return Frontier({"": pairs}).area(normalize=True)[""]

    def at(name: str, budget: int) -> list[Measurement]:
        return [row for row in rows(name) if row.setting["budget"] == budget]

    def judged(text: str, where: str, span: Interval | None, holds_if: str, why: str = "") -> Claim:
        return claim(
            text + end, f"{CIL}, {where}", span, holds_if, "points", expected=not why, why=why, least=least
        )

    few = "a block costs a good part of all images here, and a task has few steps"
    rivals = [name for name in ONE_NETWORK if name in found.methods]
    wide = len(budgets) > 1
    ours, whole, images = rows("MEMO"), rows("expandable"), [rows(name) for name in rivals]
    metric = "average_accuracy"
    leads = [
        gain(at("expandable", b), *(at(name, b) for name in rivals), metric=metric, scale=100)
        for b in budgets
    ]
    claims = [
        judged("MEMO's area under accuracy against bytes exceeds that of whole networks", "section 5",
               gain(ours, whole, metric=area, scale=100) if wide else None, "> 0"),
        judged("MEMO's area exceeds that of the best exemplar method", "section 5",
               gain(ours, *images, metric=area, scale=100) if wide else None, "> 0", few),
        judged("at the smallest budget that pays for them, whole networks lose to the best exemplar method",
               "section 3", leads[0] if leads else None, "< 0"),
        judged("at the largest budget the order flips", "section 3", leads[-1] if wide else None, "> 0", few),
    ]  # fmt: skip
    jpeg = rows("Replay, JPEG")
    if align == "final" and wide and len(jpeg) >= len(budgets):
        text = "MEMO's area exceeds that of replay with JPEG exemplars"
        open_ = "a rival that the paper has not: open"
        claims.append(
            judged(text, "not in the paper", gain(ours, jpeg, metric=area, scale=100), "> 0", open_)
        )
    return claims


def _network(row: Measurement) -> int:
    return sum(size for name, size in row.bytes.items() if name.startswith(("parameters", "buffers")))


def _exactly(value: float) -> Interval:
    return Interval(value, value, value, 1)


def figures(found: Measurements, options: Options) -> list[Figure]:
    """Accuracy against bytes and after each task, and layers between tasks; mean and range over orders."""
    rows = found.where(table="equal steps", align="final")
    budgets = sorted(int(b) for b in rows.settings("budget"))
    frontier: Points = {**rows.points("average_accuracy")}
    for name in BOUNDS:
        frontier[name] = [
            (b, y) for b in budgets for y in found.where(method=name).values("average_accuracy")
        ]
    last = [
        *(row for row in found if row.method in (*BOUNDS, "frozen features")),
        *rows.where(budget=budgets[-1]),
    ]
    after: Points = {}
    for row in last:
        after.setdefault(row.method, []).extend(enumerate(row.series["accuracy"], start=1))
    alike: Points = {}
    for row in rows.where(method="Replay"):
        for name in ("stage1", "stage2", "stage3"):
            alike.setdefault(name, []).extend(enumerate(row.series.get(f"cka.{name}", []), start=2))
    return [
        Lines("Average accuracy against bytes", "budget", "accuracy", spread(frontier), x_unit="bytes"),
        Lines("Accuracy on all classes so far, at the largest budget", "task", "accuracy", spread(after)),
        Lines("Replay's layers before and after a task", "task", "linear CKA", spread(alike)),
    ]  # fmt: skip


def spread(points: Points) -> dict[str, Series]:
    """Mean and range of y at every x."""
    out = {}
    for name, pairs in points.items():
        xs = sorted({x for x, _ in pairs})
        ys = [[y for at, y in pairs if at == x] for x in xs]
        if xs:
            out[name] = Series(
                xs, [float(np.mean(y)) for y in ys], [min(y) for y in ys], [max(y) for y in ys]
            )
    return out
