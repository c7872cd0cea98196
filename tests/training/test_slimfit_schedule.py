"""SlimFit's scheduler: every unit is visited, frozen ones do not move, and a saved one goes on alike."""

import copy
import math
import re

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from memspan.base import BadInput
from memspan.training.slimfit import FreezingScheduler, weight_update_distance


def stack(n=8, width=3):
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(n)))


def train(model, sched, opt, steps, x=None):
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(9)) if x is None else x
    for _ in range(steps):
        if sched is not None:
            sched.before_forward()
        model(x).square().mean().backward()
        opt.step()
        opt.zero_grad(set_to_none=True)
        if sched is not None:
            sched.after_step()


@pytest.mark.parametrize(("n", "rate"), [(8, 0.75), (8, 0.5), (10, 0.9), (7, 0.6), (5, 0.3)])
def test_the_first_steps_visit_every_unit(n, rate):
    model = stack(n)
    sched = FreezingScheduler(model, rate)
    k = n - int(rate * n)
    train(model, sched, torch.optim.SGD(model.parameters(), 0.01), math.ceil(n / k))
    visits = sched.history.sum(0)
    assert int(visits.min()) >= 1
    if n % k == 0:
        assert visits.tolist() == [1] * n
    assert max(sched.distances.values()) < 1e6


def test_first_visits_come_in_the_order_asked_for_and_the_rest_as_drawn():
    model = stack(8)
    drawn = FreezingScheduler(model, 0.75, seed=4)
    ranked = sorted(drawn.units, key=lambda unit: -drawn.distances[unit])
    asked = [ranked[5], ranked[2], ranked[7]]
    sched = FreezingScheduler(stack(8), 0.75, seed=4, visits=asked)
    rest = [unit for unit in ranked if unit not in asked]
    assert sorted(sched.distances, key=lambda unit: -sched.distances[unit]) == [*asked, *rest]
    assert set(sched.before_forward()) == set(asked[:2])
    with pytest.raises(BadInput, match=r"visits='9.weight'"):
        FreezingScheduler(stack(8), 0.75, visits=["9.weight"])


def test_simulated_dynamics_give_the_published_rotation():
    model = nn.ParameterList(nn.Parameter(torch.ones(1, 1)) for _ in range(10))
    sched = FreezingScheduler(model, 0.8)
    sched.distances = {unit: (i + 1) * 1e9 for i, unit in enumerate(sched.units)}
    base, total, pairs = [0.1 * (i + 1) for i in range(10)], 20, []
    for t in range(total):
        with torch.no_grad():
            for parameter in model:
                parameter.fill_(1.0)
        active = [int(unit) for unit in sched.before_forward()]
        pairs.append(tuple(active))
        with torch.no_grad():
            for i in active:
                model[i].add_(base[i] * (1 - t / total))
        sched.after_step()
    assert pairs[:7] == [(8, 9), (6, 7), (4, 5), (2, 3), (0, 1), (8, 9), (7, 9)]
    assert sched.history.sum(0).tolist() == [1, 1, 2, 2, 3, 3, 4, 5, 7, 12]


def test_nothing_frozen_is_ordinary_training_bit_for_bit_and_all_frozen_is_refused():
    plain, scheduled = stack(), None
    scheduled = copy.deepcopy(plain)
    train(plain, None, torch.optim.AdamW(plain.parameters(), 0.01), 6)
    opt = torch.optim.AdamW(scheduled.parameters(), 0.01)
    train(scheduled, FreezingScheduler(scheduled, 0.0, optimizer=opt), opt, 6)
    for a, b in zip(plain.parameters(), scheduled.parameters(), strict=True):
        assert torch.equal(a, b)
    for rate in (1.0, 1, -0.1, 2, True, "half"):
        with pytest.raises(BadInput, match=r"freeze_rate=.*of 8 units one at least trains: at most 0\.875"):
            FreezingScheduler(stack(), rate)


def test_frozen_units_do_not_move_and_hold_no_gradient_and_go_on_like_skipped_steps():
    torch.manual_seed(3)
    model = stack(6)
    twin = copy.deepcopy(model)
    opt = torch.optim.AdamW(model.parameters(), 0.02, weight_decay=0.1)
    own = {n: torch.optim.AdamW([p], 0.02, weight_decay=0.1) for n, p in twin.named_parameters()}
    sched = FreezingScheduler(model, 0.6, optimizer=opt)
    x = torch.randn(5, 3)
    for _ in range(12):
        active = set(sched.before_forward())
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        model(x).square().mean().backward()
        gradients = {n: p.grad for n, p in model.named_parameters()}
        frozen = set(sched.units) - active
        assert all(gradients[n] is None for n in frozen)
        opt.step()
        assert all(torch.equal(before[n], p) for n, p in model.named_parameters() if n in frozen)
        for n, p in twin.named_parameters():  # one AdamW a tensor, stepped only when its unit is active
            if n not in frozen:
                p.grad = gradients[n]
                own[n].step()
        opt.zero_grad(set_to_none=True)
        sched.after_step()
        assert all(torch.equal(p, dict(twin.named_parameters())[n]) for n, p in model.named_parameters())


def test_gradients_left_on_frozen_units_by_a_zeroing_loop_are_removed():
    model = stack(4)
    opt = torch.optim.AdamW(model.parameters(), 0.1)
    sched = FreezingScheduler(model, 0.75, optimizer=opt)
    for _ in range(5):
        active = sched.before_forward()
        assert all(
            p.grad is None for n, p in model.named_parameters() if n.endswith("weight") and n not in active
        )
        model(torch.ones(2, 3)).sum().backward()
        opt.step()
        opt.zero_grad(set_to_none=False)
        sched.after_step()


def test_micro_batches_of_one_step_share_one_set():
    model = stack()
    sched = FreezingScheduler(model, 0.5)
    first = sched.before_forward()
    assert sched.before_forward() == first
    sched.after_step()
    with pytest.raises(BadInput, match="before_forward"):
        sched.after_step()


@pytest.mark.parametrize("metric", ["update_distance", "random", "gradient_norm"])
def test_a_saved_scheduler_goes_on_to_the_same_choices(metric, tmp_path):
    torch.manual_seed(1)
    model = stack()
    copied = copy.deepcopy(model)
    opt = torch.optim.SGD(model.parameters(), 0.05)
    sched = FreezingScheduler(model, 0.7, metric=metric, explore=0.3, max_age=6, seed=4)
    train(model, sched, opt, 9)
    state, weights = sched.state_dict(), copy.deepcopy(model.state_dict())
    train(model, sched, opt, 8)
    copied.load_state_dict(weights)
    again = FreezingScheduler(copied, 0.7, metric=metric, explore=0.3, max_age=6, seed=99)
    again.load_state_dict(state)
    train(copied, again, torch.optim.SGD(copied.parameters(), 0.05), 8)
    assert torch.equal(again.history, sched.history)
    with pytest.raises(BadInput, match="saved for others"):
        FreezingScheduler(stack(3), 0.5).load_state_dict(state)
    sched.before_forward()
    with pytest.raises(BadInput, match="after_step"):
        sched.state_dict()


def test_one_seed_gives_one_schedule_on_one_thread_and_on_four():
    found = []
    for threads, seed in ((1, 0), (4, 0), (1, 1)):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        model = stack(8, 64)
        sched = FreezingScheduler(model, 0.7, seed=seed)
        train(model, sched, torch.optim.SGD(model.parameters(), 0.05), 15, torch.ones(8, 64))
        found.append(sched.history)
    torch.set_num_threads(1)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_distances_stay_finite_with_zeros_and_agree_with_the_papers_without():
    weight = torch.rand(50) + 0.5
    moved = weight * (1 + 0.1 * torch.randn(50))
    paper = float(((moved - weight) / weight).abs().mean())
    assert weight_update_distance(weight, moved) == pytest.approx(paper, rel=2e-3)
    weight[::2] = 0.0
    assert math.isfinite(weight_update_distance(weight, moved))
    assert math.isfinite(weight_update_distance(torch.zeros(4), torch.ones(4)))
    assert weight_update_distance(torch.zeros(4), torch.zeros(4)) == 0.0
    assert weight_update_distance(torch.tensor([2.0]), torch.tensor([3.0])) == pytest.approx(0.4995, abs=1e-4)
    assert math.isnan(weight_update_distance(torch.ones(2), torch.tensor([1.0, float("nan")])))
    with pytest.raises(BadInput, match="new="):
        weight_update_distance(torch.zeros(2), torch.zeros(3))


def test_distances_of_sixteen_bit_weights_are_computed_in_32():
    old = torch.full((1000,), 1.0, dtype=torch.bfloat16)
    new = old + 2.0**-7
    assert weight_update_distance(old, new, eps=0.0) == pytest.approx(2.0**-7, rel=1e-6)
    mixed = torch.cat((torch.full((1000,), 1.0), torch.full((1,), 300.0))).bfloat16()
    assert weight_update_distance(mixed, mixed * 1.5) == pytest.approx(
        weight_update_distance(mixed.float(), (mixed * 1.5).float()), rel=1e-6
    )


def test_weights_that_become_nan_raise_with_the_units_name():
    model = stack(4)
    sched = FreezingScheduler(model, 0.0)
    sched.before_forward()
    with torch.no_grad():
        model[2].weight.fill_(float("nan"))
    with pytest.raises(BadInput, match=re.escape("2.weight")):
        sched.after_step()


@pytest.mark.parametrize("where", ["drop", "cpu", "keep"])
def test_moments_of_frozen_units_are_kept_dropped_or_moved(where):
    torch.manual_seed(2)
    model = stack(5)
    twin = copy.deepcopy(model)
    opt = torch.optim.AdamW(model.parameters(), 0.01)
    sched = FreezingScheduler(model, 0.8, optimizer=opt, optimizer_state=where)
    train(model, sched, opt, 7)
    if where == "cpu":  # moving changes no bit
        other = torch.optim.AdamW(twin.parameters(), 0.01)
        train(twin, FreezingScheduler(twin, 0.8, optimizer=other), other, 7)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    named = dict(model.named_parameters())
    (trained,) = sched.active
    steps = {n: int(opt.state[p]["step"]) for n, p in named.items() if n in sched.units and opt.state.get(p)}
    turns = dict(zip(sched.units, sched.history.sum(0).tolist(), strict=True))
    if where != "drop":
        assert steps == turns
        return
    streak = next(t for t in range(8) if t == 7 or not sched.history[6 - t, sched.units.index(trained)])
    assert steps == {trained: streak}  # the count starts again whenever a unit was frozen between
    sched.distances = {unit: float(unit != trained) for unit in sched.units}
    sched.before_forward()
    assert not any(opt.state.get(named[unit]) for unit in sched.units)


def test_explore_lets_the_longest_frozen_unit_in_and_max_age_forces_it():
    def settled(**options):
        model = stack(10)
        sched = FreezingScheduler(model, 0.8, **options)
        sched.distances = {unit: 0.005 * i for i, unit in enumerate(sched.units)}
        for _ in range(40):
            sched.before_forward()
            with torch.no_grad():  # at a constant rate the same two always move most
                for place, layer in enumerate(model):
                    layer.weight.mul_(1 + 0.01 * place)
            sched.after_step()
        return sched.history.sum(0)

    assert int((settled() > 0).sum()) == 2
    assert int((settled(explore=0.5) > 0).sum()) == 10
    aged = settled(max_age=8)
    assert int(aged.min()) >= 3


def test_units_are_weights_of_two_dimensions_and_norms_and_the_head_always_trains():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.norm = nn.Embedding(7, 4), nn.LayerNorm(4)
            self.conv, self.fc = nn.Conv1d(4, 4, 1), nn.Linear(4, 4)
            self.classifier = nn.Linear(4, 2)

    net = Net()
    assert FreezingScheduler(net, 0.5).units == ["embed.weight", "norm.weight", "conv.weight", "fc.weight"]
    assert len(FreezingScheduler(net, 0.5, always=()).units) == 5
    assert FreezingScheduler(net, 0.5, always=["embed", "fc.*"]).units[0] == "norm.weight"
    net.fc.requires_grad_(False)
    sched = FreezingScheduler(net, 0.5, never=["embed"])
    assert sched.units == ["norm.weight", "conv.weight"]
    assert not net.embed.weight.requires_grad
    for wrong in ({"always": ["heads"]}, {"never": ["x"]}):
        with pytest.raises(BadInput, match="has such a name"):
            FreezingScheduler(net, 0.5, **wrong)


def test_bert_bases_classifier_has_a_hundred_and_two_units():
    transformers = pytest.importorskip("transformers")
    try:
        with torch.device("meta"):
            model = transformers.BertForSequenceClassification(transformers.BertConfig())
    except (ImportError, RuntimeError) as error:
        pytest.skip(str(error))
    assert len(FreezingScheduler(model, 0.9, always=()).units) == 102


def test_blocks_can_be_units():
    model = nn.ModuleDict({"blocks": nn.ModuleList(stack(2) for _ in range(4)), "out": nn.Linear(3, 3)})
    sched = FreezingScheduler(model, 0.5, granularity="block")
    assert sched.units == ["blocks.0", "blocks.1", "blocks.2", "blocks.3", "out.weight"]
    sched.before_forward()
    for i in range(4):
        flags = {layer.weight.requires_grad for layer in model["blocks"][i]}
        assert flags == {f"blocks.{i}" in sched.active}


@pytest.mark.parametrize("granularity", ["tensor", "block"])
def test_a_model_sharded_by_fsdp2_follows_the_same_schedule(granularity, tmp_path):
    def trained(mesh):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Sequential(*(stack(2) for _ in range(4))), nn.Linear(3, 3))
        for part in (*model[0], model) if mesh else ():
            fully_shard(part, mesh=mesh)
        opt = torch.optim.AdamW(model.parameters(), 0.01)
        sched = FreezingScheduler(model, 0.5, optimizer=opt, granularity=granularity)
        train(model, sched, opt, 8)
        return sched.history, [p.full_tensor() if mesh else p for p in model.parameters()]

    history, weights = trained(None)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        again, sharded = trained(init_device_mesh("cpu", (1,)))
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(again, history)
    assert all(torch.equal(a, b) for a, b in zip(sharded, weights, strict=True))


def test_bad_input_is_refused_before_anything_changes():
    model = stack(3)
    opt = torch.optim.SGD([p for n, p in model.named_parameters() if n != "1.weight"], 0.1)
    with pytest.raises(BadInput, match=re.escape("optimizer='1.weight'")):
        FreezingScheduler(model, 0.5, optimizer=opt)
    with pytest.raises(BadInput, match="nothing is left to schedule"):
        FreezingScheduler(nn.ReLU(), 0.5)
    for options in (
        {"metric": "loss"}, {"explore": 2.0}, {"max_age": 0}, {"optimizer_state": "disk"},
        {"granularity": "model"},
        {"optimizer_state": "drop"},
    ):  # fmt: skip
        with pytest.raises(BadInput):
            FreezingScheduler(model, 0.5, **options)
    assert all(p.requires_grad for p in model.parameters())


def test_a_compiled_model_is_allowed_with_a_warning():
    with pytest.warns(UserWarning, match="compiles it again"):
        FreezingScheduler(torch.compile(stack(2)), 0.5)


def test_the_snapshot_holds_the_active_units_alone_and_is_freed():
    model = stack(10)
    sched = FreezingScheduler(model, 0.8)
    sched.before_forward()
    assert sched.memory_bytes() == {"snapshot": 2 * 9 * 4}
    sched.after_step()
    assert sched.memory_bytes() == {"snapshot": 0}
    sched.release()
    assert all(p.requires_grad for p in model.parameters())


def test_with_the_optimizer_the_copy_lives_through_its_step_alone_and_nothing_else_changes():
    found = []
    for known in (False, True):
        torch.manual_seed(0)
        model = stack(10)
        opt = torch.optim.AdamW(model.parameters(), 1e-2)
        sched = FreezingScheduler(model, 0.8, optimizer=opt if known else None)
        for _ in range(8):
            sched.before_forward()
            assert bool(sched.memory_bytes()["snapshot"]) != known
            model(torch.ones(2, 3)).square().sum().backward()
            opt.step()
            assert sched.memory_bytes()["snapshot"] == 2 * 9 * 4
            opt.zero_grad(set_to_none=True)
            sched.after_step()
        found.append((sched.history, sched.distances))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    before = dict(sched.distances)
    sched.before_forward()
    sched.after_step()  # no optimizer step: nothing moved, nothing is measured
    assert sched.distances == before


def test_the_picture_of_the_schedule_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    model = stack(4)
    sched = FreezingScheduler(model, 0.5)
    train(model, sched, torch.optim.SGD(model.parameters(), 0.1), 4)
    sched.plot(tmp_path / "schedule.png")
    assert (tmp_path / "schedule.png").stat().st_size > 1000


def _rank(rank, folder):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    torch.manual_seed(0)
    model = stack(6)
    opt = torch.optim.SGD(model.parameters(), 0.1)
    sched = FreezingScheduler(model, 0.7, optimizer=opt)
    sched.average_gradients(model)
    data = torch.randn(8, 3, generator=torch.Generator().manual_seed(5))
    train(model, sched, opt, 101, data[4 * rank : 4 * rank + 4])  # step 100 compares the ranks
    torch.save({"weights": model.state_dict(), "history": sched.history}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_train_as_one_with_the_whole_batch(tmp_path):
    torch.multiprocessing.start_processes(_rank, (str(tmp_path),), nprocs=2, start_method="fork")
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    torch.manual_seed(0)
    model = stack(6)
    opt = torch.optim.SGD(model.parameters(), 0.1)
    sched = FreezingScheduler(model, 0.7, optimizer=opt)
    data = torch.randn(8, 3, generator=torch.Generator().manual_seed(5))
    train(model, sched, opt, 101, data)
    assert torch.equal(found[0]["history"], found[1]["history"])
    assert torch.equal(found[0]["history"], sched.history)
    for name, weight in model.state_dict().items():
        assert torch.equal(found[0]["weights"][name], found[1]["weights"][name])
        torch.testing.assert_close(found[0]["weights"][name], weight, rtol=1e-4, atol=1e-6)


def test_ranks_that_see_other_weights_are_told_at_the_hundredth_step(monkeypatch):
    model = stack(2)
    sched = FreezingScheduler(model, 0.5)
    other = [0]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)

    def gather(found, mine):
        found[:] = [mine, mine + other[0]]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    for step in range(200):
        sched.before_forward()
        other[0] = int(step == 199)
        if step < 199:
            sched.after_step()
    with pytest.raises(BadInput, match="ranks disagree at step 200"):
        sched.after_step()


def test_averaging_needs_ranks():
    model = stack(2)
    with pytest.raises(BadInput, match="init_process_group"):
        FreezingScheduler(model, 0.5).average_gradients(model)


def test_a_second_scheduler_is_told_of_what_the_first_has_frozen():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))
    first = FreezingScheduler(model, 0.5)
    units = first.units
    first.before_forward()
    with pytest.raises(BadInput, match=r"release\(\) first"):
        FreezingScheduler(model, 0.5)  # a cell of a notebook that is run twice
    with pytest.raises(BadInput, match=r"release\(\) first"):
        FreezingScheduler(copy.deepcopy(model), 0.5)
    first.release()
    assert FreezingScheduler(model, 0.5).units == units
    first.before_forward()
    model.requires_grad_(True)  # where the first is out of reach
    assert FreezingScheduler(model, 0.5).units == units
