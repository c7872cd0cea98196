"""What every request passes first: who is asking, how often, how much, and from which page.

One ASGI layer in front of all doors. It binds the caller to the request, so that nothing behind it reads a
user from a body, a query or a path; and it writes the headers that keep a page of memories from running or
leaking anything.
"""

from __future__ import annotations

import hmac
import json
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import urlsplit

from limits import parse
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from memspan.server.keys import Caller, KeyRing
from memspan.server.metrics import Metrics
from memspan.server.settings import Settings, is_loopback

__all__ = ["COOKIE", "Gate", "Sessions", "problem"]

COOKIE = "memspan_session"
_OPEN = ("/healthz", "/ui/login", "/static/")
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_SESSION_SECONDS = 12 * 3600.0
_HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'self'; img-src 'self'; script-src 'self'; "
    "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}

log = logging.getLogger("memspan.server")


class Sessions:
    """Browser sessions after a sign-in with a key: random, in memory, gone with the server."""

    def __init__(self, seconds: float = _SESSION_SECONDS, most: int = 10_000) -> None:
        self.seconds, self.most = seconds, most
        self._open: OrderedDict[str, tuple[Caller, float]] = OrderedDict()

    def start(self, caller: Caller) -> str:
        """A new session's cookie value."""
        token = secrets.token_urlsafe(32)
        self._open[token] = (caller, time.monotonic() + self.seconds)
        while len(self._open) > self.most:
            self._open.popitem(last=False)
        return token

    def find(self, token: str) -> Caller | None:
        """The caller of a session that is not over."""
        caller, until = self._open.get(token, (None, 0.0))
        return caller if time.monotonic() < until else None

    def end(self, token: str) -> None:
        """Sign out."""
        self._open.pop(token, None)


class Gate:
    """The ASGI layer.

    Args:
        app: what lies behind.
        settings: of the server.
        ring: its keys, or None.
        sessions: of browsers.
        metrics: counts what passes.
    """

    def __init__(
        self, app: ASGIApp, settings: Settings, ring: KeyRing | None, sessions: Sessions, metrics: Metrics
    ) -> None:
        self.app, self.settings, self.ring, self.sessions, self.metrics = (
            app,
            settings,
            ring,
            sessions,
            metrics,
        )
        self.limit = parse(settings.rate) if settings.rate else None
        self.limiter = MovingWindowRateLimiter(MemoryStorage())
        self.guesses = parse("30/minute")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it here."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        start, status = time.perf_counter(), [500]

        over, started = [False], [False]

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                started[0] = True
                status[0] = message["status"]
                answer = MutableHeaders(raw=message.setdefault("headers", []))
                for name, value in _HEADERS.items():
                    answer.setdefault(name, value)
                if not scope["path"].startswith("/static/"):
                    answer.setdefault("cache-control", "no-store")
            await send(message)

        async def unless_over(message: Message) -> None:
            if not over[0]:
                await sent(message)

        refused = self._refused(scope, headers)
        try:
            if refused is not None:
                code, text, kind, more = refused
                await problem(sent, code, text, kind, more)
            else:
                await self.app(scope, self._measured(receive, over), unless_over)
        except Exception:
            if not over[0]:
                raise
        finally:
            if over[0] and not started[0]:
                await problem(sent, 413, f"the body exceeds {self.settings.max_body} bytes", "too_large")
            door = scope["path"].strip("/").split("/")[0]
            self.metrics.request(door, scope["method"], status[0], time.perf_counter() - start)

    def _refused(self, scope: Scope, headers: Headers) -> tuple[int, str, str, dict[str, str]] | None:
        host = _hostname(headers.get("host", ""))
        known = {self.settings.host.strip("[]").lower(), *(name.lower() for name in self.settings.hostnames)}
        wide = self.settings.host in ("0.0.0.0", "::")  # noqa: S104 - such a server has keys; see Settings
        if host not in known and not is_loopback(host) and not (wide and self.ring is not None):
            return 421, "this server is not known by that name; start it with --hostname", "misdirected", {}
        if scope["method"] not in _SAFE and not _same_origin(headers):
            return 403, "a page of another origin may not write here", "forbidden", {}
        if int(headers.get("content-length") or 0) > self.settings.max_body:
            return 413, f"the body exceeds {self.settings.max_body} bytes", "too_large", {}
        caller, shown = self._caller(headers)
        state = scope.setdefault("state", {})
        path = scope["path"]
        if caller is None and not any(path.startswith(one) for one in _OPEN):
            if path == "/" or path.startswith("/ui"):
                return 303, "sign in", "redirect", {"location": "/ui/login"}
            peer = str((scope.get("client") or ("unknown",))[0])
            if shown and not self.limiter.hit(self.guesses, "guess", peer):
                return 429, "too many unknown keys", "rate_limit", {"retry-after": "60"}
            told = "this key is not known" if shown else "send a key: Authorization: Bearer msk_..."
            return 401, told, "unauthorized", {"www-authenticate": "Bearer"}
        if caller is not None:
            for_user = headers.get("x-memspan-user")
            if for_user is not None:
                name = _decoded(for_user)
                if not caller.trusted:
                    return 403, "X-Memspan-User needs a trusted key", "forbidden", {}
                if not name or len(name.encode()) > 256:
                    return 400, "X-Memspan-User: give 1 to 256 bytes", "bad_input", {}
                caller = Caller(name, caller.trusted, caller.id)
            if self.limit is not None and not self.limiter.hit(self.limit, caller.id):
                reset = self.limiter.get_window_stats(self.limit, caller.id).reset_time
                wait = max(1, round(reset - time.time()))
                return 429, f"more than {self.settings.rate}", "rate_limit", {"retry-after": str(wait)}
            state["caller"] = caller
        return None

    def _caller(self, headers: Headers) -> tuple[Caller | None, bool]:
        """Who asks, and whether a key was shown at all."""
        if self.ring is None:
            return Caller(self.settings.user), False
        kind, _, token = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and token:
            return self.ring.find(token.strip()), True
        cookie = session_of(headers)
        caller = self.sessions.find(cookie) if cookie else None
        if caller is not None and not self.ring.holds(caller.id):
            caller = None  # its key was taken back
        return caller, False

    def _measured(self, receive: Receive, over: list[bool]) -> Receive:
        """The body as it comes; one without an honest length is broken off where it passes the limit."""
        got = 0

        async def measured() -> Message:
            nonlocal got
            message = await receive()
            got += len(message.get("body", b""))
            if got > self.settings.max_body:
                over[0] = True
                return {"type": "http.disconnect"}
            return message

        return measured


def session_of(headers: Headers) -> str:
    """The session's cookie value, or ""."""
    try:
        morsel = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return ""
    return morsel.value if morsel is not None else ""


async def problem(
    send: Callable[[Message], Awaitable[None]],
    status: int,
    text: str,
    kind: str,
    headers: dict[str, str] | None = None,
) -> None:
    """Answer with an error in the form of the OpenAI API, which all its clients show."""
    body = b"" if status == 303 else json.dumps(error_body(text, kind)).encode()
    raw: list[tuple[bytes, bytes]] = [(b"content-type", b"application/json")]
    raw += [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    raw.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def error_body(text: str, kind: str, argument: str | None = None) -> dict[str, Any]:
    """The error document."""
    return {"error": {"message": text, "type": kind, "param": argument, "code": None}}


def _hostname(host: str) -> str:
    """The name in a Host header, without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.rpartition(":")[0].lower() if ":" in host else host.lower()


def _same_origin(headers: Headers) -> bool:
    """Whether no browser says that another site sends this."""
    if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        return False
    origin = headers.get("origin")
    return origin is None or hmac.compare_digest(
        urlsplit(origin).netloc.lower().encode(), headers.get("host", "").lower().encode()
    )


def _decoded(value: str) -> str:
    """A header's text: UTF-8 where it is that, as starlette gives latin-1."""
    try:
        return value.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return ""
