"""Random sequences of operations give the same ids, order and scores on SQLite and on Postgres."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import numpy as np
import pytest

from memspan.base.rng import rng
from memspan.recall import Hit, Record
from recall.stores import day, postgres_store, sqlite_store

WORDS = [
    "owl",
    "fox",
    "park",
    "parks",
    "visit",
    "visited",
    "Kyōto",
    "résumé",
    "naïve",
    "樱花",
    "公园",
    "running",
    "runs",
    "ran",
    "tea",
    "Tea",
    "lemon",
    "42",
    "4.5",
    "a_b",
    "don't",
    "blue",
    "whale",
    "whales",
    "the",
    "of",
    "and",
    "who",
]
KINDS = ("turn", "turn", "turn", "thought", "summary", "portrait", "trace")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    postgres = postgres_store()
    with sqlite_store(tmp_path_factory.mktemp("pair"), dtype="float16") as sqlite:
        yield sqlite, postgres
    postgres.close()


def play(user: Any, seed: int) -> list[Any]:
    """One sequence; everything that an application could see of it."""
    draw = rng("backends agree", seed)
    seen: list[Any] = []
    ids: list[str] = []

    def text() -> str:
        return " ".join(draw.choice(WORDS, size=int(draw.integers(1, 9))))

    def some() -> list[str]:
        return [ids[i] for i in draw.integers(len(ids), size=2)] if ids else ["nobody"]

    for step in range(int(draw.integers(4, 9))):
        match int(draw.integers(9)):
            case 0 | 1 | 2:
                new = [
                    Record(
                        text(),
                        day(float(draw.integers(100))),
                        id=f"{draw.integers(10)}-{step}-{i}",
                        kind=str(draw.choice(KINDS)),  # type: ignore[arg-type]
                        source={"role": "user", "session": f"s{draw.integers(3)}"},
                        evidence=tuple(dict.fromkeys(some())) if ids and draw.random() < 0.3 else (),
                        expires_at=day(200) if draw.random() < 0.1 else None,
                        metadata={"n": int(draw.integers(3)), "b": bool(draw.integers(2))},
                    )
                    for i in range(int(draw.integers(1, 5)))
                ]
                ids += user.add(new)
            case 3 if ids:
                one = some()[0]
                if user.get([one]):
                    seen.append(user.update(one, text=text(), metadata={"n": 1}))
            case 4 if ids:
                one = some()[0]
                if user.get([one]):
                    user.update(one, state="superseded", valid_to=day(150))
            case 5:
                seen.append([replace(gone, nbytes=0) for gone in user.erase(some(), at=day(300))])
            case 6:
                seen.append(user.restore(some()))
            case 7 if draw.random() < 0.2:
                seen.append([(gone.id, gone.reason) for gone in user.erase(some(), hard=True)])
            case _:
                user.reinforce(some(), day(400))
    where = [None, {"session": "s1"}, {"metadata.n": [0, 2]}, {"metadata.b": True}, {"since": day(50)}]
    for i in range(3):
        seen.append(
            user.search(
                text(),
                k=int(draw.integers(1, 12)),
                where=where[int(draw.integers(len(where)))],
                as_of=day(float(draw.integers(250))) if i == 2 else None,
                weights={"words": float(draw.integers(2)), "vector": 0.5} if i else None,
            )
        )
    seen += [[r.id for r in user.iterate(newest_first=True)], user.count(), user.stats()["by_kind"]]
    seen.append(user.vectors(sorted(r.id for r in user.iterate())).tolist())
    out = io.StringIO()
    user.export(out)
    seen.append(out.getvalue())
    return seen


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, list) and a and isinstance(a[0], Hit):
        assert [hit.record for hit in a] == [hit.record for hit in b]
        for left, right in zip(a, b, strict=True):
            assert left.parts.keys() == right.parts.keys()
            np.testing.assert_allclose(left.score, right.score, atol=1e-5)
            for name, part in left.parts.items():
                np.testing.assert_allclose(part, right.parts[name], atol=1e-5, err_msg=name)
    else:
        assert a == b


def compare(pair: tuple[Any, Any], seeds: range) -> None:
    for seed in seeds:
        left, right = (play(store.for_user(f"user {seed}"), seed) for store in pair)
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            try:
                assert_same(a, b)
            except AssertionError as error:
                raise AssertionError(f"sequence {seed}") from error
    assert [store.check() for store in pair] == [[], []]
    assert pair[0].users() == pair[1].users()


def test_forty_random_sequences_give_the_same_on_both_backends(pair: tuple[Any, Any]) -> None:
    compare(pair, range(40))


@pytest.mark.slow
def test_two_hundred_random_sequences_give_the_same_on_both_backends(pair: tuple[Any, Any]) -> None:
    compare(pair, range(1000, 1200))


def test_words_in_many_rows_are_dropped_alike(pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memspan.recall.store.base.MANY", 50)
    draw = rng("frequent words")
    texts = [" ".join(draw.choice(WORDS[:4], size=3)) + f" rare{n % 40}" for n in range(100)]
    hits = []
    for store in pair:
        user = store.for_user("frequent")
        user.add([Record(text, day(n), id=f"i{n}") for n, text in enumerate(texts)])
        hits.append(
            [user.search(q, k=9, weights={"words": 1}) for q in ("owl rare7 fox", "owl fox", "rare9")]
        )
    for a, b in zip(*hits, strict=True):
        assert_same(a, b)
    assert {hit.record.text.split()[-1] for hit in hits[0][0]} == {"rare7"}  # owl and fox are everywhere
    assert hits[0][1]  # of words that are all frequent the rarest stays


def test_the_database_itself_hides_other_users_rows(pair: tuple[Any, Any]) -> None:
    postgres = pair[1]
    mine, other = postgres.for_user("mine"), postgres.for_user("other")
    mine.add([Record("my fox", day(0))])
    other.add([Record("their owl", day(0))])
    mine.set_setting("a", 1)
    other.set_setting("a", 2)
    with postgres.reading(mine) as db:
        assert db.execute("SELECT text FROM records").fetchall() == [("my fox",)]  # no WHERE at all
        assert db.execute("SELECT count(*) FROM vectors").fetchone() == (1,)
        assert db.execute("SELECT count(*) FROM words").fetchone() == (1,)
        assert db.execute("SELECT value FROM settings").fetchall() == [("1",)]
        assert db.execute("SELECT name FROM owners").fetchall() == [("mine",)]
    with postgres.writing(mine) as db:
        assert db.execute("DELETE FROM records").rowcount == 1
        assert db.execute("UPDATE owners SET clock = 0").rowcount == 1
    assert other.count() == 1
    with pytest.raises(Exception, match="row-level security"), postgres.writing(mine) as db:
        db.execute("INSERT INTO owners(app, name) VALUES ('default', 'third')")


def test_purging_postgres_keeps_what_is_there(pair: tuple[Any, Any]) -> None:
    user = pair[1].for_user("purge")
    user.add([Record("kept fox", day(0)), Record("gone owl", day(0) + timedelta(hours=1), id="gone")])
    user.erase(["gone"], hard=True)
    pair[1].purge()
    assert [hit.record.text for hit in user.search("fox")] == ["kept fox"]
    assert pair[1].check() == []
