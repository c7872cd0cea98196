"""Ours against a rival: what is paired, and what an interval then says."""

import numpy as np
import pytest

from memspan.base import BadInput
from memspan.report import claim, gain, gain_over_items
from memspan.report.schema import Measurement
from memspan.report.stats import mean_interval, paired_difference


def row(seed, value=0.0, **series):
    return Measurement(method="m", seed=seed, quality={"loss": value}, bytes={}, seconds={}, series=series)


def test_a_gain_is_the_paired_difference_over_common_seeds_in_any_order():
    ours, rival = (
        [row(s, v) for s, v in ((0, 3), (1, 5), (2, 4))],
        [row(s, v) for s, v in ((2, 1), (0, 2), (9, 7))],
    )
    assert gain(ours, rival, metric="loss") == paired_difference([3, 4], [2, 1])


def test_the_best_of_several_rivals_is_chosen_at_each_seed_and_low_is_good_where_the_scale_says_so():
    ours, one, two = ([row(s, v) for s, v in enumerate(values)] for values in ((1, 1), (3, 2), (2, 5)))
    assert gain(ours, one, two, metric="loss") == paired_difference([1, 1], [3, 5])
    assert gain(ours, one, two, metric="loss", scale=-1) == paired_difference([-1, -1], [-2, -2])


def test_rows_of_one_seed_are_one_unit():
    ours = [row(0, 1), row(0, 3), row(1, 4)]
    assert gain(ours, [row(0, 0), row(1, 0)], metric="loss").n == 2
    assert gain(ours, [row(0, 0), row(1, 0)], metric=lambda rows: len(rows)).mean == pytest.approx(0.5)


def test_a_gain_over_items_pairs_items_and_averages_common_seeds():
    draws = np.random.default_rng(0)
    a, b = draws.random((2, 3, 8)).tolist()
    ours = [row(s, right=a[s]) for s in (0, 1)]
    rival = [row(s, right=b[s]) for s in (1, 2)]
    assert gain_over_items(ours, rival, "right", scale=100) == paired_difference(a[1], b[1]).scaled(100)
    both = gain_over_items(ours, [row(s, right=b[s]) for s in (0, 1)], "right")
    assert both == paired_difference(np.mean(a[:2], axis=0), np.mean(b[:2], axis=0))
    assert gain_over_items(ours, [row(5, right=b[0])], "right") is None


def test_items_of_one_unit_are_not_independent():
    units = [0, 0, 0, 0, 1, 1, 2, 2]
    a, b = [1.0, 1, 1, 1, 0, 1, 0, 0], [0.0] * 8
    found = gain_over_items(
        [row(0, right=a, user=units)], [row(0, right=b, user=units)], "right", units="user"
    )
    assert found == paired_difference(a, b, units)
    assert found.n == 3


def test_what_cannot_be_paired_is_refused():
    with pytest.raises(BadInput, match="rivals"):
        gain([row(0)], metric="loss")
    with pytest.raises(BadInput, match="did you mean loss"):
        gain([row(0)], [row(0)], metric="los")
    with pytest.raises(BadInput, match="same items"):
        gain_over_items([row(0, right=[1])], [row(0, right=[1, 0])], "right")


@pytest.mark.parametrize(
    ("values", "exact", "mark"),
    [
        ([2, 2], False, "?"),
        ([2] * 4, False, "?"),
        ([2] * 5, False, "✓"),
        ([2], True, "✓"),
        ([2, 2.01], False, "✓"),
    ],
)
def test_few_equal_units_decide_nothing_unless_the_quantity_is_exact(values, exact, mark):
    """Two seeds that agree by luck are not certainty; a count of bytes is."""
    found = claim("ours is ahead", "P", mean_interval(values), "> 0", exact=exact)
    assert found.mark == mark
    assert mark == "✓" or "equal units" in found.why
