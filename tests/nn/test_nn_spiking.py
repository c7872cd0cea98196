"""The LIF step, its surrogates, and the state that neurons carry."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from memspan.base import BadInput
from memspan.nn.spiking import (
    LIF,
    Unrolled,
    detach_,
    holders,
    lif_step,
    reset_,
    set_states_,
    states,
    surrogate,
)

NAMES = list(surrogate.DERIVATIVES)


def composite(current, v, decay, threshold, reset, name, width, detach):
    """The step out of torch's own operators: what the one function is held against."""
    u = current if v is None else decay * v + current
    spikes = getattr(surrogate, name)(u - threshold, width)
    at_reset = spikes.detach() if detach else spikes
    return spikes, u * (1 - at_reset) if reset == "zero" else u - threshold * at_reset


@pytest.mark.parametrize("reset", ["subtract", "zero"])
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_step_is_the_composite_forward_and_backward(reset, detach, name):
    draws = [torch.randn(3, 5, dtype=torch.float64) for _ in range(6)]
    weights = torch.randn(6, 3, 5, dtype=torch.float64)
    found = []
    for step in (composite, lif_step):
        currents = [draw.clone().requires_grad_() for draw in draws]
        decay = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        v, total = None, 0.0
        for t, current in enumerate(currents):
            spikes, v = step(current, v, decay, 0.8, reset, name, 1.5, detach)
            total = total + (spikes * weights[t]).sum()
        total = total + (v * v).sum()
        found.append((total.detach(), *torch.autograd.grad(total, [*currents, decay])))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_a_fixed_decay_gives_the_same_as_a_tensor():
    current, v = torch.randn(4, 3), torch.randn(4, 3)
    for one, other in zip(lif_step(current, v, 0.5), lif_step(current, v, torch.tensor(0.5)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("name", "slopes"),
    [("triangle", [1 - abs(0.7 - 1), 1 - abs(1.05 - 1), 1 - abs(0.725 - 1)]), ("rectangle", [1.0, 1.0, 1.0])],
)
def test_one_neuron_by_hand(name, slopes):
    # decay 0.5, input 0.7: u = 0.7, 1.05 (fires, v = 0.05), 0.725; slopes at u - 1
    current = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    v, potentials, spikes = None, [], []
    for _ in range(3):
        u = current if v is None else 0.5 * v + current
        fired, v = lif_step(current, v, 0.5, surrogate=name)
        potentials.append(u.item())
        spikes.append(fired)
    assert np.allclose(potentials, [0.7, 1.05, 0.725])
    assert [s.item() for s in spikes] == [0, 1, 0]
    s1, s2, s3 = slopes
    du1 = 1.0
    du2 = 0.5 * (1 - s1) * du1 + 1
    du3 = 0.5 * (1 - s2) * du2 + 1
    total = sum(spikes)
    (gradient,) = torch.autograd.grad(total.sum(), current)
    assert gradient.item() == pytest.approx(s1 * du1 + s2 * du2 + s3 * du3, abs=1e-12)


def test_surrogates_have_area_one_and_stretch_with_their_width():
    x = torch.linspace(-60, 60, 2_000_001, dtype=torch.float64)
    for name in NAMES:
        for width in (1.0, 2.5):
            area = torch.trapezoid(surrogate.derivative(name, x, width), x).item()
            assert area == pytest.approx(1, abs=0.03 if name == "atan" else 1e-4)
        at = torch.tensor([0.3])
        wide = surrogate.derivative(name, at, 2.0) * 2
        torch.testing.assert_close(wide, surrogate.derivative(name, at / 2, 1.0))


def test_a_spike_comes_at_the_threshold_itself():
    for name in NAMES:
        assert getattr(surrogate, name)(torch.zeros(1)).item() == 1
    assert lif_step(torch.ones(1), None, 0.5)[0].item() == 1


def test_rectangle_lets_time_pass_wholly_or_not_at_all():
    u = torch.linspace(-1, 3, 101, dtype=torch.float64)
    v = u.clone().requires_grad_()
    _, after = lif_step(torch.zeros_like(v), v, 0.5, surrogate="rectangle")
    (through,) = torch.autograd.grad(after.sum(), v)
    assert set(through.tolist()) == {0.0, 0.5}  # decay x (1 - 1) inside the window, decay outside


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_keep_the_potential_in_thirty_two(dtype):
    neuron = LIF(2.0)
    spikes = neuron(torch.full((2, 3), 0.75, dtype=dtype))
    assert spikes.dtype == dtype
    assert states(neuron)[""]["v"].dtype == torch.float32
    neuron(torch.full((2, 3), 0.75, dtype=dtype))


def test_autocast_computes_the_step_in_thirty_two():
    net = nn.Sequential(nn.Linear(4, 8), LIF(2.0), nn.Linear(8, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        net(torch.randn(3, 4)).float().sum().backward()
    assert states(net)["1"]["v"].dtype == torch.float32
    assert net[0].weight.grad is not None


def test_a_neuron_without_leak_integrates():
    neuron = LIF(math.inf)
    fired = [neuron(torch.full((1,), 0.25)).item() for _ in range(8)]
    assert fired == [0, 0, 0, 1, 0, 0, 0, 1]


def test_a_trained_decay_starts_at_tau_and_moves():
    neuron = LIF(2.0, learn_tau=True)
    assert neuron.decay.item() == pytest.approx(0.5)
    for _ in range(3):
        out = neuron(torch.full((1, 4), 0.6))
    out.sum().backward()
    assert neuron.decay_logit.grad.abs() > 0


def test_whole_sequences_are_steps_in_a_row():
    x = torch.rand(6, 3, 5)
    single, whole = LIF(2.0), LIF(2.0, multi_step=True)
    assert torch.equal(torch.stack([single(now) for now in x]), whole(x))
    assert torch.equal(states(single)[""]["v"], states(whole)[""]["v"])


def test_another_batch_size_is_refused_with_both_shapes():
    neuron = LIF()
    neuron(torch.zeros(4, 3))
    with pytest.raises(BadInput, match=r"x=\(2, 3\).*\(4, 3\).*reset_"):
        neuron(torch.zeros(2, 3))
    assert reset_(neuron)(torch.zeros(2, 3)).shape == (2, 3)


def test_a_forgotten_reset_says_so_instead_of_a_second_time():
    net = nn.Sequential(nn.Linear(3, 4), LIF(2.0), nn.Linear(4, 2))
    net(torch.randn(5, 3)).sum().backward()
    with pytest.raises(BadInput, match="reset_"):
        net(torch.randn(5, 3))
    reset_(net)
    out = net(torch.randn(5, 3)) + net(torch.randn(5, 3))  # two steps before the backward pass are a sequence
    out.sum().backward()


def test_a_graph_that_is_retained_may_be_gone_on_from():
    net = nn.Sequential(nn.Linear(3, 4), LIF(2.0))
    net(torch.randn(5, 3)).sum().backward(retain_graph=True)
    net(torch.randn(5, 3)).sum().backward()


def test_a_detached_state_goes_on_without_its_past():
    net = nn.Sequential(nn.Linear(3, 4), LIF(2.0))
    net(torch.ones(5, 3)).sum().backward()
    before = states(net)["1"]["v"]
    detach_(net)
    assert torch.equal(states(net)["1"]["v"], before)
    assert not states(net)["1"]["v"].requires_grad
    net(torch.ones(5, 3)).sum().backward()


def test_a_live_state_follows_to_and_is_in_no_copy_and_no_file():
    net = nn.Sequential(nn.Linear(3, 4), LIF(2.0))
    net(torch.randn(5, 3))
    assert list(net.state_dict()) == ["0.weight", "0.bias"]
    copied = copy.deepcopy(net)  # a state with a graph cannot be copied, so it is not
    assert states(copied) == {"1": {}}
    net.to(torch.float64)
    assert states(net)["1"]["v"].dtype == torch.float64
    net(torch.randn(5, 3, dtype=torch.float64))


def test_a_sequence_goes_on_from_states_that_were_put_away():
    x = torch.rand(8, 2, 3)
    net = nn.Sequential(nn.Linear(3, 4), LIF(5.0), nn.Linear(4, 4), LIF(3.0))
    with torch.no_grad():
        whole = torch.stack([net(now) for now in x])
        reset_(net)
        first = [net(now) for now in x[:3]]
        kept = {name: {k: v.clone() for k, v in one.items()} for name, one in states(net).items()}
        reset_(net)
        net(torch.rand(7, 3))
        set_states_(net, kept)
        second = [net(now) for now in x[3:]]
    assert torch.equal(whole, torch.stack(first + second))
    with pytest.raises(BadInput, match="one state for each"):
        set_states_(net, {"1": {}})


def test_unrolled_begins_and_ends_empty_also_after_an_error():
    net = nn.Sequential(nn.Linear(3, 4), LIF(2.0))
    unrolled = Unrolled(net)
    x = torch.randn(2, 5, 3)
    assert torch.equal(unrolled(x), unrolled(x))
    assert states(net) == {"1": {}}
    with pytest.raises(RuntimeError):
        unrolled(torch.randn(2, 5, 4))
    assert states(net) == {"1": {}}
    kept = torch.cat([unrolled(x[:, :2], keep=True), unrolled(x[:, 2:], keep=True)], 1)
    assert torch.equal(kept, unrolled(x))
    for bad in (torch.zeros(3), torch.zeros(2, 0, 3)):
        with pytest.raises(BadInput, match="time steps in dimension 1"):
            unrolled(bad)


def test_any_module_takes_part_by_two_methods():
    class Trace(nn.Module):
        def __init__(self):
            super().__init__()
            self.held = {}

        def read_state(self):
            return dict(self.held)

        def write_state(self, state):
            self.held = dict(state)

        def forward(self, x):
            self.held = {"sum": x + self.held.get("sum", 0)}
            return self.held["sum"]

    net = nn.Sequential(nn.Linear(2, 2), Trace())
    assert list(holders(net)) == ["1"]
    net(torch.ones(1, 2))
    reset_(net)
    assert states(net) == {"1": {}}


def test_vmap_steps_many_networks_at_once():
    currents, v = torch.randn(4, 3, 5), torch.randn(4, 3, 5)
    both = torch.vmap(lambda c, held: lif_step(c, held, 0.5))(currents, v)
    for one, other in zip(both, lif_step(currents, v, 0.5), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "bad",
    [
        {"tau": 1.0}, {"tau": 0.5}, {"tau": float("nan")}, {"v_threshold": 0.0}, {"v_threshold": -1.0},
        {"reset": "hard"}, {"surrogate": "step"}, {"width": 0.0}, {"tau": math.inf, "learn_tau": True},
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(bad):
    with pytest.raises(BadInput):
        LIF(**bad)


@pytest.mark.slow
def test_compiled_it_gives_the_same():
    net = Unrolled(nn.Sequential(nn.Linear(3, 4), LIF(2.0), nn.Linear(4, 2)))
    x = torch.randn(2, 3, 3)
    wanted = net(x)
    wanted.sum().backward()
    exact = net.net[0].weight.grad.clone()
    net.zero_grad()
    compiled = torch.compile(net, backend="aot_eager")
    for _ in range(2):
        net.zero_grad()
        out = compiled(x)
        out.sum().backward()
        torch.testing.assert_close(out, wanted)
        torch.testing.assert_close(net.net[0].weight.grad, exact)
