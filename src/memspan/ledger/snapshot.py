"""What a ledger says: who holds which bytes at one moment, and how that changed over time.

A :class:`Snapshot` is plain data (it loads and saves as JSON and holds no tensor), so that results, reports
and predictions can be compared with ``-`` whatever they came from: a run, a trace or a formula.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from memspan.base import refuse
from memspan.ledger.bytes import Budget

__all__ = ["CATEGORIES", "Holding", "Point", "Snapshot", "Timeline", "known_category"]

CATEGORIES: tuple[str, ...] = (
    "parameters.trained",
    "parameters.frozen",
    "parameters.packed",
    "buffers",
    "gradients",
    "optimizer_state",
    "saved_activations",
    "inputs",
    "temporaries.forward",
    "temporaries.backward",
    "temporaries.optimizer",
    "temporaries.kernel",
    "communication",
    "replay",
    "memory_bank",
    "store",
    "unattributed",
)
_HEADS = frozenset(name.split(".")[0] for name in CATEGORIES)
_SCHEMA = 1


def known_category(name: str) -> bool:
    """Whether a name is a ledger category or a part of one.

    Example:
        >>> known_category("replay"), known_category("store.sqlite"), known_category("fudge")
        (True, True, False)
    """
    return name.split(".")[0] in _HEADS


@dataclass(frozen=True)
class Holding:
    """One block of memory that was held at the moment of a snapshot.

    Attributes:
        bytes: size of the storage; on CUDA rounded up to the allocator's 512.
        category: one of :data:`CATEGORIES`, or a part of one (``"replay.exemplars"``).
        module: dotted name of the module that made it, ``""`` outside any.
        phase: when it was made, such as ``"forward:blocks.3.mlp"``.
        operator: the operator that made it, or ``"existing"`` for what was there before.
        shape: of the first tensor seen on the storage; empty for stores.
        dtype: of that tensor, without ``torch.``.
        device: such as ``"cpu"`` or ``"cuda:0"``.
    """

    bytes: int
    category: str
    module: str = ""
    phase: str = ""
    operator: str = ""
    shape: tuple[int, ...] = ()
    dtype: str = ""
    device: str = "cpu"


@dataclass(frozen=True)
class Snapshot:
    """Bytes held at one moment: in all, by category, by module, block by block.

    ``by_category`` and ``by_module`` each sum to ``total``; every storage is in one category only.

    Attributes:
        total: bytes. With an allocator figure this is the allocator's, and ``unattributed`` closes the gap.
        by_category: bytes by category; categories that hold nothing are absent.
        phase: what the program was doing, such as ``"backward:blocks.3.mlp"``.
        device: the device counted, or ``"all"``.
        holdings: one entry per storage or store; may be empty where only sums are known (formulas).
        allocator: what the allocator itself reported as its peak, in bytes; None when it was not asked.

    Example:
        >>> blocks = (Holding(96, "parameters.trained", "head"), Holding(32, "inputs"))
        >>> now = Snapshot.of(blocks, phase="forward:head", device="cpu")
        >>> now.total, now.by_category, now.by_module(depth=1)
        (128, {'parameters.trained': 96, 'inputs': 32}, {'head': 96, '': 32})
        >>> Snapshot.from_json(now.to_json()) == now
        True
        >>> (now - Snapshot.of(blocks[:1])).by_category
        {'inputs': 32}
    """

    total: int
    by_category: dict[str, int]
    phase: str = ""
    device: str = "cpu"
    holdings: tuple[Holding, ...] = ()
    allocator: int | None = None

    @classmethod
    def of(
        cls,
        holdings: tuple[Holding, ...] | list[Holding],
        *,
        phase: str = "",
        device: str = "cpu",
        allocator: int | None = None,
    ) -> Snapshot:
        """Sum holdings into a snapshot; with an allocator figure the gap becomes ``unattributed``."""
        sums: dict[str, int] = {}
        for block in holdings:
            sums[block.category] = sums.get(block.category, 0) + block.bytes
        seen = sum(sums.values())
        if allocator is not None and allocator != seen:
            sums["unattributed"] = sums.get("unattributed", 0) + allocator - seen
        order = {name: place for place, name in enumerate(CATEGORIES)}
        ranked = sorted(sums, key=lambda name: (order.get(name, order.get(name.split(".")[0], 99)), name))
        return cls(
            total=sum(sums.values()),
            by_category={name: sums[name] for name in ranked if sums[name]},
            phase=phase,
            device=device,
            holdings=tuple(holdings),
            allocator=allocator,
        )

    @property
    def attributed(self) -> int:
        """Bytes that the ledger saw itself: ``total`` less ``unattributed``."""
        return self.total - self.by_category.get("unattributed", 0)

    @property
    def ratio(self) -> float | None:
        """Attributed bytes over the allocator's, or None without an allocator figure."""
        return self.attributed / self.allocator if self.allocator else None

    def category(self, name: str) -> int:
        """Bytes of a category with all its parts.

        Example:
            >>> Snapshot(12, {"store.file": 8, "store.cache": 4}).category("store")
            12
        """
        return sum(n for key, n in self.by_category.items() if key == name or key.startswith(name + "."))

    def by_module(self, depth: int | None = None) -> dict[str, int]:
        """Bytes by module name, largest first, cut to ``depth`` dotted parts (None: whole names).

        What belongs to no module is under ``""``, what only the allocator saw under ``"(unattributed)"``.

        Raises:
            BadInput: depth below 1.
        """
        if depth is not None and depth < 1:
            refuse("depth", depth, "give 1 or more, or None for whole names")
        sums: dict[str, int] = {}
        for block in self.holdings:
            name = block.module if depth is None else ".".join(block.module.split(".")[:depth])
            sums[name] = sums.get(name, 0) + block.bytes
        rest = self.total - sum(sums.values())
        if rest:
            sums["(unattributed)"] = rest
        return dict(sorted(sums.items(), key=lambda item: -item[1]))

    def top(self, k: int = 10) -> list[Holding]:
        """The ``k`` largest holdings, largest first."""
        return sorted(self.holdings, key=lambda block: -block.bytes)[:k]

    def __sub__(self, other: Snapshot) -> Snapshot:
        """Difference by category; holdings are those that ``self`` has beyond ``other``'s (as multisets)."""
        names = list(dict.fromkeys((*self.by_category, *other.by_category)))
        change = {name: self.by_category.get(name, 0) - other.by_category.get(name, 0) for name in names}
        left: dict[Holding, int] = {}
        for block in other.holdings:
            left[block] = left.get(block, 0) + 1
        extra = []
        for block in self.holdings:
            if left.get(block, 0):
                left[block] -= 1
            else:
                extra.append(block)
        both = self.allocator is not None and other.allocator is not None
        return Snapshot(
            total=self.total - other.total,
            by_category={name: n for name, n in change.items() if n},
            phase=self.phase if self.phase == other.phase else f"{self.phase} - {other.phase}",
            device=self.device,
            holdings=tuple(extra),
            allocator=(self.allocator or 0) - (other.allocator or 0) if both else None,
        )

    def to_json(self) -> str:
        """This snapshot as JSON text (schema 1)."""
        return json.dumps(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """This snapshot as JSON-ready objects; equal holdings are written once with their number."""
        counts: dict[Holding, int] = {}
        for block in self.holdings:
            counts[block] = counts.get(block, 0) + 1
        return {
            "schema": _SCHEMA,
            "total": self.total,
            "by_category": self.by_category,
            "phase": self.phase,
            "device": self.device,
            "allocator": self.allocator,
            "holdings": [
                {**vars(block), "shape": list(block.shape), "count": n} for block, n in counts.items()
            ],
        }

    @classmethod
    def from_json(cls, text: str) -> Snapshot:
        """Read what :meth:`to_json` wrote.

        Raises:
            BadInput: not JSON, another schema, or fields missing or of the wrong type.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            refuse("text", text[:60], f"give the output of Snapshot.to_json ({error})")
        return cls.from_dict(data)

    @classmethod
    def from_dict(cls, data: object) -> Snapshot:
        """Read what :meth:`to_dict` gave.

        Raises:
            BadInput: another schema, or fields missing or of the wrong type.
        """
        if not isinstance(data, Mapping) or data.get("schema") != _SCHEMA:
            seen = data.get("schema") if isinstance(data, Mapping) else type(data).__name__
            refuse("schema", seen, f"this version reads snapshots of schema {_SCHEMA}")
        try:
            blocks = [
                Holding(
                    **{**{k: v for k, v in entry.items() if k != "count"}, "shape": tuple(entry["shape"])}
                )
                for entry in data["holdings"]
                for _ in range(int(entry.get("count", 1)))
            ]
            allocator = data["allocator"]
            return cls(
                total=int(data["total"]),
                by_category={str(key): int(n) for key, n in data["by_category"].items()},
                phase=str(data["phase"]),
                device=str(data["device"]),
                holdings=tuple(blocks),
                allocator=None if allocator is None else int(allocator),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            refuse(
                "snapshot",
                f"{type(error).__name__}: {error}",
                "give the output of Snapshot.to_dict, unaltered",
            )

    def __str__(self) -> str:
        """A table: the total, then each category with its bytes and its share."""
        where = f"on {self.device}, {self.phase or 'outside any phase'}"
        return table_of(f"{Budget(max(self.total, 0))} {where}", self.by_category)


def table_of(head: str, by_category: Mapping[str, int]) -> str:
    """A heading, then a line a category: bytes and share, largest first.

    Example:
        >>> print(table_of("4 KiB in all", {"inputs": 1024, "gradients": 3072}))
        4 KiB in all
          gradients                          3,072   75.0 %
          inputs                             1,024   25.0 %
    """
    total = sum(by_category.values()) or 1
    rows = sorted(by_category.items(), key=lambda item: -item[1])
    return "\n".join([head, *(f"  {name:<24}{n:>16,}{100 * n / total:>7.1f} %" for name, n in rows)])


class Point(NamedTuple):
    """One moment of a timeline: the number of the event, bytes in all and by category, the phase."""

    event: int
    total: int
    by_category: dict[str, int]
    phase: str
    by_module: dict[str, int] = {}  # noqa: RUF012  (never changed)


@dataclass(frozen=True)
class Timeline:
    """Bytes held after each allocation and release, oldest first.

    Attributes:
        points: the moments kept.
        marks: names given with ``led.mark``, with the number of the first event after each.
        dropped: events older than the ring buffer holds.

    Example:
        >>> line = Timeline((Point(0, 8, {"inputs": 8}, "forward"), Point(1, 4, {"inputs": 4}, "forward")))
        >>> len(line), line.peak().total
        (2, 8)
    """

    points: tuple[Point, ...]
    marks: tuple[tuple[int, str], ...] = field(default=())
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.points)

    def __iter__(self) -> Iterator[Point]:
        return iter(self.points)

    def __getitem__(self, place: int) -> Point:
        return self.points[place]

    def peak(self) -> Point:
        """The first point of the largest total.

        Raises:
            BadInput: the timeline is empty.
        """
        if not self.points:
            refuse("timeline", "no points", "run something inside the ledger first")
        return max(self.points, key=lambda point: point.total)
