"""Scores of public benchmarks, against their authors' definitions and data."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memspan.base.refusal import BadInput
from memspan.data import DataNotFound, load
from memspan.recall.scores import locomo_f1, longmemeval_ndcg, longmemeval_recall
from memspan.report.metrics import ndcg


def test_longmemeval_gives_the_first_two_ranks_the_same_weight() -> None:
    assert longmemeval_ndcg([0, 1], {1}, 2) == longmemeval_ndcg([1, 0], {1}, 2) == 1.0
    assert ndcg([0, 1], {1}, 2) == pytest.approx(0.6309, abs=1e-4)
    assert ndcg([1, 0], {1}, 2) == 1.0
    assert longmemeval_ndcg([0, 2, 1], {1}, 3) == pytest.approx(1 / 1.585, abs=1e-3)
    assert longmemeval_ndcg([1], set(), 3) == 0


@given(st.permutations(range(6)), st.sets(st.integers(0, 5), min_size=1), st.integers(1, 6))
def test_all_is_never_easier_than_any(ranked: list[int], relevant: set[int], k: int) -> None:
    some, every = longmemeval_recall(ranked, relevant, k)
    assert every <= some
    assert 0 <= longmemeval_ndcg(ranked, relevant, k) <= 1


def test_locomos_f1_on_pairs_worked_by_hand() -> None:
    pytest.importorskip("nltk")
    for prediction, answer, category, score in (
        ("The dogs, and cats", "a dog", 4, 2 / 3),
        ("running shoes", "run shoe", 2, 1.0),
        ("psychology", "Psychology; counseling", 3, 1.0),
        ("beach, mountains", "mountain, beach", 1, 1.0),
        ("beach", "mountain, beach", 1, 0.5),
        ("7 May 2023", "7 May, 2023", 2, 1.0),
        ("Not mentioned in the talk", "anything", 5, 1.0),
        ("a dog", "anything", 5, 0.0),
        ("", "dog", 4, 0.0),
    ):
        assert locomo_f1(prediction, answer, category) == pytest.approx(score), (prediction, answer)
    with pytest.raises(BadInput, match="category"):
        locomo_f1("a", "b", 6)
    with pytest.raises(BadInput, match="k"):
        longmemeval_ndcg([1], {1}, 0)
    with pytest.raises(BadInput, match="k"):
        longmemeval_recall([1], {1}, 0)


#: What ``eval_question_answering`` of snap-research/locomo (92286325) gives for these pairs.
OFFICIAL = [
    ("She was running in the hills", "He runs on a hill", 4, 0.444444),
    ("10,000 steps", "10000 step", 4, 1),
    ("Ann's cats and dogs", "the cat of Ann", 4, 0.666667),
    ("mother-in-law", "mother in law", 4, 0),
    ("Yes", "yes!", 4, 1),
    ("the the the", "the", 4, 0),
    ("studies economics", "an economist's study", 4, 0.5),
    ("pottery classes, camping", "camping trips, pottery, painting", 1, 0.444444),
    ("swimming", "swimming, swim lessons, swimmers", 1, 0.555556),
    ("a, b", "b, c, a", 1, 0.333333),
    ("likely yes; she cares", "Yes; since she cares", 3, 0.4),
    ("no", "Likely no; because of the move", 3, 0.666667),
    ("last Friday", "the Friday before 15 July 2023", 2, 0.285714),
    ("June 2023", "2023, June", 2, 1),
    ("NOT MENTIONED", "x", 5, 1),
    ("There is no information available.", "x", 5, 1),
    ("none", "x", 5, 0),
    ("", "", 4, 0),
    ("a dog, a dog", "dog", 4, 0.666667),
    ("générosité", "generosite", 4, 0),
    ("he didn't", "he did not", 4, 0.4),
    ("universities", "university universal", 4, 0.666667),
    ("well-being, joy", "joy, well being", 1, 0.5),
    ("U.S.A.", "usa", 4, 1),
]


@pytest.mark.parametrize(("prediction", "answer", "category", "score"), OFFICIAL)
def test_locomos_f1_equals_the_official_function(
    prediction: str, answer: str, category: int, score: float
) -> None:
    pytest.importorskip("nltk")
    assert locomo_f1(prediction, answer, category) == pytest.approx(score, abs=1e-6)


def test_longmemevals_scores_equal_the_official_functions() -> None:
    """``evaluate_retrieval`` of xiaowu0162/LongMemEval (6a92d1ab): any, all, nDCG."""
    ranked = ["b", "a", "e", "c", "d"]
    for relevant, k, wanted in (
        ({"a"}, 1, (0.0, 0.0, 0.0)),
        ({"a"}, 5, (1.0, 1.0, 1.0)),
        ({"a", "c"}, 3, (1.0, 0.0, 0.5)),
        ({"a", "c"}, 5, (1.0, 1.0, 0.75)),
        ({"c", "d", "e"}, 5, (1.0, 1.0, 0.593557)),
        ({"b", "d"}, 4, (1.0, 0.0, 0.5)),
    ):
        found = (*longmemeval_recall(ranked, relevant, k), longmemeval_ndcg(ranked, relevant, k))
        assert found == pytest.approx(wanted, abs=1e-6), (relevant, k)


def test_the_counts_of_locomo() -> None:
    try:
        samples = json.loads(load("locomo")["locomo10"].read_text())
    except DataNotFound:
        pytest.skip("LoCoMo is not here: memspan data get locomo")
    sessions = [
        [talk for key, talk in sample["conversation"].items() if isinstance(talk, list)] for sample in samples
    ]
    questions = [(sample, qa) for sample in samples for qa in sample["qa"]]
    assert len(samples) == 10
    assert sum(len(turns) for talk in sessions for turns in talk) == 5882
    assert Counter(qa["category"] for _, qa in questions) == {1: 282, 2: 321, 3: 96, 4: 841, 5: 446}
    ids = [{turn["dia_id"] for talk in held for turn in talk} for held in sessions]
    known = {id(sample): held for sample, held in zip(samples, ids, strict=True)}
    valid = [
        qa for sample, qa in questions if qa["category"] != 5 and known[id(sample)] & set(qa["evidence"])
    ]
    assert len(valid) == 1531
