"""One training step of each model and method, predicted before it runs, and counted twice while it does."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from memspan import data
from memspan.base import BadInput
from memspan.ledger import Ledger, methods, rules_of_thumb
from memspan.ledger.job import Job
from memspan.ledger.planner import job
from memspan.recipes.engine import Cell, Outcome, Task, option

from .models import ModelCase, classify, model_cases


@dataclass(frozen=True)
class Options:
    """What a run can change."""

    models: tuple[str, ...] = option((), "models by name; none: all")
    scale: int = option(1, "batches are this many times the usual", unit="x", minimum=1)
    everything: bool = option(False, "also every optimizer on every model, every method on the largest")
    tokens: int = option(128, "length of the sequences", unit="tokens", minimum=2, maximum=128)


LARGEST, SOME = "EfficientNet-Lite0", ("plain", "checkpoint", "autocast", "linear_probe")
OPTIMIZED = ("MLP", "GPT")  # an optimizer holds what it holds whatever the layers
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"accumulate": 2},
    "SGD": {"optimizer": functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9)},
    "SGD foreach": {"optimizer": functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9, foreach=True)},
    "Adam foreach": {"optimizer": functools.partial(torch.optim.Adam, foreach=True)},
}


def run(task: Task[Options]) -> None:
    """Measure every model under plain training, under other optimizers, and under every registered method."""
    o = task.options
    images = task.use(data.load_first(("cifar10-jpeg", "digits"), data.ImageSet))
    text = _text(task)
    known = model_cases()
    chosen = [case for case in known if not o.models or case.name in o.models]
    unknown = set(o.models) - {case.name for case in known}
    if unknown:
        raise BadInput("models", sorted(unknown), f"choose from {', '.join(case.name for case in known)}")
    ways = {**WAYS, **{name: {"method": name} for name in methods()}}
    for case in chosen:
        refused = []
        batch = batch_of(case, case.batch * o.scale, o.tokens, images.x_train, images.y_train, text)
        for name, way in ways.items():
            if not o.everything and (
                name not in SOME
                if case.name == LARGEST
                else name in WAYS and name != "plain" and case.name not in OPTIMIZED
            ):
                continue
            one = job(case.build, batch, loss=classify, device=task.device.type, **way)
            try:
                one.ready()
            except BadInput:
                refused.append(name)
                continue
            work = functools.partial(measure, one=one, size=case.batch * o.scale)
            for seed in task.seeds:
                task.measure(method=name, seed=seed, setting={"model": case.name}, work=work)
        if refused:
            task.note(f"{case.name} on one rank does not take {', '.join(refused)}")


def measure(cell: Cell, one: Job, size: int) -> Outcome:
    """Predicted, counted and allocated bytes of one job's second step."""
    with cell.timed("predict"):
        planned = one.trace(size)
    model, optimizer = one.ready()
    model.train()
    batch = one.real_batch()
    one.step(model, optimizer, batch)
    # One step for both accounts: a method may train other layers in the next.
    led = Ledger(model, optimizer, inputs=batch, allocator=True)
    with cell.timed("step under the ledger"), led:
        one.step(model, optimizer, batch)
    peak = led.peak
    counted, allocated = peak.attributed, peak.total
    quality = {
        "predicted": float(planned.total),
        "counted": float(counted),
        "allocated": float(allocated),
        "error to ledger": planned.total / counted - 1,
        "error to allocator": planned.total / allocated - 1,
        "counted, error to allocator": counted / allocated - 1,
    }
    for rule, guess in rules_of_thumb(planned.parameters).items():
        quality[f"{rule}, over allocated"] = guess / allocated
    held = {name: max(0, size) for name, size in peak.by_category.items()}
    return Outcome(quality, held, trained=planned.trained)


def batch_of(case: ModelCase, size: int, tokens: int, x: Any, y: Any, text: Tensor) -> tuple[Tensor, Tensor]:
    """A batch of the case's kind from real images or text, repeated where there are not enough."""
    rows = np.arange(size) % len(x)
    labels = torch.from_numpy(y[rows]) % 10
    if case.kind in ("next", "text"):
        pieces = text[: size * tokens + 1].repeat(1 + size * tokens // len(text))
        inputs = pieces[: size * tokens].view(size, tokens).clone()
        return inputs, (
            pieces[1 : size * tokens + 1].view(size, tokens).clone() if case.kind == "next" else labels
        )
    pixels = torch.from_numpy(x[rows]).float() / 255
    pixels = pixels.permute(0, 3, 1, 2) if pixels.ndim == 4 else pixels.unsqueeze(1)
    side = 16 if case.kind == "flat" else 32
    pixels = F.interpolate(pixels, size=(side, side), mode="bilinear")
    if case.kind == "flat":
        return pixels.mean(dim=1).flatten(1).contiguous(), labels
    pixels = pixels.expand(-1, 3, -1, -1).contiguous()
    if case.kind == "pixels":
        return pixels, (pixels.mean(dim=1) * 3.999).long()
    return pixels, labels


def _text(task: Task[Options]) -> Tensor:
    """Characters as numbers; without the text, the images' labels stand in and a note says so."""
    try:
        source = task.use(data.load_first(("tiny-shakespeare", "wikipedia-pages"), data.TextSet))
        content = "\n".join(part for parts in source.parts.values() for part in parts)[:100_000]
    except data.DataNotFound as error:
        task.note(f"numbers stand in for text, since bytes do not depend on it: {error}")
        return torch.arange(10_000) % 97
    return torch.tensor([ord(letter) % 1000 for letter in content])
