"""One user's rows as arrays: what a search filters and scores, in memory, brought up to date by version.

Text stays in the database. A row costs 45 bytes here, and its vector 4 bytes a number once an exact search
needed it.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memspan.recall.rank import bm25
from memspan.recall.records import KINDS
from memspan.recall.store.rows import STATES

__all__ = [
    "COLUMNS",
    "FOREVER",
    "FREQUENT",
    "MANY",
    "Arrays",
    "View",
    "field_scores",
    "ranked",
    "rare_terms",
    "visible",
]

#: A moment after all others, in place of "no end".
FOREVER = np.iinfo(np.int64).max
#: At more rows than ``MANY``, a query's terms in over this share of them are dropped.
FREQUENT, MANY = 0.05, 20_000

_DTYPES = {
    "rid": np.int64,
    "kind": np.int8,
    "state": np.int8,
    "length": np.int32,
    "session": np.int64,
    "asks": np.int8,
    "created_at": np.int64,
    "valid_from": np.int64,
    "valid_to": np.int64,
    "expires_at": np.int64,
}
#: What :meth:`Arrays.put` is given of each row, in SQL.
COLUMNS = (
    "rid, kind, state, length, session, CASE WHEN substr(key, 1, 4) = 'ask:' THEN 1 ELSE 0 END,"
    " created_at, valid_from, valid_to, expires_at, version"
)
_SAID = (KINDS.index("turn"), KINDS.index("document"))
_REACH = 2  # neighbours on each side whose words count
_DAY = 86_400_000_000


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
    _sessions: dict[object, int] = field(default_factory=dict)
    _columns: dict[str, NDArray[Any]] = field(
        default_factory=lambda: {name: np.empty(0, dtype) for name, dtype in _DTYPES.items()}
    )

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._columns[name][: self.size]

    def reset(self, epoch: int) -> None:
        """Forget everything."""
        self.epoch, self.version, self.size, self.vectors, self.vectors_version = epoch, 0, 0, None, 0
        self._sessions.clear()

    def put(self, rows: Sequence[Sequence[Any]]) -> None:
        """Write rows (:data:`COLUMNS`, by rising row number), new or known."""
        if not rows:
            return
        self.version = max(self.version, max(row[-1] for row in rows))
        numbered = [(*row[:4], self._session(row), *row[5:-1]) for row in rows]
        values = np.array([[FOREVER if v is None else v for v in row] for row in numbered], np.int64)
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

    def _session(self, row: Sequence[Any]) -> int:
        """Numbers of sessions, or of days where none is named; what was never said stands alone."""
        rid, kind, session, created_at = row[0], row[1], row[4], row[6]
        if kind not in _SAID:
            return -1 - int(rid)
        return self._sessions.setdefault((kind, session or created_at // _DAY), len(self._sessions))

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
    table = np.zeros(count, np.bool_)
    table[list(wanted)] = True
    found: NDArray[np.bool_] = table[codes]
    return found


@dataclass(frozen=True)
class View:
    """The rows that one search sees, neighbours of one session side by side.

    Attributes:
        places: of the rows in the arrays, shape ``(n,)``.
        group: numbers of their sessions, rising.
        lengths: their terms, float64.
        found: place in the arrays -> place here, -1 for none.
    """

    places: NDArray[np.intp]
    group: NDArray[np.intp]
    lengths: NDArray[np.float64]
    found: NDArray[np.intp]

    @classmethod
    def of(cls, arrays: Arrays, mask: NDArray[np.bool_]) -> View:
        """The rows under a mask, by session and then by age."""
        places = np.flatnonzero(mask)
        session = arrays["session"][places]
        order = np.argsort(session, kind="stable")
        places, session = places[order], session[order]
        group = np.cumsum(np.diff(session, prepend=session[:1]) != 0)
        found = np.full(arrays.size, -1, np.intp)
        found[places] = np.arange(len(places))
        return cls(places, group, arrays["length"][places].astype(np.float64), found)

    def around(self, values: NDArray[np.float64], reach: int) -> NDArray[np.float64]:
        """Sums over each row and its neighbours of the same session, ``reach`` on each side."""
        total = values.copy()
        for step in range(1, min(reach, len(values) - 1) + 1):
            same = self.group[step:] == self.group[:-step]
            total[step:] += values[:-step] * same
            total[:-step] += values[step:] * same
        return total


def field_scores(
    view: View,
    postings: Sequence[tuple[NDArray[np.intp], NDArray[np.float64], int]],
    cosines: NDArray[np.float64] | None,
    weights: Mapping[str, float],
) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float64]], NDArray[np.bool_]]:
    """How well each row answers, by itself and by what stands around it.

    A turn is often understood only with its neighbours: the question before it holds the word that is asked
    for, and its session the theme. So BM25 counts terms in the turn (``words``), in the turn with two turns
    on each side (``words_around``) and in its session (``words_session``); the cosine is the turn's
    (``vector``) and the mean with one neighbour on each side (``vector_around``). Each is brought to mean 0
    and deviation 1 over the rows that the search sees, and weighted. Nothing is stored for it beyond the
    index of words and the vectors.

    Args:
        view: of the rows, n of them.
        postings: for each term of the query: rising places in the view, counts there, weight in the query.
        cosines: of the rows, NaN where unknown (an approximate search knows a few); None: words alone.
        weights: of the fields.

    Returns:
        Scores ``(n,)``, the fields by name, and which rows are candidates.
    """
    n = len(view.places)
    fields: dict[str, NDArray[np.float64]] = {}
    shared = np.zeros(n, np.bool_)
    if postings:
        fields["words"] = bm25(postings, view.lengths, n)
        shared = fields["words"] > 0
        if weights.get("words_around"):
            wide = []
            for places, times, weight in postings:
                dense = np.zeros(n)
                dense[places] = times
                dense = view.around(dense, _REACH)
                hit = np.flatnonzero(dense)
                wide.append((hit, dense[hit], weight))
            fields["words_around"] = bm25(wide, view.around(view.lengths, _REACH), n)
        if weights.get("words_session"):
            groups = int(view.group[-1]) + 1
            by_group = []
            for places, times, weight in postings:
                held = np.bincount(view.group[places], times, groups).astype(np.float64)
                hit = np.flatnonzero(held)
                by_group.append((hit, held[hit], weight))
            lengths = np.bincount(view.group, view.lengths, groups).astype(np.float64)
            fields["words_session"] = bm25(by_group, lengths, groups)[view.group]
    known = np.ones(n, np.bool_)
    if cosines is not None:
        known = ~np.isnan(cosines)
        fields["vector"] = cosines
        if weights.get("vector_around"):
            count = view.around(known.astype(np.float64), 1)
            plain = view.around(np.where(known, cosines, 0.0), 1)
            fields["vector_around"] = np.where(known, plain / np.maximum(count, 1), np.nan)
    total = np.zeros(n)
    for name, values in fields.items():
        total += weights.get(name, 0.0) * _standard(values)
    candidates = known if cosines is not None else shared
    return total, fields, candidates


def _standard(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean 0 and deviation 1 of what is known; 0 where all are alike, and for what is not known."""
    known = values[~np.isnan(values)]
    spread = float(known.std()) if known.size else 0.0
    if spread < 1e-9:
        return np.zeros(len(values))
    return np.asarray(np.nan_to_num((values - known.mean()) / spread, nan=0.0))


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
