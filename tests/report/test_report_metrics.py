import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

from memspan.base import BadInput
from memspan.report.frontier import Frontier, Point
from memspan.report.metrics import bits_per_byte, hit_at_k, ndcg, recall_at_k, token_f1

CURVES = st.lists(
    st.tuples(st.integers(1, 10**6), st.floats(-10, 10)), min_size=2, max_size=12, unique_by=lambda p: p[0]
)


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=15), st.integers(1, 15), st.integers(0, 999))
def test_ndcg_agrees_with_scikit_learn_in_both_forms(relevance: list[int], k: int, seed: int) -> None:
    scores = np.random.default_rng(seed).permutation(len(relevance)).astype(float)
    ranked = np.argsort(-scores).tolist()
    table = dict(enumerate(map(float, relevance)))
    linear = ndcg_score([relevance], [scores], k=k)
    exponential = ndcg_score([[2.0**r - 1 for r in relevance]], [scores], k=k)
    assert ndcg(ranked, table, k) == pytest.approx(linear, abs=1e-12)
    assert ndcg(ranked, table, k, form="exponential") == pytest.approx(exponential, abs=1e-12)


def test_both_forms_agree_on_yes_and_no() -> None:
    assert ndcg("xaby", {"a", "b"}) == pytest.approx(ndcg("xaby", {"a", "b"}, form="exponential"))


@settings(deadline=None)
@given(st.permutations(range(10)), st.sets(st.integers(0, 12), min_size=1), st.integers(1, 12))
def test_recall_and_hit_equal_their_definitions(ranked: list[int], relevant: set[int], k: int) -> None:
    found = sum(item in relevant for item in ranked[:k])
    assert recall_at_k(ranked, relevant, k) == found / len(relevant)
    assert hit_at_k(ranked, relevant, k) == (found > 0)


@settings(deadline=None)
@given(st.text("ab .,The", max_size=20), st.text("ab .,The", max_size=20))
def test_token_f1_is_symmetric_and_bounded(a: str, b: str) -> None:
    assert token_f1(a, b) == pytest.approx(token_f1(b, a))
    assert 0 <= token_f1(a, b) <= 1
    assert token_f1(a, a) == 1


def test_token_f1_counts_repeated_words_as_multisets() -> None:
    assert token_f1("no no yes", "no yes yes") == pytest.approx(2 / 3)
    assert token_f1("The Cat", "cat", normalize=None) == 0.0
    assert token_f1("CAT", "cat", normalize=str.lower) == 1.0


def test_bits_per_byte_counts_utf8() -> None:
    assert bits_per_byte(2 * math.log(2), "é") == bits_per_byte(2 * math.log(2), 2) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: recall_at_k("ab", "", 1), "relevant"),
        (lambda: recall_at_k("aa", "a", 1), "once"),
        (lambda: hit_at_k("ab", "a", 0), "k=0"),
        (lambda: ndcg("ab", {"a": -1.0}), "relevance"),
        (lambda: ndcg("ab", {"a"}, form="log"), "form"),
        (lambda: bits_per_byte(1.0, ""), "one byte"),
        (lambda: bits_per_byte(math.nan, "a"), "finite"),
        (lambda: token_f1("a", "b", normalize="no"), "normalize"),
        (lambda: Frontier({"a": []}), "one .bytes, quality. pair"),
        (lambda: Frontier({"a": [(1, math.nan)]}), "finite"),
        (lambda: Frontier({"a": [(1, 0.5)]}).area(), "two budgets"),
        (lambda: Frontier({"a": [(1, 0.5), (3, 1)]}).at(4), "measured from 1 to 3"),
        (lambda: Frontier({"a": [(0, 0.5), (3, 1)]}).area("log"), "linear"),
        (lambda: Frontier({"a": [(1, 0.5), (3, 1)]}).area("cubic"), "scale"),
        (lambda: Frontier({"a": [(1, 0.5), (3, 1)]}).area(over=(0, 2)), "measured from"),
        (lambda: Frontier({"memo": [(1, 0.5)]}).value("mem", 1), "did you mean memo"),
    ],
)
def test_bad_input_is_refused(call, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        call()


@settings(deadline=None)
@given(CURVES)
def test_area_equals_numpy_on_both_scales(points: list[tuple[int, float]]) -> None:
    x, y = np.array(sorted(points)).T
    curve = Frontier({"a": points})
    assert curve.area()["a"] == pytest.approx(np.trapezoid(y, x), rel=1e-9, abs=1e-6)
    assert curve.area("log")["a"] == pytest.approx(np.trapezoid(y, np.log2(x)), rel=1e-9, abs=1e-9)


@settings(deadline=None)
@given(CURVES, st.randoms())
def test_the_order_of_points_does_not_matter(points: list[tuple[int, float]], random) -> None:
    mixed = list(points)
    random.shuffle(mixed)
    assert Frontier({"a": points}) == Frontier({"a": mixed})


@settings(deadline=None)
@given(
    st.floats(-3, 3), st.floats(-3, 3), st.lists(st.integers(1, 1000), min_size=2, max_size=9, unique=True)
)
def test_the_area_of_a_straight_line_is_exact(slope: float, start: float, at: list[int]) -> None:
    curve = Frontier({"a": [(x, start + slope * x) for x in at]})
    low, high = min(at), max(at)
    assert curve.area(normalize=True)["a"] == pytest.approx(start + slope * (low + high) / 2, abs=1e-6)
    assert curve.at((low + high) / 2)["a"] == pytest.approx(start + slope * (low + high) / 2, abs=1e-6)


@settings(deadline=None)
@given(st.floats(-3, 3), st.sampled_from(["linear", "log"]))
def test_a_normalized_area_is_a_mean_quality(quality: float, scale: str) -> None:
    curve = Frontier({"a": [(x, quality) for x in (1, 5, 90)]})
    assert curve.area(scale, normalize=True)["a"] == pytest.approx(quality)


def test_a_common_range_makes_methods_comparable() -> None:
    curve = Frontier({"early": [(1, 0.0), (5, 1.0)], "late": [(3, 0.5), (5, 1.0)]})
    areas = curve.area(over=(3, 5))
    assert areas["early"] == pytest.approx(areas["late"]) == pytest.approx(1.5)


def test_seeds_at_the_same_bytes_are_averaged() -> None:
    assert Frontier({"a": [(1, 0.4), (1, 0.6), (2, 1.0)]}).at(1) == {"a": 0.5}


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from("abc"), CURVES, min_size=1), st.booleans())
def test_the_front_is_what_nothing_dominates(points, higher: bool) -> None:
    curve = Frontier(points, higher_is_better=higher)
    every = [Point(x, y, name) for name, pairs in curve.points.items() for x, y in pairs]
    sign = 1 if higher else -1

    def beaten(p: Point) -> bool:
        return any(
            q.bytes <= p.bytes
            and sign * q.quality >= sign * p.quality
            and (q.bytes, q.quality) != (p.bytes, p.quality)
            for q in every
        )

    wanted = {(p.bytes, p.quality) for p in every if not beaten(p)}
    assert {(p.bytes, p.quality) for p in curve.front()} == wanted
