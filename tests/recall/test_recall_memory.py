"""One user's memory: what goes into prompts, what is forgotten, and what a failing part must not break."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from memspan.base import BadInput
from memspan.data import HashingEmbedder
from memspan.recall.chat import ChatClient
from memspan.recall.memory import Memory, find_secrets
from memspan.recall.memorybank import MemoryBankPolicy
from recall.scripted_server import Answer, ScriptedServer
from recall.test_recall_text import INJECTIONS

START = datetime(2023, 5, 1, 12, tzinfo=UTC)
EMBED = HashingEmbedder(64)


@pytest.fixture
def mem(tmp_path: Path) -> Memory:
    return Memory(tmp_path / "me.db", user="emily", embedder=EMBED)


def test_only_what_was_placed_and_used_by_the_reply_grows_stronger(mem: Memory) -> None:
    (a,) = mem.observe(user="I went to Green Meadow Park " + "far " * 30, assistant="Nice", at=START)
    (b,) = mem.observe(user="The park was green", assistant="Good", at=START)
    packed = mem.prompt("which park?", budget_tokens=130, at=START + timedelta(days=1))
    assert packed.tokens <= 130
    assert len(packed.hits) == 2
    assert {r.strength for r in mem.store.get([a, b])} == {1}  # reading changes nothing
    assert mem.used(packed, "I do not know.") == []
    assert mem.used(packed, "You went to Green Meadow Park, far away; the park was green.") == packed.used
    assert [r.id for r in mem.store.get([a, b]) if r.strength == 2] == packed.used


def test_chat_recalls_before_it_asks_and_writes_what_was_said(mem: Memory) -> None:
    mem.observe(user="My cat is called Tom", assistant="A fine name", at=START)
    with ScriptedServer("Your cat is Tom.") as server:
        client = ChatClient(server.url, "scripted")
        assert mem.chat(client, "What is my cat called?", at=START).text == "Your cat is Tom."
        sent = server.calls[0].body["messages"]
    assert [message["role"] for message in sent] == ["user", "user"]
    assert "called Tom" in sent[0]["content"]
    assert len(mem.last_used) == 1
    assert mem.store.count() == 2


def test_a_stream_that_is_broken_off_is_written_as_partial(mem: Memory) -> None:
    with ScriptedServer(Answer(chunks=["one ", "two ", "three"])) as server:
        pieces = mem.stream(ChatClient(server.url, "scripted"), "count", at=START)
        assert next(pieces) == "one "
        assert mem.store.count() == 0  # the reply comes before the write
        pieces.close()
        (record,) = mem.store.iterate()
        assert record.metadata["partial"] is True
        assert record.metadata["response"] == "one "
        assert "".join(mem.stream(ChatClient(server.url, "scripted"), "count", at=START)) == "one two three"
    (record,) = mem.store.iterate()  # answered anew: one turn, whole now
    assert record.metadata["response"] == "one two three"
    assert not record.metadata.get("partial")


def test_a_memory_that_fails_does_not_stop_the_chat(
    mem: Memory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError

    mem.observe(user="hello", at=START)
    monkeypatch.setattr(mem.store, "search", broken)
    with ScriptedServer("fine") as server:
        assert mem.chat(ChatClient(server.url, "scripted"), "hello?", at=START).text == "fine"
    assert "nothing was recalled (RuntimeError)" in caplog.text


@pytest.mark.parametrize("evil", INJECTIONS)
def test_planted_memories_stay_data_and_stay_with_their_user(
    tmp_path_factory: pytest.TempPathFactory, evil: str
) -> None:
    path = tmp_path_factory.mktemp("evil") / "m.db"
    planted = Memory(path, user="mallory", embedder=EMBED)
    planted.observe(user=f"tea {evil}", assistant=f"tea {evil}", at=START)
    packed = planted.prompt("tea", at=START)
    assert [message["role"] for message in packed] == ["user"]
    assert packed[0]["content"].count("<") == 2
    assert packed[0]["content"].endswith("\n</memory>")
    other = Memory(planted.database, user="emily")
    other.observe(user="tea is nice", at=START)
    assert "mallory" not in str(other.prompt("tea", at=START))
    assert len(other.recall("tea", at=START)) == 1
    planted.close()


def test_forgetting_by_id_query_and_date_can_be_tried_first_and_undone(mem: Memory) -> None:
    (a,) = mem.observe(user="I met Ann in the park", at=START)
    (b,) = mem.observe(user="The park is green", at=START + timedelta(days=2))
    assert [one.id for one in mem.forget(query="Ann park", dry_run=True)] == [a]
    assert mem.store.count() == 2
    assert [one.id for one in mem.forget(query="Ann park")] == [a]
    assert mem.undo(a) == [a]
    assert [one.id for one in mem.forget(before=START + timedelta(days=1))] == [a]
    mem.undo([a])
    assert [one.id for one in mem.forget(b, hard=True)] == [b]
    assert mem.undo(b) == []
    with pytest.raises(BadInput, match="exactly one"):
        mem.forget()
    with pytest.raises(BadInput, match="stop word"):
        mem.forget(query="the of")


def test_forget_me_leaves_nothing_and_an_export_comes_back_whole(mem: Memory, tmp_path: Path) -> None:
    mem.observe(user="I met Ann", assistant="Who?", at=START, session="s1")
    mem.remember("Prefers short answers", at=START, pinned=True)
    lines = str(mem.export())
    assert len([one for one in map(json.loads, lines.splitlines()) if "text" in one]) == 2
    again = Memory(tmp_path / "again.db", user="emily", embedder=EMBED)
    assert again.store.import_(lines.splitlines()) == 2
    assert [r.metadata for r in again.store.iterate()] == [r.metadata for r in mem.store.iterate()]
    assert next(iter(mem.store.iterate())).source["session"] == "s1"
    assert mem.forget_me() == 2
    assert mem.export() == ""


def test_messages_of_other_roles_and_pictures_are_left_out(mem: Memory) -> None:
    parts = [{"type": "text", "text": "look"}, {"type": "image_url", "image_url": {"url": "data:,"}}]
    ids = mem.observe_messages(
        [
            {"role": "system", "content": "be nice"},
            {"role": "user", "content": parts},
            {"role": "assistant", "content": None, "tool_calls": []},
            {"role": "tool", "content": "42"},
            {"role": "assistant", "content": "I looked"},
        ],
        at=START,
    )
    texts = " ".join(r.text for r in mem.store.get(ids))
    assert "look" in texts
    assert "I looked" in texts
    assert not any(word in texts for word in ("nice", "42", "data:"))


def test_secrets_are_flagged_or_refused(tmp_path: Path) -> None:
    card = "my card is 4111 1111 1111 1111"
    assert find_secrets("AKIAIOSFODNN7EXAMPLE and -----BEGIN PRIVATE KEY-----") == ["private key", "API key"]
    flagged = Memory(tmp_path / "a.db", embedder=EMBED)
    (id,) = flagged.observe(user=card, at=START)
    assert flagged.store.get([id])[0].metadata["secrets"] == ["card number"]
    strict = Memory(flagged.database, user="strict", secrets="refuse")
    with pytest.raises(BadInput, match="card number"):
        strict.observe(user=card, at=START)
    assert strict.store.count() == 0


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda m: m.observe(user=" "), "user"),
        (lambda m: m.observe(user="x", at=datetime(2023, 5, 1)), "at"),
        (lambda m: m.observe(user="x" * 1_000_001), "text"),
        (lambda m: m.observe(user="a\x00b"), "text"),
        (lambda m: m.recall(""), "query"),
        (lambda m: m.recall("x", k=0), "k"),
        (lambda m: m.prompt("x", budget_tokens=-1), "budget_tokens"),
        (lambda m: m.chat(None, [{"role": "assistant", "content": "x"}]), "messages"),
        (lambda m: Memory(m.database, user=""), "user"),
        (lambda m: Memory(m.database, policy="fifo"), "policy"),
        (lambda m: Memory(m.database, policy=object()), "policy"),
    ],
)
def test_bad_input_is_refused_and_changes_nothing(mem: Memory, call: object, argument: str) -> None:
    with pytest.raises(BadInput) as error:
        call(mem)  # type: ignore[operator]
    assert error.value.argument == argument
    assert mem.store.count() == 0


def test_documents_are_kept_in_chunks_that_join_to_the_text(mem: Memory) -> None:
    text = "The first chapter is short. " * 60
    ids = mem.read(text, "A book", at=START, chunk_tokens=50)
    assert "".join(r.text for r in mem.store.get(ids)) == text
    assert mem.recall("chapter", k=1)[0].record.kind == "document"


def test_a_budget_of_tokens_bounds_what_is_recalled(mem: Memory) -> None:
    for i in range(5):
        mem.observe(user=f"tea number {i}", at=START)
    hits = mem.recall("tea", k=5, budget_tokens=60)
    assert 0 < len(hits) < 5
    assert sum(mem.counter(hit.record.text) for hit in hits) <= 60


def test_only_memories_that_the_reply_used_grow_stronger_where_asked(tmp_path: Path) -> None:
    mem = Memory(tmp_path / "m.db", policy=MemoryBankPolicy(reinforce="on_use"), embedder=EMBED)
    (a,) = mem.observe(user="My favourite tea is Darjeeling from the mountains", at=START)
    (b,) = mem.observe(user="My other tea is Peppermint leaves", at=START)
    with ScriptedServer("You like Darjeeling from the mountains") as server:
        mem.chat(ChatClient(server.url, "scripted"), "Which tea do I like?", at=START)
    assert [r.strength for r in mem.store.get([a, b])] == [2, 1]


def test_asynchronous_twins_do_the_same(mem: Memory) -> None:
    async def talk() -> list[str]:
        ids = await mem.aobserve(user="I like tea", at=START)
        hits = await mem.arecall("tea")
        packed = await mem.aprompt("tea")
        assert [hit.record.id for hit in hits] == ids == packed.used
        await mem.asweep()
        return [one.id for one in await mem.aforget(ids)]

    assert len(asyncio.run(talk())) == 1


def test_a_plan_tells_the_price_before_anything_is_done(mem: Memory) -> None:
    plan = mem.plan([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    assert (plan.calls, plan.records, plan.embedded) == (0, 1, 1)
    assert mem.store.count() == 0
