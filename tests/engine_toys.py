"""A recipe of one second for tests of the engine and the command line: checkpoints and random draws."""

from __future__ import annotations

from pathlib import Path

TOY = '''
"""A toy."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch

from memspan.ledger.bytes import Budget
from memspan.recipes.engine import Cell, Measurements, Outcome, Recipe, Task, option
from memspan.report.schema import Claim

HOOKS = []  # called as hook(place, cell) by tests


@dataclass(frozen=True)
class Options:
    epochs: int = option(2, "passes", unit="epochs", minimum=1)
    rate: float = option(0.5, "step size", maximum=4)
    kind: Literal["plain", "other"] = option("plain", "what is drawn")
    sizes: tuple[Budget, ...] = option(("1KiB",), "budgets", unit="bytes")
    file: Path | None = option(None, "your own data")
    fast: bool = option(False, "hurry")


def work(cell: Cell, options: Options, task: Task[Options]) -> Outcome:
    task.use(SimpleNamespace(name="drawn", source="by seed", sha256="0" * 64))
    task.note(f"{cell.method} was measured")
    x, start = torch.zeros(3), 0
    if (found := cell.load()) is not None:
        x, start = found[0]["x"], found[1]["epoch"]
    for epoch in range(start, options.epochs):
        with cell.timed("train"):
            x = x + options.rate * torch.rand(3) + float(np.random.rand()) + random.random()
        cell.save({"x": x}, {"epoch": epoch + 1})
        cell.step(epoch + 1, options.epochs, "epoch")
        for hook in HOOKS:
            hook("checkpoint", cell)
    if cell.method == "ours":
        cell.keep({"x": x})
    return Outcome({"accuracy": float(x.mean())}, {"parameters": 12}, series={"x": x.tolist()})


def run(task: Task[Options]) -> None:
    task.expect(2 * len(task.seeds))
    for seed in task.seeds:
        for method in ("ours", "nothing"):
            for size in task.options.sizes:
                setting = {"budget": size, "between": float(torch.rand(1))}
                task.measure(
                    method=method, seed=seed, setting=setting,
                    work=lambda cell: work(cell, task.options, task),
                )
                for hook in HOOKS:
                    hook("cell", None)


def judge(found: Measurements, options: Options) -> list[Claim]:
    value = found.where(method="ours").values("accuracy")[0]
    holds = options.kind == "plain"
    return [Claim(text="it works", paper="P", measured=value, unit="points", holds=holds, why="kind")]


RECIPE = Recipe(
    name="toy", title="Toy: a recipe for tests", paper="None, 2024", room="base",
    component="memspan.base.nearest",
    problem="test the engine", answer="one second", quick_cost="1 s", options=Options, quick=Options(),
    full=Options(epochs=3), run=run, judge=judge, control="nothing", seeds=(1, 2), takes_budget=True,
)
'''


def write_toy(folder: Path, name: str = "toy.py") -> Path:
    """The toy recipe as a file."""
    path = folder / name
    path.write_text(TOY)
    return path
