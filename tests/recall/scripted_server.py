"""A scripted OpenAI-compatible endpoint on a loopback port, for tests of clients, policies and the proxy.

It is a real HTTP server in a thread: routes answer by the prompt's hash or by a function, every call is
recorded, and an answer may be late, streamed in odd chunks, cut off, an error, broken JSON, a wrong tool
call, huge, or an injection. What a scripted model says is never a result.

Example::

    with ScriptedServer(lambda request: "A") as server:
        client = ChatClient(server.url, "scripted", sleep=lambda seconds: None)
        client.complete([{"role": "user", "content": "hello"}]).text  # "A"
        server.calls[0].body["messages"]
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

Body = Mapping[str, Any]


@dataclass(frozen=True)
class Answer:
    """What the server does with one call.

    Attributes:
        text: content of the message.
        status: other than 200: an error with this status.
        headers: of the response, such as ``Retry-After``.
        chunks: pieces of a streamed answer, as text; None streams the text by 3 letters.
        cut_after: close the connection after so many pieces (streamed) or in the middle of the body.
        wait: an event to wait for before answering (never a time).
        raw: a body sent as it is, whatever it is.
        tool_calls: of the message.
        top_logprobs: of the first token.
        extra: other fields of the completion.
        finish: the reason.
    """

    text: str = ""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    chunks: Sequence[str] | None = None
    cut_after: int | None = None
    wait: threading.Event | None = None
    raw: bytes | None = None
    tool_calls: Sequence[Mapping[str, Any]] = ()
    top_logprobs: Mapping[str, float] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    finish: str = "stop"


@dataclass(frozen=True)
class Call:
    """One request as it came."""

    path: str
    headers: Mapping[str, str]
    body: Any

    @property
    def prompt(self) -> str:
        """All messages' text."""
        return "\n".join(str(message.get("content")) for message in self.body.get("messages", ()))


Script = Callable[[Body], "Answer | str"]


def prompt_hash(messages: Sequence[Mapping[str, Any]]) -> str:
    """The key of a prompt for scripts that are dictionaries."""
    return hashlib.sha256(json.dumps(list(messages), sort_keys=True, ensure_ascii=False).encode()).hexdigest()


class ScriptedServer:
    """The server; a context manager.

    Args:
        script: one answer for all calls, answers in order (the last repeats), a dictionary from
            :func:`prompt_hash`, or a function from the request's body.
        embed: text -> vector of ``/embeddings``; None gives counts of letters.
    """

    def __init__(
        self,
        script: Script | Mapping[str, Answer | str] | Sequence[Answer | str] | Answer | str = "ok",
        embed: Callable[[str], Sequence[float]] | None = None,
    ) -> None:
        self.script, self.embed = script, embed or _letters
        self.calls: list[Call] = []
        self._lock = threading.Lock()
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        app = Starlette(
            routes=[
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/embeddings", self._embeddings, methods=["POST"]),
                Route("/v1/models", self._models, methods=["GET"]),
            ]
        )
        config = uvicorn.Config(app, log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)

    def __enter__(self) -> ScriptedServer:
        self._socket.listen()  # connections queue from here on: nothing has to wait for the thread
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.should_exit = True
        self._server.force_exit = True
        self._thread.join(timeout=10)
        self._socket.close()

    def __len__(self) -> int:
        return len(self.calls)

    def prompts(self) -> list[str]:
        """The text of every chat call."""
        return [call.prompt for call in self.calls if call.path.endswith("/chat/completions")]

    async def _chat(self, request: Request) -> Response:
        answer, body = await self._answer(request)
        if answer.wait is not None:
            await asyncio.to_thread(answer.wait.wait, 30)
        headers = dict(answer.headers)
        if answer.raw is not None:
            return Response(answer.raw, answer.status, headers, "application/json")
        if answer.status != 200:
            error = {"message": "scripted failure", "type": "scripted", "code": answer.status}
            return JSONResponse({"error": error}, answer.status, headers)
        if body.get("stream"):
            return StreamingResponse(_events(answer, body), 200, headers, "text/event-stream")
        if answer.cut_after is not None:
            whole = json.dumps(_completion(answer, body)).encode()
            headers["content-length"] = str(len(whole))
            return StreamingResponse(_cut(whole), 200, headers, "application/json")
        return JSONResponse(_completion(answer, body), 200, headers)

    async def _answer(self, request: Request) -> tuple[Answer, dict[str, Any]]:
        raw = await request.body()
        body = json.loads(raw)
        with self._lock:
            self.calls.append(Call(request.url.path, dict(request.headers), body))
            place = len(self.calls) - 1
        script = self.script
        found: Answer | str
        if callable(script):
            found = await asyncio.to_thread(script, body)
        elif isinstance(script, Mapping):
            found = script.get(prompt_hash(body["messages"]), Answer(status=404))
        elif isinstance(script, Answer | str):
            found = script
        else:
            found = script[min(place, len(script) - 1)]
        return (Answer(found) if isinstance(found, str) else found), body

    async def _embeddings(self, request: Request) -> Response:
        body = json.loads(await request.body())
        with self._lock:
            self.calls.append(Call(request.url.path, dict(request.headers), body))
        texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
        rows = [
            {"object": "embedding", "index": i, "embedding": list(self.embed(t))} for i, t in enumerate(texts)
        ]
        rows.reverse()  # the order of rows is not promised
        return JSONResponse(
            {"object": "list", "data": rows, "model": body["model"], "usage": {"prompt_tokens": 1}}
        )

    async def _models(self, request: Request) -> Response:
        return JSONResponse(
            {"object": "list", "data": [{"id": "scripted", "object": "model", "owned_by": "tests"}]}
        )


def _completion(answer: Answer, body: Body) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": answer.text}
    if answer.tool_calls:
        message["tool_calls"] = list(answer.tool_calls)
    choice: dict[str, Any] = {"index": 0, "message": message, "finish_reason": answer.finish}
    if answer.top_logprobs:
        top = [
            {"token": token, "logprob": value, "bytes": None} for token, value in answer.top_logprobs.items()
        ]
        first = {**top[0], "top_logprobs": top}
        choice["logprobs"] = {"content": [first], "refusal": None}
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    return {
        "id": "chatcmpl-scripted", "object": "chat.completion", "created": 0, "model": body.get("model", ""),
        "choices": [choice], "usage": usage, **answer.extra,
    }  # fmt: skip


async def _events(answer: Answer, body: Body) -> AsyncIterator[bytes]:
    pieces = answer.chunks
    if pieces is None:
        pieces = [answer.text[i : i + 3] for i in range(0, len(answer.text), 3)]
    head = {
        "id": "chatcmpl-scripted",
        "object": "chat.completion.chunk",
        "created": 0,
        "model": body.get("model", ""),
    }
    for place, piece in enumerate(pieces):
        if answer.cut_after is not None and place >= answer.cut_after:
            raise ConnectionResetError("scripted cut")
        delta = {"index": 0, "delta": {"content": piece}, "finish_reason": None}
        event = f"data: {json.dumps({**head, 'choices': [delta]}, ensure_ascii=False)}\n\n".encode()
        half = len(event) // 2  # an event, and a letter of several bytes, may come in two parts
        yield event[:half]
        await asyncio.sleep(0)
        yield event[half:]
    last = {"index": 0, "delta": {}, "finish_reason": answer.finish}
    yield f"data: {json.dumps({**head, 'choices': [last]})}\n\n".encode()
    yield b"data: [DONE]\n\n"


async def _cut(whole: bytes) -> AsyncIterator[bytes]:
    yield whole[: len(whole) // 2]
    raise ConnectionResetError("scripted cut")


def _letters(text: str) -> list[float]:
    counts = [0.1] * 26
    for letter in text.lower():
        if "a" <= letter <= "z":
            counts[ord(letter) - 97] += 1
    return counts
