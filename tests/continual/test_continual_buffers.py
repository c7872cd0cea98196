"""Exemplars: herding against brute force, true bytes, balance, resume."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from memspan.base import BadInput
from memspan.base.files import load_state, save_state
from memspan.continual.buffers import ExemplarSet, Reservoir, herding


def brute_force(features: torch.Tensor, q: int) -> list[int]:
    v = F.normalize(features.double(), dim=1)
    mean, chosen = v.mean(dim=0), []
    for k in range(1, min(q, len(v)) + 1):
        gaps = {
            i: float((mean - (v[i] + sum(v[j] for j in chosen)) / k).norm())
            for i in range(len(v))
            if i not in chosen
        }
        # two rows are equally far from their mean: rounding must not decide
        chosen.append(next(i for i, gap in gaps.items() if gap <= min(gaps.values()) + 1e-12))
    return chosen


def images(n: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def smooth(n: int) -> np.ndarray:
    ramp = np.add.outer(np.arange(16), np.arange(16)) * 4
    return np.stack([(ramp + 7 * i) % 200 for i in range(n)]).astype(np.uint8)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 14), d=st.integers(2, 6), q=st.integers(0, 16), seed=st.integers(0, 10**6))
def test_herding_is_the_brute_force_order_and_short_herds_begin_long_ones(n, d, q, seed):
    features = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    order = herding(features, q).tolist()
    assert order == brute_force(features, q)
    assert order == herding(features, n).tolist()[:q]
    assert len(order) == len(set(order)) == min(n, q)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(3, 20), seed=st.integers(0, 10**6))
def test_permuting_rows_permutes_the_herd(n, seed):
    generator = torch.Generator().manual_seed(seed)
    # the last two of a herd can tie by symmetry of the sum; the first half does not
    features, shuffle = torch.randn(n, 5, generator=generator), torch.randperm(n, generator=generator)
    assert shuffle[herding(features[shuffle], n // 2)].tolist() == herding(features, n // 2).tolist()


def test_equal_rows_are_each_chosen_once_and_the_lowest_index_goes_first():
    row = torch.randn(1, 7)
    assert herding(row.repeat(9, 1), 20).tolist() == list(range(9))


def test_herding_refuses_features_that_are_not_finite():
    with pytest.raises(BadInput, match=r"features=.*NaN"):
        herding(torch.tensor([[1.0, float("nan")]]), 1)


def test_the_remainder_is_spread_and_the_paper_mode_leaves_it_unused():
    x, y, z = images(30, 4, 4), np.repeat([5, 2, 9], 10), torch.randn(30, 3)
    spread = ExemplarSet(11 * (16 + 8))
    spread.update(x, y, z)
    assert spread.counts == {5: 4, 2: 4, 9: 3}
    assert spread.nbytes == 11 * 24
    paper = ExemplarSet(11 * 16, exact="paper")
    paper.update(x, y, z)
    assert paper.counts == {5: 3, 2: 3, 9: 3}


def test_a_class_with_few_rows_gives_all_and_others_take_the_room():
    kept = ExemplarSet(10 * 12)
    kept.update(images(22, 2, 2), [0, 0] + [1] * 20, torch.randn(22, 3))
    assert kept.counts == {0: 2, 1: 8}


def test_older_classes_give_way_and_keep_their_first_rows():
    kept = ExemplarSet(8 * 12)
    kept.update(images(20, 2, 2), ["a"] * 20, torch.randn(20, 4))
    before = kept.arrays()[0]
    kept.update(images(20, 2, 2, seed=1), ["b"] * 20, torch.randn(20, 4))
    rows, labels = kept.arrays()
    assert kept.counts == {"a": 4, "b": 4}
    assert np.array_equal(rows[labels == "a"], before[:4])


@pytest.mark.parametrize("codec", ["raw", "png", "jpeg:75"])
@pytest.mark.parametrize("shape", [(16, 16), (16, 16, 1), (16, 16, 3)])
def test_bytes_are_those_of_the_saved_state_and_never_above_the_budget(codec, shape, tmp_path):
    x = np.broadcast_to(smooth(40).reshape(40, 16, 16, *([1] * (len(shape) - 2))), (40, *shape)).copy()
    kept = ExemplarSet(9000, codec=codec, seed=3)
    kept.update(x, np.arange(40) % 4, torch.randn(40, 5))
    state = kept.state_dict()
    assert kept.nbytes == sum(value.nbytes for name, value in state.items() if name != "header")
    assert len(kept) >= 4
    assert kept.nbytes <= 9000
    assert max(kept.counts.values()) - min(kept.counts.values()) <= 1
    save_state(tmp_path / "kept.safetensors", state)
    again = ExemplarSet(9000, codec=codec, seed=3)
    again.load_state_dict(load_state(tmp_path / "kept.safetensors")[0])
    for mine, other in zip(kept.arrays(), again.arrays(), strict=True):
        assert np.array_equal(mine, other)
    assert again.memory_bytes() == kept.memory_bytes()
    if codec != "jpeg:75":
        originals = {row.tobytes() for row in x}
        assert all(row.tobytes() in originals for row in kept.arrays()[0])


def test_jpeg_keeps_more_images_of_photograph_like_data_than_raw():
    pytest.importorskip("PIL")
    x = np.repeat(np.repeat(smooth(60), 4, axis=1), 4, axis=2)
    sets = {codec: ExemplarSet(60_000, codec=codec) for codec in ("raw", "jpeg:75")}
    for kept in sets.values():
        kept.update(x, np.zeros(60, int), torch.randn(60, 4))
    assert len(sets["jpeg:75"]) > len(sets["raw"])


def test_a_kept_row_that_is_given_again_is_not_compressed_twice():
    kept = ExemplarSet(None, codec="jpeg:30")
    kept.update(smooth(5), [0] * 5, torch.randn(5, 3))
    rows, labels = kept.arrays()
    kept.update(rows, labels, torch.randn(5, 3))
    assert {row.tobytes() for row in kept.arrays()[0]} == {row.tobytes() for row in rows}


def test_features_are_kept_as_half_precision():
    kept = ExemplarSet(3 * (2 * 4 + 8), codec="features:fp16", selection="random")
    features = torch.randn(10, 4)
    kept.update(images(10, 2, 2), [1] * 10, features)
    rows, labels = kept.dataset()
    assert rows.dtype == torch.float16
    assert rows.shape == (3, 4)
    assert labels.tolist() == [1, 1, 1]
    assert {tuple(row) for row in rows.tolist()} <= {tuple(row) for row in features.half().tolist()}


def test_random_choice_repeats_with_a_seed_and_differs_with_another():
    def chosen(seed):
        kept = ExemplarSet(5 * 12, selection="random", seed=seed)
        kept.update(images(40, 2, 2), [0] * 40)
        return kept.arrays()[0].tobytes()

    assert chosen(0) == chosen(0) != chosen(1)


def test_a_reservoir_class_does_not_depend_on_how_its_rows_were_cut_into_updates():
    x = images(40, 3, 3)
    once, twice = (ExemplarSet(6 * 17, selection="reservoir") for _ in range(2))
    once.update(x, [0] * 40)
    twice.update(x[:20], [0] * 20)
    old, labels = twice.arrays()
    twice.update(np.concatenate([old, x[20:]]), [*labels, *[0] * 20])
    assert np.array_equal(once.arrays()[0], twice.arrays()[0])


def test_a_callable_chooses_and_is_refused_when_it_repeats_itself():
    kept = ExemplarSet(None, selection=lambda features, q: list(range(q))[::-1])
    kept.update(images(3, 2, 2), [0] * 3, torch.randn(3, 2))
    assert np.array_equal(kept.arrays()[0], images(3, 2, 2)[::-1])
    with pytest.raises(BadInput, match="selection"):
        ExemplarSet(None, selection=lambda f, q: [0] * q).update(images(3, 2, 2), [0] * 3, torch.randn(3, 2))


def test_shrinking_and_resizing_drop_the_last_rows_and_a_refusal_drops_nothing():
    kept = ExemplarSet(None)
    kept.update(images(12, 2, 2), np.arange(12) % 2, torch.randn(12, 3))
    rows, labels = kept.arrays()
    kept.shrink(4)
    assert np.array_equal(kept.arrays()[0][:4], rows[labels == 0][:4])
    kept.resize(5 * 12)
    assert kept.counts == {0: 3, 1: 2}
    with pytest.raises(BadInput, match="budget=20: one row for each of 2 classes needs 24 bytes"):
        kept.resize(20)
    assert len(kept) == 5
    assert kept.budget == 60


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"budget": 0}, "budget"),
        ({"codec": "jpeg:0"}, "codec"),
        ({"codec": "webp"}, "codec"),
        ({"selection": "best"}, "selection"),
        ({"codec": "png", "exact": "paper"}, "exact"),
    ],
)
def test_unusable_options_are_refused_by_name(options, argument):
    with pytest.raises(BadInput, match=f"^{argument}="):
        ExemplarSet(**{"budget": 100} | options)


def test_bad_rows_are_refused_and_the_set_stays_as_it_was():
    kept = ExemplarSet(1000)
    kept.update(images(4, 2, 2), [0] * 4, torch.randn(4, 2))
    nan = torch.full((4, 2), float("nan"))
    for x, y, z in (
        (images(4, 2, 2), [1] * 4, nan),
        (images(4, 3, 2), [1] * 4, torch.randn(4, 2)),
        (images(0, 2, 2), [], torch.zeros(0, 2)),
        (images(4, 2, 2), [1] * 3, torch.randn(4, 2)),
        (images(4, 2, 2), [1.5] * 4, torch.randn(4, 2)),
        (images(4, 2, 2), [1] * 4, None),
    ):
        with pytest.raises(BadInput):
            kept.update(x, y, z)
    assert kept.counts == {0: 4}


def test_a_reservoir_keeps_every_row_of_a_stream_equally_often():
    times = torch.zeros(20)
    for seed in range(600):
        kept = Reservoir(5, seed)
        for start in range(0, 20, 4):
            kept.add(torch.arange(start, start + 4))
        times[kept.rows] += 1
    assert len(kept) == 5
    assert (times - 150).abs().max() < 5 * (600 * 0.25 * 0.75) ** 0.5


def test_a_reservoir_goes_on_from_its_state():
    straight, first = Reservoir(3, 7), Reservoir(3, 7)
    straight.add(torch.arange(10))
    straight.add(torch.arange(10, 30))
    first.add(torch.arange(10))
    second = Reservoir(3, 7)
    second.load_state_dict(first.state_dict())
    second.add(torch.arange(10, 30))
    assert torch.equal(second.rows, straight.rows)


def test_a_budget_may_be_written_with_its_unit():
    kept = ExemplarSet("1kB")
    kept.update(images(100, 2, 2), [0] * 100, torch.randn(100, 3))
    assert kept.budget == 1000
    assert len(kept) == 1000 // 12
    kept.resize("60 B")
    assert len(kept) == 5
    with pytest.raises(BadInput, match="budget='1 barrel'"):
        kept.resize("1 barrel")
    assert kept.budget == 60
