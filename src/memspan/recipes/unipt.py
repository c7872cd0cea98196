"""UniPT against the ways to fine-tune: what a step holds, and what it buys on text and on image retrieval.

One pretrained encoder is adapted by every method with equal batches and steps. Methods that read hidden
states alone train on features computed once; that this changes no number is a test of the library.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memspan import data
from memspan.ledger import Ledger
from memspan.ledger.planner import job
from memspan.recipes import _unipt_tracks as tracks
from memspan.recipes._unipt_tracks import LIVE, Case, Pairs, states
from memspan.recipes.engine import Cell, Measurements, Outcome, Recipe, Task, option
from memspan.report import claim
from memspan.report.figures import Bars, Figure
from memspan.report.schema import Claim
from memspan.report.stats import Interval, mean_interval, paired_difference
from memspan.training import unipt


@dataclass(frozen=True)
class Options:
    """What a run can change."""

    backbone: Literal["minilm", "vit"] = option("minilm", "encoder; vit is trained here and decides nothing")
    train: int = option(384, "training texts", unit="texts", minimum=8)
    test: int = option(192, "test texts of the training domain; a quarter of it of each other", minimum=8)
    steps: int = option(30, "optimization steps, equal for all methods", unit="steps", minimum=1)
    batch_size: int = option(16, "texts a step", unit="texts", minimum=2)
    tokens: int = option(32, "length of the texts", unit="tokens", minimum=4)
    longer: int = option(3, "times the steps that cached UniPT takes for a longer run", minimum=1)
    rivals: Literal["once", "always"] = option(
        "once", "full, adapter and BitFit: first seed alone, or all, and full and LoRA in retrieval"
    )
    rounds: int = option(5, "of the comparison of cached and live steps in time", minimum=1)
    memory_batches: tuple[int, ...] = option((32, 8), "batches of the memory table, the spec's first")
    memory_tokens: int = option(64, "tokens of the memory table", unit="tokens", minimum=2)
    retrieval: bool = option(True, "images and names as well")
    pixels: int = option(96, "side of the images, a multiple of 32", unit="pixels", minimum=32)
    epochs: int = option(12, "passes over the pairs", unit="epochs", minimum=1)


PAPER = "UniPT, CVPR 2024"
CONTROL = "never train"
RATES = {"full": 5e-5}  # of what is trained below the classifier; all others: 1e-3
TOP_RATE = 5e-3  # of the classifier, drawn anew for every method: a slow one would starve the rest
FROZEN = ("linear probe", "LST", "UniPT", "UniPT, no interaction", "UniPT, uniform confidence")
TURNS = 6  # steps of each way in a round of the comparison in time
RETRIEVAL = (CONTROL, "linear probe", "LST", "UniPT")
CACHED = "UniPT cached, more steps"
TRAINS_BACKBONE = ("LoRA", "full", "adapter", "BitFit")


def run(task: Task[Options]) -> None:
    """Bytes of a step, then quality on text, then speed of cached features, then retrieval."""
    o = task.options
    case, text = encoder(task)
    case = case.to(task.device)
    for batch in o.memory_batches:
        tables: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in LIVE]
        if batch == o.memory_batches[0]:
            tables += [("UniPT", {"out_dim": 2 * case.width})]
        for name, more in tables if batch == o.memory_batches[0] else memory_pairs(tables):
            work = partial(hold, case=case, batch=batch, tokens=o.memory_tokens, more=more)
            setting = {"part": "memory", "batch": batch, "out_dim": more.get("out_dim", case.width)}
            task.measure(method=name, seed=0, setting=setting, work=work)
    caches = {name: hidden(case, name) for name in case.parts}
    for seed in task.seeds:
        rows: list[tuple[str, int]] = [(CONTROL, 0), *((name, o.steps) for name in FROZEN)]
        rows.append((CACHED, o.steps * o.longer))
        rows += [(name, o.steps) for name in TRAINS_BACKBONE
                 if name == "LoRA" or seed == task.seeds[0] or o.rivals == "always"]  # fmt: skip
        for name, steps in rows:
            work = partial(learn, case=case, caches=caches, steps=steps, size=o.batch_size)
            task.measure(method=name, seed=seed, setting={"part": "text"}, work=work)
    for turn in range(o.rounds):
        work = partial(steps_of, case=case, cache=caches["train"], size=o.batch_size)
        task.measure(method="UniPT", seed=turn, setting={"part": "speed"}, work=work)
    if o.retrieval and text is not None:
        try:
            pairs = tracks.emoji_pairs(task, text, o.pixels, train=600)
        except (ImportError, data.DataNotFound) as error:
            task.note(f"retrieval is left out: {error}")
            return
        if o.rivals == "once":
            task.note("Retrieval compares methods on frozen features; --rivals always adds LoRA and full.")
        task.note("LST has no form for stages of a CNN: its row has a ladder beside the text encoder alone.")
        for seed in task.seeds:
            for name in RETRIEVAL + (("LoRA", "full") if o.rivals == "always" else ()):
                work = partial(match, pairs=pairs, epochs=o.epochs)
                task.measure(method=name, seed=seed, setting={"part": "retrieval"}, work=work)


def encoder(task: Task[Options]) -> tuple[Case, data.Backbone | None]:
    """The pretrained encoder and its texts; without the wheel a small ViT, which decides no claim."""
    o = task.options
    if o.backbone == "minilm":
        try:
            text = data.backbone("minilm")
            return tracks.text_case(task, text, o.tokens, o.train, o.test), text
        except (ImportError, data.DataNotFound) as error:
            task.note(
                f"A small ViT stands in for the pretrained encoder, and claims are not decided: {error}"
            )
    else:
        task.note("A small ViT stands in for the pretrained encoder, and claims are not decided.")
    return tracks.vit_case(task, o.train, o.test, pretraining=5 * o.steps), None


def memory_pairs(tables: list[tuple[str, dict[str, Any]]]) -> list[tuple[str, dict[str, Any]]]:
    """What is compared at further batches."""
    return [(name, more) for name, more in tables if name in ("LoRA", "LST", "UniPT")]


def hidden(case: Case, part: str) -> unipt.HiddenCache:
    """Hidden states of one part, computed once."""
    x, mask, _ = case.parts[part]
    model = unipt.UniPT(case.encoder, case.taps)
    batches = [(x[i : i + 32], mask[i : i + 32]) for i in range(0, len(x), 32)]
    return unipt.cache_hidden(model, batches, {**case.key, "part": part})


def hold(cell: Cell, case: Case, batch: int, tokens: int, more: dict[str, Any]) -> Outcome:
    """Bytes at the peak of a training step, its second one, run for real under the ledger."""
    model = LIVE[cell.method](case, **more)
    x, mask, _ = case.parts["train"]
    shape = (batch, tokens) if x.dim() == 2 else (batch, *x.shape[1:])
    inputs = torch.zeros(shape, dtype=x.dtype)
    seen = torch.ones(shape[:2], dtype=mask.dtype)
    given = (inputs, seen, torch.zeros(batch, dtype=torch.long))
    one = job(model, given, loss=F.cross_entropy, device=cell.device.type)
    with cell.timed("two steps"):
        peak = one.measure(batch)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = sum(p.nbytes for p in case.encoder.parameters())
    quality = {"trained": float(trained), "beyond the backbone": float(peak.total - weights)}
    return Outcome(quality | {"peak": float(peak.total)}, peak.by_category, trained=trained)


def learn(cell: Cell, case: Case, caches: dict[str, unipt.HiddenCache], steps: int, size: int) -> Outcome:
    """Train a method on the training texts and test it in every domain."""
    live = cell.method in TRAINS_BACKBONE
    model = (LIVE[cell.method](case) if live else tracks.on_states(case, cell.method)).to(cell.device)
    x, mask, y = case.parts["train"]
    top = list(model.top.parameters())  # type: ignore[union-attr, operator]
    known = {id(p) for p in top}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    groups = [{"params": top, "lr": TOP_RATE}, {"params": rest, "lr": RATES.get(cell.method, 1e-3)}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], fused=True)
    model.train()

    def step(rows: Tensor) -> None:
        given = x[rows] if live else states(caches["train"], rows, x.device)
        optimizer.zero_grad()
        F.cross_entropy(model(given, mask[rows]), y[rows]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    with cell.timed("training"):
        for place, rows in enumerate(tracks.draws(cell.seed, len(x), steps, size)):
            step(rows)
            cell.step(place + 1, steps)
    with Ledger(model, optimizer) as led, torch.set_grad_enabled(steps > 0):
        model(x[:size] if live else states(caches["train"], slice(0, size), x.device), mask[:size])
    quality = {"accuracy": accuracy(model, case, caches, "test", live)}
    others = [
        accuracy(model, case, caches, part, live) for part in case.parts if part not in ("train", "test")
    ]
    if others:
        quality["accuracy, other domains"] = float(np.mean(others))
    held = dict(led.peak.by_category)
    if not live:
        held["store.hidden_states"] = caches["train"].flat.nbytes
    return Outcome(quality, held, trained=sum(p.numel() for p in [*top, *rest]) if steps else 0)


def accuracy(
    model: nn.Module, case: Case, caches: dict[str, unipt.HiddenCache], part: str, live: bool
) -> float:
    """Share of right answers."""
    x, mask, y = case.parts[part]
    model.eval()
    right = 0
    with torch.no_grad():
        for i in range(0, len(x), 64):
            rows = slice(i, i + 64)
            given = x[rows] if live else states(caches[part], rows, x.device)
            right += int((model(given, mask[rows]).argmax(1) == y[rows]).sum())
    return right / len(x)


def steps_of(cell: Cell, case: Case, cache: unipt.HiddenCache, size: int) -> Outcome:
    """Seconds of a training step (medians), live and on cached features, turn by turn.

    On the CPU those of the process: what else the machine does disturbs them least.
    """

    def clock() -> float:
        if cell.device.type == "cpu":
            return time.process_time()
        torch.accelerator.synchronize()
        return time.perf_counter()

    live, head = (one.to(cell.device).train() for one in (tracks.side(case), tracks.on_states(case, "UniPT")))
    x, mask, y = case.parts["train"]
    ways: dict[str, tuple[nn.Module, Callable[[Tensor], Any]]] = {
        "live": (live, lambda rows: x[rows]),
        "cached": (head, lambda rows: states(cache, rows, x.device)),
    }
    steps = {name: stepper(model, given, mask, y) for name, (model, given) in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn, rows in enumerate(tracks.draws(cell.seed, len(x), TURNS + 1, size)):
        for name in steps if turn % 2 else reversed(steps):
            begun = clock()
            steps[name](rows)
            if turn:  # the first warms up
                times[name].append(clock() - begun)
    seconds = {name: statistics.median(found) for name, found in times.items()}
    return Outcome({}, {"store.hidden_states": cache.flat.nbytes}, seconds)


def stepper(
    model: nn.Module, given: Callable[[Tensor], Any], mask: Tensor, y: Tensor
) -> Callable[[Tensor], None]:
    """One training step of a classifier on chosen rows: what an epoch repeats."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3, fused=True)

    def step(rows: Tensor) -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(given(rows), mask[rows]), y[rows]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def match(cell: Cell, pairs: Pairs, epochs: int) -> Outcome:
    """Train two towers on cached features of images and names; find held-out images by their names."""
    towers = pairs.towers(cell.method).to(cell.device)
    below = {id(p) for tower in towers for p in getattr(tower, "backbone", nn.Identity()).parameters()}
    trained = [p for p in towers.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) not in below], "lr": 1e-3},
        {"params": [p for p in trained if id(p) in below], "lr": RATES.get(cell.method, 1e-3)},
    ]
    optimizer = torch.optim.AdamW([one for one in groups if one["params"]], weight_decay=1e-4, fused=True)
    with cell.timed("training"):
        for epoch in range(0 if cell.method == CONTROL else epochs):
            loss = unipt.HingeRetrievalLoss(0.2, hardest=epoch > 0)
            order = pairs.train[torch.randperm(len(pairs.train))]
            for rows in order.chunk(-(-len(order) // 100)):
                optimizer.zero_grad()
                loss(*pairs.embed(towers, rows)).backward()
                nn.utils.clip_grad_norm_(towers.parameters(), 2.0)
                optimizer.step()
            cell.step(epoch + 1, epochs)
    towers.eval()
    with torch.no_grad():
        quality = tracks.recalls(*pairs.embed(towers, pairs.test))
    held = {"parameters.trained": sum(p.nbytes for p in towers.parameters())}
    caches = pairs.images.flat.nbytes + pairs.names.flat.nbytes
    numbers = 0 if cell.method == CONTROL else sum(p.numel() for p in trained)
    return Outcome(quality, held | {"store.hidden_states": caches}, trained=numbers)


def judge(found: Measurements, options: Options) -> list[Claim]:
    """Claims (a) to (e) of the specification's order, and one on retrieval."""
    memory, text = found.where(part="memory"), found.where(part="text")
    decided = memory.where(method="UniPT").settings("out_dim")[:1] == (384,)
    first = options.memory_batches[0]

    def ratio(rival: str, batch: int, method: str = "UniPT", out: int = 384) -> Interval | None:
        ours, theirs = memory.where(method=method, batch=batch), memory.where(method=rival, batch=batch)
        chosen = ours.where(out_dim=out)
        if not (decided and chosen and theirs):
            return None
        value = chosen.values("peak")[0] / theirs.values("peak")[0]
        return Interval(value, value, value, 1)

    def bytes_claim(text: str, *at: Any, most: float, why: str = "") -> Claim:
        return claim(text, PAPER, ratio(*at), f"<= {most}", "x", exact=True, expected=not why, why=why)

    weights = "the backbone's weights stand on both sides, and few activations on LoRA's"
    claims = [
        bytes_claim(f"peak is half of LoRA's or less at {first} texts", "LoRA", first, most=0.5),
        bytes_claim(f"peak is at most 1.15 x LST's at {first} texts", "LST", first, most=1.15),
        bytes_claim("recomputed, it is below LST's", "LST", first, "UniPT, recomputed", most=1.0),
        bytes_claim(
            "half of LoRA's with twice the output width", "LoRA", first, "UniPT", 768, most=0.5, why=weights
        ),
        *(bytes_claim(f"half of LoRA's at {batch} texts", "LoRA", batch, most=0.5, why=weights)
          for batch in options.memory_batches[1:]),
    ]  # fmt: skip

    def gain(ours: str, rival: str, metric: str, part: Measurements, scale: float = 100) -> Interval | None:
        seeds = [
            s for s in part.seeds if part.where(method=ours, seed=s) and part.where(method=rival, seed=s)
        ]
        if not (decided and seeds):
            return None
        a, b = (
            [scale * part.one(method=name, seed=s).quality[metric] for s in seeds] for name in (ours, rival)
        )
        return paired_difference(a, b)

    def better(told: str, ours: str, rival: str, holds: str = "> 0", metric: str = "accuracy") -> Claim:
        return claim(told, PAPER, gain(ours, rival, metric, text), holds, "points")

    claims += [
        better("UniPT is as good as LST or better", "UniPT", "LST", ">= 0"),
        better("UniPT beats a linear probe", "UniPT", "linear probe"),
        better("UniPT is within 2 points of LoRA", "UniPT", "LoRA", ">= -2"),
        better("cached, with more steps, it is within 2 points of LoRA", CACHED, "LoRA", ">= -2"),
        better("confidence helps", "UniPT", FROZEN[4]),
        better("interaction helps more than confidence", FROZEN[4], FROZEN[3]),
    ]
    speed = found.where(part="speed")
    ratios = [one.seconds["live"] / one.seconds["cached"] for one in speed]
    span = mean_interval(ratios) if decided and ratios else None
    claims.append(claim("an epoch on cached features is 5 x faster or more", PAPER, span, ">= 5", "x"))
    pictures = found.where(part="retrieval")
    span = gain("UniPT", "linear probe", "Rsum", pictures, 1)
    claims.append(claim("UniPT finds images by name better than a linear probe", PAPER, span, "> 0", "Rsum"))
    span = gain("UniPT", "LST", "Rsum", pictures, 1)
    claims.append(claim("UniPT finds images by name as well as LST or better", PAPER, span, ">= 0", "Rsum"))
    return claims


def figures(found: Measurements, options: Options) -> list[Figure]:
    """Who holds the peak, by method and batch."""
    shown: list[Figure] = []
    for batch in options.memory_batches:
        rows = list(found.where(part="memory", batch=batch))
        base = min(one.setting["out_dim"] for one in rows)
        bars = {one.method: dict(one.bytes) for one in rows if one.setting["out_dim"] == base}
        shown.append(Bars(f"Peak of a training step at {batch} examples", "bytes", bars))
    return shown


RECIPE = Recipe(
    name="unipt",
    title="UniPT: fine-tune beside the network, at the memory of running it",
    paper="UniPT: Universal Parallel Tuning with Efficient Parameter and Memory, CVPR 2024",
    room="training",
    component="memspan.training.unipt.UniPT",
    problem="adapt a pretrained encoder where LoRA still runs out of memory",
    answer="a small network reads all hidden states in parallel; no gradient enters the backbone",
    quick_cost="about 2 min",
    options=Options,
    quick=Options(),
    full=Options(
        train=4000, test=2000, steps=200, batch_size=32, tokens=64, rivals="always", pixels=128, epochs=25
    ),
    tiny=Options(
        backbone="vit",
        train=64,
        test=64,
        steps=3,
        batch_size=8,
        rounds=1,
        memory_batches=(4,),
        retrieval=False,
    ),
    run=run,
    judge=judge,
    figures=figures,
    control=CONTROL,
    seeds=(3, 5),
    extras=("recipes", "vision", "minilm"),
    in_tour=False,
)
