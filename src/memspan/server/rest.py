"""The REST door: one user's memories as resources. The document at ``/openapi.json`` is made from this file.

Every path works on the caller's own memories; another user's id is as unknown as one that never was.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Annotated, Any, Literal

from anyio import to_thread
from fastapi import APIRouter, HTTPException, Path, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from memspan.base import BadInput
from memspan.recall.memory import Memory
from memspan.recall.records import Forgotten, Hit, Record
from memspan.server.gate import error_body
from memspan.server.keys import Caller
from memspan.server.memories import Memories

__all__ = ["Missing", "router"]

LONGEST, LONGEST_QUERY = 250_000, 20_000  # characters
Text = Annotated[str, StringConstraints(min_length=1, max_length=LONGEST, pattern=r"\S")]
Id = Annotated[
    str, Path(min_length=1, max_length=64, pattern=r"^[0-9A-Za-z_-]+$", description="A memory's id.")
]


def _written(value: object) -> object:
    """Refuse a number in a date's place, which pydantic would take for seconds."""
    if not isinstance(value, str) or "T" not in value.upper():
        raise ValueError("give a date and time with a zone, such as 2026-01-02T10:00:00Z")
    return value


When = Annotated[AwareDatetime, BeforeValidator(_written)]
Hard = Annotated[bool, Query(description="Leave no trace, with no undo.")]
DryRun = Annotated[bool, Query(description="Tell what would be forgotten; change nothing.")]
Kind = Literal["turn", "summary", "thought", "portrait", "document", "trace"]
State = Literal["pending", "active", "superseded", "merged", "deleted"]


class Missing(LookupError):
    """The id names no memory of this user."""


class Problem(BaseModel):
    """What went wrong, in the form of the OpenAI API."""

    class Told(BaseModel):
        message: str
        type: str
        param: str | None = None
        code: str | None = None

    error: Told


class MemoryOut(BaseModel):
    """One memory."""

    id: str
    text: str
    kind: Kind
    state: State
    created_at: datetime
    valid_from: datetime | None
    valid_to: datetime | None
    source: dict[str, Any]
    evidence: list[str]
    strength: float
    last_recalled: datetime | None
    expires_at: datetime | None
    metadata: dict[str, Any]


class HitOut(BaseModel):
    """A memory that was found, with every part of its score."""

    memory: MemoryOut
    score: float
    parts: dict[str, float]


class Page(BaseModel):
    """Memories in order, and where the next page begins."""

    memories: list[MemoryOut]
    next: str | None = Field(description="Give it as `after`; null on the last page.")


class Found(BaseModel):
    """What a search found, best first."""

    hits: list[HitOut]


class NewNote(BaseModel):
    """One note, as it is."""

    model_config = ConfigDict(extra="forbid")

    text: Text
    at: When | None = Field(None, description="When it was said, with a zone; default now.")


class NewExchange(BaseModel):
    """What the user said, and what was replied."""

    model_config = ConfigDict(extra="forbid")

    user: Text
    assistant: Annotated[str, StringConstraints(max_length=LONGEST)] = ""
    at: When | None = Field(None, description="When it was said, with a zone; default now.")
    session: str = Field("", max_length=256)


class Change(BaseModel):
    """New words for a memory."""

    text: Text


class Ids(BaseModel):
    """Ids of memories."""

    ids: list[str]


class ForgottenOut(BaseModel):
    """What was, or would be, forgotten, and why."""

    id: str
    reason: str
    retention: float | None
    nbytes: int


class Forgot(BaseModel):
    """What a deletion did."""

    forgotten: list[ForgottenOut]
    dry_run: bool


class Erased(BaseModel):
    """How many records a user had."""

    erased: int


_PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": text}
    for status, text in {
        400: "The request is malformed.",
        401: "No key, or an unknown one.",
        403: "Not with this key, or from this page.",
        404: "No such memory of this user.",
        409: "The words name no memory.",
        413: "The body is too large.",
        422: "A value cannot be used; the message names it.",
        429: "Too many requests; Retry-After tells the wait.",
        503: "The store is busy; Retry-After tells the wait.",
        507: "The disk is full; nothing was lost, and reading works.",
    }.items()
}


def router(memories: Memories) -> APIRouter:
    """The routes over all users' memories; each request reaches its caller's alone."""
    api = APIRouter(responses=_PROBLEMS, tags=["memories"])

    @api.get("/memories", response_model=Page | Found, summary="List, or search with `query`")
    async def list_memories(
        request: Request,
        query: Annotated[str | None, Query(min_length=1, max_length=LONGEST_QUERY, pattern=r"\S")] = None,
        k: Annotated[int, Query(ge=1, le=100, description="Hits of a search.")] = 10,
        kind: Kind | None = None,
        state: State = "active",
        after: Annotated[str | None, Query(max_length=64, pattern=r"^[0-9A-Za-z_-]+$")] = None,
        limit: Annotated[int, Query(ge=1, le=500, description="Memories a page.")] = 50,
        newest_first: bool = False,
    ) -> Page | Found:
        if query is not None:
            hits = await memories.do(user_of(request), lambda memory: _search(memory, query, k, kind))
            return Found(hits=[hit_out(hit) for hit in hits])

        def page(memory: Memory) -> list[Record]:
            kinds = None if kind is None else [kind]
            found = memory.store.iterate(
                kinds=kinds, states=[state], after=after, limit=limit + 1, newest_first=newest_first
            )
            return list(found)

        records = await memories.do(user_of(request), page)
        more = records[limit - 1].id if len(records) > limit else None
        return Page(memories=[memory_out(record) for record in records[:limit]], next=more)

    @api.post("/memories", response_model=Ids, status_code=201, summary="Remember a note or an exchange")
    async def add(request: Request, new: NewNote | NewExchange) -> Ids:
        def work(memory: Memory) -> list[str]:
            if isinstance(new, NewNote):
                return [memory.remember(new.text, new.at)]
            return memory.observe(new.user, new.assistant, new.at, new.session)

        return Ids(ids=await memories.write(user_of(request), work))

    @api.delete("/memories", response_model=Forgot, summary="Forget what holds all of a query's words")
    async def forget(
        request: Request,
        query: Annotated[str, Query(min_length=1, max_length=LONGEST_QUERY, pattern=r"\w")],
        hard: Hard = False,
        dry_run: DryRun = True,
    ) -> Forgot:
        try:
            gone = await memories.write(
                user_of(request), lambda memory: memory.forget(query=query, hard=hard, dry_run=dry_run)
            )
        except BadInput as error:  # stop words alone name nothing, and forgetting must not guess
            raise HTTPException(409, str(error)) from error
        return Forgot(forgotten=[forgotten_out(one) for one in gone], dry_run=dry_run)

    @api.delete("/memories/before/{when}", response_model=Forgot, summary="Forget what was said before")
    async def forget_before(
        request: Request, when: When, hard: Hard = False, dry_run: DryRun = True
    ) -> Forgot:
        gone = await memories.write(
            user_of(request), lambda memory: memory.forget(before=when, hard=hard, dry_run=dry_run)
        )
        return Forgot(forgotten=[forgotten_out(one) for one in gone], dry_run=dry_run)

    @api.get("/memories/{id}", response_model=MemoryOut, summary="One memory")
    async def get(request: Request, id: Id) -> MemoryOut:
        return memory_out(await memories.do(user_of(request), lambda memory: one(memory, id)))

    @api.patch("/memories/{id}", response_model=MemoryOut, summary="Change a memory's words")
    async def change(request: Request, id: Id, new: Change) -> MemoryOut:
        def work(memory: Memory) -> Record:
            one(memory, id)
            return rewritten(memory, id, new.text)

        return memory_out(await memories.write(user_of(request), work))

    @api.delete("/memories/{id}", response_model=Forgot, summary="Forget one memory")
    async def delete(request: Request, id: Id, hard: Hard = False) -> Forgot:
        def work(memory: Memory) -> list[Forgotten]:
            one(memory, id)
            return memory.forget(id, hard=hard)

        gone = await memories.write(user_of(request), work)
        return Forgot(forgotten=[forgotten_out(item) for item in gone], dry_run=False)

    @api.post("/memories/{id}/restore", response_model=Ids, summary="Undo a deletion that was not hard")
    async def restore(request: Request, id: Id) -> Ids:
        back = await memories.write(user_of(request), lambda memory: memory.undo(id))
        if not back:
            raise Missing(id)
        return Ids(ids=back)

    @api.get(
        "/memories/{id}/why", response_model=dict[str, float | str], summary="Why a memory stands where it is"
    )
    async def why(request: Request, id: Id) -> dict[str, float | str]:
        def work(memory: Memory) -> dict[str, float | str]:
            one(memory, id)
            return memory.why(id)

        return await memories.do(user_of(request), work)

    @api.get(
        "/users/{user}/export",
        summary="All of a user's memories as JSON lines",
        responses={200: {"content": {"application/x-ndjson": {}}}},
    )
    async def export(request: Request, user: Annotated[str, Path(min_length=1, max_length=256)]) -> Response:
        text = await memories.do(allowed(request, user), lambda memory: str(memory.export()))
        return StreamingResponse(
            _pieces(text),
            media_type="application/x-ndjson",
            headers={"content-disposition": 'attachment; filename="memories.jsonl"'},
        )

    @api.delete("/users/{user}", response_model=Erased, summary="Erase a user for good")
    async def erase(request: Request, user: Annotated[str, Path(min_length=1, max_length=256)]) -> Erased:
        return Erased(erased=await memories.write(allowed(request, user), lambda memory: memory.forget_me()))

    @api.get("/users", response_model=list[str], summary="Users that hold anything (trusted keys)")
    async def users(request: Request) -> list[str] | Response:
        if not caller_of(request).trusted:
            return JSONResponse(error_body("listing users needs a trusted key", "forbidden"), 403)
        return await to_thread.run_sync(memories.store.users)

    return api


def caller_of(request: Request) -> Caller:
    """Who asks; the gate has bound it."""
    caller: Caller = request.state.caller
    return caller


def user_of(request: Request) -> str:
    """Whose memories a request reaches."""
    return caller_of(request).user


def allowed(request: Request, user: str) -> str:
    """The user named in a path, where the caller may reach it.

    Raises:
        PermissionError: another user's, without a trusted key.
    """
    caller = caller_of(request)
    if user not in (caller.user, "me") and not caller.trusted:
        raise PermissionError("another user's memories need a trusted key")
    return caller.user if user == "me" and not caller.trusted else user


def one(memory: Memory, id: str) -> Record:
    """A user's memory by id.

    Raises:
        Missing: there is none.
    """
    found = memory.store.get([id])
    if not found:
        raise Missing(id)
    return found[0]


def rewritten(memory: Memory, id: str, text: str) -> Record:
    """A memory with new words; the old ones, which a turn keeps apart as well, go."""
    kept = {
        name: part for name, part in one(memory, id).metadata.items() if name not in ("query", "response")
    }
    return memory.store.update(id, text=text, metadata=kept)


def memory_out(record: Record) -> MemoryOut:
    """The record as the API tells it."""
    return MemoryOut(
        id=record.id, text=record.text, kind=record.kind, state=record.state, created_at=record.created_at,
        valid_from=record.valid_from, valid_to=record.valid_to, source=dict(record.source),
        evidence=list(record.evidence), strength=record.strength, last_recalled=record.last_recalled,
        expires_at=record.expires_at, metadata=dict(record.metadata),
    )  # fmt: skip


def hit_out(hit: Hit) -> HitOut:
    """The hit as the API tells it."""
    return HitOut(memory=memory_out(hit.record), score=hit.score, parts=dict(hit.parts))


def forgotten_out(gone: Forgotten) -> ForgottenOut:
    """The forgetting as the API tells it."""
    return ForgottenOut(id=gone.id, reason=gone.reason, retention=gone.retention, nbytes=gone.nbytes)


def _search(memory: Memory, query: str, k: int, kind: Kind | None) -> list[Hit]:
    if kind is None:
        return memory.recall(query, k)
    return memory.store.search(query, k=k, kinds=[kind])


def _pieces(text: str, size: int = 1 << 16) -> Iterator[str]:
    for start in range(0, len(text), size):
        yield text[start : start + size]
