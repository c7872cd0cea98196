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
import os
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memspan.base import optional, refuse
from memspan.data.embed import Embedder
from memspan.recall.records import KINDS
from memspan.recall.store.base import ACTIVE, TRACE, Database, Found, Query, SQLStore, UserHandle, VectorRow
from memspan.recall.store.cache import FREQUENT, MANY, Postings, bm25, ranked, rare_terms
from memspan.recall.store.interface import StoreBusy, StoreFull
from memspan.recall.store.rows import STATES, Filter
from memspan.recall.store.terms import index_terms, query_terms

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

    Raises:
        BadInput: a database of a later version of memspan.
        ImportError: psycopg is not installed (``memspan[postgres]``).
        StoreBusy: other writers held the user's rows.
        StoreFull: the database's disk is full; from then on the store is read-only until
            :meth:`resume_writes`.
    """

    dialect = "postgres"
    text_bytes = "octet_length(text)"
    vector_bytes = "vector_dims(vec) * 2"
    any_vector = "SELECT memspan_any_vector()"

    def __init__(
        self, url: str, embedder: Embedder, *, busy_seconds: float = 30.0, exact_below: int = 100_000
    ) -> None:
        if not busy_seconds > 0:
            refuse("busy_seconds", busy_seconds, "give more than 0 seconds; 30 is usual")
        if exact_below < 0:
            refuse("exact_below", exact_below, "give 0 or more rows")
        self.exact_below = exact_below
        self._builders: dict[int, threading.Thread] = {}
        self._psycopg = optional("psycopg", extra="postgres")
        self.url, self.embedder, self.busy_seconds = url, embedder, busy_seconds
        self._state = _ThreadState()
        self._lock = threading.Lock()
        self._connections: list[Any] = []
        self._full = self._closed = False
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

    def purge(self) -> None:
        """Write all tables and indexes anew (``VACUUM FULL``): the database waits meanwhile.

        Deleted rows are gone and vacuumed at once, but free space of the files, and the keys of the index of
        words, keep old bytes until this ran. Write-ahead logs and backups are the operator's.
        """
        self._connection().execute("VACUUM FULL owners, records, vectors, words, settings")

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

    def resume_writes(self) -> None:
        """Write again after the disk was full."""
        self._full = False

    def close(self) -> None:
        """Close the connections of all threads; every later call is refused."""
        for thread in list(self._builders.values()):
            thread.join()
        with self._lock:
            self._closed = True
            for connection in self._connections:
                connection.close()
            self._connections.clear()

    def __enter__(self) -> PostgresStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Connections and transactions.

    @contextlib.contextmanager
    def reading(self, user: UserHandle | None = None) -> Iterator[Database]:
        """One snapshot for several statements, as this user."""
        with self._translating() as db:
            if self._state.depth or self._state.snapshot:
                with self._acting(db, user):
                    yield db
                return
            db.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            self._state.snapshot = True
            try:
                with self._acting(db, user):
                    yield db
                db.execute("COMMIT")
            except BaseException:
                db.execute("ROLLBACK")
                raise
            finally:
                self._state.snapshot = False

    @contextlib.contextmanager
    def writing(self, user: UserHandle | None = None) -> Iterator[Database]:
        """A transaction that is committed at the end; inside another one it is part of that."""
        with self._translating() as db:
            state = self._state
            if state.depth:
                state.depth += 1
                try:
                    with self._acting(db, user):
                        yield db
                finally:
                    state.depth -= 1
                return
            if self._full:
                raise StoreFull(
                    "the database is read-only since its disk was full; free space, then resume_writes()"
                )
            db.execute("BEGIN")
            state.depth, state.removed = 1, False
            try:
                with self._acting(db, user):
                    yield db
                db.execute("COMMIT")
            except BaseException:
                db.execute("ROLLBACK")
                raise
            finally:
                state.depth = 0
            if state.removed:
                db.execute("VACUUM owners, records, vectors, words, settings")
                self._drop_empty(db)

    @contextlib.contextmanager
    def transaction(self, user: UserHandle) -> Iterator[None]:
        """As :meth:`writing`."""
        with self.writing(user):
            yield

    @contextlib.contextmanager
    def _acting(self, db: Database, user: UserHandle | None) -> Iterator[None]:
        """As the member role that sees one user's rows; None is the operator."""
        before, self._state.user = self._state.user, user
        if user is not before:
            self._become(db, user)
        yield  # after an error the transaction is rolled back, and the role with it
        if user is not before:
            self._become(db, before)
        self._state.user = before

    def _become(self, db: Database, user: UserHandle | None) -> None:
        if user is None:
            db.execute("RESET ROLE")
            return
        db.execute(  # one journey instead of two; the role as SET LOCAL ROLE sets it
            "SELECT set_config('role', ?, true), set_config('app.name', ?, true),"
            " set_config('app.user', ?, true)",
            (ROLE, user.app, user.user),
        )

    def _connection(self) -> _Connection:
        if self._closed:
            refuse("store", _without_password(self.url), "is closed; open it again")
        state = self._state
        if state.connection is None or state.pid != os.getpid():
            raw = self._psycopg.connect(self.url, autocommit=True)
            raw.execute(f"SET lock_timeout = {int(self.busy_seconds * 1000)}")
            state.connection, state.pid = _Connection(raw), os.getpid()
            state.depth, state.snapshot, state.removed, state.user = 0, False, False, None
            with self._lock:
                self._connections.append(raw)
        connection: _Connection = state.connection
        return connection

    @contextlib.contextmanager
    def _translating(self) -> Iterator[_Connection]:
        errors = self._psycopg.errors
        nested = self._state.depth or self._state.snapshot
        try:
            yield self._connection()
        except errors.DiskFull as error:
            self._full = True
            raise StoreFull("the database's disk is full; nothing acknowledged is lost") from error
        except (errors.LockNotAvailable, errors.DeadlockDetected, errors.SerializationFailure) as error:
            raise StoreBusy(
                f"other writers held this user's rows for {self.busy_seconds} s; try again"
            ) from error
        finally:
            if not nested:
                self._state.user = None

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

    def removed(self, owner: int) -> None:
        """Vacuum once this transaction is committed."""
        self._state.removed = True

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
        rows = db.execute(
            "SELECT rid, vec::vector::real[] FROM vectors WHERE rid = ANY(?)", (list(rids),)
        ).fetchall()
        return {rid: np.array(vec, np.float32) for rid, vec in rows}

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

    def find(self, db: Database, owner: int, epoch: int, query: Query) -> Found:
        """Candidates by words and by vectors among the rows that the query may see."""
        found = Found()
        sql, values = _visible(owner, query)
        if query.text is not None:
            found.words.update(self._by_words(db, owner, query, sql, values))
            found.lists["words"] = list(found.words)
        if query.vector is not None:
            rows = self._approximate(db, owner, query, sql, values)
            if rows is None:
                rows = db.execute(
                    "SELECT r.rid, -(v.vec::vector <#> ?::vector) AS cosine FROM records r"
                    f" JOIN vectors v ON v.rid = r.rid WHERE {sql} AND kind != ?"
                    " ORDER BY cosine DESC, r.rid LIMIT ?",
                    (_literal(query.vector), *values, TRACE, query.depth),
                ).fetchall()
            found.cosine.update((rid, float(cosine)) for rid, cosine in rows)
            found.lists["vector"] = sorted(found.cosine, key=lambda rid: (-round(found.cosine[rid], 6), rid))
        return found

    # The approximate index: one for each user of very many records, over that user's rows alone.

    def _approximate(
        self, db: Database, owner: int, query: Query, sql: str, values: Sequence[Any]
    ) -> list[Any] | None:
        """About the nearest rows that pass the filter, or None where an exact search is right."""
        assert query.vector is not None
        wanted = _NEAR if query.depth <= _WIDEST else query.depth // 5  # twice the hits asked for
        if wanted > _WIDEST:
            return None
        ready = db.execute(
            "SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass(?)", (self._near(owner),)
        ).fetchone()
        if not (ready and ready[0]):
            many = "SELECT 1 FROM records WHERE owner = ? OFFSET ? LIMIT 1"
            if db.execute(many, (owner, self.exact_below)).fetchone() is not None:
                self._build_behind(owner)
            return None
        db.execute(f"SET LOCAL hnsw.ef_search = {max(_BREADTH, wanted)}")
        # The number of the user and the size stand in the statement, where the planner sees that the index
        # fits; both are integers of ours.
        size = f"halfvec({self.embedder.dim})"
        literal = _literal(query.vector)
        rows: list[Any] = db.execute(
            # Materialised, or a plan without statistics may look into the index once for each record.
            f"WITH n AS MATERIALIZED (SELECT rid, vec FROM vectors WHERE owner = {owner:d}"
            f" ORDER BY vec::{size} <#> ?::{size} LIMIT {wanted:d})"
            " SELECT n.rid, -(n.vec::vector <#> ?::vector) AS cosine FROM n"
            f" JOIN records r ON r.rid = n.rid WHERE {sql} AND kind != ?"
            " ORDER BY cosine DESC, n.rid LIMIT ?",
            (literal, literal, *values, TRACE, query.depth),
        ).fetchall()
        return rows if len(rows) >= wanted // 2 else None  # a narrow filter: look at all that pass it

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

    def _by_words(
        self, db: Database, owner: int, query: Query, sql: str, values: Sequence[Any]
    ) -> list[tuple[int, float]]:
        """Row numbers with their scores, best first."""
        terms = query_terms(query.text or "")
        everything = db.execute("SELECT count(*) FROM records WHERE owner = ?", (owner,)).fetchone()[0]
        if everything > MANY:

            def rows(term: str, limit: int) -> int:
                one = "SELECT 1 FROM words WHERE owner = ? AND terms @@ ?::tsquery LIMIT ?"
                statement = f"SELECT count(*) FROM ({one}) t"
                most = None if limit < 0 else limit
                return int(db.execute(statement, (owner, _lexeme(owner, term), most)).fetchone()[0])

            terms = rare_terms(terms, int(FREQUENT * everything), rows)
        if not terms:
            return []
        seen, total = db.execute(
            f"SELECT count(*), coalesce(sum(length), 0) FROM records r WHERE {sql}", values
        ).fetchone()
        tagged = {f"{owner}x{term}": weight for term, weight in terms.items()}
        listed = db.execute(
            "SELECT r.rid, r.length, u.lexeme, u.positions[1] FROM words w JOIN records r ON r.rid = w.rid"
            " CROSS JOIN LATERAL unnest(w.terms) u"
            f" WHERE w.owner = ? AND w.terms @@ ?::tsquery AND u.lexeme = ANY(?) AND {sql} ORDER BY r.rid",
            (owner, " | ".join(_lexeme(owner, term) for term in terms), list(tagged), *values),
        ).fetchall()
        lengths = {rid: length for rid, length, _, _ in listed}
        places = {rid: place for place, rid in enumerate(lengths)}
        by_term: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for rid, _, lexeme, times in listed:
            by_term[lexeme].append((places[rid], times))
        postings = [
            Postings(
                np.array([place for place, _ in by_term[lexeme]], np.intp),
                np.array([times for _, times in by_term[lexeme]], np.float64),
                weight,
            )
            for lexeme, weight in tagged.items()
        ]
        rids = list(lengths)
        scores = bm25(
            postings, np.array(list(lengths.values()), np.float64), seen, float(total) / max(seen, 1)
        )
        best = ranked(scores, np.flatnonzero(scores > 0), query.depth)
        return [(rids[place], float(scores[place])) for place in best]


class _Connection:
    """A connection that takes ``?`` for a value, as SQLite does."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw

    def execute(self, sql: str, values: Sequence[Any] = ()) -> Any:
        return self._raw.execute(sql.replace("?", "%s"), values or None)

    def executemany(self, sql: str, values: Iterable[Sequence[Any]]) -> Any:
        cursor = self._raw.cursor()
        cursor.executemany(sql.replace("?", "%s"), list(values))
        return cursor


class _ThreadState(threading.local):
    """One thread's connection and its open transaction."""

    connection: Any = None
    pid: int = 0
    depth: int = 0
    snapshot: bool = False
    removed: bool = False
    user: UserHandle | None = None


_NEAR, _BREADTH, _WIDEST = 100, 256, 1000  # rows asked of the index, and how widely it looks
_MOST = 16_383  # the largest position of a tsvector


def _visible(owner: int, query: Query) -> tuple[str, list[Any]]:
    """The rows that a search looks at: the same rule as :func:`memspan.recall.store.cache.visible`."""
    moment = query.now if query.as_of is None else query.as_of
    parts: list[Filter] = [
        ("r.owner = ?", [owner]),
        ("kind = ANY(?)", [[KINDS.index(kind) for kind in query.kinds]]),
        ("(expires_at IS NULL OR expires_at > ?)", [moment]),
    ]
    if query.as_of is None:
        parts.append(("state = ANY(?)", [[STATES.index(state) for state in query.states]]))
    else:
        ended = [STATES.index("superseded"), STATES.index("merged")]
        parts += [
            ("created_at <= ? AND valid_from <= ? AND (valid_to IS NULL OR valid_to > ?)", [moment] * 3),
            ("(state = ? OR (state = ANY(?) AND valid_to IS NOT NULL))", [ACTIVE, ended]),
        ]
    parts += query.conditions
    return " AND ".join(sql for sql, _ in parts), [value for _, values in parts for value in values]


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
