"""What the recipe measures: a model, a batch, an arm and a seed a cell; rules; and seconds, turn by turn."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from memspan import data as sets
from memspan.banks.temporal import (
    JODIE,
    PRES,
    TGN,
    EdgeBank,
    RecencyRule,
    Scores,
    TemporalData,
    TemporalModel,
    batch_report,
    evaluate_rule,
    train_link_prediction,
)
from memspan.recipes.engine import Cell, Outcome, Task, option
from memspan.recipes.tracks.events import stream_of, train_pyg

KNOWN = ("collegemsg", "bitcoinotc", "ml-100k", "clock-changes")


@dataclass(frozen=True)
class Options:
    """What a run can change."""

    data: Literal["first", "both", "collegemsg", "bitcoinotc", "ml-100k", "clock-changes"] = option(
        "first", "first: CollegeMsg, MovieLens or the clock changes, whichever is here; both: the first two"
    )
    model: Literal["jodie", "tgn"] = option("jodie", "how a memory is read")
    batches: tuple[int, ...] = option((200, 800, 4000), "events in a batch; the first is the base", minimum=1)
    epochs: int = option(4, "passes over the training events, equal for all", unit="epochs", minimum=1)
    steps: int = option(
        210, "of the second table: first stream, up to 4 times the base batch; 0: none", unit="steps"
    )
    dim: int = option(64, "width of a node's memory", minimum=4)
    lr: float = option(1e-3, "of Adam at the base batch", minimum=0.0)
    events: int = option(60_000, "first events of the stream", unit="events", minimum=100)
    arms: Literal["few", "all"] = option("few", "all: ablations too, at two seeds")
    speed: int = option(5, "rounds of the timing", unit="rounds")
    peers: bool = option(False, "PyG's TGN too (extra peers)")


STANDARD, OURS, SCALED, COHERENCE = "standard", "PRES", "lr x sqrt(k)", "coherence alone"
BOTH, CORRECTION, DAMPING = "PRES, lr x sqrt(k)", "correction alone", "damping"
MORE, SUB = "two more epochs", "sub-batches"
ABLATIONS = [CORRECTION, DAMPING, BOTH, "PRES, drift", "PRES, step"]
CONTROL = "destination recency"
PAIR = "pair, then recency"
PRES_OF: dict[str, Callable[[], PRES]] = {
    OURS: PRES,
    BOTH: PRES,
    COHERENCE: partial(PRES, gamma=1.0),
    CORRECTION: partial(PRES, beta=0.0),
    DAMPING: partial(PRES, beta=0.0, rate="none"),
    "PRES, drift": partial(PRES, rate="drift"),
    "PRES, step": partial(PRES, rate="step"),
}
RULES: dict[str, Callable[[int], Any]] = {
    "EdgeBank, directed": lambda nodes: EdgeBank(),
    "EdgeBank, undirected": lambda nodes: EdgeBank(directed=False),
    CONTROL: RecencyRule,
    PAIR: partial(RecencyRule, by="pair"),
}


def run(task: Task[Options]) -> None:
    """For each stream: rules, the batch sweep at equal epochs and at equal steps, ablations, timing."""
    o = task.options
    base, last = o.batches[0], o.batches[-1]
    for place, (name, stream) in enumerate(streams(task)):
        train = len(stream.chronological_split()[0])
        for batch in o.batches:
            task.note(f"{name}, {batch_report(stream, batch)}.")

        def sweep(arm: str, batch: int, seed: int, epochs: int, table: str) -> None:
            work = partial(trained, arm=arm, stream=stream, batch=batch, epochs=epochs, options=o)  # noqa: B023
            setting = {"table": table, "data": name, "batch": batch}  # noqa: B023
            task.measure(method=arm, seed=seed, setting=setting, work=work)

        for seed in task.seeds:
            for rule, build in RULES.items():
                setting: dict[str, Any] = {"table": "rules", "data": name}
                work = partial(ruled, build=build, stream=stream)
                task.measure(method=rule, seed=seed, setting=setting, work=work)
            for batch in o.batches:
                arms = [STANDARD, OURS, *([] if batch == base else [SCALED])]
                for arm in arms + [COHERENCE] * (base < batch == last):
                    sweep(arm, batch, seed, o.epochs, "epochs")
            for batch in (base, last) if o.peers else ():
                for method, pres in (("PyG TGN", False), ("PyG TGN, PRES attached", True)):
                    setting = {"table": "epochs", "data": name, "batch": batch}
                    work = partial(pyg, stream=stream, batch=batch, pres=pres, options=o)
                    task.measure(method=method, seed=seed, setting=setting, work=work)
        for batch in o.batches:
            swept = task.measurements.where(table="epochs", data=name, batch=batch)
            ours, plain = (np.mean(swept.where(method=arm).values("valid ap")) for arm in (OURS, STANDARD))
            if ours < plain:
                told = f"{ours:.3f} on validation, {plain:.3f} without"
                task.note(
                    f"{name}, {batch}: leave PRES out here ({told}); its tracker is young, or misleads."
                )
        for seed in task.seeds if o.steps and not place else ():
            for batch in (batch for batch in o.batches if batch <= 4 * base):
                epochs = max(1, round(o.steps / math.ceil(train / batch)))
                for arm in (STANDARD, OURS) if seed == task.seeds[0] else (STANDARD,):
                    sweep(arm, batch, seed, epochs, "steps")
        for seed in task.seeds[:2] if o.arms == "all" else ():
            for batch in o.batches[1:]:
                for arm in ABLATIONS + ([MORE, SUB] if batch == last else [COHERENCE]):
                    sweep(arm, batch, seed, o.epochs + 2 * (arm == MORE), "epochs")
        for turn in range(0 if place else o.speed):  # ways take turns: a busy moment hits all of them
            for batch in o.batches:
                for arm in (STANDARD, OURS):
                    setting = {"table": "speed", "data": name, "batch": batch}
                    work = partial(timed, arm=arm, stream=stream, batch=batch, options=o)
                    task.measure(method=arm, seed=turn, setting=setting, work=work)


def streams(task: Task[Options]) -> list[tuple[str, TemporalData]]:
    """The streams asked for, or the first that is here."""
    o = task.options
    if o.data == "both":
        names = list(KNOWN[:2])
    elif o.data == "first":
        names = ["collegemsg", "ml-100k", "clock-changes"]
    else:
        names = [o.data]
    found = []
    for name in names:
        try:
            table = task.use(sets.load(name, sets.TableSet))
        except sets.DataNotFound:
            if o.data != "first" or name == names[-1]:
                raise
            continue
        found.append((name, stream_of(table).part(0, o.events)))
        if o.data == "first":
            break
    return found


def model_of(stream: TemporalData, arm: str, o: Options, seed: int) -> TemporalModel:
    """A new model; its weights depend on the seed alone, so that arms are paired."""
    torch.manual_seed(seed)
    kind: type[TemporalModel] = JODIE if o.model == "jodie" else TGN
    pres = PRES_OF[arm]() if arm in PRES_OF else None
    return kind(int(stream.num_nodes or 0), stream.msg_dim, o.dim, pres=pres)


def trained(cell: Cell, arm: str, stream: TemporalData, batch: int, epochs: int, options: Options) -> Outcome:
    """Train an arm; the epoch that is best on validation is tested."""
    model = model_of(stream, arm, options, cell.seed)
    found = train_link_prediction(
        model, stream, batch, epochs=epochs, lr=options.lr, scale_lr=arm in (SCALED, BOTH),
        base_batch=options.batches[0], sub_batch=options.batches[0] if arm == SUB else None,
        patience=None, seed=cell.seed, device=cell.device,
        progress=lambda epoch, ap: cell.step(epoch + 1, epochs, f"{ap:.3f}"),
    )  # fmt: skip
    numbers = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Outcome(
        told(found.test) | {"valid ap": max(found.valid_ap), "steps": float(found.steps)},
        model.memory_bytes(),
        {"train": found.seconds, "train, processor": found.cpu_seconds},
        trained=numbers,
        series={"valid ap": found.valid_ap, "loss": found.loss},
    )


def pyg(cell: Cell, stream: TemporalData, batch: int, pres: bool, options: Options) -> Outcome:
    """PyG's own TGN in its own loop, on the same events and negatives."""
    torch.manual_seed(cell.seed)
    attached = PRES(time_scale=stream.mean_gap) if pres else None
    found = train_pyg(stream, batch, options.epochs, options.lr, options.dim, cell.seed, attached)
    return Outcome(
        told(found.scores), found.memory_bytes, {"train": found.seconds}, trained=found.trained
    )  # fmt: skip


def ruled(cell: Cell, build: Callable[[int], Any], stream: TemporalData) -> Outcome:
    """A rule on the same test."""
    rule = build(int(stream.num_nodes or 0))
    with cell.timed("test"):
        scores = evaluate_rule(rule, stream, seed=cell.seed)
    return Outcome(told(scores), rule.memory_bytes(), trained=0)


def timed(cell: Cell, arm: str, stream: TemporalData, batch: int, options: Options) -> Outcome:
    """Seconds of the processor that training on the first 8,000 events takes; on a GPU, of the clock."""
    short = stream.part(0, min(len(stream), 10_000))
    split = (0.1, 0.1)
    model = model_of(short, arm, options, cell.seed)
    start = time.perf_counter()
    found = train_link_prediction(
        model, short, batch, epochs=1, lr=options.lr, split=split, seed=cell.seed, device=cell.device
    )
    seconds = found.cpu_seconds if cell.device.type == "cpu" else found.seconds
    return Outcome(
        {"events": float(len(short.chronological_split(*split)[0]))},
        model.memory_bytes(),
        {"step": seconds / found.steps, "train": seconds, "all": time.perf_counter() - start},
    )


def told(scores: Scores) -> dict[str, float]:
    """The finite figures of a test."""
    named = {
        "ap": scores.ap, "ap a batch": scores.ap_batches, "auroc": scores.auroc, "mrr": scores.mrr,
        "inductive ap": scores.inductive_ap,
    }  # fmt: skip
    return {name: value for name, value in named.items() if math.isfinite(value)}
