"""Memories from elsewhere, and the scores of two benchmarks."""

from __future__ import annotations

from pathlib import Path

import pytest

from memspan.base import BadInput
from memspan.data import HashingEmbedder
from memspan.recall.importers import Mem0Adapter, import_locomo, import_longmemeval, import_mem0
from memspan.recall.memory import Memory
from memspan.recall.scores import locomo_f1, longmemeval_ndcg, longmemeval_recall
from memspan.report.metrics import ndcg


def test_longmemeval_gives_the_first_two_ranks_the_same_weight() -> None:
    assert longmemeval_ndcg(["miss", "hit"], {"hit"}, 2) == 1.0
    assert longmemeval_ndcg(["hit", "miss"], {"hit"}, 2) == 1.0
    assert abs(ndcg(["miss", "hit"], {"hit"}, 2) - 0.6309) < 1e-4
    for ranked in (["a", "b", "c"], ["c", "a", "b"]):
        for k in (1, 2, 3):
            some, every = longmemeval_recall(ranked, {"a", "b"}, k)
            assert every <= some


@pytest.mark.parametrize(
    ("prediction", "answer", "category", "wanted"),
    [
        ("She was running", "run and the", 4, 0.5),
        ("7 May 2023", "7 May, 2023", 2, 1.0),
        ("tea, chess", "chess, rain", 1, 0.5),
        ("likely yes", "Likely yes; since she paints", 3, 1.0),
        ("That is not mentioned.", "Rome", 5, 1.0),
        ("Rome", "Rome", 5, 0.0),
        ("", "Rome", 4, 0.0),
    ],
)
def test_locomo_answers_score_as_the_official_function(
    prediction: str, answer: str, category: int, wanted: float
) -> None:
    pytest.importorskip("nltk")
    assert abs(locomo_f1(prediction, answer, category) - wanted) < 1e-9


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
