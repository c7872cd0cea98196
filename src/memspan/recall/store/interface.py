"""The store's one interface: a store holds many users, and every call goes through a handle bound to one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from typing import IO, Any, Protocol, TypedDict, runtime_checkable

from memspan.data.embed import Embedder
from memspan.recall.records import Forgotten, Hit, Kind, Record, State

__all__ = [
    "DEFAULT_WEIGHTS",
    "SEARCHED",
    "Stats",
    "Store",
    "StoreBusy",
    "StoreFull",
    "StoreGone",
    "UserStore",
]

#: Weights of the fields of a search (:func:`memspan.recall.store.cache.field_scores`), set by hand;
#: ``benchmarks/bench_recall_locomo.py`` shows how much they matter.
DEFAULT_WEIGHTS: Mapping[str, float] = {
    "words": 1.0, "words_around": 0.5, "words_session": 0.3, "vector": 0.5, "vector_around": 0.4
}  # fmt: skip
#: Kinds that a search looks at when none are named.
SEARCHED: tuple[Kind, ...] = ("turn", "summary", "thought", "document")


class StoreBusy(TimeoutError):
    """Other processes kept the database locked for longer than the busy timeout; try again."""


class StoreFull(OSError):
    """The disk is full or may not be written: what was acknowledged is kept, and reading goes on."""


class StoreGone(OSError):
    """The file was removed or replaced while it was open: nothing more is written."""


class Stats(TypedDict):
    """Sizes of one user's memory."""

    records: int
    by_kind: dict[str, int]
    bytes: dict[str, int]  # by category: "store.text", "store.vectors", "store.words", "store.tombstones"


@runtime_checkable
class UserStore(Protocol):
    """One user's memories. It cannot address another user's: the user is bound below this interface.

    ``user`` is any Unicode string of at most 256 bytes after NFC; it is never part of a path or of SQL text.
    """

    app: str
    user: str

    @property
    def embedder(self) -> Embedder:
        """The store's."""
        ...

    def add(self, records: Sequence[Record], *, vectors: Any | None = None) -> list[str]:
        """Write records, embedded and indexed, in one transaction; their ids (made where empty).

        Args:
            records: a trace is neither embedded nor indexed.
            vectors: float32 ``(n, dim)`` of the store's embedder, where they are at hand already.
        """
        ...

    def get(self, ids: Sequence[str]) -> list[Record]:
        """Records by id in the order asked; unknown, deleted and other users' ids are left out."""
        ...

    def update(self, id: str, **changes: Any) -> Record:
        """Change fields of a record (text is embedded and indexed anew); the record as it is now."""
        ...

    def reinforce(self, ids: Sequence[str], at: datetime) -> None:
        """Strength + 1 and ``last_recalled`` = at, each id once."""
        ...

    def erase(
        self, ids: Sequence[str], *, hard: bool = False, reason: str = "", at: datetime | None = None
    ) -> list[Forgotten]:
        """Delete: a tombstone that :meth:`restore` can undo, or with ``hard`` leaving no trace anywhere.

        Hard deletion also removes records whose only evidence is deleted, summaries and traces of which any
        is, and the ids from others' evidence.

        Args:
            ids: unknown ones are passed over.
            hard: for good, and now.
            reason: kept with a tombstone.
            at: when (the undo window runs from here); None is now.
        """
        ...

    def restore(self, ids: Sequence[str]) -> list[str]:
        """Undo soft deletions; the ids that came back."""
        ...

    def erase_all(self) -> int:
        """Hard deletion of everything of this user; how many records there were."""
        ...

    def search(
        self,
        text: str | None = None,
        vector: Any | None = None,
        k: int = 10,
        *,
        kinds: Sequence[Kind] = SEARCHED,
        where: Mapping[str, Any] | None = None,
        as_of: datetime | None = None,
        weights: Mapping[str, float] | None = None,
        questions: int | None = None,
    ) -> list[Hit]:
        """Best ``k`` by words (stop words dropped) and vectors, of the turn and of what stands around it.

        Args:
            text: query; also embedded when ``vector`` is None and a vector field has weight.
            vector: float32 ``(dim,)``; None embeds ``text``.
            k: how many.
            kinds: which kinds are looked at.
            where: equality on ``session``, ``role``, ``trust``, ``state``, ``channel``, ``key``, or
                ``since`` /
                ``until`` (datetimes, on ``created_at``), or ``metadata.KEY``; a list means any of its values.
            as_of: only what was there and held at that instant; None: what is active and not expired now.
            weights: of the fields named in :data:`DEFAULT_WEIGHTS`; those left out count nothing.
            questions: turns that only ask (see :attr:`Record.key`) among the hits, at most.
        """
        ...

    def iterate(
        self,
        *,
        kinds: Sequence[Kind] | None = None,
        states: Sequence[State] = ("active",),
        after: str | None = None,
        limit: int | None = None,
        newest_first: bool = False,
        where: Mapping[str, Any] | None = None,
    ) -> Iterator[Record]:
        """Records in order of id; keyset paging by ``after``."""
        ...

    def vectors(self, ids: Sequence[str]) -> Any:
        """Stored vectors, float32 ``(n, dim)``, in the order asked."""
        ...

    def count(self, *, kinds: Sequence[Kind] | None = None) -> int:
        """Active records."""
        ...

    def stats(self) -> Stats:
        """Sizes by kind and category."""
        ...

    def export(self, to: IO[str]) -> int:
        """All records, one JSON document a line, vectors excluded; how many."""
        ...

    def import_(self, lines: Iterable[str]) -> int:
        """Read what :meth:`export` wrote; ids are kept, present ids are left alone; how many were new."""
        ...

    def transaction(self) -> AbstractContextManager[None]:
        """Everything inside is written together or not at all; re-entrant."""
        ...

    def get_setting(self, key: str) -> Any:
        """A JSON value that a policy keeps for this user, or None."""
        ...

    def set_setting(self, key: str, value: Any) -> None:
        """Keep a JSON value for this user (None removes it)."""
        ...


@runtime_checkable
class Store(Protocol):
    """A database of many users' memories; only handles from :meth:`for_user` address records."""

    embedder: Embedder

    def for_user(self, user: str, app: str = "default") -> UserStore:
        """The handle of one user; refused when empty or longer than 256 bytes."""
        ...

    def users(self, app: str = "default") -> list[str]:
        """Users that hold anything: for the operator, never for a user."""
        ...

    def ping(self) -> None:
        """Raise where the store cannot be read, or is no longer where it was opened."""
        ...

    def reindex(self, embedder: Embedder | None = None) -> int:
        """Embed and index all anew, with progress, resumable; how many records."""
        ...

    def check(self) -> list[str]:
        """What is inconsistent between rows, words and vectors, in words; empty when all is well."""
        ...

    def sweep_expired(self, at: datetime, undo_days: float = 30.0) -> int:
        """Remove for good what has expired and tombstones older than the undo window; how many."""
        ...

    def memory_bytes(self) -> dict[str, int]:
        """Bytes on disk and in caches by category (``store.rows``, ``store.vectors``, ``store.cache``)."""
        ...

    def close(self) -> None:
        """Close connections; a closed store refuses calls."""
        ...
