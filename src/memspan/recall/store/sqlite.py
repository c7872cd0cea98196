# ruff: noqa: S608 (only numbers and names made here are joined into statements, never a value)
"""The default store: one SQLite file, many processes, nothing else to install or run.

Rows, vectors (float16) and the word index (FTS5) change together in one transaction, written ahead
(WAL) and flushed to the disk before a write is acknowledged (``synchronous=FULL``). A search reads the
user's rows as arrays (:mod:`memspan.recall.store.cache`): exact matrix product for vectors, BM25 over FTS5's
own posting lists, counted over what this user can see and nothing else. For users with very many memories an
approximate index is kept beside the file.

Every term of the word index carries the number of the user it belongs to, every row its user. So no query of
one user reads another's postings: neither results nor scores nor speed depend on who else is there.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from memspan.base import refuse
from memspan.data.embed import Embedder
from memspan.recall.store.base import (
    TRACE,
    Database,
    Query,
    SQLStore,
    UserHandle,
    VectorRow,
    marks,
)
from memspan.recall.store.cache import Arrays
from memspan.recall.store.connections import Line, Pool
from memspan.recall.store.interface import StoreBusy, StoreFull, StoreGone
from memspan.recall.store.near import NearIndex, remove
from memspan.recall.store.terms import index_terms

__all__ = ["SQLiteStore"]

_CREATE = """
CREATE TABLE meta(key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE owners(
    owner INTEGER PRIMARY KEY AUTOINCREMENT, app TEXT NOT NULL, name TEXT NOT NULL,
    clock INTEGER NOT NULL DEFAULT 0, epoch INTEGER NOT NULL DEFAULT 0, last_id TEXT NOT NULL DEFAULT '',
    UNIQUE(app, name));
CREATE TABLE records(
    rid INTEGER PRIMARY KEY AUTOINCREMENT, owner INTEGER NOT NULL REFERENCES owners(owner),
    version INTEGER NOT NULL, length INTEGER NOT NULL,
    id TEXT NOT NULL, kind INTEGER NOT NULL, state INTEGER NOT NULL, text TEXT NOT NULL,
    created_at INTEGER NOT NULL, valid_from INTEGER NOT NULL, valid_to INTEGER,
    role TEXT, session TEXT, channel TEXT, trust TEXT, evidence TEXT,
    strength REAL NOT NULL, last_recalled INTEGER NOT NULL, expires_at INTEGER, metadata TEXT,
    removed_at INTEGER, removed_why TEXT, state_before INTEGER,
    UNIQUE(owner, id));
CREATE INDEX records_version ON records(owner, version);
CREATE INDEX records_derived ON records(owner) WHERE evidence IS NOT NULL;
CREATE INDEX records_expiry ON records(expires_at) WHERE expires_at IS NOT NULL;
CREATE INDEX records_removed ON records(removed_at) WHERE removed_at IS NOT NULL;
CREATE TABLE vectors(rid INTEGER PRIMARY KEY REFERENCES records(rid) ON DELETE CASCADE, vec BLOB NOT NULL);
CREATE TABLE settings(
    owner INTEGER NOT NULL REFERENCES owners(owner), key TEXT NOT NULL, value TEXT NOT NULL,
    PRIMARY KEY(owner, key)) WITHOUT ROWID;
CREATE VIRTUAL TABLE words USING fts5(terms, content='', columnsize=0, tokenize='ascii');
"""
_CONNECTIONS = 16  # of one process
_NEAR = 100  # rows that the approximate index is asked for
_TAIL = 2_000  # rows searched exactly beside it before they are added to it


class SQLiteStore(SQLStore):
    """Memories of many users in one SQLite file.

    Args:
        path: a file, or ``sqlite:///relative`` / ``sqlite:////absolute``. Missing folders are made.
        embedder: makes the vectors; a store that holds vectors of another one refuses to add and search
            until :meth:`reindex`.
        dtype: of stored vectors in a new store: ``"float16"`` (2 bytes a number) or ``"float32"``.
        exact_below: rows of a user up to which vectors are compared one by one; above, an approximate index
            is built in the background and used once it is there (needs ``memspan[recall]``).
        busy_seconds: how long a write waits for other writers.
        cache_bytes: memory for users' rows as arrays; the user least recently searched leaves first.

    Raises:
        BadInput: a path that is a folder, or a file of a later version of memspan.
        StoreBusy: other processes kept the file locked.
        StoreFull: the disk is full; reading goes on, and writing once there is room.
        StoreGone: the file was removed or replaced behind the store's back.

    Example:
        >>> import tempfile
        >>> from datetime import UTC, datetime
        >>> from memspan.data.embed import HashingEmbedder
        >>> from memspan.recall import Record
        >>> store = SQLiteStore(tempfile.mkdtemp() + "/me.db", HashingEmbedder())
        >>> emily = store.for_user("emily")
        >>> when = datetime(2023, 5, 2, tzinfo=UTC)
        >>> ids = emily.add([Record("I went to Green Meadow Park", when), Record("I like tea", when)])
        >>> [hit.record.text for hit in emily.search("Which park did I visit?", k=1)]
        ['I went to Green Meadow Park']
        >>> store.for_user("jason").search("park")
        []
    """

    dialect = "sqlite"
    text_bytes = "length(CAST(text AS BLOB))"
    vector_bytes = "length(vec)"
    begin_read = "BEGIN"
    begin_write = "BEGIN IMMEDIATE"

    def __init__(
        self,
        path: str | os.PathLike[str],
        embedder: Embedder,
        *,
        dtype: Literal["float16", "float32"] = "float16",
        exact_below: int = 100_000,
        busy_seconds: float = 30.0,
        cache_bytes: int = 2**30,
    ) -> None:
        if dtype not in ("float16", "float32"):
            refuse("dtype", dtype, 'use "float16" or "float32"')
        if exact_below < 0:
            refuse("exact_below", exact_below, "give 0 or more rows")
        if not busy_seconds > 0:
            refuse("busy_seconds", busy_seconds, "give more than 0 seconds; 30 is usual")
        super().__init__()
        self.path = _path(path)
        self.embedder = embedder
        self.exact_below, self.busy_seconds, self.cache_bytes = exact_below, busy_seconds, cache_bytes
        self._near: dict[int, NearIndex] = {}
        self._stop = threading.Event()
        self._pool, self._line = Pool(self._connect, _CONNECTIONS, busy_seconds), Line(busy_seconds)
        self._inode: int | None = None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._prepare(dtype)

    def check(self) -> list[str]:
        """What is inconsistent between rows, words and vectors, in words; empty when all is well."""
        with self.reading() as db:
            found = [f"file: {text}" for (text,) in db.execute("PRAGMA integrity_check") if text != "ok"]
            found += [f"foreign key of {row[0]}" for row in db.execute("PRAGMA foreign_key_check")]
            stored = self.meta(db, "embedder")
            size = np.dtype(self.vector_type).itemsize * (json.loads(stored)[1] if stored else 0)
            for sql, what in (
                (
                    "SELECT id FROM records LEFT JOIN vectors USING(rid)"
                    " WHERE vec IS NULL AND kind != :trace",
                    "no vector for record {}",
                ),
                (
                    "SELECT rid FROM vectors WHERE rid NOT IN (SELECT rid FROM records)",
                    "vector {} of no record",
                ),
                ("SELECT rid FROM vectors WHERE length(vec) != :size", "vector {} of a wrong size"),
            ):
                found += [what.format(row[0]) for row in db.execute(sql, {"trace": TRACE, "size": size})]
            return found + self._check_words(db)

    def build_index(self, user: UserHandle) -> int:
        """Build or extend one user's approximate index now, and keep it beside the file; rows in it."""
        with self.reading() as db:
            owner, epoch = user._owner(db)
        if owner < 0:
            return 0
        builder = self._builders.get(owner)
        if builder is not None:
            builder.join()
        self._build(owner, epoch)
        return len(self._near[owner])

    def memory_bytes(self) -> dict[str, int]:
        """Bytes in the file (``rows``, ``vectors``, ``words``), in its log, in index files, and in memory."""
        with self.reading() as db:
            vectors = db.execute("SELECT total(length(vec)) FROM vectors").fetchone()[0]
            words = self.words_bytes(db)
            (pages,), (size,) = (
                db.execute(f"PRAGMA {name}").fetchone() for name in ("page_count", "page_size")
            )
        log = self.path.with_name(self.path.name + "-wal")
        with self._lock:
            cache = sum(arrays.nbytes() for arrays in self._caches.values())
            cache += sum(near.nbytes() for near in self._near.values())
        return {
            "store.rows": int(pages * size - vectors - words),
            "store.vectors": int(vectors),
            "store.words": words,
            "store.log": log.stat().st_size if log.exists() else 0,
            "store.index": sum(path.stat().st_size for path in self._folder.glob("*.usearch")),
            "store.cache": cache,
        }

    def close(self) -> None:
        """Close the connections; every later call is refused."""
        self._stop.set()
        for builder in list(self._builders.values()):
            builder.join()
        self._closed = True
        self._pool.close()
        self.forget_caches(list(self._caches))
        self._near.clear()

    def __enter__(self) -> SQLiteStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Connections and transactions.

    @property
    def address(self) -> str:
        """The file."""
        return str(self.path)

    def in_line(self) -> contextlib.AbstractContextManager[None]:
        """SQLite's own waiting lets late writers pass early ones."""
        return self._line.turn()

    def check_place(self) -> None:
        """Refuse to write into a file that is no longer there: SQLite would write on, into nothing."""
        try:
            there = self.path.stat().st_ino
        except OSError:
            there = None
        if there != self._inode:
            raise StoreGone(f"{self.path} was removed or replaced while it was open: open the store again")

    def acting(self, db: Database, user: UserHandle | None) -> contextlib.AbstractContextManager[None]:
        """Nothing: every statement names the owner."""
        return contextlib.nullcontext()

    def translated(self, error: Exception) -> Exception | None:
        """Full disks, read-only files and long waits by their names."""
        if not isinstance(error, sqlite3.OperationalError):
            return None
        code = error.sqlite_errorcode
        if code & 0xFF == sqlite3.SQLITE_FULL or code == sqlite3.SQLITE_IOERR_WRITE:
            return StoreFull(
                f"{self.path}: the disk is full; nothing acknowledged is lost, and reading goes on"
            )
        if code & 0xFF in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN):
            return StoreFull(f"{self.path}: may not be written; reading goes on")
        if code & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return StoreBusy(f"{self.path}: others held it for {self.busy_seconds} s; try again")
        return None

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(
            self.path, timeout=self.busy_seconds, isolation_level=None, check_same_thread=False
        )
        for pragma in ("synchronous=FULL", "foreign_keys=ON", "secure_delete=ON", "cache_size=-4000"):
            db.execute(f"PRAGMA {pragma}")
        db.execute("CREATE VIRTUAL TABLE temp.vocabulary USING fts5vocab('main', 'words', 'instance')")
        return db

    def _prepare(self, dtype: str) -> None:
        if sqlite3.sqlite_version_info < (3, 35):
            refuse("sqlite3", sqlite3.sqlite_version, "a Python with SQLite 3.35 or later")
        with self._telling(), self._pool.lease() as db:
            version = self.schema(db)
            self.refuse_later_schema("path", str(self.path), version)
            if version == 0:
                db.execute("PRAGMA journal_mode=WAL")
        self._inode = self.path.stat().st_ino
        if version == 0:
            with self.writing() as db:
                if self.schema(db) == 0:
                    for statement in _CREATE.split(";\n"):
                        db.execute(statement)
                    self.set_meta(db, "dtype", dtype)
                    self.set_schema(db, 1)
        self.migrate()
        self._folder = self.path.with_name(self.path.name + "-near")
        with self.reading() as db:
            self.vector_type = self.meta(db, "dtype") or "float16"
            due = self.meta(db, "purge")
        if due:
            self.purge()

    def schema(self, db: Database) -> int:
        """Version of the tables; 0 for a new file."""
        return int(db.execute("PRAGMA user_version").fetchone()[0])

    def set_schema(self, db: Database, version: int) -> None:
        """Note the version of the tables."""
        db.execute(f"PRAGMA user_version = {int(version)}")

    def before_commit(self, db: Database) -> None:
        """FTS5 keeps what was deleted in old segments until they are joined; note that the log is to go."""
        db.execute("INSERT INTO words(words) VALUES ('optimize')")
        self.set_meta(db, "purge", "due")

    def purge(self, db: Any = None, owners: Iterable[int] = ()) -> None:
        """Empty the log and remove index files; the file itself was overwritten where it was deleted."""
        if db is None:
            with self._telling(), self._pool.lease() as own:
                return self.purge(own, owners)
        self.forget_caches(owners)
        for owner in owners:
            self._near.pop(owner, None)
            remove(self._folder, owner)
        give_up = time.monotonic() + self.busy_seconds
        db.execute("DELETE FROM meta WHERE key = 'purge'")
        while db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
            if time.monotonic() > give_up:
                self.set_meta(db, "purge", "due")
                raise StoreBusy(
                    f"{self.path}: deleted, but a reader keeps old pages; they go when it is next opened"
                )
            time.sleep(0.01)

    # Vectors and words.

    def next_rows(self, db: Database, count: int) -> range:
        """Numbers that no row ever had."""
        row = db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'records'").fetchone()
        first = 1 + (row[0] if row else 0)
        return range(first, first + count)

    def make_vectors_table(self, db: Database, name: str) -> None:
        """A table for vectors."""
        db.execute(
            f"CREATE TABLE {name}(rid INTEGER PRIMARY KEY REFERENCES records(rid) ON DELETE CASCADE,"
            " vec BLOB NOT NULL)"
        )

    def put_vectors(self, db: Database, rows: Iterable[VectorRow], table: str = "vectors") -> None:
        """Write vectors in the store's precision."""
        db.executemany(
            f"INSERT OR REPLACE INTO {table} VALUES (?, ?)",
            ((rid, row.astype(self.vector_type).tobytes()) for rid, _, row in rows),
        )

    def read_vectors(self, db: Database, rids: Sequence[int]) -> dict[int, NDArray[np.float32]]:
        """Vectors as stored, by row number."""
        rows: list[tuple[int, bytes]] = []
        for start in range(0, len(rids), 500):
            some = rids[start : start + 500]
            rows += db.execute(f"SELECT rid, vec FROM vectors WHERE rid IN ({marks(some)})", some).fetchall()
        if not rows:
            return {}
        vectors = np.frombuffer(b"".join(vec for _, vec in rows), self.vector_type).astype(np.float32)
        return dict(zip((rid for rid, _ in rows), vectors.reshape(len(rows), -1), strict=True))

    def put_words(self, db: Database, owner: int, rows: Iterable[tuple[int, Counter[str]]]) -> None:
        """Index terms, each tagged with its owner."""
        db.executemany(
            "INSERT INTO words(rowid, terms) VALUES (?, ?)",
            ((rid, _tagged(owner, terms)) for rid, terms in rows if terms),
        )

    def drop_words(self, db: Database, owner: int, rows: Sequence[tuple[int, str]]) -> None:
        """Take texts out of the word index; FTS5 wants the very terms that went in."""
        counts = index_terms([text for _, text in rows])
        db.executemany(
            "INSERT INTO words(words, rowid, terms) VALUES ('delete', ?, ?)",
            [(rid, _tagged(owner, terms)) for (rid, _), terms in zip(rows, counts, strict=True) if terms],
        )

    def clear_words(self, db: Database) -> None:
        """Empty the index of words."""
        db.execute("INSERT INTO words(words) VALUES ('delete-all')")

    def words_bytes(self, db: Database) -> int:
        """Bytes of the index of words."""
        return int(db.execute("SELECT total(length(block)) FROM words_data").fetchone()[0])

    def _check_words(self, db: sqlite3.Connection) -> list[str]:
        """Compare the word index with the texts, term by term."""
        held: dict[int, Counter[str]] = {}
        for doc, term in db.execute("SELECT doc, term FROM vocabulary"):
            held.setdefault(doc, Counter())[term] += 1
        found = []
        rows = db.execute("SELECT rid, owner, id, text, kind, length FROM records").fetchall()
        for (rid, owner, id, _, kind, length), counted in zip(
            rows, index_terms([r[3] for r in rows]), strict=True
        ):
            terms = Counter() if kind == TRACE else counted
            wanted = Counter({f"{owner}x{term}": times for term, times in terms.items()})
            if held.pop(rid, Counter()) != wanted or length != terms.total():
                found.append(f"words of record {id} differ from its text")
        return found + [f"words {rid} of no record" for rid in held]

    # Search.

    def posting(self, db: Database, owner: int, term: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Rows that hold a term, rising, and how often; FTS5 lists a row once for each time."""
        statement = "SELECT group_concat(doc) FROM vocabulary WHERE term = ?"
        listed = db.execute(statement, (f"{owner}x{term}",)).fetchone()[0]
        docs = np.fromstring(listed or "", np.int64, sep=",")
        starts = np.flatnonzero(np.diff(docs, prepend=-1))
        return docs[starts], np.diff(np.append(starts, len(docs))).astype(np.float64)

    def rows_with(self, db: Database, owner: int, term: str, limit: int) -> int:
        """How many rows hold a term, counted up to a limit."""
        count = "SELECT count(*) FROM (SELECT 1 FROM words WHERE words MATCH ? LIMIT ?)"
        return int(db.execute(count, (f'"{owner}x{term}"', limit)).fetchone()[0])

    def vector_rows(self, db: Database, owner: int, version: int) -> Iterable[tuple[int, bytes]]:
        """Vectors of rows that changed after a version."""
        statement = "SELECT rid, vec FROM records JOIN vectors USING(rid) WHERE owner = ? AND version > ?"
        rows: Iterable[tuple[int, bytes]] = db.execute(statement, (owner, version))
        return rows

    def near(self, db: Database, owner: int, epoch: int, arrays: Arrays, query: Query) -> list[int] | None:
        """About the nearest rows, and those that the index has not taken in yet."""
        assert query.vector is not None
        near = self._near.get(owner)
        if near is None or near.epoch != epoch or near.dim != self.embedder.dim:
            near = NearIndex.load(self._folder, owner, epoch, self.embedder.dim, arrays.version)
            if near is not None:
                self._near[owner] = near
        statement = "SELECT rid FROM records WHERE owner = ? AND version > ? LIMIT ?"
        tail = (
            [] if near is None else [r for (r,) in db.execute(statement, (owner, near.version, 10 * _TAIL))]
        )
        if near is None or len(tail) > _TAIL:
            self._build_behind(owner, epoch)
            if near is None or len(tail) >= 10 * _TAIL:
                return None
        return [*near.search(query.vector, max(_NEAR, 2 * query.k)), *tail]

    def _build_behind(self, owner: int, epoch: int) -> None:
        with self._lock:
            running = self._builders.get(owner)
            if (running is None or not running.is_alive()) and not self._stop.is_set():
                thread = threading.Thread(target=self._build, args=(owner, epoch), name="memspan-near")
                self._builders[owner] = thread
                thread.start()

    def _build(self, owner: int, epoch: int) -> None:
        """Read rows that the index has not, oldest change first, and save it."""
        near = self._near.get(owner)
        if near is None or near.epoch != epoch or near.dim != self.embedder.dim:
            near = NearIndex(self.embedder.dim, epoch)
        version, rid = near.version, -1
        page = (
            "SELECT version, rid, vec FROM records JOIN vectors USING(rid) WHERE owner = ?"
            " AND (version, rid) > (?, ?) ORDER BY version, rid LIMIT 4096"
        )
        while True:
            with self.reading() as db:
                rows = db.execute(page, (owner, version, rid if version > near.version else 2**62)).fetchall()
            if not rows:
                break
            vectors = np.frombuffer(b"".join(row[2] for row in rows), self.vector_type).astype(np.float32)
            rids = np.array([row[1] for row in rows], np.int64)
            if not near.put(rids, vectors.reshape(len(rows), -1), self._stop):
                return
            version, rid = rows[-1][0], rows[-1][1]
        near.version = version
        with self.reading() as db:  # nothing was removed for good meanwhile
            row = db.execute("SELECT epoch FROM owners WHERE owner = ?", (owner,)).fetchone()
            if row is None or row[0] != epoch:
                return
        near.save(self._folder, owner)
        self._near[owner] = near


def _path(path: str | os.PathLike[str]) -> Path:
    text = os.fspath(path)
    if text.startswith("sqlite:"):
        if not text.startswith("sqlite:///") or len(text) == len("sqlite:///"):
            refuse("path", text, "use sqlite:///relative/file.db or sqlite:////absolute/file.db")
        text = text.removeprefix("sqlite:///")
    if not text or text == ":memory:" or "\0" in text:
        refuse("path", text, "give a file; a temporary folder serves for a try")
    found = Path(text).expanduser()
    if found.is_dir():
        refuse("path", text, "is a folder; give a file")
    return found


def _tagged(owner: int, terms: Mapping[str, int]) -> str:
    return " ".join(f"{owner}x{term}" for term, times in terms.items() for _ in range(times))
