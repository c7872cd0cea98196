"""Which of what a search found is worth a place in a prompt, and whether the query needs any of it.

Three things go wrong when the best hits are taken as they come. A question asked six times fills six places
with itself and pushes the answer out: so turns that only ask get a third of the places at most, and echoes
of the query the last of those. One thing said twice takes two places: near-duplicates are kept once. And
"good morning" is always nearest to something: so nothing is recalled for small talk and for questions about
the world, unless a memory is very near.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace

from memspan.recall.records import Hit, Record
from memspan.recall.text import content_words, sentences

__all__ = ["ask_key", "choose", "nearness", "needs_memory", "only_asks"]

_ALIKE = 0.8  # shared content words of two turns that say the same
_ASKS = re.compile(
    r"^\W*(?:(?:hi|hello|hey|well|so|and|but|ok|okay|please|by the way|actually|oh)\b\W*)*"
    r"(?:what|which|who|whom|whose|when|where|why|how|do|does|did|is|are|was|were|can|could|would|will|should"
    r"|have|has|may|tell me|remind me|do you remember|repeat|give me)\b"
    r"|^\W*(?:请|能|可以|你|您)?(?:告诉我|提醒我|说说|重复)",
    re.IGNORECASE,
)
_GREETING = re.compile(
    r"\W*(?:(?:hi|hello|hey|yo|cheers|thanks?|thank you|ok(?:ay)?|cool|great|perfect|alright|right|sure|fine"
    r"|nice|yes|no|yeah|nope|lol|ha(?:ha)+|wow|bye|goodbye|good (?:morning|evening|afternoon|night|day)"
    r"|see you|later|talk|tomorrow|soon|again|there|please|so much|a lot|very much|that helped|noted|got it"
    r"|never mind|back|welcome|you re|you are|i m|sounds good|much appreciated|today|let s|start|who are you"
    r"|what are you"
    r"|how (?:are|is|s) (?:you|it)(?: going| doing)?|what s up|(?:nice|pleased|good) to (?:meet|see) you"
    r"|have a (?:nice|good) (?:day|evening|weekend)|are you a (?:robot|bot|human)|what can you do"
    r"|can you help me"
    r"|(?:tell me )?(?:a joke|something interesting)|that s (?:funny|nice|great))\W*)+"
    r"|\W*(?:你好|您好|谢谢|早上好|晚安|再见|好的|嗯|哈)+\W*",
    re.IGNORECASE,
)
_PERSONAL = re.compile(
    r"\b(?:i|i'?ve|i'?m|me|my|mine|we|our|us|remember|recall|earlier|previously|last time|yesterday|told|said"
    r"|mention\w*|recommend\w*|suggest\w*|discuss\w*)\b|我|咱|记得|上次|之前|推荐|提到",
    re.IGNORECASE,
)
_NAME = re.compile(r"(?<=[a-z,] )[A-Z][a-z]+")
_HOW_TO = re.compile(
    r"^\W*(?:how (?:do|can|should) i|(?:can|could) you|tell me|explain|write|translate)\b", re.I
)
#: How near a memory must be: to a query with a sign of the person in it, to one without. Measured for MiniLM
#: on half of 100 lines of small talk and world knowledge (``benchmarks/bench_recall_locomo.py``); other
#: embedders have other cosines, and no floor.
_STEEP = 20.0
_FLOORS = {"minilm": (0.3, 0.4)}


def only_asks(text: str) -> bool:
    """Whether a user's words state nothing: questions, requests to be told, greetings.

    Example:
        >>> [only_asks(text) for text in ("Hi! Where do I live?", "I moved. Where to?", "thanks a lot")]
        [True, False, True]
    """
    parts = [part.strip() for part in sentences(text) if part.strip()]
    return bool(parts) and all(
        part.endswith(("?", "？")) or bool(_ASKS.match(part)) or _greets(part) for part in parts
    )


def ask_key(text: str) -> str:
    """The key of a turn that only asks: the same for the same words; "" for one that states something.

    Example:
        >>> ask_key("Where do I live?") == ask_key("where do I  live"), ask_key("I live in Rome")
        (True, '')
    """
    return f"ask:{' '.join(_words(text))[:200]}" if only_asks(text) else ""


def choose(hits: Sequence[Hit], query: str, k: int) -> list[Hit]:
    """At most ``k`` different hits: statements, and a third of questions at most while statements are there.

    Args:
        hits: best first, more than ``k``.
        query: the question, whose echoes come last among the questions.
        k: places.

    Returns:
        Best first. Of near-duplicates the later one stands at the better one's place, with
        ``parts["repeats"]``.
    """
    kept: list[Hit] = []
    known: list[set[str]] = []
    for hit in hits:
        words = content_words(_own(hit.record))
        same = next(
            (
                i
                for i, other in enumerate(known)
                if words and len(words & other) >= _ALIKE * len(words | other)
            ),
            None,
        )
        if same is None:
            kept.append(hit)
            known.append(words)
            continue
        first = kept[same]
        later = max(first.record, hit.record, key=lambda record: record.created_at)
        repeats = first.parts.get("repeats", 1.0) + 1
        kept[same] = replace(first, record=later, parts={**first.parts, "repeats": repeats})
    asked = content_words(query)

    def echoes(hit: Hit) -> bool:
        words = content_words(_own(hit.record))
        return len(words & asked) * 2 >= min(len(words), len(asked))

    questions = sorted((hit for hit in kept if hit.record.key.startswith("ask:")), key=echoes)
    statements = [hit for hit in kept if not hit.record.key.startswith("ask:")]
    room = max(k // 3, k - len(statements))
    return sorted([*statements, *questions[:room]], key=lambda hit: -hit.score)[:k]


def needs_memory(query: str, hits: Sequence[Hit], embedder: str) -> bool:
    """Whether what was found should go to a model: not for small talk, nor where nothing is near.

    Args:
        query: the user's words.
        hits: what was found, with ``parts["cosine"]``.
        embedder: id of the one that made the vectors; one without a measured floor recalls always.
    """
    near = nearness(query, hits, embedder)
    return near is None or not hits or near >= 0.5


def nearness(query: str, hits: Sequence[Hit], embedder: str) -> float | None:
    """0 to 1, and .5 where the nearest memory is just near enough for this query; None without a floor.

    A query in the first person, or one that names somebody of whom a memory speaks, asks for memories.

    Example:
        >>> from datetime import UTC, datetime
        >>> hits = [Hit(Record("I moved to Rome", datetime.now(UTC)), 1.0, {"cosine": 0.3})]
        >>> nearness("hi", hits, "minilm"), nearness("Where do I live?", hits, "minilm")
        (0.0, 0.5)
    """
    if _greets(query):
        return 0.0
    floors = next((pair for name, pair in _FLOORS.items() if embedder.lower().startswith(name)), None)
    if floors is None:
        return None
    personal = bool(_PERSONAL.search(query)) and not _HOW_TO.match(query)
    if names := _NAME.findall(query):
        told = {word for hit in hits for word in re.findall(r"\w+", hit.record.text)}
        personal = personal or not told.isdisjoint(names)
    nearest = max((hit.parts.get("cosine", 1.0) for hit in hits), default=0.0)
    return 1 / (1 + math.exp(-_STEEP * (nearest - floors[0 if personal else 1])))


def _own(record: Record) -> str:
    """What tells two turns apart: the user's words, and the reply where the user only asks."""
    said = str(record.metadata.get("query") or "")
    if not said:
        return record.text
    return f"{said} {record.metadata.get('response', '')}" if record.key.startswith("ask:") else said


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _greets(text: str) -> bool:
    return 0 < len(text) <= 80 and bool(_GREETING.fullmatch(" ".join(_words(text))))
