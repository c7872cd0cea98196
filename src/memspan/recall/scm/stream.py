"""The memory stream: turns with their summaries, ranked by recency and likeness."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from memspan.base import refuse
from memspan.recall.records import Record

if TYPE_CHECKING:
    from memspan.recall.store import UserStore

__all__ = ["MemoryStream", "Ranked", "rank"]


@dataclass(frozen=True)
class Ranked:
    """A turn with the parts of its score.

    Attributes:
        record: the turn.
        score: recency and relevance together.
        recency: ``gamma ** (turns since)``.
        relevance: cosine to the query.
    """

    record: Record
    score: float
    recency: float
    relevance: float


class MemoryStream:
    """One user's turns of one stream, in order; all of it lives in the store.

    Args:
        store: the user's.
        session: keeps streams of one user apart; "" is one stream.
    """

    def __init__(self, store: UserStore, session: str = "") -> None:
        self.store, self.session = store, session

    def __len__(self) -> int:
        return len(self.turns())

    def turns(self) -> list[Record]:
        """All turns by number."""
        found = [r for r in self.store.iterate(kinds=("turn",), where=self._where()) if "turn" in r.metadata]
        return sorted(found, key=lambda record: int(record.metadata["turn"]))

    def last(self) -> Record | None:
        """The turn before this one: the flash memory."""
        turns = self.turns()
        return turns[-1] if turns else None

    def rank(
        self,
        query: str | NDArray[np.float32],
        k: int = 6,
        gamma: float = 0.995,
        recency_weight: float = 1.0,
        turns: Sequence[Record] | None = None,
    ) -> list[Ranked]:
        """The best ``k`` of all turns but the last by ``recency_weight * gamma ** age + cosine``.

        Args:
            query: text, or its unit vector.
            k: 1 to 50.
            gamma: in (0, 1].
            recency_weight: 0 ranks by likeness alone, as the official code.
            turns: all turns, where they are at hand.
        """
        everything = self.turns() if turns is None else list(turns)
        candidates = everything[:-1]
        if not candidates:
            check_ranking(k, gamma)
            return []
        vector = self.store.embedder([query])[0] if isinstance(query, str) else query
        now = int(everything[-1].metadata["turn"]) + 1
        ages = np.array([now - int(record.metadata["turn"]) for record in candidates])
        cosines = self.store.vectors([record.id for record in candidates]) @ vector
        order, score, recency = rank(cosines, ages, k, gamma, recency_weight)
        return [Ranked(candidates[i], float(score[i]), float(recency[i]), float(cosines[i])) for i in order]

    def _where(self) -> dict[str, str]:
        return {"metadata.stream": self.session}


def rank(
    cosines: NDArray[np.float32], ages: NDArray[np.int64], k: int, gamma: float, recency_weight: float
) -> tuple[list[int], NDArray[np.float64], NDArray[np.float64]]:
    """Places of the best ``k`` (ties to the later turn), the scores, and the recencies.

    Raises:
        BadInput: k outside [1, 50], gamma outside (0, 1], a negative weight.

    Example:
        >>> rank(np.array([0.5, 0.5]), np.array([3, 2]), 2, 0.9, 1.0)[0]
        [1, 0]
    """
    check_ranking(k, gamma)
    if recency_weight < 0:
        refuse("recency_weight", recency_weight, "0 or more")
    recency = np.power(gamma, ages.astype(np.float64))
    score = cosines.astype(np.float64) + recency_weight * recency
    order = sorted(range(len(score)), key=lambda i: (-score[i], ages[i]))[:k]
    return order, score, recency


def check_ranking(k: int, gamma: float) -> None:
    """Refuse what no stream can be ranked with."""
    if not 1 <= k <= 50:
        refuse("k", k, "between 1 and 50; the paper takes 3 to 10")
    if not 0 < gamma <= 1:
        refuse("gamma", gamma, "more than 0 and at most 1")
