"""Memories from elsewhere, and calls shaped like another library's."""

from __future__ import annotations

from pathlib import Path

import pytest

from memspan.base import BadInput
from memspan.data import HashingEmbedder
from memspan.recall.importers import Mem0Adapter, import_locomo, import_longmemeval, import_mem0
from memspan.recall.memory import Memory


def test_memories_come_in_from_other_formats(tmp_path: Path) -> None:
    mem = Memory(tmp_path / "m.db", embedder=HashingEmbedder(32))
    import_mem0(
        mem, {"results": [{"id": "x", "memory": "Likes tea", "created_at": "2024-01-02T03:04:05-08:00"}]}
    )
    locomo = {
        "conversation": {
            "speaker_a": "Ann", "session_1_date_time": "1:56 pm on 8 May, 2023",
            "session_1": [
                {"speaker": "Ann", "dia_id": "D1:1", "text": "Hi"},
                {"speaker": "Bo", "dia_id": "D1:2", "text": "Hey"},
            ],
        }
    }  # fmt: skip
    assert len(import_locomo(mem, locomo)) == 2
    long = {
        "haystack_session_ids": ["s1"], "haystack_dates": ["2023/05/20 (Sat) 02:21"],
        "haystack_sessions": [
            [{"role": "user", "content": "I like jazz"}, {"role": "assistant", "content": "Good"}]
        ],
    }  # fmt: skip
    assert len(import_longmemeval(mem, long)) == 1
    told = {r.metadata.get("dia_id"): r.created_at.isoformat() for r in mem.store.iterate()}
    assert told["D1:1"] == "2023-05-08T13:56:00+00:00"
    assert mem.store.count() == 4
    with pytest.raises(BadInput, match="memory"):
        import_mem0(mem, [{"id": "y"}])


def test_calls_shaped_like_mem0_keep_users_apart(tmp_path: Path) -> None:
    adapter = Mem0Adapter(tmp_path / "m.db", embedder=HashingEmbedder(32))
    added = adapter.add("I like tea", user_id="ann", metadata={"tag": "x"})
    adapter.add([{"role": "user", "content": "I like tea too"}], user_id="bob")
    found = adapter.search("tea", user_id="ann")["results"]
    assert [one["id"] for one in found] == [added["results"][0]["id"]]
    assert found[0]["metadata"]["tag"] == "x"
    assert adapter.history(found[0]["id"], user_id="ann")[0]["kind"] == "turn"
    assert adapter.delete(found[0]["id"], user_id="bob") == {"message": "0 deleted"}
    assert adapter.delete(found[0]["id"], user_id="ann") == {"message": "1 deleted"}
    assert adapter.get_all(user_id="ann") == {"results": []}
    assert len(adapter.get_all(user_id="bob")["results"]) == 1
    adapter.close()
