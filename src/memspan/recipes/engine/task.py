"""The work of a run, cut into cells that are measured once, stored whole, and never lost."""

from __future__ import annotations

import contextlib
import gc
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from memspan.base import BadInput, refuse
from memspan.base.files import load_state, save_state
from memspan.base.rng import seed_of
from memspan.ledger.bytes import Budget
from memspan.recipes.engine.measurements import Measurements
from memspan.recipes.engine.progress import Progress
from memspan.recipes.engine.recipe import Recipe
from memspan.recipes.engine.store import CellFile, RunFolder
from memspan.report.schema import DataSource, Measurement

__all__ = ["Cell", "Named", "Outcome", "Task", "seed_everything"]

O = TypeVar("O")  # noqa: E741
N = TypeVar("N", bound="Named")
_OWN = "memspan.rng."


class Named(Protocol):
    """Data that says what it is."""

    @property
    def name(self) -> str:
        """The name users type."""
        ...

    @property
    def source(self) -> str:
        """Where it came from."""
        ...

    @property
    def sha256(self) -> str:
        """SHA-256 of the content."""
        ...


@dataclass(frozen=True)
class Outcome:
    """What one cell found.

    Attributes:
        quality: metric -> value, finite.
        bytes: category[.part] -> bytes held.
        seconds: phase -> seconds, besides those that ``cell.timed`` took.
        trained: how many numbers this row trained, counted on the model as it was trained; 0 for a control.
        flops: operations, 2 per multiply-add, where counted.
        series: named curves.
    """

    quality: Mapping[str, float]
    bytes: Mapping[str, int]
    seconds: Mapping[str, float] = field(default_factory=dict)
    trained: int | None = None
    flops: int | None = None
    series: Mapping[str, Iterable[float]] = field(default_factory=dict)


class Cell:
    """The part of a run that is being measured: one method, one seed, one setting.

    Attributes:
        method: as given to :meth:`Task.measure`.
        seed: likewise; the engine has seeded torch, numpy and random for this cell already.
        setting: likewise, as plain values.
        device: the run's device.
    """

    def __init__(self, key: Mapping[str, Any], task: Task[Any]) -> None:
        self.method: str = key["method"]
        self.seed: int = key["seed"]
        self.setting: dict[str, str | int | float] = dict(key["setting"])
        self.device = task.device
        self.seconds: dict[str, float] = {}
        self._open: dict[str, float] = {}
        self._key, self._task = dict(key), task
        self._path = task._folder.cell_path(key).with_suffix(".safetensors")

    def step(self, done: float, total: float | None = None, text: str = "") -> None:
        """Move the progress bar of this cell to ``done`` of ``total``."""
        self._task._progress.step(done, total, text)

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the block's wall-clock seconds to ``phase``; on CUDA its queued work is waited for."""
        _wait(self.device)
        self._open[phase] = time.perf_counter()
        try:
            yield
        finally:
            _wait(self.device)
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - self._open.pop(phase)

    def save(self, tensors: Mapping[str, Tensor], header: Mapping[str, Any] | None = None) -> None:
        """Store a checkpoint inside a long cell, with the state of all random generators; atomic.

        Args:
            tensors: whatever the work needs to go on: weights, optimizer state, buffers.
            header: anything JSON can hold, such as the epoch.
        """
        now = time.perf_counter()
        seconds = dict(self.seconds)
        for phase, begun in self._open.items():
            seconds[phase] = seconds.get(phase, 0.0) + now - begun
        states, numbers = _random_state(self.device)
        inner = {"cell": self._key, "seconds": seconds, "random": numbers, "header": dict(header or {})}
        save_state(self._path, {**tensors, **states}, {"memspan": inner})

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The checkpoint of an earlier, killed run of this cell, or None; random generators go on from there.

        Raises:
            CorruptFile: the checkpoint is truncated or altered; it is left as it is.
        """
        if not self._path.exists():
            return None
        tensors, header = load_state(self._path)
        inner = header.get("memspan") or {}
        if inner.get("cell") != self._key:
            refuse(
                "checkpoint", str(self._path), "it belongs to another cell; remove this file and run again"
            )
        for phase, seconds in inner["seconds"].items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
        states = {name: tensors.pop(name) for name in list(tensors) if name.startswith(_OWN)}
        _set_random_state(states, inner["random"], self.device)
        return tensors, inner["header"]

    def keep(self, tensors: Mapping[str, Tensor], header: Mapping[str, Any] | None = None) -> Path:
        """Keep tensors for the user beside the result (``checkpoints/``); gives the file's path."""
        path = self._task.out / "checkpoints" / self._path.name
        save_state(path, tensors, {"cell": self._key, **(header or {})})
        return path

    def _drop(self) -> None:
        self._path.unlink(missing_ok=True)


class Task(Generic[O]):
    """What a recipe's ``run`` is given.

    Attributes:
        recipe: the recipe.
        options: its options, of their declared types.
        mode: ``"quick"``, ``"full"``, or ``"custom"`` where options differ from both.
        seeds: the seeds to run.
        device: where to compute.
        budget: from ``--budget``, else None.
        out: the folder of this run.
    """

    def __init__(
        self,
        recipe: Recipe[O],
        options: O,
        *,
        mode: Literal["quick", "full", "custom"],
        seeds: range,
        device: torch.device,
        budget: Budget | None,
        folder: RunFolder,
        progress: Progress,
    ) -> None:
        self.recipe, self.options, self.mode = recipe, options, mode
        self.seeds, self.device, self.budget, self.out = seeds, device, budget, folder.path
        self.data: list[DataSource] = []
        self.notes: list[str] = []
        self._folder, self._progress = folder, progress
        self._measured: list[Measurement] = []
        self._keys: set[str] = set()
        self._inside: tuple[list[DataSource], list[str]] | None = None
        seed_everything(recipe.name, "run")

    @property
    def measurements(self) -> Measurements:
        """Everything measured so far."""
        return Measurements(self._measured)

    def use(self, dataset: N) -> N:
        """Record that this run uses a data set; gives it back.

        Args:
            dataset: anything with ``name``, ``source`` and ``sha256``.
        """
        source = DataSource(name=dataset.name, source=dataset.source, sha256=dataset.sha256)
        _append(self.data, source)
        if self._inside is not None:
            _append(self._inside[0], source)
        return dataset

    def note(self, text: str) -> None:
        """Add a sentence for the reader to the result; the same one twice counts once."""
        _append(self.notes, text)
        if self._inside is not None:
            _append(self._inside[1], text)

    def expect(self, cells: int) -> None:
        """Tell how many cells there will be, so that the time left can be shown."""
        self._progress.expect(cells)

    def measure(
        self,
        *,
        method: str,
        seed: int,
        work: Callable[[Cell], Outcome],
        setting: Mapping[str, Any] | None = None,
    ) -> Measurement:
        """Measure one cell, unless an earlier run of this folder has.

        Before the work, torch, numpy and random are seeded from (recipe, method, seed, setting): the numbers
        do not depend on what ran before. What must be equal *between* methods (splits, class orders) is drawn
        with ``memspan.base.rng.rng(name, seed)`` instead.

        Args:
            method: as tables show it.
            seed: of this unit.
            work: does the work and tells the outcome.
            setting: what else tells this cell from others; text, numbers, budgets, or yes/no.

        Returns:
            The measurement, as stored.

        Raises:
            BadInput: the same cell twice, a cell inside a cell, an outcome that does not validate (a metric
                is NaN).
            CorruptFile: the stored cell or checkpoint is not whole.
            OSError: the disk is full; earlier cells are whole.
        """
        if self._inside is not None:
            refuse("method", method, "a cell cannot be measured inside another cell's work")
        plain = {str(name): _plain(name, value) for name, value in (setting or {}).items()}
        key: dict[str, Any] = {"method": str(method), "seed": int(seed), "setting": plain}
        name = self._folder.cell_path(key).name
        if name in self._keys:
            refuse(
                "method",
                method,
                f"seed {seed} with setting {plain} is measured already; tell them apart by setting",
            )
        self._keys.add(name)
        label = " · ".join((str(method), f"seed {seed}", *(f"{k} {_told(k, v)}" for k, v in plain.items())))
        stored = self._folder.read_cell(key)
        if stored is not None:
            self._progress.kept(label)
            Cell(key, self)._drop()
        else:
            self._progress.begin(label)
            stored = self._work(key, work)
            self._progress.end(
                label, "  ".join(f"{k} {v:.4g}" for k, v in list(_quality(stored).items())[:3])
            )
        for source in stored.data:
            _append(self.data, source)
        for text in stored.notes:
            _append(self.notes, text)
        self._measured.append(stored.measurement)
        seed_everything(self.recipe.name, "after", fingerprint_of(key))
        return stored.measurement

    def _work(self, key: dict[str, Any], work: Callable[[Cell], Outcome]) -> CellFile:
        cell = Cell(key, self)
        seed_everything(self.recipe.name, "cell", fingerprint_of(key))
        inside: tuple[list[DataSource], list[str]] = ([], [])
        self._inside = inside
        try:
            outcome = work(cell)
        finally:
            self._inside = None
        seconds = dict(cell.seconds)
        for phase, value in outcome.seconds.items():
            seconds[phase] = seconds.get(phase, 0.0) + float(value)
        try:
            measurement = Measurement(
                method=key["method"], seed=key["seed"], setting=key["setting"],
                quality={name: float(value) for name, value in outcome.quality.items()},
                bytes={name: int(value) for name, value in outcome.bytes.items()},
                seconds=seconds,
                trained=None if outcome.trained is None else int(outcome.trained),
                flops=None if outcome.flops is None else int(outcome.flops),
                series={name: [float(value) for value in curve] for name, curve in outcome.series.items()},
            )  # fmt: skip
        except ValueError as error:
            where = f"{key['method']}, seed {key['seed']}, {key['setting']}"
            raise BadInput("outcome", outcome, f"of {where} does not validate: {error}") from error
        stored = self._folder.write_cell(
            key, CellFile(measurement=measurement, data=inside[0], notes=inside[1])
        )
        cell._drop()
        del outcome
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return stored


def fingerprint_of(key: Mapping[str, Any]) -> str:
    """A cell's key as one string, for seeding."""
    setting = sorted((name, repr(value)) for name, value in key["setting"].items())
    return repr((key["method"], key["seed"], setting))


def seed_everything(*keys: str | int) -> None:
    """Seed torch (all devices), numpy's and Python's global generators from the keys alone."""
    seed = seed_of(*keys)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  users' code draws from it
    random.seed(seed)


def _random_state(device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    _, words, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
    version, own, gauss = random.getstate()
    states = {
        f"{_OWN}torch": torch.get_rng_state(),
        f"{_OWN}numpy": torch.from_numpy(np.asarray(words).astype(np.int64)),
        f"{_OWN}python": torch.tensor(own, dtype=torch.int64),
    }
    if device.type == "cuda":
        states[f"{_OWN}cuda"] = torch.cuda.get_rng_state(device)
    return states, {"numpy": [int(position), int(has_gauss), float(cached)], "python": [version, gauss]}


def _set_random_state(states: Mapping[str, Tensor], numbers: Mapping[str, Any], device: torch.device) -> None:
    torch.set_rng_state(states[f"{_OWN}torch"])
    words = states[f"{_OWN}numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", words, *numbers["numpy"]))  # noqa: NPY002
    version, gauss = numbers["python"]
    random.setstate((version, tuple(states[f"{_OWN}python"].tolist()), gauss))
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[f"{_OWN}cuda"], device)


def _plain(name: str, value: Any) -> str | int | float:
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, Budget):
        return value.bytes
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, np.floating):
        return float(value)
    if isinstance(value, str | int | float):
        return value
    refuse(f"setting[{name!r}]", value, "use text, a number, a Budget, or yes/no")


def _told(name: str, value: str | int | float) -> str:
    if isinstance(value, int) and ("budget" in name or "bytes" in name):
        return str(Budget(value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _quality(stored: CellFile) -> dict[str, float]:
    return stored.measurement.quality


def _append(items: list[Any], item: Any) -> None:
    if item not in items:
        items.append(item)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
