"""Memories from elsewhere: mem0's exports, LoCoMo and LongMemEval files; and mem0's calls over a memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from memspan.base import refuse
from memspan.recall.memory import Memory
from memspan.recall.records import Message, Policy
from memspan.recall.store import SEARCHED, Store

__all__ = ["Mem0Adapter", "import_locomo", "import_longmemeval", "import_mem0"]


def import_mem0(memory: Memory, items: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> list[str]:
    """Write what mem0's ``get_all`` gives, as notes with their times.

    Raises:
        BadInput: an item without the text ``memory``.
    """
    listed = items["results"] if isinstance(items, Mapping) else items
    ids = []
    for item in listed:
        text = item.get("memory")
        if not isinstance(text, str) or not text.strip():
            refuse("items", sorted(item), "each needs its text under 'memory'")
        at = _time(str(item.get("created_at") or ""))
        ids.append(
            memory.remember(text, at, mem0_id=str(item.get("id", "")), **dict(item.get("metadata") or {}))
        )
    return ids


def import_locomo(memory: Memory, sample: Mapping[str, Any]) -> list[str]:
    """Write one LoCoMo conversation; speaker A is the user; ``dia_id`` is kept in the metadata."""
    spoken, ids, number = sample["conversation"], [], 1
    while f"session_{number}_date_time" in spoken:
        at = datetime.strptime(spoken[f"session_{number}_date_time"], "%I:%M %p on %d %B, %Y").replace(
            tzinfo=UTC
        )
        for turn in spoken.get(f"session_{number}", ()):
            words = f"{turn['speaker']}: " + " ".join(
                part for part in (turn["text"], turn.get("blip_caption")) if part
            )
            role = "user" if turn["speaker"] == spoken["speaker_a"] else "assistant"
            said = [Message(role=role, content=words)]
            ids += memory.observe_messages(said, at, f"session_{number}", dia_id=turn["dia_id"])
        number += 1
    return ids


def import_longmemeval(memory: Memory, item: Mapping[str, Any]) -> list[str]:
    """Write the sessions of one LongMemEval question; session ids are kept."""
    ids: list[str] = []
    sessions = zip(
        item["haystack_session_ids"], item["haystack_dates"], item["haystack_sessions"], strict=True
    )
    for name, day, turns in sessions:
        at = datetime.strptime(day[:10] + day[-6:], "%Y/%m/%d %H:%M").replace(tzinfo=UTC)
        said = [
            Message(role=turn["role"], content=turn["content"]) for turn in turns if turn["content"].strip()
        ]
        ids += memory.observe_messages(said, at, str(name))
    return ids


class Mem0Adapter:
    """mem0's calls (``add``, ``search``, ``get_all``, ``delete``, ``history``) over memories of one store.

    Args:
        store: path, address, or an open store.
        policy: of every user's memory.
        options: of :class:`Memory`.
    """

    def __init__(
        self, store: str | Path | Store = "memory.db", policy: str | Policy = "memorybank", **options: Any
    ) -> None:
        first = Memory(store, "mem0", policy, **options)
        self._first, self._options = first, {**options, "policy": first.policy}
        self._options.pop("embedder", None)

    def add(
        self, messages: str | Sequence[Message], *, user_id: str, metadata: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Remember; no model is called."""
        said = [Message(role="user", content=messages)] if isinstance(messages, str) else list(messages)
        memory = self._of(user_id)
        ids = memory.observe_messages(said, None, "", **dict(metadata or {}))
        return {"results": [{"id": r.id, "memory": r.text, "event": "ADD"} for r in memory.store.get(ids)]}

    def search(self, query: str, *, user_id: str, limit: int = 10) -> dict[str, Any]:
        """Recall, without strengthening."""
        hits = self._of(user_id).recall(query, limit)
        return {"results": [{**_shown(hit.record), "score": hit.score} for hit in hits]}

    def get_all(self, *, user_id: str, limit: int = 100) -> dict[str, Any]:
        """The newest records."""
        found = self._of(user_id).store.iterate(kinds=SEARCHED, newest_first=True, limit=limit)
        return {"results": [_shown(record) for record in found]}

    def delete(self, memory_id: str, *, user_id: str) -> dict[str, str]:
        """Erase for good; the user is named, since no id reaches another user's records."""
        gone = self._of(user_id).forget(memory_id, hard=True)
        return {"message": f"{len(gone)} deleted"}

    def history(self, memory_id: str, *, user_id: str) -> list[dict[str, Any]]:
        """What the policy tells of a record."""
        return [dict(self._of(user_id).why(memory_id))]

    def _of(self, user: str) -> Memory:
        return Memory(self._first.database, user, **self._options)

    def close(self) -> None:
        """Close the store, where this opened it."""
        self._first.close()


def _shown(record: Any) -> dict[str, Any]:
    return {
        "id": record.id, "memory": record.text, "created_at": record.created_at.isoformat(),
        "metadata": dict(record.metadata),
    }  # fmt: skip


def _time(told: str) -> datetime:
    try:
        at = datetime.fromisoformat(told)
    except ValueError:
        return datetime.now(UTC)
    return at if at.tzinfo else at.replace(tzinfo=UTC)
