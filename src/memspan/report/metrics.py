"""Scores that several systems share, each with its variants named: retrieval, answers, text coding.

Published figures differ by unspoken variants (gain ``2**rel - 1`` or ``rel``; articles dropped or not; nats
per token or bits per byte). Here the variant is an argument.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Literal

from memspan.base import refuse

__all__ = ["bits_per_byte", "hit_at_k", "ndcg", "recall_at_k", "squad_normalize", "token_f1"]


def recall_at_k(ranked: Sequence[Hashable], relevant: Collection[Hashable], k: int) -> float:
    """Share of the relevant items that stand among the first ``k``.

    Args:
        ranked: item ids, best first, each once.
        relevant: ids of the relevant items; at least one.
        k: how many places count.

    Raises:
        BadInput: k below 1, no relevant item, or an id ranked twice.

    Example:
        >>> recall_at_k(["c", "a", "x"], {"a", "b"}, k=2)
        0.5
    """
    wanted = _checked(ranked, relevant, k)
    return len(wanted.intersection(ranked[:k])) / len(wanted)


def hit_at_k(ranked: Sequence[Hashable], relevant: Collection[Hashable], k: int) -> float:
    """1.0 when any relevant item stands among the first ``k``, else 0.0; arguments as :func:`recall_at_k`.

    Example:
        >>> hit_at_k(["c", "a", "x"], {"a", "b"}, k=2), hit_at_k(["c", "a"], {"a"}, k=1)
        (1.0, 0.0)
    """
    return float(not _checked(ranked, relevant, k).isdisjoint(ranked[:k]))


def ndcg(
    ranked: Sequence[Hashable],
    relevance: Mapping[Hashable, float] | Collection[Hashable],
    k: int | None = None,
    *,
    form: Literal["linear", "exponential"] = "linear",
) -> float:
    """Normalised discounted cumulative gain (Jarvelin and Kekalainen 2002) with discount 1 / log2(place + 1).

    Args:
        ranked: item ids, best first, each once.
        relevance: id -> relevance (0 or more), or a collection of ids that count 1 each.
        k: places that count; None counts all.
        form: gain ``rel`` (``"linear"``, as scikit-learn) or ``2**rel - 1`` (``"exponential"``, web search).
            With relevance 0 and 1 both agree.

    Returns:
        A number in [0, 1]; 0 when nothing is relevant.

    Raises:
        BadInput: negative relevance, an unknown form, k below 1, an id ranked twice.

    Example:
        >>> [round(ndcg(["b", "a"], {"a": 3, "b": 1}, form=form), 4) for form in ("linear", "exponential")]
        [0.7967, 0.7098]
    """
    if form not in ("linear", "exponential"):
        refuse("form", form, 'use "linear" or "exponential"')
    if k is not None and k < 1:
        refuse("k", k, "use 1 or more, or None for all places")
    if len(set(ranked)) != len(ranked):
        refuse("ranked", ranked, "rank every item once")
    gains = relevance if isinstance(relevance, Mapping) else dict.fromkeys(relevance, 1.0)
    if any(not 0 <= value < math.inf for value in gains.values()):
        refuse("relevance", relevance, "give finite values of 0 or more")

    def cumulated(values: Sequence[float]) -> float:
        kept = values[:k]
        if form == "exponential":
            kept = [2.0**value - 1.0 for value in kept]
        return sum(value / math.log2(place + 2) for place, value in enumerate(kept))

    best = cumulated(sorted(gains.values(), reverse=True))
    return cumulated([gains.get(item, 0.0) for item in ranked]) / best if best else 0.0


def token_f1(
    prediction: str, truth: str, *, normalize: Callable[[str], str] | Literal["squad"] | None = "squad"
) -> float:
    """Harmonic mean of precision and recall over the words of two answers (Rajpurkar et al. 2016).

    Args:
        prediction: the answer given.
        truth: the answer wanted.
        normalize: ``"squad"`` (see :func:`squad_normalize`), a function, or None for words as they are.

    Returns:
        A number in [0, 1]; two empty answers agree (1), one empty answer does not (0).

    Example:
        >>> token_f1("The red Fox!", "a red dog"), token_f1("The fox", "a fox", normalize=None)
        (0.5, 0.5)
    """
    if normalize is not None and normalize != "squad" and not callable(normalize):
        refuse("normalize", normalize, 'use "squad", None, or a function from text to text')
    clean = squad_normalize if normalize == "squad" else normalize
    given, wanted = (
        Counter((clean(text) if callable(clean) else text).split()) for text in (prediction, truth)
    )
    if not given or not wanted:
        return float(given == wanted)
    common = (given & wanted).total()
    return 2 * common / (given.total() + wanted.total())


def squad_normalize(text: str) -> str:
    """Lower case, without ASCII punctuation, English articles and doubled spaces.

    Example:
        >>> squad_normalize("The  Fox, an Owl.")
        'fox owl'
    """
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def bits_per_byte(nats: float, text: str | bytes | int) -> float:
    """Cost of coding a text, comparable between tokenizers.

    Args:
        nats: summed negative log-likelihood of the whole text, in nats.
        text: the text (counted in UTF-8), or its number of bytes.

    Raises:
        BadInput: an empty text, or nats that are negative or not finite.

    Example:
        >>> bits_per_byte(math.log(256) * 3, b"abc")
        8.0
    """
    count = text if isinstance(text, int) else len(text.encode() if isinstance(text, str) else text)
    if count < 1:
        refuse("text", text, "give one byte or more")
    if not 0 <= nats < math.inf:
        refuse("nats", nats, "give the summed negative log-likelihood, finite and 0 or more")
    return nats / (math.log(2) * count)


def _checked(ranked: Sequence[Hashable], relevant: Collection[Hashable], k: int) -> set[Hashable]:
    if k < 1:
        refuse("k", k, "use 1 or more")
    wanted = set(relevant)
    if not wanted:
        refuse("relevant", relevant, "give one relevant item or more, or leave this query out")
    if len(set(ranked)) != len(ranked):
        refuse("ranked", ranked, "rank every item once")
    return wanted
