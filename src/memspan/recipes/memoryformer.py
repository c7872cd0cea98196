"""MemoryFormer: how much perplexity does a byte of tables buy, and what does it save?

*Training*: byte-level language models on the same batches: the dense transformer, its twin narrowed to the
same arithmetic, tables at several bits, tables at the dense learning rate. The control counts byte
frequencies. *Speed*: one token after another with a key-value cache, dense and tables in turn, at a width
where matrices matter.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from memspan.base.rng import rng
from memspan.models import MemoryFormerConfig, MemoryFormerLM, MemoryLinear, memory_cost
from memspan.models.lm import generate, next_token_loss
from memspan.nn.lookup import available
from memspan.recipes._memoryformer_models import (
    CONTROL,
    DENSE,
    NARROW,
    PKM,
    VOCABULARY,
    build,
    decoder,
    has_pkm,
    operations,
    same_rate,
    some_text,
    split,
    tables,
)
from memspan.recipes.engine import Cell, Measurements, Outcome, Recipe, Task, option
from memspan.report import Claim, Figure, Lines, Series, claim
from memspan.report.metrics import bits_per_byte
from memspan.report.stats import Interval, mean_interval, paired_difference

PAPER = "MemoryFormer, NeurIPS 2024"


@dataclass(frozen=True)
class Options:
    """Sizes of the models and of their training."""

    width: int = option(96, "of the models; a multiple of all bits and of 8", minimum=8)
    layers: int = option(2, "blocks", minimum=1)
    length: int = option(64, "of the sequences", unit="bytes", minimum=4)
    batch: int = option(16, "sequences in a step", minimum=1)
    steps: int = option(200, "training steps, equal for all methods", unit="steps", minimum=2)
    bits: tuple[int, ...] = option((4, 8), "entries of a chunk, rising", unit="bits", minimum=1, maximum=12)
    rate: float = option(
        2e-3,
        "peak learning rate of matrices; tables take three times as much; 1e-3 in the paper",
    )
    test: int = option(16_384, "held-out text", unit="bytes", minimum=64)
    rounds: int = option(5, "timing rounds; 0 leaves out the speed part", unit="rounds")
    decode_width: int = option(512, "of the models that are timed", minimum=64)


def run(task: Task[Options]) -> None:
    """Train every method on the same batches, then time decoding in rounds."""
    o, text = task.options, task.use(some_text())
    train_part, test_part = (np.frombuffer(part.encode(), np.uint8) for part in split(text))
    if not has_pkm():
        task.note("Product-key memory is absent: the package product-key-memory is not installed.")
    methods = [CONTROL, DENSE, NARROW, *map(tables, o.bits), same_rate(o), *([PKM] if has_pkm() else ())]
    task.expect(len(task.seeds) * len(methods) + 2 * o.rounds)
    for seed in task.seeds:
        for method in methods:
            work = partial(train, texts=(train_part, test_part[: o.test]), o=o)
            task.measure(method=method, seed=seed, setting={"part": "training"}, work=work)
    if o.rounds and available()["cpu"]:
        task.note(f"Decoding runs on torch's operators: {available()['cpu']}")
    timed = {method: decoder(method, o) for method in (DENSE, tables(o.bits[-1]))} if o.rounds else {}
    for turn in range(o.rounds):
        for method, model in timed.items():
            task.measure(
                method=method, seed=turn, setting={"part": "speed"}, work=partial(decode, model=model)
            )


def train(cell: Cell, texts: tuple[Any, Any], o: Options) -> Outcome:
    """One model: Adam(0.9, 0.95), cosine to 1%, clipped at 1, as published, at a smaller scale."""
    text, held_out = (torch.from_numpy(part.astype(np.int64)) for part in texts)
    if cell.method == CONTROL:
        shares = torch.bincount(text, minlength=VOCABULARY).double().add(1)
        nats = -float((shares / shares.sum()).log()[held_out].mean())
        return Outcome(quality(nats), {"parameters": 8 * VOCABULARY}, flops=0)
    model = build(cell.method, o).to(cell.device).train()
    factor = 1.0 if cell.method == same_rate(o) else 3.0
    groups: list[dict[str, Any]] = [{"params": list(model.parameters()), "lr": o.rate}]
    if isinstance(model, MemoryFormerLM):
        groups = model.parameter_groups(o.rate, factor)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    warm = max(1, o.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / warm) * (0.505 + 0.495 * math.cos(math.pi * step / o.steps)),
    )
    starts = rng("memoryformer", cell.seed).integers(len(text) - o.length, size=(o.steps, o.batch))
    curve = []
    with cell.timed("train"):
        for step in range(o.steps):
            places = torch.from_numpy(starts[step])[:, None] + torch.arange(o.length)
            ids = text[places].to(cell.device)
            loss = next_token_loss(model(ids), ids)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            curve.append(float(loss.detach()))
            cell.step(step + 1, o.steps)
    model.eval()
    rows = held_out[: len(held_out) // o.length * o.length].view(-1, o.length)
    with torch.inference_mode():
        parts = [part.to(cell.device) for part in torch.split(rows, 64)]
        nats = sum(float(next_token_loss(model(part), part)) * len(part) for part in parts) / len(rows)
    held = {"parameters.tables": sum(m.tables.nbytes for m in model.modules() if isinstance(m, MemoryLinear))}
    held["parameters"] = sum(p.nbytes for p in model.parameters()) - held["parameters.tables"]
    return Outcome(quality(nats), held, flops=operations(model, o), series={"train_loss": curve})


def quality(nats: float) -> dict[str, float]:
    """Loss of a byte in nats and in bits."""
    return {"loss": nats, "bits_per_byte": bits_per_byte(nats, 1)}


def decode(cell: Cell, model: Any) -> Outcome:
    """Seconds of a token when 48 are decoded one by one."""
    model = model.to(cell.device)
    ids = torch.zeros(1, 8, dtype=torch.long, device=cell.device)
    generate(model, ids, 4)
    start = time.perf_counter()
    generate(model, ids, 48)
    if cell.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / 48
    return Outcome({}, {"parameters": sum(p.nbytes for p in model.parameters())}, seconds={"token": seconds})


def judge(found: Measurements, o: Options) -> Sequence[Claim]:
    """The claims of the paper, and of the kernels here."""
    trained, ours, small = found.where(part="training"), tables(o.bits[-1]), tables(o.bits[0])

    def gap(a: str, b: str) -> Interval | None:
        left, right = trained.where(method=a), trained.where(method=b)
        pairs = min(len(left), len(right))
        if not pairs:
            return None
        return paired_difference(left.values("loss")[:pairs], right.values("loss")[:pairs])

    def loss(text: str, a: str, b: str, bar: str, paper: str = f"{PAPER}, table 2", why: str = "") -> Claim:
        return claim(text, paper, gap(a, b), bar, "nat", why=why)

    config = MemoryFormerConfig(VOCABULARY, o.width, o.layers, max(1, o.width // 24), bits=o.bits[-1])
    with torch.device("meta"):
        cost = memory_cost(MemoryFormerLM(config), o.length)
    saved = mean_interval([cost.lookup_macs / cost.dense_macs])
    bytes_of = [
        sum(one.bytes.get("parameters.tables", 0) for one in trained.where(method=method)[:1])
        for method in (small, ours)
    ]
    growth = mean_interval([bytes_of[1] / bytes_of[0]]) if all(bytes_of) else None
    share = 2.0 ** (o.bits[-1] - o.bits[0]) * o.bits[0] / o.bits[-1]
    times = [[one.seconds["token"] for one in found.where(method=m, part="speed")] for m in (ours, DENSE)]
    ratios = [a / b for a, b in zip(*times, strict=False)]
    speed = mean_interval(ratios) if ratios else None
    few = "rows learn when they are read: with few steps the larger tables are still mostly noise"
    return [
        claim(
            "Arithmetic outside attention is at most 1/8 of the dense twin's",
            f"{PAPER}, table 1",
            saved,
            "<= 0.125",
            "of dense",
            exact=True,
        ),
        loss(
            "Held-out loss is within 0.05 nat of the dense twin at equal steps",
            ours,
            DENSE,
            "<= 0.05",
            f"{PAPER}, table 1",
            few,
        ),
        *(
            loss(
                f"Loss falls with bits: {more} against {less}",
                tables(more),
                tables(less),
                "< 0",
                f"{PAPER}, table 3",
                few,
            )
            for less, more in pairwise(o.bits)
        ),
        claim(
            f"Tables of {o.bits[-1]} bits hold 2^tau/tau times as much as of {o.bits[0]}, within 20%",
            PAPER,
            growth,
            lambda value: 0.8 * share <= value <= 1.2 * share,
            "x",
            exact=True,
        ),
        loss(
            "Tables learn better at three times the rate than at the dense one",
            ours,
            same_rate(o),
            "< 0",
            f"{PAPER}, table 4",
        ),
        loss("At equal arithmetic tables beat a dense model", ours, NARROW, "< 0", "memspan"),
        claim("A token is decoded in less than 0.6 of the dense time", "memspan", speed, "< 0.6", "of dense"),
    ]


def figures(found: Measurements, o: Options) -> Sequence[Figure]:
    """Bits per byte against bytes, and against arithmetic."""
    trained = found.where(part="training")
    curves: tuple[dict[str, Series], dict[str, Series]] = ({}, {})
    for method in trained.methods:
        cells = trained.where(method=method)
        bits = cells.values("bits_per_byte")
        curves[0][method] = Series([sum(one.bytes.values()) for one in cells], bits)
        if method != CONTROL:
            curves[1][method] = Series([(one.flops or 0) / o.length for one in cells], bits)
    label = "held-out bits per byte"
    return [
        Lines("Quality against bytes", "parameters", label, curves[0], x_scale="log", x_unit="bytes"),
        Lines(
            "Quality against arithmetic",
            "operations a token, without the head",
            label,
            curves[1],
            x_scale="log",
        ),
    ]


RECIPE = Recipe(
    name="memoryformer",
    title="MemoryFormer: a transformer of tables instead of matrices",
    paper="MemoryFormer: Minimize Transformer Computation by Removing Fully-Connected Layers, NeurIPS 2024",
    room="models",
    component="memspan.models.memoryformer.MemoryFormerLM",
    problem="decode a language model where multiply-adds or bandwidth are short and RAM is not",
    answer="signs choose rows of tables: about a tenth of the arithmetic, tens of times the bytes",
    quick_cost="about 3 min",
    options=Options,
    quick=Options(),
    full=Options(
        width=240,
        layers=4,
        length=128,
        batch=32,
        steps=5000,
        bits=(4, 6, 8, 10),
        rate=1e-3,
        test=100_000,
        rounds=15,
    ),
    tiny=Options(width=48, layers=1, length=16, batch=4, steps=4, bits=(4, 6), test=512, rounds=0),
    run=run,
    judge=judge,
    figures=figures,
    control=CONTROL,
    threads=1,
    seeds=(2, 3),
)
