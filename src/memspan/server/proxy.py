"""The OpenAI-compatible door: recall before the upstream answers, remember after, touch nothing else.

A request that the memory does not concern goes to the upstream byte for byte, and its answer comes back byte
for byte: unknown fields, tool calls, images, compression, errors. Where memories are recalled, one message is
put before the user's last, marked as data; every other field keeps its value. A memory that fails never stops
the chat: the reply says so in a header.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

import httpx
from anyio import from_thread, to_thread
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from memspan.data.embed import Embedder
from memspan.recall.chat import Chat, ChatFailed
from memspan.recall.memory import Memory
from memspan.recall.pack import Packed
from memspan.recall.records import Message, Record, Source
from memspan.server.gate import error_body
from memspan.server.keys import Caller
from memspan.server.memories import Memories
from memspan.server.metrics import Metrics
from memspan.server.settings import Settings

__all__ = ["Proxy"]

Mode = Literal["off", "read", "write", "on"]
MODES: tuple[Mode, ...] = ("off", "read", "write", "on")

# Of one hop, not of the message (RFC 9110, section 7.6.1), and what the next hop writes itself.
_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "te",
        "trailer",
        "upgrade",
        "host",
    }
    | {
        "transfer-encoding",
        "content-length",
        "cookie",
        "x-memspan-user",
        "x-memspan-memory",
        "x-memspan-session",
    }
)
_BACK = _HOP - {"host", "proxy-authorization", "content-length", "cookie"} | {"set-cookie"}
_POOLS = 16
_MOST_HELD = 4 << 20  # characters of a reply that are kept to be remembered

log = logging.getLogger("memspan.server")


@dataclass
class Exchange:
    """What the memory needs of one chat request."""

    caller: Caller
    mode: Mode
    query: str = ""
    session: str = ""
    model: str = ""
    used: list[str] = field(default_factory=list)
    packed: Packed = field(default_factory=Packed)
    trace: dict[str, Any] = field(default_factory=dict)
    failed: str = ""
    reads_failed: bool = False

    def headers(self) -> dict[str, str]:
        """What the reply tells of the memory."""
        out: dict[str, str] = {"x-memspan-memory": self.mode}
        if self.used:
            out["x-memspan-used"] = ",".join(self.used)
        if self.failed:
            out["x-memspan-error"] = self.failed
        return out


class Proxy:
    """The door's handlers.

    Args:
        settings: of the server.
        memories: of all users.
        metrics: counts recalls and writes.
        local: answers where no upstream is set; None answers 503.
        embedder: behind ``/v1/embeddings`` where no upstream is set.
    """

    def __init__(
        self,
        settings: Settings,
        memories: Memories,
        metrics: Metrics,
        local: Chat | None = None,
        embedder: Embedder | None = None,
    ) -> None:
        self.settings, self.memories, self.metrics = settings, memories, metrics
        self.local, self.embedder = local, embedder
        self._kept: set[asyncio.Future[None]] = set()  # asyncio itself holds tasks weakly
        patience = httpx.Timeout(settings.timeout, connect=10.0)
        # A pool looks through all its connections for each request: several in turn keep that short.
        limits = httpx.Limits(max_connections=1000 // _POOLS, max_keepalive_connections=8)
        self.pools = [
            httpx.AsyncClient(timeout=patience, limits=limits, follow_redirects=False, trust_env=False)
            for _ in range(_POOLS)
        ]
        self._turn = itertools.cycle(self.pools)

    def routes(self) -> list[Route]:
        """The paths of this door."""
        return [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/embeddings", self.embeddings, methods=["POST"]),
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/{path:path}", self.anything, methods=["GET", "POST", "DELETE"]),
        ]

    async def chat(self, request: Request) -> Response:
        """``POST /v1/chat/completions``."""
        asked = request.headers.get("x-memspan-memory", "on").lower()
        if asked not in MODES:
            return _error(400, f"X-Memspan-Memory={asked!r}: use off, read, write or on", "bad_input")
        body = await request.body()
        exchange = Exchange(request.state.caller, asked)  # type: ignore[arg-type]
        if exchange.mode != "off":
            body = await self._with_memory(exchange, body, request.headers)
        if not self.settings.upstream:
            return await self._answer_here(exchange, body)
        return await self._forward(request, "chat/completions", body, exchange)

    async def embeddings(self, request: Request) -> Response:
        """``POST /v1/embeddings``: the upstream's, or the store's own embedder."""
        if self.settings.upstream or self.embedder is None:
            return await self.anything(request)
        try:
            texts = json.loads(await request.body())["input"]
            texts = [texts] if isinstance(texts, str) else texts
            if not texts or not all(isinstance(text, str) for text in texts) or len(texts) > 2048:
                raise ValueError
        except (ValueError, KeyError, TypeError):
            return _error(400, "input: give a text or a list of 1 to 2048 texts", "bad_input")
        rows = await to_thread.run_sync(self.embedder, texts)
        data = [
            {"object": "embedding", "index": place, "embedding": row.tolist()}
            for place, row in enumerate(rows)
        ]
        tokens = sum(len(text) // 4 + 1 for text in texts)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return JSONResponse({"object": "list", "data": data, "model": self.embedder.id, "usage": usage})

    async def models(self, request: Request) -> Response:
        """``GET /v1/models``: the upstream's, or the local model."""
        if self.settings.upstream or self.local is None:
            return await self.anything(request)
        return JSONResponse(
            {"object": "list", "data": [{"id": self.local.model, "object": "model", "owned_by": "memspan"}]}
        )

    async def anything(self, request: Request) -> Response:
        """Any other path of the API, as it is."""
        if not self.settings.upstream:
            return _error(
                503, "no upstream is set: start the server with --upstream URL or --local", "no_upstream"
            )
        path = request.url.path.removeprefix("/v1/")
        if request.url.query:
            path += f"?{request.url.query}"
        return await self._forward(request, path, await request.body(), None)

    # ---- the memory ------------------------------------------------------------------------------------

    async def _with_memory(self, exchange: Exchange, body: bytes, headers: Mapping[str, str]) -> bytes:
        """The request's body with what was recalled, or as it was."""
        try:
            if headers.get("content-encoding"):
                raise ValueError
            document = json.loads(body)
            messages = document["messages"]
            last = max(place for place, message in enumerate(messages) if message["role"] == "user")
            exchange.query = _text_of(messages[last])
            exchange.model = str(document.get("model", ""))
            exchange.session = headers.get("x-memspan-session", "")[:256]
        except (ValueError, KeyError, TypeError, AttributeError):
            exchange.mode = "off"  # nothing here that a memory could read: the upstream judges it
            return body
        if not exchange.query.strip():
            exchange.mode = "off"
            return body
        if exchange.mode in ("read", "on"):
            start = time.perf_counter()
            try:
                # Not in the line of this user's writers: reading waits for nobody.
                packed, parts = await self.memories.do(
                    exchange.caller.user,
                    lambda memory: self._recalled(memory, exchange.query, messages[:last]),
                )
            except Exception as error:
                self._failed(exchange, "recall", error)
                return body
            self.metrics.memory("recall", "ok")
            exchange.packed, exchange.used = packed, list(packed.used)
            exchange.trace = {
                "query": exchange.query,
                "recalled": parts,
                "used": exchange.used,
                "tokens": packed.tokens,
                "milliseconds": round(1000 * (time.perf_counter() - start), 1),
                "model": exchange.model,
                "policy": self.settings.policy,
            }
            if packed:
                messages[last:last] = list(packed)
                return json.dumps(document, ensure_ascii=False).encode()
        return body

    def _recalled(
        self, memory: Memory, query: str, present: Sequence[Message]
    ) -> tuple[Packed, list[dict[str, Any]]]:
        packed = memory.prompt(
            query[:20_000], self.settings.recalled, self.settings.budget_tokens, present=present
        )
        placed = set(packed.used)
        told = [
            {
                "id": hit.record.id,
                "score": round(hit.score, 4),
                "parts": {name: round(float(part), 4) for name, part in hit.parts.items()},
                "placed": hit.record.id in placed,
            }
            for hit in packed.hits
        ]
        return packed, told

    async def _remember(self, exchange: Exchange, reply: str, partial: bool = False) -> None:
        """Write the exchange; a failure is told in the log and the metrics, and never to the chat."""
        if exchange.mode not in ("write", "on") or not (reply or partial):
            return
        said: list[Message] = [Message(role="user", content=exchange.query)]
        if reply:
            said.append(Message(role="assistant", content=reply))
        more: dict[str, Any] = {"partial": True} if partial else {}

        def work(memory: Memory) -> None:
            at = datetime.now(UTC)
            with memory.store.transaction():
                ids = memory.observe_messages(said, at, exchange.session, **more)
                if self.settings.traces and exchange.trace:
                    memory.store.add(
                        [
                            Record(
                                exchange.query[:500],
                                at,
                                kind="trace",
                                source=Source(role="tool", trust="tool", session=exchange.session),
                                evidence=(*exchange.used, *ids),
                                metadata=exchange.trace | {"wrote": ids},
                            )
                        ]
                    )

        def used(memory: Memory) -> None:
            memory.used(exchange.packed, reply)

        try:
            await self.memories.write(exchange.caller.user, work)
            if exchange.packed.used and reply:
                await self.memories.write(exchange.caller.user, used)
            if self.memories.thinks_later:
                self.memories.later(exchange.caller.user)
            self.metrics.memory("write", "ok")
        except Exception as error:
            self._failed(exchange, "write", error)

    def _failed(self, exchange: Exchange, work: str, error: Exception) -> None:
        self.metrics.memory(work, "failed")
        exchange.failed = f"{work} failed"
        log.warning("%s beside a chat failed: %s", work, type(error).__name__)

    # ---- the upstream ----------------------------------------------------------------------------------

    async def _forward(self, request: Request, path: str, body: bytes, exchange: Exchange | None) -> Response:
        """Send on, and give back what comes, while it comes."""
        reads = exchange is not None and exchange.mode in ("write", "on")
        sent = [(k, v) for k, v in request.headers.items() if k not in _HOP]
        keyed = self.settings.keys is not None or bool(self.settings.upstream_key)
        if keyed:  # the client's bearer token opens this server, and is not the upstream's to see
            sent = [(k, v) for k, v in sent if k != "authorization"]
        if self.settings.upstream_key:
            sent.append(("authorization", f"Bearer {self.settings.upstream_key}"))
        if reads:  # what is remembered must be readable on its way
            sent = [*((k, v) for k, v in sent if k != "accept-encoding"), ("accept-encoding", "identity")]
        url = f"{self.settings.upstream.rstrip('/')}/{path}"
        http = next(self._turn)
        try:
            answer = await http.send(
                http.build_request(request.method, url, headers=sent, content=body or None), stream=True
            )
        except httpx.HTTPError as error:
            return _error(
                504 if isinstance(error, httpx.TimeoutException) else 502,
                f"the upstream could not be asked ({type(error).__name__}); is it running?",
                "upstream",
                exchange,
            )
        headers = [(k, v) for k, v in answer.headers.raw if k.decode("latin-1").lower() not in _BACK]
        good = exchange if exchange is not None and answer.status_code < 400 and reads else None
        kind = answer.headers.get("content-type", "")
        if good is not None and "event-stream" not in kind and not answer.headers.get("content-encoding"):
            return await self._whole(answer, headers, good)
        streamed = _Raw(
            self._flow(answer, good if good and not answer.headers.get("content-encoding") else None),
            status_code=answer.status_code,
        )
        streamed.raw_headers = [*headers, *_raw(exchange)]
        return streamed

    async def _whole(
        self, answer: httpx.Response, headers: Sequence[tuple[bytes, bytes]], exchange: Exchange
    ) -> Response:
        """An answer in one piece: remembered before it is given, so that what is answered is kept."""
        try:
            content = b"".join([part async for part in answer.aiter_raw()])
        except httpx.HTTPError as error:
            return _error(502, f"the upstream broke off ({type(error).__name__})", "upstream", exchange)
        finally:
            await answer.aclose()
        await self._remember(exchange, _reply_of(content))
        whole = Response(content, answer.status_code)
        length = (b"content-length", str(len(content)).encode())
        whole.raw_headers = [
            *(one for one in headers if one[0].lower() != b"content-length"),
            length,
            *_raw(exchange),
        ]
        return whole

    async def _flow(self, answer: httpx.Response, exchange: Exchange | None) -> AsyncIterator[bytes]:
        """The answer's bytes as they come; remembered at their end, however they end."""
        heard = _Heard()
        complete = False
        try:
            async for part in answer.aiter_raw():
                if exchange is not None:
                    heard.take(part)
                    if heard.closed:  # remembered before its end is told
                        whole, exchange = exchange, None
                        await self._surely(self._remember(whole, heard.text))
                yield part
            complete = heard.done
        finally:
            # Cancellation comes here too, when the client has gone: the ending is a task of its own.
            await self._surely(self._ended(answer, exchange, heard.text, complete))

    async def _ended(
        self, answer: httpx.Response, exchange: Exchange | None, text: str, complete: bool
    ) -> None:
        await answer.aclose()
        if exchange is not None:
            await self._remember(exchange, text, partial=not complete)

    async def _surely(self, work: Coroutine[Any, Any, None]) -> None:
        """Finish a piece of work even if this task is being cancelled."""
        task = asyncio.ensure_future(work)
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            self._kept.add(task)
            task.add_done_callback(self._kept.discard)
            raise

    async def close(self) -> None:
        """Wait for what ends after its reader has gone, and close connections."""
        while self._kept:
            await asyncio.gather(*self._kept, return_exceptions=True)
        for http in self.pools:
            await http.aclose()

    # ---- a model of our own ----------------------------------------------------------------------------

    async def _answer_here(self, exchange: Exchange, body: bytes) -> Response:
        """Answer by the local model, in the API's form."""
        if self.local is None:
            return _error(
                503,
                "no upstream is set: start the server with --upstream URL or --local",
                "no_upstream",
                exchange,
            )
        try:
            document = json.loads(body)
            messages = document["messages"]
            if not messages or not all(isinstance(message["role"], str) for message in messages):
                raise ValueError
            most = document.get("max_completion_tokens") or document.get("max_tokens")
            limit = {} if most is None else {"max_tokens": max(1, int(most))}
        except (ValueError, KeyError, TypeError):
            return _error(400, "messages: give a list of messages with a role each", "bad_input", exchange)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.local.model}
        if document.get("stream"):
            events = self._events(exchange, messages, head, limit)
            return StreamingResponse(events, media_type="text/event-stream", headers=exchange.headers())
        local = self.local
        try:
            reply = await to_thread.run_sync(lambda: local.complete(messages, **limit))
        except ChatFailed as error:
            return _error(502, str(error), "upstream", exchange)
        await self._remember(exchange, reply.text)
        said = {"role": "assistant", "content": reply.text}
        choice = {"index": 0, "message": said, "finish_reason": reply.finish}
        whole = {**head, "object": "chat.completion", "choices": [choice], "usage": dict(reply.usage)}
        return JSONResponse(whole, headers=exchange.headers())

    async def _events(
        self,
        exchange: Exchange,
        messages: Sequence[Message],
        head: Mapping[str, Any],
        limit: Mapping[str, int],
    ) -> AsyncIterator[str]:
        """The local model's pieces as server-sent events."""
        assert self.local is not None
        pieces: asyncio.Queue[str | Exception | None] = asyncio.Queue()
        gone = asyncio.Event()
        local = self.local

        def run() -> None:
            try:
                for piece in local.stream(messages, **limit):
                    if gone.is_set():
                        break
                    from_thread.run_sync(pieces.put_nowait, piece)
                from_thread.run_sync(pieces.put_nowait, None)
            except Exception as error:
                from_thread.run_sync(pieces.put_nowait, error)

        def event(delta: Mapping[str, str], finish: str | None = None) -> str:
            choice = {"index": 0, "delta": delta, "finish_reason": finish}
            chunk = {**head, "object": "chat.completion.chunk", "choices": [choice]}
            return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"

        worker = asyncio.create_task(to_thread.run_sync(run))
        text, complete = "", False
        try:
            yield event({"role": "assistant", "content": ""})
            while (piece := await pieces.get()) is not None:
                if isinstance(piece, Exception):
                    yield f"data: {json.dumps(error_body('the local model failed', 'upstream'))}\n\n"
                    return
                text += piece
                yield event({"content": piece})
            complete = True
            await self._surely(self._remember(exchange, text))  # before its end is told
            yield event({}, "stop")
            yield "data: [DONE]\n\n"
        finally:
            gone.set()
            worker.add_done_callback(lambda task: task.cancelled() or task.exception())
            if not complete:
                await self._surely(self._remember(exchange, text, partial=True))


class _Raw(StreamingResponse):
    """A stream whose headers are the upstream's, without any of our own."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        except (httpx.HTTPError, ClientDisconnect):
            # The upstream broke off after its headers: end here, without a proper last chunk, so that the
            # client sees it.
            log.warning("an upstream broke off in the middle of an answer")
            raise ConnectionError("the upstream broke off") from None


class _Heard:
    """What a stream of server-sent events said: the text of its first choice."""

    def __init__(self) -> None:
        self.text, self.done, self.closed = "", False, False
        self._rest = b""

    def take(self, part: bytes) -> None:
        """More bytes, cut anywhere."""
        *lines, self._rest = (self._rest + part).split(b"\n")
        for line in lines:
            data = line.strip()
            if not data.startswith(b"data:"):
                continue
            data = data[5:].strip()
            if data == b"[DONE]":
                self.done = self.closed = True
                continue
            try:
                for choice in json.loads(data).get("choices", ()):
                    piece = (choice.get("delta") or {}).get("content")
                    if choice.get("index", 0) == 0 and isinstance(piece, str) and len(self.text) < _MOST_HELD:
                        self.text += piece
                    self.done = self.done or choice.get("finish_reason") is not None
            except (ValueError, AttributeError, TypeError):
                continue
        if len(self._rest) > _MOST_HELD:
            self._rest = b""


def _text_of(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "\n".join(str(part["text"]) for part in parts if isinstance(part, dict) and "text" in part)


def _reply_of(content: bytes) -> str:
    try:
        said = json.loads(content)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        return ""
    return said if isinstance(said, str) else ""


def _raw(exchange: Exchange | None) -> list[tuple[bytes, bytes]]:
    told = exchange.headers() if exchange is not None and exchange.mode != "off" else {}
    return [(name.encode(), value.encode()) for name, value in told.items()]


def _error(status: int, text: str, kind: str, exchange: Exchange | None = None) -> JSONResponse:
    return JSONResponse(error_body(text, kind), status, exchange.headers() if exchange else None)
