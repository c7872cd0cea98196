"""Who sees what, what remains after deletion, and what survives a kill or a full disk (SQLite)."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from memspan.base.refusal import BadInput
from memspan.base.rng import rng
from memspan.recall import Record, StoreBusy, StoreFull
from memspan.recall.store import StoreGone
from recall.stores import EMBED, day, records, sqlite_store

NAMES = (
    *(
        "Jason",
        " Jason ",
        "jason",
        "a_b",
        "a%b",
        "a",
        "../x",
        "'; drop table records; --",
        '"',
        "𝒥",
        "J",
        "\n",
    ),
    *("1x", "0", "e\u0301", "-1", "NULL", "x" * 256),
)
FEW = ("Jason", " Jason ", "a_b", "../x", "'; drop table records; --", "𝒥")
SHARED = "owl fox park"  # every user speaks of these


class ManyUsersApart(RuleBasedStateMachine):
    """Every user's memory against a dictionary of its own; a private word marks whose text it is."""

    ids = Bundle("ids")
    folder: Path

    def __init__(self) -> None:
        super().__init__()
        name = f"{len(list(self.folder.iterdir()))}"
        (self.folder / name).mkdir()
        self.store = sqlite_store(self.folder / name)
        self.model: dict[str, dict[str, str]] = {name: {} for name in FEW}

    def own(self, user: str) -> str:
        return f"private{FEW.index(user)}secret"

    @rule(
        target=ids, user=st.sampled_from(FEW), word=st.sampled_from(SHARED.split()), count=st.integers(1, 3)
    )
    def add(self, user: str, word: str, count: int) -> Any:
        texts = [f"{word} {self.own(user)}"] * count
        new = self.store.for_user(user).add([Record(text, day(0)) for text in texts])
        self.model[user].update(zip(new, texts, strict=True))
        return multiple(*((user, id) for id in new))

    @rule(pair=ids, other=st.sampled_from(FEW))
    def one_cannot_touch_anothers_ids(self, pair: tuple[str, str], other: str) -> None:
        owner, id = pair
        if other == owner or id in self.model[other]:  # an id of one's own, by the rule below
            return
        user = self.store.for_user(other)
        assert user.get([id]) == []
        assert user.erase([id]) == user.erase([id], hard=True) == []
        assert user.restore([id]) == []
        user.reinforce([id], day(1))
        for call in (lambda: user.update(id, text="mine now"), lambda: user.vectors([id])):
            with pytest.raises(BadInput):
                call()

    @rule(pair=ids, other=st.sampled_from(FEW))
    def one_may_use_the_same_id(self, pair: tuple[str, str], other: str) -> None:
        owner, id = pair
        if other != owner and id not in self.model[other]:
            text = f"owl {self.own(other)}"
            self.store.for_user(other).add([Record(text, day(0), id=id)])
            self.model[other][id] = text

    @rule(pair=consumes(ids), hard=st.booleans())
    def erase(self, pair: tuple[str, str], hard: bool) -> None:
        owner, id = pair
        gone = self.store.for_user(owner).erase([id], hard=hard)
        assert [g.id for g in gone] == ([id] if self.model[owner].pop(id, None) else [])

    @rule(user=st.sampled_from(FEW))
    def erase_all(self, user: str) -> None:
        self.store.for_user(user).erase_all()
        self.model[user] = {}

    @rule(
        user=st.sampled_from(FEW), query=st.sampled_from([SHARED, *(f"private{n}secret" for n in range(4))])
    )
    def search(self, user: str, query: str) -> None:
        hits = self.store.for_user(user).search(query, k=1000)
        assert {hit.record.id: hit.record.text for hit in hits} == self.model[user]

    @rule(user=st.sampled_from(FEW), value=st.integers())
    def setting(self, user: str, value: int) -> None:
        handle = self.store.for_user(user)
        handle.set_setting("k", [user, value])
        assert handle.get_setting("k") == [user, value]

    @invariant()
    def everyone_has_their_own_and_nothing_else(self) -> None:
        for name, held in self.model.items():
            user = self.store.for_user(name)
            assert {r.id: r.text for r in user.iterate()} == held
            assert user.count() == len(held)
            kept = user.get_setting("k")
            assert kept is None or kept[0] == name

    def teardown(self) -> None:
        assert [self.store.for_user(name).stats()["records"] for name in FEW] == [
            len(h) for h in self.model.values()
        ]
        assert self.store.check() == []
        self.store.close()


def test_no_call_for_one_user_touches_another(tmp_path: Path) -> None:
    machine = type("Machine", (ManyUsersApart,), {"folder": tmp_path})
    machine.TestCase.settings = settings(
        max_examples=10, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
    )
    machine.TestCase().runTest()


def test_names_that_normalise_alike_are_one_user_and_others_are_not(tmp_path: Path) -> None:
    with sqlite_store(tmp_path) as store:
        for name in NAMES:
            store.for_user(name).add([Record("x", day(0))])
        assert len(store.users()) == len(NAMES)
        assert store.for_user("\u00e9").count() == 1  # e with a combining accent
        assert store.for_user("Jason", app="other").count() == 0
        assert not list(tmp_path.glob("**/*Jason*"))


def test_scores_do_not_depend_on_other_users(tmp_path: Path) -> None:
    with sqlite_store(tmp_path) as store:
        user = store.for_user("emily")
        user.add(records("a red fox", "a grey owl", "owls and foxes", "tea"))
        before = user.search("red owl fox")
        for n in range(20):
            store.for_user(f"other {n}").add(records(*["red owl"] * 5))
        assert user.search("red owl fox") == before


def traces(folder: Path, words: list[str]) -> list[tuple[str, str]]:
    """Which of the words stand in which file, as UTF-8 or UTF-16, whatever the case."""
    found = []
    for file in folder.rglob("*"):
        if file.is_file():
            raw = file.read_bytes().lower()
            found += [(file.name, w) for w in words if w.encode() in raw or w.encode("utf-16-le") in raw]
    return found


def plant(user: Any, name: str, n: int) -> list[str]:
    """Texts of random words that nobody else says; the words."""
    draw = rng("planted words", name)
    words = ["".join(draw.choice(list("bcdfghjklmnpqrstvwxz"), 9)) for _ in range(3 * n)]
    texts = [" ".join(words[i : i + 3]) for i in range(0, 3 * n, 3)]
    ids = user.add([Record(text, day(i), metadata={"note": words[3 * i]}) for i, text in enumerate(texts)])
    user.add([Record(f"sum {words[0]}", day(1), kind="summary", evidence=(ids[0],))])
    user.add([Record(f"trace {words[1]}", day(1), kind="trace")])
    user.update(ids[1], text=f"changed {words[4]}")
    user.erase(ids[2:4], reason=words[6])
    user.set_setting("portrait", {"traits": words[:5]})
    user.search(words[0])
    return words


@pytest.mark.parametrize("index", [False, True])
def test_nothing_of_a_user_remains_after_forgetting_them(tmp_path: Path, index: bool) -> None:
    with sqlite_store(tmp_path, exact_below=0 if index else 100_000) as store:
        gone, stays = store.for_user("leaving soon"), store.for_user("staying")
        words = plant(gone, "gone", 200)
        kept = plant(stays, "kept", 200)
        if index:
            pytest.importorskip("usearch")
            store.build_index(gone)
            store.build_index(stays)
            assert len(list(tmp_path.rglob("*.usearch"))) == 2
        assert traces(tmp_path, words[:3])  # the scan sees them while they are there
        vectors = gone.vectors([r.id for r in gone.iterate(limit=5)]).astype(np.float16)
        assert gone.erase_all() == 202
        assert traces(tmp_path, [*words, "leaving soon"]) == []
        raw = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
        assert not any(row.tobytes() in raw for row in vectors)
        assert len(list(tmp_path.rglob("*.usearch"))) == index
        assert stays.count() == 200
        assert stays.search(kept[0], k=1)[0].record.text.endswith(kept[0])
        assert store.check() == []
        assert store.users() == ["staying"]


def test_nothing_of_one_record_remains_after_erasing_it_for_good(tmp_path: Path) -> None:
    with sqlite_store(tmp_path) as store:
        user = store.for_user("emily")
        ids = [id for n in range(30) for id in user.add(records(f"common words{n} of the day"))]
        (id,) = user.add([Record("xylograph quincunx", day(0), metadata={"k": "zugzwang"})])
        (derived,) = user.add([Record("gist syzygy", day(0), kind="summary", evidence=(id,))])
        user.add([Record("both", day(0), kind="summary", evidence=(id, ids[0]))])
        user.erase([id], hard=True)
        assert (
            traces(tmp_path, ["xylograph", "quincunx", "zugzwang", "syzygy", id.lower(), derived.lower()])
            == []
        )
        assert store.check() == []


def test_swept_tombstones_leave_no_trace(tmp_path: Path) -> None:
    with sqlite_store(tmp_path) as store:
        user = store.for_user("emily")
        ids = user.add(records("xylograph", "kept"))
        user.erase(ids[:1], at=day(0), reason="zugzwang")
        assert traces(tmp_path, ["xylograph"])
        store.sweep_expired(day(31))
        assert traces(tmp_path, ["xylograph", "zugzwang"]) == []


def test_a_purge_that_was_stopped_is_done_at_the_next_opening(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with sqlite_store(tmp_path, busy_seconds=0.2) as store:
        user = store.for_user("emily")
        ids = user.add(records("xylograph", "kept"))
        other = sqlite3.connect(tmp_path / "me.db")
        other.execute("BEGIN")
        other.execute("SELECT count(*) FROM records").fetchone()
        with pytest.raises(StoreBusy, match="reader"):
            user.erase(ids[:1], hard=True)
        assert user.get(ids[:1]) == []
        other.close()
    with sqlite_store(tmp_path) as store:
        assert traces(tmp_path, ["xylograph"]) == []


def test_every_connection_is_durable(tmp_path: Path) -> None:
    with sqlite_store(tmp_path) as store:
        found: list[tuple[Any, ...]] = []

        def ask() -> None:
            with store.reading() as db:
                names = ("synchronous", "journal_mode", "foreign_keys", "secure_delete", "busy_timeout")
                found.append(tuple(db.execute(f"PRAGMA {name}").fetchone()[0] for name in names))

        ask()
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
        assert found == [(2, "wal", 1, 1, 30_000)] * 2


WRITER = """
import sys
from datetime import UTC, datetime
from pathlib import Path
sys.path[:0] = {path!r}
from memspan.data.embed import HashingEmbedder
from memspan.recall import Record, SQLiteStore
store = SQLiteStore(Path(sys.argv[1]), HashingEmbedder(64))
user = store.for_user(sys.argv[2])
when = datetime(2023, 5, 2, tzinfo=UTC)
for n in range({count}):
    kind = n % 10
    if kind == 9:
        user.erase([id])
    elif kind == 8:
        user.update(id, text=f"changed {{n}} by {{sys.argv[2]}}")
    else:
        with user.transaction():
            (id,) = user.add([Record(f"turn {{n}} of {{sys.argv[2]}}", when)])
            user.set_setting("last", n)
    print(n, id, flush=True)
"""


def run_and_kill(
    folder: Path, processes: int, count: int, acknowledged_before_kill: int
) -> list[tuple[str, str]]:
    """Writers in processes of their own, killed from outside at work; what they had acknowledged."""
    script = folder / "writer.py"
    script.write_text(WRITER.format(path=[p for p in sys.path if p], count=count))
    running = [
        subprocess.Popen(
            [sys.executable, str(script), str(folder / "me.db"), f"u{n}"], stdout=subprocess.PIPE, text=True
        )
        for n in range(processes)
    ]
    lines: list[list[str]] = [[] for _ in running]
    enough = threading.Event()

    def follow(place: int) -> None:
        assert running[place].stdout is not None
        for line in running[place].stdout:
            if line.endswith("\n"):
                lines[place].append(line)
                if sum(map(len, lines)) >= acknowledged_before_kill:
                    enough.set()

    threads = [threading.Thread(target=follow, args=(n,)) for n in range(processes)]
    for thread in threads:
        thread.start()
    enough.wait(300)
    for process in running:
        os.kill(process.pid, signal.SIGKILL)
    for process, thread in zip(running, threads, strict=True):
        process.wait()
        thread.join()
    return [(f"u{n}", line) for n, held in enumerate(lines) for line in held]


def assert_nothing_acknowledged_is_lost(folder: Path, acknowledged: list[tuple[str, str]]) -> None:
    with sqlite_store(folder) as store:
        assert store.check() == []  # integrity, and rows, words and vectors agree
        with store.reading() as db:
            assert db.execute("PRAGMA synchronous").fetchone() == (2,)
        alive: dict[str, set[str]] = {}
        erased: dict[str, set[str]] = {}
        for user, line in acknowledged:
            number, id = line.split()
            (erased if int(number) % 10 == 9 else alive).setdefault(user, set()).add(id)
        for user in alive:
            there = {r.id for r in store.for_user(user).iterate(states=("active", "deleted"))}
            assert alive[user] <= there
            gone = {r.id for r in store.for_user(user).iterate(states=("deleted",))}
            assert erased.get(user, set()) <= gone
            last = max(int(line.split()[0]) for name, line in acknowledged if name == user)
            assert store.for_user(user).get_setting("last") >= last - last % 10


def test_a_kill_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    acknowledged = run_and_kill(tmp_path, processes=2, count=10_000, acknowledged_before_kill=150)
    assert len(acknowledged) >= 150
    assert_nothing_acknowledged_is_lost(tmp_path, acknowledged)


@pytest.mark.slow
def test_a_kill_amid_ten_thousand_writes_by_sixteen_processes_loses_nothing(tmp_path: Path) -> None:
    acknowledged = run_and_kill(tmp_path, processes=16, count=625, acknowledged_before_kill=5_000)
    assert len({user for user, _ in acknowledged}) == 16
    assert_nothing_acknowledged_is_lost(tmp_path, acknowledged)


def test_a_full_disk_is_an_error_that_loses_nothing_and_ends_by_itself(tmp_path: Path) -> None:
    with sqlite_store(tmp_path) as store:
        user = store.for_user("emily")
        kept = user.add(records("a fox"))
        with store.reading() as db:
            pages = db.execute("PRAGMA page_count").fetchone()[0]
            db.execute(f"PRAGMA max_page_count = {pages + 20}")
        acknowledged = list(kept)
        with pytest.raises(StoreFull):
            for n in range(1000):
                acknowledged += user.add(records(f"a longer text about owl {n} " + "and more " * 50))
        assert len(acknowledged) > 1
        user.erase(kept)  # what needs no room goes on
        user.restore(kept)
        assert [r.id for r in user.iterate()] == acknowledged
        assert user.search("fox", k=1)[0].record.id == kept[0]
        assert store.check() == []
        with store.reading() as db:
            db.execute("PRAGMA max_page_count = 1000000")
        assert user.add(records("space again"))
    with sqlite_store(tmp_path) as store:
        assert store.for_user("emily").count() == len(acknowledged) + 1


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from pathlib import Path
sys.path[:0] = {path!r}
from datetime import UTC, datetime
from memspan.data.embed import HashingEmbedder
from memspan.recall import Record, SQLiteStore, StoreFull
store = SQLiteStore(Path(sys.argv[1]), HashingEmbedder(64))
user = store.for_user("emily")
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
done = 0
try:
    for n in range(10_000):
        user.add([Record(f"text {{n}} " + "and more " * 50, datetime(2023, 5, 2, tzinfo=UTC))])
        done += 1
except StoreFull:
    try:
        user.add([Record("once more", datetime(2023, 5, 2, tzinfo=UTC))])
    except StoreFull:
        print(done, user.count(), flush=True)
"""


def test_a_file_that_cannot_grow_is_an_error_that_loses_nothing(tmp_path: Path) -> None:
    script = tmp_path / "limited.py"
    script.write_text(LIMITED.format(path=[p for p in sys.path if p]))
    command = [sys.executable, str(script), str(tmp_path / "me.db")]
    out = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert re.fullmatch(r"\d+ \d+\n", out.stdout), out.stderr
    done, counted = map(int, out.stdout.split())
    assert done == counted > 10
    with sqlite_store(tmp_path) as store:
        assert store.for_user("emily").count() == done
        assert store.check() == []


def test_a_busy_file_is_a_clear_error(tmp_path: Path) -> None:
    with sqlite_store(tmp_path, busy_seconds=0.05) as store:
        user = store.for_user("emily")
        user.add(records("a fox"))
        other = sqlite3.connect(tmp_path / "me.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreBusy, match="try again"):
            user.add(records("an owl"))
        assert user.count() == 1  # reading goes on
        other.execute("COMMIT")
        other.close()
        assert len(user.add(records("an owl"))) == 1


def test_many_threads_write_and_search_one_store(tmp_path: Path) -> None:
    with sqlite_store(tmp_path) as store:
        errors: list[BaseException] = []

        def work(n: int) -> None:
            try:
                user = store.for_user(f"u{n % 3}")
                for i in range(15):
                    user.add(records(f"owl {n} {i}"))
                    assert user.search(f"owl {n} {i}", k=3)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert [store.for_user(f"u{n}").count() for n in range(3)] == [30, 30, 30]
        assert store.check() == []


def test_files_that_are_no_store_are_refused(tmp_path: Path) -> None:
    from memspan.recall import SQLiteStore, open_store

    for path in (tmp_path, ":memory:", "", "sqlite:///", "sqlite://x/y.db", "mysql://x"):
        with pytest.raises(BadInput):
            open_store(path, EMBED)
    later = sqlite3.connect(tmp_path / "later.db")
    later.execute("PRAGMA user_version = 999")
    later.close()
    with pytest.raises(BadInput, match="later memspan"):
        SQLiteStore(tmp_path / "later.db", EMBED)
    for options in ({"dtype": "int8"}, {"busy_seconds": 0}, {"exact_below": -1}):
        with pytest.raises(BadInput):
            SQLiteStore(tmp_path / "x.db", EMBED, **options)


def test_a_migration_that_was_stopped_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from memspan.recall import SQLiteStore
    from memspan.recall.store.base import Database, Migration

    with sqlite_store(tmp_path) as store:
        store.for_user("emily").add(records(*[f"n{n}" for n in range(25)]))
    seen: list[int] = []
    stop_at = 10

    def page(db: Database, after: int) -> int | None:
        rows = [rid for (rid,) in db.execute("SELECT rid FROM records WHERE rid > ? LIMIT 5", (after,))]
        if len(seen) >= stop_at:
            raise KeyboardInterrupt
        seen.extend(rows)
        db.execute(
            "UPDATE records SET strength = strength + 1 WHERE rid > ? AND rid <= ?", (after, after + 5)
        )
        return max(rows) if rows else None

    monkeypatch.setattr(SQLiteStore, "migrations", (*SQLiteStore.migrations, Migration(4, page)))
    with pytest.raises(KeyboardInterrupt):
        sqlite_store(tmp_path)
    stop_at = 1000
    with caplog.at_level("INFO", "memspan.recall"), sqlite_store(tmp_path) as store:
        assert [r.strength for r in store.for_user("emily").iterate()] == [2.0] * 25
        assert seen == list(range(1, 26))
    assert "schema 4: row 15 of 25" in caplog.text
    monkeypatch.undo()
    with pytest.raises(BadInput, match="later memspan"):
        sqlite_store(tmp_path)


def test_a_reindex_that_was_stopped_goes_on_where_it_was(tmp_path: Path) -> None:
    from memspan.data.embed import HashingEmbedder

    class Counting(HashingEmbedder):
        seen = 0
        limit = 300

        def __call__(self, texts: Any) -> Any:
            if self.seen >= self.limit:
                raise KeyboardInterrupt
            self.seen += len(texts)
            return super().__call__(texts)

    with sqlite_store(tmp_path) as store:
        user = store.for_user("emily")
        user.add(records(*[f"owl {n}" for n in range(600)]))
        other = Counting(32)
        with pytest.raises(KeyboardInterrupt):
            store.reindex(other)
        assert user.search("owl 7", k=1)[0].record.text == "owl 7"  # the former vectors serve on
        user.add(records("a late fox"))
        other.limit = 10_000
        before = other.seen
        assert store.reindex(other) == 601 - before
        assert other.seen == 601  # nothing was embedded twice
        assert user.search("late fox", k=1)[0].record.text == "a late fox"
        assert store.check() == []


def test_check_finds_a_planted_mismatch_and_reindex_repairs_it(tmp_path: Path) -> None:
    with sqlite_store(tmp_path) as store:
        user = store.for_user("emily")
        ids = user.add(records("a red fox", "a grey owl", "tea"))
        for damage, told in (
            ("DELETE FROM vectors WHERE rid = 1", f"no vector for record {ids[0]}"),
            (
                "UPDATE records SET text = 'a blue whale' WHERE rid = 2",
                f"words of record {ids[1]} differ from its text",
            ),
            (
                "INSERT INTO words(words) VALUES ('delete-all')",
                f"words of record {ids[2]} differ from its text",
            ),
            ("UPDATE vectors SET vec = x'00' WHERE rid = 3", "vector 3 of a wrong size"),
            ("INSERT INTO words(rowid, terms) VALUES (99, '1xghost')", "words 99 of no record"),
        ):
            with store.writing() as db:
                db.execute(damage)
            assert told in store.check()
            store.reindex()
            assert store.check() == []
        assert user.search("whale", k=1)[0].record.text == "a blue whale"


def test_a_file_that_is_gone_takes_no_more_writes(tmp_path: Path) -> None:
    with sqlite_store(tmp_path) as store:
        user = store.for_user("emily")
        user.add(records("a fox"))
        store.ping()
        store.path.unlink()
        for write in (lambda: user.add(records("lost")), lambda: user.set_setting("a", 1), store.ping):
            with pytest.raises(StoreGone, match="removed or replaced"):
                write()


def test_connections_do_not_grow_with_threads_and_writers_keep_their_order(tmp_path: Path) -> None:
    with sqlite_store(tmp_path) as store:
        user = store.for_user("emily")
        user.add(records("a fox"))

        def work(n: int) -> None:
            user.search("fox", k=1)
            user.add(records(f"owl {n}"))

        for _ in range(3):  # each round in threads of its own, which then end
            threads = [threading.Thread(target=work, args=(n,)) for n in range(24)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert len(store._pool._idle) <= 16
        assert user.count() == 73
        assert store.check() == []


def test_with_the_write_lock_held_elsewhere_a_prompt_is_made_at_once(tmp_path: Path) -> None:
    from memspan.recall import Memory

    with sqlite_store(tmp_path, busy_seconds=0.2) as store:
        memory = Memory(store, "emily")
        memory.observe(user="I live in Lyon")
        other = sqlite3.connect(store.path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        packed = memory.prompt("Where do I live?")
        assert "Lyon" in packed[0]["content"]
        assert memory.used(packed, "You live in Lyon") == packed.used  # best effort
        other.execute("ROLLBACK")
        other.close()
        assert memory.store.get(packed.used)[0].strength == 1
