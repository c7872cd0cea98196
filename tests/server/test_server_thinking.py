"""Thinking about what was said happens beside the chat: no reply waits for it, and nothing of it is lost."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from memspan.data import HashingEmbedder
from memspan.recall import ChatClient, SQLiteStore, TiMPolicy
from memspan.recall.tim import LLMExtractor
from memspan.server.memories import Memories
from recall.scripted_server import Answer, ScriptedServer
from served import Served

FACT = {
    "head": "Linda",
    "relation": "lives in",
    "tail": "Oslo",
    "text": "Linda lives in Oslo.",
    "source": "user",
}
THOUGHT = json.dumps({"facts": [FACT]})


def thinking(gate: threading.Event) -> Any:
    """A model whose thoughts wait for the gate, while its replies come at once."""

    def script(body: Mapping[str, Any]) -> Answer:
        if "response_format" in body:
            return Answer(THOUGHT, wait=gate)
        return Answer("I see.")

    return script


def say(served: Served, text: str) -> None:
    with served.client() as client:
        body = {"model": "scripted", "messages": [{"role": "user", "content": text}]}
        reply = client.post("/v1/chat/completions", json=body)
    assert reply.status_code == 200
    assert "x-memspan-error" not in reply.headers


def kinds(folder: Path, kind: str) -> int:
    store = SQLiteStore(folder / "memory.db", HashingEmbedder(64))
    try:
        return store.for_user("me").count(kinds=(kind,))
    finally:
        store.close()


def until(done: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.02)


def test_no_chat_waits_for_thoughts_and_they_are_all_there_in_the_end(tmp_path: Path) -> None:
    gate = threading.Event()
    with ScriptedServer(thinking(gate)) as model:
        app = {"llm": ChatClient(model.url, "scripted")}
        with Served(tmp_path, upstream=model.url, policy="tim", app=app) as served:
            for number in range(3):  # the first turn's thought is still awaited during the others
                say(served, f"I moved to Oslo, part {number}")
            until(
                lambda: any("facts" in call.prompt or "response_format" in call.body for call in model.calls)
            )
            assert kinds(tmp_path, "thought") == 0
            assert kinds(tmp_path, "turn") == 3
            gate.set()
        assert kinds(tmp_path, "thought") >= 1  # leaving waits for the line to empty
        store = SQLiteStore(tmp_path / "memory.db", HashingEmbedder(64))
        turns = list(store.for_user("me").iterate(kinds=("turn",)))
        store.close()
    assert [turn.metadata["think"] for turn in turns] == ["done"] * 3


def test_what_waited_when_a_server_ended_is_thought_about_by_the_next(tmp_path: Path) -> None:
    policy = TiMPolicy(extractor=LLMExtractor(ChatClient("http://127.0.0.1:9/v1", "none")))
    store = SQLiteStore(tmp_path / "memory.db", HashingEmbedder(64))
    Memories(store, policy).of("me").observe(user="I moved to Oslo", assistant="Welcome!")  # and then killed
    store.close()
    gate = threading.Event()
    gate.set()
    with ScriptedServer(thinking(gate)) as model:
        app = {"llm": ChatClient(model.url, "scripted")}
        with Served(tmp_path, upstream=model.url, policy="tim", app=app):
            until(lambda: kinds(tmp_path, "thought") == 1)


@pytest.mark.anyio
async def test_the_line_is_bounded_and_holds_each_user_once(tmp_path: Path) -> None:
    policy = TiMPolicy(extractor=LLMExtractor(ChatClient("http://127.0.0.1:9/v1", "none")))
    store = SQLiteStore(tmp_path / "m.db", HashingEmbedder(64))
    memories = Memories(store, policy, line=3)
    assert [memories.later(user) for user in ("a", "b", "a", "c", "d")] == [True, True, True, True, False]
    await memories.finish(0)
    assert memories.waiting == 0
    store.close()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
