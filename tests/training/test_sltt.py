"""SLTT: what it drops and nothing else, its bytes, its step in the planner, its refusals."""

import copy
import itertools
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from memspan.base import BadInput
from memspan.ledger import Ledger, fit, plan, saved_bytes
from memspan.nn.spiking import LIF, Unrolled, reset_, set_states_, states
from memspan.training import checkpoint_, sltt

CE = F.cross_entropy


def dense(tau=2.0, dtype=torch.float64, **options):
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Linear(6, 12), LIF(tau, **options), nn.Linear(12, 12), LIF(tau, **options), nn.Linear(12, 3)
    )
    return net.to(dtype)


def conv(tau=2.0, dtype=torch.float64, norm=True):
    torch.manual_seed(1)
    norms = [nn.BatchNorm2d(4), nn.BatchNorm2d(4)] if norm else [nn.Identity(), nn.Identity()]
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), norms[0], LIF(tau), nn.AvgPool2d(2),
        nn.Conv2d(4, 4, 3, padding=1), norms[1], LIF(tau), nn.Flatten(), nn.Linear(64, 3),
    ).to(dtype)  # fmt: skip


def sequence(net, T=6, B=5, dtype=torch.float64):
    torch.manual_seed(2)
    shape = (T, B, 6) if isinstance(net[0], nn.Linear) else (T, B, 1, 8, 8)
    return 2 * torch.randn(shape, dtype=dtype), torch.arange(B) % 3


def gradients(net):
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def taken(step, x, y):
    step.net.zero_grad()
    loss, out = step(x, y)
    return loss, out, gradients(step.net)


def differ(one, other):
    return max((one[name] - other[name]).abs().max().item() for name in one)


# -- the gradient ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [dense, conv])
@pytest.mark.parametrize("T", [1, 2, 8])
def test_it_is_the_unrolled_network_with_its_state_detached(make, T):
    net = make()
    x, y = sequence(net, T)
    # by hand: every potential handed from step to step without its graph
    by_hand = copy.deepcopy(net)
    neurons = [part for part in by_hand if isinstance(part, LIF)]
    held, losses = [None] * len(neurons), []
    for now in x:
        count = 0
        for part in by_hand:
            if isinstance(part, LIF):
                now, v = part.step(now, held[count])
                held[count], count = v.detach(), count + 1
            else:
                now = part(now)
        losses.append(CE(now, y))
    torch.stack(losses).mean().backward()
    _, _, ours = taken(sltt.OnlineStep(sltt.convert_(net), CE), x, y)
    assert differ(gradients(by_hand), ours) < 1e-12


def test_at_one_step_it_is_bptt_bit_for_bit_and_later_it_is_not():
    exact, ours = dense(), sltt.convert_(dense())
    for T in (1, 6):
        x, y = sequence(exact, T)
        loss_a, out_a, grad_a = taken(sltt.BPTTStep(exact, CE), x, y)
        loss_b, out_b, grad_b = taken(sltt.OnlineStep(ours, CE), x, y)
        assert torch.equal(out_a, out_b)
        torch.testing.assert_close(loss_a, loss_b)
        torch.testing.assert_close(grad_a["4.weight"], grad_b["4.weight"])  # the read-out has no past
        assert (differ(grad_a, grad_b) == 0) == (T == 1)


def test_the_gradient_is_the_sum_of_its_steps_in_any_order():
    net = sltt.convert_(dense())
    x, y = sequence(net, 4)
    _, _, whole = taken(sltt.OnlineStep(net, CE), x, y)
    reset_(net)
    kept = []
    with torch.no_grad():
        for now in x:
            kept.append({n: dict(s) for n, s in states(net).items()})
            net(now)
    net.zero_grad()
    for t in (2, 0, 3, 1):
        set_states_(net, kept[t])
        (CE(net(x[t]), y) / 4).backward()
    assert differ(whole, gradients(net)) < 1e-12


def test_k_steps_in_expectation_are_k_over_t_or_unbiased():
    net = sltt.convert_(conv().eval())
    x, y = sequence(net, 4)
    _, _, all_steps = taken(sltt.OnlineStep(net, CE), x, y)
    for scale, factor in (("reference", 0.5), ("unbiased", 1.0)):
        total = None
        for drawn in itertools.combinations(range(4), 2):
            step = sltt.OnlineStep(net, CE, k=2, loss_scale=scale)
            step_of = sltt.steps.chosen_steps
            try:
                sltt.steps.chosen_steps = lambda *_, d=drawn: set(d)
                _, _, found = taken(step, x, y)
            finally:
                sltt.steps.chosen_steps = step_of
            total = found if total is None else {n: total[n] + found[n] for n in total}
        mean = {name: value / 6 for name, value in total.items()}
        assert differ(mean, {name: factor * value for name, value in all_steps.items()}) < 1e-12
    _, _, every = taken(sltt.OnlineStep(net, CE, k=4), x, y)
    assert differ(every, all_steps) == 0


def test_the_drawn_steps_depend_on_seed_and_iteration_alone():
    draws = [sltt.steps.chosen_steps(20, 5, 0, i) for i in range(50)]
    assert draws == [sltt.steps.chosen_steps(20, 5, 0, i) for i in range(50)]
    assert len({frozenset(d) for d in draws}) > 40
    assert sltt.steps.chosen_steps(20, 5, 1, 0) != draws[0]
    assert set().union(*draws) == set(range(20))
    net = sltt.convert_(dense())
    step = sltt.OnlineStep(net, CE, k=1)
    x, y = sequence(net)
    step(x, y)
    assert step.iteration == 1


def test_checkpointed_and_windowed_steps_agree_with_bptt():
    net = conv(tau=5.0)
    x, y = sequence(net, 7)
    loss, out, exact = taken(sltt.BPTTStep(net, CE), x, y)
    moved = net[1].running_mean.clone()
    for step in (sltt.CheckpointedStep(conv(tau=5.0), CE), sltt.CheckpointedStep(conv(tau=5.0), CE, 3)):
        found_loss, found_out, found = taken(step, x, y)
        assert differ(exact, found) < 1e-12
        torch.testing.assert_close(found_loss.double(), loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(found_out, out)
        assert torch.equal(step.net[1].running_mean, moved)  # norms moved once, not twice
        assert step.net[1].num_batches_tracked == 7
    assert differ(exact, taken(sltt.TBPTTStep(conv(tau=5.0), CE, 7), x, y)[2]) < 1e-12
    assert differ(exact, taken(sltt.TBPTTStep(conv(tau=5.0), CE, 3), x, y)[2]) > 1e-4
    online = sltt.convert_(conv(tau=5.0), max_decay=1)
    cut = taken(sltt.TBPTTStep(conv(tau=5.0), CE, 1), x, y)[2]
    assert differ(cut, taken(sltt.OnlineStep(online, CE), x, y)[2]) < 1e-12


@pytest.mark.parametrize("kind", [sltt.BPTTStep, sltt.TBPTTStep, sltt.CheckpointedStep])
def test_a_loss_at_the_last_step_alone(kind):
    net = dense(tau=5.0)
    x, y = sequence(net, 4)
    losses = [taken(sltt.BPTTStep(net, CE, loss_at="last"), x, y), taken(kind(net, CE, loss_at="last"), x, y)]
    torch.testing.assert_close(losses[0][0], losses[1][0].double(), rtol=1e-6, atol=0)
    if kind is not sltt.TBPTTStep or kind(net, CE).window >= 4:
        assert differ(losses[0][2], losses[1][2]) < 1e-12


def test_delayed_recall_gets_no_gradient_from_sltt_and_some_from_bptt():
    torch.manual_seed(0)
    x = torch.zeros(6, 8, 5)
    x[0, torch.arange(8), torch.arange(8) % 4] = 1  # cues at the first step
    x[-1, :, 4] = 1  # the go signal at the last
    y = torch.arange(8) % 4
    net = nn.Sequential(nn.Linear(5, 32), LIF(20.0), nn.Linear(32, 4))
    exact = taken(sltt.BPTTStep(net, CE, loss_at="last"), x, y)[2]["0.weight"]
    ours = taken(sltt.OnlineStep(sltt.convert_(net, 1.0), CE, loss_at="last"), x, y)[2]["0.weight"]
    assert exact[:, :4].abs().max() > 0
    assert ours[:, :4].abs().max() == 0
    assert ours[:, 4].abs().max() > 0


def test_gradients_add_up_over_batches():
    net = sltt.convert_(dense())
    x, y = sequence(net)
    step = sltt.OnlineStep(net, CE)
    _, _, once = taken(step, x, y)
    step(x, y)
    assert differ({n: 2 * g for n, g in once.items()}, gradients(net)) < 1e-12


# -- bytes -------------------------------------------------------------------------------------------------


def kept_by_step(T):
    net = sltt.convert_(conv(dtype=torch.float32))
    x, y = sequence(net, T, dtype=torch.float32)
    found = []

    def loss(out, target):
        value = CE(out, target)
        found.append(saved_bytes(value, exclude=[x, y, net]))  # norms keep their own buffers
        return value

    sltt.OnlineStep(net, loss)(x, y)
    return found


def test_what_is_kept_is_the_same_at_every_step_for_any_length():
    four, many = kept_by_step(4), kept_by_step(64)
    assert set(four) == set(many)
    assert len(set(many)) == 1
    net = conv(dtype=torch.float32)
    x, y = sequence(net, 64, dtype=torch.float32)
    whole = saved_bytes(torch.stack([CE(net(now), y) for now in x]).mean(), exclude=[x, y, net])
    assert whole / many[0] == pytest.approx(64, rel=1e-3)
    closed = sltt.predict_bytes(net, x[0], 64, method="bptt")["saved_activations"]
    assert closed == pytest.approx(whole, rel=2e-2)  # the loss itself is not in the network
    ours = sltt.predict_bytes(net, x[0], 64)
    assert ours["saved_activations"] * 64 == closed
    assert ours["inputs"] == x.nbytes


def test_after_many_sequences_nothing_has_grown():
    net = sltt.convert_(dense(dtype=torch.float32))
    x, y = sequence(net, dtype=torch.float32)
    step = sltt.OnlineStep(net, CE)
    totals = []
    for turn in range(60):
        net.zero_grad()
        if turn in (2, 59):
            with Ledger(net) as led:
                step(x, y)
            totals.append(led.peak.total)
        else:
            step(x, y)
        assert states(net) == {"1": {}, "3": {}}
    assert totals[0] == totals[1]


def over_time(out, y):
    return torch.stack([CE(now, y) for now in out.unbind(1)]).mean()


def planned(T, method, B=4):
    torch.manual_seed(0)
    batch = (torch.randn(B, T, 1, 8, 8), torch.arange(B) % 3)
    build = lambda: Unrolled(conv(dtype=torch.float32))  # noqa: E731
    return build, batch, plan(build, batch, torch.optim.SGD, method, over_time)


@pytest.mark.parametrize("method", ["sltt", ("sltt", {"k": 1}), "tbptt", ()])
def test_a_plan_is_the_real_step_to_the_byte(method):
    from memspan.ledger.planner import job

    build, batch, found = planned(6, method)
    assert found.exact
    chosen = [] if method == () else [method]
    assert job(build, batch, torch.optim.SGD, chosen, over_time).measure(4).total == found.total


def test_more_steps_cost_their_input_alone():
    _, (x, _), short = planned(4, "sltt")
    _, (longer, _), long = planned(16, "sltt")
    assert 0 <= long.total - short.total - (longer.nbytes - x.nbytes) <= 4096
    _, _, plain = planned(16, ())
    assert plain.total > 3 * long.total


def test_fit_finds_the_longest_sequence_and_leaves_out_what_does_not_apply():
    torch.manual_seed(0)
    batch = (torch.randn(4, 4, 6), torch.arange(4) % 3)
    build = lambda: Unrolled(dense(dtype=torch.float32))  # noqa: E731
    found = fit(build, batch, "14KiB", [["sltt"]], torch.optim.SGD, over_time, grow="length", largest=40)
    lengths = {one.name: one.batch for one in found.candidates}
    assert lengths["sltt"] > 2 * lengths["plain"] > 0, lengths
    everything = fit(build, batch, "1MiB", "all", torch.optim.SGD, over_time, most=1, largest=4)
    assert {"sltt", "tbptt"} <= {one.name for one in everything.candidates}
    assert "checkpoint" in {one.name for one in everything.skipped}
    plain = fit(lambda: nn.Linear(6, 3), (batch[0][:, 0], batch[1]), "1MiB", [["sltt"]], torch.optim.SGD, CE)
    assert "Unrolled" in plain.skipped[0].skipped


def test_the_planned_step_is_the_online_step():
    net = dense(dtype=torch.float32)
    x, y = sequence(net, dtype=torch.float32)
    ours = taken(sltt.OnlineStep(sltt.convert_(net), CE), x, y)
    model = sltt.planned_convert_(Unrolled(dense(dtype=torch.float32)))
    loss = sltt.planned_step(model, (x.transpose(0, 1), y), over_time, 1.0)
    torch.testing.assert_close(loss, ours[0])
    torch.testing.assert_close(gradients(model.net), ours[2])
    windows = Unrolled(dense(dtype=torch.float32))
    sltt.planned_tbptt_step(windows, (x.transpose(0, 1), y), over_time, 1.0, window=4)
    torch.testing.assert_close(
        gradients(windows.net), taken(sltt.TBPTTStep(dense(dtype=torch.float32), CE, 4), x, y)[2]
    )


def test_two_methods_with_a_step_and_checkpointing_are_refused_together():
    batch = (torch.randn(2, 3, 6), torch.tensor([0, 1]))
    model = Unrolled(dense(dtype=torch.float32))
    for pair in (["sltt", "tbptt"], ["sltt", "checkpoint"]):
        with pytest.raises(BadInput, match="do not combine"):
            plan(model, batch, torch.optim.SGD, pair, over_time)
    for bad in ({"k": 0}, {"k": 9}):
        with pytest.raises(BadInput, match="k="):
            plan(model, batch, torch.optim.SGD, ("sltt", bad), over_time)


def test_recomputing_neurons_that_keep_their_state_is_refused():
    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), LIF()) for _ in range(3)))
    with pytest.raises(BadInput, match="CheckpointedStep"):
        checkpoint_(blocks)
    with pytest.raises(BadInput, match="state over time"):
        checkpoint_(blocks, ["1"])


# -- dropout, 16 bits, several processes -------------------------------------------------------------------


def test_a_mask_lasts_one_sequence():
    drop = sltt.TimeDropout(0.5)
    x = torch.ones(2, 200)
    first, again = drop(x), drop(x)
    assert torch.equal(first, again)
    assert set(first.unique().tolist()) == {0.0, 2.0}
    reset_(drop)
    assert not torch.equal(drop(x), first)
    with pytest.raises(BadInput, match="reset_"):
        drop(torch.ones(3, 200))
    assert torch.equal(drop.eval()(x), x)
    net = nn.Sequential(nn.Linear(6, 12), LIF(2.0), sltt.TimeDropout(0.3), nn.Linear(12, 3)).double()
    x, y = sequence(net)
    torch.manual_seed(5)
    exact = taken(sltt.BPTTStep(net, CE), x, y)[2]
    torch.manual_seed(5)
    again = taken(sltt.CheckpointedStep(net, CE, 3), x, y)[2]
    assert differ(exact, again) < 1e-12


def test_a_gradient_scaler_changes_no_bit_and_bfloat16_little():
    net = sltt.convert_(conv(dtype=torch.float32))
    x, y = sequence(net, dtype=torch.float32)
    loss, _, plain = taken(sltt.OnlineStep(net, CE), x, y)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    _, _, scaled = taken(sltt.OnlineStep(net, lambda out, target: scaler.scale(CE(out, target))), x, y)
    assert differ({n: 1024 * g for n, g in plain.items()}, scaled) == 0
    rounded, _, half = taken(sltt.OnlineStep(net, CE, amp=torch.bfloat16), x, y)
    assert abs(rounded / loss - 1) < 0.02
    for name in ("0.weight", "4.weight", "8.weight"):
        assert F.cosine_similarity(plain[name].flatten(), half[name].flatten(), 0) > 0.95


def exchanged(rank, path, results):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    net = sltt.convert_(dense())
    x, y = sequence(net, B=6)
    model = nn.parallel.DistributedDataParallel(net)
    counted = []

    def hook(state, bucket):
        counted.append(1)
        return (
            dist.all_reduce(bucket.buffer().div_(2), async_op=True).get_future().then(lambda f: f.value()[0])
        )

    model.register_comm_hook(None, hook)
    for k in (None, 2):
        net.zero_grad()
        half = slice(rank * 3, rank * 3 + 3)
        sltt.OnlineStep(model, CE, k=k)(x[:, half], y[half])
        results[rank, k] = ({n: g.tolist() for n, g in gradients(net).items()}, len(counted))
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_exchange_gradients_once_a_sequence(tmp_path):
    with torch.multiprocessing.get_context("fork").Manager() as manager:
        results = manager.dict()
        arguments = (str(tmp_path / "store"), results)
        torch.multiprocessing.start_processes(exchanged, arguments, nprocs=2, start_method="fork")
        found = dict(results)
    net = sltt.convert_(dense())
    x, y = sequence(net, B=6)
    for k, count in ((None, 1), (2, 2)):
        _, _, alone = taken(sltt.OnlineStep(net, CE, k=k), x, y)
        for rank in (0, 1):
            both, calls = found[rank, k]
            assert calls == count
            assert differ(alone, {n: torch.tensor(g, dtype=torch.float64) for n, g in both.items()}) < 1e-6


# -- conversion, agreement, refusals -----------------------------------------------------------------------


def test_conversion_is_undone_and_refused_twice():
    net = dense()
    exact = taken(sltt.BPTTStep(net, CE), *sequence(net))[2]
    sltt.convert_(net)
    with pytest.raises(BadInput, match="already"):
        sltt.convert_(net)
    for kind in (sltt.BPTTStep, sltt.TBPTTStep, sltt.CheckpointedStep):
        with pytest.raises(BadInput, match="restore_"):
            kind(net, CE)
    sltt.restore_(net)
    with pytest.raises(BadInput, match="convert_"):
        sltt.OnlineStep(net, CE)
    assert differ(exact, taken(sltt.BPTTStep(net, CE), *sequence(net))[2]) == 0


def test_agreement_falls_with_the_decay_and_changes_nothing():
    cosines = {}
    for tau in (1.1, 2.0, 20.0):
        net = dense(tau)
        x, y = sequence(net, 12, 32)
        before = copy.deepcopy(net.state_dict())
        rows = {row.layer: row for row in sltt.gradient_agreement(net, x, y)}
        assert all(torch.equal(before[name], net.state_dict()[name]) for name in before)
        assert rows["4.weight"].cosine == pytest.approx(1)
        assert 0 <= rows["1"].dead < 1
        cosines[tau] = rows["0.weight"].cosine
    assert cosines[1.1] > cosines[2.0] > cosines[20.0]
    assert cosines[1.1] > 0.99


def test_neurons_out_of_reach_are_told_as_dead():
    net = dense()
    with torch.no_grad():
        net[0].weight[:6] = 0
        net[0].bias[:6] = -50
    x, y = sequence(net, 4, 16)
    rows = {row.layer: row for row in sltt.gradient_agreement(net, x, y)}
    assert rows["1"].dead >= 0.5


def test_an_exception_inside_leaves_gradients_and_states_as_they_were():
    net = sltt.convert_(dense())
    x, y = sequence(net)
    _, _, before = taken(sltt.OnlineStep(net, CE), x, y)
    calls = []

    def failing(out, target):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("the user's own")
        return CE(out, target)

    with pytest.raises(RuntimeError, match="own"):
        sltt.OnlineStep(net, failing)(x, y)
    assert differ(before, gradients(net)) == 0
    assert states(net) == {"1": {}, "3": {}}


def nan_at_the_end(x):
    x = x.clone()
    x[-1, 0, 0] = float("nan")
    return x


@pytest.mark.parametrize(
    ("build", "inputs", "match"),
    [
        (lambda net: sltt.OnlineStep(net, CE, k=7), lambda x: x, "k=7"),
        (lambda net: sltt.OnlineStep(net, CE, k=0), lambda x: x, "k=0"),
        (lambda net: sltt.OnlineStep(net, CE), lambda x: x[:, 0, 0], "x_seq"),
        (lambda net: sltt.OnlineStep(net, CE), lambda x: x[:0], "x_seq"),
        (lambda net: sltt.OnlineStep(net, CE), nan_at_the_end, "NaN"),
        (lambda net: sltt.OnlineStep(net, lambda o, y: o.sum(1)), lambda x: x, "loss_fn"),
        (lambda net: sltt.OnlineStep(net, CE, loss_scale="none"), lambda x: x, "loss_scale"),
        (lambda net: sltt.OnlineStep(net, CE, loss_at="first"), lambda x: x, "loss_at"),
        (lambda net: sltt.OnlineStep(net, CE, k=1, loss_at="last"), lambda x: x, "k=1"),
        (lambda net: sltt.OnlineStep(net, CE, amp=torch.int8), lambda x: x, "amp"),
        (lambda net: sltt.OnlineStep(nn.Linear(2, 2), CE), lambda x: x, "net"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(build, inputs, match):
    net = sltt.convert_(dense())
    x, y = sequence(net)
    with pytest.raises(BadInput, match=match):
        build(net)(inputs(x), y)
    assert not gradients(net)
    assert states(net) == {"1": {}, "3": {}}


@pytest.mark.parametrize(
    ("net", "match"),
    [
        (nn.Sequential(nn.Linear(2, 2)), "no neurons"),
        (nn.Sequential(LIF(), nn.GRU(2, 2)), "1: GRU"),
        (nn.Sequential(LIF(multi_step=True)), "0: LIF.*whole sequences"),
        (nn.Sequential(LIF(20.0)), "gradient_agreement"),
        (nn.Sequential(LIF(math.inf)), "keeps 1 of"),
        (nn.Sequential(LIF(20.0, learn_tau=True)), "keeps 0.95"),
    ],
)
def test_networks_that_cannot_be_cut_are_refused_by_name(net, match):
    with pytest.raises(BadInput, match=match):
        sltt.convert_(net)


def test_a_value_that_lives_outside_the_protocol_is_told():
    class Leaks(nn.Module):
        past = None

        def forward(self, x):
            self.past = x if self.past is None else x + 0.5 * self.past
            return self.past

    net = sltt.convert_(nn.Sequential(nn.Linear(6, 4), LIF(), nn.Linear(4, 3), Leaks()))
    x, y = torch.randn(4, 5, 6), torch.arange(5) % 3
    with pytest.raises(BadInput, match="read_state"):
        sltt.OnlineStep(net, CE)(x, y)
