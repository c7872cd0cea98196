"""What every store promises, on both backends."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pytest

from memspan.base.refusal import BadInput
from memspan.data.embed import HashingEmbedder
from memspan.ledger import HoldsBytes
from memspan.recall import Record, Store, UserStore
from memspan.recall.store.rows import ulids
from recall.stores import EMBED, WHEN, day, postgres_store, records, sqlite_store


@pytest.fixture(scope="module")
def _postgres() -> Iterator[Any]:
    store = postgres_store()
    yield store
    store.close()


@pytest.fixture(params=["sqlite", "postgres"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    if request.param == "sqlite":
        with sqlite_store(tmp_path) as opened:
            yield opened
        return
    opened = request.getfixturevalue("_postgres")
    yield opened
    for user in opened.users():
        opened.for_user(user).erase_all()


def texts(hits: Any) -> list[str]:
    return [hit.record.text for hit in hits]


def test_a_store_keeps_its_protocols(store: Any) -> None:
    assert isinstance(store, Store)
    assert isinstance(store, HoldsBytes)
    assert isinstance(store.for_user("a"), UserStore)


def test_what_is_added_comes_back_equal(store: Any) -> None:
    user = store.for_user("emily")
    full = Record(
        "I moved to Kyōto 🏯",
        day(0),
        id="my.id-1",
        kind="thought",
        valid_from=day(1),
        valid_to=day(9),
        state="superseded",
        source={"role": "user", "trust": "user", "session": "s", "channel": "web"},
        evidence=("x", "y"),
        strength=2.5,
        last_recalled=day(3),
        expires_at=day(4000),
        metadata={"n": 1, "deep": {"ü": [None, True, 1.5]}},
    )
    (plain_id,) = user.add([Record("plain", day(0))])
    assert user.add([full]) == ["my.id-1"]
    assert user.get(["my.id-1", "nobody", plain_id]) == [
        full,
        Record("plain", day(0), plain_id, valid_from=day(0), last_recalled=day(0)),
    ]


def test_new_ids_rise_even_when_the_clock_goes_back(store: Any) -> None:
    user = store.for_user("emily")
    ids = [user.add(records("a"))[0] for _ in range(3)] + user.add(records("b", "c"))
    assert ids == sorted(ids)
    assert len(set(ids)) == 5
    far = ulids(1, "", 2**47)[0]
    user.add([Record("from the future", day(0), id=far)])
    assert user.add(records("d"))[0] > far


def test_words_and_vectors_find_and_every_part_is_told(store: Any) -> None:
    user = store.for_user("emily")
    user.add(records("I went to Green Meadow Park", "tea with lemon", "the parks of Paris"))
    hits = user.search("Which park did I visit?", k=3)
    assert set(texts(hits[:2])) == {"I went to Green Meadow Park", "the parks of Paris"}
    assert hits[0].parts.keys() == {"words", "words_around", "words_session", "cosine", "cosine_around"}
    assert user.search("lemons", k=1, weights={"words": 1})[0].parts.keys() == {"words"}
    assert texts(user.search(vector=EMBED(["tea with lemon"])[0], k=1)) == ["tea with lemon"]
    assert user.search("lemons", k=1, weights={"vector": 1})[0].parts.keys() == {"cosine"}


def test_chinese_and_japanese_are_found_by_words_of_any_length(store: Any) -> None:
    user = store.for_user("张曼婷")
    user.add(records("我去的是绿禾公园，看到了一朵开得特别美的樱花", "今天喝了茶", "東京タワーを見た"))
    for query, found in (("公园", 0), ("绿禾公园", 0), ("茶", 1), ("タワー", 2), ("東京", 2)):
        hit = user.search(query, k=1, weights={"words": 1})[0]
        assert hit.record.created_at == day(found), query


def test_a_query_that_is_no_query_language(store: Any) -> None:
    user = store.for_user("emily")
    user.add(records("quotes and stars"))
    for query in (
        '"',
        "a AND (",
        "NEAR(",
        "*",
        "'; DROP TABLE records",
        "%_",
        "\\",
        ":",
        "-",
        "^a",
        "NOT",
        "😀",
        "_",
    ):
        assert len(user.search(query)) == 1  # found by its vector, whatever the words are
    assert user.search(" ") == []


def test_filters(store: Any) -> None:
    user = store.for_user("emily")
    for n in range(6):
        user.add(
            [
                Record(
                    f"owl {n}",
                    day(n),
                    kind="thought" if n == 5 else "turn",
                    source={
                        "role": "user" if n % 2 else "assistant",
                        "session": f"s{n // 2}",
                        "trust": "tool",
                    },
                    metadata={"n": n, "odd": bool(n % 2), "name": f"x{n}", "none": None},
                )
            ]
        )
    user.add([Record("owl portrait", day(0), kind="portrait")])

    def found(**where: Any) -> list[int]:
        hits = user.search("owl", where={key.replace("__", "."): value for key, value in where.items()})
        assert [
            r.metadata["n"]
            for r in user.iterate(where={k.replace("__", "."): v for k, v in where.items()})
            if r.kind != "portrait"
        ] == sorted(h.record.metadata["n"] for h in hits)
        return sorted(hit.record.metadata["n"] for hit in hits)

    assert found() == [0, 1, 2, 3, 4, 5]
    assert found(session="s1") == [2, 3]
    assert found(role="user", session=["s0", "s1"]) == [1, 3]
    assert found(since=day(2), until=day(4)) == [2, 3]
    assert found(metadata__n=3) == found(metadata__n=3.0) == [3]
    assert found(metadata__n=[1, 5]) == [1, 5]
    assert found(metadata__odd=True) == [1, 3, 5]
    assert found(metadata__odd=1) == found(metadata__n="3") == found(metadata__lacking=None) == []
    assert found(metadata__none=None) == [0, 1, 2, 3, 4, 5]
    assert found(metadata__name="x2", trust="tool") == [2]
    assert found(session=[]) == []
    assert [h.record.kind for h in user.search("owl", kinds=("portrait",))] == ["portrait"]
    assert user.count() == 7
    assert user.count(kinds=("thought", "portrait")) == 2


def test_as_of_shows_what_held_then(store: Any) -> None:
    user = store.for_user("emily")
    (old,) = user.add([Record("Emily lives in Rome", day(0))])
    user.add([Record("Emily lives in Oslo", day(10), expires_at=day(5000))])
    user.update(old, state="superseded", valid_to=day(10))
    assert texts(user.search("lives")) == ["Emily lives in Oslo"]
    assert texts(user.search("lives", as_of=day(5))) == ["Emily lives in Rome"]
    assert texts(user.search("lives", as_of=day(10))) == ["Emily lives in Oslo"]
    assert user.search("lives", as_of=day(-1)) == user.search("lives", as_of=day(6000)) == []
    assert texts(user.search("lives", where={"state": "superseded"})) == ["Emily lives in Rome"]


def test_what_has_expired_is_not_found_and_then_swept(store: Any) -> None:
    user = store.for_user("emily")
    user.add([Record("short note", day(0), expires_at=day(1)), Record("long note", day(0))])
    assert texts(user.search("note")) == ["long note"]
    assert texts(user.search("note", as_of=day(0.5))) == ["short note", "long note"]
    assert store.sweep_expired(day(0.5)) == 0
    assert store.sweep_expired(day(1)) == 1
    assert [r.text for r in user.iterate()] == ["long note"]


def test_updating_a_text_moves_its_words_and_its_vector(store: Any) -> None:
    user = store.for_user("emily")
    first, second = user.add(records("a red fox", "a grey owl"))
    changed = user.update(first, text="a blue whale", metadata={"seen": 1})
    assert changed == user.get([first])[0]
    assert texts(user.search("whale", k=1)) == ["a blue whale"]
    assert "words" not in user.search("fox", k=1)[0].parts
    np.testing.assert_allclose(user.vectors([first])[0], EMBED(["a blue whale"])[0], atol=1e-3)
    user.update(second, kind="trace")
    assert texts(user.search("owl")) == ["a blue whale"]
    user.update(second, kind="turn")
    assert texts(user.search("owl", k=1)) == ["a grey owl"]
    assert store.check() == []


def test_reinforcing_counts_each_id_once(store: Any) -> None:
    user = store.for_user("emily")
    first, second = user.add(records("a", "b"))
    user.reinforce([first, first, "nobody"], day(7))
    a, b = user.get([first, second])
    assert (a.strength, a.last_recalled) == (2, day(7))
    assert (b.strength, b.last_recalled) == (1, day(1))


def test_soft_deletion_can_be_undone_until_the_window_closes(store: Any) -> None:
    user = store.for_user("emily")
    first, second = user.add(records("a fox", "an owl"))
    (gone,) = user.erase([first, first, "nobody"], reason="asked", at=day(10))
    assert (gone.id, gone.reason) == (first, "asked")
    assert gone.nbytes == 5 + 2 * EMBED.dim
    assert user.erase([first]) == []
    assert user.get([first]) == []
    assert texts(user.search("fox")) == ["an owl"]
    assert user.stats()["bytes"]["store.tombstones"] == gone.nbytes
    assert store.sweep_expired(day(39), undo_days=30) == 0
    assert user.restore([first, second]) == [first]
    assert texts(user.search("fox", k=1)) == ["a fox"]
    user.erase([first], at=day(10))
    assert store.sweep_expired(day(41), undo_days=30) == 1
    assert user.restore([first]) == []
    assert store.check() == []


def test_hard_deletion_takes_what_stems_from_the_record_alone(store: Any) -> None:
    user = store.for_user("emily")
    a, b = user.add(records("turn a", "turn b"))
    (both,) = user.add([Record("of both", day(1), kind="thought", evidence=(a, b))])
    (retold,) = user.add([Record("turn a and b", day(1), kind="summary", evidence=(a, b))])
    (alone,) = user.add([Record("of a", day(1), kind="summary", evidence=(a,))])
    (second,) = user.add([Record("of the summary of a", day(2), kind="thought", evidence=(alone,))])
    gone = user.erase([a], hard=True, reason="asked")
    assert {f.id: f.reason for f in gone} == {
        a: "asked",
        alone: "its evidence was deleted",
        second: "its evidence was deleted",
        retold: "its evidence was deleted",
    }
    assert user.get([both])[0].evidence == (b,)
    assert [r.id for r in user.iterate()] == [b, both]
    assert store.check() == []


def test_a_transaction_is_all_or_nothing_and_sees_itself(store: Any) -> None:
    user = store.for_user("emily")
    user.add(records("kept fox"))
    with pytest.raises(RuntimeError, match="stop"), user.transaction():
        (new,) = user.add(records("lost fox"))
        with user.transaction():
            user.set_setting("seen", 1)
        assert set(texts(user.search("fox"))) == {"kept fox", "lost fox"}
        user.erase([new])
        assert texts(user.search("fox")) == ["kept fox"]
        user.restore([new])
        raise RuntimeError("stop")
    assert texts(user.search("fox")) == ["kept fox"]
    assert user.get_setting("seen") is None
    assert store.check() == []
    with user.transaction():
        user.add(records("second fox"))
    assert len(user.search("fox")) == 2


def test_another_thread_does_not_see_what_is_not_committed(store: Any) -> None:
    user = store.for_user("emily")
    user.add(records("kept fox"))
    seen: list[list[str]] = []
    with user.transaction():
        user.add(records("new fox"))
        user.search("fox")
        thread = threading.Thread(target=lambda: seen.append(texts(user.search("fox"))))
        thread.start()
        thread.join()
    assert seen == [["kept fox"]]


def test_export_and_import_is_the_identity(store: Any) -> None:
    user = store.for_user("emily")
    ids = user.add(records("a fox", "an owl", "名前", metadata={"k": [1, {"é": None}]}))
    user.add([Record("sum", day(2), kind="summary", evidence=tuple(ids), expires_at=day(9000))])
    user.reinforce(ids[:1], day(5))
    user.erase(ids[1:2])
    user.set_setting("portrait", {"name": "Emily"})
    out = io.StringIO()
    assert user.export(out) == 4
    other = store.for_user("copy")
    assert other.import_(out.getvalue().splitlines()) == 4
    assert other.import_(out.getvalue().splitlines()) == 0
    again = io.StringIO()
    other.export(again)
    assert again.getvalue() == out.getvalue()
    assert [h.record.id for h in other.search("fox")] == [h.record.id for h in user.search("fox")]
    assert other.restore(ids[1:2]) == ids[1:2]
    for line in (
        "not json",
        "[]",
        '{"text": "a"}',
        json.dumps({"text": "a", "created_at": "2023-05-02T00:00:00"}),
    ):
        with pytest.raises(BadInput):
            other.import_([line])


def test_pages_by_key_hold_every_record_once(store: Any) -> None:
    user = store.for_user("emily")
    ids = user.add([Record(f"n {n}", day(n)) for n in range(23)])
    forward, after = [], None
    while page := [r.id for r in user.iterate(after=after, limit=5)]:
        forward += page
        after = page[-1]
    assert forward == ids
    assert [r.id for r in user.iterate(newest_first=True)] == ids[::-1]
    assert [r.id for r in user.iterate(newest_first=True, after=ids[2])] == ids[1::-1]


def test_one_instant_in_two_zones_is_one_instant(store: Any) -> None:
    user = store.for_user("emily")
    east = datetime(2023, 5, 2, 14, tzinfo=timezone(timedelta(hours=2)))
    rome = ZoneInfo("Europe/Rome")
    night = [
        datetime(2023, 10, 29, 2, 30, tzinfo=rome, fold=fold) for fold in (0, 1)
    ]  # clocks go back between
    ids = user.add([Record("east", east), Record("utc", WHEN), *(Record("night", at) for at in night)])
    a, b, c, d = user.get(ids)
    assert a.created_at == b.created_at
    assert d.created_at - c.created_at == timedelta(hours=1)
    assert len(user.search("night", where={"since": night[1]})) == 1


def test_a_trace_is_kept_and_never_recalled(store: Any) -> None:
    user = store.for_user("emily")
    (id,) = user.add([Record("prompt with fox", day(0), kind="trace")])
    assert user.search("fox") == []
    assert user.get([id])[0].kind == "trace"
    assert not user.vectors([id]).any()
    assert store.check() == []


def test_settings_hold_json(store: Any) -> None:
    user = store.for_user("emily")
    user.set_setting("k", {"a": [1, None]})
    assert user.get_setting("k") == {"a": [1, None]}
    user.set_setting("k", None)
    assert user.get_setting("k") is None
    with pytest.raises(BadInput, match="value"):
        user.set_setting("k", float("nan"))


def test_another_embedder_is_refused_until_reindexed(store: Any) -> None:
    user = store.for_user("emily")
    user.add(records("a fox", "an owl"))
    before, other = store.embedder, HashingEmbedder(32)
    store.embedder = other
    try:
        for call in (lambda: user.add(records("new")), lambda: user.search("fox")):
            with pytest.raises(BadInput, match="reindex"):
                call()
        assert user.count() == 2  # reading goes on
        assert store.reindex(other) >= 2
        assert user.vectors([r.id for r in user.iterate()]).shape == (2, 32)
        assert texts(user.search("fox", k=1)) == ["a fox"]
        user.add(records("new"))
        assert store.check() == []
    finally:
        store.reindex(before)


def test_bad_input_is_refused_and_changes_nothing(store: Any) -> None:
    user = store.for_user("emily")
    (id,) = user.add(records("a fox"))
    good = Record("x", day(0))
    nan = np.full(EMBED.dim, np.nan, np.float32)
    for call in (
        lambda: store.for_user(""),
        lambda: store.for_user("x" * 257),
        lambda: store.for_user("\ud800"),
        lambda: store.for_user("a\0b"),
        lambda: store.for_user(None),
        lambda: user.add([replace(good, text=" ")]),
        lambda: user.add([replace(good, text="a\0")]),
        lambda: user.add([replace(good, text="x" * 1_000_001)]),
        lambda: user.add([replace(good, created_at=datetime(2023, 5, 2))]),
        lambda: user.add([good, replace(good, kind="dream")]),
        lambda: user.add([replace(good, state="lost")]),
        lambda: user.add([replace(good, id="a b")]),
        lambda: user.add([replace(good, id=id)]),
        lambda: user.add([replace(good, id="twice"), replace(good, id="twice")]),
        lambda: user.add([replace(good, strength=0)]),
        lambda: user.add([replace(good, metadata={"x": object()})]),
        lambda: user.add([replace(good, metadata={"x": "a\0"})]),
        lambda: user.add([replace(good, source={"trust": "god"})]),
        lambda: user.add([replace(good, source={"planet": "x"})]),
        lambda: user.add([good], vectors=nan[None]),
        lambda: user.add([good], vectors=np.ones((1, 3))),
        lambda: user.search(),
        lambda: user.search("fox", k=0),
        lambda: user.search(vector=nan),
        lambda: user.search(vector=np.ones(3)),
        lambda: user.search("fox", kinds="turn"),
        lambda: user.search("fox", where={"owner": 1}),
        lambda: user.search("fox", where={"metadata.a'b": 1}),
        lambda: user.search("fox", where={"state": "lost"}),
        lambda: user.search("fox", where={"session": 3}),
        lambda: user.search("fox", weights={"stars": 1}),
        lambda: user.search("fox", weights={"words": -1}),
        lambda: user.search("fox", as_of=datetime(2023, 5, 2)),
        lambda: user.update(id, owner=3),
        lambda: user.update(id),
        lambda: user.update("nobody", text="x"),
        lambda: user.get("abc"),
        lambda: user.erase("abc"),
        lambda: user.iterate(limit=0),
        lambda: user.vectors(["nobody"]),
        lambda: store.sweep_expired(day(0), undo_days=-1),
    ):
        with pytest.raises(BadInput):
            call()
    assert [r.text for r in user.iterate(states=("active", "deleted"))] == ["a fox"]
    assert store.check() == []


def test_a_closed_store_refuses_calls(tmp_path: Path) -> None:
    store = sqlite_store(tmp_path)
    store.close()
    with pytest.raises(BadInput, match="closed"):
        store.for_user("a").count()
