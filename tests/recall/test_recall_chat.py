"""The client of language models against a scripted endpoint, beside the official client."""

from __future__ import annotations

import json
import threading

import httpx
import numpy as np
import pytest
from pydantic import BaseModel

from memspan.base import BadInput
from memspan.recall.chat import BadReply, ChatClient, ChatFailed, OpenAIEmbedder, language_of, load_prompt
from recall.scripted_server import Answer, ScriptedServer, prompt_hash

HELLO = [{"role": "user", "content": "hello"}]


class Fact(BaseModel):
    head: str
    year: int


def client(server: ScriptedServer, **options: object) -> ChatClient:
    waits: list[float] = []
    made = ChatClient(server.url, "scripted", sleep=waits.append, **options)  # type: ignore[arg-type]
    made.waits = waits  # type: ignore[attr-defined]
    return made


def test_answers_and_streams_equal_those_of_the_official_client() -> None:
    openai = pytest.importorskip("openai")
    pieces = ["Grüß", " dich", ", 你", "好", " 🙂!"]
    with ScriptedServer(Answer("".join(pieces), chunks=pieces)) as server:
        official = openai.OpenAI(base_url=server.url, api_key="k")
        theirs = official.chat.completions.create(model="scripted", messages=HELLO)
        parts = official.chat.completions.create(model="scripted", messages=HELLO, stream=True)
        their_pieces = [part.choices[0].delta.content for part in parts if part.choices[0].delta.content]
        ours = client(server)
        assert ours.complete(HELLO).text == theirs.choices[0].message.content
        assert list(ours.stream(HELLO)) == their_pieces == pieces
        assert ours.usage.calls == 2
        assert ours.usage.prompt_tokens == theirs.usage.prompt_tokens


def test_busy_and_failing_endpoints_are_tried_again_and_their_wait_is_kept() -> None:
    script = [Answer(status=429, headers={"Retry-After": "7"}), Answer(status=503), "well"]
    with ScriptedServer(script) as server:
        chat = client(server)
        assert chat.complete(HELLO).text == "well"
        assert chat.waits[0] == 7
        assert 0 < chat.waits[1] <= 20
        assert (len(server), chat.usage.failed) == (3, 2)


def test_a_refusal_is_not_tried_again_and_attempts_end() -> None:
    with ScriptedServer(Answer(status=401)) as server, pytest.raises(ChatFailed) as refused:
        client(server).complete(HELLO)
    assert (refused.value.status, refused.value.attempts) == (401, 1)
    with ScriptedServer(Answer(status=500)) as server:
        with pytest.raises(ChatFailed) as failed:
            client(server, retries=2).complete(HELLO)
        assert (failed.value.status, failed.value.attempts, len(server)) == (500, 3, 3)


def test_a_cut_body_is_tried_again() -> None:
    with ScriptedServer([Answer("long answer", cut_after=0), "whole"]) as server:
        assert client(server).complete(HELLO).text == "whole"
        assert len(server) == 2


def test_a_stream_cut_before_its_first_piece_is_tried_again_and_after_it_raises() -> None:
    with ScriptedServer([Answer(chunks=["a", "b"], cut_after=0), Answer(chunks=["c"])]) as server:
        assert list(client(server).stream(HELLO)) == ["c"]
    with ScriptedServer(Answer(chunks=["a", "b"], cut_after=1)) as server:
        got: list[str] = []
        with pytest.raises(ChatFailed):
            got.extend(client(server).stream(HELLO))
        assert got == ["a"]  # list.extend keeps what came before the break
        assert len(server) == 1


def test_a_late_answer_times_out_and_the_next_attempt_counts() -> None:
    never = threading.Event()
    with ScriptedServer([Answer("late", wait=never), "in time"]) as server:
        assert client(server, timeout=0.3).complete(HELLO).text == "in time"
        never.set()


@pytest.mark.parametrize(
    "raw", [b"not json", b"{}", b'{"choices": []}', b'{"choices": [{"message": 3}]}', b"[]"]
)
def test_answers_of_another_form_are_refused_without_showing_them(raw: bytes) -> None:
    with ScriptedServer(Answer(raw=raw)) as server, pytest.raises(BadReply) as error:
        client(server).complete(HELLO)
    assert raw.decode() not in str(error.value)


def test_a_huge_answer_is_refused_before_it_is_read_whole() -> None:
    with ScriptedServer("x" * 300_000) as server, pytest.raises(BadReply, match="more than 100000 bytes"):
        client(server, max_bytes=100_000).complete(HELLO)


def test_neither_errors_nor_repr_hold_keys_prompts_or_answers() -> None:
    with ScriptedServer(Answer("secret answer", status=400)) as server:
        chat = ChatClient(server.url, "scripted", api_key="sk-hidden")
        with pytest.raises(ChatFailed) as error:
            chat.complete([{"role": "user", "content": "private words"}])
        told = str(error.value) + repr(error.value) + repr(chat)
        assert not any(word in told for word in ("sk-hidden", "private", "secret"))
        assert server.calls[0].headers["authorization"] == "Bearer sk-hidden"


def test_structured_answers_are_validated_asked_for_again_and_then_refused() -> None:
    with ScriptedServer(['{"head": "Ann"}', '```json\n{"head": "Ann", "year": 1997}\n```']) as server:
        assert client(server).structured(HELLO, Fact) == Fact(head="Ann", year=1997)
        assert server.calls[0].body["response_format"]["json_schema"]["name"] == "Fact"
        assert "year: missing" in server.calls[1].prompt
    with ScriptedServer("I would rather not") as server, pytest.raises(BadReply, match="no valid Fact"):
        client(server).structured(HELLO, Fact)


def test_an_endpoint_without_schemas_is_asked_for_json_in_words() -> None:
    def script(body: dict[str, object]) -> Answer | str:
        return Answer(status=400) if "response_format" in body else '{"head": "B", "year": 2}'

    with ScriptedServer(script) as server:  # type: ignore[arg-type]
        chat = client(server)
        assert chat.structured(HELLO, Fact).year == 2
        assert chat.structured(HELLO, Fact).head == "B"
        assert len(server) == 4  # twice refused, then remembered


def test_tool_calls_and_first_token_probabilities_come_through() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    with ScriptedServer(Answer("A", tool_calls=[call], top_logprobs={"A": -0.1, "B": -2.3})) as server:
        reply = client(server).complete(HELLO, logprobs=True)
    assert reply.tool_calls == (call,)
    assert reply.top == {"A": -0.1, "B": -2.3}


def test_a_script_may_be_a_dictionary_of_prompts() -> None:
    with ScriptedServer({prompt_hash(HELLO): "known"}) as server:
        assert client(server).complete(HELLO).text == "known"
        with pytest.raises(ChatFailed):
            client(server).complete([{"role": "user", "content": "unknown"}])


def test_embeddings_come_in_order_as_unit_rows_and_bad_ones_are_refused() -> None:
    with ScriptedServer() as server:
        embed = OpenAIEmbedder(server.url, "letters", batch_size=2)
        rows = embed(["aaa", "b", "cab"])
        assert rows.shape == (3, 26)
        assert rows.dtype == np.float32
        assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
        assert rows[0].argmax() == 0
        assert rows[1].argmax() == 1
        assert embed.id == "openai-letters-26"
        assert embed([]).shape == (0, 26)
    with ScriptedServer(embed=lambda text: [0.0, 0.0]) as server, pytest.raises(BadReply):
        OpenAIEmbedder(server.url, "zero")
    with ScriptedServer(embed=lambda text: [1.0] * 3) as server, pytest.raises(BadReply):
        OpenAIEmbedder(server.url, "m", dim=2)(["x"])


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("base_url", {"base_url": "ftp://x"}),
        ("model", {"model": " "}),
        ("timeout", {"timeout": 0}),
        ("retries", {"retries": -1}),
    ],
)
def test_bad_settings_are_refused_at_the_door(argument: str, options: dict[str, object]) -> None:
    given = {"base_url": "http://127.0.0.1:1/v1", "model": "m"} | options
    with pytest.raises(BadInput) as error:
        ChatClient(**given)  # type: ignore[arg-type]
    assert error.value.argument == argument


def test_every_prompt_exists_in_both_languages_and_names_what_it_lacks() -> None:
    from importlib import resources

    names = [f.name[:-5] for f in (resources.files("memspan.recall") / "prompts").iterdir()]
    for name in names:
        english, chinese = load_prompt(name), load_prompt(name, "zh")
        assert english.version == chinese.version >= 1
        assert set(_fields(english.user)) == set(_fields(chinese.user))
        assert language_of(chinese.system) == "zh"
    with pytest.raises(BadInput, match="question"):
        load_prompt("answer").messages(memory="")
    # What values hold is not looked into.
    assert "$memory" in load_prompt("answer").messages(memory="x", question="$memory")[1]["content"]


def _fields(text: str) -> list[str]:
    from string import Template

    return Template(text).get_identifiers()


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x1e"])
def test_a_streamed_piece_may_hold_any_mark_that_other_readers_take_for_a_line_break(mark: str) -> None:
    event = json.dumps({"choices": [{"delta": {"content": f"one{mark}two"}}]}, ensure_ascii=False)
    body = f"data: {event}\r\n\r\n: a comment\ndata: [DONE]\n\n".encode()
    response = httpx.Response(200, content=body)
    made = ChatClient("http://127.0.0.1:9", "scripted")
    assert list(made._events(response)) == [f"one{mark}two", None]


def test_a_stream_without_an_end_or_of_other_bytes_is_refused() -> None:
    made = ChatClient("http://127.0.0.1:9", "scripted", max_bytes=100)
    for body, told in ((b"data: " + b"x" * 200, "more than 100 bytes"), (b"data: \xff\xfe\n", "not UTF-8")):
        with pytest.raises(BadReply, match=told):
            list(made._events(httpx.Response(200, content=body)))
