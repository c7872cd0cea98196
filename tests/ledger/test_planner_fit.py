"""``fit`` finds the largest batch, says what it costs, and refuses what cannot be."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from memspan.base import BadInput
from memspan.ledger import Budget, fit, load_factory, plan, verify
from memspan.ledger.fitting import Candidate, _best, _combinations
from memspan.ledger.job import Job
from memspan.recipes.ledger.models import MLP, classify

BATCH = (torch.zeros(4, 256), torch.zeros(4, dtype=torch.long))


@pytest.fixture(scope="module")
def found():
    choice = ["autocast", "bitfit", ["autocast", "linear_probe"]]
    return fit(MLP, BATCH, "16MiB", methods=choice, loss=classify)


def test_the_batch_found_fits_and_one_more_does_not(found):
    for item in found.candidates:
        here = item.job.trace(item.batch)
        above = item.job.trace(item.batch + 1)
        assert here.total == item.total <= found.budget.bytes < above.total


def test_the_batch_found_runs_within_the_budget_by_the_allocator(found):
    done = verify(found.best)
    assert done.planned == done.measured == found.best.total
    assert done.allocator <= found.budget.bytes * 1.001
    assert abs(done.error) < 0.001


def test_plain_training_is_always_a_candidate_and_conflicts_are_never_combined(found):
    assert () in {item.methods for item in found.candidates}
    names = [{item.name for item, _ in combined} for combined in _combinations("all", 2)]
    assert names[0] == set()
    assert {"checkpoint", "autocast"} in names
    assert not any({"bitfit", "lora"} <= name for name in names)


def test_no_candidate_of_the_front_is_beaten_by_another(found):
    for item in found.front:
        for other in found.front:
            better = other.flops < item.flops and other.batch >= item.batch and other.trained >= item.trained
            assert not better
    assert [item.flops for item in found.front] == sorted(item.flops for item in found.front)


def test_the_best_trains_everything_where_that_fits(found):
    assert found.best.trained == plan(MLP, BATCH, loss=classify).trained
    assert found.best in found.front


def test_the_best_is_the_cheapest_that_takes_the_wanted_batch_else_the_largest():
    cheap, large = Candidate(("a",), 8, flops=1, trained=5), Candidate(("b",), 64, flops=2, trained=5)
    little = Candidate(("c",), 99, flops=1, trained=1)
    for wanted, expected in ((4, cheap), (8, cheap), (9, large), (80, large)):
        assert _best((cheap, little, large), wanted) is expected
    assert _best((), 1) is None


def test_checkpointing_costs_flops_and_buys_batch():
    def deep():
        blocks = (nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(4))
        return nn.Sequential(*blocks)

    batch = (torch.zeros(2, 64), torch.zeros(2, 64))
    both = fit(deep, batch, "6MiB", methods=["checkpoint"], loss=F.mse_loss)
    plain, checkpointed = both.candidates
    assert checkpointed.batch > 1.5 * plain.batch
    assert 1.1 < checkpointed.flops / plain.flops < 1.4


class _Bent(nn.Module):
    """A temporary of another size from the third example on: no straight line from the first two."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x):
        if len(x) < 3:
            return self.layer(x).square().sum() + torch.zeros(100_000).sum()
        return self.layer(x).square().sum() + torch.zeros(2_000 * len(x)).sum()


def test_the_answer_is_right_where_the_line_is_not():
    found = fit(_Bent, torch.zeros(2, 32), "500KiB", methods=[])
    assert not found.best.affine
    assert found.best.job.trace(found.best.batch).total <= 500 * 1024
    assert found.best.job.trace(found.best.batch + 1).total > 500 * 1024


def test_few_traces_are_needed(monkeypatch):
    sizes = []
    real = Job.trace

    def counted(self, size, **options):
        sizes.append(size)
        return real(self, size, **options)

    monkeypatch.setattr(Job, "trace", counted)
    fit(MLP, BATCH, "16MiB", methods=[], loss=classify)
    assert len(sizes) <= 9


def test_batch_norm_that_refuses_one_example_is_traced_from_two():
    def build():
        return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))

    found = fit(build, (torch.zeros(4, 8), torch.zeros(4, 8)), "1MiB", methods=[], loss=F.mse_loss)
    assert found.best.batch > 2


def test_a_budget_below_the_model_is_refused_with_the_least_that_works():
    with pytest.raises(
        BadInput, match=r"budget='1 MiB': the model's own parameters and buffers take 2,114,600"
    ):
        fit(MLP, BATCH, "1MiB", methods=["autocast"], loss=classify)


def test_where_nothing_fits_the_nearest_is_named():
    found = fit(MLP, BATCH, "3MiB", methods=["checkpoint"], loss=classify)
    assert found.best is None
    assert found.front == ()
    assert "nothing fits 3 MiB; the nearest is plain, which needs" in str(found)
    with pytest.raises(BadInput, match="fits no batch"):
        verify(found.nearest)


def test_a_combination_that_does_not_apply_is_skipped_with_its_reason():
    def build():
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())

    found = fit(build, torch.zeros(2, 3, 8, 8), "1MiB", methods=["lora"], loss=lambda y, _: y.sum())
    assert [item.methods for item in found.skipped] == [("lora",)]
    assert "name nn.Linear layers" in found.skipped[0].skipped


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": "8 gigs"}, "budget='8 gigs': write a number and a unit"),
        ({"batch": None}, "batch=None: give example inputs"),
        ({"methods": ["chekpoint"]}, "did you mean checkpoint"),
        ({"loss": None}, "loss=None: forward does not take the batch's 2 entries"),
    ],
)
def test_bad_input_is_refused(change, message):
    with pytest.raises(BadInput, match=message):
        fit(
            **{
                "build_model": MLP,
                "batch": BATCH,
                "budget": "8GiB",
                "loss": classify,
                "methods": [],
                **change,
            }
        )


def test_the_table_has_a_row_for_each_candidate_with_the_front_first(found):
    rows = found.table()
    assert len(rows) == len(found.candidates)
    assert [row["front"] for row in rows] == sorted((row["front"] for row in rows), reverse=True)
    assert found.budget == Budget.parse("16MiB")


def test_options_of_a_method_travel_with_it():
    choice = [("lora", {"rank": 2}), [("lora", {"rank": 4}), "autocast"]]
    found = fit(
        MLP, BATCH, "16MiB", methods=choice, loss=classify, optimizer=functools.partial(torch.optim.Adam)
    )
    plain, thin, thick = found.candidates
    assert plain.trained > thick.trained > thin.trained
    assert thick.methods == ("lora", "autocast")


@pytest.mark.slow
def test_two_processes_find_what_one_finds_also_for_a_model_in_the_users_file(found, tmp_path):
    pytest.importorskip("joblib")
    (tmp_path / "mine.py").write_text(
        "from memspan.recipes.ledger.models import MLP, classify\n"
        "class Mine(MLP):\n    pass\n"
        "def make():\n    return Mine, None, lambda output, target: classify(output, target)\n"
    )
    made, told = load_factory(f"{tmp_path / 'mine.py'}:make"), []
    choice = ["autocast", "bitfit", ["autocast", "linear_probe"]]
    again = fit(
        made.build_model, BATCH, "16MiB", methods=choice, loss=made.loss, jobs=2, progress=told.append
    )
    assert again.table() == found.table()
    assert told == ["plain", "3 combinations, 2 processes"]
    assert verify(again.best).planned == found.best.total


def test_no_processes_are_refused():
    with pytest.raises(BadInput, match="jobs=0: give the number of processes"):
        fit(MLP, BATCH, "16MiB", methods=["autocast"], loss=classify, jobs=0)
