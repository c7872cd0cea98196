"""The book that a ledger keeps: one record per living storage, the total, and the highest total.

A storage is known by its identity; a weak reference strikes its record out when the storage dies. The
holders at the peak are copied only when something is released after a new peak, so that a rising total
costs one comparison per allocation. What a block *is* (saved activation, optimizer state) is often known only
later, so a copied peak points to records and categories are read when somebody asks.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from memspan.ledger.invocation import Invocation
from memspan.ledger.snapshot import Holding

__all__ = ["Book", "Call", "Peak", "Record"]

FORWARD, BACKWARD, RECOMPUTE, OPTIMIZER = 0, 1, 2, 3
PHASES = ("forward", "backward", "recompute", "optimizer")
_TEMPORARY = ("temporaries.forward", "temporaries.backward", "temporaries.backward", "temporaries.optimizer")
_CUDA_BLOCK = 512


class _Watch(weakref.ref):  # type: ignore[type-arg]
    """A weak reference to a storage that knows the storage's key in the book."""

    __slots__ = ("key",)
    key: int


class Record:
    """A storage in the book. Category None means: a temporary of the phase it was born in."""

    __slots__ = (
        "born",
        "bytes",
        "category",
        "device",
        "dtype",
        "kind",
        "module",
        "node",
        "operator",
        "original",
        "shape",
        "tensor",
        "watch",
    )

    def __init__(
        self,
        size: int,
        category: str | None,
        kind: int,
        module: str,
        operator: object,
        shape: tuple[int, ...],
        dtype: object,
        device: object,
    ) -> None:
        self.bytes = size
        self.born = 0  # number of the event, 0 for what was there all along
        self.category = category
        self.kind = kind
        self.module = module
        self.node = -1  # number of the autograd node that made it, in a backward pass
        self.operator = operator
        self.shape = shape
        self.dtype = dtype
        self.device = device
        self.tensor: weakref.ref[Tensor] | None = None  # the first tensor on it: its graph is looked at later
        self.watch: _Watch | None = None
        self.original: Record | None = None  # the record before a resize: shares its fate

    def settle(self, category: str, module: str | None = None) -> None:
        """Decide what this storage is; an earlier record of the same storage is told too."""
        record: Record | None = self
        while record is not None:
            record.category = category
            if module is not None:
                record.module = module
            record = record.original

    @property
    def resolved(self) -> str:
        """The category as known now."""
        return self.category or _TEMPORARY[self.kind]

    def holding(self) -> Holding:
        """This record as plain data."""
        operator = self.operator
        phase = "" if operator is None else PHASES[self.kind] + (f":{self.module}" if self.module else "")
        return Holding(
            bytes=self.bytes,
            category=self.resolved,
            module=self.module,
            phase=phase,
            operator="existing" if operator is None else str(operator),
            shape=tuple(int(n) for n in self.shape),
            dtype=str(self.dtype).removeprefix("torch.") if self.dtype is not None else "",
            device=str(self.device),
        )


class Call:
    """The moment of the highest total at which an operator returned that may have held scratch before."""

    __slots__ = ("event", "held", "invocation", "kind", "module", "stores", "total")

    def __init__(self, invocation: Invocation, book: Book) -> None:
        self.invocation = invocation
        self.total = book.total
        self.kind = book.kind
        self.module = book.module
        self.event = book.event
        self.held = list(book.live.values())
        self.stores = book.stores


class Peak:
    """The highest total since a moment, and who held it."""

    __slots__ = ("_held", "_stores", "calls", "event", "fresh", "kind", "module", "tops", "total")

    def __init__(self) -> None:
        self.total = -1
        self.kind = FORWARD
        self.module = ""
        self.event = 0
        self.fresh = False
        self.tops = [0, 0, 0, 0]  # highest total by phase
        self.calls: dict[tuple[Invocation, int], Call] = {}
        self._held: list[Record] = []
        self._stores: tuple[Holding, ...] = ()

    def copy_from(self, book: Book) -> None:
        """Keep the list of who holds now; called while the total is still the peak's."""
        self.fresh = False
        self._held = list(book.live.values())
        self._stores = book.stores

    def add(self, record: Record) -> None:
        """Take in a record that turns out to have been alive at the peak."""
        self.total += record.bytes
        self.tops = [top and top + record.bytes for top in self.tops]
        for call in self.calls.values():
            call.total += record.bytes
            call.held.append(record)
        if not self.fresh:
            self._held.append(record)

    def joined(self, other: Peak) -> Peak:
        """The higher of two closed peaks of one section, which learns what the other knew."""
        high, low = (self, other) if self.total > other.total else (other, self)
        high.tops = [max(pair) for pair in zip(high.tops, low.tops, strict=True)]
        for key, call in low.calls.items():
            known = high.calls.get(key)
            if known is None or known.total < call.total:
                high.calls[key] = call
        return high

    def holdings(self, book: Book) -> list[Holding]:
        """Who holds the peak, with categories as known now."""
        if self.fresh:
            self.copy_from(book)
        return [record.holding() for record in self._held] + list(self._stores)


class Book:
    """All living records of one ledger, their sum, its peak, and (on demand) the events."""

    def __init__(self, device: torch.device | None, events: int) -> None:
        self.device = device
        self.live: dict[int, Record] = {}
        self.total = 0
        self.stores: tuple[Holding, ...] = ()
        self.stores_total = 0
        self.peak = Peak()
        self.event = 0
        self.kind = FORWARD
        self.module = ""
        self.log: deque[tuple[int, int, Record | Holding | None, int, str]] | None = (
            deque(maxlen=events) if events else None
        )
        self.marks: list[tuple[int, str]] = []
        self.unmeasured: dict[str, None] = {}  # operators that may have held scratch and cannot be run alone
        self.start = 0  # the event at which the allocator was first watched
        self.on_release: Callable[..., None] | None = None  # told of what was older than that
        self._strike: Callable[[Any], None] = _striker(weakref.ref(self))

    # Straight-line arithmetic on the total: a finaliser may run between two calls, never inside a statement.

    def enter(
        self,
        storage: torch.UntypedStorage,
        key: int,
        tensor: Tensor,
        kind: int,
        module: str,
        operator: object,
        category: str | None = None,
        *,
        before: bool = False,
    ) -> Record | None:
        """Write a storage seen for the first time; None for what is not counted (meta, other device).

        ``before`` says that it was there all along: the peak so far takes it in.
        """
        size = storage.nbytes()
        device = tensor.device
        if device.type == "meta" or (self.device is not None and not _same(device, self.device)):
            return None
        if device.type == "cuda":
            size = -(-size // _CUDA_BLOCK) * _CUDA_BLOCK
        try:
            shape = tensor.shape
        except RuntimeError:  # nested tensors of the older kind have no one shape
            shape = torch.Size((size // tensor.element_size(),))
        record = Record(size, category, kind, module, operator, shape, tensor.dtype, device)
        watch = _Watch(storage, self._strike)
        watch.key = key
        record.watch = watch
        if kind == FORWARD:
            record.tensor = weakref.ref(tensor)
        self.live[key] = record
        if before and self.peak.total >= 0:
            self.peak.add(record)
            if self.log is not None and len(self.log) < (self.log.maxlen or 0):
                self.log.appendleft((0, size, record, FORWARD, ""))
                self.total += size
                return record
            self.change(size, record, kind, module)
            return record
        record.born = self.event + 1
        self.change(size, record, kind, module)
        return record

    def new_peak(self) -> Peak:
        """Close the present peak and start another from what is held now; the closed one is returned."""
        closed = self.peak
        if closed.fresh:
            closed.copy_from(self)
        self.peak = Peak()
        self.change(0, None, self.kind, self.module)
        return closed

    def change(self, size: int, record: Record | Holding | None, kind: int, module: str) -> None:
        """Add ``size`` bytes to the total and follow the peak; a release copies a fresh peak before."""
        self.event += 1
        self.total += size
        total = self.total
        peak = self.peak
        if total > peak.total:
            peak.total = total
            peak.fresh = True
            peak.kind = kind
            peak.module = module
            peak.event = self.event
        if total > peak.tops[kind]:
            peak.tops[kind] = total
        if self.log is not None:
            self.log.append((self.event, size, record, kind, module))

    def called(self, invocation: Invocation) -> None:
        """An operator has returned; where its kernel's scratch could make a new peak, keep who held what."""
        key = (invocation, self.kind)
        known = self.peak.calls.get(key)
        if known is None or known.total < self.total:
            self.peak.calls[key] = Call(invocation, self)

    def resize(self, key: int, size: int, kind: int, module: str) -> None:
        """A known storage has another size now."""
        old = self.live[key]
        if _is_cuda(old.device):
            size = -(-size // _CUDA_BLOCK) * _CUDA_BLOCK
        if size == old.bytes:
            return
        new = Record(size, old.category, old.kind, old.module, old.operator, old.shape, old.dtype, old.device)
        new.watch = old.watch
        new.tensor = old.tensor
        new.original = old
        new.born = self.event + 1
        if self.on_release is not None and old.born <= self.start:
            self.on_release(old.bytes)
        if size < old.bytes and self.peak.fresh:
            self.peak.copy_from(self)
        self.live[key] = new
        if self.log is not None:  # two events, so that each names one record
            self.event += 1
            self.log.append((self.event, -old.bytes, old, kind, module))
            self.total -= old.bytes
            self.change(size, new, kind, module)
        else:
            self.change(size - old.bytes, new, kind, module)

    def set_stores(self, holdings: tuple[Holding, ...]) -> None:
        """What stores hold beside the tensors in the book."""
        total = sum(block.bytes for block in holdings)
        if holdings == self.stores:
            return
        if self.peak.fresh and total < self.stores_total:
            self.peak.copy_from(self)
        before = self.stores
        self.stores = holdings
        difference = total - self.stores_total
        self.stores_total = total
        if self.log is None:
            self.change(difference, None, self.kind, self.module)
            return
        for block in before:
            self.event += 1
            self.total -= block.bytes
            self.log.append((self.event, -block.bytes, block, self.kind, self.module))
        for block in holdings:
            self.change(block.bytes, block, self.kind, self.module)

    def strike(self, key: int, watch: object) -> None:
        """A storage died."""
        record = self.live.get(key)
        if record is None or record.watch is not watch:
            return
        if self.on_release is not None and record.born <= self.start:
            self.on_release(record.bytes)
        self.displace(key)

    def restore(self, record: Record) -> None:
        """A storage was displaced; if it lives on, it is held beside what was thought to take its place."""
        if self.on_release is not None:
            self.on_release(-record.bytes)
        storage = None if record.watch is None else record.watch()
        if storage is not None and storage._cdata not in self.live:
            self.live[storage._cdata] = record
            self.change(record.bytes, record, self.kind, self.module)

    def displace(self, key: int) -> None:
        """Take a storage out of the book."""
        record = self.live[key]
        if self.peak.fresh:
            self.peak.copy_from(self)
        del self.live[key]
        self.event += 1
        self.total -= record.bytes
        if self.log is not None:
            self.log.append((self.event, -record.bytes, record, self.kind, self.module))


def _striker(book: weakref.ref[Book]) -> Callable[[Any], None]:
    def strike(watch: _Watch) -> None:
        alive = book()
        if alive is not None:
            alive.strike(watch.key, watch)

    return strike


def _same(device: torch.device, wanted: torch.device) -> bool:
    return device.type == wanted.type and (wanted.index is None or device.index == wanted.index)


def _is_cuda(device: object) -> bool:
    return isinstance(device, torch.device) and device.type == "cuda"
