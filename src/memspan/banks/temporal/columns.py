"""Columns of events: ids of any kind as numbers, times of any kind as exact ones, files as flat maps."""

from __future__ import annotations

import datetime as dt
import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from memspan.base import refuse
from memspan.base.files import CorruptFile, atomic_write

if TYPE_CHECKING:
    from memspan.banks.temporal.events import TemporalData

__all__ = ["Numbers", "Sink", "mapped", "plain_ids", "plain_times", "windows"]

Array = NDArray[Any]
_WINDOW = 1 << 20  # rows of a mapped file looked at together
_FLOAT32_EXACT = 1 << 24


def windows(column: Array) -> Iterator[Array]:
    """A column in pieces that fit memory."""
    for start in range(0, len(column), _WINDOW):
        yield column[start : start + _WINDOW]


def plain_ids(name: str, given: ArrayLike) -> Array:
    """Ids as int64, other whole numbers, or objects; refuses floats and missing ones."""
    column = np.asarray(given)
    if column.dtype.kind == "f":
        refuse(name, str(column.dtype), "ids are whole numbers or text: a float cannot tell large ids apart")
    if column.dtype.kind == "O" and any(x is None or x != x or x == "" for x in column.tolist()):
        refuse(name, "a missing id", "fill or drop the rows without one")
    if column.dtype.kind in "US":
        column = column.astype(object)
    return column.astype(np.int64) if column.dtype.kind in "i" else column


def plain_times(t: ArrayLike) -> Array:
    """Times as int64 or float64; dates as microseconds since 1970, UTC."""
    column = np.asarray(t)
    kind = column.dtype.kind
    if kind == "M":
        if np.isnat(column).any():
            refuse("t", "NaT", "fill or drop the rows without a time")
        return column.astype("datetime64[us]").astype(np.int64)
    if kind in "OUS":
        return _dates(column)
    if kind in "iu":
        if kind == "u" and len(column) and column.max() > np.iinfo(np.int64).max:
            refuse("t", int(column.max()), "times fit in int64; subtract the first")
        return column.astype(np.int64, copy=False)
    if kind != "f":
        refuse("t", str(column.dtype), "give numbers, datetime64, or ISO dates as text")
    if column.dtype.itemsize < 8:
        if len(column) and np.nanmax(np.abs(column)) >= _FLOAT32_EXACT:
            refuse(
                "t", f"{column.dtype} up to {np.nanmax(column):.6g}",
                "it has lost whole units (unix seconds lose up to 64): read them as int64 or float64",
            )  # fmt: skip
        return column.astype(np.float64)
    return column.astype(np.float64, copy=False)


def _dates(column: Array) -> NDArray[np.int64]:
    """ISO dates as microseconds since 1970, UTC."""
    epoch = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
    microsecond = dt.timedelta(microseconds=1)
    found = np.empty(len(column), np.int64)
    zoned: bool | None = None
    for place, text in enumerate(column.tolist()):
        try:
            moment = text if isinstance(text, dt.datetime) else dt.datetime.fromisoformat(str(text).strip())
        except ValueError:
            refuse(
                "t", text, f"event {place}: give a number or an ISO date such as 2024-05-01T12:00:00+02:00"
            )
        if zoned is None:
            zoned = moment.tzinfo is not None
        if (moment.tzinfo is not None) != zoned:
            refuse("t", text, f"event {place}: some dates have a zone and some have none; give all a zone")
        moment = moment if zoned else moment.replace(tzinfo=dt.UTC)
        found[place] = (moment - epoch) // microsecond
    return found


class Numbers:
    """Numbers 0, 1, ... for ids, in the order in which event after event names them, source first."""

    def __init__(self, bipartite: bool, like: TemporalData | None) -> None:
        self.bipartite = bipartite
        self.source: dict[Any, int] = {}
        self.target: dict[Any, int] = {} if bipartite else self.source
        self.count, self.text = 0, False
        if like is not None:
            if like.bipartite != bipartite:
                refuse("bipartite", bipartite, f"the earlier part was read with {like.bipartite}")
            sides = np.ones(int(like.num_nodes or 0), bool) if like.is_source is None else like.is_source
            known = range(len(sides)) if like.nodes is None else like.nodes.tolist()
            for number, (name, side) in enumerate(zip(known, sides.tolist(), strict=True)):
                (self.source if side else self.target)[name] = number
            self.count = len(sides)

    def __call__(self, src: Array, dst: Array) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The numbers of some events' ids; those of new ids follow."""
        self.text |= src.dtype.kind == "O" or dst.dtype.kind == "O"
        if (src.dtype.kind == "O") != (dst.dtype.kind == "O") and not self.bipartite:
            refuse(
                "src, dst",
                (str(src.dtype), str(dst.dtype)),
                "ids of one kind of node are of one type: text_ids=True",
            )
        found = []
        new: list[tuple[int, dict[Any, int], Any]] = []
        for side, (column, known) in enumerate(((src, self.source), (dst, self.target))):
            distinct, first, place = np.unique(column, return_index=True, return_inverse=True)
            values = distinct.tolist()
            new += [
                (2 * at + side, known, v)
                for v, at in zip(values, first.tolist(), strict=True)
                if v not in known
            ]
            found.append((values, known, place))
        for _, known, value in sorted(new, key=lambda item: item[0]):
            if value not in known:
                known[value] = self.count
                self.count += 1
        one, other = (
            np.fromiter((known[v] for v in values), np.int64, len(values))[place] if len(values) else place
            for values, known, place in found
        )
        return one, other

    def like_range(self) -> bool:
        """Whether every id is its own number already."""
        return not self.bipartite and all(name == number for name, number in self.source.items())

    def nodes(self) -> Array:
        """The caller's ids by number."""
        names: list[Any] = [None] * self.count
        for known in (self.source, self.target):
            for name, number in known.items():
                names[number] = name
        return np.array(names, dtype=object) if self.text else np.array(names)

    def sides(self) -> Array | None:
        """For two kinds of nodes, which are sources."""
        if not self.bipartite:
            return None
        found = np.zeros(self.count, bool)
        found[list(self.source.values())] = True
        return found


class Sink:
    """Columns as they come: held, or written one flat file each, which are renamed when all are whole."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.parts: dict[str, list[Array]] = {}
        self.files: dict[str, Any] = {}
        self.shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
        self.work: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Sink:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.work = tempfile.TemporaryDirectory(dir=self.folder, prefix=".columns")
        return self

    def __exit__(self, *_: object) -> None:
        for file in self.files.values():
            file.close()
        if self.work is not None:
            self.work.cleanup()

    def add(self, name: str, values: Array) -> None:
        """Rows of a column that follow those before."""
        if self.work is None:
            self.parts.setdefault(name, []).append(values)
            return
        if name not in self.files:
            self.files[name] = (Path(self.work.name) / name).open("wb")
            self.shapes[name] = (values.dtype.str, values.shape[1:])
        if values.dtype.str != self.shapes[name][0]:
            refuse(name, str(values.dtype), "its type changes inside the file; give text_ids=True or mend it")
        self.files[name].write(np.ascontiguousarray(values).data)

    def held(self) -> dict[str, Array]:
        """The columns in memory."""
        empty = {"src": np.zeros(0, np.int64), "dst": np.zeros(0, np.int64), "t": np.zeros(0, np.int64)}
        return empty | {name: np.concatenate(parts) for name, parts in self.parts.items()}

    def mapped(self) -> dict[str, Array]:
        """The columns as writable maps of the files."""
        assert self.work is not None
        for file in self.files.values():
            file.close()
        if not self.shapes:
            refuse("path", "no rows", "there is nothing to map; leave cache out")
        return _maps(Path(self.work.name), self.shapes, "r+")

    def keep(self, key: str, whole: TemporalData) -> None:
        """Rename the columns into the folder; the description comes last, so that a kill leaves none."""
        assert self.work is not None
        assert self.folder is not None
        described = self.folder / "events.json"
        described.unlink(missing_ok=True)
        for name in self.shapes:
            (Path(self.work.name) / name).replace(self.folder / f"{name}.bin")
        told = {
            "key": key, "columns": {name: [kind, list(shape)] for name, (kind, shape) in self.shapes.items()},
            "num_nodes": whole.num_nodes, "nodes": None if whole.nodes is None else whole.nodes.tolist(),
            "sources": None if whole.is_source is None else np.flatnonzero(whole.is_source).tolist(),
        }  # fmt: skip
        atomic_write(described, json.dumps(told))


def mapped(folder: Path, key: str) -> dict[str, Any] | None:
    """The columns that a folder keeps for this key, or None."""
    try:
        told = json.loads((folder / "events.json").read_text("utf-8"))
        if told["key"] != key:
            return None
        shapes = {name: (kind, tuple(shape)) for name, (kind, shape) in told["columns"].items()}
        columns: dict[str, Any] = dict(_maps(folder, shapes, "r", ".bin"))
        columns["num_nodes"] = int(told["num_nodes"])
        names = told["nodes"]
        if names is not None:
            columns["nodes"] = np.array(names, dtype=object if str in set(map(type, names)) else None)
        if told["sources"] is not None:
            columns["is_source"] = np.isin(np.arange(told["num_nodes"]), told["sources"])
        return columns
    except FileNotFoundError:
        return None
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise CorruptFile(
            f"{folder} holds damaged columns ({error}); remove it to read the file anew"
        ) from error


def _maps(
    folder: Path,
    shapes: Mapping[str, tuple[str, tuple[int, ...]]],
    mode: Literal["r", "r+"],
    ending: str = "",
) -> dict[str, Array]:
    found: dict[str, Array] = {}
    for name, (kind, shape) in shapes.items():
        path = folder / f"{name}{ending}"
        row = np.dtype(kind).itemsize * math.prod(shape)
        count, rest = divmod(path.stat().st_size, row)
        if rest:
            raise CorruptFile(f"{path} is cut short; remove the folder to read the file anew")
        found[name] = np.memmap(path, np.dtype(kind), mode, shape=(count, *shape))
    lengths = {len(column) for column in found.values()}
    if len(lengths) > 1:
        raise CorruptFile(f"{folder}: columns of different length; remove it to read the file anew")
    return found
