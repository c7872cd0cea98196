import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from memspan.base import BadInput
from memspan.report import Interval, claim
from memspan.report.stats import bootstrap, mean_interval, paired_difference, student_quantile, wilson


@settings(deadline=None)
@given(st.floats(0.01, 0.9995), st.integers(1, 200))
def test_the_student_quantile_agrees_with_scipy(p: float, df: int) -> None:
    assert student_quantile(p, df) == pytest.approx(scipy_stats.t.ppf(p, df), rel=1e-8, abs=1e-9)


@settings(deadline=None)
@given(st.integers(1, 400), st.data(), st.sampled_from([0.8, 0.95, 0.99]))
def test_wilson_agrees_with_scipy(n: int, data: st.DataObject, level: float) -> None:
    k = data.draw(st.integers(0, n))
    ours = wilson(k, n, level=level)
    theirs = scipy_stats.binomtest(k, n).proportion_ci(level, method="wilson")
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


def test_wilson_covers_its_level_on_average() -> None:
    shares = np.linspace(0.02, 0.98, 49)
    counts = np.arange(41)
    ends = [wilson(int(k), 40) for k in counts]
    inside = np.array([[one.low <= p <= one.high for one in ends] for p in shares])
    chance = scipy_stats.binom.pmf(counts[None], 40, shares[:, None])
    assert (inside * chance).sum(axis=1).mean() == pytest.approx(0.95, abs=0.012)


def test_paired_difference_equals_the_paired_t_test() -> None:
    draws = np.random.default_rng(1)
    a, b = draws.normal(size=(2, 7))
    ours = paired_difference(a, b)
    theirs = scipy_stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=1e-9)
    assert ours.n == 7


@pytest.mark.parametrize("units", [3, 5, 10])
def test_the_default_interval_covers_the_truth_with_few_units(units: int) -> None:
    draws = np.random.default_rng(units).normal(0.3, 1.0, size=(3000, units))
    hits = sum(one.low <= 0.3 <= one.high for one in map(mean_interval, draws))
    assert hits / 3000 == pytest.approx(0.95, abs=0.015)


def test_the_bootstrap_covers_too_little_with_five_units_and_so_is_not_the_default_there() -> None:
    draws = np.random.default_rng(0).normal(size=(300, 5))
    hits = sum(
        one.low <= 0 <= one.high for one in (bootstrap(d, method="percentile", samples=500) for d in draws)
    )
    assert hits / 300 < 0.9


def test_units_are_what_is_independent() -> None:
    draws = np.random.default_rng(3)
    labels = np.repeat(np.arange(6), 50)
    covered, naive = 0, 0
    for _ in range(400):
        values = draws.normal(size=6)[labels] + 0.2 * draws.normal(size=300)
        covered += not mean_interval(values, labels.tolist()).excludes(0)
        naive += not mean_interval(values, method="student").excludes(0)
    assert covered / 400 == pytest.approx(0.95, abs=0.035)
    assert naive / 400 < 0.5


def test_the_clustered_bootstrap_covers_the_truth() -> None:
    draws = np.random.default_rng(4)
    labels = np.repeat(np.arange(40), 5).tolist()
    hits = 0
    for trial in range(150):
        values = np.repeat(draws.normal(size=40), 5) + 0.5 * draws.normal(size=200)
        hits += not paired_difference(values, np.zeros(200), labels, samples=400, seed=trial).excludes(0)
    assert hits / 150 > 0.88


def test_bca_agrees_with_scipy() -> None:
    values = np.random.default_rng(5).gamma(2.0, size=60)
    for statistic in (np.mean, np.median, np.std):
        ours = bootstrap(values, statistic, samples=6000)
        theirs = scipy_stats.bootstrap((values,), statistic, n_resamples=6000, rng=1).confidence_interval
        width = theirs.high - theirs.low
        assert ours.low == pytest.approx(theirs.low, abs=0.08 * width)
        assert ours.high == pytest.approx(theirs.high, abs=0.08 * width)


def test_one_seed_repeats_and_two_differ() -> None:
    values = np.random.default_rng(6).normal(size=40)
    assert bootstrap(values, seed=1) == bootstrap(values, seed=1) != bootstrap(values, seed=2)


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=40), st.floats(-5, 5), st.randoms())
def test_the_interval_shifts_with_the_values_and_ignores_their_order(values, shift, random) -> None:
    first = mean_interval(values, method="student")
    mixed = list(values)
    random.shuffle(mixed)
    second = mean_interval(np.array(mixed) + shift, method="student")
    scale = 1e-9 * (1 + max(map(abs, values)))
    assert first.low <= first.mean + scale
    assert second.mean == pytest.approx(first.mean + shift, abs=scale)
    assert second.high - second.low == pytest.approx(first.high - first.low, abs=1e3 * scale)


def test_one_unit_says_nothing_about_spread() -> None:
    assert mean_interval([1.0, 2.0], ["a", "a"]) == Interval(1.5, -math.inf, math.inf, 1)
    assert claim("t", "P", mean_interval([5.0]), "> 0").holds is None


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: paired_difference([1.0], [1.0, 2.0]), "one value for each"),
        (lambda: mean_interval([]), "one or more finite"),
        (lambda: mean_interval([math.nan]), "one or more finite"),
        (lambda: mean_interval([1.0, 2.0], ["a"]), "one for each of the 2"),
        (lambda: mean_interval([1.0], level=95), "0.95"),
        (lambda: wilson(3, 2), "0 <= k <= n"),
        (lambda: bootstrap([1.0, 2.0], samples=5), "100 or more"),
    ],
)
def test_bad_input_is_refused_with_a_remedy(call, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        call()


@pytest.mark.parametrize(
    ("condition", "low", "high", "holds"),
    [
        ("> 0", 0.1, 1, True), ("> 0", -1, 0, False), ("> 0", -1, 1, None), (">= 0", 0, 1, True),
        ("< 2", 0, 1, True), ("<= 1", 2, 3, False), ("in [0, 1]", 0.2, 0.8, True), ("in [0, 1]", 2, 3, False),
        ("in [0, 1]", -1, 2, None), ("> -1.5e-3", 0, 1, True), (lambda v: v > 0, 0.1, 1, True),
        (lambda v: abs(v) < 0.1, -5, 5, None), (lambda v: v > 7, 0, 1, False),
    ],
)  # fmt: skip
def test_a_claim_is_decided_by_the_whole_interval(condition, low, high, holds) -> None:
    made = claim("t", "P", Interval((low + high) / 2, low, high, 5), condition)
    assert made.holds is holds
    assert holds is True or made.why


def test_an_exact_value_is_decided_by_one_unit() -> None:
    assert claim("t", "P", mean_interval([4.0]), "in [4, 4]", "bytes", exact=True).holds is True
    assert claim("t", "P", mean_interval([4.0]), "in [4, 4]", "bytes").holds is None


def test_a_claim_without_a_measurement_is_open() -> None:
    made = claim("t", "P", None, "> 0")
    assert made.holds is None
    assert made.measured is None


def test_claims_that_cannot_be_read_or_explained_are_refused() -> None:
    with pytest.raises(BadInput, match="holds_if"):
        claim("t", "P", Interval(1, 0, 2, 3), "about 3")
    with pytest.raises(BadInput, match="why"):
        claim("t", "P", Interval(1, 0, 2, 3), "> 0", expected=False)


def test_crossed_units_cover_where_plain_rows_claim_too_much():
    hits = {"crossed": 0, "rows": 0}
    where = [(array, digit) for array in range(6) for digit in range(10)]
    for trial in range(60):
        draws = np.random.default_rng(trial)
        arrays, digits = draws.normal(size=6), draws.normal(size=10)
        values = [arrays[a] + digits[d] + 0.1 * draws.normal() for a, d in where]
        spans = {
            "crossed": bootstrap(values, crossed=where, samples=400),
            "rows": bootstrap(values, samples=400),
        }
        for name, span in spans.items():
            hits[name] += span.low <= 0 <= span.high
    assert hits["crossed"] >= 51  # 95 % of 60 is 57
    assert hits["rows"] < 40


def test_a_pair_of_units_counts_by_both():
    pairs = [(array, (a, b)) for array in range(4) for a in range(6) for b in range(a)]
    values = [float(a == 5) for _, (a, _) in pairs]
    span = bootstrap(values, crossed=pairs, samples=500)
    assert span.n == 4
    assert span.mean == pytest.approx(1 / 3)
    assert span.low == 0  # a resample without the one digit has no row of it
    again = bootstrap(values, crossed=pairs, samples=500)
    assert span == again


def test_crossed_units_are_checked():
    for bad in ([(1, 2)], [(1,), (2,)], []):
        with pytest.raises(BadInput, match="crossed"):
            bootstrap([1.0, 2.0], crossed=bad)
    with pytest.raises(BadInput, match="crossed"):
        bootstrap([1.0, 2.0], np.median, crossed=[(1, 2), (2, 1)])
    assert bootstrap([1.0, 2.0], crossed=[(1, 2), (1, 1)]).low == -np.inf
