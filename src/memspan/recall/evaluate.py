"""Scores as two benchmarks of long-term memory compute them, their peculiarities included.

LongMemEval's gain gives ranks 1 and 2 the same weight; LoCoMo stems words, drops "and" with the articles, and
scores each category in its own way. For other purposes take :mod:`memspan.report.metrics`.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Collection, Hashable, Sequence

from memspan.base import optional, refuse

__all__ = ["locomo_f1", "longmemeval_ndcg", "recall_all", "recall_any"]


def longmemeval_ndcg(ranked: Sequence[Hashable], relevant: Collection[Hashable], k: int) -> float:
    """NDCG with ``rel_1 + sum over i >= 2 of rel_i / log2(i)``.

    Example:
        >>> longmemeval_ndcg(["x", "hit"], {"hit"}, 2)
        1.0
    """

    def gain(values: Sequence[float]) -> float:
        return sum(value / max(1.0, math.log2(max(place, 2))) for place, value in enumerate(values[:k], 1))

    best = gain([1.0] * len(relevant))
    return gain([float(item in relevant) for item in ranked]) / best if best else 0.0


def recall_any(ranked: Sequence[Hashable], relevant: Collection[Hashable], k: int) -> float:
    """1 when any relevant item is among the first k."""
    return float(any(item in relevant for item in ranked[:k]))


def recall_all(ranked: Sequence[Hashable], relevant: Collection[Hashable], k: int) -> float:
    """1 when every relevant item is among the first k."""
    return float(set(relevant) <= set(ranked[:k]))


def locomo_f1(prediction: str, answer: str, category: int) -> float:
    """F1 of an answer as LoCoMo scores its five categories (words stemmed by NLTK's Porter stemmer).

    Args:
        prediction: the model's words.
        answer: the gold answer; not looked at in category 5.
        category: 1 multi-hop (mean over gold parts of the best predicted part), 2 temporal, 3 open (gold
            before ``;``), 4 single-hop, 5 adversarial (1 when the answer says that nothing is known).

    Raises:
        BadInput: another category.
        ImportError: nltk is not installed.
    """
    if category not in (1, 2, 3, 4, 5):
        refuse("category", category, "1 to 5")
    if category == 5:
        plain = prediction.lower()
        return float("no information available" in plain or "not mentioned" in plain)
    if category == 1:
        given, wanted = prediction.split(","), answer.split(",")
        return sum(max(_f1(part, gold) for part in given) for gold in wanted) / len(wanted)
    return _f1(prediction, answer.split(";")[0].strip() if category == 3 else answer)


def _f1(prediction: str, answer: str) -> float:
    stem = optional("nltk.stem", extra="dev").PorterStemmer().stem
    given, wanted = (Counter(stem(word) for word in _normal(text).split()) for text in (prediction, answer))
    common = (given & wanted).total()
    if not common:
        return 0.0
    precision, recall = common / given.total(), common / wanted.total()
    return 2 * precision * recall / (precision + recall)


def _normal(text: str) -> str:
    plain = "".join(sign for sign in text.replace(",", "").lower() if sign not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the|and)\b", " ", plain).split())
