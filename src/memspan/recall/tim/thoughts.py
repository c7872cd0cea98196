"""Thoughts: one fact in one sentence with its triple, its evidence and the time for which it held.

A thought's key is what it is about: the user's city has one key whoever is told to live there, so that a new
value finds the old one at once, however many thoughts are held.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from memspan.recall.records import Record, Source, State, Trust

if TYPE_CHECKING:
    from memspan.recall.store import UserStore

__all__ = ["FUNCTIONAL", "USER", "Thought", "ThoughtStore", "fact_key", "plain"]

#: The key of the user, by whatever name a sentence calls them.
USER = "user"
_SELF = {"the user", "user", "i", "me", "myself", "用户", "我", ""}
#: Relations of which one value holds at a time: a newer one supersedes.
FUNCTIONAL = frozenset(
    {"lives in", "works as", "works at", "is named", "is from", "住在", "名字是", "叫", "职业是", "工作是"}
)
_SAME = {
    "moved to": "lives in", "resides in": "lives in", "lives at": "lives in", "is living in": "lives in",
    "name is": "is named", "is called": "is named", "works for": "works at", "is employed by": "works at",
    "is employed as": "works as", "is a": "is", "job is": "works as", "住": "住在", "搬到": "住在",
    "名字是": "叫",
}  # fmt: skip


@dataclass(frozen=True)
class Thought:
    """A fact that was concluded from turns.

    Attributes:
        head: whom or what it is about.
        relation: such as ``lives in``; ``not`` in front denies it.
        tail: the rest.
        text: one sentence; what is shown and embedded.
        evidence: ids of the turns.
        created_at: of the turn that it comes from.
        valid_from: since when it holds.
        valid_to: until when it held; None while it does.
        children: ids of the thoughts that were merged into it.
        source: who stated it.
        state: active, superseded, merged or deleted.
        confidence: of the extractor.
        id: of its record.
    """

    head: str
    relation: str
    tail: str
    text: str
    created_at: datetime
    evidence: tuple[str, ...] = ()
    valid_from: datetime | None = None
    valid_to: datetime | None = None
    children: tuple[str, ...] = ()
    source: Trust = "user"
    state: State = "active"
    confidence: float = 1.0
    id: str = ""

    @property
    def denied(self) -> bool:
        """Whether it says that something is not so."""
        return self.relation.startswith("not ")

    @property
    def functional(self) -> bool:
        """Whether one value holds at a time."""
        base = _base(self.relation)
        return (
            base in FUNCTIONAL
            or (base.endswith((" is", " is named")) and base != "is")
            or base.startswith("的")
        )

    def repeats(self, other: Thought) -> bool:
        """Whether both say the same."""
        return self.denied == other.denied and plain(self.tail) == plain(other.tail)

    def ends(self, older: Thought) -> bool:
        """Whether an older thought of the same key no longer holds after this one."""
        same = plain(self.tail) == plain(older.tail)
        if self.denied == older.denied:
            return self.functional and not self.denied and not same
        return same or (self.functional and older.denied)


def fact_key(head: str, relation: str, tail: str, names: Sequence[str] = ()) -> str:
    """What a fact is about: its subject and relation; where several values hold at once, the value too.

    Args:
        head: the subject.
        relation: a denial has the key of what it denies.
        tail: the value.
        names: by which the user is called, beside "the user" and "I".

    Example:
        >>> fact_key("Ann", "lives in", "Rome", ["ann"]) == fact_key("I", "not moved to", "Oslo")
        True
    """
    subject = head.strip().lower()
    if subject in _SELF or subject in {name.lower() for name in names}:
        subject = USER
    one = Thought(subject, relation, tail, "", datetime.min)
    about = f"{subject}|{_base(relation)}"
    return (about if one.functional else f"{about}|{plain(tail)}")[:200]


def plain(text: str) -> str:
    """Words alone, without an article in front.

    Example:
        >>> plain("The  tea!")
        'tea'
    """
    words = re.sub(r"[^\w]+", " ", text.lower()).strip()
    return re.sub(r"^(?:the|an?) ", "", words)


class ThoughtStore:
    """One user's thoughts; all of it lives in the store.

    Args:
        store: the user's.
    """

    def __init__(self, store: UserStore) -> None:
        self.store = store

    @property
    def name(self) -> str:
        """What the user said to be called; "" where they did not."""
        for relation in ("is named", "叫"):
            for one in self.about(fact_key("I", relation, "")):
                if not one.denied:
                    return one.tail
        return ""

    def key(self, head: str, relation: str, tail: str) -> str:
        """:func:`fact_key` with the user's name."""
        name = self.name if head.strip().lower() not in _SELF else ""
        return fact_key(head, relation, tail, [name] if name else [])

    def about(self, key: str) -> list[Thought]:
        """The active thoughts of a key, oldest first."""
        return [_thought(one) for one in self.store.iterate(kinds=("thought",), where={"key": key})]

    def add(self, thoughts: Sequence[Thought]) -> list[str]:
        """Embed and write; their ids."""
        return self.store.add([self._record(one) for one in thoughts]) if thoughts else []

    def get(self, ids: Sequence[str]) -> list[Thought]:
        """By id."""
        return [_thought(record) for record in self.store.get(ids)]

    def all(
        self, head: str | None = None, states: Sequence[State] = ("active",), as_of: datetime | None = None
    ) -> Iterator[Thought]:
        """Thoughts about a head (any case, the user by any name), in these states, or active at a time."""
        chosen: Sequence[State] = ("active", "superseded", "merged") if as_of is not None else states
        wanted = None if head is None else self.key(head, "x", "").split("|")[0]
        for record in self.store.iterate(kinds=("thought",), states=chosen):
            if wanted is not None and record.key.split("|")[0] != wanted:
                continue
            one = _thought(record)
            since = one.valid_from or one.created_at
            if as_of is not None and not (since <= as_of and (one.valid_to is None or as_of < one.valid_to)):
                continue
            yield one

    def close(self, id: str, state: State, at: datetime, **told: Any) -> None:
        """Mark a thought superseded or merged since a time; nothing is lost."""
        (record,) = self.store.get([id])
        self.store.update(id, state=state, valid_to=at, metadata={**record.metadata, **told})

    def reopen(self, ids: Sequence[str]) -> None:
        """Make closed thoughts active again."""
        for record in self.store.get(ids):
            self.store.update(record.id, state="active", valid_to=None)

    def _record(self, one: Thought) -> Record:
        told = {
            "head": one.head, "relation": one.relation, "tail": one.tail, "children": list(one.children),
            "confidence": one.confidence,
        }  # fmt: skip
        return Record(
            one.text, one.created_at, id=one.id, kind="thought", valid_from=one.valid_from,
            valid_to=one.valid_to, state=one.state, source=Source(role=one.source, trust=one.source),
            evidence=one.evidence, metadata=told, key=self.key(one.head, one.relation, one.tail),
        )  # fmt: skip


def _base(relation: str) -> str:
    base = relation.removeprefix("not ").strip().lower()
    return _SAME.get(base, base)


def _thought(record: Record) -> Thought:
    told = record.metadata
    return Thought(
        str(told.get("head", "")), str(told.get("relation", "")), str(told.get("tail", "")), record.text,
        record.created_at, record.evidence, record.valid_from, record.valid_to,
        tuple(told.get("children", ())), record.source.get("trust", "user"), record.state,
        float(told.get("confidence", 1.0)), record.id,
    )  # fmt: skip
