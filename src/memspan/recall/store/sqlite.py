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
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from memspan.base import refuse
from memspan.data.embed import Embedder
from memspan.recall.store.base import (
    TRACE,
    Database,
    Found,
    Query,
    SQLStore,
    UserHandle,
    VectorRow,
    marks,
)
from memspan.recall.store.cache import FREQUENT, MANY, Arrays, Postings, bm25, ranked, rare_terms, visible
from memspan.recall.store.interface import StoreBusy, StoreFull
from memspan.recall.store.near import NearIndex, remove
from memspan.recall.store.terms import index_terms, query_terms

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
_ARRAYS = "rid, kind, state, length, created_at, valid_from, valid_to, expires_at"
_NEAR = 100  # rows that the approximate index is asked for
_USUAL = 1000  # rows a list holds at least, for ten hits as for a hundred
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
        StoreFull: the disk is full; from then on the store is read-only until :meth:`resume_writes`.

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
        self.path = _path(path)
        self.embedder = embedder
        self.exact_below, self.busy_seconds, self.cache_bytes = exact_below, busy_seconds, cache_bytes
        self._state = _ThreadState()
        self._lock = threading.RLock()
        self._connections: list[sqlite3.Connection] = []
        self._caches: OrderedDict[int, Arrays] = OrderedDict()
        self._near: dict[int, NearIndex] = {}
        self._builders: dict[int, threading.Thread] = {}
        self._stop = threading.Event()
        self._full = self._closed = False
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._translating() as db:
            self._prepare(db, dtype)

    def check(self) -> list[str]:
        """What is inconsistent between rows, words and vectors, in words; empty when all is well."""
        with self.reading() as db:
            found = [f"file: {text}" for (text,) in db.execute("PRAGMA integrity_check") if text != "ok"]
            found += [f"foreign key of {row[0]}" for row in db.execute("PRAGMA foreign_key_check")]
            stored = self.meta(db, "embedder")
            size = np.dtype(self._dtype).itemsize * (json.loads(stored)[1] if stored else 0)
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

    def resume_writes(self) -> None:
        """Write again after the disk was full."""
        self._full = False

    def close(self) -> None:
        """Close the connections of all threads; every later call is refused."""
        self._stop.set()
        for builder in list(self._builders.values()):
            builder.join()
        with self._lock:
            self._closed = True
            for connection in self._connections:
                connection.close()
            self._connections.clear()
            self._caches.clear()
            self._near.clear()

    def __enter__(self) -> SQLiteStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Connections and transactions.

    @contextlib.contextmanager
    def reading(self, user: UserHandle | None = None) -> Iterator[sqlite3.Connection]:
        """One snapshot for several statements."""
        with self._translating() as db:
            if db.in_transaction:
                yield db
                return
            db.execute("BEGIN")
            try:
                yield db
            finally:
                db.execute("COMMIT")

    @contextlib.contextmanager
    def writing(self, user: UserHandle | None = None) -> Iterator[sqlite3.Connection]:
        """A transaction that is committed at the end; inside another one it is part of that."""
        with self._translating() as db:
            state = self._state
            if state.depth:
                state.depth, state.dirty = state.depth + 1, True
                try:
                    yield db
                finally:
                    state.depth -= 1
                return
            if self._full:
                raise StoreFull(
                    f"{self.path} is read-only since its disk was full; free space, then resume_writes()"
                )
            db.execute("BEGIN IMMEDIATE")
            state.depth, state.dirty, state.removed = 1, True, set()
            try:
                yield db
                if state.removed:
                    db.execute("INSERT INTO words(words) VALUES ('optimize')")
                    self.set_meta(db, "purge", "due")
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:  # a full disk may have rolled back already
                    db.execute("ROLLBACK")
                raise
            finally:
                state.depth, state.dirty = 0, False
                state.private.clear()
            if state.removed:
                self._purge(db, state.removed)

    @contextlib.contextmanager
    def transaction(self, user: UserHandle) -> Iterator[None]:
        """As :meth:`writing`, before anything was written."""
        with self.writing(user):
            if self._state.depth == 1:
                self._state.dirty = False  # searches may use what is shared until something is written
            yield

    def _connection(self) -> sqlite3.Connection:
        if self._closed:
            refuse("store", str(self.path), "is closed; open it again")
        state = self._state
        if state.connection is None or state.pid != os.getpid():
            db = sqlite3.connect(
                self.path, timeout=self.busy_seconds, isolation_level=None, check_same_thread=False
            )
            for pragma in ("synchronous=FULL", "foreign_keys=ON", "secure_delete=ON", "cache_size=-16000"):
                db.execute(f"PRAGMA {pragma}")
            db.execute("CREATE VIRTUAL TABLE temp.vocabulary USING fts5vocab('main', 'words', 'instance')")
            state.connection, state.pid, state.depth = db, os.getpid(), 0
            state.dirty, state.private, state.removed = False, {}, set()
            with self._lock:
                self._connections.append(db)
        connection: sqlite3.Connection = state.connection
        return connection

    @contextlib.contextmanager
    def _translating(self) -> Iterator[sqlite3.Connection]:
        try:
            yield self._connection()
        except sqlite3.OperationalError as error:
            code = error.sqlite_errorcode
            if code & 0xFF == sqlite3.SQLITE_FULL or code == sqlite3.SQLITE_IOERR_WRITE:
                self._full = True
                raise StoreFull(
                    f"{self.path}: the disk is full; nothing acknowledged is lost, writes are refused now"
                ) from error
            if code & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise StoreBusy(
                    f"{self.path}: others held it for {self.busy_seconds} s; try again"
                ) from error
            raise

    def _prepare(self, db: sqlite3.Connection, dtype: str) -> None:
        if sqlite3.sqlite_version_info < (3, 35):
            refuse("sqlite3", sqlite3.sqlite_version, "a Python with SQLite 3.35 or later")
        version = self.schema(db)
        self.refuse_later_schema("path", str(self.path), version)
        if version == 0:
            db.execute("PRAGMA journal_mode=WAL")
            with self.writing():
                if self.schema(db) == 0:
                    for statement in _CREATE.split(";\n"):
                        db.execute(statement)
                    self.set_meta(db, "dtype", dtype)
                    self.set_schema(db, 1)
        self.migrate()
        self._dtype = self.meta(db, "dtype") or "float16"
        self._folder = self.path.with_name(self.path.name + "-near")
        if self.meta(db, "purge"):
            self._purge(db, set())

    def schema(self, db: Database) -> int:
        """Version of the tables; 0 for a new file."""
        return int(db.execute("PRAGMA user_version").fetchone()[0])

    def set_schema(self, db: Database, version: int) -> None:
        """Note the version of the tables."""
        db.execute(f"PRAGMA user_version = {int(version)}")

    def _purge(self, db: sqlite3.Connection, owners: set[int]) -> None:
        """Write the file anew without what was deleted, empty the log, remove index files."""
        for owner in owners:
            with self._lock:
                self._caches.pop(owner, None)
                self._near.pop(owner, None)
            remove(self._folder, owner)
        self._truncate_log(db)
        db.execute("VACUUM")
        self.set_meta(db, "purge", None)
        self._truncate_log(db)

    def _truncate_log(self, db: sqlite3.Connection) -> None:
        give_up = time.monotonic() + self.busy_seconds
        while db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
            if time.monotonic() > give_up:
                raise StoreBusy(
                    f"{self.path}: deleted, but a reader keeps old pages; they go when it is next opened"
                )
            time.sleep(0.01)

    def removed(self, owner: int) -> None:
        """Once this transaction is committed, nothing of what it removed may remain."""
        self._state.removed.add(owner)

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
            ((rid, row.astype(self._dtype).tobytes()) for rid, _, row in rows),
        )

    def read_vectors(self, db: Database, rids: Sequence[int]) -> dict[int, NDArray[np.float32]]:
        """Vectors as stored, by row number."""
        rows: list[tuple[int, bytes]] = []
        for start in range(0, len(rids), 500):
            some = rids[start : start + 500]
            rows += db.execute(f"SELECT rid, vec FROM vectors WHERE rid IN ({marks(some)})", some).fetchall()
        if not rows:
            return {}
        vectors = np.frombuffer(b"".join(vec for _, vec in rows), self._dtype).astype(np.float32)
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

    def find(self, db: Database, owner: int, epoch: int, query: Query) -> Found:
        """Candidates by words and by vectors among the rows that the query may see."""
        arrays = self._arrays(owner)
        with arrays.lock:
            self._refresh(db, owner, epoch, arrays)
            mask = visible(arrays, query.kinds, query.states, query.as_of, query.now)
            if query.conditions:
                mask &= self._matching(db, owner, arrays, query)
            found = Found()
            if query.text is not None:
                postings = self._postings(db, owner, arrays, mask, query.text)
                rows = int(mask.sum())
                mean = float(arrays["length"][mask].sum()) / max(rows, 1)
                scores = bm25(postings, arrays["length"], rows, mean)
                best = ranked(scores, np.flatnonzero(scores > 0), query.depth)
                found.lists["words"] = arrays["rid"][best].tolist()
                found.words.update(zip(found.lists["words"], scores[best].tolist(), strict=True))
            if query.vector is not None:
                mask &= arrays["kind"] != TRACE
                cosine = self._approximate(db, owner, epoch, arrays, mask, query)
                if cosine is None:
                    self._refresh_vectors(db, owner, arrays)
                    assert arrays.vectors is not None
                    near = arrays.vectors[: arrays.size] @ query.vector
                    best = ranked(near, np.flatnonzero(mask), query.depth)
                    listed = arrays.places(np.array(found.lists.get("words", []), np.int64))
                    places = np.concatenate([np.array(best, np.intp), listed])
                    cosine = dict(zip(arrays["rid"][places].tolist(), near[places].tolist(), strict=True))
                    found.lists["vector"] = arrays["rid"][best].tolist()
                else:
                    found.lists["vector"] = sorted(cosine, key=lambda rid: (-round(cosine[rid], 6), rid))
                found.cosine.update(cosine)
        return found

    def _arrays(self, owner: int) -> Arrays:
        """The user's arrays; a transaction that has written works on its own, which no one else sees."""
        if self._state.dirty:
            return self._state.private.setdefault(owner, Arrays())
        with self._lock:
            arrays = self._caches.setdefault(owner, Arrays())
            self._caches.move_to_end(owner)
            while len(self._caches) > 1 and sum(a.nbytes() for a in self._caches.values()) > self.cache_bytes:
                self._caches.popitem(last=False)
        return arrays

    def _refresh(self, db: Database, owner: int, epoch: int, arrays: Arrays) -> None:
        if arrays.epoch != epoch:
            arrays.reset(epoch)
        rows = db.execute(
            f"SELECT {_ARRAYS}, version FROM records WHERE owner = ? AND version > ? ORDER BY rid",
            (owner, arrays.version),
        ).fetchall()
        arrays.put([row[:-1] for row in rows])
        arrays.version = max((row[-1] for row in rows), default=arrays.version)

    def _refresh_vectors(self, db: Database, owner: int, arrays: Arrays) -> None:
        rows = db.execute(
            "SELECT rid, vec FROM records JOIN vectors USING(rid) WHERE owner = ? AND version > ?",
            (owner, 0 if arrays.vectors is None else arrays.vectors_version),
        )
        arrays.put_vectors(rows, self.embedder.dim, self._dtype)
        arrays.vectors_version = arrays.version

    def _matching(self, db: Database, owner: int, arrays: Arrays, query: Query) -> NDArray[np.bool_]:
        sql = " AND ".join(["owner = ?", *(sql for sql, _ in query.conditions)])
        values = [owner, *(value for _, values in query.conditions for value in values)]
        rows = db.execute(f"SELECT rid FROM records WHERE {sql}", values).fetchall()
        rids = np.array([rid for (rid,) in rows], np.int64)
        mask = np.zeros(arrays.size, bool)
        mask[arrays.places(rids[arrays.known(rids)])] = True
        return mask

    def _postings(
        self, db: Database, owner: int, arrays: Arrays, mask: NDArray[np.bool_], text: str
    ) -> list[Postings]:
        """Posting lists of the query's terms; at many rows, of the terms that are not everywhere."""
        terms = query_terms(text)
        if arrays.size > MANY:
            terms = self._rare(db, owner, terms, int(FREQUENT * arrays.size))
        found = []
        statement = "SELECT group_concat(doc) FROM vocabulary WHERE term = ?"
        for term, weight in terms.items():
            listed = db.execute(statement, (f"{owner}x{term}",)).fetchone()[0]
            if listed:
                rids, times = _counted(np.fromstring(listed, np.int64, sep=","))
                known = arrays.known(rids)
                places = arrays.places(rids[known])
                seen = mask[places]
                found.append(Postings(places[seen], times[known][seen].astype(np.float64), weight))
        return found

    def _rare(self, db: Database, owner: int, terms: Counter[str], most: int) -> Counter[str]:
        count = "SELECT count(*) FROM (SELECT 1 FROM words WHERE words MATCH ? LIMIT ?)"

        def rows(term: str, limit: int) -> int:
            return int(db.execute(count, (f'"{owner}x{term}"', limit)).fetchone()[0])

        return rare_terms(terms, most, rows)

    def _approximate(
        self, db: Database, owner: int, epoch: int, arrays: Arrays, mask: NDArray[np.bool_], query: Query
    ) -> dict[int, float] | None:
        """Cosines of about the nearest rows, or None where an exact search is right."""
        assert query.vector is not None
        if arrays.size <= self.exact_below or self._state.dirty:
            return None
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
        wanted = _NEAR if query.depth <= _USUAL else query.depth // 5  # twice the hits asked for
        rids = np.array(sorted({*near.search(query.vector, wanted), *tail}), np.int64)
        rids = rids[arrays.known(rids)]
        rids = rids[mask[arrays.places(rids)]]
        if len(rids) < min(wanted // 2, int(mask.sum())):  # a narrow filter: look at all that pass it
            return None
        rows = self.read_vectors(db, rids.tolist())
        return (
            dict(zip(rows, (np.stack(list(rows.values())) @ query.vector).tolist(), strict=True))
            if rows
            else {}
        )

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
            vectors = np.frombuffer(b"".join(row[2] for row in rows), self._dtype).astype(np.float32)
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


class _ThreadState(threading.local):
    """One thread's connection and its open transaction."""

    connection: Any = None
    pid: int = 0
    depth: int = 0
    dirty: bool = False  # something was written that others cannot see yet
    private: dict[int, Arrays]
    removed: set[int]  # owners whose rows were removed for good


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


def _counted(docs: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.intp]]:
    """Numbers in rising order and how often each occurs; FTS5 lists them so."""
    starts = np.flatnonzero(np.concatenate([[True], docs[1:] != docs[:-1]]))
    return docs[starts], np.diff(np.append(starts, len(docs)))


def _tagged(owner: int, terms: Mapping[str, int]) -> str:
    return " ".join(f"{owner}x{term}" for term, times in terms.items() for _ in range(times))
