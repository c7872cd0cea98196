"""SlimFit against full fine-tuning, checkpointing, LoRA, LISA, and each of its two halves.

Bytes: one step of every method at one batch, counted by the ledger, in the worst case of the schedule (its
largest unit trains). Accuracy: all methods over the same steps and batches, from the same pretrained weights;
and full fine-tuning, SlimFit and its halves again over more steps, which a layer that trains in one step of
ten needs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from memspan import data, training
from memspan.ledger import Ledger, nbytes, saved_bytes
from memspan.recipes._slimfit_tasks import Tuning, image_tuning, text_tuning
from memspan.recipes.engine import Cell, Measurements, Outcome, Recipe, Task, option
from memspan.report import claim
from memspan.report.figures import Bars, Figure
from memspan.report.schema import Claim
from memspan.report.stats import Interval, paired_difference
from memspan.training import slimfit


@dataclass(frozen=True)
class Options:
    """What a run can change."""

    model: Literal["first", "minilm", "vit"] = option("first", "first takes MiniLM where it is, else the ViT")
    steps: int = option(60, "optimization steps, equal for all methods", unit="steps", minimum=1)
    longer: int = option(0, "steps of a second training: full, SlimFit and its halves; 0: none", unit="steps")
    batch_size: int = option(8, "examples a step", minimum=1)
    tokens: int = option(24, "length of the reviews while learning", unit="tokens", minimum=4, maximum=512)
    test: int = option(300, "held-out examples", minimum=2)
    train: int = option(0, "reviews to learn from, again and again; 0: all others", unit="reviews")
    count_batch: int = option(32, "examples of the step whose bytes are counted", minimum=2)
    count_tokens: int = option(64, "length of its reviews", unit="tokens", minimum=4, maximum=512)
    lr: float = option(1e-4, "of full fine-tuning; the others' are fixed multiples of it", minimum=0.0)
    pretrain: int = option(300, "steps that the ViT is trained before, where it stands in", unit="steps")
    rivals: Literal["few", "all"] = option(
        "few", "all: at every seed, and BitFit, linear probe, random F = 0.9"
    )


class Way(NamedTuple):
    """A way to train: factor of the learning rate, what is done to the model, and the schedule."""

    rate: float
    convert_: Callable[[nn.Module], object] | None = None
    freeze: float | None = None
    metric: str = "update_distance"
    lisa: bool = False


PAPER = "SlimFit, NAACL 2024"
SDPA = partial(slimfit.compress_, policy=slimfit.CompressionPolicy.paper(attention="sdpa"))
CONTROL = "never train"
#: Frozen layers train in few steps, so their rate is higher (the official scripts use 2 to 4 times).
WAYS: dict[str, Way] = {
    "full": Way(1.0),
    "LoRA": Way(10.0, training.lora_),
    "LISA": Way(2.0, lisa=True),
    "freezing only, F = 0.9": Way(3.0, freeze=0.9),
    "compression only": Way(1.0, slimfit.compress_),
    "SlimFit, F = 0.7": Way(2.0, slimfit.compress_, 0.7),
    "SlimFit, F = 0.8": Way(2.0, slimfit.compress_, 0.8),
    "SlimFit, F = 0.9": Way(3.0, slimfit.compress_, 0.9),
    "SlimFit, F = 0.95": Way(3.0, slimfit.compress_, 0.95),
    "random, F = 0.95": Way(3.0, slimfit.compress_, 0.95, "random"),
}
MORE = {
    "random, F = 0.9": Way(3.0, slimfit.compress_, 0.9, "random"),
    "BitFit": Way(10.0, training.bitfit_),
    "linear probe": Way(10.0, training.linear_probe_),
}
COUNTED = {
    "checkpointing": Way(1.0, training.checkpoint_),
    "SlimFit, F = 0.9, SDPA": Way(3.0, SDPA, 0.9),
}
OURS, FULL = "SlimFit, F = 0.9", "full"
GENTLE = {rate: f"SlimFit, F = {rate}" for rate in (0.8, 0.7)}  # what less freezing costs and buys
HALVES = ("freezing only, F = 0.9", "compression only")


def run(task: Task[Options]) -> None:
    """Count a step of every method, then train each."""
    o = task.options
    ways = WAYS | (MORE if o.rivals == "all" else {})
    tuning, counted = tunings(task)
    task.note(f"{tuning.name}: trained on; {counted.name}: counted.")
    for name, way in (ways | COUNTED).items():
        work = partial(count, way=way, tuning=counted, size=o.count_batch)
        task.measure(method=name, seed=0, setting={"table": "bytes"}, work=work)
    for seed in task.seeds if o.rivals == "all" else task.seeds[:1]:
        for name, way in ({CONTROL: Way(0.0)} | ways).items():
            work = partial(learn, way=way, tuning=tuning, steps=o.steps, options=o)
            task.measure(method=name, seed=seed, setting={"table": "accuracy"}, work=work)
    for seed in task.seeds if o.longer else ():
        for name in (
            FULL,
            OURS,
            *GENTLE.values(),
            *(HALVES if seed == task.seeds[0] or o.rivals == "all" else ()),
        ):
            work = partial(learn, way=WAYS[name], tuning=tuning, steps=o.longer, options=o)
            task.measure(method=name, seed=seed, setting={"table": "longer"}, work=work)


def tunings(task: Task[Options]) -> tuple[Tuning, Tuning]:
    """What is learned, and the same at the size whose bytes are counted."""
    o = task.options
    if o.model != "vit":
        try:
            learned = text_tuning(task, o.tokens, o.test, o.train)
            return learned, text_tuning(task, o.count_tokens, o.test, o.train)
        except (ImportError, data.DataNotFound) as error:
            if o.model == "minilm":
                raise
            task.note(f"a small ViT stands in for MiniLM: {error}")
    images = image_tuning(task, o.pretrain, o.test)
    return images, images


class Loop:
    """One method's model, optimizer and schedule."""

    def __init__(self, way: Way, tuning: Tuning, seed: int, steps: int, lr: float, device: Any) -> None:
        self.model = tuning.build(seed).to(device).train()
        if way.convert_ is not None:
            way.convert_(self.model)
        self.way, self.seed, self.total, self.done = way, seed, steps, 0
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr * way.rate, weight_decay=0.01, fused=True)
        self.decay = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda t: max(0.0, 1 - t / steps))
        self.schedule: slimfit.FreezingScheduler | None = None

    def begin(self, *, largest: bool = False) -> None:
        """Choose what trains in the coming step; in the first, the largest unit if that is asked for."""
        if self.way.lisa:
            training.lisa_(self.model, self.done, interval=max(1, self.total // 8), seed=self.seed)
        if self.way.freeze is None:
            return
        if self.schedule is None:
            sizes = dict(self.model.named_parameters())
            units = slimfit.FreezingScheduler(self.model, self.way.freeze).units
            metric: Any = self.way.metric
            self.schedule = slimfit.FreezingScheduler(
                self.model, self.way.freeze, metric=metric, optimizer=self.optimizer, seed=self.seed,
                visits=[max(units, key=lambda unit: sizes[unit].numel())] if largest else None,
            )  # fmt: skip
        self.schedule.before_forward()

    def step(self, inputs: tuple[torch.Tensor, ...], labels: torch.Tensor, *, watch: bool = False) -> int:
        """Forward, backward, update; gives the bytes that the forward pass saved where they are watched."""
        loss = F.cross_entropy(self.model(*inputs), labels)
        saved = saved_bytes(loss, exclude=[self.model, inputs, labels]) if watch else 0
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return saved

    def end(self) -> None:
        """Gradients to None, distances, learning rate."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.schedule is not None:
            self.schedule.after_step()
        self.decay.step()
        self.done += 1


def count(cell: Cell, way: Way, tuning: Tuning, size: int) -> Outcome:
    """Bytes of one step once all optimizer state is there; the largest unit trains in it."""
    loop = Loop(way, tuning, 0, 10, 1e-5, cell.device)
    first = on(cell.device, tuning.train(0, 0, 2))
    loop.step(*first)  # every parameter that ever trains gets its state
    loop.optimizer.zero_grad(set_to_none=True)
    batch = on(cell.device, tuning.train(0, 1, size))
    loop.begin(largest=True)
    stores = {} if loop.schedule is None else {"snapshot": loop.schedule}
    with (
        cell.timed("step under the ledger"),
        Ledger(loop.model, loop.optimizer, stores=stores, inputs=batch, level="timeline") as led,
    ):
        saved = loop.step(*batch, watch=True)
    kinds = ("saved_activations", "temporaries.forward", "temporaries.backward")
    highest = max(sum(point.by_category.get(kind, 0) for kind in kinds) for point in led.timeline())
    quality = {
        "saved after forward": float(saved),
        "activation peak": float(highest),
        "total peak": float(led.peak.total),
    }
    return Outcome(quality, led.peak.by_category, trained=sum(p.numel() for p in loop.optimizer.state))


def learn(cell: Cell, way: Way, tuning: Tuning, steps: int, options: Options) -> Outcome:
    """Accuracy on held-out examples after the same steps on the same batches."""
    loop = Loop(way, tuning, cell.seed, steps, options.lr, cell.device)
    times = []
    for step in range(steps if way.rate else 0):
        inputs, labels = on(cell.device, tuning.train(cell.seed, step, options.batch_size))
        start = time.perf_counter()
        loop.begin()
        loop.step(inputs, labels)
        loop.end()
        times.append(time.perf_counter() - start)
        cell.step(step + 1, steps)
    loop.model.eval()
    inputs, labels = tuning.test
    right: list[float] = []
    with torch.inference_mode(), cell.timed("test"):
        for part in range(0, len(labels), 100):
            rows = slice(part, part + 100)
            some, truth = on(cell.device, (tuple(x[rows] for x in inputs), labels[rows]))
            right += (loop.model(*some).argmax(1) == truth).float().tolist()
    seconds = {"train": sum(times), "median step": float(np.median(times))} if times else {}
    held = {"parameters": nbytes(loop.model), "optimizer_state": nbytes(
        [t for state in loop.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    )}  # fmt: skip
    quality = {"accuracy": float(np.mean(right))}
    numbers = sum(p.numel() for p in loop.optimizer.state)  # whatever was trained in some step
    return Outcome(quality, held, seconds, series={"correct": right}, trained=numbers)


def on(device: Any, batch: tuple[tuple[torch.Tensor, ...], torch.Tensor]) -> Any:
    """A batch on a device."""
    inputs, labels = batch
    return tuple(x.to(device) for x in inputs), labels.to(device)


def judge(found: Measurements, options: Options) -> list[Claim]:
    """Bytes are counted, so their ratios are exact; accuracies are paired over the held-out examples."""
    counted, tested = found.where(table="bytes"), found.where(table="accuracy")
    longest, steps = tested, options.steps
    if options.longer:
        longest, steps = found.where(table="longer"), options.longer

    def ratio(metric: str, large: str, small: str) -> Interval | None:
        a, b = (counted.where(method=name).values(metric) for name in (large, small))
        return Interval(a[0] / b[0], a[0] / b[0], a[0] / b[0], 1) if a and b else None

    def gain(name: str, rival: str, rows: Measurements = tested) -> Interval | None:
        both = [rows.where(method=which) for which in (name, rival)]
        seeds = set(both[0].seeds) & set(both[1].seeds)
        if not seeds:
            return None
        ours, theirs = (
            np.mean([row.series["correct"] for row in part if row.seed in seeds], axis=0) for part in both
        )
        return paired_difference(ours, theirs).scaled(100)

    def bytes_claim(
        text: str, where: str, metric: str, large: str, holds_if: str, why: str = "", ours: str = OURS
    ) -> Claim:
        span = ratio(metric, large, ours)
        return claim(text, where, span, holds_if, "x", expected=not why, why=why, exact=True)

    adam = (
        "weights and kept Adam moments, which SlimFit leaves as they are, are most of a small batch's total"
    )
    few = "a training of few steps decides little between two orders of visits"
    saved, both = "saved after forward", f"{PAPER}, section 4"
    slim, all_ = "SlimFit's (F = 0.9)", "full fine-tuning"
    late = gain("SlimFit, F = 0.95", "random, F = 0.95")
    short = ""
    passes = steps * options.batch_size / options.train if options.train else 0.0
    if passes < 3:  # compression alone is within the claim: what freezing takes away is steps
        short = "every step sees new reviews, and a layer trains in one of ten; the paper passes three times"
    milder: list[Claim] = []
    for rate, name in GENTLE.items():
        ours = f"SlimFit's (F = {rate})"
        milder += [
            bytes_claim(f"saved activations of {all_} over {ours}", PAPER, saved, FULL, ">= 4", ours=name),
            bytes_claim(
                f"the same at the peak, F = {rate}", PAPER, "activation peak", FULL, ">= 2.2", ours=name
            ),
            claim(
                f"accuracy of {ours} less that of {all_} after {steps} steps",
                PAPER,
                gain(name, FULL, longest),
                "> -1",
                "points",
            ),
        ]
    strong = "LoRA is a strong rival in accuracy; it keeps more activations"
    return [
        bytes_claim(f"saved activations of {all_} over {slim}", PAPER, saved, FULL, ">= 4"),
        bytes_claim("the same at the peak, with temporaries", PAPER, "activation peak", FULL, ">= 2.2"),
        *milder,
        bytes_claim(f"total of {all_} over {slim}, Adam kept", PAPER, "total peak", FULL, ">= 2.2", adam),
        bytes_claim("saved by freezing alone over both", both, saved, "freezing only, F = 0.9", "> 2"),
        bytes_claim("saved by compression alone over both", both, saved, "compression only", "> 1"),
        claim(f"accuracy of {slim} less that of {all_} after {steps} steps", PAPER,
              gain(OURS, FULL, longest), "> -1", "points", why=short),
        *(claim(f"accuracy of {half.removesuffix(', F = 0.9')} less that of {all_} after {steps} steps", both,
                gain(half, FULL, longest), "> -1", "points") for half in HALVES),
        claim("accuracy, F = 0.95: update distance less random choice", f"{PAPER}, section 3", late, ">= 0",
              "points", expected=False, why=few),
        claim(f"accuracy of {slim} less that of LoRA", "not in the paper", gain(OURS, "LoRA"), "> 0",
              "points", expected=False, why=strong),
    ]  # fmt: skip


def figures(found: Measurements, options: Options) -> list[Figure]:
    """Who holds the peak of the counted step, method by method."""
    rows = {one.method: dict(one.bytes) for one in found.where(table="bytes")}
    return [Bars("Who holds the peak of a training step", "bytes", rows)]


RECIPE = Recipe(
    name="slimfit",
    title="SlimFit: train a few layers a step, keep the rest's activations in few bits",
    paper="SlimFit: Memory-Efficient Fine-Tuning of Transformers Using Training Dynamics, NAACL 2024",
    room="training",
    component="memspan.training.slimfit.FreezingScheduler",
    problem="fine-tune a transformer whose activations do not fit",
    answer="a few layers train in each step, others every time; what is saved takes 8 bits, 4, or a tenth",
    quick_cost="about 4 min",
    options=Options,
    quick=Options(),
    full=Options(steps=150, longer=2000, batch_size=32, tokens=64, test=2000, rivals="all"),
    tiny=Options(model="vit", steps=2, longer=2, batch_size=4, test=20, count_batch=4, pretrain=2),
    run=run,
    judge=judge,
    figures=figures,
    control=CONTROL,
    seeds=(1, 3),
    extras=("recipes", "minilm"),
    takes_budget=False,
)
