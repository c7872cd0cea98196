"""The bench: any class-incremental learner, over a stream, at aligned byte budgets.

Every byte that survives between two tasks is paid for. What a learner says it holds is checked against a walk
over its attributes, so that data kept aside counts as well. Measures of the paper: average incremental
accuracy (mean over tasks of the accuracy on all classes so far), last accuracy, area under accuracy against
bytes, and accuracy per MiB (APM) (A Model or 603 Exemplars, ICLR 2023, section 5).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from torch import Tensor, nn

from memspan.base import BadInput, refuse
from memspan.base.parallel import spread
from memspan.continual.memo.learners import ExpandableRepresentation, MEMOClassifier, Replay
from memspan.data import ClassTask
from memspan.ledger import Budget
from memspan.ledger.bytes import reached, storages
from memspan.report.frontier import Frontier

__all__ = [
    "Learner",
    "StreamRun",
    "Sweep",
    "aligned_budgets",
    "apm",
    "area",
    "budget_sweep",
    "held_bytes",
    "run_stream",
]

# A walk sees a few Python numbers and index arrays that a learner need not account for.
_SLACK = 4096


class Learner(Protocol):
    """What the bench needs of a learner; the learners of this package and the user's own have it."""

    def partial_fit_task(self, X: Any, y: Any = None) -> Any:
        """Learn one task."""

    def predict(self, X: Any) -> Any:
        """Labels of images."""

    def memory_bytes(self) -> dict[str, int]:
        """Bytes held by category."""


@dataclass(frozen=True)
class StreamRun:
    """One learner's way through a stream.

    Attributes:
        accuracy: after each task, on the test images of all classes so far; between 0 and 1.
        per_task: ``per_task[b][a]`` is the accuracy on task a's test images after task b.
        bytes: held after each task, by category.
    """

    accuracy: tuple[float, ...]
    per_task: tuple[tuple[float, ...], ...]
    bytes: tuple[dict[str, int], ...]

    @property
    def average(self) -> float:
        """Average incremental accuracy Ā."""
        return float(np.mean(self.accuracy))

    @property
    def last(self) -> float:
        """Accuracy after the last task."""
        return self.accuracy[-1]

    def to_json(self) -> dict[str, Any]:
        """The run as JSON values."""
        return {"accuracy": self.accuracy, "per_task": self.per_task, "bytes": self.bytes}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> StreamRun:
        """What :meth:`to_json` gave."""
        rows = tuple(tuple(row) for row in saved["per_task"])
        return cls(tuple(saved["accuracy"]), rows, tuple(dict(held) for held in saved["bytes"]))


def run_stream(
    learner: Learner,
    tasks: Sequence[ClassTask],
    *,
    budget: int | None = None,
    start: StreamRun | None = None,
    after_task: Callable[[StreamRun], None] | None = None,
) -> StreamRun:
    """Teach a learner task after task, and test it after each on all classes so far.

    Args:
        learner: see :class:`Learner`.
        tasks: the stream, e.g. of :func:`memspan.data.class_tasks`.
        budget: bytes that the learner may hold after any task; None does not check.
        start: the run so far of a learner that has learned its first tasks already.
        after_task: called with the run so far, e.g. to save it.

    Raises:
        BadInput: an empty stream, or a learner that holds more than its budget, in its own account or in a
            walk over its attributes.
    """
    if not tasks:
        refuse("tasks", tasks, "give at least one task")
    run = start or StreamRun((), (), ())
    for b in range(len(run.accuracy), len(tasks)):
        learner.partial_fit_task(tasks[b].x_train, tasks[b].y_train)
        right = [np.asarray(learner.predict(task.x_test)) == task.y_test for task in tasks[: b + 1]]
        held = dict(learner.memory_bytes())
        most = max(sum(held.values()), held_bytes(learner) - _SLACK)
        if budget is not None and most > budget:
            refuse(
                "learner",
                type(learner).__name__,
                f"it holds {most} bytes after task {b + 1} on a budget of {budget}: pay for all that is kept",
            )
        run = StreamRun(
            (*run.accuracy, float(np.concatenate(right).mean())),
            (*run.per_task, tuple(float(part.mean()) for part in right)),
            (*run.bytes, held),
        )
        if after_task is not None:
            after_task(run)
    return run


def held_bytes(thing: object) -> int:
    """Bytes of all tensors, arrays, modules and byte strings that an object's attributes reach.

    The values of its ``get_params()`` are the user's, not the learner's, and are left out.

    Example:
        >>> class Hoarder:
        ...     def __init__(self):
        ...         self.aside = {"images": [np.zeros(100, np.uint8)]}
        >>> held_bytes(Hoarder())
        100
    """
    params = thing.get_params() if hasattr(thing, "get_params") else {}
    held: dict[int, int] = {}
    for item in reached(thing, objects=64, besides=params.values()):
        if isinstance(item, Tensor):
            held |= {storage._cdata: storage.nbytes() for storage in storages(item)}
        elif isinstance(item, bytes | bytearray | memoryview):
            held[id(item)] = memoryview(item).nbytes
        elif isinstance(item, np.ndarray):
            while isinstance(item.base, np.ndarray):
                item = item.base
            held[id(item)] = item.nbytes
    return sum(held.values())


@dataclass(frozen=True)
class Sweep:
    """Runs by method and budget; None where the budget cannot pay for the method."""

    runs: Mapping[str, Mapping[int, StreamRun | None]]

    def points(self, measure: Literal["average", "last"] = "average") -> dict[str, list[tuple[int, float]]]:
        """(budget in bytes, accuracy) of the runs that fit, by method."""
        return {
            name: [(budget, getattr(run, measure)) for budget, run in sorted(runs.items()) if run is not None]
            for name, runs in self.runs.items()
        }

    def area(
        self,
        measure: Literal["average", "last"] = "average",
        *,
        scale: Literal["linear", "log"] = "linear",
        normalize: bool = False,
    ) -> dict[str, float]:
        """AUC-A ("average") or AUC-L ("last") of every method that fits at two budgets or more."""
        curves = self.points(measure).items()
        return {
            name: area(curve, scale=scale, normalize=normalize) for name, curve in curves if len(curve) > 1
        }

    def apm(
        self, measure: Literal["average", "last"] = "average", at: Literal["smallest", "largest"] = "smallest"
    ) -> dict[str, float]:
        """Accuracy per MiB at the smallest (APM-S) or largest (APM-E) budget that a method fits."""
        return {name: apm(curve, at=at) for name, curve in self.points(measure).items() if curve}


def budget_sweep(
    learners: Sequence[Callable[..., Learner]] | Mapping[str, Callable[..., Learner]],
    tasks: Sequence[ClassTask],
    budgets: Sequence[Budget | str | int],
    *,
    jobs: int = 1,
    **options: Any,
) -> Sweep:
    """Run every learner over the stream at every budget.

    Args:
        learners: classes or factories, called as ``factory(budget=bytes, **options)``; by name, or named
            after themselves.
        tasks: the stream.
        budgets: bytes.
        jobs: processes that share the runs; see :func:`~memspan.base.parallel.spread`.
        **options: for every learner. With ``horizon=(tasks, classes)`` those of this package refuse a
            budget that cannot pay for the last task before they learn the first.

    Raises:
        BadInput: no learner or budget, or a learner that holds more than it may. A learner that refuses a
            budget (``BadInput`` naming ``budget``) does not fit: its run is None.

    Example:
        >>> from memspan.continual.memo import SimpleNCM
        >>> images = np.stack([np.full((4, 4), value, np.uint8) for value in (0, 10, 240, 255)])
        >>> labels = np.array([0, 0, 1, 1])
        >>> tasks = [ClassTask((0, 1), images, labels, images, labels)]
        >>> sweep = budget_sweep([SimpleNCM], tasks, [8, 1000, 2000], backbone=nn.Flatten())
        >>> sweep.points(), sweep.area(normalize=True)
        ({'SimpleNCM': [(1000, 1.0), (2000, 1.0)]}, {'SimpleNCM': 1.0})
    """
    named = dict(learners) if isinstance(learners, Mapping) else {_name(item): item for item in learners}
    if not named or not budgets:
        refuse("learners, budgets", (list(named), budgets), "give at least one of each")
    sizes = sorted({Budget.parse(budget).bytes for budget in budgets})
    cells = [(name, size) for name in named for size in sizes]

    def measure(cell: tuple[str, int]) -> StreamRun | None:
        name, size = cell
        try:
            return run_stream(named[name](budget=size, **options), tasks, budget=size)
        except BadInput as error:
            if error.argument != "budget":
                raise
            return None

    found = dict(zip(cells, spread(measure, cells, jobs), strict=True))
    return Sweep({name: {size: found[name, size] for size in sizes} for name in named})


def aligned_budgets(
    network: nn.Module, images: np.ndarray, horizon: tuple[int, int], points: int
) -> list[int]:
    """Budgets around the place where expansion starts to be payable, computed instead of typed.

    With up to three points: MEMO just fits (two images a class) and whole networks do not; whole networks
    just fit; half of all images more. With more points, from one network and a few images to all networks
    and 2,000 images (or all there are), in equal ratios.

    Args:
        network: image -> features; ``stage3`` begins MEMO's deep block.
        images: all training images of the stream, uint8.
        horizon: (tasks, classes) of the stream.
        points: how many, 2 or more.
    """
    shape, classes, image = images.shape[1:], horizon[1], images[0].nbytes
    few = 2 * classes * (image + 16) + 16 * classes
    one, shared, whole = (
        sum(kind(network).predict_bytes(*horizon, shape).values()) + few
        for kind in (Replay, MEMOClassifier, ExpandableRepresentation)
    )
    if points <= 3:
        return [shared, whole, whole + images.nbytes // 2][-points:]
    return [round(size) for size in np.geomspace(one, whole + min(2000 * image, images.nbytes), points)]


def area(
    points: Sequence[tuple[int, float]],
    *,
    scale: Literal["linear", "log"] = "linear",
    normalize: bool = False,
) -> float:
    """Area under accuracy against MiB (trapezoids), whatever the order of the points.

    Args:
        points: (bytes, accuracy), two or more.
        scale: of the byte axis; the two answer different questions, so state it.
        normalize: divide by the range of budgets: only then is it an accuracy.

    Raises:
        BadInput: fewer than two points.

    Example:
        >>> area([(2**20, 0.5), (3 * 2**20, 0.7)]), area([(2**20, 0.5), (3 * 2**20, 0.7)], normalize=True)
        (1.2, 0.6)
    """
    curve = [(budget / 2**20, accuracy) for budget, accuracy in points]
    return float(Frontier({"method": curve}).area(scale=scale, normalize=normalize)["method"])


def apm(points: Sequence[tuple[int, float]], at: Literal["smallest", "largest"] = "smallest") -> float:
    """Accuracy per MiB at the smallest or the largest budget.

    Example:
        >>> apm([(2**21, 0.8), (2**20, 0.5)]), apm([(2**21, 0.8), (2**20, 0.5)], at="largest")
        (0.5, 0.4)
    """
    if not points:
        refuse("points", points, "give at least one (bytes, accuracy)")
    budget, accuracy = (min if at == "smallest" else max)(points)
    return accuracy / (budget / 2**20)


def _name(factory: Callable[..., Learner]) -> str:
    return str(getattr(factory, "__name__", factory))
