"""Counting bytes: the protocol that everything which keeps memory follows, and budgets with units.

One rule: a byte is counted once, where it is held. ``memory_bytes()`` tells bytes really held, by
category (``"parameters"``, ``"replay.exemplars"``); :func:`nbytes` is their sum for anything countable.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from memspan.base import refuse

__all__ = [
    "Budget", "HoldsBytes", "PacksWeights", "header_bytes", "memory_bytes", "nbytes", "reached", "storages",
]  # fmt: skip


@runtime_checkable
class HoldsBytes(Protocol):
    """Anything that says which bytes it holds: ``memory_bytes()`` by ``category[.part]``."""

    def memory_bytes(self) -> dict[str, int]:
        """Bytes really held, by category."""
        ...


@runtime_checkable
class PacksWeights(Protocol):
    """A module that keeps weights in buffers, in another form than floats."""

    def packed_weights(self) -> dict[str, int]:
        """Buffers that hold weights, by name, and how many weights each stands for.

        A buffer that the form needs beside them (zero points, an order) stands for none.
        """
        ...


def storages(tensor: Tensor) -> list[torch.UntypedStorage]:
    """The storages under a tensor: its own, or those of the tensors that a subclass or sparse tensor wraps.

    Example:
        >>> [s.nbytes() for s in storages(torch.zeros(3))]
        [12]
    """
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        inner = [getattr(tensor, name) for name in names]  # a DTensor's parts also name its mesh
        return [storage for part in inner if isinstance(part, Tensor) for storage in storages(part)]
    if tensor.layout is torch.sparse_coo:
        return storages(tensor._indices()) + storages(tensor._values())
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return storages(tensor.crow_indices()) + storages(tensor.col_indices()) + storages(tensor.values())
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return storages(tensor.ccol_indices()) + storages(tensor.row_indices()) + storages(tensor.values())
    try:
        return [tensor.untyped_storage()]
    except (NotImplementedError, RuntimeError):  # opaque layouts (oneDNN) have no storage to name
        return []


def memory_bytes(thing: object) -> dict[str, int]:
    """Bytes by category of anything countable.

    Follows :class:`HoldsBytes` first; a plain ``nn.Module`` gives ``parameters`` and ``buffers`` with
    shared storages counted once; anything else gives its :func:`nbytes` under ``"data"``.

    Example:
        >>> memory_bytes(nn.Linear(3, 2))
        {'parameters': 32, 'buffers': 0}
    """
    if isinstance(thing, HoldsBytes):
        return dict(thing.memory_bytes())
    if isinstance(thing, nn.Module):
        seen: set[int] = set()
        return {
            "parameters": sum(_fresh(parameter, seen) for parameter in thing.parameters()),
            "buffers": sum(_fresh(buffer, seen) for buffer in thing.buffers()),
        }
    return {"data": nbytes(thing)}


def nbytes(thing: object) -> int:
    """Bytes that a thing holds; storages shared inside it are counted once.

    Args:
        thing: a ``HoldsBytes``, module, tensor, array, bytes, text (UTF-8), number (8), ``Path`` (size of the
            file or of all files in the folder), or a list, tuple, set or mapping of such. A container counts
            its items, not Python's own headers.

    Raises:
        BadInput: the thing cannot be counted.

    Example:
        >>> x = torch.zeros(4, 4)
        >>> nbytes(x), nbytes([x, x[0]]), nbytes({"a": np.zeros(3)}), nbytes(b"abc")
        (64, 64, 24, 3)
    """
    return _count(thing, set())


def header_bytes(thing: object) -> int:
    """Bytes of Python's own objects around the data: what :func:`nbytes` leaves out.

    Containers with their slots, and the object of each tensor, array, text and number in them; one that
    appears twice is counted once. In a list of small tensors they outweigh the data: keep one large tensor.
    What libtorch itself holds for a tensor, some 400 bytes more, cannot be seen from Python and is left out.

    Args:
        thing: as for :func:`nbytes`. Modules, files and what tells its own bytes have none here.

    Example:
        >>> many = [torch.zeros(4) for _ in range(1000)]
        >>> nbytes(many), header_bytes(many) > 80 * 1000
        (16000, True)
        >>> header_bytes(torch.zeros(1000, 4)) < 200
        True
    """
    return _headers(thing, set())


def reached(thing: object, objects: int = 0, besides: Iterable[object] = ()) -> Iterator[Any]:
    """What a thing leads to through containers and modules: tensors, arrays, texts, numbers, other objects.

    Args:
        thing: anything. A module gives its parameters and buffers, a mapping its values and what keys are no
            text.
        objects: how many objects deep attributes are followed, each object once. 0 gives an object itself, as
            well as a module or container that tells its own bytes.
        besides: what is left out, wherever it appears.

    Example:
        >>> list(reached({"a": [1, (2.5, "b")]}))
        [1, 2.5, 'b']
        >>> class Box:
        ...     def __init__(self, inside):
        ...         self.inside = inside
        >>> list(reached(Box([Box(3)]), objects=2)), len(list(reached(Box(3))))
        ([3], 1)
    """
    left_out = {id(value) for value in besides}
    entered: set[int] = set()
    waiting: list[tuple[object, int]] = [(thing, objects)]
    while waiting:
        value, depth = waiting.pop()
        if id(value) in left_out:
            continue
        if objects and isinstance(value, np.ndarray) and value.dtype == object:
            waiting += [(item, depth) for item in value.flat]
        if isinstance(value, _PLAIN) or (not objects and isinstance(value, HoldsBytes)):
            yield value
            continue
        if objects and id(value) in entered:
            continue
        entered.add(id(value))
        inside: Iterable[object]
        if isinstance(value, nn.Module):
            inside = (*value.parameters(), *value.buffers())
        elif isinstance(value, Mapping):
            inside = (*(key for key in value if not isinstance(key, str)), *value.values())
        elif isinstance(value, list | tuple | set | frozenset):
            inside = value
        elif depth:
            slots = [name for kind in type(value).__mro__ for name in _names(kind)]
            inside = (
                *getattr(value, "__dict__", {}).values(),
                *(getattr(value, name, None) for name in slots),
            )
            depth -= 1
        else:
            yield value
            continue
        waiting += [(item, depth) for item in reversed(list(inside))]


def _names(kind: type) -> Iterable[str]:
    slots = vars(kind).get("__slots__", ())
    return [slots] if isinstance(slots, str) else slots


_TEXTS = (str, bytes, bytearray, memoryview, Path)
_PLAIN = (Tensor, np.ndarray, np.generic, *_TEXTS, int, float, complex, type(None), type)


@dataclass(frozen=True, order=True)
class Budget:
    """A number of bytes with its unit kept apart: GiB is 2**30, GB is 10**9.

    Example:
        >>> Budget.parse("1.5KiB").bytes, Budget.parse("2 MB").bytes, str(Budget(3 * 2**20))
        (1536, 2000000, '3 MiB')
        >>> (Budget.parse("1GiB") - Budget.parse("512MiB")).bytes == 2**29
        True
    """

    bytes: int

    def __post_init__(self) -> None:
        if isinstance(self.bytes, bool) or not isinstance(self.bytes, int) or self.bytes < 0:
            refuse("bytes", self.bytes, "give a whole number of bytes, 0 or more")

    @classmethod
    def parse(cls, text: str | int | Budget) -> Budget:
        """Read ``"8GiB"``, ``"1.15 MiB"``, ``"500kB"``, ``"4096"`` or a number of bytes.

        Raises:
            BadInput: unknown unit or not a number; the units are named.
        """
        if isinstance(text, Budget):
            return text
        if isinstance(text, int) and not isinstance(text, bool):
            return cls(text)
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*", str(text))
        if match is None or match[2].lower() not in _UNITS:
            refuse(
                "budget",
                text,
                "write a number and a unit: B, kB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB",
            )
        return cls(round(float(match[1]) * _UNITS[match[2].lower()]))

    def __str__(self) -> str:
        for unit in ("TiB", "GiB", "MiB", "KiB"):
            size = _UNITS[unit.lower()]
            if self.bytes >= size:
                return f"{self.bytes / size:.4g} {unit}"
        return f"{self.bytes} B"

    def __int__(self) -> int:
        return self.bytes

    def __add__(self, other: Budget | int) -> Budget:
        return Budget(self.bytes + int(other))

    def __sub__(self, other: Budget | int) -> Budget:
        return Budget(self.bytes - int(other))

    def __mul__(self, factor: float) -> Budget:
        return Budget(round(self.bytes * factor))

    def __floordiv__(self, other: Budget | int) -> int:
        return self.bytes // int(other)

    def __truediv__(self, other: Budget | int) -> float:
        return self.bytes / int(other)


_UNITS = {"": 1, "b": 1} | {
    f"{letter}{kind}": base**power
    for power, letter in enumerate("kmgt", start=1)
    for kind, base in (("b", 1000), ("ib", 1024))
}


def _fresh(tensor: Tensor, seen: set[int]) -> int:
    total = 0
    for storage in storages(tensor):
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            total += storage.nbytes()
    return total


def _headers(thing: object, seen: set[int]) -> int:
    if id(thing) in seen or isinstance(thing, HoldsBytes | nn.Module | Path):
        return 0
    seen.add(id(thing))
    size = sys.getsizeof(thing)
    if isinstance(thing, Tensor):
        return size
    if isinstance(thing, Mapping):
        names = sum(sys.getsizeof(key) if isinstance(key, str) else _headers(key, seen) for key in thing)
        return size + names + sum(_headers(value, seen) for value in thing.values())
    if isinstance(thing, list | tuple | set | frozenset):
        return size + sum(_headers(item, seen) for item in thing)
    if isinstance(thing, np.ndarray):
        return size - (thing.nbytes if thing.flags.owndata else 0)
    return max(0, size - _count(thing, set()))


def _count(thing: object, seen: set[int]) -> int:
    return sum(_size(item, seen) for item in reached(thing))


def _size(item: object, seen: set[int]) -> int:
    """Bytes of one thing that :func:`reached` gives."""
    if isinstance(item, Tensor):
        return _fresh(item, seen)
    if isinstance(item, HoldsBytes):
        return sum(item.memory_bytes().values())
    if isinstance(item, bytes | bytearray):
        return len(item)
    if isinstance(item, str):
        return len(item.encode())
    if item is None:
        return 0
    if isinstance(item, int | float):
        return 8
    if isinstance(item, Path):
        files = [item] if item.is_file() else [file for file in item.rglob("*") if file.is_file()]
        return sum(file.stat().st_size for file in files)
    size = getattr(item, "nbytes", None)  # an array, a memoryview, or what says it by numpy's name
    if isinstance(size, int):
        return size
    refuse(
        "thing",
        item,
        "give something with memory_bytes() or nbytes: a module, tensor, array, path, or a container of such",
    )
