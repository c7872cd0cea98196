"""Every method at every budget over the same streams of classes: what each pays, and how well it answers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from memspan import data
from memspan.base import BadInput
from memspan.continual import memo, nets
from memspan.continual.analysis import layer_drift
from memspan.ledger import Budget
from memspan.recipes.engine import Cell, Outcome, Task, option


@dataclass(frozen=True)
class Options:
    """What a run can change."""

    images: Literal["first", "digits", "fashion-mnist", "cifar10-jpeg"] = option(
        "first", "image set; first takes fashion-mnist where it is at hand, else digits"
    )
    per_class: int = option(400, "training images of each class at most", unit="images", minimum=20)
    steps: int = option(30, "optimization steps of each task, equal for all methods", unit="steps", minimum=1)
    epochs: int = option(0, "passes over a task's data in place of steps; 0 uses steps", unit="epochs")
    batch_size: int = option(64, "images a step", unit="images", minimum=2)
    width: int = option(
        0, "channels of the network's first stage; 0: 2 for digits, 8 for other images", unit="channels"
    )
    stem_stride: int = option(2, "of the first convolution, above 8 x 8 pixels", minimum=1, maximum=2)
    budgets: tuple[Budget, ...] = option((), "budgets; none: computed from network and images", unit="bytes")
    points: int = option(2, "budgets to compute", minimum=2)
    rivals: Literal["few", "some", "all"] = option(
        "some", "few: Replay, iCaRL, expandable, MEMO; all adds BiC and MEMO without weight alignment"
    )


BOUNDS = {"never update": memo.NeverUpdate, "finetune": memo.Finetune, "joint": memo.Joint}
ONE_NETWORK = {"Replay": memo.Replay, "iCaRL": memo.ICaRL, "WA": memo.WA, "BiC": memo.BiC}
METHODS: dict[str, Callable[..., memo.TaskLearner]] = {
    **ONE_NETWORK,
    "Replay, JPEG": partial(memo.Replay, codec="jpeg:75"),
    "expandable": memo.ExpandableRepresentation,
    "MEMO": memo.MEMOClassifier,
    "MEMO, base frozen": partial(memo.MEMOClassifier, train_base=False),
    "MEMO, nearest mean": partial(memo.MEMOClassifier, reading="nearest_mean"),
    "MEMO, not aligned": partial(memo.MEMOClassifier, alignment=False),
}
FEW = ("Replay", "iCaRL", "expandable", "MEMO")


def run(task: Task[Options]) -> None:
    """Measure every method at every budget, over as many class orders as there are seeds."""
    o = task.options
    images = data.load_first(
        ("fashion-mnist", "digits") if o.images == "first" else (o.images,), data.ImageSet
    )
    images = task.use(images.subset(min(o.per_class, int(np.bincount(images.y_train).min())), seed=0))
    shape, classes = images.x_train.shape[1:], len(images.classes)
    tasks, small = classes // 2, shape[0] <= 8
    torch.manual_seed(0)
    channels, width = (*shape, 1)[2], o.width or (2 if small else 8)
    network = nets.SmallResNet(1, channels, (width, 2 * width, 4 * width), 1 if small else o.stem_stride)
    steps = o.epochs * -(-len(images.x_train) // tasks // o.batch_size) if o.epochs else o.steps
    common: dict[str, Any] = {
        "horizon": (tasks, classes),
        "batch_size": o.batch_size,
        "device": str(task.device),
    }
    budgets = [b.bytes for b in ([task.budget] if task.budget else o.budgets)]
    budgets = budgets or memo.aligned_budgets(network, images.x_train, (tasks, classes), o.points)
    left_out = {"few": set(METHODS) - set(FEW), "some": {"BiC", "MEMO, not aligned"}}
    chosen = [name for name in METHODS if name not in left_out.get(o.rivals, ())]
    for budget in budgets:  # Replay holds the least: what cannot pay for it pays for nothing
        memo.Replay(network, budget, **common).afford(images.x_train[:1])
    for seed in task.seeds:
        stream = data.class_tasks(images, per_task=2, seed=seed)
        again: dict[str, Any] = common | {"seed": seed}

        def measure(
            name: str, make: Callable[[], memo.TaskLearner], budget: int | None, **setting: Any
        ) -> None:
            work = partial(cell_work, make=make, stream=stream, budget=budget)  # noqa: B023
            setting |= {} if budget is None else {"budget": budget}
            try:
                make().afford(images.x_train[:1])
                task.measure(method=name, seed=seed, setting=setting, work=work)  # noqa: B023
            except BadInput as error:  # what a budget cannot pay for is a note
                if error.argument != "budget":
                    raise
                task.note(f"{name} does not fit {Budget(budget or 0)}: {error.remedy}")

        for name, kind in BOUNDS.items():
            measure(name, partial(kind, network, steps=steps, **again), None)
        for budget in budgets:
            for name in chosen:
                make = partial(METHODS[name], network, budget, **again)
                for align in ("final", "always") if name in ("expandable", "MEMO") else ("final",):
                    measure(
                        name,
                        partial(make, steps=steps, align=align),
                        budget,
                        align=align,
                        table="equal steps",
                    )
                if budget == budgets[-1] and name in ("iCaRL", "WA", "expandable", "MEMO"):
                    cost = [
                        sum(kind.step_flops(b, 2 * b, shape) for b in range(1, tasks + 1))
                        for kind in (make(), memo.Replay(network, batch_size=o.batch_size))
                    ]
                    fewer = partial(make, steps=max(1, round(steps * cost[1] / cost[0])), align="final")
                    measure(name, fewer, budget, align="final", table="equal compute")
        frozen = frozen_features(task) if o.rivals != "few" else None
        if frozen is not None:
            measure("frozen features", partial(frozen, **again), None)
    task.note("align: expanding methods run twice; one network grows by head rows alone, so it runs once.")


def cell_work(cell: Cell, make: Callable[[], memo.TaskLearner], stream: Any, budget: int | None) -> Outcome:
    """One learner over the stream, saved after each task."""
    learner, start, layers = make(), None, []
    if (saved := cell.load()) is not None:
        learner.load_state_dict(saved[0])
        start, layers = memo.StreamRun.from_json(saved[1]["run"]), saved[1]["layers"]
    nets_after = [copy.deepcopy(learner.net_.blocks[0])] if start else []
    probe = memo.to_input(np.concatenate([part.x_test[:40] for part in stream]), cell.device)

    def after_task(so_far: memo.StreamRun) -> None:
        if cell.method == "Replay":
            nets_after.append(copy.deepcopy(learner.net_.blocks[0]))
        if len(nets_after) > 1:
            moved = layer_drift(nets_after[-2], nets_after[-1], [probe], ["stage1", "stage2", "stage3"])
            layers.append({name: part.cka for name, part in moved.items()})
        cell.save(learner.state_dict(), {"run": so_far.to_json(), "layers": layers})
        cell.step(len(so_far.accuracy), len(stream), f"task {len(so_far.accuracy)}")

    with cell.timed("stream"):
        result = memo.run_stream(learner, stream, budget=budget, start=start, after_task=after_task)
    quality = {"average_accuracy": result.average, "last_accuracy": result.last}
    series = {"accuracy": result.accuracy, "bytes": [sum(held.values()) for held in result.bytes]}
    series |= {f"cka.{name}": [layer[name] for layer in layers] for name in (layers or [{}])[0]}
    quality["first_task_at_end"] = result.per_task[-1][0]
    # Every part of a network was trained in some task; nearest means of frozen features train nothing.
    still = isinstance(learner, memo.SimpleNCM)
    trained = 0 if still else sum(p.numel() for p in learner.net_.parameters())
    return Outcome(quality, result.bytes[-1], series=series, trained=trained)


class Pooled(torch.nn.Module):
    """A pretrained network without its classifier."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        network.classifier = torch.nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pooled features (N, d)."""
        return self.network.pooled(x)  # type: ignore[no-any-return]


def frozen_features(task: Task[Options]) -> Callable[..., memo.TaskLearner] | None:
    """Nearest mean of frozen, pretrained features, whatever the backbone holds; None without extra vision."""
    try:
        known = data.backbone("efficientnet-lite0", size=64)
    except (ImportError, data.DataNotFound) as error:
        task.note(f"frozen features are absent: {error}")
        return None

    def transform(x: torch.Tensor) -> torch.Tensor:
        assert known.transform is not None
        return known.transform(x.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).cpu().numpy()).to(x.device)

    return partial(memo.SimpleNCM, Pooled(known.module), transform=transform)
