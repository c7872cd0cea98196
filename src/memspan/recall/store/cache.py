"""One user's rows as arrays: what a search filters and scores, in memory, brought up to date by version.

Text stays in the database. A row costs 45 bytes here, and its vector 4 bytes a number once an exact search
needed it.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memspan.recall.records import KINDS
from memspan.recall.store.rows import STATES

__all__ = ["FOREVER", "FREQUENT", "MANY", "Arrays", "Postings", "bm25", "ranked", "rare_terms", "visible"]

#: A moment after all others, in place of "no end".
FOREVER = np.iinfo(np.int64).max
#: At more rows than ``MANY``, a query's terms in over this share of them are dropped.
FREQUENT, MANY = 0.05, 20_000

_DTYPES = {
    "rid": np.int64,
    "kind": np.int8,
    "state": np.int8,
    "length": np.int32,
    "created_at": np.int64,
    "valid_from": np.int64,
    "valid_to": np.int64,
    "expires_at": np.int64,
}
_K1, _B = 1.2, 0.75  # FTS5's own


@dataclass
class Arrays:
    """Columns of one user's rows by rising row number.

    Attributes:
        epoch: of the user's row when these were read; another epoch means read again from the start.
        version: up to which changes are in here.
        size: rows.
        vectors: float32 ``(capacity, dim)``, or None while no exact search needed them.
        vectors_version: up to which changes the vectors are in here.
    """

    epoch: int = -1
    version: int = 0
    size: int = 0
    vectors: NDArray[np.float32] | None = None
    vectors_version: int = 0
    lock: threading.RLock = field(default_factory=threading.RLock)
    _columns: dict[str, NDArray[Any]] = field(
        default_factory=lambda: {name: np.empty(0, dtype) for name, dtype in _DTYPES.items()}
    )

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._columns[name][: self.size]

    def reset(self, epoch: int) -> None:
        """Forget everything."""
        self.epoch, self.version, self.size, self.vectors, self.vectors_version = epoch, 0, 0, None, 0

    def put(self, rows: Sequence[Sequence[Any]]) -> None:
        """Write rows (values in the order of the columns, by rising row number), new or known."""
        if not rows:
            return
        values = np.array([[FOREVER if value is None else value for value in row] for row in rows], np.int64)
        new = values[:, 0] > (self["rid"][-1] if self.size else -1)
        old_places = self.places(values[~new, 0])
        start, self.size = self.size, self.size + int(new.sum())
        if self.size > len(self._columns["rid"]):
            capacity = max(64, self.size, 3 * len(self._columns["rid"]) // 2)
            for name, column in self._columns.items():
                self._columns[name] = _grown(column, capacity)
            if self.vectors is not None:
                self.vectors = _grown(self.vectors, capacity)
        for i, name in enumerate(_DTYPES):
            self._columns[name][old_places] = values[~new, i]
            self._columns[name][start : self.size] = values[new, i]

    def put_vectors(self, rows: Iterable[tuple[int, bytes]], dim: int, dtype: str) -> None:
        """Write vectors of rows that are here."""
        if self.vectors is None:
            self.vectors = np.zeros((len(self._columns["rid"]), dim), np.float32)
        rids: list[int] = []
        blobs: list[bytes] = []
        for rid, blob in rows:
            rids.append(rid)
            blobs.append(blob)
        if rids:
            places = self.places(np.array(rids, np.int64))
            self.vectors[places] = np.frombuffer(b"".join(blobs), dtype).reshape(len(rids), dim)

    def places(self, rids: NDArray[np.int64]) -> NDArray[np.intp]:
        """Where the rows stand; all of them must be here."""
        return np.searchsorted(self["rid"], rids)

    def known(self, rids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of the rows are here."""
        places = np.minimum(self.places(rids), max(self.size - 1, 0))
        found: NDArray[np.bool_] = self["rid"][places] == rids if self.size else np.zeros(len(rids), bool)
        return found

    def nbytes(self) -> int:
        """Bytes of memory that the arrays hold."""
        held = sum(column.nbytes for column in self._columns.values())
        return held + (0 if self.vectors is None else self.vectors.nbytes)


@dataclass(frozen=True)
class Postings:
    """Where one term of a query occurs: places in the arrays, how often there; its weight in the query."""

    places: NDArray[np.intp]
    times: NDArray[np.float64]
    weight: int


def visible(
    arrays: Arrays, kinds: Sequence[str], states: Sequence[str], as_of: int | None, now: int
) -> NDArray[np.bool_]:
    """Which rows a search looks at (see :meth:`memspan.recall.UserStore.search`)."""
    mask = _among(arrays["kind"], [KINDS.index(kind) for kind in kinds], len(KINDS))
    moment = now if as_of is None else as_of
    mask &= arrays["expires_at"] > moment
    if as_of is None:
        mask &= _among(arrays["state"], [STATES.index(state) for state in states], len(STATES))
        return mask
    active = arrays["state"] == STATES.index("active")
    ended = np.isin(arrays["state"], [STATES.index("superseded"), STATES.index("merged")])
    mask &= (arrays["created_at"] <= as_of) & (arrays["valid_from"] <= as_of) & (as_of < arrays["valid_to"])
    mask &= active | (ended & (arrays["valid_to"] < FOREVER))
    return mask


def _among(codes: NDArray[Any], wanted: Sequence[int], count: int) -> NDArray[np.bool_]:
    """Which of the codes below ``count`` are wanted; a table is many times quicker than a sorted search."""
    table = np.zeros(count, bool)
    table[list(wanted)] = True
    found: NDArray[np.bool_] = table[codes]
    return found


def bm25(postings: Sequence[Postings], lengths: NDArray[Any], rows: int, mean: float) -> NDArray[np.float64]:
    """FTS5's ``bm25()`` (sign turned): shape ``(n,)``, 0 without a shared term.

    The counts are of the rows that the search can see: nothing else, another user's rows above all, changes a
    score.

    Args:
        postings: of the query's terms, in rows that can be seen.
        lengths: terms of each row.
        rows: how many rows can be seen.
        mean: their mean length.
    """
    total = np.zeros(len(lengths))
    for posting in postings:
        n, times = len(posting.places), posting.times
        idf = max(np.log((rows - n + 0.5) / (n + 0.5)), 1e-6)
        damping = _K1 * (1 - _B + _B * lengths[posting.places] / mean)
        total[posting.places] += posting.weight * idf * times * (_K1 + 1) / (times + damping)
    return total


def rare_terms(terms: Counter[str], most: int, rows: Callable[[str, int], int]) -> Counter[str]:
    """The terms found in at most ``most`` rows; where all that occur are in more, the rarest of them.

    Args:
        terms: of the query.
        most: rows that a term may be in.
        rows: of a term, counted up to a limit (-1 for none).
    """
    counts = {term: rows(term, most + 1) for term in terms}
    kept = Counter({term: terms[term] for term, count in counts.items() if count <= most})
    often = [term for term in terms if term not in kept]
    if often and not any(counts[term] for term in kept):
        best = min(often, key=lambda term: (rows(term, -1), term))
        kept[best] = terms[best]
    return kept


def ranked(scores: NDArray[Any], candidates: NDArray[np.intp], depth: int) -> list[int]:
    """The best ``depth`` candidates, best first, ties (to six digits) to the earlier.

    Sums in float32 differ by the place of a row; six digits hide that, so that equal texts tie everywhere.
    """
    value = scores[candidates]
    if len(candidates) > depth:
        kept = np.argpartition(-value, depth - 1)[:depth]
        at_least = value[kept].min() - 1e-6
        kept = np.flatnonzero(value >= at_least) if (value >= at_least).sum() <= 4 * depth else np.sort(kept)
        candidates, value = candidates[kept], value[kept]
    order = np.lexsort((candidates, -np.round(value.astype(np.float64), 6)))[:depth]
    return [int(place) for place in candidates[order]]


def _grown(column: NDArray[Any], capacity: int) -> NDArray[Any]:
    grown = np.zeros((capacity, *column.shape[1:]), column.dtype)
    grown[: len(column)] = column
    return grown
