"""PEQA against tuning first and quantizing later: what do a few scales buy at 4, 3 and 2 bits?

A small language model, trained on Wikipedia, is tuned to Shakespeare: whole, by LoRA (then quantized, or
over a quantized base), and by its quantization scales alone. ``--full`` adds an encoder with four tasks.
"""

from __future__ import annotations

import copy
import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from memspan.ledger import memory_bytes
from memspan.recipes._peqa_language import (
    Bench,
    Models,
    Shape,
    make_bench,
    with_lora,
    with_naive_peqa,
    with_qlora,
)
from memspan.recipes._peqa_sentiment import sentiment, sentiment_claims
from memspan.recipes.engine import Cell, Measurements, Outcome, Recipe, Task, option
from memspan.report import claim
from memspan.report.figures import Bars, Figure, Lines, Series
from memspan.report.schema import Claim
from memspan.report.stats import Interval, mean_interval
from memspan.training import peqa


@dataclass(frozen=True)
class Options:
    """What a run can change."""

    tracks: Literal["language", "sentiment", "both"] = option("language", "what is tuned")
    bits: tuple[int, ...] = option((4, 3, 2), "widths", unit="bits", minimum=2, maximum=8)
    steps: int = option(30, "tuning steps, equal for all methods", unit="steps", minimum=2)
    vocabulary: int = option(2000, "its byte pairs", unit="tokens", minimum=256)
    pretrain: int = option(800, "steps of the small model's own training, once", unit="steps", minimum=1)
    width: int = option(192, "of the small model", minimum=32)
    depth: int = option(4, "its blocks", minimum=1)
    length: int = option(128, "of its sequences", unit="tokens", minimum=8)
    test: int = option(8_000, "held-out text", unit="bytes", minimum=200)
    most_tokens: int = option(2048, "largest step whose peak is measured", unit="tokens", minimum=256)
    rivals: Literal["few", "all"] = option("few", "all: groups of 64, PEQA from OPTQ, QLoRA at every width")


PAPER = "Memory-Efficient Fine-Tuning of Compressed LLMs via sub-4-bit Integer Quantization, NeurIPS 2023"
PLAIN: dict[str, Any] = {"groups": "channel", "init": "rtn"}
MEMORY: dict[str, Callable[[Bench], nn.Module]] = {
    "full fine-tuning": lambda bench: bench.fresh(),
    "PEQA": lambda bench: peqa.quantize_(bench.fresh(), 4, init="minmax"),
    "LoRA": with_lora,
    "QLoRA-like": lambda bench: with_qlora(bench, 4, init="minmax"),
    "PEQA by plain autograd": with_naive_peqa,
}


def run(task: Task[Options]) -> None:
    """Quality at equal steps, bytes by tokens a step, the price of a switch; then the second track."""
    o = task.options
    if o.tracks != "language":
        sentiment(task, o.bits, o.steps)
    if o.tracks == "sentiment":
        return
    shape = Shape(
        o.width, o.depth, o.length, o.pretrain, o.steps, max(1, 256 // o.length), o.test, o.vocabulary
    )
    bench = make_bench(shape, task.use, task.device)
    for seed in task.seeds:
        quality(task, bench, Models(bench, seed))
    for tokens in [256 * 2**i for i in range(20) if 256 * 2**i <= o.most_tokens]:
        for name, make in MEMORY.items() if tokens == 256 else list(MEMORY.items())[:2]:
            work = functools.partial(peak, bench=bench, make=make, tokens=tokens)
            setting = {"part": "memory", "tokens": tokens}
            task.measure(method=name, seed=task.seeds[0], setting=setting, work=work)
    for seed in task.seeds:
        work = functools.partial(switch, bench=bench)
        task.measure(method="PEQA", seed=seed, setting={"part": "switch"}, work=work)
    task.note("At a seed all methods see the same sequences in the same order.")
    task.note(
        "Full fine-tuning, then quantized, is no rival of the paper: it needs all the memory PEQA saves."
    )
    task.note("QLoRA-like: LoRA over our own integer grid, not over 4-bit normal floats.")


def quality(task: Task[Options], bench: Bench, models: Models) -> None:
    """Every method at one seed."""

    def measure(method: str, make: Callable[[], nn.Module], key: str = "", **setting: str | int) -> None:
        work = functools.partial(evaluate, bench=bench, make=make, models=models, key=key)
        task.measure(method=method, seed=models.seed, setting=setting, work=work)

    measure("full precision, untuned", bench.fresh)
    measure("full fine-tuning", models.full, "full")
    measure("LoRA", models.lora, "lora")
    ways = [("channel", "rtn"), ("channel", "optq"), ("64", "rtn"), ("64", "optq")]
    for bits in task.options.bits:
        for groups, init in ways[:2]:
            told: dict[str, Any] = {"bits": bits, "groups": groups, "init": init}
            measure("quantized, untuned", functools.partial(models.quantized, bits, groups, init), **told)
            late = functools.partial(
                lambda b, g, i: models.quantized(b, g, i, models.lora()), bits, groups, init
            )
            measure("LoRA, then quantized", late, **told)
        whole = functools.partial(lambda b: models.quantized(b, model=copy.deepcopy(models.full())), bits)
        measure("full fine-tuning, then quantized", whole, bits=bits, **PLAIN)
        for groups, init in ways if task.options.rivals == "all" else ways[:1]:
            make = functools.partial(models.peqa, bits, groups, init)
            measure("PEQA", make, f"peqa {bits} {groups} {init}", bits=bits, groups=groups, init=init)
        if task.options.rivals == "few" and bits > 3:
            continue
        measure("QLoRA-like", functools.partial(models.qlora, bits), f"qlora {bits}", bits=bits, **PLAIN)
        measure("QLoRA-like, merged", functools.partial(models.merged, bits), bits=bits, **PLAIN)


def evaluate(cell: Cell, bench: Bench, make: Callable[[], nn.Module], models: Models, key: str) -> Outcome:
    """Make or tune a model and measure it; bytes are a tuning step's peak, or else the model's own."""
    with cell.timed("make"):
        model = make()
    with cell.timed("evaluate"):
        found = {"bits_per_byte": bench.bits_per_byte(model)}
    if peqa.layers(model):
        told = peqa.summary(model)
        found |= {"held_bits": told.held_bits, "flipped": float(told.flipped)}
    late = "full" if cell.method.startswith("full fine-tuning,") else ""
    late = "lora" if cell.method == "LoRA, then quantized" else late
    late = f"qlora {cell.setting['bits']}" if cell.method == "QLoRA-like, merged" else late
    numbers = models.trained.get(key or late, 0)
    return Outcome(found, models.held[key] if key else memory_bytes(model), trained=numbers)


def peak(cell: Cell, bench: Bench, make: Callable[[Bench], nn.Module], tokens: int) -> Outcome:
    """The peak of one step, and model states after it."""
    model = make(bench)
    held, states = bench.peak(model, tokens)
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Outcome({"peak": float(sum(held.values())), "states": float(states)}, held, trained=numbers)


def switch(cell: Cell, bench: Bench) -> Outcome:
    """A swap of scales against loading another tuned model."""
    task = peqa.get_task(peqa.quantize_(bench.fresh(), 4)).memory_bytes()
    return Outcome({"numbers": sum(task.values()) / 4}, task, bench.switching(4))


def judge(found: Measurements, options: Options) -> list[Claim]:
    """The claims of both tracks."""
    own = language_claims(found) if found.where(part="switch") else []
    return [*own, *(sentiment_claims(found) if found.where(track="sentiment") else [])]


def language_claims(found: Measurements) -> list[Claim]:
    """Quality paired over seeds; bytes are counts, so that one unit decides."""
    seeds = found.where(method="quantized, untuned").seeds

    def bpb(method: str, seed: int, **setting: str | int) -> float:
        rows = [r for r in found.where(method=method, seed=seed, **setting) if "bits_per_byte" in r.quality]
        return rows[0].quality["bits_per_byte"]

    def recovered(seed: int, bits: int) -> float:
        start = bpb("quantized, untuned", seed, bits=bits, **PLAIN)
        return (start - bpb("PEQA", seed, bits=bits, **PLAIN)) / (start - bpb("full fine-tuning", seed))

    def lead(seed: int, bits: int, init: str) -> float:
        late = bpb("LoRA, then quantized", seed, bits=bits, groups="channel", init=init)
        return late - bpb("PEQA", seed, bits=bits, **PLAIN)

    def merging(seed: int, bits: int) -> float:
        return bpb("QLoRA-like, merged", seed, bits=bits) - bpb("QLoRA-like", seed, bits=bits)

    def over(value: Callable[[int], float]) -> Interval:
        return mean_interval([value(seed) for seed in seeds])

    widths = [int(b) for b in found.where(method="PEQA").settings("bits")]
    claims = []
    if 3 in widths:
        text = "PEQA at 3 bits recovers at least half of what full fine-tuning gains over the untuned 3 bits"
        claims.append(claim(text, f"{PAPER}, table 3", over(lambda s: recovered(s, 3)), ">= 0.5", "share"))
    for bits in [b for b in widths if b in (3, 2)]:
        for init in ("rtn", "optq"):
            text = f"tuning LoRA first and quantizing to {bits} bits later ({init}) is worse than PEQA"
            gap = over(functools.partial(lead, bits=bits, init=init))
            claims.append(claim(text, f"{PAPER}, table 3", gap, "> 0", "bits per byte"))
    if {2, 4} <= set(widths):
        text = "that gap is wider at 2 bits than at 4"
        wider = over(lambda s: lead(s, 2, "rtn") - lead(s, 4, "rtn"))
        claims.append(claim(text, f"{PAPER}, table 3", wider, "> 0", "bits per byte"))
    for width in found.where(method="QLoRA-like, merged").settings("bits"):
        bits = int(width)
        text = f"merging QLoRA's adapter into {bits} bits loses quality"
        lost = over(functools.partial(merging, bits=bits))
        claims.append(claim(text, f"{PAPER}, section 1", lost, "> 0", "bits per byte"))
    return [*claims, *memory_claims(found, widths)]


def memory_claims(found: Measurements, widths: Sequence[int]) -> list[Claim]:
    """Bytes and the price of a switch."""
    memory = found.where(part="memory")

    def ratio(metric: str, tokens: int, method: str = "PEQA") -> Interval:
        one, full = (
            memory.one(method=m, tokens=tokens).quality[metric] for m in (method, "full fine-tuning")
        )
        return Interval(one / full, one / full, one / full, 1)

    where = f"{PAPER}, section 3.3"
    claims = [
        claim("model states are at most 0.15 of full fine-tuning's (4 bits)", where, ratio("states", 256),
              "<= 0.15", "x", exact=True),
        claim("the peak at 256 tokens a step is at most half of full fine-tuning's", where,
              ratio("peak", 256), "<= 0.5", "x", exact=True),
        claim("by plain autograd the peak at 256 tokens is above full fine-tuning's", "not in the paper",
              ratio("peak", 256, "PEQA by plain autograd"), "> 1", "x", exact=True, expected=False,
              why="true of weights, activations and gradients alone, not with Adam's moments counted"),
    ]  # fmt: skip
    for bits in widths:
        row = found.where(method="PEQA", bits=bits, **PLAIN)[0]
        share = row.quality["held_bits"] / 32
        text = f"quantized weights take {bits}/32 of float32's bytes and less than 1/32 more (scales, zeros)"
        exactly = Interval(share, share, share, 1)
        claims.append(claim(text, where, exactly, f"<= {(bits + 1) / 32}", "x", exact=True))
    turns = [row.seconds for row in found.where(method="PEQA", part="switch")]
    shares = [100 * seconds["swap"] / seconds["reload"] for seconds in turns]
    span = mean_interval(shares) if len(shares) > 1 else None  # one timing says nothing
    text = "switching a task costs under 1 % of loading another tuned model"
    return [*claims, claim(text, f"{PAPER}, section 3.2", span, "< 1", "%")]


def figures(found: Measurements, options: Options) -> list[Figure]:
    """Quality by width, the peak's share of full fine-tuning's by tokens, and who holds it."""
    lines: dict[str, Series] = {}
    for method in (
        "quantized, untuned", "full fine-tuning, then quantized", "LoRA, then quantized", "PEQA",
        "QLoRA-like", "QLoRA-like, merged",
    ):  # fmt: skip
        rows = [r for r in found.where(method=method, **PLAIN) if "bits_per_byte" in r.quality]
        widths = sorted({int(r.setting["bits"]) for r in rows})
        by = [[r.quality["bits_per_byte"] for r in rows if r.setting["bits"] == bits] for bits in widths]
        if widths:
            lines[method] = Series(widths, [*map(statistics.fmean, by)], [*map(min, by)], [*map(max, by)])
    memory = found.where(part="memory")
    shares = {}
    for method in (name for name in memory.methods if name != "full fine-tuning"):
        tokens = [int(t) for t in memory.where(method=method).settings("tokens")]
        full = [memory.one(method="full fine-tuning", tokens=t).quality["peak"] for t in tokens]
        own = [memory.one(method=method, tokens=t).quality["peak"] for t in tokens]
        shares[method] = Series(tokens, [a / b for a, b in zip(own, full, strict=True)])
    holders = {row.method: dict(row.bytes) for row in memory.where(tokens=256)}
    drawn: list[Figure] = []
    if lines:
        drawn.append(Lines("Held-out text by width; mean and range", "bits a weight", "bits per byte", lines))
        title = "Peak of a step, as a share of full fine-tuning's"
        drawn.append(Lines(title, "tokens a step", "share", shares, x_scale="log"))
        drawn.append(Bars("Who holds the peak at 256 tokens a step", "bytes", holders))
    return drawn


RECIPE = Recipe(
    name="peqa",
    title="PEQA: fine-tune in the 2 to 4 bits that will be deployed",
    paper="Memory-Efficient Fine-Tuning of Compressed Large Language Models via sub-4-bit Integer "
    "Quantization, NeurIPS 2023",
    room="training",
    component="memspan.training.peqa.quantize_",
    problem="tune a model for several tasks and serve it in 2, 3 or 4 bits",
    answer="integers stay, only their scales are trained: a task is kilobytes, with nothing to merge",
    quick_cost="about 3 min, and 3 min more the first time",
    options=Options,
    quick=Options(),
    full=Options(tracks="both", steps=400, pretrain=2000, test=100_000, rivals="all"),
    tiny=Options(
        bits=(3,),
        steps=2,
        pretrain=2,
        width=32,
        depth=1,
        length=32,
        test=300,
        most_tokens=256,
        vocabulary=300,
    ),
    run=run,
    judge=judge,
    figures=figures,
    control="quantized, untuned",
    seeds=(3, 3),
    extras=("tuning", "texts"),
    threads=1,
)
