"""Words, BM25, fusion, diversity; and the store's search against references that know nothing of it."""

from __future__ import annotations

import sqlite3
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memspan.base.refusal import BadInput
from memspan.base.rng import rng
from memspan.recall import Record
from memspan.recall.rank import BM25, STOP_WORDS, fts_query, fuse, mmr, query_words
from memspan.recall.store import DEFAULT_WEIGHTS
from memspan.recall.store.terms import index_terms, query_terms
from recall.stores import EMBED, day, postgres_store, sqlite_store

WORDS = [
    "running",
    "runner",
    "ran",
    "cats",
    "cat's",
    "naïve",
    "résumé",
    "CAFÉ",
    "Straße",
    "ſ",
    "ﬁsh",
    "3.14",
    "x_y",
    "e-mail",
    "don't",
    "ünïcode",
    "привет",
    "мир",
    "Ελλάδα",
    "عربي",
    "the",
    "of",
    "a",
    "relational",
    "conditional",
    "rational",
    "digitizer",
    "conformably",
    "radically",
    "a1b2",
    "ⅷ",
    "²",
]


def texts(n: int, seed: int = 0) -> list[str]:
    draw = rng("rank", seed)
    return [" ".join(draw.choice(WORDS, int(draw.integers(1, 12)))) for _ in range(n)]


def fts5(said: list[str], match: str) -> list[tuple[int, float]]:
    """A plain FTS5 table with porter stems: places and scores, best first."""
    db = sqlite3.connect(":memory:")
    db.execute("CREATE VIRTUAL TABLE f USING fts5(text, tokenize='porter unicode61')")
    db.executemany("INSERT INTO f(rowid, text) VALUES (?, ?)", enumerate(said))
    rows = db.execute("SELECT rowid, -bm25(f) FROM f WHERE f MATCH ? ORDER BY bm25(f), rowid", (match,))
    return [(place, score) for place, score in rows]


def test_there_are_fifty_stop_words_and_a_query_keeps_what_is_left() -> None:
    assert len(STOP_WORDS) == 50
    assert query_words("What is the Owl's name, owl?") == ["owl", "name"]
    assert query_words("who are you") == ["who", "are", "you"]
    assert query_words("what owl", ()) == ["what", "owl"]
    assert fts_query('a "b" c* NEAR d', ()) == '"a" OR "b" OR "c" OR "near" OR "d"'
    assert fts_query("?!") == ""


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=60) | st.lists(st.sampled_from(WORDS), max_size=8).map(" ".join))
def test_index_terms_are_those_of_fts5(text: str) -> None:
    text = "".join(c for c in text if c.isprintable() and not "\u3000" < c < "\udfff" and c < "\U00020000")
    db = sqlite3.connect(":memory:")
    db.execute("CREATE VIRTUAL TABLE f USING fts5(text, tokenize='porter unicode61')")
    db.execute("CREATE VIRTUAL TABLE v USING fts5vocab(f, instance)")
    db.execute("INSERT INTO f VALUES (?)", (text,))
    assert index_terms([text])[0] == Counter(term for (term,) in db.execute("SELECT term FROM v"))


def test_words_without_blanks_become_characters_and_pairs() -> None:
    assert index_terms(["我爱cats"])[0] == Counter({"我": 1, "爱": 1, "我爱": 1, "cat": 1})
    assert query_terms("我爱你 the") == Counter({"我爱": 1, "爱你": 1})
    assert query_terms("猫") == Counter({"猫": 1})


def test_the_stores_words_are_fts5s_bm25_in_order_and_score(tmp_path: Path) -> None:
    said = texts(300)
    with sqlite_store(tmp_path) as store:
        user = store.for_user("emily")
        user.add([Record(text, day(0), metadata={"n": n}) for n, text in enumerate(said)])
        for query in (
            "running cats",
            "résumé radically ran running",
            "rational relational",
            "привет 3.14",
            "of the",
        ):
            wanted = fts5(said, fts_query(query))
            found = user.search(query, k=300, weights={"words": 1})
            assert [hit.record.metadata["n"] for hit in found] == [place for place, _ in wanted]
            np.testing.assert_allclose(
                [hit.parts["words"] for hit in found], [s for _, s in wanted], rtol=1e-9
            )


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_stores_vectors_are_ranked_as_by_brute_force(tmp_path: Path, dtype: Any) -> None:
    rows = rng("brute force").standard_normal((400, EMBED.dim)).astype(np.float32)
    rows[200] = rows[100]  # equal scores: the earlier first
    with sqlite_store(tmp_path, dtype=dtype) as store:
        user = store.for_user("emily")
        ids = user.add([Record("x", day(0)) for _ in rows], vectors=rows)
        stored = user.vectors(ids)
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        np.testing.assert_allclose(stored, unit, atol=1e-3 if dtype == "float16" else 1e-6)
        for query in (rows[100], rows[7] + rows[9]):
            hits = user.search(vector=query, k=50, weights={"vector": 1})
            scores = stored.astype(np.float64) @ (query / np.linalg.norm(query))
            order = np.lexsort((np.arange(len(rows)), -np.round(scores, 6)))[:50]
            assert [hit.record.id for hit in hits] == [ids[place] for place in order]
            np.testing.assert_allclose([hit.parts["cosine"] for hit in hits], scores[order], atol=1e-6)


def test_the_default_search_scores_a_turn_by_itself_its_neighbours_and_its_session(tmp_path: Path) -> None:
    """Against the definition, counted row by row in plain Python."""
    said = texts(60, seed=3)
    draw = rng("sessions")
    sessions = [f"s{int(n)}" for n in draw.integers(4, size=len(said))]
    query = "running cats"
    with sqlite_store(tmp_path, dtype="float32") as store:
        user = store.for_user("emily")
        ids = user.add(
            [Record(t, day(0), source={"session": s}) for t, s in zip(said, sessions, strict=True)]
        )
        user.add([Record("running cats as a thought", day(0), kind="thought")])  # not among the turns
        hits = user.search(query, k=60, kinds=("turn",))
        vectors = user.vectors(ids)
    wanted, counts = query_terms(query), index_terms(said)
    members = [[j for j in range(len(said)) if sessions[j] == sessions[i]] for i in range(len(said))]

    def near(i: int, reach: int) -> list[int]:
        place = members[i].index(i)
        return members[i][max(0, place - reach) : place + reach + 1]

    def bm25(bags: list[Counter[str]]) -> np.ndarray:
        sizes = [bag.total() for bag in bags]
        mean = sum(sizes) / len(bags)
        scores = []
        for bag, size in zip(bags, sizes, strict=True):
            score = 0.0
            for term, weight in wanted.items():
                df = sum(term in other for other in bags)
                idf = max(np.log((len(bags) - df + 0.5) / (df + 0.5)), 1e-6)
                score += weight * idf * bag[term] * 2.2 / (bag[term] + 1.2 * (0.25 + 0.75 * size / mean))
            scores.append(score)
        return np.array(scores)

    def joined(groups: list[list[int]]) -> list[Counter[str]]:
        return [sum((counts[j] for j in group), Counter()) for group in groups]

    names = list(dict.fromkeys(sessions))
    whole = bm25(joined([[j for j in range(len(said)) if sessions[j] == name] for name in names]))
    cosine = vectors @ EMBED([query])[0]
    fields = {
        "words": bm25(counts),
        "words_around": bm25(joined([near(i, 2) for i in range(len(said))])),
        "words_session": np.array([whole[names.index(session)] for session in sessions]),
        "vector": cosine,
        "vector_around": np.array([cosine[near(i, 1)].mean() for i in range(len(said))]),
    }
    total = sum(DEFAULT_WEIGHTS[name] * (f - f.mean()) / f.std() for name, f in fields.items())
    assert [hit.record.id for hit in hits[:15]] == [ids[i] for i in np.argsort(-total, kind="stable")[:15]]
    np.testing.assert_allclose([hit.score for hit in hits], np.sort(total)[::-1], atol=1e-5)


def test_bm25_is_the_textbook_formula() -> None:
    said = ["a red fox", "a red red hen", "an owl"]
    scores = BM25(said).scores("red hen zebra")
    idf = {df: np.log(1 + (3 - df + 0.5) / (df + 0.5)) for df in (1, 2)}
    mean = 9 / 3

    def part(tf: int, length: int, df: int) -> float:
        return float(idf[df] * tf * 2.5 / (tf + 1.5 * (0.25 + 0.75 * length / mean)))

    np.testing.assert_allclose(scores, [part(1, 3, 2), part(2, 4, 2) + part(1, 4, 1), 0])
    assert BM25([]).top("x", 3) == BM25(["a"]).top("b", 3) == []


def test_bm25_orders_as_a_peer_does() -> None:
    peer = pytest.importorskip("rank_bm25")
    said = [text.lower() for text in texts(80, seed=5)]
    split = [query_words(text, ()) for text in said]  # once each: the peer then has the same counts
    ours = BM25([" ".join(words) for words in split])
    theirs = peer.BM25Plus(split, k1=1.5, b=0.75, delta=0)
    for query in ("running cats", "résumé ran"):
        a, b = ours.scores(query), theirs.get_scores(query_words(query, ()))
        # the peer's idf is ln((N + 1) / df): the same order for one word
        for word in query.split():
            a, b = ours.scores(word), theirs.get_scores([word])
            assert np.array_equal(np.argsort(-a, kind="stable"), np.argsort(-b, kind="stable"))


def test_fusion_is_the_sum_of_weighted_reciprocal_ranks() -> None:
    fused = dict(fuse({"a": ["x", "y"], "b": ["y", "z"]}, weights={"b": 0.5}))
    assert fused == {"x": 1 / 61, "y": 1 / 62 + 0.5 / 61, "z": 0.5 / 62}
    assert fuse({"a": ["x", "y"], "b": ["y"]}, how="borda") == [("y", 1.5), ("x", 1.0)]
    assert fuse({}) == []
    for bad in ({"how": "magic"}, {"weights": {"c": 1.0}}, {"weights": {"a": -1.0}}, {"k": -1}):
        with pytest.raises(BadInput):
            fuse({"a": ["x"]}, **bad)  # type: ignore[arg-type]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 8), st.floats(0, 1))
def test_mmr_takes_the_best_trade_at_each_step(seed: int, k: int, balance: float) -> None:
    draw = rng("mmr", seed)
    rows = draw.standard_normal((10, 4))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    gain = draw.random(10)
    taken = mmr(rows, gain, k, balance)
    assert len(taken) == len(set(taken)) == k
    for step, place in enumerate(taken):
        before = taken[:step]
        near = (rows @ rows[before].T).max(axis=1) if before else np.zeros(10)
        value = balance * gain - (1 - balance) * near
        assert value[place] >= max(value[i] for i in range(10) if i not in before) - 1e-9
    assert mmr(rows, gain, 10, 1.0) == np.argsort(-gain, kind="stable").tolist()
    for bad in ({"k": -1}, {"k": 1, "balance": 2}):
        with pytest.raises(BadInput):
            mmr(rows, gain, **bad)  # type: ignore[arg-type]


def clustered(n: int) -> np.ndarray[Any, Any]:
    """The shape of real embeddings: few directions and some noise."""
    draw = rng("clustered", n)
    rows = draw.standard_normal((n, 8)) @ draw.standard_normal((8, EMBED.dim)) + 0.3 * draw.standard_normal(
        (n, 1)
    )
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_the_approximate_index_of_postgres_finds_what_the_exact_search_finds() -> None:
    rows = clustered(1600)
    with postgres_store(exact_below=1200) as store:
        user, other = store.for_user("emily"), store.for_user("ann")
        when = [day(n % 9) for n in range(1600)]
        ids = user.add([Record(f"n{n}", at) for n, at in enumerate(when)], vectors=rows)
        other.add([Record(f"o{n}", day(0)) for n in range(50)], vectors=rows[:50])

        def found(handle: Any, query: Any, **more: Any) -> list[tuple[str, float]]:
            hits = handle.search(vector=query, k=10, weights={"vector": 1}, **more)
            return [(hit.record.id, round(hit.parts["cosine"], 5)) for hit in hits]

        def indexes() -> list[str]:
            with store.reading() as db:
                listed = "SELECT indexname FROM pg_indexes WHERE indexname LIKE 'near%' ORDER BY 1"
                return [name for (name,) in db.execute(listed).fetchall()]

        queries = clustered(1601)[:30]
        exact = [found(user, query) for query in queries]  # the first of them starts the builder
        assert store.build_index(user) == 1600
        assert len(indexes()) == 1
        with store.reading() as db:
            # So few rows may also be read one by one, as statistics stand when autovacuum has just come by.
            db.execute("SET enable_seqscan = off")
            plan = (
                "EXPLAIN SELECT rid FROM vectors WHERE owner = 1 ORDER BY vec::halfvec(64) <#> ?::halfvec(64)"
            )
            shown = db.execute(f"{plan} LIMIT 100", (str(rows[0].tolist()),)).fetchall()
            assert any("near_1_64" in line for (line,) in shown)
        near = [found(user, query) for query in queries]
        shares = [len({i for i, _ in a} & {i for i, _ in b}) / 10 for a, b in zip(exact, near, strict=True)]
        assert np.mean(shares) >= 0.95
        with store.reading() as db:
            db.execute("SELECT pg_stat_force_next_flush()")
        with store.reading() as db:
            scans = "SELECT idx_scan FROM pg_stat_user_indexes WHERE indexrelname = 'near_1_64'"
            assert db.execute(scans).fetchone()[0] >= len(queries), "they were compared one by one"
        user.erase(ids[:50])
        assert not {id for query in queries for id, _ in found(user, query)} & set(ids[:50])
        narrow = found(user, rows[8], where={"since": day(8)}, kinds=("turn",))
        assert narrow[0] == (ids[8], 1.0) or ids[8] in ids[:50]
        assert {when[ids.index(id)] for id, _ in narrow} == {day(8)}
        assert found(user, rows[3], kinds=("thought",)) == []
        assert len(found(other, rows[3])) == 10  # below the number: exact
        assert len(indexes()) == 1
        user.erase_all()
        assert indexes() == []


def test_the_approximate_index_finds_what_the_exact_search_finds(tmp_path: Path) -> None:
    pytest.importorskip("usearch")
    rows = clustered(1500)
    with sqlite_store(tmp_path, exact_below=1000) as store, sqlite_store(tmp_path) as exact:
        user, same = store.for_user("emily"), exact.for_user("emily")
        ids = user.add([Record(f"n{n}", day(n % 9)) for n in range(1000)], vectors=rows[:1000])
        user.add([Record(f"n{n}", day(0)) for n in range(1000, 1400)], vectors=rows[1000:1400])
        assert store.build_index(user) == 1400
        (file,) = (tmp_path / "me.db-near").iterdir()
        user.add(
            [Record(f"n{n}", day(0)) for n in range(1400, 1500)], vectors=rows[1400:]
        )  # beside the index
        user.erase(ids[:50])
        user.update(ids[60], state="superseded")

        def found(handle: Any, query: Any, **more: Any) -> list[tuple[str, float]]:
            hits = handle.search(vector=query, k=10, weights={"vector": 1}, **more)
            return [(hit.record.id, round(hit.parts["cosine"], 5)) for hit in hits]

        shares = [
            len(set(found(user, query)) & set(found(same, query))) / 10 for query in clustered(1501)[:100]
        ]
        assert np.mean(shares) >= 0.95
        assert found(user, rows[1450])[0] == (found(same, rows[1450])[0])
        for more in (
            {"where": {"since": day(8)}},
            {"kinds": ("thought",)},
            {"where": {"state": "superseded"}},
        ):
            assert found(user, rows[3], **more) == found(
                same, rows[3], **more
            )  # narrow: looked at one by one
    with sqlite_store(tmp_path, exact_below=1000) as store:  # another process reads the file
        assert store.for_user("emily").search(vector=rows[1300], k=1)[0].record.text == "n1300"
        assert next(iter(store._near.values())).version > 0
        store.for_user("emily").erase([ids[70]], hard=True)  # for good: the index goes too
        assert not file.exists()
        thread_names = {thread.name for thread in threading.enumerate()}
        assert "memspan-near" not in thread_names
        hits = store.for_user("emily").search(vector=rows[71], k=1)
        assert hits[0].record.text == "n71"
        store._builders[1].join()
        assert len(store._near[1]) == 1499
        (rebuilt,) = (tmp_path / "me.db-near").iterdir()
        assert rebuilt.name != file.name
        rebuilt.write_bytes(b"damaged")
        store._near.clear()
        assert store.for_user("emily").search(vector=rows[72], k=1)[0].record.text == "n72"
