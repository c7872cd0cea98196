"""The application: the store opened once, the doors over it, the gate in front."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from mcp.server.mcpserver import Context
from mcp.server.transport_security import TransportSecuritySettings
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from memspan import __version__
from memspan.base import BadInput
from memspan.data.embed import Embedder
from memspan.recall.chat import Chat
from memspan.recall.memory import default_embedder
from memspan.recall.store import Store, StoreBusy, StoreFull, StoreGone, open_store
from memspan.server import rest
from memspan.server.gate import Gate, Sessions, error_body
from memspan.server.keys import KeyRing
from memspan.server.memories import Memories
from memspan.server.metrics import Metrics
from memspan.server.pages import Pages
from memspan.server.proxy import Proxy
from memspan.server.settings import Settings
from memspan.server.tools import make_mcp

__all__ = ["create_app"]


def create_app(
    settings: Settings,
    *,
    store: Store | None = None,
    embedder: Embedder | None = None,
    llm: Chat | None = None,
    local: Chat | None = None,
) -> ASGIApp:
    """The server as an ASGI application.

    Args:
        settings: see :class:`~memspan.server.settings.Settings`.
        store: an open store to use, which the caller closes; None opens the settings' own and closes it.
        embedder: of the store that is opened; None takes the default.
        llm: writes the policy's summaries; None writes them without a model.
        local: answers chats where no upstream is set.

    Raises:
        BadInput: keys that are demanded and absent, or a store that does not fit.
    """
    ring = KeyRing(settings.keys) if settings.keys is not None else None
    own = store is None
    opened = store if store is not None else open_store(settings.store, embedder or default_embedder())
    memories = Memories(opened, settings.policy, llm)
    metrics, sessions = Metrics(), Sessions()
    proxy = Proxy(settings, memories, metrics, local, opened.embedder)
    mcp = make_mcp(memories, lambda ctx: _user_of(ctx))
    # The gate has checked host, origin and key already.
    unchecked = TransportSecuritySettings(enable_dns_rebinding_protection=False)
    mcp_app = mcp.streamable_http_app(stateless_http=True, json_response=True, transport_security=unchecked)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with mcp.session_manager.run():
            tidy = (
                asyncio.create_task(memories.maintain(settings.maintenance)) if settings.maintenance else None
            )
            thinking = asyncio.create_task(memories.think())
            try:
                yield
            finally:
                if tidy is not None:
                    tidy.cancel()
                await proxy.close()
                await memories.finish(settings.drain)
                thinking.cancel()
                if own:
                    opened.close()

    api = FastAPI(
        title="memspan",
        version=__version__,
        summary="One user's long-term memory",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        exception_handlers={
            RequestValidationError: _invalid,
            HTTPException: _http,
            BadInput: _bad_input,
            rest.Missing: _missing,
            PermissionError: _forbidden,
            StoreFull: _full,
            StoreGone: _gone,
            StoreBusy: _busy,
        },
    )
    api.state.store = opened
    api.include_router(rest.router(memories))

    @api.get("/healthz", tags=["operations"], summary="Whether the server and its store answer")
    async def healthz() -> dict[str, str]:
        await asyncio.to_thread(opened.ping)
        return {"status": "ok", "version": __version__}

    async def metrics_text(request: Request) -> Response:
        if ring is not None and not rest.caller_of(request).trusted:
            return JSONResponse(error_body("the metrics need a trusted key", "forbidden"), 403)
        held = await asyncio.to_thread(opened.memory_bytes)
        return Response(metrics.text(held), media_type="text/plain; version=0.0.4; charset=utf-8")

    pages = Pages(settings, memories, sessions, ring)
    api.router.routes.extend(
        [
            *proxy.routes(),
            Route("/metrics", metrics_text),
            *pages.routes(),
            Mount("/static", StaticFiles(directory=Path(__file__).parent / "static")),
            *mcp_app.routes,
        ]
    )
    return Gate(api, settings, ring, sessions, metrics)


def _user_of(ctx: Context[Any, Any]) -> str:
    request: Any = ctx.request_context.request
    return rest.user_of(request)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"][1:])
    return JSONResponse(error_body(f"{place or 'request'}: {first['msg']}", "bad_input", place or None), 422)


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    if error.status_code == 405:  # routes of one path stand apart, one for each method
        headers["allow"] = ", ".join(sorted(_methods(request)))
    return JSONResponse(error_body(str(error.detail), "http"), error.status_code, headers or None)


def _methods(request: Request) -> set[str]:
    """What the document allows on the request's path."""
    for template, operations in request.app.openapi()["paths"].items():
        pattern = "[^/]+".join(re.escape(part) for part in re.split(r"\{\w+\}", template))
        if re.fullmatch(pattern, request.url.path):
            return {method.upper() for method in operations}
    return set()


async def _bad_input(request: Request, error: Exception) -> Response:
    assert isinstance(error, BadInput)
    return JSONResponse(error_body(str(error), "bad_input", error.argument), 422)


async def _missing(request: Request, error: Exception) -> Response:
    return JSONResponse(error_body(f"no memory {error}", "not_found"), 404)


async def _forbidden(request: Request, error: Exception) -> Response:
    return JSONResponse(error_body(str(error), "forbidden"), 403)


async def _full(request: Request, error: Exception) -> Response:
    text = "the disk is full: nothing that was acknowledged is lost, and reading goes on"
    return JSONResponse(error_body(text, "storage"), 507)


async def _gone(request: Request, error: Exception) -> Response:
    text = (
        "the store's file was removed or replaced: nothing more is written until the server is started again"
    )
    return JSONResponse(error_body(text, "storage"), 503)


async def _busy(request: Request, error: Exception) -> Response:
    return JSONResponse(error_body("the store is busy; try again", "busy"), 503, {"retry-after": "5"})
