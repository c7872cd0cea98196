"""Exchanges as records: one turn for a user's message and its reply; what only repeats is kept once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Literal

from memspan.base import refuse
from memspan.recall.choose import ask_key
from memspan.recall.pack import Piece
from memspan.recall.records import Message, Record, Source

if TYPE_CHECKING:
    from memspan.recall.store import UserStore

__all__ = ["check_time", "hit_piece", "keep_turns", "turn_text", "turns_of"]

_AGAIN = timedelta(hours=1)  # within it the same words in a row are one turn, answered anew


def turn_text(user: str, assistant: str, at: datetime) -> str:
    """The text by which a turn is found: its date, the user's words and the reply.

    Example:
        >>> turn_text("Hi", "Hello", datetime(2023, 5, 2))
        'Conversation content on 2023-05-02: [|User|]: Hi; [|AI|]: Hello'
    """
    return f"Conversation content on {at:%Y-%m-%d}: [|User|]: {user}; [|AI|]: {assistant}"


def keep_turns(store: UserStore, turns: Sequence[Record]) -> list[str]:
    """Write turns; ids.

    A question that was asked before, and the last turn answered anew, are kept once with their count.
    """
    ids: list[str] = []
    for turn in turns:
        known = _known(store, turn) if turn.metadata["query"] else None
        if known is None:
            ids += store.add([turn])
            continue
        told = known.metadata
        count = int(told.get("count", 1)) + 1
        response = turn.metadata["response"] or told.get("response", "")
        more = {"response": response, "count": count, "again": turn.created_at.isoformat()}
        kept = {name: part for name, part in told.items() if name != "partial"}
        changes: dict[str, object] = {"metadata": {**kept, **more}}
        if response != told.get("response", ""):
            changes["text"] = turn_text(str(told["query"]), str(response), known.created_at)
        store.update(known.id, **changes)
        ids.append(known.id)
    return ids


def _known(store: UserStore, turn: Record) -> Record | None:
    """The turn of the same words: whenever, where they only ask; just before, where they state something."""
    if turn.key:
        return next(store.iterate(kinds=("turn",), where={"key": turn.key}, limit=1), None)
    last = next(store.iterate(kinds=("turn",), newest_first=True, limit=1), None)
    same = last is not None and last.metadata.get("query") == turn.metadata["query"]
    return last if last is not None and same and turn.created_at - last.created_at < _AGAIN else None


def turns_of(messages: Sequence[Message], at: datetime) -> Iterable[Record]:
    """Records of kind turn: each user message with the reply behind it; other roles are left out.

    Raises:
        BadInput: a message whose content is not text, or whose text is empty.
    """
    query: str | None = None
    channel = ""
    for message in messages:
        role, text = str(message.get("role", "")), _text(message)
        if role == "user":
            if query is not None:
                yield _turn(query, "", at, channel)
            query, channel = text, str(message.get("name", ""))
        elif role == "assistant":
            yield _turn(query or "", text, at, channel)
            query = None
    if query is not None:
        yield _turn(query, "", at, channel)


def hit_piece(record: Record, tag: str = "") -> Piece:
    """The piece that shows a record; a turn shows both sides' words without the index's prefix."""
    told = record.metadata
    text = record.text
    if record.kind == "turn" and "query" in told:
        reply = told.get("response", "")
        if told.get("partial"):
            reply = f"{reply} (partial: this reply was broken off)"
        text = "\n".join(
            f"{who}: {said}" for who, said in (("user", told["query"]), ("assistant", reply)) if said
        )
    source = str(record.source.get("trust", ""))
    return Piece(text, record.id, record.kind, record.created_at, source, tag)


def check_time(at: datetime) -> None:
    """Refuse a time without a zone.

    Raises:
        BadInput: no zone.
    """
    if at.tzinfo is None or at.utcoffset() is None:
        refuse("at", at, "give a time with a zone, such as datetime.now(timezone.utc)")


def _turn(query: str, response: str, at: datetime, channel: str) -> Record:
    text = f"{at:%Y-%m-%d}"
    told = {"query": query, "response": response, "day": text}
    # A turn without the user's words is the assistant's alone.
    trust: Literal["user", "assistant"] = "user" if query else "assistant"
    source = Source(role=trust, trust=trust)
    if channel:
        source["channel"] = channel
    return Record(turn_text(query, response, at), at, source=source, metadata=told, key=ask_key(query))


def _text(message: Message) -> str:
    content = message.get("content")
    if isinstance(content, list):  # parts of the API's multi-part form; pictures are left out
        content = "\n".join(
            str(part.get("text", "")) for part in content if isinstance(part, dict) and "text" in part
        )
    if content is None and message.get("role") == "assistant":
        return ""  # a call of tools alone
    if not isinstance(content, str):
        refuse("content", content, "give text")
    if not content.strip() and message.get("role") == "user":
        refuse("content", content, "give text that is not empty")
    return content
