"""Scores of two public benchmarks exactly as their authors compute them, traps included.

LongMemEval (Wu et al. 2025) gives ranks 1 and 2 the same weight in its DCG; LoCoMo (Maharana et al. 2024)
stems words, drops articles, commas and "and", and scores each category in its own way. The ordinary forms are
in :mod:`memspan.report.metrics`.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Collection, Hashable, Sequence
from math import log2

from memspan.base import optional, refuse

__all__ = ["locomo_f1", "longmemeval_ndcg", "longmemeval_recall"]


def longmemeval_ndcg(ranked: Sequence[Hashable], relevant: Collection[Hashable], k: int) -> float:
    """NDCG with ``rel_1 + sum over i >= 2 of rel_i / log2(i)``, as LongMemEval's own evaluation.

    Args:
        ranked: ids, best first.
        relevant: ids of the evidence; 0.0 where there is none.
        k: places that count.

    Example:
        >>> longmemeval_ndcg(["x", "a"], {"a"}, k=2)
        1.0
    """
    if k < 1:
        refuse("k", k, "use 1 or more")

    def cumulated(gains: Sequence[int]) -> float:
        return sum(gain / max(log2(place), 1.0) for place, gain in enumerate(gains, 1))

    gains = [int(item in relevant) for item in ranked[:k]]
    best = cumulated([1] * min(len(set(relevant)), k))
    return cumulated(gains) / best if best else 0.0


def longmemeval_recall(
    ranked: Sequence[Hashable], relevant: Collection[Hashable], k: int
) -> tuple[float, float]:
    """Whether any, and whether all, of the evidence stands among the first ``k``.

    Example:
        >>> longmemeval_recall(["x", "a"], {"a", "b"}, k=2)
        (1.0, 0.0)
    """
    if k < 1:
        refuse("k", k, "use 1 or more")
    first = set(ranked[:k])
    return float(any(item in first for item in relevant)), float(all(item in first for item in relevant))


def locomo_f1(prediction: str, answer: str, category: int) -> float:
    """LoCoMo's score of an answer (needs nltk, for its Porter stemmer).

    Args:
        prediction: what was answered.
        answer: the gold answer.
        category: 1 multi-hop (parts divided by commas: mean over the gold parts of the best part given),
            2 temporal, 3 open (the gold text before ";"), 4 single-hop, 5 adversarial (1 for "no information
            available" or "not mentioned").

    Raises:
        BadInput: an unknown category.
        ImportError: nltk is not installed.

    Example:
        >>> locomo_f1("The dogs, and cats", "a dog", 4)  # doctest: +SKIP
        0.6666666666666666
    """
    if category not in (1, 2, 3, 4, 5):
        refuse("category", category, "use 1 to 5")
    if category == 5:
        said = prediction.lower()
        return float("no information available" in said or "not mentioned" in said)
    if category == 3:
        answer = answer.split(";")[0].strip()
    if category != 1:
        return _f1(prediction, answer)
    given = [part.strip() for part in prediction.split(",")]
    wanted = [part.strip() for part in answer.split(",")]
    return sum(max(_f1(part, gold) for part in given) for gold in wanted) / len(wanted)


def _f1(prediction: str, answer: str) -> float:
    stem = optional("nltk.stem", extra="dev").PorterStemmer().stem
    given, wanted = (Counter(stem(word) for word in _plain(text).split()) for text in (prediction, answer))
    common = (given & wanted).total()
    if common == 0:
        return 0.0
    precision, recall = common / given.total(), common / wanted.total()
    return 2 * precision * recall / (precision + recall)


def _plain(text: str) -> str:
    text = text.replace(",", "").lower()
    text = "".join(letter for letter in text if letter not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the|and)\b", " ", text).split())
