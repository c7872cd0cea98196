"""Rules without a network: what a dynamic graph model must beat before anyone trains it.

Sources: EdgeBank, Poursafaei et al. 2022 (NeurIPS, Towards Better Evaluation for Dynamic Link Prediction).
The recency rules are folklore; on CollegeMsg the second beats every network here.
"""

from __future__ import annotations

import sys
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from memspan.base import refuse

__all__ = ["EdgeBank", "RecencyRule", "Rule"]

Ids = NDArray[np.int64]
Floats = NDArray[np.float64]


class Rule(Protocol):
    """Scores pairs from the events so far."""

    def score(self, src: Ids, dst: Ids, t: Floats) -> Floats:
        """(B,) scores, greater is likelier, of pairs (B,) at times (B,)."""
        ...

    def update(self, src: Ids, dst: Ids, t: Floats) -> None:
        """Take events (B,) in, in their order."""
        ...

    def memory_bytes(self) -> dict[str, int]:
        """Bytes held."""
        ...


class EdgeBank:
    """1 for a pair that was seen before, else 0.

    Args:
        directed: whether (i, j) and (j, i) are two pairs.

    Example:
        >>> rule, one, two = EdgeBank(directed=False), np.array([1]), np.array([2])
        >>> rule.update(one, two, np.array([0.0]))
        >>> rule.score(two, one, np.array([9.0])).tolist()
        [1.0]
    """

    def __init__(self, directed: bool = True) -> None:
        self.directed = directed
        self._seen: set[tuple[int, int]] = set()

    def score(self, src: Ids, dst: Ids, t: Floats) -> Floats:
        """See :class:`Rule`; the time plays no part."""
        return np.array([pair in self._seen for pair in self._pairs(src, dst)], np.float64)

    def update(self, src: Ids, dst: Ids, t: Floats) -> None:
        """See :class:`Rule`."""
        self._seen.update(self._pairs(src, dst))

    def memory_bytes(self) -> dict[str, int]:
        """The table and its pairs of whole numbers, as CPython holds them."""
        pair = sys.getsizeof((0, 0)) + 2 * sys.getsizeof(1 << 20)
        return {"rule": sys.getsizeof(self._seen) + len(self._seen) * pair}

    def _pairs(self, src: Ids, dst: Ids) -> list[tuple[int, int]]:
        if not self.directed:
            src, dst = np.minimum(src, dst), np.maximum(src, dst)
        return list(zip(src.tolist(), dst.tolist(), strict=True))


class RecencyRule:
    """The more recent, the likelier: of the destination alone, or of the pair first.

    Args:
        num_nodes: N.
        by: ``"destination"``: -(t - last event of the destination), a node that was never seen last.
            ``"pair"``: undirected pairs seen before come first; the destination's recency orders the rest.

    Raises:
        BadInput: another ``by``.

    Example:
        >>> rule, node = RecencyRule(4), np.array([1, 2, 3])
        >>> rule.update(node[:2], node[1:], np.array([0.0, 5.0]))
        >>> rule.score(node * 0, node, np.full(3, 9.0)).argsort().tolist()
        [0, 1, 2]
    """

    def __init__(self, num_nodes: int, by: Literal["destination", "pair"] = "destination") -> None:
        if by not in ("destination", "pair"):
            refuse("by", by, 'use "destination" or "pair"')
        self._last = np.full(num_nodes, -np.inf)
        self._pairs = EdgeBank(directed=False) if by == "pair" else None

    def score(self, src: Ids, dst: Ids, t: Floats) -> Floats:
        """See :class:`Rule`: in [0, 1], one more for a pair that was seen."""
        recency: Floats = 1 / (1 + (t - self._last[dst]))  # falls with the gap, to 0 for one never seen
        return recency if self._pairs is None else recency + self._pairs.score(src, dst, t)

    def update(self, src: Ids, dst: Ids, t: Floats) -> None:
        """See :class:`Rule`; both ends were active."""
        np.maximum.at(self._last, src, t)
        np.maximum.at(self._last, dst, t)
        if self._pairs is not None:
            self._pairs.update(src, dst, t)

    def memory_bytes(self) -> dict[str, int]:
        """A time for each node, and the pairs."""
        pairs = 0 if self._pairs is None else self._pairs.memory_bytes()["rule"]
        return {"rule": self._last.nbytes + pairs}
