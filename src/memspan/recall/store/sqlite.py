# ruff: noqa: E501, S608
"""The default store: one SQLite file, many processes, nothing else to install or run.

Rows, vectors (float16) and the word index (FTS5) change together in one transaction, written ahead
(WAL) and flushed to the disk before a write is acknowledged (``synchronous=FULL``). Search reads the
user's rows as arrays (:mod:`memspan.recall.store.cache`): exact matrix product for vectors, BM25 over FTS5's own
posting lists, counted over what this user can see and nothing else.

Every term of the word index carries the number of the user it belongs to, every row its user; the number is bound
in the handle, so that no query of one user reads another's postings: neither results nor scores nor speed depend
on who else is there.
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
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray

from memspan.base import refuse
from memspan.data.embed import Embedder
from memspan.recall.rank import fuse
from memspan.recall.records import KINDS, Forgotten, Hit, Kind, Record, State
from memspan.recall.store.cache import Arrays, Postings, bm25, ranked, visible
from memspan.recall.store.interface import DEFAULT_WEIGHTS, SEARCHED, Stats, StoreBusy, StoreFull
from memspan.recall.store.rows import (
    COLUMNS,
    STATES,
    as_vector,
    checked_name,
    checked_record,
    checked_vectors,
    filters,
    from_json,
    from_row,
    micros,
    to_json,
    to_row,
    ulids,
)
from memspan.recall.store.terms import index_terms, query_terms

__all__ = ["SQLiteStore", "SQLiteUserStore"]

SCHEMA = 1
_CREATE = """
CREATE TABLE meta(key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE owners(
    owner INTEGER PRIMARY KEY AUTOINCREMENT, app TEXT NOT NULL, user TEXT NOT NULL,
    clock INTEGER NOT NULL DEFAULT 0, epoch INTEGER NOT NULL DEFAULT 0, last_id TEXT NOT NULL DEFAULT '',
    UNIQUE(app, user));
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
_RECORD = ", ".join(COLUMNS)
_FREQUENT, _MANY = 0.05, 20_000  # at more rows than this, words in over that share are dropped
_CHANGEABLE = {f.name for f in fields(Record)} - {"id"}


class SQLiteStore:
    """Memories of many users in one SQLite file.

    Args:
        path: a file, or ``sqlite:///relative`` / ``sqlite:////absolute``. Missing folders are made.
        embedder: makes the vectors; a store that holds vectors of another one refuses to add and search
            until :meth:`reindex`.
        dtype: of stored vectors: ``"float16"`` (2 bytes a number) or ``"float32"``.
        busy_seconds: how long a write waits for other writers.
        cache_bytes: memory for users' rows as arrays; the user least recently searched leaves first.

    Raises:
        BadInput: a path that is a folder, or a file of a later version of memspan.
        StoreBusy: other processes kept the file locked.
        StoreFull: the disk is full; from then on the store is read-only until :meth:`resume_writes`.

    Example:
        >>> import tempfile
        >>> from memspan.data.embed import HashingEmbedder
        >>> store = SQLiteStore(tempfile.mkdtemp() + "/me.db", HashingEmbedder())
        >>> emily = store.for_user("emily")
        >>> when = datetime(2023, 5, 2, tzinfo=UTC)
        >>> ids = emily.add([Record("I went to Green Meadow Park", when), Record("I like tea", when)])
        >>> [hit.record.text for hit in emily.search("Which park did I visit?", k=1)]
        ['I went to Green Meadow Park']
        >>> store.for_user("jason").search("park")
        []
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        embedder: Embedder,
        *,
        dtype: Literal["float16", "float32"] = "float16",
        busy_seconds: float = 30.0,
        cache_bytes: int = 2**30,
    ) -> None:
        if dtype not in ("float16", "float32"):
            refuse("dtype", dtype, 'use "float16" or "float32"')
        if not busy_seconds > 0:
            refuse("busy_seconds", busy_seconds, "give more than 0 seconds; 30 is usual")
        self.path = _path(path)
        self.embedder = embedder
        self.busy_seconds = busy_seconds
        self.cache_bytes = cache_bytes
        self._local = threading.local()
        self._connections: list[sqlite3.Connection] = []
        self._lock = threading.RLock()
        self._caches: OrderedDict[int, Arrays] = OrderedDict()
        self._full = False
        self._closed = False
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._prepare(dtype)

    # What a user of the store calls.

    def for_user(self, user: str, app: str = "default") -> SQLiteUserStore:
        """The handle of one user (see :class:`memspan.recall.UserStore`)."""
        return SQLiteUserStore(self, checked_name("user", user), checked_name("app", app))

    def users(self, app: str = "default") -> list[str]:
        """Users that hold anything, in order of code points: for the operator, never for a user."""
        with self._reading() as db:
            found = db.execute(
                "SELECT user FROM owners WHERE app = ?", (checked_name("app", app),)
            ).fetchall()
        return sorted(user for (user,) in found)

    def reindex(self, embedder: Embedder | None = None) -> int:
        """Embed and index all anew; a run that was stopped goes on where it was.

        Args:
            embedder: the new one; None for the present one.

        Returns:
            How many records were embedded now.
        """
        embedder = embedder or self.embedder
        target = json.dumps([embedder.id, embedder.dim])
        with self._writing() as db:
            if self._meta(db, "reindex") != target:
                db.execute("DROP TABLE IF EXISTS vectors_next")
                db.execute(
                    "CREATE TABLE vectors_next(rid INTEGER PRIMARY KEY REFERENCES records(rid)"
                    " ON DELETE CASCADE, vec BLOB NOT NULL)"
                )
                self._set_meta(db, "reindex", target)
        done = 0
        while True:
            with self._reading() as db:
                rows = db.execute(
                    "SELECT r.rid, r.text FROM records r LEFT JOIN vectors_next v ON v.rid = r.rid"
                    " WHERE v.rid IS NULL AND r.kind != ? ORDER BY r.rid LIMIT 256",
                    (_TRACE,),
                ).fetchall()
            vectors = self._embedded([text for _, text in rows], embedder) if rows else None
            with self._writing() as db:
                if vectors is not None:
                    db.executemany(  # a record that was erased meanwhile is left out
                        "INSERT OR REPLACE INTO vectors_next SELECT rid, ? FROM records WHERE rid = ? AND text = ?",
                        [
                            (vector.tobytes(), rid, text)
                            for vector, (rid, text) in zip(vectors.astype(self._dtype), rows, strict=True)
                        ],
                    )
                    done += len(rows)
                    continue
                missing = db.execute(
                    "SELECT 1 FROM records r LEFT JOIN vectors_next v ON v.rid = r.rid"
                    " WHERE v.rid IS NULL AND r.kind != ? LIMIT 1",
                    (_TRACE,),
                ).fetchone()
                if missing:
                    continue
                db.execute("DROP TABLE vectors")
                db.execute("ALTER TABLE vectors_next RENAME TO vectors")
                self._set_meta(db, "embedder", target)
                self._set_meta(db, "reindex", None)
                self._index_words_anew(db)
                db.execute("UPDATE owners SET epoch = epoch + 1")
                break
        self.embedder = embedder
        return done

    def check(self) -> list[str]:
        """What is inconsistent between rows, words and vectors, in words; empty when all is well."""
        found: list[str] = []
        with self._reading() as db:
            found += [f"file: {text}" for (text,) in db.execute("PRAGMA integrity_check") if text != "ok"]
            found += [f"foreign key of {row[0]}" for row in db.execute("PRAGMA foreign_key_check")]
            embedder = self._meta(db, "embedder")
            size = self._itemsize * (json.loads(embedder)[1] if embedder else 0)
            for sql, what in (
                (
                    "SELECT id FROM records LEFT JOIN vectors USING(rid) WHERE vec IS NULL AND kind != :trace",
                    "no vector for record {}",
                ),
                (
                    "SELECT rid FROM vectors LEFT JOIN records USING(rid) WHERE id IS NULL",
                    "vector {} of no record",
                ),
                ("SELECT rid FROM vectors WHERE length(vec) != :size", "vector {} of a wrong size"),
            ):
                found += [what.format(row[0]) for row in db.execute(sql, {"trace": _TRACE, "size": size})]
            found += self._check_words(db)
        return found

    def sweep_expired(self, at: datetime, undo_days: float = 30.0) -> int:
        """Remove for good what has expired and tombstones older than the undo window; how many."""
        if not undo_days >= 0:
            refuse("undo_days", undo_days, "give 0 or more days")
        now, before = micros("at", at), micros("at", at - timedelta(days=undo_days))
        with self._writing() as db:
            rows = db.execute(
                "SELECT owner, rid FROM records WHERE expires_at <= ? UNION"
                " SELECT owner, rid FROM records WHERE removed_at < ?",
                (now, before),
            ).fetchall()
            by_owner: dict[int, set[int]] = {}
            for owner, rid in rows:
                by_owner.setdefault(owner, set()).add(rid)
            return sum(len(self._remove(db, owner, rids)) for owner, rids in by_owner.items())

    def memory_bytes(self) -> dict[str, int]:
        """Bytes in the file (``store.rows``, ``store.vectors``, ``store.words``), its log, and the cache."""
        with self._reading() as db:
            vectors = db.execute("SELECT total(length(vec)) FROM vectors").fetchone()[0]
            words = db.execute("SELECT total(length(block)) FROM words_data").fetchone()[0]
            (pages,), (size,) = (
                db.execute(f"PRAGMA {name}").fetchone() for name in ("page_count", "page_size")
            )
        log = self.path.with_name(self.path.name + "-wal")
        with self._lock:
            cache = sum(arrays.nbytes() for arrays in self._caches.values())
        return {
            "store.rows": int(pages * size - vectors - words),
            "store.vectors": int(vectors),
            "store.words": int(words),
            "store.log": log.stat().st_size if log.exists() else 0,
            "store.cache": cache,
        }

    def resume_writes(self) -> None:
        """Write again after the disk was full."""
        self._full = False

    def close(self) -> None:
        """Close the connections of all threads; every later call is refused."""
        with self._lock:
            self._closed = True
            for connection in self._connections:
                connection.close()
            self._connections.clear()
            self._caches.clear()

    def __enter__(self) -> SQLiteStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # What the handles stand on.

    def _prepare(self, dtype: str) -> None:
        with self._raw() as db:
            if sqlite3.sqlite_version_info < (3, 35):
                refuse("sqlite3", sqlite3.sqlite_version, "a Python with SQLite 3.35 or later")
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version > SCHEMA:
                refuse(
                    "path",
                    str(self.path),
                    f"written by a later memspan (schema {version} > {SCHEMA}); upgrade",
                )
            if version == 0:
                db.execute("PRAGMA journal_mode=WAL")
                db.execute("BEGIN IMMEDIATE")
                try:
                    if db.execute("PRAGMA user_version").fetchone()[0] == 0:
                        for statement in _CREATE.split(";\n"):
                            db.execute(statement)
                        self._set_meta(db, "dtype", dtype)
                        db.execute(f"PRAGMA user_version = {SCHEMA}")
                    db.execute("COMMIT")
                except BaseException:
                    db.execute("ROLLBACK")
                    raise
            self._dtype = self._meta(db, "dtype") or "float16"
            self._itemsize = np.dtype(self._dtype).itemsize
            if self._meta(db, "purge"):
                self._purge(db)

    def _connection(self) -> sqlite3.Connection:
        if self._closed:
            refuse("store", str(self.path), "is closed; open it again")
        db: sqlite3.Connection | None = getattr(self._local, "db", None)
        if db is None or self._local.pid != os.getpid():
            db = sqlite3.connect(
                self.path, timeout=self.busy_seconds, isolation_level=None, check_same_thread=False
            )
            for pragma in ("synchronous=FULL", "foreign_keys=ON", "secure_delete=ON", "cache_size=-16000"):
                db.execute(f"PRAGMA {pragma}")
            self._local.db, self._local.pid = db, os.getpid()
            self._local.depth, self._local.dirty, self._local.private = 0, False, {}
            self._local.purge, self._local.vocabulary = False, False
            with self._lock:
                self._connections.append(db)
        return db

    @contextlib.contextmanager
    def _raw(self) -> Iterator[sqlite3.Connection]:
        try:
            yield self._connection()
        except sqlite3.OperationalError as error:
            raise self._translated(error) from error

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """One snapshot for several statements."""
        with self._raw() as db:
            if db.in_transaction:
                yield db
                return
            db.execute("BEGIN")
            try:
                yield db
            finally:
                db.execute("COMMIT")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction that alone writes; inside another one it is part of that."""
        with self._raw() as db:
            local = self._local
            if local.depth:
                local.depth += 1
                try:
                    local.dirty = True
                    yield db
                finally:
                    local.depth -= 1
                return
            if self._full:
                raise StoreFull(
                    f"{self.path} is read-only since its disk was full; free space, then resume_writes()"
                )
            db.execute("BEGIN IMMEDIATE")
            local.depth, local.dirty, local.purge = 1, True, False
            try:
                yield db
                if local.purge:
                    db.execute("INSERT INTO words(words) VALUES ('optimize')")
                    self._set_meta(db, "purge", "1")
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:  # a full disk may have rolled back already
                    db.execute("ROLLBACK")
                raise
            finally:
                local.depth, local.dirty = 0, False
                local.private.clear()
            if local.purge:
                local.purge = False
                self._purge(db)

    def _translated(self, error: sqlite3.OperationalError) -> Exception:
        code = getattr(error, "sqlite_errorcode", 0)
        if code & 0xFF == sqlite3.SQLITE_FULL or code == sqlite3.SQLITE_IOERR_WRITE:
            self._full = True
            return StoreFull(
                f"{self.path}: the disk is full; nothing acknowledged is lost, writes are refused now"
            )
        if code & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return StoreBusy(f"{self.path}: other writers held it for {self.busy_seconds} s; try again")
        return error

    def _purge(self, db: sqlite3.Connection) -> None:
        """Write the file anew without what was deleted, and empty the log."""
        self._truncate_log(db)
        db.execute("VACUUM")
        with contextlib.suppress(FileNotFoundError):
            self._set_meta(db, "purge", None)
        self._truncate_log(db)

    def _truncate_log(self, db: sqlite3.Connection) -> None:
        give_up = time.monotonic() + self.busy_seconds
        while db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
            if time.monotonic() > give_up:
                raise StoreBusy(
                    f"{self.path}: deleted, but a reader keeps old pages in the log; they go when it is opened next"
                )
            time.sleep(0.01)

    def _meta(self, db: sqlite3.Connection, key: str) -> str | None:
        row = db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def _set_meta(self, db: sqlite3.Connection, key: str, value: str | None) -> None:
        if value is None:
            db.execute("DELETE FROM meta WHERE key = ?", (key,))
        else:
            db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def _guard_embedder(self, db: sqlite3.Connection, write: bool) -> None:
        mine = json.dumps([self.embedder.id, self.embedder.dim])
        stored = self._meta(db, "embedder")
        if stored == mine:
            return
        if stored is None or db.execute("SELECT 1 FROM vectors LIMIT 1").fetchone() is None:
            if write:
                self._set_meta(db, "embedder", mine)
            return
        refuse(
            "embedder",
            self.embedder.id,
            f"this store holds vectors of {json.loads(stored)[0]}; open it with that one, or call reindex(embedder)",
        )

    def _embedded(self, texts: Sequence[str], embedder: Embedder | None = None) -> NDArray[np.float32]:
        embedder = embedder or self.embedder
        return checked_vectors(embedder(list(texts)), len(texts), embedder.dim)

    def _put_words(
        self, db: sqlite3.Connection, owner: int, rows: Iterable[tuple[int, Counter[str]]]
    ) -> None:
        db.executemany(
            "INSERT INTO words(rowid, terms) VALUES (?, ?)",
            ((rid, _tagged(owner, terms)) for rid, terms in rows if terms),
        )

    def _drop_words(self, db: sqlite3.Connection, owner: int, rows: Sequence[tuple[int, str]]) -> None:
        """Take texts out of the word index; FTS5 wants the very terms that went in."""
        db.executemany(
            "INSERT INTO words(words, rowid, terms) VALUES ('delete', ?, ?)",
            [
                (rid, _tagged(owner, terms))
                for (rid, _), terms in zip(rows, index_terms([text for _, text in rows]), strict=True)
                if terms
            ],
        )

    def _index_words_anew(self, db: sqlite3.Connection) -> None:
        db.execute("INSERT INTO words(words) VALUES ('delete-all')")
        last = 0
        while rows := db.execute(
            "SELECT rid, owner, text, kind FROM records WHERE rid > ? ORDER BY rid LIMIT 1000", (last,)
        ).fetchall():
            last = rows[-1][0]
            for (rid, owner, _, kind), terms in zip(rows, index_terms([row[2] for row in rows]), strict=True):
                terms = Counter() if kind == _TRACE else terms
                self._put_words(db, owner, [(rid, terms)])
                db.execute("UPDATE records SET length = ? WHERE rid = ?", (terms.total(), rid))

    def _check_words(self, db: sqlite3.Connection) -> list[str]:
        """Compare the word index with the texts: counts of each record's terms."""
        self._vocabulary(db)
        held: dict[int, Counter[str]] = {}
        for doc, term in db.execute("SELECT doc, term FROM vocabulary"):
            held.setdefault(doc, Counter())[term] += 1
        found = []
        for rid, owner, id, text, kind, length in db.execute(
            "SELECT rid, owner, id, text, kind, length FROM records"
        ).fetchall():
            terms = Counter() if kind == _TRACE else index_terms([text])[0]
            wanted = Counter({f"{owner}x{term}": times for term, times in terms.items()})
            if held.pop(rid, Counter()) != wanted or length != terms.total():
                found.append(f"words of record {id} differ from its text")
        return found + [f"words {rid} of no record" for rid in held]

    def _vocabulary(self, db: sqlite3.Connection) -> None:
        if not self._local.vocabulary:
            db.execute("CREATE VIRTUAL TABLE temp.vocabulary USING fts5vocab('main', 'words', 'instance')")
            self._local.vocabulary = True

    def _arrays(self, owner: int, epoch: int) -> Arrays:
        """The user's arrays; a transaction that has written works on its own, which no one else sees."""
        if self._local.dirty:
            caches: dict[int, Arrays] = self._local.private
            arrays = caches.setdefault(owner, Arrays())
        else:
            with self._lock:
                arrays = self._caches.setdefault(owner, Arrays())
                self._caches.move_to_end(owner)
                while (
                    len(self._caches) > 1
                    and sum(a.nbytes() for a in self._caches.values()) > self.cache_bytes
                ):
                    self._caches.popitem(last=False)
        return arrays

    def _remove(self, db: sqlite3.Connection, owner: int, rids: set[int]) -> list[Forgotten]:
        """Hard deletion of rows, of what stems from them alone, and of their ids in others' evidence."""
        ids: dict[int, str] = {}
        for rid in rids:
            ids[rid] = db.execute("SELECT id FROM records WHERE rid = ?", (rid,)).fetchone()[0]
        derived = {
            rid: (id, tuple(json.loads(evidence)))
            for rid, id, evidence in db.execute(
                "SELECT rid, id, evidence FROM records WHERE owner = ? AND evidence IS NOT NULL", (owner,)
            )
        }
        gone = set(ids.values())
        reasons = dict.fromkeys(ids, "")
        changed = True
        while changed:
            changed = False
            for rid, (id, evidence) in derived.items():
                if rid not in ids and gone.issuperset(evidence):
                    ids[rid], reasons[rid], changed = id, "all its evidence was deleted", True
                    gone.add(id)
        found: list[Forgotten] = []
        for rid in sorted(ids):
            text, kind, nbytes = db.execute(
                "SELECT text, kind, length(CAST(text AS BLOB)) + coalesce(length(metadata), 0)"
                " + coalesce((SELECT length(vec) FROM vectors v WHERE v.rid = r.rid), 0)"
                " FROM records r WHERE rid = ?",
                (rid,),
            ).fetchone()
            if kind != _TRACE:
                self._drop_words(db, owner, [(rid, text)])
            db.execute("DELETE FROM records WHERE rid = ?", (rid,))
            found.append(Forgotten(ids[rid], reasons[rid], None, nbytes))
        for rid, (_, evidence) in derived.items():
            if rid not in ids and gone.intersection(evidence):
                kept = [id for id in evidence if id not in gone]
                db.execute("UPDATE records SET evidence = ? WHERE rid = ?", (json.dumps(kept), rid))
        if found:
            db.execute("UPDATE owners SET epoch = epoch + 1, clock = clock + 1 WHERE owner = ?", (owner,))
            self._local.purge = True
        return found


class SQLiteUserStore:
    """One user's memories in a :class:`SQLiteStore` (see :class:`memspan.recall.UserStore`)."""

    def __init__(self, store: SQLiteStore, user: str, app: str) -> None:
        self.store, self.user, self.app = store, user, app

    def __repr__(self) -> str:
        return f"SQLiteUserStore(user={self.user!r}, app={self.app!r})"

    @property
    def embedder(self) -> Embedder:
        """The store's."""
        return self.store.embedder

    def add(self, records: Sequence[Record], *, vectors: Any | None = None) -> list[str]:
        """Write records, embedded and indexed, in one transaction; their ids (made where empty)."""
        records = [checked_record(record) for record in records]
        if not records:
            return []
        embedded = [place for place, record in enumerate(records) if record.kind != "trace"]
        if vectors is None:
            with self.store._reading() as db:
                self.store._guard_embedder(db, write=False)
            rows = self.store._embedded([records[place].text for place in embedded]) if embedded else None
        else:
            rows = checked_vectors(vectors, len(records), self.embedder.dim)[embedded]
        terms = index_terms([record.text for record in records])
        with self.store._writing() as db:
            self.store._guard_embedder(db, write=True)
            owner, version, last_id = self._owner_for_writing(db)
            ids = self._new_ids(db, owner, records, last_id)
            first = (
                db.execute(
                    "SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'records'"
                ).fetchone()[0]
                + 1
            )
            db.executemany(
                f"INSERT INTO records(rid, owner, version, length, {_RECORD}) VALUES (?, ?, ?, ?"
                + ", ?" * len(COLUMNS)
                + ")",
                [
                    (
                        first + place,
                        owner,
                        version,
                        0 if record.kind == "trace" else terms[place].total(),
                        *to_row(replace(record, id=ids[place])),
                    )
                    for place, record in enumerate(records)
                ],
            )
            if rows is not None:
                db.executemany(
                    "INSERT INTO vectors VALUES (?, ?)",
                    [
                        (first + place, vector.tobytes())
                        for place, vector in zip(embedded, rows.astype(self.store._dtype), strict=True)
                    ],
                )
            self.store._put_words(db, owner, ((first + place, terms[place]) for place in embedded))
        return ids

    def get(self, ids: Sequence[str]) -> list[Record]:
        """Records by id in the order asked; unknown, deleted and other users' ids are left out."""
        if isinstance(ids, str):
            refuse("ids", ids, "give a list of ids")
        with self.store._reading() as db:
            owner, _ = self._owner(db)
            found = (
                db.execute(
                    f"SELECT {_RECORD} FROM records WHERE owner = ? AND id = ? AND state != ?",
                    (owner, id, _DELETED),
                ).fetchone()
                for id in ids
            )
            return [from_row(row) for row in found if row is not None]

    def update(self, id: str, **changes: Any) -> Record:
        """Change fields of a record (text is embedded and indexed anew); the record as it is now."""
        unknown = set(changes) - _CHANGEABLE
        if unknown or not changes:
            refuse("changes", sorted(unknown), f"give one or more of {', '.join(sorted(_CHANGEABLE))}")
        before = self._one(id)
        after = checked_record(replace(before, **changes))
        moved = (after.text, after.kind == "trace") != (before.text, before.kind == "trace")
        vector = self.store._embedded([after.text]) if moved and after.kind != "trace" else None
        with self.store._writing() as db:
            owner, version, _ = self._owner_for_writing(db)
            now = self._one(id)  # another process may have changed other fields
            after = checked_record(replace(now, **changes))
            rid = db.execute("SELECT rid FROM records WHERE owner = ? AND id = ?", (owner, id)).fetchone()[0]
            db.execute(
                f"UPDATE records SET version = ?, {', '.join(f'{name} = ?' for name in COLUMNS)} WHERE rid = ?",
                (version, *to_row(after), rid),
            )
            if after.state == "deleted" and now.state != "deleted":
                db.execute(
                    "UPDATE records SET removed_at = ?, state_before = ? WHERE rid = ?",
                    (_now(), STATES.index(now.state), rid),
                )
            if moved:
                if now.kind != "trace":
                    self.store._drop_words(db, owner, [(rid, now.text)])
                terms = index_terms([after.text])[0] if after.kind != "trace" else Counter()
                self.store._put_words(db, owner, [(rid, terms)])
                db.execute("UPDATE records SET length = ? WHERE rid = ?", (terms.total(), rid))
                db.execute("DELETE FROM vectors WHERE rid = ?", (rid,))
                if vector is not None:
                    self.store._guard_embedder(db, write=True)
                    db.execute(
                        "INSERT INTO vectors VALUES (?, ?)",
                        (rid, vector[0].astype(self.store._dtype).tobytes()),
                    )
        return after

    def reinforce(self, ids: Sequence[str], at: datetime) -> None:
        """Strength + 1 and ``last_recalled`` = at, each id once."""
        moment = micros("at", at)
        with self.store._writing() as db:
            owner, _ = self._owner(db)
            db.executemany(
                "UPDATE records SET strength = strength + 1, last_recalled = ? WHERE owner = ? AND id = ? AND state != ?",
                [(moment, owner, id, _DELETED) for id in dict.fromkeys(ids)],
            )

    def erase(
        self, ids: Sequence[str], *, hard: bool = False, reason: str = "", at: datetime | None = None
    ) -> list[Forgotten]:
        """Delete: a tombstone that :meth:`restore` can undo, or with ``hard`` leaving no trace anywhere."""
        if isinstance(ids, str):
            refuse("ids", ids, "give a list of ids")
        moment = _now() if at is None else micros("at", at)
        found: list[Forgotten] = []
        with self.store._writing() as db:
            owner, _ = self._owner(db)
            known = {
                id: row
                for id in dict.fromkeys(ids)
                if (
                    row := db.execute(
                        "SELECT rid, state, length(CAST(text AS BLOB)) + coalesce(length(metadata), 0)"
                        " + coalesce((SELECT length(vec) FROM vectors v WHERE v.rid = r.rid), 0)"
                        " FROM records r WHERE owner = ? AND id = ?",
                        (owner, id),
                    ).fetchone()
                )
            }
            if hard:
                removed = self.store._remove(db, owner, {rid for rid, _, _ in known.values()})
                return [replace(one, reason=one.reason or reason or "erased") for one in removed]
            if known:
                _, version, _ = self._owner_for_writing(db)
                for id, (rid, state, nbytes) in known.items():
                    if state != _DELETED:
                        db.execute(
                            "UPDATE records SET state = ?, state_before = state, removed_at = ?, removed_why = ?,"
                            " version = ? WHERE rid = ?",
                            (_DELETED, moment, reason, version, rid),
                        )
                        found.append(Forgotten(id, reason or "erased", None, nbytes))
        return found

    def restore(self, ids: Sequence[str]) -> list[str]:
        """Undo soft deletions; the ids that came back."""
        back: list[str] = []
        with self.store._writing() as db:
            owner, _ = self._owner(db)
            for id in dict.fromkeys(ids):
                changed = db.execute(
                    "UPDATE records SET state = coalesce(state_before, ?), state_before = NULL, removed_at = NULL,"
                    " removed_why = NULL, version = (SELECT clock + 1 FROM owners o WHERE o.owner = records.owner)"
                    " WHERE owner = ? AND id = ? AND state = ?",
                    (_ACTIVE, owner, id, _DELETED),
                ).rowcount
                back += [id] * changed
            if back:
                db.execute("UPDATE owners SET clock = clock + 1 WHERE owner = ?", (owner,))
        return back

    def erase_all(self) -> int:
        """Hard deletion of everything of this user; how many records there were."""
        with self.store._writing() as db:
            owner, _ = self._owner(db)
            count = 0
            while rows := db.execute(
                "SELECT rid, text, kind FROM records WHERE owner = ? LIMIT 1000", (owner,)
            ).fetchall():
                self.store._drop_words(db, owner, [(rid, text) for rid, text, kind in rows if kind != _TRACE])
                db.executemany("DELETE FROM records WHERE rid = ?", [(rid,) for rid, _, _ in rows])
                count += len(rows)
            db.execute("DELETE FROM settings WHERE owner = ?", (owner,))
            if db.execute("DELETE FROM owners WHERE owner = ?", (owner,)).rowcount:
                self.store._local.purge = True
        with self.store._lock:
            self.store._caches.pop(owner, None)
        return count

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
    ) -> list[Hit]:
        """Best ``k`` by words and vectors (see :meth:`memspan.recall.UserStore.search`)."""
        if text is None and vector is None:
            refuse("text", None, "give a text, a vector, or both")
        if k < 1:
            refuse("k", k, "use 1 or more")
        _check_kinds(kinds)
        states = _states(where)
        shares = {**DEFAULT_WEIGHTS, **(weights or {})}
        if set(shares) != set(DEFAULT_WEIGHTS) or not all(0 <= w < float("inf") for w in shares.values()):
            refuse("weights", weights, f"give numbers >= 0 for {', '.join(DEFAULT_WEIGHTS)}")
        conditions = filters(where, "sqlite")
        moment = None if as_of is None else micros("as_of", as_of)
        with self.store._reading() as db:
            self.store._guard_embedder(db, write=False)
        query: NDArray[np.float32] | None = None
        if vector is not None:
            query = as_vector(vector, self.embedder.dim)
        elif text and text.strip() and shares["vector"] > 0:
            query = self.store._embedded([text])[0]
        depth = max(1000, 10 * k)
        with self.store._reading() as db:
            owner, epoch = self._owner(db)
            if owner < 0:
                return []
            arrays = self.store._arrays(owner, epoch)
            with arrays.lock:
                self._refresh(db, owner, epoch, arrays)
                mask = visible(arrays, kinds, states, moment, _now())
                if conditions:
                    mask &= self._matching(db, owner, arrays, conditions)
                lists: dict[str, list[int]] = {}
                words = cosines = None
                if text is not None and shares["words"] > 0:
                    words = bm25(self._postings(db, owner, arrays, text), arrays["length"], mask)
                    lists["words"] = ranked(words, np.flatnonzero(words > 0), depth)
                if query is not None and shares["vector"] > 0:
                    self._refresh_vectors(db, owner, arrays)
                    assert arrays.vectors is not None
                    cosines = arrays.vectors[: arrays.size] @ query
                    embedded = mask & (arrays["kind"] != _TRACE)
                    lists["vector"] = ranked(cosines, np.flatnonzero(embedded), depth)
                return self._hits(db, arrays, lists, shares, words, cosines, k)

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
        if limit is not None and limit < 1:
            refuse("limit", limit, "use 1 or more, or None")
        _check_kinds(kinds or ())
        _check_states(states)
        conditions = filters(where, "sqlite")
        return self._pages(kinds, states, after, limit, newest_first, conditions)

    def vectors(self, ids: Sequence[str]) -> NDArray[np.float32]:
        """Stored vectors, float32 ``(n, dim)``, in the order asked; zeros for a record without one."""
        rows = np.zeros((len(ids), self.embedder.dim), np.float32)
        with self.store._reading() as db:
            owner, _ = self._owner(db)
            for place, id in enumerate(ids):
                found = db.execute(
                    "SELECT r.rid, v.vec FROM records r LEFT JOIN vectors v USING(rid) WHERE owner = ? AND id = ?",
                    (owner, id),
                ).fetchone()
                if found is None:
                    refuse("ids", id, "no such record of this user")
                if found[1] is not None:
                    rows[place] = np.frombuffer(found[1], self.store._dtype)
        return rows

    def count(self, *, kinds: Sequence[Kind] | None = None) -> int:
        """Active records."""
        chosen = KINDS if kinds is None else kinds
        _check_kinds(chosen)
        with self.store._reading() as db:
            owner, _ = self._owner(db)
            found = db.execute(
                f"SELECT count(*) FROM records WHERE owner = ? AND state = ? AND kind IN ({_marks(chosen)})",
                (owner, _ACTIVE, *map(KINDS.index, chosen)),
            )
            return int(found.fetchone()[0])

    def stats(self) -> Stats:
        """Sizes by kind and category; words are this user's share of the whole index."""
        with self.store._reading() as db:
            owner, _ = self._owner(db)
            rows = db.execute(
                "SELECT kind, state = ?, count(*), total(length(CAST(text AS BLOB))), total(length(vec)), total(length)"
                " FROM records LEFT JOIN vectors USING(rid) WHERE owner = ? GROUP BY 1, 2",
                (_DELETED, owner),
            ).fetchall()
            index = db.execute("SELECT total(length(block)) FROM words_data").fetchone()[0]
            everyone = db.execute("SELECT total(length) FROM records").fetchone()[0] or 1
        kept = [row for row in rows if not row[1]]
        return Stats(
            records=sum(row[2] for row in kept),
            by_kind={KINDS[row[0]]: row[2] for row in kept},
            bytes={
                "store.text": int(sum(row[3] for row in kept)),
                "store.vectors": int(sum(row[4] for row in kept)),
                "store.words": int(index * sum(row[5] for row in rows) / everyone),
                "store.tombstones": int(sum(row[3] + row[4] for row in rows if row[1])),
            },
        )

    def export(self, to: IO[str]) -> int:
        """All records and settings, one JSON document a line, vectors excluded; how many records."""
        count = 0
        for record in self.iterate(states=STATES):
            to.write(to_json(record) + "\n")
            count += 1
        with self.store._reading() as db:
            owner, _ = self._owner(db)
            for key, value in db.execute(
                "SELECT key, value FROM settings WHERE owner = ? ORDER BY key", (owner,)
            ):
                to.write(json.dumps({"setting": key, "value": json.loads(value)}, ensure_ascii=False) + "\n")
        return count

    def import_(self, lines: Iterable[str]) -> int:
        """Read what :meth:`export` wrote; ids are kept, present ids are left alone; how many were new."""
        count = 0
        batch: dict[str, Record] = {}
        with self.transaction():
            for line in lines:
                if not line.strip():
                    continue
                try:
                    document = json.loads(line)
                except ValueError as error:
                    refuse("lines", line, f"each line must be a JSON document ({error})")
                if isinstance(document, dict) and "setting" in document:
                    self.set_setting(document["setting"], document.get("value"))
                    continue
                record = from_json(document)
                batch.setdefault(record.id or f"new{count}{len(batch)}", record)
                if len(batch) == 500:
                    count += self._import(list(batch.values()))
                    batch = {}
            return count + self._import(list(batch.values()))

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Everything inside is written together or not at all; re-entrant."""
        with self.store._writing():
            if self.store._local.depth == 1:
                self.store._local.dirty = False  # nothing is written yet: searches may still share arrays
            yield

    def get_setting(self, key: str) -> Any:
        """A JSON value that a policy keeps for this user, or None."""
        with self.store._reading() as db:
            owner, _ = self._owner(db)
            row = db.execute(
                "SELECT value FROM settings WHERE owner = ? AND key = ?", (owner, key)
            ).fetchone()
        return None if row is None else json.loads(row[0])

    def set_setting(self, key: str, value: Any) -> None:
        """Keep a JSON value for this user (None removes it)."""
        checked_name("key", key)
        text = json.dumps(value, allow_nan=False)
        with self.store._writing() as db:
            owner, _, _ = self._owner_for_writing(db)
            if value is None:
                db.execute("DELETE FROM settings WHERE owner = ? AND key = ?", (owner, key))
            else:
                db.execute("INSERT OR REPLACE INTO settings VALUES (?, ?, ?)", (owner, key, text))

    def _owner(self, db: sqlite3.Connection) -> tuple[int, int]:
        """This user's number and epoch; -1 before anything was written."""
        row = db.execute(
            "SELECT owner, epoch FROM owners WHERE app = ? AND user = ?", (self.app, self.user)
        ).fetchone()
        return (-1, 0) if row is None else (row[0], row[1])

    def _owner_for_writing(self, db: sqlite3.Connection) -> tuple[int, int, str]:
        """Number, the version that this change gets, and the last id given."""
        row = db.execute(
            "INSERT INTO owners(app, user, clock) VALUES (?, ?, 1) ON CONFLICT(app, user)"
            " DO UPDATE SET clock = clock + 1 RETURNING owner, clock, last_id",
            (self.app, self.user),
        ).fetchone()
        return row[0], row[1], row[2]

    def _new_ids(
        self, db: sqlite3.Connection, owner: int, records: Sequence[Record], last_id: str
    ) -> list[str]:
        fresh = iter(ulids(sum(not record.id for record in records), last_id, time.time_ns() // 1_000_000))
        ids = [record.id or next(fresh) for record in records]
        for id, times in Counter(ids).items():
            taken = db.execute("SELECT 1 FROM records WHERE owner = ? AND id = ?", (owner, id)).fetchone()
            if times > 1 or taken:
                refuse("id", id, "is in this store already; use update, or leave it empty")
        db.execute("UPDATE owners SET last_id = max(last_id, ?) WHERE owner = ?", (max(ids), owner))
        return ids

    def _one(self, id: str) -> Record:
        with self.store._reading() as db:
            owner, _ = self._owner(db)
            row = db.execute(
                f"SELECT {_RECORD} FROM records WHERE owner = ? AND id = ?", (owner, id)
            ).fetchone()
        if row is None:
            refuse("id", id, "no such record of this user")
        return from_row(row)

    def _refresh(self, db: sqlite3.Connection, owner: int, epoch: int, arrays: Arrays) -> None:
        if arrays.epoch != epoch:
            arrays.reset(epoch)
        rows = db.execute(
            f"SELECT {_ARRAYS}, version FROM records WHERE owner = ? AND version > ? ORDER BY rid",
            (owner, arrays.version),
        ).fetchall()
        arrays.put([row[:-1] for row in rows])
        arrays.version = max((row[-1] for row in rows), default=arrays.version)

    def _refresh_vectors(self, db: sqlite3.Connection, owner: int, arrays: Arrays) -> None:
        if arrays.vectors is None:
            arrays.vectors_version = 0
        arrays.put_vectors(
            db.execute(
                "SELECT rid, vec FROM records JOIN vectors USING(rid) WHERE owner = ? AND version > ?",
                (owner, arrays.vectors_version),
            ),
            self.embedder.dim,
            self.store._dtype,
        )
        arrays.vectors_version = arrays.version

    def _matching(
        self, db: sqlite3.Connection, owner: int, arrays: Arrays, conditions: Sequence[tuple[str, list[Any]]]
    ) -> NDArray[np.bool_]:
        sql = " AND ".join(["owner = ?", *(sql for sql, _ in conditions)])
        values = [owner, *(value for _, values in conditions for value in values)]
        rids = np.array(
            [rid for (rid,) in db.execute(f"SELECT rid FROM records WHERE {sql}", values)], np.int64
        )
        mask = np.zeros(arrays.size, bool)
        mask[arrays.places(rids[arrays.known(rids)])] = True
        return mask

    def _postings(self, db: sqlite3.Connection, owner: int, arrays: Arrays, text: str) -> list[Postings]:
        """Posting lists of the query's terms; at many rows, of the terms that are not everywhere."""
        self.store._vocabulary(db)
        terms = query_terms(text)
        if arrays.size > _MANY:
            terms = self._rare(db, owner, terms, int(_FREQUENT * arrays.size))
        found = []
        for term, weight in terms.items():
            listed = db.execute(
                "SELECT group_concat(doc) FROM vocabulary WHERE term = ?", (f"{owner}x{term}",)
            ).fetchone()[0]
            if listed:
                rids, times = np.unique(np.fromstring(listed, np.int64, sep=","), return_counts=True)
                seen = arrays.known(rids)
                found.append(Postings(arrays.places(rids[seen]), times[seen].astype(np.float64), weight))
        return found

    def _rare(self, db: sqlite3.Connection, owner: int, terms: Counter[str], most: int) -> Counter[str]:
        count = "SELECT count(*) FROM (SELECT 1 FROM words WHERE words MATCH ? LIMIT ?)"

        def rows(term: str, limit: int) -> int:
            return int(db.execute(count, (f'"{owner}x{term}"', limit)).fetchone()[0])

        kept = Counter({term: weight for term, weight in terms.items() if rows(term, most + 1) <= most})
        if not any(rows(term, 1) for term in kept):
            found = [term for term in terms if term not in kept]
            kept.update({min(found, key=lambda term: rows(term, -1)): 1} if found else {})
        return kept

    def _hits(
        self,
        db: sqlite3.Connection,
        arrays: Arrays,
        lists: Mapping[str, list[int]],
        shares: Mapping[str, float],
        words: NDArray[np.float64] | None,
        cosines: NDArray[np.float32] | None,
        k: int,
    ) -> list[Hit]:
        fused = fuse(lists, weights={name: shares[name] for name in lists})
        best = sorted(fused, key=lambda pair: (-pair[1], pair[0]))[:k]
        ranks = {
            name: {place: rank for rank, place in enumerate(places, 1)} for name, places in lists.items()
        }
        hits = []
        for place, score in best:
            row = db.execute(
                f"SELECT {_RECORD} FROM records WHERE rid = ?", (int(arrays["rid"][place]),)
            ).fetchone()
            parts = {f"{name}_rank": float(rank[place]) for name, rank in ranks.items() if place in rank}
            if words is not None and words[place] > 0:
                parts["words"] = float(words[place])
            if cosines is not None:
                parts["cosine"] = float(cosines[place])
            hits.append(Hit(from_row(row), score, parts))
        return hits

    def _pages(
        self,
        kinds: Sequence[Kind] | None,
        states: Sequence[State],
        after: str | None,
        limit: int | None,
        newest_first: bool,
        conditions: Sequence[tuple[str, list[Any]]],
    ) -> Iterator[Record]:
        """Pages of 500, so that no snapshot stays open while the caller works on a record."""
        chosen = KINDS if kinds is None else kinds
        clauses = [
            "owner = ?",
            f"kind IN ({_marks(chosen)})",
            f"state IN ({_marks(states)})",
            *(sql for sql, _ in conditions),
        ]
        values = [
            *map(KINDS.index, chosen),
            *map(STATES.index, states),
            *(value for _, values in conditions for value in values),
        ]
        left = float("inf") if limit is None else limit
        while left > 0:
            page = [] if after is None else [f"id {'<' if newest_first else '>'} ?"]
            with self.store._reading() as db:
                owner, _ = self._owner(db)
                rows = db.execute(
                    f"SELECT {_RECORD} FROM records WHERE {' AND '.join(clauses + page)}"
                    f" ORDER BY id {'DESC' if newest_first else 'ASC'} LIMIT ?",
                    (owner, *values, *([] if after is None else [after]), int(min(left, 500))),
                ).fetchall()
            if not rows:
                return
            for row in rows:
                record = from_row(row)
                yield record
            after, left = record.id, left - len(rows)

    def _import(self, records: Sequence[Record]) -> int:
        with self.store._reading() as db:
            owner, _ = self._owner(db)
            new = [
                record
                for record in records
                if not record.id
                or not db.execute(
                    "SELECT 1 FROM records WHERE owner = ? AND id = ?", (owner, record.id)
                ).fetchone()
            ]
        self.add(new)
        with self.store._writing() as db:
            db.execute(
                "UPDATE records SET removed_at = ? WHERE owner = (SELECT owner FROM owners WHERE app = ? AND user = ?)"
                " AND state = ? AND removed_at IS NULL",
                (_now(), self.app, self.user, _DELETED),
            )
        return len(new)


_TRACE = KINDS.index("trace")
_ACTIVE = STATES.index("active")
_DELETED = STATES.index("deleted")


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


def _now() -> int:
    return micros("now", datetime.now(UTC))


def _marks(values: Sequence[object]) -> str:
    return ", ".join("?" * len(values))


def _check_kinds(kinds: Sequence[Kind]) -> None:
    if isinstance(kinds, str) or set(kinds) - set(KINDS):
        refuse("kinds", kinds, f"give several of {', '.join(KINDS)}")


def _check_states(states: Sequence[State]) -> None:
    if isinstance(states, str) or set(states) - set(STATES):
        refuse("states", states, f"give several of {', '.join(STATES)}")


def _states(where: Mapping[str, Any] | None) -> Sequence[State]:
    value = (where or {}).get("state", "active")
    states: Sequence[State] = [value] if isinstance(value, str) else list(value)  # type: ignore[list-item]
    _check_states(states)
    return states
