"""What a memory is made of, and what a policy over a store must offer. Plain data; no database, no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypedDict, runtime_checkable

if TYPE_CHECKING:
    from memspan.recall.store import UserStore

__all__ = ["KINDS", "TRUST", "Forgotten", "Hit", "Kind", "Message", "Policy", "Record", "Source", "Trust"]

Kind = Literal["turn", "summary", "thought", "portrait", "document", "trace"]
Trust = Literal["user", "assistant", "tool", "web"]
State = Literal["pending", "active", "superseded", "merged", "deleted"]

#: Kinds of records. A trace tells how a reply was made; it is never recalled.
KINDS: tuple[Kind, ...] = ("turn", "summary", "thought", "portrait", "document", "trace")
#: Sources from the most to the least trusted; only the user's own words may change a portrait.
TRUST: tuple[Trust, ...] = ("user", "assistant", "tool", "web")


class Message(TypedDict, total=False):
    """One message of a chat, in the form of the OpenAI API; other keys pass through untouched."""

    role: str
    content: Any
    name: str


class Source(TypedDict, total=False):
    """Where a record comes from."""

    role: str
    session: str
    channel: str
    trust: Trust


@dataclass(frozen=True)
class Record:
    """One thing remembered of one user.

    Attributes:
        id: ULID: unique, and ordered by the time of creation within a store. Opaque: nothing parses it.
        text: what is shown, indexed for words and embedded.
        kind: one of :data:`KINDS`.
        created_at: when it was said; with a time zone.
        valid_from: since when it holds (``created_at`` unless told otherwise).
        valid_to: until when it held; None while it does.
        state: pending (not yet processed), active, superseded, merged, or deleted (can be
            undone for a while).
        source: role, session, channel, trust.
        evidence: ids of the records it was derived from.
        strength: how often it was learned or recalled; 1 when new.
        last_recalled: when it was learned or last recalled.
        expires_at: when it leaves by itself; None for never.
        metadata: the policy's own fields, JSON values.
    """

    text: str
    created_at: datetime
    id: str = ""
    kind: Kind = "turn"
    valid_from: datetime | None = None
    valid_to: datetime | None = None
    state: State = "active"
    source: Source = field(default_factory=lambda: Source(role="user", trust="user"))
    evidence: tuple[str, ...] = ()
    strength: float = 1.0
    last_recalled: datetime | None = None
    expires_at: datetime | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Hit:
    """A record that was found, with every part of its score.

    Attributes:
        record: what was found.
        score: what the hits are ordered by.
        parts: named parts such as ``words`` (BM25), ``cosine``, ``words_rank``, ``vector_rank``, ``recency``,
            ``retention``.
    """

    record: Record
    score: float
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Forgotten:
    """A record that was (or with ``dry_run`` would be) forgotten, and why.

    Attributes:
        id: the record's.
        reason: in words.
        retention: at the time of forgetting; None where no retention decided.
        nbytes: bytes that it held.
    """

    id: str
    reason: str
    retention: float | None = None
    nbytes: int = 0


@runtime_checkable
class Policy(Protocol):
    """What is kept of a conversation, recalled for a question, and forgotten.

    ``store`` is bound to one user: a policy cannot address another. A policy holds no state of a
    user; all of it is in the store.
    """

    def observe(self, store: UserStore, messages: Sequence[Message], at: datetime) -> list[str]:
        """Remember messages; the ids of what was written."""
        ...

    def recall(self, store: UserStore, query: str, k: int, at: datetime, reinforce: bool = True) -> list[Hit]:
        """The best ``k`` for a query, best first."""
        ...

    def context(self, store: UserStore, query: str, hits: Sequence[Hit], budget_tokens: int) -> list[Message]:
        """Messages that carry what was recalled, marked as data, within a budget of tokens."""
        ...

    def forget(
        self, store: UserStore, at: datetime, ids: Sequence[str] | None = None, dry_run: bool = False
    ) -> list[Forgotten]:
        """Forget what the policy lets go at this time, or the named records."""
        ...

    def explain(self, store: UserStore, id: str) -> dict[str, float | str]:
        """Why a record stands where it stands: strength, age, retention, evidence, in plain values."""
        ...
