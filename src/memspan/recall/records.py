"""What a memory is made of, and what a policy over a store must offer. Plain data; no database, no model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, TypedDict

if TYPE_CHECKING:
    from memspan.recall.store import UserStore

__all__ = [
    "KINDS",
    "TRUST",
    "Forgotten",
    "Hit",
    "Kind",
    "Message",
    "Plan",
    "Policy",
    "Record",
    "Source",
    "Trust",
]

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
        key: what it is about, for a policy that keeps one record of each thing; found by ``where={"key":
            ...}``
            without looking at others. ``ask:...`` marks turns that state nothing.
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
    key: str = ""


@dataclass(frozen=True)
class Hit:
    """A record that was found, with every part of its score.

    Attributes:
        record: what was found.
        score: what the hits are ordered by.
        parts: named parts such as ``words`` (BM25), ``words_around``, ``words_session``, ``cosine``,
            ``cosine_around``, ``recency``, ``retention``.
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


@dataclass(frozen=True)
class Plan:
    """What remembering messages will cost, before any of it is done.

    Attributes:
        calls: of a language model.
        prompt_tokens: sent in these calls, estimated with the cautious counter.
        completion_tokens: at most received.
        embedded: texts to be embedded.
        records: to be written.
    """

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    embedded: int = 0
    records: int = 0

    def price(self, per_million_prompt: float, per_million_completion: float) -> float:
        """Cost in the currency of the prices per million tokens.

        Example:
            >>> Plan(calls=2, prompt_tokens=1_000_000, completion_tokens=500_000).price(1.0, 4.0)
            3.0
        """
        return (
            self.prompt_tokens * per_million_prompt + self.completion_tokens * per_million_completion
        ) / 1e6


class Policy(ABC):
    """What is kept of a conversation, recalled for a question, and forgotten.

    ``store`` is bound to one user: a policy cannot address another. A policy holds no state of a user; all of
    it is in the store. Five calls are a policy's own; the others have defaults.
    """

    #: Whether memories grow stronger when a reply used them (``"on_use"``), or ``"never"``.
    reinforce: Literal["on_use", "never"] = "on_use"
    #: Whether it tells how each prompt was made (``Packed.trace``).
    trace: bool = False
    #: Whether turns wait for :meth:`condense`: a model is asked, and no chat should wait for that.
    thinks_later: bool = False

    @abstractmethod
    def observe(self, store: UserStore, messages: Sequence[Message], at: datetime) -> list[str]:
        """Remember messages; the ids of what was written."""

    @abstractmethod
    def recall(self, store: UserStore, query: str, k: int, at: datetime) -> list[Hit]:
        """The best ``k`` for a query, best first; reading changes nothing."""

    @abstractmethod
    def context(self, store: UserStore, query: str, hits: Sequence[Hit], budget_tokens: int) -> list[Message]:
        """Messages that carry what was recalled, marked as data, within a budget of tokens."""

    @abstractmethod
    def forget(
        self, store: UserStore, at: datetime, ids: Sequence[str] | None = None, dry_run: bool = False
    ) -> list[Forgotten]:
        """Forget what the policy lets go at this time, or the named records."""

    @abstractmethod
    def explain(self, store: UserStore, id: str) -> dict[str, float | str]:
        """Why a record stands where it stands: strength, age, retention, evidence, in plain values."""

    def relevant(self, store: UserStore, query: str, hits: Sequence[Hit]) -> Sequence[Hit]:
        """The hits where the query may need them, none for small talk and questions about the world."""
        from memspan.recall.choose import needs_memory

        return hits if needs_memory(query, hits, store.embedder.id) else []

    def used(self, hits: Sequence[Hit], reply: str) -> list[str]:
        """Ids of the hits that a reply used: two of their content words, and a fifth of them, stand in it."""
        from memspan.recall.text import content_words

        said = content_words(reply)
        return [
            hit.record.id for hit in hits
            for own in [content_words(str(hit.record.metadata.get("query") or hit.record.text))]
            if len(own & said) >= max(min(2, len(own)), len(own) / 5) > 0
        ]  # fmt: skip

    def before_erase(self, store: UserStore, ids: Sequence[str]) -> list[str]:
        """Further ids that a deletion without trace takes along."""
        return []

    def condense(self, store: UserStore, at: datetime) -> list[str]:
        """Do the writing that waits (summaries, thoughts); ids of what was written."""
        return []

    def thoughts(
        self, store: UserStore, entity: str | None = None, as_of: datetime | None = None
    ) -> list[Any]:
        """What was concluded about an entity."""
        return []

    def plan(self, messages: Sequence[Message], counter: Callable[[str], int]) -> Plan:
        """What remembering messages would cost."""
        pairs = sum(message.get("role") == "user" for message in messages)
        return Plan(embedded=pairs, records=pairs)

    def retention_of(self, record: Record, at: datetime) -> float:
        """How much of a record is left, 0 to 1."""
        return 1.0
