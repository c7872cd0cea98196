"""The proxy: real clients, a real upstream on loopback; what the memory does not concern stays byte for
byte."""

from __future__ import annotations

import gzip
import json
import threading
from pathlib import Path

import httpx
import openai
import pytest

from memspan.recall.chat import ChatClient
from recall.scripted_server import Answer, ScriptedServer
from served import Served

PARK = {"role": "user", "content": "I went to Green Meadow Park with my dog Rex"}
WHICH = {"role": "user", "content": "Which park did I visit with Rex?"}
TOOLS = [{"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"a": 1}'}}]


def _client(served: Served, key: str = "none", **headers: str) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{served.base}/v1", api_key=key, max_retries=0, default_headers=headers,
        http_client=httpx.Client(trust_env=False),
    )  # fmt: skip


def _say(client: openai.OpenAI, *messages: dict[str, str], **more: object) -> str:
    answer = client.chat.completions.create(model="scripted", messages=list(messages), **more)
    return answer.choices[0].message.content


@pytest.mark.parametrize(
    "answer",
    [
        Answer("plain words", extra={"unknown": {"deep": [1, None, "é"]}}),
        Answer("", tool_calls=TOOLS, finish="tool_calls"),
        Answer(status=429, headers={"Retry-After": "7"}),
        Answer(status=500),
        Answer(raw=b"{broken"),
        Answer(raw=gzip.compress(b'{"choices": []}'), headers={"Content-Encoding": "gzip"}),
    ],
    ids=["unknown fields", "tool calls", "429", "500", "broken JSON", "gzip"],
)
def test_with_memory_off_an_answer_is_the_upstreams_byte_for_byte(tmp_path: Path, answer: Answer) -> None:
    body = b'{ "model": "scripted",\n "messages": [{"role": "user", "content": "h\\u00e9"}], "strange": 1.50}'

    def raw(url: str, **headers: str) -> tuple[int, bytes, dict[str, str]]:
        with (
            httpx.Client(trust_env=False) as client,
            client.stream(
                "POST",
                f"{url}/chat/completions",
                content=body,
                headers={"content-type": "application/json", **headers},
            ) as response,
        ):
            return response.status_code, b"".join(response.iter_raw()), dict(response.headers)

    with ScriptedServer(answer) as upstream, Served(tmp_path, upstream=upstream.url) as served:
        direct, proxied = raw(upstream.url), raw(f"{served.base}/v1", **{"X-Memspan-Memory": "off"})
        sent, received = (call.body for call in upstream.calls)
        assert sent == received
        for name in ("content-type", "content-encoding", "retry-after"):
            assert direct[2].get(name) == proxied[2].get(name)
    assert direct[:2] == proxied[:2]


def test_a_stream_with_memory_off_is_the_upstreams_byte_for_byte(tmp_path: Path) -> None:
    body = {
        "model": "scripted",
        "messages": [PARK],
        "stream": True,
        "stream_options": {"include_usage": True},
    }

    def raw(url: str, **headers: str) -> bytes:
        with (
            httpx.Client(trust_env=False) as client,
            client.stream("POST", f"{url}/chat/completions", json=body, headers=headers) as response,
        ):
            return b"".join(response.iter_raw())

    with (
        ScriptedServer(Answer("grüß dich, 你好")) as upstream,
        Served(tmp_path, upstream=upstream.url) as served,
    ):
        direct, proxied = raw(upstream.url), raw(f"{served.base}/v1", **{"X-Memspan-Memory": "off"})
    assert _without_id(direct) == _without_id(proxied)
    assert b"[DONE]" in direct


def _without_id(events: bytes) -> list[object]:
    """Events less the completion's own id and time, which differ between two calls of any upstream."""
    out: list[object] = []
    for line in events.split(b"\n"):
        if line.startswith(b"data: {"):
            document = json.loads(line[6:])
            document.pop("id", None)
            document.pop("created", None)
            out.append(document)
        else:
            out.append(line)
    return out


@pytest.mark.parametrize("stream", [False, True])
def test_a_later_chat_is_given_what_an_earlier_one_said(tmp_path: Path, stream: bool) -> None:
    with ScriptedServer("noted") as upstream, Served(tmp_path, upstream=upstream.url) as served:
        client = _client(served)
        if stream:
            chunks = client.chat.completions.create(model="scripted", messages=[PARK], stream=True)
            text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        else:
            text = _say(client, PARK)
        assert text == "noted"
        system = {"role": "system", "content": "Be brief."}
        answer = client.chat.completions.with_raw_response.create(
            model="scripted", messages=[system, WHICH], temperature=0.25, seed=7
        )
        sent = upstream.calls[-1].body
        assert [message["role"] for message in sent["messages"]] == ["system", "user", "user"]
        assert sent["messages"][0] == system
        assert sent["messages"][-1] == WHICH
        assert "Green Meadow Park" in sent["messages"][1]["content"]
        assert sent["messages"][1]["content"].rstrip().endswith("</memory>")
        assert (sent["temperature"], sent["seed"], sent["model"]) == (0.25, 7, "scripted")
        assert answer.headers["x-memspan-memory"] == "on"
        used = answer.headers["x-memspan-used"].split(",")
        with served.client() as http:
            assert "Green Meadow" in http.get(f"/memories/{used[0]}").json()["text"]
            traces = http.get("/memories", params={"kind": "trace", "newest_first": True}).json()["memories"]
        assert traces[0]["metadata"]["used"] == used
        assert traces[0]["metadata"]["recalled"][0]["parts"]


def test_modes_read_write_and_off_do_what_they_say(tmp_path: Path) -> None:
    with ScriptedServer("ok") as upstream, Served(tmp_path, upstream=upstream.url) as served:

        def count() -> int:
            with served.client() as http:
                return len(http.get("/memories", params={"kind": "turn"}).json()["memories"])

        _say(_client(served, **{"X-Memspan-Memory": "off"}), PARK)
        assert count() == 0
        _say(_client(served, **{"X-Memspan-Memory": "read"}), PARK)
        assert count() == 0
        _say(_client(served, **{"X-Memspan-Memory": "write"}), PARK)
        assert count() == 1
        _say(_client(served, **{"X-Memspan-Memory": "write"}), WHICH)
        assert len(upstream.calls[-1].body["messages"]) == 1
        _say(_client(served, **{"X-Memspan-Memory": "read"}), WHICH)
        assert len(upstream.calls[-1].body["messages"]) == 2
        assert count() == 2
        with pytest.raises(openai.BadRequestError, match="use off, read, write or on"):
            _say(_client(served, **{"X-Memspan-Memory": "maybe"}), PARK)


def test_a_reply_broken_off_by_its_reader_is_kept_as_partial(tmp_path: Path) -> None:
    more = threading.Event()
    pieces = ["first piece ", *["x"] * 50]

    def script(body: object) -> Answer:
        return Answer(chunks=pieces)

    with ScriptedServer(script) as upstream, Served(tmp_path, upstream=upstream.url) as served:
        with served.client() as http:
            body = {"model": "m", "messages": [PARK], "stream": True}
            with http.stream("POST", "/v1/chat/completions", json=body) as response:
                next(response.iter_raw(10))
            more.set()
        served.__exit__()  # waits for what is being written
        with Served(tmp_path) as again, again.client() as http:
            turns = http.get("/memories", params={"kind": "turn"}).json()["memories"]
    assert len(turns) == 1
    assert "Green Meadow" in turns[0]["text"]


def test_a_memory_that_fails_never_stops_the_chat(tmp_path: Path) -> None:
    with ScriptedServer("still here") as upstream, Served(tmp_path, upstream=upstream.url) as served:
        store = served.app.app.state.store
        store.close()
        raw = _client(served).chat.completions.with_raw_response.create(model="scripted", messages=[PARK])
        assert raw.parse().choices[0].message.content == "still here"
        assert "failed" in raw.headers["x-memspan-error"]
        assert upstream.calls[-1].body["messages"] == [PARK]


def test_an_upstream_that_is_down_or_refuses_is_told_as_it_is(tmp_path: Path) -> None:
    with ScriptedServer(Answer(status=400)) as upstream, Served(tmp_path, upstream=upstream.url) as served:
        with pytest.raises(openai.BadRequestError, match="scripted failure"):
            _say(_client(served), PARK)
        with served.client() as http:
            assert http.get("/memories").json()["memories"] == []  # no reply, nothing learned
    with Served(tmp_path / "b", upstream="http://127.0.0.1:9/v1") as served:
        with pytest.raises(openai.APIStatusError, match="upstream") as caught:
            _say(_client(served), PARK)
        assert caught.value.status_code == 502
    with Served(tmp_path / "c") as served, pytest.raises(openai.APIStatusError, match="--upstream") as caught:
        _say(_client(served), PARK)
    assert caught.value.status_code == 503


def test_two_keys_never_share_a_memory_and_no_body_or_header_changes_the_user(tmp_path: Path) -> None:
    with (
        ScriptedServer("ok") as upstream,
        Served(tmp_path, users=("emily", "bob"), trusted="robot", upstream=upstream.url) as served,
    ):
        _say(_client(served, served.keys["emily"]), PARK)
        bob = _client(served, served.keys["bob"])
        _say(bob, WHICH, user="emily", metadata={"user": "emily"}, extra_body={"X-Memspan-User": "emily"})
        assert "Green Meadow" not in json.dumps(upstream.calls[-1].body)
        for name in ("emily", "bob", "", "x" * 300):
            with pytest.raises(openai.PermissionDeniedError, match="trusted key"):
                _say(_client(served, served.keys["bob"], **{"X-Memspan-User": name}), WHICH)
        _say(_client(served, served.keys["robot"], **{"X-Memspan-User": "emily"}), WHICH)
        assert "Green Meadow" in json.dumps(upstream.calls[-1].body)
        with pytest.raises(openai.AuthenticationError):
            _say(_client(served, "msk_guess"), WHICH)
        secrets = [str(call.headers) for call in upstream.calls]
        assert not any(key in told for key in served.keys.values() for told in secrets)
        assert not any("x-memspan-user" in call.headers for call in upstream.calls)


def test_the_upstreams_key_is_the_servers_or_the_clients_where_neither_has_keys(tmp_path: Path) -> None:
    with ScriptedServer("ok") as upstream:
        with Served(tmp_path / "a", upstream=upstream.url) as served:
            _say(_client(served, "sk-of-the-client"), PARK)
        assert upstream.calls[-1].headers["authorization"] == "Bearer sk-of-the-client"
        with Served(tmp_path / "b", upstream=upstream.url, upstream_key="sk-of-the-server") as served:
            _say(_client(served, "whatever"), PARK)
        assert upstream.calls[-1].headers["authorization"] == "Bearer sk-of-the-server"


def test_embeddings_and_models_come_from_the_upstream_or_the_store(tmp_path: Path) -> None:
    with ScriptedServer("ok") as upstream, Served(tmp_path / "a", upstream=upstream.url) as served:
        client = _client(served)
        assert [model.id for model in client.models.list()] == ["scripted"]
        assert (
            client.embeddings.create(model="scripted", input="abc", encoding_format="float").data[0].embedding
        )
    with Served(tmp_path / "b") as served:
        answer = _client(served).embeddings.create(model="own", input=["a", "b"], encoding_format="float")
        assert len(answer.data[1].embedding) == 64


@pytest.mark.parametrize("stream", [False, True])
def test_a_local_model_answers_in_the_form_of_the_api(tmp_path: Path, stream: bool) -> None:
    with ScriptedServer("from here") as model:
        local = ChatClient(model.url, "scripted")
        with Served(tmp_path, app={"local": local}) as served:
            client = _client(served)
            if stream:
                chunks = client.chat.completions.create(model="any", messages=[PARK], stream=True)
                assert "".join(c.choices[0].delta.content or "" for c in chunks) == "from here"
            else:
                assert _say(client, PARK) == "from here"
            _say(client, WHICH)
            assert "Green Meadow" in json.dumps(model.calls[-1].body)
            with pytest.raises(openai.BadRequestError):
                client.chat.completions.create(model="any", messages=[])


def test_requests_that_no_memory_can_read_go_through_as_they_are(tmp_path: Path) -> None:
    with (
        ScriptedServer("ok") as upstream,
        Served(tmp_path, upstream=upstream.url) as served,
        served.client() as http,
    ):
        image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
        for messages in (
            [],
            [{"role": "system", "content": "x"}],
            [{"role": "user", "content": [image]}],
        ):
            body = {"model": "m", "messages": messages}
            assert http.post("/v1/chat/completions", json=body).status_code == 200
            assert upstream.calls[-1].body == body
        mixed = [{"role": "user", "content": [{"type": "text", "text": PARK["content"]}, image]}]
        assert http.post("/v1/chat/completions", json={"model": "m", "messages": mixed}).status_code == 200
        assert upstream.calls[-1].body["messages"][-1] == mixed[0]
        assert len(http.get("/memories", params={"kind": "turn"}).json()["memories"]) == 1
