"""Ranking by words and by several lists at once; pure functions, no database.

What a store's search stands on, usable alone: which words of a question count, BM25, the fusion of rankings
by reciprocal rank (Cormack, Clarke and Buettcher, SIGIR 2009), and maximal marginal relevance (Carbonell and
Goldstein, SIGIR 1998).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from math import log
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from memspan.base import refuse

__all__ = ["BM25", "STOP_WORDS", "bm25", "fts_query", "fuse", "mmr", "query_words"]

Item = TypeVar("Item", bound=Hashable)

#: Words of a question that say nothing about what is asked for.
STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a an and are as at be by did do does for from had has have he her his how i in is it its of on or s"
        " she that the their them they this to was were what when where which who whom why will with you"
        " your",
    )
)

_WORD = re.compile(r"\w+")


def query_words(text: str, stop_words: Collection[str] = STOP_WORDS) -> list[str]:
    r"""The words (``\w+``, lower case) of a query, once each, in order, without stop words.

    A query of stop words alone keeps them all: an answer to a vague question beats none.

    Args:
        text: the query.
        stop_words: words to leave out; ``()`` for none.

    Example:
        >>> query_words("What did the owl say to the other owl?"), query_words("Who are you?")
        (['owl', 'say', 'other'], ['who', 'are', 'you'])
    """
    words = list(dict.fromkeys(_WORD.findall(text.lower())))
    return [word for word in words if word not in stop_words] or words


def fts_query(text: str, stop_words: Collection[str] = STOP_WORDS) -> str:
    """The query as SQLite's FTS5 reads it: each word quoted, joined by OR; empty when there is no word.

    Example:
        >>> fts_query('the "red" fox; DROP TABLE')
        '"red" OR "fox" OR "drop" OR "table"'
    """
    return " OR ".join(f'"{word}"' for word in query_words(text, stop_words))


class BM25:
    r"""BM25 over a fixed list of texts, without stemming: the usual baseline of keyword search.

    ``score = sum over query words of ln(1 + (N - df + .5) / (df + .5)) * tf (k1 + 1) / (tf + k1 (1 - b +
    b L / mean L))``; words are ``\w+`` of the lower-cased text (Robertson and Zaragoza 2009, with Lucene's
    idf).

    Args:
        texts: what is searched.
        k1: how slowly repeated words saturate.
        b: how much long texts are held back, 0 to 1.

    Example:
        >>> BM25(["a red fox", "a red red hen", "an owl"]).top("red hen", k=2)
        [1, 0]
    """

    def __init__(self, texts: Sequence[str], k1: float = 1.5, b: float = 0.75) -> None:
        if k1 < 0 or not 0 <= b <= 1:
            refuse("k1, b", (k1, b), "give k1 >= 0 and b in [0, 1]")
        counts = [Counter(_WORD.findall(text.lower())) for text in texts]
        self._lengths = np.array([count.total() for count in counts], np.float64)
        self._k1, self._b = k1, b
        listed: dict[str, list[tuple[int, int]]] = {}
        for place, count in enumerate(counts):
            for word, times in count.items():
                listed.setdefault(word, []).append((place, times))
        self._postings = {word: np.array(pairs).T for word, pairs in listed.items()}

    def scores(self, query: str, stop_words: Collection[str] = ()) -> NDArray[np.float64]:
        """Score of every text, shape ``(n,)``; 0 where no word is shared.

        Args:
            query: words are counted once each.
            stop_words: words of the query to leave out.
        """
        words = [self._postings[word] for word in query_words(query, stop_words) if word in self._postings]
        postings = [(places, times.astype(np.float64), 1) for places, times in words]
        return bm25(postings, self._lengths, len(self._lengths), self._k1, self._b, lucene=True)

    def top(self, query: str, k: int, stop_words: Collection[str] = ()) -> list[int]:
        """Places of the best ``k`` texts that share a word, best first, ties to the earlier."""
        scores = self.scores(query, stop_words)
        order = np.argsort(-scores, kind="stable")[:k]
        return [int(place) for place in order if scores[place] > 0]


def bm25(
    postings: Sequence[tuple[NDArray[np.intp], NDArray[np.float64], int]],
    lengths: NDArray[np.float64],
    rows: int,
    k1: float = 1.2,
    b: float = 0.75,
    *,
    lucene: bool = False,
) -> NDArray[np.float64]:
    """BM25 of rows from posting lists, shape ``(rows,)``; 0 without a shared term.

    Args:
        postings: for each term of the query: places, counts there, weight in the query.
        lengths: terms of each row, float64.
        rows: how many there are.
        k1: how slowly repeated words saturate.
        b: how much long texts are held back.
        lucene: idf is Lucene's ``ln(1 + (N - df + .5) / (df + .5))``; else FTS5's,
            without the 1 and at least 1e-6.
    """
    total = np.zeros(rows)
    mean = max(float(lengths.mean()), 1e-9) if rows else 1.0
    for places, times, weight in postings:
        odds = (rows - len(places) + 0.5) / (len(places) + 0.5)
        idf = log(1 + odds) if lucene else max(log(odds), 1e-6)
        damping = k1 * (1 - b + b * lengths[places] / mean)
        total[places] += weight * idf * times * (k1 + 1) / (times + damping)
    return total


def fuse(
    rankings: Mapping[str, Sequence[Item]],
    how: Literal["rrf", "borda"] = "rrf",
    weights: Mapping[str, float] | None = None,
    k: int = 60,
) -> list[tuple[Item, float]]:
    """One ranking out of several.

    Args:
        rankings: items by the name of the list, best first, none twice in a list.
        how: ``"rrf"`` adds ``weight / (k + rank)``, rank from 1; ``"borda"`` adds ``weight * (1 - (rank
            - 1) / n)`` with n the length of that list.
        weights: by name of the list; 1 where not told.
        k: damping of the first ranks.

    Returns:
        ``(item, score)``, best first; equal scores in the order of first appearance over the lists as given.

    Raises:
        BadInput: an unknown ``how``, weights for lists that are not there or below 0, ``k`` below 0.

    Example:
        >>> ranked = fuse({"words": ["a", "b"], "vector": ["b", "c"]}, weights={"vector": 0.5})
        >>> [item for item, score in ranked]
        ['b', 'a', 'c']
    """
    weights = weights or {}
    if how not in ("rrf", "borda"):
        refuse("how", how, 'use "rrf" or "borda"')
    if k < 0:
        refuse("k", k, "use 0 or more; 60 is usual")
    unknown = set(weights) - set(rankings)
    if unknown or any(not weight >= 0 for weight in weights.values()):
        refuse("weights", dict(weights), f"give numbers >= 0 for {', '.join(rankings)}")
    total: dict[Item, float] = {}
    for name, items in rankings.items():
        weight, n = weights.get(name, 1.0), len(items)
        for place, item in enumerate(items):
            part = 1 / (k + place + 1) if how == "rrf" else 1 - place / n
            total[item] = total.get(item, 0.0) + weight * part
    return sorted(total.items(), key=lambda pair: -pair[1])


def mmr(
    vectors: ArrayLike, relevance: ArrayLike, k: int, balance: float = 0.7, chosen: ArrayLike | None = None
) -> list[int]:
    """Places of ``k`` items that are relevant and unlike each other (maximal marginal relevance).

    Each step takes the item with the largest ``balance * relevance - (1 - balance) * (cosine to the nearest
    item taken)``.

    Args:
        vectors: unit rows, shape (n, dim).
        relevance: shape (n,), on the scale of a cosine.
        k: how many at most.
        balance: 1 is relevance alone, 0 diversity alone.
        chosen: unit rows, shape (m, dim), of items that are already taken.

    Returns:
        At most ``k`` places, in the order taken; ties to the earlier.

    Raises:
        BadInput: shapes that do not agree, ``balance`` outside [0, 1], ``k`` below 0.

    Example:
        >>> mmr([[1, 0], [1, 0], [0, 1]], [0.9, 0.8, 0.5], k=2, balance=0.5)
        [0, 2]
    """
    rows: NDArray[Any] = np.asarray(vectors, np.float64)
    gain: NDArray[Any] = np.asarray(relevance, np.float64)
    if rows.ndim != 2 or gain.shape != rows.shape[:1]:
        refuse("relevance", gain.shape, f"give one value for each of the vectors, shape {rows.shape}")
    if not 0 <= balance <= 1 or k < 0:
        refuse("balance, k", (balance, k), "give balance in [0, 1] and k >= 0")
    nearest = np.full(len(rows), -np.inf)
    if chosen is not None and np.size(chosen):
        nearest = (rows @ np.asarray(chosen, np.float64).T).max(axis=1)
    taken: list[int] = []
    left = np.ones(len(rows), bool)
    for _ in range(min(k, len(rows))):
        like = np.where(np.isfinite(nearest), nearest, 0.0)
        value = np.where(left, balance * gain - (1 - balance) * like, -np.inf)
        best = int(np.argmax(value))
        taken.append(best)
        left[best] = False
        nearest = np.maximum(nearest, rows @ rows[best])
    return taken
