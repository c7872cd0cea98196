"""What fits: the largest batch under a budget for every combination of methods, cheapest first.

Peak memory is the greatest of a few straight lines in the batch size, one per phase (forward, backward,
optimizer). So two traces give a line, a third checks it, and a guess on the line is confirmed by traces
at the answer and one above; where the line fails, the same loop closes in. The cost of a method is told in
floating-point operations per example, which are counted in the same trace.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from memspan.base import BadInput, refuse
from memspan.base.parallel import spread
from memspan.ledger.allocator import AllocatorPeak
from memspan.ledger.bytes import Budget
from memspan.ledger.job import CANNOT_TRACE, Grow, Job, MakesOptimizer
from memspan.ledger.methods import methods as registered
from memspan.ledger.planner import Chosen, chosen_methods, conflict, job
from memspan.ledger.prediction import Plan, lines_at
from memspan.ledger.step import Loss, batch_size, sequence_length
from memspan.ledger.tracker import Ledger

__all__ = ["Candidate", "Fit", "Verified", "fit", "verify"]

_LARGEST = 1 << 20


@dataclass(frozen=True)
class Candidate:
    """A combination of methods, and the largest batch with which it fits.

    Attributes:
        methods: names; empty for plain training.
        batch: the largest batch within the budget (the longest sequence, where that grows); 0 when not even
            the smallest fits.
        total: bytes at the peak with that batch (with the smallest, when ``batch`` is 0).
        smallest: bytes at the peak with the smallest batch traced (1, or 2 where the model refuses 1).
        per_example: bytes that one more example adds, on the line through the two smallest traces.
        flops: per example and step, 2 per multiply-add; None where shapes depend on values.
        trained: numbers that receive gradients.
        phase: what runs at the peak.
        affine: True when a trace at four times the smallest batch lay on the line exactly.
        exact: whether the figures were traced.
        skipped: why the combination does not apply to this model, else empty.
    """

    methods: tuple[str, ...]
    batch: int = 0
    total: int = 0
    smallest: int = 0
    per_example: int = 0
    flops: int | None = None
    trained: int = 0
    phase: str = ""
    affine: bool = False
    exact: bool = False
    skipped: str = ""
    job: Job | None = field(default=None, repr=False, compare=False)

    @property
    def name(self) -> str:
        """``"checkpoint + autocast"``, or ``"plain"``."""
        return " + ".join(self.methods) or "plain"


@dataclass(frozen=True)
class Fit:
    """All candidates under one budget.

    Attributes:
        budget: what was asked for.
        wanted: the size of the example batch (the length of its sequences, where that grows).
        grow: what is largest within the budget, ``"batch"`` or ``"length"``.
        front: candidates that fit and that no other beats: none trains as much in no more time with no
            smaller batch. Cheapest per example first, then the larger batch.
        best: the first of the front that trains the most and takes the wanted batch, else the largest batch
            among those; None when nothing fits.
        nearest: the candidate of the fewest bytes at the smallest batch.
        candidates: all that apply to the model.
        skipped: the others, with the reason.
    """

    budget: Budget
    wanted: int
    front: tuple[Candidate, ...]
    best: Candidate | None
    nearest: Candidate
    candidates: tuple[Candidate, ...]
    skipped: tuple[Candidate, ...] = ()
    grow: Grow = "batch"

    def table(self) -> list[dict[str, str | int | bool | None]]:
        """One row per candidate, those of the front first."""
        order = [*self.front, *(item for item in self.candidates if item not in self.front)]
        return [
            {
                "methods": item.name,
                self.grow: item.batch,
                "bytes": item.total,
                "exact": item.exact,
                "flops per example": item.flops,
                "trained": item.trained,
                "peak": item.phase,
                "front": item in self.front,
            }
            for item in order
        ]

    def __str__(self) -> str:
        if self.best is None:
            return (
                f"nothing fits {self.budget}; the nearest is {self.nearest.name}, which needs "
                f"{Budget(self.nearest.total)} with its smallest {self.grow}"
            )
        return (
            f"{self.best.name}: {self.grow} {self.best.batch} in {Budget(self.best.total)} of {self.budget}"
        )


def fit(
    build_model: Callable[[], nn.Module] | nn.Module,
    batch: Any,
    budget: str | int | Budget,
    methods: str | Sequence[Chosen | Sequence[Chosen]] = "all",
    optimizer: MakesOptimizer | None = torch.optim.AdamW,
    loss: Loss | None = None,
    device: str = "cpu",
    *,
    most: int = 2,
    grow: Grow = "batch",
    largest: int | None = None,
    world: int = 1,
    real: str | int | Budget | None = None,
    progress: Callable[[str], None] | None = None,
    jobs: int = 1,
) -> Fit:
    """Largest batch under a budget, for each combination of methods.

    Args:
        build_model: see :func:`~memspan.ledger.plan`.
        batch: see :func:`~memspan.ledger.plan`; its size is the batch wanted.
        budget: bytes, such as ``"8GiB"``.
        methods: ``"all"`` combines all registered methods (up to ``most`` at once, conflicts left out); or a
            list of choices, each a name, a (name, options) pair or a list of these, tried beside
            plain training.
        optimizer: see :func:`~memspan.ledger.plan`.
        loss: see :func:`~memspan.ledger.plan`.
        device: see :func:`~memspan.ledger.plan`.
        most: methods combined at once under ``"all"``.
        grow: ``"batch"`` finds the largest batch; ``"length"`` the longest sequence with the example's batch
            (the second dimension of its tensors).
        largest: do not look beyond this batch or length (a model's longest sequence); None: about a million.
        world: see :func:`~memspan.ledger.plan`.
        real: see :func:`~memspan.ledger.plan`.
        progress: called with the name of each candidate before it is traced.
        jobs: processes that trace the combinations; see :func:`~memspan.base.parallel.spread`.

    Raises:
        BadInput: the budget is below the model's own parameters and buffers under every combination; the
            least that any needs is named. Also as :func:`~memspan.ledger.plan`.

    Example:
        >>> from torch.nn.functional import mse_loss
        >>> found = fit(lambda: nn.Linear(100, 10), (torch.zeros(8, 100), torch.zeros(8, 10)), "64KiB",
        ...             methods=[], optimizer=torch.optim.SGD, loss=mse_loss)
        >>> found.best.batch, found.best.total <= 64 * 1024, found.best.affine
        (109, True, True)
    """
    limit = Budget.parse(budget)
    if grow not in ("batch", "length"):
        refuse("grow", grow, 'use "batch" or "length"')
    if largest is not None and largest < 1:
        refuse("largest", largest, "give a size of 1 or more, or None")
    wanted = batch_size(batch) if grow == "batch" else sequence_length(batch)
    plain = replace(job(build_model, batch, optimizer, (), loss, device, world=world, real=real), grow=grow)
    tried = [replace(plain, method=chosen) for chosen in _combinations(methods, most)]
    work = partial(_candidate, limit=limit.bytes, largest=largest or _LARGEST)
    looked_at = [work(tried[0], first=True, tell=progress)]  # plain training; a bad argument ends here
    if jobs == 1:
        looked_at += [work(one, tell=progress) for one in tried[1:]]
    else:
        if progress is not None:
            progress(f"{len(tried) - 1} combinations, {'all' if jobs < 0 else jobs} processes")
        there = spread(work, tried[1:], jobs)
        looked_at += [
            (found if found.job is None else replace(found, job=one), held)
            for one, (found, held) in zip(tried[1:], there, strict=True)
        ]
    candidates = [pair for pair in looked_at if not pair[0].skipped]
    skipped = [pair for pair in looked_at if pair[0].skipped]
    nearest, _ = min(candidates, key=lambda pair: pair[0].smallest)
    own = min(held for _, held in candidates)
    if limit.bytes < own:
        refuse(
            "budget",
            str(limit),
            f"the model's own parameters and buffers take {own:,} bytes; a training step needs at least "
            f"{nearest.smallest:,} ({nearest.name})",
        )
    applying = tuple(found for found, _ in candidates)
    front = _front(applying)
    return Fit(
        budget=limit,
        wanted=wanted,
        front=front,
        best=_best(front, wanted),
        nearest=nearest,
        candidates=applying,
        skipped=tuple(found for found, _ in skipped),
        grow=grow,
    )


@dataclass(frozen=True)
class Verified:
    """A candidate's plan held against one real step.

    Attributes:
        planned: bytes predicted.
        measured: bytes that the ledger saw.
        allocator: bytes by the allocator's own account.
        batch: examples in the step.
    """

    planned: int
    measured: int
    allocator: int
    batch: int

    @property
    def error(self) -> float:
        """Prediction over the allocator's figure, less 1."""
        return self.planned / self.allocator - 1


def verify(candidate: Candidate) -> Verified:
    """Run a candidate for real, two steps with its largest batch, and read the peak of the second.

    Integer inputs keep the values of the example batch; it is repeated up to the candidate's size.

    Raises:
        BadInput: the candidate fits no batch, or it is for CUDA where there is none.

    Example:
        >>> found = fit(lambda: nn.Linear(100, 10), (torch.zeros(8, 100), torch.zeros(8, 10)), "64KiB",
        ...             methods=[], optimizer=torch.optim.SGD, loss=nn.functional.mse_loss)
        >>> done = verify(found.best)
        >>> done.planned == done.measured
        True
    """
    one = candidate.job
    if one is None or candidate.batch < 1:
        refuse("candidate", candidate.name, "it fits no batch: there is nothing to run")
    if one.device == "cuda" and not torch.cuda.is_available():
        refuse("device", one.device, "there is no CUDA device here to run on")
    if one.home == "cuda":
        return _verify_on_cuda(one, candidate)
    model, optimizer = one.ready()
    model.train()
    batch = one.sized(one.real_batch(), candidate.batch)
    one.step(model, optimizer, batch)
    with Ledger(model, optimizer, kernels=one.kernels) as led:
        one.step(model, optimizer, batch)
    with Ledger(model, optimizer, inputs=batch, allocator=True) as asked:
        one.step(model, optimizer, batch)
    allocator = asked.peak.allocator or 0
    return Verified(candidate.total, led.peak.total, allocator, candidate.batch)


def _verify_on_cuda(one: Job, candidate: Candidate) -> Verified:
    """The device's allocator is the truth there: it sees kernels and workspaces, which no ledger does."""
    before = torch.cuda.memory_allocated()
    model, optimizer = one.ready()
    model.train()
    batch = one.sized(one.real_batch(), candidate.batch)
    one.step(model, optimizer, batch)
    with AllocatorPeak("cuda") as truth:
        one.step(model, optimizer, batch)
    measured = truth.peak - before
    return Verified(candidate.total, measured, measured, candidate.batch)


def _combinations(choice: str | Sequence[Any], most: int) -> list[tuple[Any, ...]]:
    if choice == "all":
        known = list(registered().values())
        found: list[tuple[Any, ...]] = []
        for count in range(min(most, len(known)) + 1):
            for combined in itertools.combinations(known, count):
                if not any(conflict(a, b) for a, b in itertools.combinations(combined, 2)):
                    found.append(tuple((item, {}) for item in combined))
        return found
    if isinstance(choice, str):
        choice = [choice]
    return [(), *(chosen_methods(item) for item in choice)]


def _candidate(
    one: Job, limit: int, largest: int, *, first: bool = False, tell: Callable[[str], None] | None = None
) -> tuple[Candidate, int]:
    """The candidate, and the bytes of its parameters and buffers. Plain training (``first``) must work."""
    if tell is not None:
        tell(" + ".join(one.names) or "plain")
    try:
        low = _smallest(one, largest)
    except BadInput as error:
        if first:
            raise
        return Candidate(one.names, skipped=str(error)), 0
    small = low.batch
    high = one.predict(min(2 * small, largest)) if largest > small else low
    check = one.predict(min(4 * small, largest)) if largest > 2 * small else high
    answer = _largest(one, limit, [low, high, check], largest) if low.total <= limit else None
    top = answer or low
    own = sum(size for name, size in low.by_category.items() if name.startswith(("parameters", "buffers")))
    return (
        Candidate(
            methods=one.names,
            batch=answer.batch if answer else 0,
            total=top.total,
            smallest=low.total,
            per_example=_slope(low, high, top.batch),
            flops=None if low.flops is None else round(low.flops / low.batch),
            trained=low.trained,
            phase=top.phase,
            affine=check.total == max(lines_at(low, high, check.batch).values()),
            exact=top.exact,
            job=one,
        ),
        own,
    )


def _smallest(one: Job, largest: int) -> Plan:
    try:
        return one.predict(1, flops=True)
    except ValueError as error:  # BatchNorm refuses one value per channel
        if isinstance(error, (BadInput, *CANNOT_TRACE)) or largest < 2:
            raise
        return one.predict(2, flops=True)


def _largest(one: Job, limit: int, known: list[Plan], largest: int) -> Plan:
    """The plan of the largest batch within the limit: guess on the line, trace, close in."""
    fits = max((p for p in known if p.total <= limit), key=lambda p: p.batch)
    above = min((p for p in known if p.total > limit), key=lambda p: p.batch, default=None)
    earlier = known[0]
    while fits.batch < largest and (above is None or above.batch > fits.batch + 1):
        guess = _on_line(earlier, fits, limit) if above is None else _on_line(fits, above, limit)
        guess = max(guess, fits.batch + 1)
        if above is not None:
            guess = min(guess, above.batch - 1)
        new = one.predict(min(guess, largest))
        if new.total > limit:
            above = new
            continue
        earlier, fits = fits, new
        if fits.batch < largest and (above is None or above.batch > fits.batch + 1):
            # most often the line was right: one more is too many
            next_one = one.predict(fits.batch + 1)
            if next_one.total > limit:
                return fits
            earlier, fits = fits, next_one
    return fits


def _on_line(a: Plan, b: Plan, limit: int) -> int:
    if a.batch == b.batch:
        return 2 * max(a.batch, b.batch)
    sizes = [_LARGEST]
    for name, top in b.phases.items():
        slope = (top - a.phases.get(name, top)) / (b.batch - a.batch)
        if slope > 0:
            sizes.append(math.floor(b.batch + (limit - top) / slope))
    return min(sizes)


def _slope(low: Plan, high: Plan, size: int) -> int:
    """Bytes per example in the phase that holds the peak at this size."""
    if high.batch == low.batch:
        return 0
    tops = lines_at(low, high, size)
    name = max(tops, key=lambda name: tops[name])
    return (high.phases[name] - low.phases.get(name, high.phases[name])) // (high.batch - low.batch)


def _front(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    fitting = [item for item in candidates if item.batch > 0]
    kept = [item for item in fitting if not any(_beats(other, item) for other in fitting)]
    return tuple(sorted(kept, key=lambda item: (item.flops or 0, -item.batch, len(item.methods))))


def _beats(other: Candidate, item: Candidate) -> bool:
    mine = (-(item.flops or 0), item.batch, item.trained, -len(item.methods))
    theirs = (-(other.flops or 0), other.batch, other.trained, -len(other.methods))
    return theirs != mine and all(t >= m for t, m in zip(theirs, mine, strict=True))


def _best(front: Sequence[Candidate], wanted: int) -> Candidate | None:
    if not front:
        return None
    most = max(item.trained for item in front)
    whole = [item for item in front if item.trained == most]
    enough = [item for item in whole if item.batch >= wanted]
    return enough[0] if enough else max(whole, key=lambda item: item.batch)
