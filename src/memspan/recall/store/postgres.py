# ruff: noqa: S608 (only names made here are joined into statements, never a value)
"""The store of servers: PostgreSQL with pgvector, for many processes on many machines.

Every transaction of a user runs as the role ``memspan_member``, and row-level security shows that role one
user's rows alone (``app.user``, set for this transaction only): a statement that forgot its ``WHERE`` would
still read nothing of others. Terms and their counts are the same as in SQLite (a ``tsvector`` whose positions
hold the counts), BM25 is the same function, vectors are ``halfvec`` compared exactly after the filter, so
both backends give the same hits in the same order. A user of very many records has a partial HNSW index of
his own, whose finds are filtered and scored again; where the filter leaves too few, all are compared.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memspan.base import optional, refuse
from memspan.data.embed import Embedder
from memspan.recall.store.base import TRACE, Database, Query, SQLStore, UserHandle, VectorRow
from memspan.recall.store.cache import Arrays
from memspan.recall.store.connections import Pool
from memspan.recall.store.interface import StoreBusy, StoreFull
from memspan.recall.store.terms import index_terms

__all__ = ["PostgresStore"]

ROLE = "memspan_member"
_CREATE = f"""
CREATE EXTENSION IF NOT EXISTS vector;
DO $$ BEGIN CREATE ROLE {ROLE} NOLOGIN; EXCEPTION WHEN duplicate_object OR unique_violation THEN NULL; END $$;
GRANT {ROLE} TO CURRENT_USER;
CREATE TABLE meta(key text PRIMARY KEY, value text NOT NULL);
CREATE TABLE owners(
    owner bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    app text COLLATE "C" NOT NULL, name text COLLATE "C" NOT NULL, clock bigint NOT NULL DEFAULT 0,
    epoch bigint NOT NULL DEFAULT 0, last_id text COLLATE "C" NOT NULL DEFAULT '', UNIQUE(app, name));
CREATE TABLE records(
    rid bigserial PRIMARY KEY, owner bigint NOT NULL REFERENCES owners(owner),
    version bigint NOT NULL, length integer NOT NULL,
    id text COLLATE "C" NOT NULL, kind smallint NOT NULL, state smallint NOT NULL, text text NOT NULL,
    created_at bigint NOT NULL, valid_from bigint NOT NULL, valid_to bigint,
    role text, session text, channel text, trust text, evidence text,
    strength double precision NOT NULL, last_recalled bigint NOT NULL, expires_at bigint, metadata text,
    removed_at bigint, removed_why text, state_before smallint,
    UNIQUE(owner, id));
CREATE INDEX records_derived ON records(owner) WHERE evidence IS NOT NULL;
CREATE INDEX records_expiry ON records(expires_at) WHERE expires_at IS NOT NULL;
CREATE INDEX records_removed ON records(removed_at) WHERE removed_at IS NOT NULL;
CREATE TABLE words(
    rid bigint PRIMARY KEY REFERENCES records(rid) ON DELETE CASCADE, owner bigint NOT NULL,
    terms tsvector NOT NULL);
CREATE INDEX words_terms ON words USING gin(terms);
CREATE TABLE settings(
    owner bigint NOT NULL REFERENCES owners(owner), key text COLLATE "C" NOT NULL, value text NOT NULL,
    PRIMARY KEY(owner, key));
CREATE FUNCTION memspan_own() RETURNS bigint LANGUAGE sql STABLE AS $$
    SELECT o.owner FROM owners o WHERE o.app = current_setting('app.name', true) COLLATE "C"
        AND o.name = current_setting('app.user', true) COLLATE "C" $$;
CREATE FUNCTION memspan_any_vector() RETURNS boolean LANGUAGE plpgsql STABLE SECURITY DEFINER AS $$
    BEGIN RETURN EXISTS(SELECT 1 FROM vectors); END $$;
ALTER TABLE owners ENABLE ROW LEVEL SECURITY;
CREATE POLICY own ON owners TO {ROLE} USING (app = current_setting('app.name', true) COLLATE "C"
    AND name = current_setting('app.user', true) COLLATE "C");
GRANT SELECT, INSERT, UPDATE, DELETE ON meta, owners, records, words, settings TO {ROLE};
GRANT USAGE, SELECT ON ALL SEQUENCES IN SCHEMA public TO {ROLE};
"""
_PRIVATE = """
ALTER TABLE {0} ENABLE ROW LEVEL SECURITY;
CREATE POLICY own ON {0} TO {1} USING (owner = (SELECT memspan_own()));
GRANT SELECT, INSERT, UPDATE, DELETE ON {0} TO {1};
"""


class PostgresStore(SQLStore):
    """Memories of many users in a PostgreSQL database.

    Args:
        url: ``postgresql://user@host/database``. The first opening makes tables, the extension ``vector`` and
            the role ``memspan_member``, and needs the rights for that; a database of its own is best.
        embedder: makes the vectors; a store that holds vectors of another one refuses to add and search
            until :meth:`reindex`.
        busy_seconds: how long a write waits for other writers of the same user.
        exact_below: rows of a user up to which vectors are compared one by one; above, an approximate index
            is built behind the first search, and searches stay exact until it is there.
        cache_bytes: memory for users' rows as arrays; the user least recently searched leaves first.

    Raises:
        BadInput: a database of a later version of memspan.
        ImportError: psycopg is not installed (``memspan[postgres]``).
        StoreBusy: other writers held the user's rows.
        StoreFull: the database's disk is full; reading goes on, and writing once there is room.
    """

    dialect = "postgres"
    text_bytes = "octet_length(text)"
    vector_bytes = "vector_dims(vec) * 2"
    any_vector = "SELECT memspan_any_vector()"
    vector_type = ">f2"
    begin_read = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"
    begin_write = "BEGIN"

    def __init__(
        self,
        url: str,
        embedder: Embedder,
        *,
        busy_seconds: float = 30.0,
        exact_below: int = 100_000,
        cache_bytes: int = 2**30,
    ) -> None:
        super().__init__()
        if not busy_seconds > 0:
            refuse("busy_seconds", busy_seconds, "give more than 0 seconds; 30 is usual")
        if exact_below < 0:
            refuse("exact_below", exact_below, "give 0 or more rows")
        self.exact_below = exact_below
        self._psycopg = optional("psycopg", extra="postgres")
        self.url, self.embedder, self.busy_seconds, self.cache_bytes = (
            url,
            embedder,
            busy_seconds,
            cache_bytes,
        )
        self._pool = Pool(self._connect, _CONNECTIONS, busy_seconds, lambda db: not db.closed)
        self._prepare()

    def check(self) -> list[str]:
        """What is inconsistent between rows, words and vectors, in words; empty when all is well."""
        found: list[str] = []
        with self.reading() as db:
            missing = (
                "SELECT id FROM records r LEFT JOIN vectors v ON v.rid = r.rid"
                " WHERE v.rid IS NULL AND kind != ?"
            )
            found += [f"no vector for record {row[0]}" for row in db.execute(missing, (TRACE,)).fetchall()]
            last = 0
            page = (
                "SELECT r.rid, r.owner, id, text, kind, length,"
                " (SELECT array_agg(u.lexeme || ' ' || u.positions[1]) FROM unnest(w.terms) u)"
                " FROM records r LEFT JOIN words w ON w.rid = r.rid"
                " WHERE r.rid > ? ORDER BY r.rid LIMIT 1000"
            )
            while rows := db.execute(page, (last,)).fetchall():
                last = rows[-1][0]
                counts = index_terms([row[3] for row in rows])
                for (_, owner, id, _, kind, length, held), counted in zip(rows, counts, strict=True):
                    terms = Counter() if kind == TRACE else counted
                    wanted = {f"{owner}x{term} {min(times, _MOST)}" for term, times in terms.items()}
                    if set(held or ()) != wanted or length != terms.total():
                        found.append(f"words of record {id} differ from its text")
        return found

    def build_index(self, user: UserHandle) -> int:
        """Build one user's approximate index now (HNSW by pgvector); rows of the user."""
        with self.reading() as db:
            owner, _ = user._owner(db)
            count = int(db.execute("SELECT count(*) FROM vectors WHERE owner = ?", (owner,)).fetchone()[0])
        if count:
            self._build(owner)
        return count

    def purge(self, db: Any = None, owners: Iterable[int] = ()) -> None:
        """Vacuum what was deleted; without a connection, write all anew (``VACUUM FULL``; all wait for it).

        Free space of the files, and the keys of the index of words, keep old bytes until the latter ran.
        Write-ahead logs and backups are the operator's.
        """
        if db is None:
            with self._leased() as own:
                own.execute("VACUUM FULL owners, records, vectors, words, settings")
            return
        self.forget_caches(owners)
        db.execute("VACUUM owners, records, vectors, words, settings")
        self._drop_empty(db)

    def memory_bytes(self) -> dict[str, int]:
        """Bytes of the tables with their indexes."""
        with self.reading() as db:
            sizes = {
                name: int(db.execute("SELECT pg_total_relation_size(?::regclass)", (name,)).fetchone()[0])
                for name in ("records", "owners", "settings", "vectors", "words")
            }
        return {
            "store.rows": sizes["records"] + sizes["owners"] + sizes["settings"],
            "store.vectors": sizes["vectors"],
            "store.words": sizes["words"],
        }

    def close(self) -> None:
        """Close the connections; every later call is refused."""
        for thread in list(self._builders.values()):
            thread.join()
        self._closed = True
        self._pool.close()

    def __enter__(self) -> PostgresStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Connections and transactions.

    @property
    def address(self) -> str:
        """The address without its password."""
        return _without_password(self.url)

    def in_line(self) -> contextlib.AbstractContextManager[None]:
        """Postgres lets writers of different users go side by side, and others in their order."""
        return contextlib.nullcontext()

    def check_place(self) -> None:
        """A server refuses by itself."""

    def before_commit(self, db: Database) -> None:
        """Nothing: vacuuming comes behind the transaction."""

    @contextlib.contextmanager
    def acting(self, db: Database, user: UserHandle | None) -> Iterator[None]:
        """As the member role that sees one user's rows; None is the operator."""
        before, self._held.user = self._held.user, user
        if user is not before:
            self._become(db, user)
        yield  # after an error the transaction is rolled back, and the role with it
        if user is not before:
            self._become(db, before)
        self._held.user = before

    def _become(self, db: Database, user: UserHandle | None) -> None:
        if user is None:
            db.execute("RESET ROLE")
            return
        db.execute(  # one journey instead of two; the role as SET LOCAL ROLE sets it
            "SELECT set_config('role', ?, true), set_config('app.name', ?, true),"
            " set_config('app.user', ?, true)",
            (ROLE, user.app, user.user),
        )

    def translated(self, error: Exception) -> Exception | None:
        """Full disks and long waits by their names."""
        errors = self._psycopg.errors
        if isinstance(error, errors.DiskFull | errors.ReadOnlySqlTransaction):
            return StoreFull(
                "the database cannot write (its disk is full, or it is read-only); reading goes on"
            )
        if isinstance(error, errors.LockNotAvailable | errors.DeadlockDetected | errors.SerializationFailure):
            return StoreBusy(f"other writers held this user's rows for {self.busy_seconds} s; try again")
        return None

    def _connect(self) -> _Connection:
        raw = self._psycopg.connect(self.url, autocommit=True)
        raw.execute(f"SET lock_timeout = {int(self.busy_seconds * 1000)}")
        return _Connection(raw)

    def _prepare(self) -> None:
        with self.writing() as db:
            db.execute("SELECT pg_advisory_xact_lock(hashtext('memspan'))")
            if db.execute("SELECT to_regclass('meta')").fetchone()[0] is None:
                for statement in _statements(_CREATE):
                    db.execute(statement)
                self.make_vectors_table(db, "vectors")
                for name in ("records", "words", "settings"):
                    self._make_private(db, name)
                self.set_schema(db, 1)
            version = self.schema(db)
        self.refuse_later_schema("url", _without_password(self.url), version)
        self.migrate()

    def schema(self, db: Database) -> int:
        """Version of the tables."""
        return int(self.meta(db, "schema") or 0)

    def set_schema(self, db: Database, version: int) -> None:
        """Note the version of the tables."""
        self.set_meta(db, "schema", str(version))

    def _make_private(self, db: Database, table: str) -> None:
        for statement in _statements(_PRIVATE.format(table, ROLE)):
            db.execute(statement)

    # Vectors and words.

    def next_rows(self, db: Database, count: int) -> list[int]:
        """Numbers that no row ever had; the owner's row is locked, so they rise within a user."""
        rows = db.execute("SELECT nextval('records_rid_seq') FROM generate_series(1, ?)", (count,)).fetchall()
        return sorted(rid for (rid,) in rows)

    def make_vectors_table(self, db: Database, name: str) -> None:
        """A table for vectors."""
        db.execute(
            f"CREATE TABLE {name}(rid bigint PRIMARY KEY REFERENCES records(rid) ON DELETE CASCADE,"
            " owner bigint NOT NULL, vec halfvec NOT NULL)"
        )
        self._make_private(db, name)

    def put_vectors(self, db: Database, rows: Iterable[VectorRow], table: str = "vectors") -> None:
        """Write vectors in half precision."""
        db.executemany(
            f"INSERT INTO {table}(rid, owner, vec) VALUES (?, ?, ?::halfvec)"
            " ON CONFLICT (rid) DO UPDATE SET vec = excluded.vec",
            [(rid, owner, _literal(row.astype(np.float16))) for rid, owner, row in rows],
        )

    def read_vectors(self, db: Database, rids: Sequence[int]) -> dict[int, NDArray[np.float32]]:
        """Vectors as stored, by row number."""
        rows = _binary(db, f"SELECT rid, {_SENT} FROM vectors WHERE rid = ANY(?)", (list(rids),))
        return {rid: np.frombuffer(sent, self.vector_type).astype(np.float32) for rid, sent in rows}

    def put_words(self, db: Database, owner: int, rows: Iterable[tuple[int, Counter[str]]]) -> None:
        """Index terms, each tagged with its owner; the position of a term is its count."""
        db.executemany(
            "INSERT INTO words(rid, owner, terms) VALUES (?, ?, ?::tsvector)",
            [(rid, owner, _tsvector(owner, terms)) for rid, terms in rows if terms],
        )

    def drop_words(self, db: Database, owner: int, rows: Sequence[tuple[int, str]]) -> None:
        """Take rows out of the index of words."""
        db.execute("DELETE FROM words WHERE owner = ? AND rid = ANY(?)", (owner, [rid for rid, _ in rows]))

    def clear_words(self, db: Database) -> None:
        """Empty the index of words."""
        db.execute("DELETE FROM words")

    def words_bytes(self, db: Database) -> int:
        """Bytes of the index of words."""
        return int(db.execute("SELECT pg_total_relation_size('words')").fetchone()[0])

    # Search.

    def posting(self, db: Database, owner: int, term: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Rows that hold a term, rising, and how often."""
        rows = db.execute(
            "SELECT w.rid, u.positions[1] FROM words w CROSS JOIN LATERAL unnest(w.terms) u"
            " WHERE w.owner = ? AND w.terms @@ ?::tsquery AND u.lexeme = ? ORDER BY w.rid",
            (owner, _lexeme(owner, term), f"{owner}x{term}"),
        ).fetchall()
        found = np.array(rows, np.int64).reshape(-1, 2)
        return found[:, 0], found[:, 1].astype(np.float64)

    def rows_with(self, db: Database, owner: int, term: str, limit: int) -> int:
        """How many rows hold a term, counted up to a limit."""
        one = "SELECT 1 FROM words WHERE owner = ? AND terms @@ ?::tsquery LIMIT ?"
        values = (owner, _lexeme(owner, term), None if limit < 0 else limit)
        return int(db.execute(f"SELECT count(*) FROM ({one}) t", values).fetchone()[0])

    def vector_rows(self, db: Database, owner: int, version: int) -> Iterable[tuple[int, bytes]]:
        """Vectors of rows that changed after a version."""
        statement = f"SELECT r.rid, {_SENT} FROM records r JOIN vectors v ON v.rid = r.rid"
        return _binary(db, statement + " WHERE r.owner = ? AND version > ?", (owner, version))

    # The approximate index: one for each user of very many records, over that user's rows alone.

    def near(self, db: Database, owner: int, epoch: int, arrays: Arrays, query: Query) -> list[int] | None:
        """About the nearest rows; the index holds what is committed at once."""
        wanted = max(_NEAR, 2 * query.k)
        if wanted > _WIDEST:
            return None
        ready = db.execute(
            "SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass(?)", (self._near(owner),)
        ).fetchone()
        if not (ready and ready[0]):
            self._build_behind(owner)
            return None
        assert query.vector is not None
        db.execute(f"SET LOCAL hnsw.ef_search = {max(_BREADTH, wanted)}")
        # The number of the user and the size stand in the statement, where the planner sees that the index
        # fits; both are integers of ours.
        size = f"halfvec({self.embedder.dim})"
        rows = db.execute(
            f"SELECT rid FROM vectors WHERE owner = {owner:d} ORDER BY vec::{size} <#> ?::{size}"
            f" LIMIT {wanted:d}",
            (_literal(query.vector),),
        ).fetchall()
        return [rid for (rid,) in rows]

    def _near(self, owner: int) -> str:
        return f"near_{owner:d}_{self.embedder.dim:d}"

    def _build_behind(self, owner: int) -> None:
        with self._lock:
            running = self._builders.get(owner)
            if (running is None or not running.is_alive()) and not self._closed:
                self._builders[owner] = threading.Thread(
                    target=self._build, args=(owner,), name="memspan-near"
                )
                self._builders[owner].start()

    def _build(self, owner: int) -> None:
        """Build beside readers and writers; a half that an earlier builder left is dropped first."""
        name = self._near(owner)
        with self._psycopg.connect(self.url, autocommit=True) as db:
            # One builder at a time. Asked again and again, for a statement that waits holds a snapshot, which
            # the builder that is at work would wait for.
            lock = "SELECT pg_try_advisory_lock(hashtext('memspan near'), %s)"
            while not _first(db.execute(lock, (owner % 2**31,))):
                time.sleep(0.1)
            state = "SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass(%s)"
            found = db.execute(state, (name,)).fetchone()
            if found is not None and not found[0]:
                db.execute(f"DROP INDEX {name}")
            db.execute(
                f"CREATE INDEX CONCURRENTLY IF NOT EXISTS {name} ON vectors"
                f" USING hnsw ((vec::halfvec({self.embedder.dim:d})) halfvec_ip_ops)"
                f" WITH (m = 16, ef_construction = 64) WHERE owner = {owner:d}"
            )

    def _drop_empty(self, db: Database) -> None:
        """Indexes of users that are gone."""
        names = (
            "SELECT indexname FROM pg_indexes WHERE tablename = 'vectors'"
            " AND indexname ~ '^near_[0-9]+_[0-9]+$'"
            " AND NOT EXISTS (SELECT 1 FROM owners WHERE owner = split_part(indexname, '_', 2)::bigint)"
        )
        for (name,) in db.execute(names).fetchall():
            db.execute(f"DROP INDEX IF EXISTS {name}")


class _Connection:
    """A connection that takes ``?`` for a value, as SQLite does."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw

    def execute(self, sql: str, values: Sequence[Any] = ()) -> Any:
        return self._raw.execute(sql.replace("?", "%s"), values or None)

    def binary(self, sql: str, values: Sequence[Any]) -> list[tuple[int, bytes]]:
        rows: list[tuple[int, bytes]] = self._raw.execute(
            sql.replace("?", "%s"), values, binary=True
        ).fetchall()
        return rows

    def close(self) -> None:
        self._raw.close()

    @property
    def closed(self) -> bool:
        return bool(self._raw.closed or self._raw.broken)

    def executemany(self, sql: str, values: Iterable[Sequence[Any]]) -> Any:
        cursor = self._raw.cursor()
        cursor.executemany(sql.replace("?", "%s"), list(values))
        return cursor


_NEAR, _BREADTH, _WIDEST = 100, 256, 1000  # rows asked of the index, and how widely it looks
_SENT = "halfvec_send(vec)"
_CONNECTIONS = 16  # of one process
_MOST = 16_383  # the largest position of a tsvector


def _binary(db: Any, sql: str, values: Sequence[Any]) -> list[tuple[int, bytes]]:
    """Rows sent in binary: a vector as text would be many times as slow."""
    rows = db.binary(sql, values)
    return [(rid, sent[4:]) for rid, sent in rows]  # behind the length and two bytes unused


def _first(cursor: Any) -> Any:
    return cursor.fetchone()[0]


def _statements(script: str) -> list[str]:
    return [statement for statement in script.split(";\n") if statement.strip()]


def _literal(row: NDArray[Any]) -> str:
    return "[" + ",".join(repr(float(value)) for value in row) + "]"


def _lexeme(owner: int, term: str) -> str:
    quoted = term.replace("\\", "\\\\").replace("'", "''")
    return f"'{owner}x{quoted}'"


def _tsvector(owner: int, terms: Counter[str]) -> str:
    return " ".join(f"{_lexeme(owner, term)}:{min(times, _MOST)}" for term, times in terms.items())


def _without_password(url: str) -> str:
    head, at, tail = url.rpartition("@")
    return f"{head.split('://')[0]}://...{at}{tail}" if at else url
