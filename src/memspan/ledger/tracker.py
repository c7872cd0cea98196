"""The dispatch ledger: every operator of a real (or fake) run is seen, every storage is counted once.

A dispatch mode sees what each operator returns. A storage seen for the first time is written in a book with
the module, phase and operator that made it; a weak reference strikes it out when it dies. Nothing of the
program is changed: no hook sits on saved tensors, no tensor is kept alive, no value is touched. What a block
turns out to be (gradient, optimizer state, saved for backward) is told when it is known, also for the past.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import Optimizer

from memspan.base import refuse
from memspan.ledger.allocator import AllocatorPeak
from memspan.ledger.bytes import Budget, HoldsBytes, header_bytes, memory_bytes, reached, storages
from memspan.ledger.graph import tensors_in
from memspan.ledger.kernels import scratch_bytes
from memspan.ledger.observe import Tracker, WatchMode
from memspan.ledger.records import PHASES, Book, Call, Peak, Record
from memspan.ledger.snapshot import CATEGORIES, Holding, Point, Snapshot, Timeline, known_category

__all__ = ["KERNELS", "Ledger", "is_compiled"]

KERNELS = "256MiB"
"""Largest arguments of one operator that is run again, alone, to see what its kernel takes."""

_EVENTS = 200_000


class Ledger:
    """Who holds which bytes while a block of training code runs, and at its peak.

    Args:
        model: names modules and tells parameters and buffers. Without it modules are named by their class
            when they are first called, and code without modules is counted all the same.
        optimizer: its state is counted from the start (any optimizer that steps inside is seen anyway).
        stores: name to a thing that holds bytes outside the graph (``HoldsBytes``, arrays, lists of
            tensors, a path). A name that is a category is used as it is; another stands under ``store``.
            Python's own objects around the items of a list or mapping stand apart, under ``NAME.headers``.
            Stores count wherever they live, also when ``device`` is CUDA.
        level: ``"peak"`` keeps sums and the holders at the peak; ``"timeline"`` also every event (the
            latest 200,000).
        device: count this device only. None: the model's device, or every device without a model.
        inputs: tensors (in any containers) held from the start; others are found at their first use.
        allocator: also ask the allocator for its peak (see :class:`AllocatorPeak`); the gap is then
            reported as ``unattributed``, and totals are the allocator's.
        kernels: on the CPU, count what an operator's kernel takes and gives back before it returns
            (``temporaries.kernel``). When a peak is asked for, operators that could have held it are run
            again, alone, on zeros, if their arguments take at most this many bytes. None: count what is left
            between operators. On CUDA only plans do so (:func:`memspan.ledger.plan`).

    Raises:
        BadInput: an unknown level, a model on the meta device, or something that is no module or optimizer.

    Note:
        Under ``torch.compile`` allocations inside the compiled code are not seen: a notice is given and the
        allocator is asked. Work in other threads is not seen until this thread uses its result. Bytes held
        by C++ libraries, the CUDA context and other processes are not visible to any ledger.

    Example:
        >>> model = nn.Linear(8, 4, bias=False)
        >>> opt = torch.optim.Adam(model.parameters(), foreach=False)
        >>> with Ledger(model, opt) as led:
        ...     model(torch.zeros(2, 8)).sum().backward()
        ...     opt.step()
        >>> led.current.by_category
        {'parameters.trained': 128, 'gradients': 128, 'optimizer_state': 260}
        >>> led.peak.phase, led.peak.category("temporaries")
        ('optimizer', 256)
        >>> led.assert_below("1KiB")
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        optimizer: Optimizer | Iterable[Optimizer] | None = None,
        *,
        stores: Mapping[str, object] | None = None,
        level: Literal["peak", "timeline"] = "peak",
        device: str | torch.device | None = None,
        inputs: object = None,
        allocator: bool = False,
        kernels: str | int | Budget | None = KERNELS,
    ) -> None:
        if level not in ("peak", "timeline"):
            refuse("level", level, 'use "peak" or "timeline"')
        if model is not None and not isinstance(model, nn.Module):
            refuse("model", type(model).__name__, "give an nn.Module, or leave it out")
        optimizers = (
            [] if optimizer is None else [optimizer] if isinstance(optimizer, Optimizer) else [*optimizer]
        )
        for item in optimizers:
            if not isinstance(item, Optimizer):
                refuse("optimizer", type(item).__name__, "give a torch.optim.Optimizer or several")
        if model is not None:
            _refuse_meta(model)
        self._given: object = (model, optimizers, inputs)  # held until the first entry, then only watched
        self._model = None if model is None else weakref.ref(model)
        self._optimizers = [weakref.ref(item) for item in optimizers]
        self.stores: dict[str, object] = dict(stores or {})
        self.level = level
        if device is None and model is not None:
            first = next(model.parameters(), None)
            device = None if first is None else first.device.type
        self.device = None if device is None else torch.device(device)
        self.allocator: AllocatorPeak | None = None
        self._inputs = inputs
        self._ask_allocator = allocator
        self._watching: AllocatorPeak | None = None
        self._book = Book(self.device, _EVENTS if level == "timeline" else 0)
        self._section = ""
        self._sections: dict[str, Peak] = {}
        self._tracker = Tracker(self._book, self._poll)
        self._kernels = None if kernels is None else Budget.parse(kernels).bytes
        counted = self.device is None or self.device.type == "cpu" or _is_planned(model)
        self._tracker.kernels = kernels is not None and counted
        self._depth = 0
        self._mode: Any = None

    # -- running ---------------------------------------------------------------------------------------------

    def __enter__(self) -> Ledger:
        self._depth += 1
        if self._depth > 1:
            return self
        model = None if self._model is None else self._model()
        compiled = model is not None and not _is_planned(model) and any(map(is_compiled, model.modules()))
        if compiled:
            warnings.warn(
                "memspan.Ledger: the model is compiled, and what compiled code allocates is not seen one "
                "operator at a time; the allocator is asked instead, and the difference is 'unattributed'",
                stacklevel=2,
            )
        tracker = self._tracker
        tracker.open(hooks=not compiled)
        try:
            if model is not None:
                tracker.add_module(model, "")
            for reference in self._optimizers:
                if (optimizer := reference()) is not None:
                    tracker.add_optimizer(optimizer)
            inputs, self._inputs, self._given = self._inputs, None, None  # a ledger keeps nothing alive
            if inputs is not None:
                self.track(inputs, "inputs")
            self._poll()
            if self._ask_allocator or compiled:
                kind = self.device or torch.device("cpu")
                self._watching = AllocatorPeak(kind)
                self._watching.__enter__()
                self._book.start = self._book.event
                self._book.on_release = self._watching.released
            tracker.existing = self._book.total - self._book.stores_total
            tracker.running = True
            self._mode = WatchMode(tracker)
            self._mode.__enter__()
        except BaseException:
            self._depth -= 1
            tracker.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._depth -= 1
        if self._depth:
            return
        mode, self._mode = self._mode, None
        try:
            if mode is not None:
                mode.leave()
        finally:
            self._tracker.close()
            if self._watching is not None:
                watching, self._watching = self._watching, None
                self._book.on_release = None
                watching.__exit__(None, None, None)
                if watching.device.type == "cpu":
                    watching.peak += self._tracker.existing
                if self.allocator is None or watching.peak >= self.allocator.peak:
                    self.allocator = watching
        if kind is None:
            self._refresh()

    def mark(self, name: str) -> None:
        """Begin a named section: it gets a peak of its own (:meth:`peak_of`) and a mark on the timeline."""
        self._poll()
        closed = self._book.new_peak()
        self._archive(closed)
        self._section = name
        self._book.marks.append((self._book.event, name))

    def track(self, thing: object, category: str = "inputs") -> None:
        """Say what a thing is: tensors, containers of tensors, modules, or an optimizer.

        Tensors already in the book change their category; others enter it. A module's parameters and
        buffers keep the categories of a model unless another than ``"inputs"`` is given.

        Args:
            thing: what to count.
            category: a ledger category, or a part of one such as ``"replay.exemplars"``.

        Raises:
            BadInput: an unknown category.
        """
        if not known_category(category):
            refuse(
                "category", category, f"use one of {', '.join(CATEGORIES)}, or a part such as 'store.NAME'"
            )
        with self._tracker.pausing():
            if isinstance(thing, Optimizer):
                self._tracker.add_optimizer(thing)
            elif isinstance(thing, nn.Module) and category == "inputs":
                self._tracker.add_module(thing, type(thing).__name__)
            else:
                for tensor in tensors_in(thing):
                    self._tracker.settle(tensor, category, add=True)

    # -- answers ---------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        """The peak as a table."""
        return str(self.peak)

    @property
    def peak(self) -> Snapshot:
        """Who held what at the highest point since the ledger was first entered."""
        self._refresh()
        return self._snapshot(self._peaks(), None if self.allocator is None else self.allocator.peak)

    @property
    def unknown_kernels(self) -> list[str]:
        """Operators whose kernels may have held more than the peak told, and could not be run alone.

        They were too large for ``kernels``, refuse to run on zeros, or belong to another library.
        """
        self._refresh()
        missed = dict(self._book.unmeasured)
        for call in (call for peak in self._peaks() for call in peak.calls.values()):
            if scratch_bytes(call.invocation, self._kernels or 0) is None:
                missed[str(call.invocation.operator)] = None
        return list(missed)

    def peak_of(self, section: str) -> Snapshot:
        """The peak of a section begun with :meth:`mark` (``""``: before the first mark).

        Raises:
            BadInput: no such section.
        """
        self._refresh()
        return self._snapshot(self._peaks(section), None)

    def phase_peaks(self, section: str | None = None) -> dict[str, int]:
        """Highest total in each phase that ran, in bytes: forward, backward, recompute, optimizer.

        Args:
            section: a section begun with :meth:`mark`; None: the highest of all.
        """
        self._refresh()
        tops = [0, 0, 0, 0]
        for peak in self._peaks(section):
            tops = [max(pair) for pair in zip(tops, self._highest(peak)[2], strict=True)]
        return {name: top for name, top in zip(PHASES, tops, strict=True) if top}

    @property
    def current(self) -> Snapshot:
        """Who holds what now (also after the block: what was released since is gone)."""
        self._refresh()
        book = self._book
        blocks = [record.holding() for record in book.live.values()] + list(book.stores)
        return Snapshot.of(blocks, phase=_phase(book.kind, book.module), device=self._device_name)

    def timeline(self, modules: int | None = None) -> Timeline:
        """Total, categories and phase after every event kept, oldest first.

        Args:
            modules: also sum by module, names cut to this many dotted parts.

        Raises:
            BadInput: the ledger was not made with ``level="timeline"``.
        """
        log = self._book.log
        if log is None:
            refuse("level", self.level, 'make the ledger with level="timeline"')
        self._refresh()
        events = list(log)
        sums: dict[str, int] = {}
        names: dict[str, int] = {}
        held_now: list[Record | Holding] = [*self._book.live.values(), *self._book.stores]
        for holder in held_now:
            _add(sums, _category_of(holder), holder.bytes)
            _add(names, _cut(holder.module, modules), holder.bytes)
        total = self._book.total
        points: list[Point] = []
        for event, size, block, kind, module in reversed(events):  # from now, whose sums are known, backwards
            held = {} if modules is None else dict(names)
            points.append(Point(event, total, dict(sums), _phase(kind, module), held))
            total -= size
            if block is not None:
                _add(sums, _category_of(block), -size)
                _add(names, _cut(block.module, modules), -size)
        points.reverse()
        self._put_kernel_on(points)
        dropped = max(0, points[0].event - 1) if points else 0
        return Timeline(tuple(points), tuple(self._book.marks), dropped)

    def assert_below(self, budget: str | int | Budget) -> None:
        """Fail when the peak is above a budget; the message names who held it.

        Raises:
            AssertionError: the peak is above the budget.
            BadInput: the budget cannot be read.
        """
        limit = Budget.parse(budget)
        peak = self.peak
        if peak.total > limit.bytes:
            raise AssertionError(
                f"peak of {peak.total:,} bytes is above the budget of {limit.bytes:,}: {peak}"
            )

    def diff(self, other: Ledger | Snapshot) -> Snapshot:
        """This ledger's peak less another's, by category."""
        return self.peak - (other.peak if isinstance(other, Ledger) else other)

    # -- inside ----------------------------------------------------------------------------------------------

    @property
    def _device_name(self) -> str:
        return "all" if self.device is None else str(self.device)

    def _snapshot(self, peaks: list[Peak], allocator: int | None) -> Snapshot:
        peak = max(peaks, key=lambda peak: self._highest(peak)[0])
        _, call, _ = self._highest(peak)
        if call is not None:
            phase = _phase(call.kind, call.module)
            blocks = [record.holding() for record in call.held] + list(call.stores)
            blocks.append(self._scratch(call))
        else:
            phase = _phase(peak.kind, peak.module) if peak.total >= 0 else ""
            blocks = peak.holdings(self._book)
        if allocator is not None:  # stores outside torch are no business of its allocator
            allocator += sum(block.bytes for block in blocks if block.operator == "store")
        return Snapshot.of(blocks, phase=phase, device=self._device_name, allocator=allocator)

    def _scratch(self, call: Call) -> Holding:
        size = scratch_bytes(call.invocation, self._kernels or 0) or 0
        phase = _phase(call.kind, call.module)
        return Holding(size, "temporaries.kernel", call.module, phase, str(call.invocation.operator))

    def _highest(self, peak: Peak) -> tuple[int, Call | None, list[int]]:
        """Bytes at the peak, the call whose kernel held it (None: between operators), tops by phase."""
        best, holder, tops = peak.total, None, list(peak.tops)
        for call in peak.calls.values():
            size = scratch_bytes(call.invocation, self._kernels or 0)
            if size:
                tops[call.kind] = max(tops[call.kind], call.total + size)
                if call.total + size > best:
                    best, holder = call.total + size, call
        return best, holder, tops

    def _put_kernel_on(self, points: list[Point]) -> None:
        """Where a kernel's scratch makes the peak, that moment is a point of its own."""
        _, call, _ = max((self._highest(peak) for peak in self._peaks()), key=lambda found: found[0])
        at = None if call is None else next((i for i, p in enumerate(points) if p.event == call.event), None)
        if call is None or at is None:
            return
        before, scratch = points[at], self._scratch(call)
        held = {**before.by_category, scratch.category: scratch.bytes}
        modules = dict(before.by_module)
        if modules:
            _add(modules, scratch.module, scratch.bytes)
        points.insert(at + 1, Point(before.event, before.total + scratch.bytes, held, scratch.phase, modules))

    def _peaks(self, section: str | None = None) -> list[Peak]:
        """The peaks of a section (None: of all), as far as they are known."""
        if section is None:
            return [*self._sections.values(), self._book.peak]
        if section not in self._sections and section != self._section:
            refuse("section", section, f"use one of {[*self._sections, self._section]}")
        found = [self._sections[section]] if section in self._sections else []
        return [*found, self._book.peak] if section == self._section else found

    def _archive(self, peak: Peak) -> None:
        earlier = self._sections.get(self._section)
        if earlier is not None:
            peak = peak.joined(earlier)
        self._sections[self._section] = peak

    def _refresh(self) -> None:
        """Learn what can be learnt now: gradients, state, the graph behind living outputs, stores."""
        with self._tracker.pausing():
            self._tracker.learn()
        self._poll()

    def _poll(self) -> None:
        """Ask the stores for their bytes; tensors of theirs that are in the book are not counted twice."""
        if not self.stores:
            return
        with self._tracker.pausing():
            blocks: list[Holding] = []
            for name, thing in self.stores.items():
                blocks.extend(self._ask(name, thing))
            self._book.set_stores(tuple(blocks))

    def _ask(self, name: str, thing: object) -> list[Holding]:
        home = name if known_category(name) else f"store.{name}"
        parts = memory_bytes(thing)
        plain = not isinstance(thing, HoldsBytes | nn.Module)
        booked = 0
        tensors = [one for one in reached(thing, objects=4) if isinstance(one, Tensor)]
        for key in {storage._cdata for tensor in tensors for storage in storages(tensor)}:
            record = self._book.live.get(key)
            if record is not None:
                booked += record.bytes
                if record.category is None or record.category in ("inputs", "saved_activations"):
                    record.settle(home)
        blocks = []
        for part, size in parts.items():
            covered = min(size, booked)
            booked -= covered
            if size > covered:
                own = known_category(part) and "." in part
                category = home if plain else part if own else f"{home}.{part}"
                blocks.append(Holding(size - covered, category, operator="store", device="host"))
        if isinstance(thing, Mapping | list | tuple | set | frozenset):
            headers = header_bytes(thing)
            blocks.append(Holding(headers, f"{home}.headers", operator="store", device="host"))
        return blocks


def _phase(kind: int, module: str) -> str:
    return f"{PHASES[kind]}:{module}" if module else PHASES[kind]


def _add(sums: dict[str, int], key: str, size: int) -> None:
    new = sums.get(key, 0) + size
    if new:
        sums[key] = new
    else:
        sums.pop(key, None)


def _cut(name: str, depth: int | None) -> str:
    return name if depth is None else ".".join(name.split(".")[:depth])


def _category_of(block: Record | Holding) -> str:
    return block.resolved if isinstance(block, Record) else block.category


def is_compiled(module: nn.Module) -> bool:
    """Whether calls of this module run compiled code."""
    return (
        type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None
    )


def _is_planned(model: nn.Module | None) -> bool:
    """Whether the model stands on fake tensors: nobody else reads the device's peak statistics then."""
    return model is not None and any(isinstance(one, FakeTensor) for one in model.parameters())


def _refuse_meta(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type == "meta":
            refuse(
                "model",
                f"{name} is on the meta device",
                "a run needs real tensors: use model.to_empty(device=...), or plan(...) to predict",
            )
