"""The pages: what is held of a user, why it was recalled, what is fading, and how to change or erase it.

Rendered on the server, everything escaped, no script inline, nothing from elsewhere. Lists are paged by key,
so that they open as fast at a hundred thousand memories as at ten.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import jinja2
from starlette.datastructures import FormData
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from memspan.base import BadInput
from memspan.recall.memory import Memory
from memspan.recall.records import KINDS, Record
from memspan.report.units import human_bytes
from memspan.server import rest
from memspan.server.gate import COOKIE, Sessions, session_of
from memspan.server.keys import KeyRing
from memspan.server.memories import Memories
from memspan.server.settings import Settings

__all__ = ["Pages"]

_PAGE = 40
_OLDEST = 2000  # records looked at for the page of what is fading
_GRAPH = 60  # thoughts drawn
_PLURAL = {kind: f"{kind}s" for kind in KINDS} | {"summary": "summaries"}


@dataclass(frozen=True)
class Row:
    """A record as a list shows it."""

    record: Record
    retention: float | None
    parts: dict[str, float]
    score: float | None = None

    @property
    def day(self) -> str:
        """The day it was said, UTC."""
        return self.record.created_at.astimezone(UTC).strftime("%A, %d %B %Y")

    @property
    def clock(self) -> str:
        """The time it was said, UTC."""
        return self.record.created_at.astimezone(UTC).strftime("%H:%M")

    @property
    def said(self) -> list[tuple[str, str]]:
        """Who said what, of a turn that keeps its words apart."""
        told = self.record.metadata
        pairs = [("you", told.get("query")), ("reply", told.get("response"))]
        return [(who, words) for who, words in pairs if isinstance(words, str) and words]

    @property
    def percent(self) -> int:
        """Retention in per cent."""
        return round(100 * (self.retention or 0.0))


class Pages:
    """The handlers of all pages.

    Args:
        settings: of the server.
        memories: of all users.
        sessions: of browsers.
        ring: keys to sign in with; None needs no sign-in.
    """

    def __init__(
        self, settings: Settings, memories: Memories, sessions: Sessions, ring: KeyRing | None
    ) -> None:
        self.settings, self.memories, self.sessions, self.ring = settings, memories, sessions, ring
        folder = Path(__file__).parent / "templates"
        self.templates = jinja2.Environment(
            loader=jinja2.FileSystemLoader(folder), autoescape=True, undefined=jinja2.StrictUndefined,
            trim_blocks=True, lstrip_blocks=True,
        )  # fmt: skip
        self.templates.filters["bytes"] = human_bytes
        self.templates.filters["when"] = _when

    def routes(self) -> list[Route]:
        """The paths of the pages."""
        return [
            Route("/", _home),
            Route("/ui", self.timeline),
            Route("/ui/search", self.search),
            Route("/ui/fading", self.fading),
            Route("/ui/thoughts", self.thoughts),
            Route("/ui/traces", self.traces),
            Route("/ui/held", self.held),
            Route("/ui/deleted", self.deleted),
            Route("/ui/export", self.export),
            Route("/ui/memory/{id}", self.memory),
            Route("/ui/memory/{id}/edit", self.edit, methods=["POST"]),
            Route("/ui/memory/{id}/forget", self.forget, methods=["POST"]),
            Route("/ui/memory/{id}/erase", self.erase, methods=["POST"]),
            Route("/ui/memory/{id}/restore", self.restore, methods=["POST"]),
            Route("/ui/remember", self.remember, methods=["POST"]),
            Route("/ui/forget-me", self.forget_me, methods=["POST"]),
            Route("/ui/login", self.login, methods=["GET", "POST"]),
            Route("/ui/logout", self.logout, methods=["POST"]),
        ]

    # ---- looking ---------------------------------------------------------------------------------------

    async def timeline(self, request: Request) -> Response:
        """All memories, newest first."""
        kind = request.query_params.get("kind", "")
        kinds = [kind] if kind in KINDS else [one for one in KINDS if one != "trace"]

        def work(memory: Memory) -> tuple[list[Row], str | None]:
            return _page(memory, request, kinds=kinds)

        rows, after = await self.memories.do(rest.user_of(request), work)
        more = f"?{urlencode({'kind': kind, 'after': after})}" if after else ""
        known = [one for one in KINDS if one != "trace"]
        return self._show(request, "timeline", rows=rows, more=more, kind=kind, kinds=known, plural=_PLURAL)

    async def deleted(self, request: Request) -> Response:
        """What was forgotten and can come back."""

        def work(memory: Memory) -> tuple[list[Row], str | None]:
            return _page(memory, request, states=["deleted"])

        rows, after = await self.memories.do(rest.user_of(request), work)
        return self._show(request, "deleted", rows=rows, more=f"?after={after}" if after else "")

    async def search(self, request: Request) -> Response:
        """What a question recalls, with the parts of each score; looking strengthens nothing."""
        query = request.query_params.get("q", "").strip()[:20_000]
        rows: list[Row] = []
        if query:

            def work(memory: Memory) -> list[Row]:
                hits = memory.recall(query, 20)
                return [
                    Row(hit.record, _retention(memory, hit.record), dict(hit.parts), hit.score)
                    for hit in hits
                ]

            rows = await self.memories.do(rest.user_of(request), work)
        return self._show(request, "search", rows=rows, query=query)

    async def fading(self, request: Request) -> Response:
        """The memories with the least retention among the oldest."""

        def work(memory: Memory) -> tuple[list[Row], int]:
            records = list(memory.store.iterate(kinds=["turn", "summary", "thought"], limit=_OLDEST))
            known = [(r, _retention(memory, r)) for r in records]
            rows = [Row(record, kept, {}) for record, kept in known if kept is not None]
            return sorted(rows, key=lambda row: row.retention or 0.0)[:50], len(records)

        rows, looked = await self.memories.do(rest.user_of(request), work)
        return self._show(request, "fading", rows=rows, looked=looked, most=_OLDEST)

    async def memory(self, request: Request) -> Response:
        """One memory: words, standing, forgetting curve, evidence."""
        id = request.path_params["id"]

        def work(memory: Memory) -> dict[str, Any] | None:
            found = memory.store.get([id])
            if not found:
                return None
            record = found[0]
            known = {one.id for one in memory.store.get(record.evidence)}
            return {
                "row": Row(record, _retention(memory, record), {}),
                "why": memory.why(id) if record.kind != "trace" else {},
                "curve": _curve(memory, record),
                "evidence": [(one, one in known) for one in record.evidence],
            }

        told = await self.memories.do(rest.user_of(request), work)
        if told is None:
            return self._show(request, "gone", 404, id=id)
        return self._show(request, "memory", **told)

    async def thoughts(self, request: Request) -> Response:
        """Facts as a graph: what is said of whom."""

        def work(memory: Memory) -> list[Record]:
            found = memory.store.iterate(kinds=["thought"], limit=_GRAPH, newest_first=True)
            return [record for record in found if record.metadata.get("head") and record.metadata.get("tail")]

        records = await self.memories.do(rest.user_of(request), work)
        return self._show(request, "thoughts", graph=_graph(records), records=records, most=_GRAPH)

    async def traces(self, request: Request) -> Response:
        """How replies came about."""

        def work(memory: Memory) -> tuple[list[Row], str | None]:
            return _page(memory, request, kinds=["trace"])

        rows, after = await self.memories.do(rest.user_of(request), work)
        more = f"?after={after}" if after else ""
        return self._show(request, "traces", rows=rows, more=more, on=self.settings.traces)

    async def held(self, request: Request) -> Response:
        """Bytes by kind, and the way out: export, erasure."""
        stats = await self.memories.do(rest.user_of(request), lambda memory: memory.store.stats())
        most = max([*stats["by_kind"].values(), 1])
        return self._show(
            request, "held", stats=stats, most=most, total=sum(stats["bytes"].values()), error=_error(request)
        )

    async def export(self, request: Request) -> Response:
        """All memories as a file."""
        text = await self.memories.do(rest.user_of(request), lambda memory: str(memory.export()))
        named = {"content-disposition": 'attachment; filename="memories.jsonl"'}
        return Response(text, media_type="application/x-ndjson", headers=named)

    # ---- changing --------------------------------------------------------------------------------------

    async def edit(self, request: Request) -> Response:
        """Change a memory's words."""
        text = await _field(request, "text")
        return await self._changed(request, lambda memory, id: rest.rewritten(memory, id, text), checked=text)

    async def forget(self, request: Request) -> Response:
        """Forget one memory; it can be undone for a while."""
        return await self._changed(request, lambda memory, id: memory.forget(id), to="/ui/deleted")

    async def erase(self, request: Request) -> Response:
        """Erase one memory without a trace."""
        return await self._changed(request, lambda memory, id: memory.forget(id, hard=True), to="/ui")

    async def restore(self, request: Request) -> Response:
        """Bring a forgotten memory back."""
        id = request.path_params["id"]
        await self.memories.write(rest.user_of(request), lambda memory: memory.undo(id))
        return RedirectResponse(f"/ui/memory/{id}", 303)

    async def remember(self, request: Request) -> Response:
        """Write a note."""
        text = await _field(request, "text")
        if text.strip():
            await self.memories.write(rest.user_of(request), lambda memory: memory.remember(text))
        return RedirectResponse("/ui", 303)

    async def forget_me(self, request: Request) -> Response:
        """Erase everything, once the user's name was typed."""
        if await _field(request, "name") != rest.user_of(request):
            return RedirectResponse("/ui/held?error=name", 303)
        await self.memories.write(rest.user_of(request), lambda memory: memory.forget_me())
        return RedirectResponse("/ui/held", 303)

    # ---- coming and going ------------------------------------------------------------------------------

    async def login(self, request: Request) -> Response:
        """Sign in with a key."""
        if self.ring is None:
            return RedirectResponse("/ui", 303)
        wrong = False
        if request.method == "POST":
            caller = self.ring.find((await _field(request, "key")).strip())
            if caller is not None:
                answer = RedirectResponse("/ui", 303)
                answer.set_cookie(
                    COOKIE, self.sessions.start(caller), max_age=int(self.sessions.seconds), httponly=True,
                    samesite="strict", secure=request.url.scheme == "https", path="/",
                )  # fmt: skip
                return answer
            wrong = True
        return self._show(request, "login", 401 if wrong else 200, wrong=wrong)

    async def logout(self, request: Request) -> Response:
        """Sign out."""
        self.sessions.end(session_of(request.headers))
        answer = RedirectResponse("/ui/login", 303)
        answer.delete_cookie(COOKIE, path="/")
        return answer

    async def _changed(
        self,
        request: Request,
        change: Callable[[Memory, str], object],
        to: str | None = None,
        checked: str | None = None,
    ) -> Response:
        id = request.path_params["id"]
        if checked is not None and not checked.strip():
            return self._show(request, "gone", 422, id=id)

        def work(memory: Memory) -> bool:
            if not memory.store.get([id]):
                return False
            change(memory, id)
            return True

        if not await self.memories.write(rest.user_of(request), work):
            return self._show(request, "gone", 404, id=id)
        return RedirectResponse(to or f"/ui/memory/{id}", 303)

    def _show(self, request: Request, page: str, status: int = 200, **values: Any) -> HTMLResponse:
        caller = getattr(request.state, "caller", None)
        html = self.templates.get_template(f"{page}.html.j2").render(
            here=request.url.path, user=caller.user if caller else "", signed=self.ring is not None, **values
        )
        return HTMLResponse(html, status)


async def _home(request: Request) -> Response:
    return RedirectResponse("/ui", 303)


def _page(
    memory: Memory,
    request: Request,
    kinds: Sequence[Any] | None = None,
    states: Sequence[Any] = ("active", "pending"),
) -> tuple[list[Row], str | None]:
    """One page of records, newest first, and the key of the next."""
    after = request.query_params.get("after") or None
    found = list(
        memory.store.iterate(kinds=kinds, states=states, after=after, limit=_PAGE + 1, newest_first=True)
    )
    rows = [Row(record, _retention(memory, record), {}) for record in found[:_PAGE]]
    return rows, found[_PAGE - 1].id if len(found) > _PAGE else None


def _retention(memory: Memory, record: Record) -> float | None:
    """What is left of a memory now, where the policy lets memories fade."""
    known = getattr(memory.policy, "retention_of", None)
    if known is None or record.kind in ("trace", "portrait"):
        return None
    return float(known(record, datetime.now(UTC)))


def _curve(memory: Memory, record: Record, width: int = 640, height: int = 180) -> dict[str, Any] | None:
    """The forgetting curve from the last recall on, as points of a picture; None where nothing fades."""
    known = getattr(memory.policy, "retention_of", None)
    if known is None or record.kind in ("trace", "portrait"):
        return None
    start, now = record.last_recalled or record.created_at, datetime.now(UTC)
    span = max((now - start) * 1.5, timedelta(days=30))
    places = [step / 80 for step in range(81)]
    points = [(width * x, height * (1 - float(known(record, start + x * span)))) for x in places]
    at = min(1.0, max(0.0, (now - start) / span))
    return {
        "points": " ".join(f"{x:.1f},{y:.1f}" for x, y in points),
        "width": width,
        "height": height,
        "now": round(width * at, 1),
        "level": round(height * (1 - float(known(record, now))), 1),
        "days": [
            (round(width * share), round(span.total_seconds() * share / 86400)) for share in (0, 0.5, 1)
        ],
    }


def _graph(records: Sequence[Record], width: int = 720, height: int = 560) -> dict[str, Any]:
    """Heads and tails on a circle, joined by their relations."""
    names = list(dict.fromkeys(str(r.metadata[end]) for r in records for end in ("head", "tail")))
    place = {
        name: (
            width / 2 + 0.36 * width * math.cos(2 * math.pi * i / len(names)),
            height / 2 + 0.40 * height * math.sin(2 * math.pi * i / len(names)),
        )
        for i, name in enumerate(names)
    }
    edges = [
        (
            *place[str(r.metadata["head"])],
            *place[str(r.metadata["tail"])],
            str(r.metadata.get("relation", "")),
            r.id,
        )
        for r in records
    ]
    nodes = [(name, x, y, "end" if x < width / 2 else "start") for name, (x, y) in place.items()]
    return {"width": width, "height": height, "edges": edges, "nodes": nodes}


def _when(at: datetime | None) -> str:
    return "" if at is None else at.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")


def _error(request: Request) -> str:
    return "name" if request.query_params.get("error") == "name" else ""


async def _field(request: Request, name: str) -> str:
    form: FormData = await request.form(max_files=0, max_fields=10)
    value = form.get(name, "")
    if not isinstance(value, str):
        raise BadInput(name, "a file", "give text")
    # Browsers send line breaks as CRLF.
    return value.replace("\r\n", "\n")
