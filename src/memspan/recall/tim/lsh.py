"""Locality-sensitive hashing by angle: near vectors fall into one bucket, more often the nearer they are.

``F(x) = argmax([xR ; -xR])`` with R of shape (dim, buckets / 2), standard normal: the bucket is the
direction, out of ``buckets`` random ones and their opposites, that x points to most (as in Reformer; section
3.2 of Think-in-Memory). One bucket misses most neighbours of sentence vectors, so several tables and several
probes a table are offered, and :func:`plan_lsh` tells what a target recall costs.
"""

from __future__ import annotations

import functools
import math
import os
import warnings
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, Self, overload

import numpy as np
from numpy.typing import NDArray

from memspan.base import refuse
from memspan.base.files import load_state, save_state
from memspan.base.rng import rng

__all__ = ["AngularLSH", "LSHPlan", "collision_probability", "plan_lsh", "probe_probability"]

Rows = NDArray[np.float32]


class AngularLSH:
    """An index of vectors by angular hashing, with exact scores for the candidates.

    Args:
        dim: of the vectors.
        buckets: of a table, even.
        tables: independent tables.
        probes: buckets looked at in each table, nearest first.
        seed: of R (PCG64); R itself is saved, never drawn again.
        orthogonal: make the directions of a table orthogonal, as far as there are dimensions.
        exact_below: scan everything while ``len * dim`` is below this, or fewer than k candidates are found;
            0 switches both fallbacks off.
        center: subtracted before hashing (never from the scores); the mean of sentence vectors spreads
            buckets better.

    Raises:
        BadInput: odd or too few buckets, more probes than buckets, sizes below 1.

    Example:
        >>> X = rng("lsh").standard_normal((100, 16)).astype(np.float32)
        >>> index = AngularLSH(16, buckets=8, tables=4, probes=2)
        >>> index.add(range(100), X)
        >>> ids, scores, scanned = index.query(X[7], k=3)
        >>> ids[0], round(scores[0], 3)
        (7, 1.0)
    """

    def __init__(
        self,
        dim: int,
        buckets: int = 16,
        tables: int = 1,
        probes: int = 1,
        seed: int = 0,
        orthogonal: bool = False,
        exact_below: float = 5e6,
        center: Any | None = None,
    ) -> None:
        if buckets < 2 or buckets % 2:
            refuse("buckets", buckets, "an even number, 2 or more")
        if not 1 <= probes <= buckets:
            refuse("probes", probes, f"between 1 and the {buckets} buckets")
        for name, value in (("dim", dim), ("tables", tables)):
            if value < 1:
                refuse(name, value, "at least 1")
        self.dim, self.buckets, self.tables, self.probes = dim, buckets, tables, probes
        self.seed, self.orthogonal, self.exact_below = seed, orthogonal, exact_below
        self.center = np.zeros(dim) if center is None else np.asarray(center, np.float64)
        if self.center.shape != (dim,):
            refuse("center", self.center.shape, f"shape ({dim},)")
        self.R = _directions(dim, buckets, tables, seed, orthogonal)
        # Vectors lie in the order of the first table's buckets after the first query that uses them, so that
        # a bucket is scored where it lies; ``_turn`` remembers the order in which they came.
        self._ids: list[Hashable] = []
        self._known: set[Hashable] = set()
        self._rows = np.zeros((0, dim), np.float32)
        self._codes = np.zeros((0, tables), np.int64)
        self._turn = np.zeros(0, np.int64)
        self._exact: tuple[Rows, NDArray[np.float64]] | None = None  # R, and R in float64
        self._lists: list[tuple[NDArray[np.int64], NDArray[np.int64]]] | None = None

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, id: Hashable) -> bool:
        return id in self._known

    def hash(self, X: Any) -> NDArray[np.int64]:
        """Bucket of each vector in each table, shape ``(n, tables)``; computed in float64.

        Raises:
            BadInput: another dimension, zero or non-finite vectors (which have no direction).
        """
        return np.asarray(self._margins(self._checked(X)).argmax(axis=2), np.int64)

    def add(self, ids: Sequence[Hashable] | range, X: Any) -> None:
        """Add vectors under new ids.

        Raises:
            BadInput: an id that is there already, or twice; vectors as in :meth:`hash`.
        """
        names, rows = list(ids), self._checked(X)
        if len(names) != len(rows):
            refuse("ids", f"{len(names)} ids", f"give one for each of the {len(rows)} vectors")
        if len(set(names)) != len(names) or not self._known.isdisjoint(names):
            refuse("ids", names[:5], "give each id once, and none that is there already")
        first = int(self._turn.max()) + 1 if len(self) else 0
        self._known.update(names)
        self._ids += names
        self._codes = np.concatenate([self._codes, self._margins(rows).argmax(axis=2)])
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        self._rows = np.concatenate([self._rows, unit.astype(np.float32)])
        self._turn = np.concatenate([self._turn, np.arange(first, first + len(names))])
        self._lists = None

    def remove(self, ids: Sequence[Hashable]) -> None:
        """Remove ids.

        Raises:
            BadInput: an id that is not there.
        """
        gone = set(ids)
        if unknown := gone - self._known:
            refuse("ids", sorted(map(str, unknown))[:5], "not in the index")
        keep = np.array([name not in gone for name in self._ids], bool)
        self._ids = [name for name in self._ids if name not in gone]
        self._known -= gone
        self._rows, self._codes, self._turn = self._rows[keep], self._codes[keep], self._turn[keep]
        self._lists = None

    @overload
    def query(self, q: Any, k: int, *, probes: int | None = None) -> tuple[list[Any], list[float], int]: ...
    @overload
    def query(
        self, q: Any, k: int, *, probes: int | None = None, batch: bool
    ) -> list[tuple[list[Any], list[float], int]]: ...
    def query(self, q: Any, k: int, *, probes: int | None = None, batch: bool = False) -> Any:
        """Best ``k`` by cosine among the members of the probed buckets.

        Args:
            q: one vector ``(dim,)``, or with ``batch`` several ``(n, dim)``.
            k: how many at most.
            probes: in place of the index's own.
            batch: whether q holds several; then a list of answers is given.

        Returns:
            Ids (ties to the earlier), cosines, and how many vectors were scanned.
        """
        if k < 1:
            refuse("k", k, "at least 1")
        wanted = self.probes if probes is None else probes
        if not 1 <= wanted <= self.buckets:
            refuse("probes", wanted, f"between 1 and the {self.buckets} buckets")
        rows = self._checked(np.asarray(q) if batch else np.asarray(q)[None])
        margins = self._margins(rows)
        order = np.argsort(-margins, axis=2, kind="stable")[:, :, :wanted]
        unit = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
        found = [self._best(vector, places, k) for vector, places in zip(unit, order, strict=True)]
        return found if batch else found[0]

    def rehash(self, buckets: int) -> None:
        """Draw new directions for another number of buckets; the vectors stay."""
        fresh = AngularLSH(
            self.dim, buckets, self.tables, min(self.probes, buckets), self.seed, self.orthogonal,
            self.exact_below, self.center,
        )  # fmt: skip
        self.buckets, self.probes, self.R, self._lists = buckets, fresh.probes, fresh.R, None
        if len(self):
            self._codes = self._margins(self._rows.astype(np.float64)).argmax(axis=2)

    def memory_bytes(self) -> dict[str, int]:
        """Bytes of vectors, codes and directions."""
        return {
            "index.vectors": self._rows.nbytes,
            "index.codes": self._codes.nbytes + self._turn.nbytes,
            "index.directions": self.R.nbytes,
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all as safetensors; ids must be JSON values."""
        import torch

        tensors = {
            "R": self.R, "rows": self._rows, "codes": self._codes, "turn": self._turn, "center": self.center
        }  # fmt: skip
        names = ("dim", "buckets", "tables", "probes", "seed", "orthogonal", "exact_below")
        header = {name: getattr(self, name) for name in names} | {"ids": self._ids}
        save_state(
            path, {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in tensors.items()}, header
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what :meth:`save` wrote; the directions are those that were saved."""
        tensors, header = load_state(path)
        ids = header.pop("ids")
        index = cls(**header, center=tensors["center"].numpy())
        index.R = tensors["R"].numpy()
        index._ids, index._known = ids, set(ids)
        index._rows, index._codes = tensors["rows"].numpy(), tensors["codes"].numpy()
        index._turn = tensors["turn"].numpy()
        return index

    def _best(self, vector: Rows, places: NDArray[np.int64], k: int) -> tuple[list[Any], list[float], int]:
        if not len(self):
            return [], [], 0
        found = self._scored(vector, places) if len(self) * self.dim >= self.exact_below else None
        if found is None or (len(found[0]) < min(k, len(self)) and self.exact_below > 0):
            found = np.arange(len(self)), self._rows @ vector
        candidates, scores = found
        if k < len(scores):  # the k best, and whatever ties with the last of them
            least = scores[np.argpartition(-scores, k - 1)[k - 1]]
            near = np.flatnonzero(scores >= least)
            candidates, scores = candidates[near], scores[near]
        best = np.lexsort((self._turn[candidates], -scores))[:k]
        return [self._ids[candidates[i]] for i in best], [float(scores[i]) for i in best], len(found[0])

    def _scored(self, vector: Rows, places: NDArray[np.int64]) -> tuple[NDArray[np.int64], Rows]:
        """Members of the probed buckets and their cosines.

        The first table's buckets are scored where they lie; of the other tables only members that the first
        has not are gathered, for a gathered vector is read, written and read again.
        """
        if self._lists is None:
            self._arrange()
        assert self._lists is not None
        starts = self._lists[0][1]
        spans = _joined([(int(starts[b]), int(starts[b + 1])) for b in np.sort(places[0])])
        parts = [np.arange(a, b) for a, b in spans]
        scores = [self._rows[a:b] @ vector for a, b in spans]
        if self.tables > 1:
            wanted = np.zeros(len(self), bool)
            for (order, at), probed in zip(self._lists[1:], places[1:], strict=True):
                for bucket in probed:
                    wanted[order[at[bucket] : at[bucket + 1]]] = True
            for a, b in spans:
                wanted[a:b] = False
            parts.append(np.flatnonzero(wanted))
            scores.append(self._rows.take(parts[-1], axis=0) @ vector)
        if not parts:
            return np.zeros(0, np.int64), np.zeros(0, np.float32)
        return np.concatenate(parts), np.concatenate(scores)

    def _arrange(self) -> None:
        """Put the vectors into the order of the first table's buckets; list the members of the others'."""
        order = np.lexsort((self._turn, self._codes[:, 0]))
        self._ids = [self._ids[i] for i in order]
        self._rows, self._codes, self._turn = self._rows[order], self._codes[order], self._turn[order]
        self._lists = []
        for codes in self._codes.T:
            listed = np.argsort(codes, kind="stable")
            self._lists.append((listed, np.searchsorted(codes[listed], np.arange(self.buckets + 1))))

    def _margins(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """[xR ; -xR] for each table, shape ``(n, tables, buckets)``."""
        if self._exact is None or self._exact[0] is not self.R:
            self._exact = self.R, self.R.astype(np.float64)
        z = ((rows - self.center) @ self._exact[1]).transpose(1, 0, 2)
        return np.concatenate([z, -z], axis=2)

    def _checked(self, X: Any) -> NDArray[np.float64]:
        if hasattr(X, "detach"):
            X = X.detach().cpu().numpy()
        rows = np.asarray(X, np.float64)
        if rows.ndim != 2 or rows.shape[1] != self.dim:
            refuse("X", rows.shape, f"shape (n, {self.dim})")
        if not np.isfinite(rows).all() or (np.abs(rows).max(axis=1, initial=0) == 0).any():
            refuse("X", "a zero or non-finite vector", "it has no direction; leave it out")
        return rows


def _joined(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sorted spans without empty ones, neighbours as one."""
    found: list[tuple[int, int]] = []
    for start, end in spans:
        if end > start and found and found[-1][1] == start:
            found[-1] = found[-1][0], end
        elif end > start:
            found.append((start, end))
    return found


class LSHPlan(NamedTuple):
    """A setting of the index, its expected recall, and the share of vectors that it scans."""

    buckets: int
    tables: int
    probes: int
    expected_recall: float
    expected_scan: float


@functools.lru_cache(maxsize=1024)
def collision_probability(cos: float, buckets: int) -> float:
    """Chance that two vectors with this cosine share their bucket.

    ``2m`` times the integral over u, v > 0 of ``phi2(u, v; cos) * Pr(|U| < u, |V| < v) ** (m - 1)`` with m =
    buckets / 2: one of the m directions and its sign win for both.

    Raises:
        BadInput: a cosine outside [-1, 1], odd buckets.

    Example:
        >>> round(collision_probability(0.9, 2), 4), round(collision_probability(0.5, 16), 3)
        (0.8564, 0.232)
    """
    if not -1 <= cos <= 1:
        refuse("cos", cos, "between -1 and 1")
    if buckets < 2 or buckets % 2:
        refuse("buckets", buckets, "an even number, 2 or more")
    if cos in (1.0, -1.0):
        return float(cos == 1)
    if buckets == 2:
        return 1 - math.acos(cos) / math.pi
    m, n = buckets // 2, 1400
    h = 7.0 / n
    u = (np.arange(n) + 0.5) * h
    same, other = (_phi2(u[:, None], u[None, :], rho) * h * h for rho in (cos, -cos))
    both = same + other
    # Pr(|U| < u, |V| < v) at the cell's middle: whole cells before it, half of its row and column, a quarter
    # of itself.
    total = both.cumsum(0).cumsum(1)
    rows, columns = both.cumsum(1), both.cumsum(0)
    inside = 2 * (total - 0.5 * rows - 0.5 * columns + 0.25 * both)
    return float(2 * m * (same * np.clip(inside, 0, 1) ** (m - 1)).sum())


def probe_probability(cos: float, buckets: int, probes: int) -> float:
    """Chance that a vector lies in one of the ``probes`` best buckets of another, simulated (± .006)."""
    return float((_places(cos, buckets) < probes).mean())


@functools.lru_cache(maxsize=64)
def _places(cos: float, buckets: int, draws: int = 6000) -> NDArray[np.int64]:
    """For drawn pairs, the place of one's bucket among those of the other."""
    draw = rng("lsh.probes", buckets)
    z = draw.standard_normal((draws, buckets // 2))
    w = cos * z + math.sqrt(max(0.0, 1 - cos * cos)) * draw.standard_normal(z.shape)
    margins = np.concatenate([z, -z], axis=1)
    own = np.concatenate([w, -w], axis=1).argmax(axis=1)
    return np.asarray((margins > margins[np.arange(draws), own][:, None]).sum(axis=1), np.int64)


def plan_lsh(n: int, cos: float, target_recall: float, background: float = 0.0) -> LSHPlan:
    """The cheapest setting that finds a neighbour of this cosine with this probability.

    Args:
        n: vectors.
        cos: of the neighbours that must be found.
        target_recall: between 0 and 1.
        background: usual cosine of two vectors; above 0 for sentence vectors, and it raises the scan.

    Returns:
        Buckets, tables, probes, expected recall and scan; buckets 2, all probed, where nothing less does.

    Warns:
        UserWarning: the target is below .8.

    Example:
        >>> plan = plan_lsh(100_000, 0.8, 0.9)
        >>> plan.expected_recall >= 0.9, plan.expected_scan < 0.5
        (True, True)
    """
    if n < 1 or not 0 < target_recall < 1:
        refuse("n, target_recall", (n, target_recall), "n of 1 or more and a recall between 0 and 1")
    if target_recall < 0.8:
        warnings.warn(f"a recall of {target_recall:g} loses one neighbour in five or more", stacklevel=2)
    best = LSHPlan(2, 1, 2, 1.0, 1.0)
    for exponent in range(1, max(2, min(8, int(math.log2(max(n, 4)))))):
        buckets = 2**exponent
        for probes in (1, 2, 4, 8):
            if probes >= buckets:
                continue
            p, q = (probe_probability(c, buckets, probes) for c in (cos, background))
            if p <= 0:
                continue
            missed = math.log(1 - min(p, 1 - 1e-9))  # by one table, as a logarithm
            tables = max(1, math.ceil(math.log(1 - target_recall) / missed))
            if tables > 64:
                continue
            scan = 1 - (1 - q) ** tables
            if scan < best.expected_scan:
                best = LSHPlan(buckets, tables, probes, 1 - (1 - p) ** tables, scan)
    return best


def _directions(dim: int, buckets: int, tables: int, seed: int, orthogonal: bool) -> Rows:
    draw = np.random.Generator(np.random.PCG64(seed))
    R = draw.standard_normal((tables, dim, buckets // 2))
    if orthogonal:
        for table in R:
            for start in range(0, buckets // 2, dim):
                q, r = np.linalg.qr(table[:, start : start + dim])
                table[:, start : start + dim] = q * np.sign(np.diag(r)) * math.sqrt(dim)
    return R.astype(np.float32)


def _phi2(u: Any, v: Any, rho: float) -> NDArray[np.float64]:
    s = 1 - rho * rho
    return np.asarray(np.exp(-(u * u - 2 * rho * u * v + v * v) / (2 * s)) / (2 * math.pi * math.sqrt(s)))
