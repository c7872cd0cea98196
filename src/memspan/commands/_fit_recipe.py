"""``memspan fit --data``: train what fits on the user's own data, and show what each byte buys.

Plain training, where it fits, and every combination of methods that no other beats are trained with their
largest batch, up to the one wanted, for the same number of steps, beside the same model untrained. The part
held out is used once, at the end; it ranks what was trained: by quality as measured, then by bytes, then by
seconds.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memspan import data
from memspan.base import refuse
from memspan.base.rng import rng
from memspan.ledger import Budget, Candidate, Fit, Ledger
from memspan.ledger.step import batch_size, loss_of, mapped
from memspan.recipes.engine import Cell, Measurements, Outcome, Recipe, Task, option
from memspan.report import claim
from memspan.report.figures import Figure, Lines, Series
from memspan.report.schema import Claim, Measurement
from memspan.report.stats import Interval

__all__ = ["Examples", "examples_for", "fit_recipe"]

_PAPER = "none: the planner's own promise"


@dataclass(frozen=True)
class Examples:
    """A user's data in the form of the model's batch.

    Attributes:
        train: like the example batch, with all examples for training.
        test: likewise, held out.
        labelled: whether the last tensor (``labels`` of a mapping) holds classes.
        note: what was done to the data.
    """

    train: Any
    test: Any
    labelled: bool
    note: str = ""


@dataclass(frozen=True)
class Options:
    """What a run can change."""

    steps: int = option(100, "training steps of each method", unit="steps", minimum=2)


def examples_for(batch: Any, found: data.ImageSet | Any, *, classes: int | None = None) -> Examples:
    """The user's data shaped as the model's example batch.

    Args:
        batch: of the model: a tuple (inputs, target), or a mapping whose last entry is the target.
        found: what :func:`memspan.data.read` gave: images, text, a table with a target, or
            arrays ``x`` and ``y``.
        classes: classes that the model tells apart, where that is known.

    Raises:
        BadInput: data of another kind or shape than the model takes.
    """
    inputs = _inputs(batch)
    if isinstance(found, data.TextSet):
        return _of_text(batch, inputs, found)
    if isinstance(found, data.TableSet) and not inputs.is_floating_point():
        return _of_rows(batch, inputs, found, classes)
    if isinstance(found, data.ImageSet):
        parts = [(found.x_train, found.y_train), (found.x_test, found.y_test)]
        tensors = [_pixels(x, inputs) for x, _ in parts]
    elif isinstance(found, data.TableSet):
        if found.target is None:
            refuse("data", found.name, "name the column to be predicted: --target COLUMN")
        x, y = _columns(found, found.target)
        parts, tensors = _halves(x, y)
    else:
        arrays = getattr(found, "arrays", {})
        x, y = arrays.get("x", arrays.get("X")), arrays.get("y")
        if x is None or y is None:
            refuse("data", found.name, f"arrays x and y are needed; it holds {', '.join(arrays) or 'none'}")
        parts, tensors = _halves(np.asarray(x, dtype=np.float32), np.asarray(y))
    if tensors[0].shape[1:] != inputs.shape[1:]:
        seen, takes = tuple(tensors[0].shape[1:]), tuple(inputs.shape[1:])
        refuse("data", found.name, f"an example has shape {seen}; the model takes {takes}")
    labels = [torch.from_numpy(np.asarray(y)) for _, y in parts]
    target = _target(batch)
    labelled = not target.is_floating_point()
    if labelled and classes is not None and int(max(one.max() for one in labels)) >= classes:
        refuse("data", found.name, f"it has more classes than the {classes} of the model")
    shaped = [
        _like(batch, x, y.to(target.dtype).reshape(-1, *target.shape[1:]))
        for x, y in zip(tensors, labels, strict=True)
    ]
    return Examples(shaped[0], shaped[1], labelled)


def fit_recipe(model: str, found: Fit, examples: Examples, source: Any, steps: int) -> Recipe[Options]:
    """A recipe that trains the front of a fit on the user's data."""
    plain = next(item for item in found.candidates if not item.methods)
    others = [item for item in found.front if item not in (found.best, plain)][:4]
    chosen = [*([plain] if plain.batch else []), *([found.best] if found.best is not plain else []), *others]
    options = Options(steps=steps)

    def run(task: Task[Options]) -> None:
        task.use(source)
        if examples.note:
            task.note(examples.note)
        task.expect(len(chosen) + 1)
        for item in [None, *chosen]:
            candidate = item if item is not None else chosen[0]
            assert candidate is not None
            work = functools.partial(
                _train, candidate=candidate, examples=examples, most=found.wanted,
                steps=0 if item is None else task.options.steps,
            )  # fmt: skip
            task.measure(method=candidate.name if item is not None else "untrained", seed=0, work=work)
        if not plain.batch:
            task.note(
                f"plain training does not fit {found.budget}: it takes {Budget(plain.smallest)} at least"
            )
        task.note(_ranking(task.measurements))

    return Recipe(
        name="fit", title=f"{model} within {found.budget}", paper="none: your own model and data",
        room="ledger", component="memspan.ledger.fit", problem="train my model within my memory",
        answer="the methods that fit, and the quality that their bytes buy", quick_cost="as the steps take",
        options=Options, quick=options, full=options, run=run,
        judge=functools.partial(_judge, budget=found.budget), figures=_figures,
        control="untrained", seeds=(1, 1), extras=("recipes",),
    )  # fmt: skip


def _train(cell: Cell, candidate: Candidate, examples: Examples, steps: int, most: int) -> Outcome:
    """Train one candidate on shuffled batches; the bytes are those of its second step."""
    one = candidate.job
    assert one is not None
    torch.manual_seed(0)
    model, optimizer = one.ready()
    count = batch_size(examples.train)
    size = min(candidate.batch, most, count)
    order = rng("fit", "order").permutation(count)
    held: dict[str, int] = {}
    quality: dict[str, float] = {}
    with cell.timed("train"):
        for step in range(steps):
            rows = torch.from_numpy(np.take(order, range(step * size, (step + 1) * size), mode="wrap"))
            batch = _rows(examples.train, rows, one.home)
            model.train()
            if step != 1:
                one.step(model, optimizer, batch)
            else:
                with Ledger(model, optimizer) as led:
                    one.step(model, optimizer, batch)
                held = dict(led.peak.by_category)
                quality["planned"] = float(one.predict(size).total)
                quality["measured"] = float(led.peak.total)
            cell.step(step + 1, steps, "training")
    with cell.timed("evaluate"):
        quality.update(_scores(model, examples, one.loss, size, one.home))
    if not held:
        held = {"parameters": sum(p.numel() * p.element_size() for p in model.parameters())}
    quality["batch"] = float(size)
    # What the optimizer holds, not what has a gradient now: a method may train other layers in each step.
    groups = optimizer.param_groups if steps and optimizer is not None else []
    trained = sum(one.numel() for group in groups for one in group["params"])
    return Outcome(quality, held, trained=trained)


@torch.no_grad()
def _scores(model: nn.Module, examples: Examples, loss: Any, size: int, home: str) -> dict[str, float]:
    model.eval()
    total = right = seen = 0.0
    count = batch_size(examples.test)
    for start in range(0, count, size):
        rows = torch.arange(start, min(start + size, count))
        batch = _rows(examples.test, rows, home)
        total += float(loss_of(model, batch, loss)) * len(rows)
        if examples.labelled and _target(batch).dim() == 1:
            inputs = {k: v for k, v in batch.items() if k != "labels"} if isinstance(batch, Mapping) else None
            output = model(**inputs) if inputs is not None else model(*batch[:-1])
            logits = getattr(output, "logits", output)
            if isinstance(logits, Tensor) and logits.dim() == 2:
                right += float((logits.argmax(1) == _target(batch)).sum())
                seen += len(rows)
    scores = {"held-out loss": total / count}
    if seen:
        scores["accuracy"] = right / seen
    return scores


def _judge(found: Measurements, options: Options, budget: Budget) -> list[Claim]:
    trained = [one for one in found if "measured" in one.quality]
    errors = [100 * (one.quality["planned"] / one.quality["measured"] - 1) for one in trained]
    peaks = [one.quality["measured"] for one in trained]
    span = Interval(max(errors, key=abs), min(errors), max(errors), len(errors))
    held = Interval(max(peaks), min(peaks), max(peaks), len(peaks))
    return [
        claim("each step was planned within 1 %", _PAPER, span, "in [-1, 1]", "%", exact=True),
        claim("every step stayed within the budget", _PAPER, held, f"<= {budget.bytes}", "bytes", exact=True),
    ]


def _ranking(found: Measurements) -> str:
    """What is best on the part held out, and by which figure."""
    metric = _metric(found)
    sign = 1 if metric == "held-out loss" else -1

    def rank(one: Measurement) -> tuple[float, int, float]:
        return (sign * one.quality[metric], sum(one.bytes.values()), sum(one.seconds.values()))

    order = [one.method for one in sorted(found, key=rank) if "measured" in one.quality]
    return f"ranked by {metric} as measured, then bytes, then seconds: {', '.join(order)}"


def _metric(found: Measurements) -> str:
    return "accuracy" if all("accuracy" in one.quality for one in found) else "held-out loss"


def _figures(found: Measurements, options: Options) -> list[Figure]:
    metric = _metric(found)
    points = {one.method: Series([sum(one.bytes.values())], [one.quality[metric]]) for one in found}
    return [Lines("What the bytes buy", "bytes at the peak of a step", metric, points, x_unit="bytes")]


def _of_text(batch: Any, inputs: Tensor, found: data.TextSet) -> Examples:
    if inputs.is_floating_point() or inputs.dim() != 2 or _target(batch).shape != inputs.shape:
        refuse("data", found.name, "text without labels trains models that continue it; this one does not")
    length = inputs.shape[1]
    names = list(found.parts)
    text = found.text(names[0]).encode()
    held = found.text(names[1]).encode() if len(names) > 1 else b""
    if not held:
        cut = max(len(text) * 9 // 10, 1)
        text, held = text[:cut], text[cut:]
    pieces = [_cut(part, length) for part in (text, held)]
    if not all(map(len, pieces)):
        refuse(
            "data", found.name, f"it is too short for one sequence of {length} bytes to train, one to test"
        )
    shifted = not isinstance(
        batch, Mapping
    )  # a tuple's target is the next token; transformers shift by themselves
    shaped = [_like(batch, rows[:, :-1], rows[:, 1:] if shifted else rows[:, :-1]) for rows in pieces]
    return Examples(shaped[0], shaped[1], False, "tokens are the text's bytes")


def _of_rows(batch: Any, inputs: Tensor, found: data.TableSet, classes: int | None) -> Examples:
    """Rows of a table for a model of text that labels: the bytes of the columns but the target are tokens."""
    target = _target(batch)
    if inputs.dim() != 2 or target.dim() != 1:
        refuse("data", found.name, "rows of a table train models of text that label; this one does not")
    if found.target is None:
        refuse("data", found.name, "name the column to be predicted: --target COLUMN")
    columns = [values for name, values in found.columns.items() if name != found.target]
    rows = [" ".join(map(str, values)).encode()[: inputs.shape[1]] for values in zip(*columns, strict=True)]
    ids = np.zeros((len(rows), inputs.shape[1]), np.int64)
    for row, text in zip(ids, rows, strict=True):
        row[: len(text)] = list(text)
    wanted = found.columns[found.target]
    labels = np.unique(wanted, return_inverse=True)[1] if wanted.dtype == object else wanted
    if classes is not None and int(labels.max()) >= classes:
        refuse("data", found.name, f"it has more classes than the {classes} of the model")
    parts, _ = _halves(ids, labels)
    shaped = [_like(batch, torch.from_numpy(x), torch.from_numpy(y).to(target.dtype)) for x, y in parts]
    return Examples(shaped[0], shaped[1], True, "tokens are the bytes of each row's columns")


def _cut(text: bytes, length: int) -> Tensor:
    count = max(len(text) - 1, 0) // length
    ids = torch.tensor(list(text[: count * length + 1]), dtype=torch.long)
    return torch.stack([ids[i * length : (i + 1) * length + 1] for i in range(count)]) if count else ids[:0]


def _pixels(x: Any, inputs: Tensor) -> Tensor:
    pixels = torch.from_numpy(np.asarray(x)).float() / 255
    pixels = pixels.permute(0, 3, 1, 2) if pixels.dim() == 4 else pixels.unsqueeze(1)
    if inputs.dim() == 2:
        return pixels.flatten(1)
    if inputs.dim() != 4:
        refuse("data", f"images of {tuple(pixels.shape[1:])}", f"the model takes {tuple(inputs.shape[1:])}")
    if pixels.shape[1] == 1:
        pixels = pixels.expand(-1, inputs.shape[1], -1, -1)
    if pixels.shape[2:] != inputs.shape[2:]:
        pixels = F.interpolate(pixels, size=tuple(inputs.shape[2:]), mode="bilinear", antialias=True)
    return pixels.contiguous()


def _columns(found: data.TableSet, target: str) -> tuple[Any, Any]:
    """Numbers standardised, words as one column each; a target of words as classes."""
    made: list[Any] = []
    for name, values in found.columns.items():
        if name == target:
            continue
        if values.dtype == object:
            made.extend((values == word).astype(np.float32) for word in sorted(set(values)))
        else:
            spread = values.std() or 1.0
            made.append(((values - values.mean()) / spread).astype(np.float32))
    wanted = found.columns[target]
    return np.stack(made, axis=1), np.unique(wanted, return_inverse=True)[
        1
    ] if wanted.dtype == object else wanted


def _halves(x: Any, y: Any) -> tuple[list[tuple[Any, Any]], list[Tensor]]:
    """Four fifths to train, one to test."""
    order = rng("fit", "split").permutation(len(x))
    cut = max(len(x) // 5, 1)
    parts = [(x[rows], y[rows]) for rows in (order[cut:], order[:cut])]
    if not all(len(one) for one, _ in parts):
        refuse("data", f"{len(x)} examples", "give two or more")
    return parts, [torch.from_numpy(np.ascontiguousarray(one)) for one, _ in parts]


def _inputs(batch: Any) -> Tensor:
    first: Any = next(iter(batch.values())) if isinstance(batch, Mapping) else batch[0]
    return _tensor(first)


def _target(batch: Any) -> Tensor:
    last: Any = [*batch.values()][-1] if isinstance(batch, Mapping) else batch[-1]
    return _tensor(last)


def _tensor(value: Any) -> Tensor:
    if not isinstance(value, Tensor) or not value.dim():
        refuse("batch", type(value).__name__, "training needs a batch of inputs and a target, both tensors")
    return value


def _like(batch: Any, x: Tensor, y: Tensor) -> Any:
    if isinstance(batch, Mapping):
        names = list(batch)
        if len(names) != 2:
            refuse("batch", names, "training needs a batch of inputs and a target alone")
        return {names[0]: x, names[1]: y}
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        refuse("batch", type(batch).__name__, "training needs a batch (inputs, target)")
    return (x, y)


def _rows(examples: Any, rows: Tensor, home: str) -> Any:
    return mapped(examples, lambda tensor: tensor[rows].to(home))
