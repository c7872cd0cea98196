# ruff: noqa: S608 (only names of columns and question marks are joined into statements, never a value)
"""What both backends do alike: one user's handle, and the store's housekeeping, in SQL that both understand.

A backend adds what differs: connections and transactions, vectors, words, and how candidates are found. A
statement's values always go in as parameters, and every statement about records names the owner.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime, timedelta
from typing import IO, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from memspan.base import refuse
from memspan.data.embed import Embedder
from memspan.recall.rank import bm25
from memspan.recall.records import KINDS, Forgotten, Hit, Kind, Record, State
from memspan.recall.store.cache import COLUMNS as COLUMNS_READ
from memspan.recall.store.cache import (
    FREQUENT,
    MANY,
    Arrays,
    View,
    field_scores,
    ranked,
    rare_terms,
    visible,
)
from memspan.recall.store.connections import Held, Pool
from memspan.recall.store.interface import DEFAULT_WEIGHTS, SEARCHED, Stats
from memspan.recall.store.rows import (
    COLUMNS,
    STATES,
    Filter,
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

__all__ = [
    "ACTIVE",
    "DELETED",
    "TRACE",
    "Database",
    "Migration",
    "Query",
    "SQLStore",
    "UserHandle",
    "VectorRow",
    "identity",
    "marks",
]

TRACE, ACTIVE, DELETED = KINDS.index("trace"), STATES.index("active"), STATES.index("deleted")
_RECORD = ", ".join(COLUMNS)
_CHANGEABLE = {f.name for f in fields(Record)} - {"id"}
_RETELLS = {KINDS.index("summary"), TRACE}  # may hold the words of any of their evidence
_BATCH = 500
_SAMPLE = 256  # rows whose cosines stand for all where the index finds the near ones
_SHOWN = {"vector": "cosine", "vector_around": "cosine_around"}
_log = logging.getLogger("memspan.recall")
VectorRow = tuple[int, int, NDArray[np.float32]]  # row number, owner, vector


class Database(Protocol):
    """A connection inside a transaction; ``?`` stands for a value."""

    def execute(self, sql: str, values: Sequence[Any] = (), /) -> Any:
        """A cursor."""
        ...

    def executemany(self, sql: str, values: Iterable[Sequence[Any]], /) -> Any:
        """The statement for each."""
        ...


@dataclass(frozen=True)
class Query:
    """A search after all checks; times in microseconds."""

    text: str | None
    vector: NDArray[np.float32] | None
    kinds: Sequence[Kind]
    states: Sequence[State]
    as_of: int | None
    now: int
    conditions: Sequence[Filter]
    k: int
    weights: Mapping[str, float]
    questions: int | None = None


@dataclass(frozen=True)
class Migration:
    """A step of the schema, done in pages that are committed one by one, so that a stop loses one page.

    Attributes:
        version: of the schema after it.
        page: takes the database and the row number reached so far (0 at first); gives the number that it
            reached, or None when all is done.
    """

    version: int
    page: Callable[[Database, int], int | None]


def _index_sessions(db: Database, after: int) -> None:
    db.execute("CREATE INDEX records_session ON records(owner, session) WHERE session IS NOT NULL")


def _add_keys(db: Database, after: int) -> None:
    db.execute("ALTER TABLE records ADD COLUMN key text")
    db.execute("CREATE INDEX records_key ON records(owner, key) WHERE key IS NOT NULL")


class SQLStore(ABC):
    """A database of many users' memories; see :class:`memspan.recall.Store` for what its methods promise."""

    dialect: Literal["sqlite", "postgres"]
    vector_type: str  # of a stored vector's numbers
    migrations: Sequence[Migration] = (Migration(2, _index_sessions), Migration(3, _add_keys))
    text_bytes: str  # SQL: bytes of a record's text
    vector_bytes: str  # SQL: bytes of a row of the table of vectors
    any_vector = "SELECT EXISTS(SELECT 1 FROM vectors)"  # of any user, whoever asks
    embedder: Embedder
    begin_read: str  # SQL
    begin_write: str
    busy_seconds: float
    exact_below: int
    cache_bytes: int
    _pool: Pool

    def __init__(self) -> None:
        self._held = Held()
        self._lock = threading.RLock()
        self._caches: OrderedDict[int, Arrays] = OrderedDict()
        self._builders: dict[int, threading.Thread] = {}
        self._closed = False

    # What a backend supplies.

    @property
    @abstractmethod
    def address(self) -> str:
        """Where it is, for messages; without a password."""

    @abstractmethod
    def schema(self, db: Database) -> int:
        """Version of the tables."""

    @abstractmethod
    def set_schema(self, db: Database, version: int) -> None:
        """Note the version of the tables."""

    @abstractmethod
    def translated(self, error: Exception) -> Exception | None:
        """An error of the database as one of ours; None lets it through."""

    @abstractmethod
    def in_line(self) -> AbstractContextManager[None]:
        """Waiting for this process' other writers, where the database does not."""

    @abstractmethod
    def check_place(self) -> None:
        """Refuse to write where what is written would be lost."""

    @abstractmethod
    def acting(self, db: Database, user: UserHandle | None) -> AbstractContextManager[None]:
        """The database acts for this user alone; None is the operator."""

    @abstractmethod
    def before_commit(self, db: Database) -> None:
        """The last work of a transaction that removed rows for good."""

    @abstractmethod
    def purge(self, db: Any = None, owners: Iterable[int] = ()) -> None:
        """Nothing of what was removed for good may remain."""

    @abstractmethod
    def next_rows(self, db: Database, count: int) -> Sequence[int]:
        """Numbers for new rows, above all that this owner has."""

    @abstractmethod
    def put_vectors(self, db: Database, rows: Iterable[VectorRow], table: str = "vectors") -> None:
        """Write vectors."""

    @abstractmethod
    def read_vectors(self, db: Database, rids: Sequence[int]) -> dict[int, NDArray[np.float32]]:
        """Vectors as stored, by row number."""

    @abstractmethod
    def put_words(self, db: Database, owner: int, rows: Iterable[tuple[int, Counter[str]]]) -> None:
        """Index terms of rows that are not in the index of words."""

    @abstractmethod
    def drop_words(self, db: Database, owner: int, rows: Sequence[tuple[int, str]]) -> None:
        """Take rows with these texts out of the index of words."""

    @abstractmethod
    def clear_words(self, db: Database) -> None:
        """Empty the index of words."""

    @abstractmethod
    def words_bytes(self, db: Database) -> int:
        """Bytes of the index of words."""

    @abstractmethod
    def posting(self, db: Database, owner: int, term: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Rows that hold a term, rising, and how often."""

    @abstractmethod
    def rows_with(self, db: Database, owner: int, term: str, limit: int) -> int:
        """How many rows hold a term, counted up to a limit (-1 for none)."""

    @abstractmethod
    def vector_rows(self, db: Database, owner: int, version: int) -> Iterable[tuple[int, bytes]]:
        """Vectors of rows that changed after a version."""

    @abstractmethod
    def near(self, db: Database, owner: int, epoch: int, arrays: Arrays, query: Query) -> list[int] | None:
        """About the nearest rows by the approximate index and all that it lacks; None: there is none."""

    @abstractmethod
    def make_vectors_table(self, db: Database, name: str) -> None:
        """A table for vectors."""

    # What follows from it.

    @contextmanager
    def reading(self, user: UserHandle | None = None) -> Iterator[Any]:
        """One snapshot for several statements; inside a transaction it is part of that."""
        held = self._held
        with self._telling():
            if held.connection is not None:
                with self.acting(held.connection, user):
                    yield held.connection
                return
            with self._leased() as db:
                db.execute(self.begin_read)
                try:
                    with self.acting(db, user):
                        yield db
                    db.execute("COMMIT")
                except BaseException:
                    self._roll_back(db)
                    raise

    @contextmanager
    def writing(self, user: UserHandle | None = None) -> Iterator[Any]:
        """A transaction that is committed at the end; inside another one it is part of that."""
        held = self._held
        if held.depth:
            held.depth, held.dirty = held.depth + 1, True
            try:
                with self.acting(held.connection, user):
                    yield held.connection
            finally:
                held.depth -= 1
            return
        with self._telling(), self.in_line(), self._leased() as db:
            self.check_place()
            db.execute(self.begin_write)
            held.depth, held.dirty, held.removed = 1, True, set()
            try:
                with self.acting(db, user):
                    yield db
                if held.removed:
                    self.before_commit(db)
                db.execute("COMMIT")
            except BaseException:
                self._roll_back(db)
                raise
            finally:
                held.depth, held.dirty = 0, False
                held.private.clear()
            self.check_place()  # nothing is acknowledged that went into a file which is gone
            if held.removed:
                self.purge(db, held.removed)

    @contextmanager
    def transaction(self, user: UserHandle) -> Iterator[None]:
        """As :meth:`writing`, before anything was written."""
        with self.writing(user):
            if self._held.depth == 1:
                self._held.dirty = False  # searches may use what is shared until something is written
            yield

    @contextmanager
    def _leased(self) -> Iterator[Any]:
        if self._closed:
            refuse("store", self.address, "is closed; open it again")
        with self._pool.lease() as db:
            self._held.connection, self._held.user = db, None
            try:
                yield db
            finally:
                self._held.connection = None

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            told = self.translated(error)
            if told is None:
                raise
            raise told from error

    def _roll_back(self, db: Any) -> None:
        with suppress(Exception):  # a full disk may have rolled back already, a lost connection cannot
            db.execute("ROLLBACK")

    def find(
        self, db: Database, owner: int, epoch: int, query: Query
    ) -> list[tuple[int, float, dict[str, float]]]:
        """Row numbers, scores and their parts, best first, among the rows that the query may see."""
        arrays = self._arrays(owner)
        with arrays.lock:
            if arrays.epoch != epoch:
                arrays.reset(epoch)
            changed = f"SELECT {COLUMNS_READ} FROM records WHERE owner = ? AND version > ? ORDER BY rid"
            arrays.put(db.execute(changed, (owner, arrays.version)).fetchall())
            mask = visible(arrays, query.kinds, query.states, query.as_of, query.now)
            if query.conditions:
                mask &= self._matching(db, owner, arrays, query.conditions)
            view = View.of(arrays, mask)
            if not len(view.places):
                return []
            postings = self._postings(db, owner, arrays, view, query.text) if query.text is not None else []
            cosines = self._cosines(db, owner, epoch, arrays, view, query, postings)
            total, parts, candidates = field_scores(view, postings, cosines, query.weights)
            by_age = np.full(arrays.size, 0.0)
            by_age[view.places] = total
            chosen = np.sort(view.places[candidates])
            if query.questions is not None:
                asks = arrays["asks"][chosen] > 0
                few = ranked(by_age, chosen[asks], query.questions) if query.questions else []
                chosen = np.sort(np.concatenate([chosen[~asks], np.array(few, np.intp)]))
            best = view.found[ranked(by_age, chosen, query.k)]
            names = [name for name, weight in query.weights.items() if weight and name in parts]
            return [
                (
                    int(arrays["rid"][view.places[place]]),
                    float(total[place]),
                    {_SHOWN.get(name, name): float(parts[name][place]) for name in names},
                )
                for place in best
            ]

    def _arrays(self, owner: int) -> Arrays:
        """The user's arrays; a transaction that has written works on its own, which no one else sees."""
        if self._held.dirty:
            return self._held.private.setdefault(owner, Arrays())  # type: ignore[no-any-return]
        with self._lock:
            arrays = self._caches.setdefault(owner, Arrays())
            self._caches.move_to_end(owner)
            while len(self._caches) > 1 and sum(a.nbytes() for a in self._caches.values()) > self.cache_bytes:
                self._caches.popitem(last=False)
        return arrays

    def _matching(
        self, db: Database, owner: int, arrays: Arrays, conditions: Sequence[Filter]
    ) -> NDArray[np.bool_]:
        sql = " AND ".join(["owner = ?", *(sql for sql, _ in conditions)])
        values = [owner, *(value for _, values in conditions for value in values)]
        rows = db.execute(f"SELECT rid FROM records WHERE {sql}", values).fetchall()
        rids = np.array([rid for (rid,) in rows], np.int64)
        mask = np.zeros(arrays.size, bool)
        mask[arrays.places(rids[arrays.known(rids)])] = True
        return mask

    def _postings(
        self, db: Database, owner: int, arrays: Arrays, view: View, text: str
    ) -> list[tuple[NDArray[np.intp], NDArray[np.float64], int]]:
        """Posting lists of the query's terms; at many rows, of the terms that are not everywhere."""
        terms = query_terms(text)
        if arrays.size > MANY:
            terms = rare_terms(
                terms, int(FREQUENT * arrays.size), lambda term, limit: self.rows_with(db, owner, term, limit)
            )
        found = []
        for term, weight in terms.items():
            rids, times = self.posting(db, owner, term)
            known = arrays.known(rids)
            places = view.found[arrays.places(rids[known])]
            seen = places >= 0
            if seen.any():
                order = np.argsort(places[seen], kind="stable")
                found.append((places[seen][order], times[known][seen][order], weight))
        return found

    def _cosines(
        self,
        db: Database,
        owner: int,
        epoch: int,
        arrays: Arrays,
        view: View,
        query: Query,
        postings: Sequence[tuple[NDArray[np.intp], NDArray[np.float64], int]],
    ) -> NDArray[np.float64] | None:
        """Cosines of the view's rows: all, or (NaN elsewhere) of those near by the approximate index."""
        if query.vector is None:
            return None
        many = arrays.size > self.exact_below and not self._held.dirty
        rids = self.near(db, owner, epoch, arrays, query) if many else None
        if rids is not None:
            ids = np.array(sorted(rids), np.int64)
            near = view.found[arrays.places(ids[arrays.known(ids)])]
            near = near[near >= 0]
            if len(near) >= min(query.k, len(view.places)):  # else a narrow filter: look at all that pass it
                n = len(view.places)
                words = bm25(postings, view.lengths, n)
                listed = np.argsort(-words)[: 10 * query.k]
                reach = np.concatenate(
                    [near - 1, near, near + 1, listed, np.arange(0, n, max(1, n // _SAMPLE))]
                )
                wanted = np.unique(np.clip(reach, 0, n - 1))
                numbers = arrays["rid"][view.places[wanted]].tolist()
                found = self.read_vectors(db, numbers)
                cosines = np.full(n, np.nan)
                for place, rid in zip(wanted.tolist(), numbers, strict=True):
                    cosines[place] = found[rid] @ query.vector if rid in found else 0.0
                return cosines
        rows = self.vector_rows(db, owner, 0 if arrays.vectors is None else arrays.vectors_version)
        arrays.put_vectors(rows, self.embedder.dim, self.vector_type)
        arrays.vectors_version = arrays.version
        assert arrays.vectors is not None
        return (arrays.vectors[: arrays.size] @ query.vector)[view.places].astype(np.float64)

    def forget_caches(self, owners: Iterable[int]) -> None:
        """Let go of what memory holds of users."""
        with self._lock:
            for owner in owners:
                self._caches.pop(owner, None)

    def removed(self, owner: int) -> None:
        """Once this transaction is committed, nothing of what it removed may remain."""
        self._held.removed.add(owner)

    def for_user(self, user: str, app: str = "default") -> UserHandle:
        """The handle of one user; refused when empty or longer than 256 bytes."""
        return UserHandle(self, checked_name("user", user), checked_name("app", app))

    def users(self, app: str = "default") -> list[str]:
        """Users that hold anything, in order of code points: for the operator, never for a user."""
        with self.reading() as db:
            found = db.execute(
                "SELECT name FROM owners WHERE app = ?", (checked_name("app", app),)
            ).fetchall()
        return sorted(name for (name,) in found)

    def ping(self) -> None:
        """Raise where the store cannot be read, or is no longer where it was opened."""
        with self.reading() as db:
            db.execute("SELECT 1").fetchone()
        self.check_place()

    def reindex(self, embedder: Embedder | None = None) -> int:
        """Embed and index all anew; a run that was stopped goes on where it was.

        Searches and writes with the former embedder go on meanwhile.

        Args:
            embedder: the new one; None for the present one.

        Returns:
            How many records were embedded now.
        """
        embedder = embedder or self.embedder
        target = identity(embedder)
        with self.writing() as db:
            if self.meta(db, "reindex") != target:
                db.execute("DROP TABLE IF EXISTS vectors_next")
                self.make_vectors_table(db, "vectors_next")
                self.set_meta(db, "reindex", target)
        done = 0
        missing = (
            "SELECT r.rid, r.owner, r.text FROM records r LEFT JOIN vectors_next v ON v.rid = r.rid"
            " WHERE v.rid IS NULL AND r.kind != ? ORDER BY r.rid LIMIT 256"
        )
        while True:
            with self.reading() as db:
                rows = db.execute(missing, (TRACE,)).fetchall()
            vectors = embedded([text for _, _, text in rows], embedder) if rows else None
            with self.writing() as db:
                if vectors is not None:
                    same = "SELECT 1 FROM records WHERE rid = ? AND text = ?"
                    fresh = [
                        (rid, owner, vector)
                        for (rid, owner, text), vector in zip(rows, vectors, strict=True)
                        if db.execute(same, (rid, text)).fetchone()  # not changed or erased meanwhile
                    ]
                    self.put_vectors(db, fresh, "vectors_next")
                    done += len(fresh)
                elif db.execute(missing, (TRACE,)).fetchone() is None:
                    db.execute("DROP TABLE vectors")
                    db.execute("ALTER TABLE vectors_next RENAME TO vectors")
                    self.set_meta(db, "embedder", target)
                    self.set_meta(db, "reindex", None)
                    self._index_words_anew(db)
                    db.execute("UPDATE owners SET epoch = epoch + 1")
                    break
        self.embedder = embedder
        return done

    def sweep_expired(self, at: datetime, undo_days: float = 30.0) -> int:
        """Remove for good what has expired and tombstones older than the undo window; how many."""
        if not undo_days >= 0:
            refuse("undo_days", undo_days, "give 0 or more days")
        now, before = micros("at", at), micros("at", at - timedelta(days=undo_days))
        with self.writing() as db:
            rows = db.execute(
                "SELECT owner, rid FROM records WHERE expires_at <= ? UNION"
                " SELECT owner, rid FROM records WHERE removed_at < ?",
                (now, before),
            ).fetchall()
            by_owner: dict[int, set[int]] = {}
            for owner, rid in rows:
                by_owner.setdefault(owner, set()).add(rid)
            return sum(len(self.remove(db, owner, rids)) for owner, rids in by_owner.items())

    def remove(self, db: Database, owner: int, rids: set[int]) -> list[Forgotten]:
        """Hard deletion of rows, of what stems from them alone, and of their ids in others' evidence."""
        ids: dict[int, str] = {}
        for rid in rids:
            ids[rid] = db.execute(
                "SELECT id FROM records WHERE owner = ? AND rid = ?", (owner, rid)
            ).fetchone()[0]
        derived = {
            rid: (id, frozenset(json.loads(evidence)), kind in _RETELLS)
            for rid, id, evidence, kind in db.execute(
                "SELECT rid, id, evidence, kind FROM records WHERE owner = ? AND evidence IS NOT NULL",
                (owner,),
            ).fetchall()
        }
        gone = set(ids.values())
        reasons = dict.fromkeys(ids, "")
        growing = True
        while growing:
            growing = False
            for rid, (id, evidence, retells) in derived.items():
                if rid not in ids and (gone & evidence if retells else gone >= evidence):
                    ids[rid], reasons[rid], growing = id, "its evidence was deleted", True
                    gone.add(id)
        found: list[Forgotten] = []
        for rid in sorted(ids):
            text, kind, nbytes = db.execute(
                f"SELECT text, kind, {self._row_bytes} FROM records r WHERE owner = ? AND rid = ?",
                (owner, rid),
            ).fetchone()
            if kind != TRACE:
                self.drop_words(db, owner, [(rid, text)])
            db.execute("DELETE FROM records WHERE owner = ? AND rid = ?", (owner, rid))
            found.append(Forgotten(ids[rid], reasons[rid], None, nbytes))
        for rid, (_, evidence, _) in derived.items():
            if rid not in ids and gone & evidence:
                kept = json.dumps(sorted(evidence - gone))
                db.execute("UPDATE records SET evidence = ? WHERE owner = ? AND rid = ?", (kept, owner, rid))
        if found:
            db.execute("UPDATE owners SET epoch = epoch + 1, clock = clock + 1 WHERE owner = ?", (owner,))
            self.removed(owner)
        return found

    def migrate(self) -> None:
        """Bring the tables to the present schema, telling progress; a run that was stopped goes on."""
        for step in self.migrations:
            done = False
            while not done:
                with self.writing() as db:
                    done = self.schema(db) >= step.version
                    if done:
                        break
                    version, after = json.loads(self.meta(db, "migration") or "[0, 0]")
                    reached = step.page(db, after if version == step.version else 0)
                    done = reached is None
                    self.set_meta(db, "migration", None if done else json.dumps([step.version, reached]))
                    if done:
                        self.set_schema(db, step.version)
                    rows = db.execute("SELECT coalesce(max(rid), 0) FROM records").fetchone()[0]
                _log.info("schema %d: row %s of %d", step.version, "all" if done else reached, rows)

    def refuse_later_schema(self, name: str, address: str, version: int) -> None:
        """Refuse what a later version wrote."""
        newest = max(step.version for step in self.migrations)
        if version > newest:
            refuse(name, address, f"written by a later memspan (schema {version} > {newest}); upgrade")

    def meta(self, db: Database, key: str) -> str | None:
        """A fact about the whole store."""
        row = db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def set_meta(self, db: Database, key: str, value: str | None) -> None:
        """Write a fact about the whole store; None removes it."""
        db.execute("DELETE FROM meta WHERE key = ?", (key,))
        if value is not None:
            db.execute("INSERT INTO meta(key, value) VALUES (?, ?)", (key, value))

    def guard_embedder(self, db: Database) -> None:
        """Refuse to mix vectors of two embedders."""
        stored = self.meta(db, "embedder")
        if stored not in (None, identity(self.embedder)) and db.execute(self.any_vector).fetchone()[0]:
            refuse(
                "embedder",
                self.embedder.id,
                f"this store holds vectors of {json.loads(str(stored))[0]}; open it so, or reindex(embedder)",
            )

    def adopt_embedder(self, db: Database) -> None:
        """Note whose vectors are here, once the first are written."""
        self.guard_embedder(db)
        if self.meta(db, "embedder") != identity(self.embedder):
            self.set_meta(db, "embedder", identity(self.embedder))

    @property
    def _row_bytes(self) -> str:
        vector = f"(SELECT {self.vector_bytes} FROM vectors v WHERE v.rid = r.rid)"
        return f"{self.text_bytes} + coalesce(length(metadata), 0) + coalesce({vector}, 0)"

    def _index_words_anew(self, db: Database) -> None:
        self.clear_words(db)
        last = 0
        page = "SELECT rid, owner, text, kind FROM records WHERE rid > ? ORDER BY rid LIMIT 1000"
        while rows := db.execute(page, (last,)).fetchall():
            last = rows[-1][0]
            for (rid, owner, _, kind), terms in zip(rows, index_terms([row[2] for row in rows]), strict=True):
                terms = Counter() if kind == TRACE else terms
                self.put_words(db, owner, [(rid, terms)])
                db.execute("UPDATE records SET length = ? WHERE rid = ?", (terms.total(), rid))


class UserHandle:
    """One user's memories; see :class:`memspan.recall.UserStore` for what each method promises."""

    def __init__(self, store: SQLStore, user: str, app: str) -> None:
        self.store, self.user, self.app = store, user, app

    def __repr__(self) -> str:
        return f"UserHandle(user={self.user!r}, app={self.app!r})"

    @property
    def embedder(self) -> Embedder:
        """The store's."""
        return self.store.embedder

    def add(self, records: Sequence[Record], *, vectors: Any | None = None) -> list[str]:
        """Write records, embedded and indexed, in one transaction; their ids (made where empty)."""
        records = [checked_record(record) for record in records]
        if not records:
            return []
        found = [place for place, record in enumerate(records) if record.kind != "trace"]
        with self.store.reading(self) as db:
            self.store.guard_embedder(db)
        if vectors is not None:
            rows = checked_vectors(vectors, len(records), self.embedder.dim)[found]
        else:
            rows = embedded([records[place].text for place in found], self.embedder)
        terms = index_terms([record.text for record in records])
        with self.store.writing(self) as db:
            if found:
                self.store.adopt_embedder(db)
            owner, version, last_id = self._change(db)
            ids = self._new_ids(db, owner, records, last_id)
            numbers = self.store.next_rows(db, len(records))
            db.executemany(
                f"INSERT INTO records(rid, owner, version, length, {_RECORD})"
                f" VALUES ({marks(range(len(COLUMNS) + 4))})",
                [
                    (
                        number,
                        owner,
                        version,
                        0 if record.kind == "trace" else count.total(),
                        *to_row(replace(record, id=id)),
                    )
                    for number, record, count, id in zip(numbers, records, terms, ids, strict=True)
                ],
            )
            self.store.put_vectors(db, [(numbers[i], owner, row) for i, row in zip(found, rows, strict=True)])
            self.store.put_words(db, owner, ((numbers[place], terms[place]) for place in found))
        return ids

    def get(self, ids: Sequence[str]) -> list[Record]:
        """Records by id in the order asked; unknown, deleted and other users' ids are left out."""
        _check_ids(ids)
        statement = f"SELECT {_RECORD} FROM records WHERE owner = ? AND id = ? AND state != ?"
        with self.store.reading(self) as db:
            owner, _ = self._owner(db)
            rows = [db.execute(statement, (owner, id, DELETED)).fetchone() for id in ids]
        return [from_row(row) for row in rows if row is not None]

    def update(self, id: str, **changes: Any) -> Record:
        """Change fields of a record (text is embedded and indexed anew); the record as it is now."""
        unknown = set(changes) - _CHANGEABLE
        if unknown or not changes:
            refuse("changes", sorted(unknown), f"give one or more of {', '.join(sorted(_CHANGEABLE))}")
        after = checked_record(replace(self._row(id)[1], **changes))
        vector = None
        if {"text", "kind"} & set(changes) and after.kind != "trace":
            with self.store.reading(self) as db:
                self.store.guard_embedder(db)
            vector = embedded([after.text], self.embedder)[0]
        with self.store.writing(self) as db:
            owner, version, _ = self._change(db)
            rid, now = self._row(id)  # another process may have changed other fields
            after = checked_record(replace(now, **changes))
            db.execute(
                f"UPDATE records SET version = ?, {', '.join(f'{name} = ?' for name in COLUMNS)}"
                " WHERE owner = ? AND rid = ?",
                (version, *to_row(after), owner, rid),
            )
            if (after.state == "deleted") != (now.state == "deleted"):
                before = STATES.index(now.state) if after.state == "deleted" else None
                db.execute(
                    "UPDATE records SET removed_at = ?, state_before = ? WHERE owner = ? AND rid = ?",
                    (None if before is None else now_micros(), before, owner, rid),
                )
            if {"text", "kind"} & set(changes):
                if now.kind != "trace":
                    self.store.drop_words(db, owner, [(rid, now.text)])
                terms = index_terms([after.text])[0] if after.kind != "trace" else Counter()
                self.store.put_words(db, owner, [(rid, terms)])
                db.execute(
                    "UPDATE records SET length = ? WHERE owner = ? AND rid = ?", (terms.total(), owner, rid)
                )
                db.execute("DELETE FROM vectors WHERE rid = ?", (rid,))
                if vector is not None:
                    self.store.adopt_embedder(db)
                    self.store.put_vectors(db, [(rid, owner, vector)])
        return after

    def reinforce(self, ids: Sequence[str], at: datetime) -> None:
        """Strength + 1 and ``last_recalled`` = at, each id once."""
        _check_ids(ids)
        moment = micros("at", at)
        with self.store.writing(self) as db:
            owner, _ = self._owner(db)
            db.executemany(
                "UPDATE records SET strength = strength + 1, last_recalled = ?"
                " WHERE owner = ? AND id = ? AND state != ?",
                [(moment, owner, id, DELETED) for id in dict.fromkeys(ids)],
            )

    def erase(
        self, ids: Sequence[str], *, hard: bool = False, reason: str = "", at: datetime | None = None
    ) -> list[Forgotten]:
        """Delete: a tombstone that :meth:`restore` can undo, or with ``hard`` leaving no trace anywhere."""
        _check_ids(ids)
        moment = now_micros() if at is None else micros("at", at)
        with self.store.writing(self) as db:
            owner, _ = self._owner(db)
            statement = (
                f"SELECT rid, state, {self.store._row_bytes} FROM records r WHERE owner = ? AND id = ?"
            )
            rows = {id: db.execute(statement, (owner, id)).fetchone() for id in dict.fromkeys(ids)}
            if hard:
                removed = self.store.remove(db, owner, {row[0] for row in rows.values() if row})
                return [replace(one, reason=one.reason or reason or "erased") for one in removed]
            present = {id: row for id, row in rows.items() if row and row[1] != DELETED}
            if present:
                _, version, _ = self._change(db)
                db.executemany(
                    "UPDATE records SET state = ?, state_before = state, removed_at = ?, removed_why = ?,"
                    " version = ? WHERE owner = ? AND rid = ? AND state != ?",
                    [(DELETED, moment, reason, version, owner, row[0], DELETED) for row in present.values()],
                )
        return [Forgotten(id, reason or "erased", None, row[2]) for id, row in present.items()]

    def restore(self, ids: Sequence[str]) -> list[str]:
        """Undo soft deletions; the ids that came back."""
        _check_ids(ids)
        with self.store.writing(self) as db:
            owner, _ = self._owner(db)
            statement = "SELECT rid FROM records WHERE owner = ? AND id = ? AND state = ?"
            rows = {id: db.execute(statement, (owner, id, DELETED)).fetchone() for id in dict.fromkeys(ids)}
            back = {id: row[0] for id, row in rows.items() if row}
            if back:
                _, version, _ = self._change(db)
                db.executemany(
                    "UPDATE records SET state = coalesce(state_before, ?), state_before = NULL,"
                    " removed_at = NULL, removed_why = NULL, version = ? WHERE owner = ? AND rid = ?",
                    [(ACTIVE, version, owner, rid) for rid in back.values()],
                )
        return list(back)

    def erase_all(self) -> int:
        """Hard deletion of everything of this user; how many records there were."""
        with self.store.writing(self) as db:
            owner, _ = self._owner(db)
            count = 0
            page = "SELECT rid, text, kind FROM records WHERE owner = ? LIMIT 1000"
            while rows := db.execute(page, (owner,)).fetchall():
                self.store.drop_words(db, owner, [(rid, text) for rid, text, kind in rows if kind != TRACE])
                db.executemany(
                    "DELETE FROM records WHERE owner = ? AND rid = ?", [(owner, row[0]) for row in rows]
                )
                count += len(rows)
            db.execute("DELETE FROM settings WHERE owner = ?", (owner,))
            if db.execute("DELETE FROM owners WHERE owner = ?", (owner,)).rowcount:
                self.store.removed(owner)
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
        questions: int | None = None,
    ) -> list[Hit]:
        """Best ``k`` by words and vectors (see :meth:`memspan.recall.UserStore.search`)."""
        if text is None and vector is None:
            refuse("text", None, "give a text, a vector, or both")
        if k < 1:
            refuse("k", k, "use 1 or more")
        _check_kinds(kinds)
        shares = weights if weights is not None else {"vector": 1.0} if text is None else DEFAULT_WEIGHTS
        if set(shares) - set(DEFAULT_WEIGHTS) or not all(0 <= w < float("inf") for w in shares.values()):
            refuse("weights", weights, f"give numbers >= 0 for {', '.join(DEFAULT_WEIGHTS)}")
        states = _states(where)
        conditions = filters(where, self.store.dialect)
        moment = None if as_of is None else micros("as_of", as_of)
        blank = not (text or "").strip()
        row: NDArray[np.float32] | None = None
        by_words = any(shares.get(name) for name in ("words", "words_around", "words_session"))
        by_vector = any(shares.get(name) for name in ("vector", "vector_around"))
        if by_vector and (vector is not None or not blank):
            with self.store.reading(self) as db:
                self.store.guard_embedder(db)
            if vector is not None:
                row = as_vector(vector, self.embedder.dim)
            else:
                row = embedded([str(text)], self.embedder)[0]
        words = None if blank or not by_words else text
        if words is None and row is None:
            return []
        query = Query(words, row, kinds, states, moment, now_micros(), conditions, k, shares, questions)
        record = f"SELECT {_RECORD} FROM records WHERE owner = ? AND rid = ?"
        with self.store.reading(self) as db:
            owner, epoch = self._owner(db)
            if owner < 0:
                return []
            found = self.store.find(db, owner, epoch, query)
            rows = [(db.execute(record, (owner, rid)).fetchone(), *more) for rid, *more in found]
        # A row that another thread's later snapshot brought into the arrays is not in this one.
        return [Hit(from_row(found), score, parts) for found, score, parts in rows if found is not None]

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
        chosen = KINDS if kinds is None else kinds
        _check_kinds(chosen)
        _check_states(states)
        conditions = [
            (f"kind IN ({marks(chosen)})", [KINDS.index(kind) for kind in chosen]),
            (f"state IN ({marks(states)})", [STATES.index(state) for state in states]),
            *filters(where, self.store.dialect),
        ]
        return self._pages(conditions, after, limit, newest_first)

    def vectors(self, ids: Sequence[str]) -> NDArray[np.float32]:
        """Stored vectors, float32 ``(n, dim)``, in the order asked; zeros for a record without one."""
        _check_ids(ids)
        rows = np.zeros((len(ids), self.embedder.dim), np.float32)
        with self.store.reading(self) as db:
            owner, _ = self._owner(db)
            numbers = []
            for id in ids:
                row = db.execute("SELECT rid FROM records WHERE owner = ? AND id = ?", (owner, id)).fetchone()
                if row is None:
                    refuse("ids", id, "no such record of this user")
                numbers.append(row[0])
            found = self.store.read_vectors(db, numbers)
        for place, number in enumerate(numbers):
            if number in found:
                rows[place] = found[number]
        return rows

    def count(self, *, kinds: Sequence[Kind] | None = None) -> int:
        """Active records."""
        chosen = KINDS if kinds is None else kinds
        _check_kinds(chosen)
        if not chosen:
            return 0
        with self.store.reading(self) as db:
            owner, _ = self._owner(db)
            row = db.execute(
                f"SELECT count(*) FROM records WHERE owner = ? AND state = ? AND kind IN ({marks(chosen)})",
                (owner, ACTIVE, *(KINDS.index(kind) for kind in chosen)),
            ).fetchone()
        return int(row[0])

    def stats(self) -> Stats:
        """Sizes by kind and category, tombstones apart; words are this user's share of the whole index."""
        with self.store.reading(self) as db:
            owner, _ = self._owner(db)
            rows = db.execute(
                f"SELECT kind, state, count(*), sum({self.store.text_bytes}), sum(length),"
                f" coalesce(sum({self.store.vector_bytes}), 0)"
                " FROM records r LEFT JOIN vectors v ON v.rid = r.rid WHERE r.owner = ? GROUP BY kind, state",
                (owner,),
            ).fetchall()
        with self.store.reading() as db:
            index = self.store.words_bytes(db)
            everyone = db.execute("SELECT coalesce(sum(length), 0) FROM records").fetchone()[0] or 1
        kept = [row for row in rows if row[1] != DELETED]
        by_kind: Counter[str] = Counter()
        for row in kept:
            by_kind[KINDS[row[0]]] += row[2]
        return Stats(
            records=by_kind.total(),
            by_kind=dict(by_kind),
            bytes={
                "store.text": int(sum(row[3] for row in kept)),
                "store.vectors": int(sum(row[5] for row in kept)),
                "store.words": int(index * sum(row[4] for row in rows) / everyone),
                "store.tombstones": int(sum(row[3] + row[5] for row in rows if row[1] == DELETED)),
            },
        )

    def export(self, to: IO[str]) -> int:
        """All records and settings, one JSON document a line, vectors excluded; how many records."""
        count = 0
        for record in self.iterate(states=STATES):
            to.write(to_json(record) + "\n")
            count += 1
        with self.store.reading(self) as db:
            owner, _ = self._owner(db)
            rows = db.execute("SELECT key, value FROM settings WHERE owner = ?", (owner,)).fetchall()
        for key, value in sorted(rows):
            to.write(json.dumps({"setting": key, "value": json.loads(value)}, ensure_ascii=False) + "\n")
        return count

    def import_(self, lines: Iterable[str]) -> int:
        """Read what :meth:`export` wrote; ids are kept, present ids are left alone; how many were new."""
        count = 0
        batch: list[Record] = []
        with self.transaction():
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    document = json.loads(line)
                except ValueError as error:
                    refuse(f"line {number}", line, f"each line must be a JSON document ({error})")
                if isinstance(document, dict) and "setting" in document:
                    self.set_setting(document["setting"], document.get("value"))
                    continue
                batch.append(from_json(document))
                if len(batch) == _BATCH:
                    count += self._import(batch)
                    batch = []
            return count + self._import(batch)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Everything inside is written together or not at all; re-entrant."""
        with self.store.transaction(self):
            yield

    def get_setting(self, key: str) -> Any:
        """A JSON value that a policy keeps for this user, or None."""
        with self.store.reading(self) as db:
            owner, _ = self._owner(db)
            row = db.execute(
                "SELECT value FROM settings WHERE owner = ? AND key = ?", (owner, key)
            ).fetchone()
        return None if row is None else json.loads(row[0])

    def set_setting(self, key: str, value: Any) -> None:
        """Keep a JSON value for this user (None removes it)."""
        checked_name("key", key)
        try:
            text = json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            refuse("value", value, f"use only what JSON can hold ({error})")
        with self.store.writing(self) as db:
            owner, _, _ = self._change(db)
            db.execute("DELETE FROM settings WHERE owner = ? AND key = ?", (owner, key))
            if value is not None:
                db.execute("INSERT INTO settings(owner, key, value) VALUES (?, ?, ?)", (owner, key, text))

    def _owner(self, db: Database) -> tuple[int, int]:
        """This user's number and epoch; -1 before anything was written."""
        row = db.execute(
            "SELECT owner, epoch FROM owners WHERE app = ? AND name = ?", (self.app, self.user)
        ).fetchone()
        return (-1, 0) if row is None else (row[0], row[1])

    def _change(self, db: Database) -> tuple[int, int, str]:
        """This user's number, the version that a change gets now, and the last id given."""
        row = db.execute(
            "INSERT INTO owners(app, name, clock) VALUES (?, ?, 1) ON CONFLICT(app, name)"
            " DO UPDATE SET clock = owners.clock + 1 RETURNING owner, clock, last_id",
            (self.app, self.user),
        ).fetchone()
        return row[0], row[1], row[2]

    def _new_ids(self, db: Database, owner: int, records: Sequence[Record], last_id: str) -> list[str]:
        fresh = iter(ulids(sum(not record.id for record in records), last_id, time.time_ns() // 1_000_000))
        given = [record.id for record in records if record.id]
        for id, times in Counter(given).items():
            taken = db.execute("SELECT 1 FROM records WHERE owner = ? AND id = ?", (owner, id)).fetchone()
            if times > 1 or taken:
                refuse("id", id, "is in this store already; use update, or leave it empty")
        ids = [record.id or next(fresh) for record in records]
        db.execute("UPDATE owners SET last_id = ? WHERE owner = ?", (max(last_id, *ids), owner))
        return ids

    def _row(self, id: str) -> tuple[int, Record]:
        with self.store.reading(self) as db:
            owner, _ = self._owner(db)
            row = db.execute(
                f"SELECT rid, {_RECORD} FROM records WHERE owner = ? AND id = ?", (owner, id)
            ).fetchone()
        if row is None:
            refuse("id", id, "no such record of this user")
        return row[0], from_row(row[1:])

    def _pages(
        self, conditions: Sequence[Filter], after: str | None, limit: int | None, newest_first: bool
    ) -> Iterator[Record]:
        """Pages, so that no snapshot stays open while the caller works on a record."""
        clauses = " AND ".join(["owner = ?", *(sql for sql, _ in conditions)])
        values = [value for _, values in conditions for value in values]
        sign, order = ("<", "DESC") if newest_first else (">", "ASC")
        left = limit
        while left is None or left > 0:
            size = _BATCH if left is None else min(left, _BATCH)
            page, start = ("", []) if after is None else (f" AND id {sign} ?", [after])
            with self.store.reading(self) as db:
                owner, _ = self._owner(db)
                rows = db.execute(
                    f"SELECT {_RECORD} FROM records WHERE {clauses}{page} ORDER BY id {order} LIMIT ?",
                    (owner, *values, *start, size),
                ).fetchall()
            for row in rows:
                yield from_row(row)
            if len(rows) < size:
                return
            after = rows[-1][0]
            left = None if left is None else left - len(rows)

    def _import(self, records: Sequence[Record]) -> int:
        with self.store.reading(self) as db:
            owner, _ = self._owner(db)
            statement = "SELECT 1 FROM records WHERE owner = ? AND id = ?"
            seen: set[str] = set()
            new = []
            for record in records:
                if record.id not in seen and not db.execute(statement, (owner, record.id)).fetchone():
                    new.append(record)
                    seen |= {record.id} - {""}
        self.add(new)
        with self.store.writing(self) as db:  # the undo window of imported tombstones begins now
            owner, _ = self._owner(db)
            db.execute(
                "UPDATE records SET removed_at = ? WHERE owner = ? AND state = ? AND removed_at IS NULL",
                (now_micros(), owner, DELETED),
            )
        return len(new)


def embedded(texts: Sequence[str], embedder: Embedder) -> NDArray[np.float32]:
    """Unit rows, float32 ``(n, dim)``."""
    if not texts:
        return np.zeros((0, embedder.dim), np.float32)
    return checked_vectors(embedder(list(texts)), len(texts), embedder.dim)


def now_micros() -> int:
    """The present in microseconds since 1970."""
    return micros("now", datetime.now(UTC))


def marks(values: Any) -> str:
    """A question mark for each value."""
    return ", ".join("?" * len(values))


def identity(embedder: Embedder) -> str:
    """What makes vectors comparable, as it is noted in the store."""
    return json.dumps([embedder.id, embedder.dim])


def _check_ids(ids: Sequence[str]) -> None:
    if isinstance(ids, str) or not all(isinstance(id, str) for id in ids):
        refuse("ids", ids, "give a list of ids")


def _check_kinds(kinds: Sequence[Kind]) -> None:
    if isinstance(kinds, str) or set(kinds) - set(KINDS):
        refuse("kinds", kinds, f"give several of {', '.join(KINDS)}")


def _check_states(states: Sequence[State]) -> None:
    if isinstance(states, str) or set(states) - set(STATES):
        refuse("states", states, f"give several of {', '.join(STATES)}")


def _states(where: Mapping[str, Any] | None) -> Sequence[State]:
    value = (where or {}).get("state", "active")
    states: list[State] = [value] if isinstance(value, str) else list(value)  # type: ignore[list-item]
    _check_states(states)
    return states
