"""Streams of timed edges: read, checked, put in order, split by time, cut into batches, reported on.

Columns are numpy arrays; with ``cache=`` a file is written once as one flat file a column and mapped from
there, so that a stream may be larger than memory. Ids become 0 to N - 1 in the order of their first
appearance; :attr:`TemporalData.nodes` tells which is which.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from memspan.banks.temporal.columns import (
    Array,
    Numbers,
    Sink,
    mapped,
    plain_ids,
    plain_times,
    windows,
)
from memspan.banks.temporal.memory import Events
from memspan.base import optional, refuse
from memspan.base.files import CorruptFile, fingerprint
from memspan.base.rng import Key, rng
from memspan.data import read_chunks

__all__ = ["BatchReport", "TemporalBatches", "TemporalData", "batch_report"]

Sampling = Literal["uniform", "historical"]


@dataclass(frozen=True, eq=False)
class TemporalData:
    """Timed edges in the order of time.

    Attributes:
        src: (E,) int64, 0 to ``num_nodes`` - 1.
        dst: (E,) int64, likewise.
        t: (E,) int64 or float64, any unit, never falling. Dates are microseconds since 1970, UTC.
        msg: (E, F) float32 features; F may be 0.
        label: (E,) float32 label of the source at the event, or None.
        component: (E,) int64 kind of event for PRES, or None.
        num_nodes: N; None: one more than the largest id.
        nodes: (N,) the caller's ids, or None where ids were 0 to N - 1 already.
        bipartite: source and target ids are of two kinds: the same id on both sides is two nodes.
        origin: the time that counts as 0; None: that of the first event.

    Raises:
        BadInput: times that fall, are negative or not finite (the event is named); ids outside 0 to N - 1, or
            floats; columns of other lengths; float32 times beyond 2**24, which have lost whole seconds.

    Example:
        >>> data = TemporalData.from_arrays(["ann", "bob"], ["bob", "cy"], [10, 15], msg=[[1.0], [2.0]])
        >>> data.num_nodes, data.msg_dim, data.mean_gap, data.nodes.tolist(), data.dst.tolist()
        (3, 1, 5.0, ['ann', 'bob', 'cy'], [1, 2])
    """

    src: Array
    dst: Array
    t: Array
    msg: Array | None = None
    label: Array | None = None
    component: Array | None = None
    num_nodes: int | None = None
    nodes: Array | None = None
    bipartite: bool = False
    origin: float | None = None
    is_source: Array | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        count = len(self.t)
        if self.msg is None:
            object.__setattr__(self, "msg", np.zeros((count, 0), np.float32))
        for name in ("src", "dst", "msg", "label", "component"):
            column = getattr(self, name)
            if column is not None and len(column) != count:
                refuse(name, f"{len(column)} rows", f"there are {count} times: give one row for each event")
        for name in ("src", "dst", *(("component",) if self.component is not None else ())):
            column = getattr(self, name)
            if column.dtype.kind not in "iu":
                refuse(name, str(column.dtype), "ids are whole numbers; from_arrays takes any ids")
        object.__setattr__(self, "t", plain_times(self.t))
        top = 0
        for name in ("src", "dst"):
            for window in windows(getattr(self, name)):
                if len(window) and window.min() < 0:
                    refuse(name, int(window.min()), "ids run from 0 to num_nodes - 1")
                top = max(top, int(window.max(initial=-1)) + 1)
        if self.num_nodes is None:
            object.__setattr__(self, "num_nodes", top)
        elif top > self.num_nodes:
            refuse("num_nodes", self.num_nodes, f"an event names node {top - 1}")
        last: float = 0
        at = 0
        for window in windows(self.t):
            wrong = ~np.isfinite(window) | (window < 0)
            if wrong.any():
                place = int(wrong.argmax())
                refuse("t", window[place].item(), f"event {at + place}: times are finite and 0 or more")
            falls = np.diff(window, prepend=window.dtype.type(last)) < 0
            if falls.any():
                place = at + int(falls.argmax())
                refuse(
                    "t", self.t[place].item(), f"event {place} lies before its predecessor; give sort=True"
                )
            last, at = window[-1], at + len(window)
        if self.origin is None:
            object.__setattr__(self, "origin", self.t[0].item() if count else 0)

    # -- doors --

    @classmethod
    def from_arrays(
        cls,
        src: ArrayLike,
        dst: ArrayLike,
        t: ArrayLike,
        msg: ArrayLike | None = None,
        label: ArrayLike | None = None,
        component: ArrayLike | None = None,
        *,
        bipartite: bool = False,
        sort: bool = False,
        like: TemporalData | None = None,
    ) -> TemporalData:
        """From columns with ids of any kind: text, 64-bit hashes, numbers with gaps.

        Args:
            src: (E,) ids; not floats.
            dst: (E,) ids.
            t: (E,) numbers, ``datetime64``, or ISO dates as text, all with a zone or all without (then UTC).
            msg: (E, F) or (E,) features, finite.
            label: (E,) numbers.
            component: (E,) whole numbers from 0.
            bipartite: the same id on both sides is two nodes.
            sort: put events in the order of time; equal times keep their order.
            like: an earlier part of the same stream, whose ids and origin go on here; new ids follow.

        Raises:
            BadInput: see the class; ids that are floats; with ``like``, events before its last.
        """
        columns: dict[str, Array] = {
            "src": plain_ids("src", src),
            "dst": plain_ids("dst", dst),
            "t": plain_times(t),
        }
        if not len(columns["src"]) == len(columns["dst"]) == len(columns["t"]):
            lengths = {name: len(column) for name, column in columns.items()}
            refuse("src, dst, t", lengths, "give one of each for every event")
        numbers = Numbers(bipartite, like)
        columns["src"], columns["dst"] = numbers(columns["src"], columns["dst"])
        if msg is not None:
            columns["msg"] = np.atleast_2d(np.asarray(msg, np.float32).T).T
        if label is not None:
            columns["label"] = np.asarray(label, np.float32)
        if component is not None:
            columns["component"] = np.asarray(component)
        return cls._made(columns, numbers, sort, like)

    @classmethod
    def from_pandas(
        cls, frame: Any, src: str, dst: str, t: str, msg: Sequence[str] = (), **options: Any
    ) -> TemporalData:
        """From columns of a pandas or polars frame; options as :meth:`from_arrays`, labels by column name."""
        for name in ("label", "component"):
            if isinstance(options.get(name), str):
                options[name] = frame[options[name]].to_numpy()
        features = np.stack([frame[name].to_numpy() for name in msg], 1) if msg else None
        when = frame[t]
        if "zone" in str(when.dtype) or "UTC" in str(when.dtype) or "[ns, " in str(when.dtype):
            when = when.dt.tz_convert("UTC").dt.tz_localize(None)
        return cls.from_arrays(
            frame[src].to_numpy(), frame[dst].to_numpy(), when.to_numpy(), features, **options
        )

    @classmethod
    def from_csv(
        cls,
        path: str | Path,
        src: str,
        dst: str,
        t: str,
        msg: Sequence[str] = (),
        *,
        label: str | None = None,
        component: str | None = None,
        bipartite: bool = False,
        sort: bool = False,
        like: TemporalData | None = None,
        cache: str | Path | None = None,
        text_ids: bool = False,
        **reading: Any,
    ) -> TemporalData:
        """From the named columns of a CSV, TSV or Parquet file (``from_parquet`` is the same).

        Args:
            path: the file.
            src: column of the sources' ids.
            dst: column of the destinations' ids.
            t: column of times: numbers, or ISO dates.
            msg: columns of features.
            label: column of labels.
            component: column of kinds of event.
            bipartite: see :meth:`from_arrays`.
            sort: see :meth:`from_arrays`.
            like: see :meth:`from_arrays`.
            cache: a folder in which each column is kept as one flat file, to be mapped instead of held; made
                anew where the file or the question has changed.
            text_ids: ids are text even where they look like numbers ("007" is not 7).
            reading: ``delimiter``, ``names``, ``skip`` of :func:`memspan.data.read_chunks`.

        Raises:
            BadInput: see the class.
            CorruptFile: the file is damaged, a row too short or too long, or a feature no number.
        """
        path = Path(path)
        ids: dict[str, Any] = {src: str, dst: str} if text_ids else {src: None, dst: None}
        wanted: dict[str, Any] = {**ids, t: None, **dict.fromkeys(msg, float)}
        wanted |= {} if label is None else {label: float}
        wanted |= {} if component is None else {component: int}
        question = [list(wanted), list(msg), bipartite, sort, text_ids, sorted(reading.items()), 1]
        key = None
        if cache is not None:
            if like is not None:
                refuse("cache", str(cache), "leave it out with like=: ids depend on the earlier part too")
            key = fingerprint([fingerprint(path), question])
            found = mapped(Path(cache), key)
            if found is not None:
                return cls(**found, bipartite=bipartite)
        numbers = Numbers(bipartite, like)
        sink = Sink(None if cache is None else Path(cache))
        with sink:
            for chunk in read_chunks(path, wanted, **reading):
                one, other = numbers(plain_ids("src", chunk[src]), plain_ids("dst", chunk[dst]))
                sink.add("src", one)
                sink.add("dst", other)
                sink.add("t", plain_times(chunk[t]))
                if msg:
                    sink.add("msg", np.stack([chunk[name] for name in msg], 1).astype(np.float32))
                if label is not None:
                    sink.add("label", chunk[label].astype(np.float32))
                if component is not None:
                    sink.add("component", chunk[component])
            if key is None:
                return cls._made(sink.held(), numbers, sort, like)
            columns = sink.mapped()
            if sort:
                order = np.argsort(columns["t"], kind="stable")
                for column in columns.values():
                    column[:] = np.array(column)[order]  # one column at a time is held
            whole = cls._made(columns, numbers, False, None)
            sink.keep(key, whole)
        again = mapped(Path(cache or ""), key)
        assert again is not None
        return cls(**again, bipartite=bipartite)

    from_parquet = from_csv

    @classmethod
    def from_jodie(cls, path: str | Path, **options: Any) -> TemporalData:
        """From JODIE's format: ``user_id,item_id,timestamp,state_label`` and as many features as a row has.

        Its header has five names, the last of which stands for all features; users and items are two kinds.
        """
        path = Path(path)
        with path.open(encoding="utf-8") as file:
            file.readline()
            width = len(file.readline().rstrip().split(","))
        if width < 4:
            raise CorruptFile(f"{path}: the first row has {width} values; JODIE's format has 4 and features")
        features = [f"f{i}" for i in range(width - 4)]
        names = ("user", "item", "t", "state_label", *features)
        given = {"label": "state_label", "bipartite": True, **options}
        return cls.from_csv(path, "user", "item", "t", features, names=names, skip=1, **given)

    @classmethod
    def from_snap(cls, path: str | Path, **options: Any) -> TemporalData:
        """From SNAP's format: ``source target unix-time``, by blanks, without a header; also ``.gz``."""
        return cls.from_csv(path, "src", "dst", "t", names=("src", "dst", "t"), delimiter=" ", **options)

    @classmethod
    def from_pyg(cls, data: Any, **options: Any) -> TemporalData:
        """From PyG's ``TemporalData``; ``y`` becomes the label."""
        msg, label = getattr(data, "msg", None), getattr(data, "y", None)
        return cls.from_arrays(
            data.src.numpy(), data.dst.numpy(), data.t.numpy(),
            None if msg is None else msg.numpy(), None if label is None else label.numpy(), **options,
        )  # fmt: skip

    def to_pyg(self) -> Any:
        """PyG's ``TemporalData`` with these ids, times since the origin, and float features."""
        pyg = optional("torch_geometric.data", extra="peers")
        since = np.asarray(self.t) - self.t.dtype.type(self.origin or 0)
        parts = {name: torch.from_numpy(np.array(x)) for name, x in (("src", self.src), ("dst", self.dst))}
        return pyg.TemporalData(
            **parts, t=torch.from_numpy(since), msg=torch.from_numpy(np.array(self.msg)),
            **({} if self.label is None else {"y": torch.from_numpy(np.array(self.label))}),
        )  # fmt: skip

    @classmethod
    def _made(
        cls, columns: dict[str, Array], numbers: Numbers, sort: bool, like: TemporalData | None
    ) -> TemporalData:
        for name, column in columns.items():
            for window in windows(column):
                if column.dtype.kind == "f" and not np.isfinite(window).all():
                    refuse(name, "NaN or infinite", "fill or drop the rows that have no number")
        if sort:
            order = np.argsort(columns["t"], kind="stable")
            columns = {name: column[order] for name, column in columns.items()}
        if not numbers.text and numbers.like_range():
            nodes = None
        else:
            nodes = numbers.nodes()
        made = cls(
            **columns, num_nodes=numbers.count, nodes=nodes, bipartite=numbers.bipartite,
            origin=None if like is None else like.origin, is_source=numbers.sides(),
        )  # fmt: skip
        if like is not None and len(made) and len(like) and made.t[0] < like.t[-1]:
            refuse(
                "t", made.t[0].item(), f"the earlier part ends at {like.t[-1].item()}; give what follows it"
            )
        return made

    # -- what it tells --

    def __len__(self) -> int:
        return len(self.t)

    @property
    def msg_dim(self) -> int:
        """F."""
        return int(self.msg.shape[1]) if self.msg is not None else 0

    @property
    def mean_gap(self) -> float:
        """Mean time between two events, in the unit of ``t``; 1 where all are at one time."""
        if len(self) < 2 or self.t[-1] == self.t[0]:
            return 1.0
        return float(self.t[-1] - self.t[0]) / (len(self) - 1)

    @property
    def destinations(self) -> NDArray[np.int64]:
        """Ids that occur as a destination, rising: what a uniform negative is drawn from."""
        seen = np.zeros(int(self.num_nodes or 0), bool)
        for window in windows(self.dst):
            seen[window] = True
        return np.flatnonzero(seen)

    def part(self, start: int, stop: int) -> TemporalData:
        """Events ``start`` to ``stop`` - 1 of the same nodes and origin; nothing is copied."""
        cut = {
            name: None if column is None else column[start:stop]
            for name in ("src", "dst", "t", "msg", "label", "component")
            for column in (getattr(self, name),)
        }
        return replace(self, **cut)  # type: ignore[arg-type]

    def keep(self, rows: NDArray[np.bool_]) -> TemporalData:
        """The events chosen by a mask (E,), of the same nodes and origin; copied."""
        cut = {
            name: None if column is None else column[rows]
            for name in ("src", "dst", "t", "msg", "label", "component")
            for column in (getattr(self, name),)
        }
        return replace(self, **cut)  # type: ignore[arg-type]

    def chronological_split(
        self, valid: float = 0.15, test: float = 0.15
    ) -> tuple[TemporalData, TemporalData, TemporalData]:
        """The first, middle and last events.

        Raises:
            BadInput: a part would be empty.
        """
        if not (valid > 0 and test > 0 and valid + test < 1):
            refuse("valid, test", (valid, test), "give two shares above 0 whose sum is below 1")
        first, second = int(len(self) * (1 - valid - test)), int(len(self) * (1 - test))
        if not 0 < first < second < len(self):
            refuse("valid, test", (valid, test), f"one part of {len(self)} events would be empty")
        return self.part(0, first), self.part(first, second), self.part(second, len(self))


class TemporalBatches:
    """Batches of a stream in its order, each with destinations that did not happen.

    Args:
        data: the stream.
        batch_size: events in a batch, except the last; or
        time_window: time that a batch spans, in the unit of ``t``.
        negatives: for each event, K.
        sampling: ``"uniform"``: from ``candidates``. ``"historical"``: one the same source met before and not
            in this batch, where there is one, else uniform.
        candidates: (C,) ids; the stream's destinations when None.
        history: the stream so far, for historical negatives; of this stream alone when None.
        seed: key of the draws: the same key gives the same negatives for every batch size.

    Yields:
        :class:`Events`, times since the origin.

    Raises:
        BadInput: neither or both of size and window, sizes below 1, no candidates.

    Example:
        >>> data = TemporalData.from_arrays([0, 1, 0], [2, 3, 3], [0, 1, 5])
        >>> [len(batch.src) for batch in TemporalBatches(data, time_window=2)]
        [2, 1]
    """

    def __init__(
        self,
        data: TemporalData,
        batch_size: int | None = None,
        *,
        time_window: float | None = None,
        negatives: int = 1,
        sampling: Sampling = "uniform",
        candidates: Array | None = None,
        history: TemporalData | None = None,
        seed: Key = 0,
    ) -> None:
        if (batch_size is None) == (time_window is None):
            refuse("batch_size, time_window", (batch_size, time_window), "give one of the two")
        if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
            refuse("batch_size", batch_size, "give 1 or more events")
        if time_window is not None and not time_window > 0:
            refuse("time_window", time_window, "give a time above 0")
        if sampling not in ("uniform", "historical"):
            refuse("sampling", sampling, 'use "uniform" or "historical"')
        self.data, self.size, self.window, self.k = data, batch_size, time_window, negatives
        self.sampling, self.seed = sampling, seed
        self.candidates = data.destinations if candidates is None else np.asarray(candidates)
        if negatives and not len(self.candidates):
            refuse("candidates", "none", "give destinations to draw negatives from")
        self.history = history
        self._met: _Met | None = None

    def __len__(self) -> int:
        return sum(1 for _ in self._cuts())

    def __iter__(self) -> Iterator[Events]:
        draws = rng("temporal.negatives", self.seed)
        if self.sampling == "historical" and self._met is None:
            self._met = _Met(self.data, self.history)
        data, origin = self.data, self.data.origin or 0
        for start, stop in self._cuts():
            src, dst = (np.asarray(x[start:stop], np.int64) for x in (data.src, data.dst))
            t = (np.asarray(data.t[start:stop]) - data.t.dtype.type(origin)).astype(np.float64)
            wrong = None
            if self.k:
                wrong = self.candidates[
                    (draws.random((stop - start, self.k)) * len(self.candidates)).astype(int)
                ]
                if self._met is not None:
                    wrong = self._met.negatives(start, stop, src, dst, wrong, draws)
            kind = None if data.component is None else torch.from_numpy(np.array(data.component[start:stop]))
            yield Events(
                torch.from_numpy(np.array(src)), torch.from_numpy(np.array(dst)), torch.from_numpy(t),
                torch.from_numpy(np.array(data.msg[start:stop] if data.msg is not None else 0)),
                kind, None if wrong is None else torch.from_numpy(np.asarray(wrong, np.int64)),
            )  # fmt: skip

    def _cuts(self) -> Iterator[tuple[int, int]]:
        start, count = 0, len(self.data)
        while start < count:
            if self.size is not None:
                stop = min(count, start + self.size)
            else:
                t, first = self.data.t, self.data.t[0]
                end = first + (math.floor((t[start] - first) / self.window) + 1) * self.window
                stop = max(start + 1, int(np.searchsorted(t, end)))
            yield start, stop
            start = stop


class _Met:
    """Whom each source met before each event: positions of its events, in order."""

    def __init__(self, data: TemporalData, history: TemporalData | None) -> None:
        parts = [data] if history is None else [history, data]
        self.offset = 0 if history is None else len(history)
        src = np.concatenate([np.asarray(part.src) for part in parts])
        self.dst = np.concatenate([np.asarray(part.dst) for part in parts])
        self.order = np.argsort(src, kind="stable")  # by source, each in the order of the stream
        self.first = np.searchsorted(src[self.order], np.arange(int(data.num_nodes or 0) + 1))

    def negatives(
        self, start: int, stop: int, src: Array, dst: Array, uniform: Array, draws: np.random.Generator
    ) -> Array:
        """Drawn from the source's destinations before this batch; those of the batch itself are not wrong."""
        begin = self.first[src]
        before = np.array(
            [
                np.searchsorted(self.order[a : self.first[s + 1]], start + self.offset)
                for a, s in zip(begin, src, strict=True)
            ]
        )
        place = (draws.random(uniform.shape) * before[:, None]).astype(int) + begin[:, None]
        old = self.dst[self.order[np.minimum(place, len(self.order) - 1)]]
        width = int(max(self.dst.max(initial=0), dst.max(initial=0))) + 1
        now = np.unique(src * width + dst)
        right = np.isin(src[:, None] * width + old, now)
        return np.where((before[:, None] > 0) & ~right, old, uniform)


@dataclass(frozen=True)
class BatchReport:
    """What a batch size hides from the events of a stream, before any training.

    Attributes:
        batch_size: events in a batch.
        batches: of the stream.
        pending_share: share of events one of whose nodes was in an earlier event of the same batch.
        lost_messages: messages that a later one of the same node and batch overwrites.
        lost_share: of all messages, two for each event.
        rounds: longest chain of events through shared nodes, summed over batches: the steps that an exact
            pass would need.
    """

    batch_size: int
    batches: int
    pending_share: float
    lost_messages: int
    lost_share: float
    rounds: int

    def __str__(self) -> str:
        return (
            f"batches of {self.batch_size}: {self.pending_share:.1%} of events do not see an earlier one of "
            f"their batch, {self.lost_share:.1%} of messages are overwritten; an exact pass takes "
            f"{self.rounds} rounds where this takes {self.batches}"
        )


def batch_report(data: TemporalData, batch_size: int) -> BatchReport:
    """Pending events, lost messages and dependency depth of a stream cut into batches.

    Args:
        data: the stream.
        batch_size: events in a batch.

    Raises:
        BadInput: a size below 1, or no events.

    Example:
        >>> data = TemporalData.from_arrays([0, 1, 4], [1, 2, 5], [0, 1, 2])
        >>> report = batch_report(data, 3)
        >>> round(report.pending_share, 2), report.lost_messages, report.rounds
        (0.33, 1, 2)
    """
    if not isinstance(batch_size, int) or batch_size < 1:
        refuse("batch_size", batch_size, "give 1 or more events")
    if not len(data):
        refuse("data", "no events", "give a stream")
    pending = lost = rounds = batches = 0
    for start in range(0, len(data), batch_size):
        depth: dict[int, int] = {}
        deepest = 0
        pairs = zip(
            data.src[start : start + batch_size].tolist(), data.dst[start : start + batch_size].tolist(),
            strict=True,
        )  # fmt: skip
        for i, j in pairs:
            before = max(depth.get(i, 0), depth.get(j, 0))
            pending += before > 0
            depth[i] = depth[j] = before + 1
            deepest = max(deepest, before + 1)
        lost += 2 * min(batch_size, len(data) - start) - len(depth)
        rounds += deepest
        batches += 1
    share = lost / (2 * len(data))
    return BatchReport(batch_size, batches, pending / len(data), lost, share, rounds)
