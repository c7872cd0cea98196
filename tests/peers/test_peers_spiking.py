"""Our neurons, steps and encoders against SpikingJelly, snnTorch and tonic, with shared weights."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from memspan.base import BadInput
from memspan.data.spikes import bin_events
from memspan.nn.spiking import LIF, detach_, holders, lif_step, reset_, set_states_, states
from memspan.training import sltt

pytestmark = pytest.mark.peers


@pytest.fixture
def jelly():
    reason = "pip install --no-deps -r requirements-peers-alone.txt"
    pytest.importorskip("spikingjelly.activation_based.neuron", reason=reason)
    from spikingjelly.activation_based import neuron, surrogate

    def make(kind="LIFNode", tau=1.1, **more):
        options = {"decay_input": False, "v_threshold": 1.0, "v_reset": None, "detach_reset": False}
        return getattr(neuron, kind)(
            tau=tau, surrogate_function=surrogate.PiecewiseQuadratic(), **options | more
        )

    return make


@pytest.fixture
def snn():
    return pytest.importorskip("snntorch", reason="pip install 'memspan[peers]'")


def convolutional(neuron):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), neuron(), nn.AvgPool2d(2),
        nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), neuron(), nn.Flatten(), nn.Linear(128, 3),
    )  # fmt: skip


def batch(T=6, B=5):
    torch.manual_seed(3)
    return 2 * torch.rand(T, B, 1, 8, 8), torch.arange(B) % 3


def grads(net):
    return torch.cat([p.grad.flatten() for p in net.parameters()])


@pytest.mark.parametrize("reset", ["subtract", "zero"])
def test_spikingjelly_gives_our_loss_and_gradients(jelly, reset):
    x, y = batch()
    jumps = {"v_reset": None if reset == "subtract" else 0.0}
    ours = convolutional(lambda: LIF(1.1, reset=reset))
    theirs = convolutional(lambda: jelly(**jumps))
    found = [sltt.BPTTStep(net, F.cross_entropy)(x, y) for net in (ours, theirs)]
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-6, rtol=0)
    torch.testing.assert_close(grads(ours), grads(theirs), atol=1e-6, rtol=0)
    online = sltt.convert_(convolutional(lambda: LIF(1.1, reset=reset)))
    native = convolutional(lambda: jelly("SLTTLIFNode", **jumps))
    loss, _ = sltt.OnlineStep(online, F.cross_entropy)(x, y)
    reset_(native)
    total = 0.0
    for now in x:
        one = F.cross_entropy(native(now), y) / len(x)
        one.backward()
        total += one.item()
    assert loss.item() == pytest.approx(total, abs=1e-6)
    torch.testing.assert_close(grads(online), grads(native), atol=1e-6, rtol=0)


def test_spikingjelly_networks_are_converted_and_given_back(jelly):
    x, y = batch()
    net = convolutional(jelly)
    names = list(net.state_dict())
    kinds = [type(part) for part in net]
    sltt.convert_(net)
    copied = copy.deepcopy(net)
    native = convolutional(lambda: jelly("SLTTLIFNode"))
    sltt.OnlineStep(net, F.cross_entropy)(x, y)
    sltt.OnlineStep(copied, F.cross_entropy)(x, y)
    reset_(native)
    for now in x:
        (F.cross_entropy(native(now), y) / len(x)).backward()
    torch.testing.assert_close(grads(net), grads(native), atol=1e-6, rtol=0)
    torch.testing.assert_close(grads(net), grads(copied))
    assert [type(part) for part in sltt.restore_(net)] == kinds
    assert list(net.state_dict()) == names


def test_other_neurons_of_spikingjelly_are_cut_as_well(jelly):
    from spikingjelly.activation_based import layer, neuron

    x, y = torch.rand(5, 4, 6), torch.arange(4) % 3
    learnt = nn.Sequential(nn.Linear(6, 8), neuron.ParametricLIFNode(init_tau=2.0), nn.Linear(8, 3))
    integrates = nn.Sequential(nn.Linear(6, 8), neuron.IFNode(), nn.Linear(8, 3))
    inner = nn.Sequential(nn.Linear(14, 8), neuron.LIFNode(tau=2.0))
    again = layer.LinearRecurrentContainer(neuron.LIFNode(tau=2.0), in_features=8, out_features=8)
    recurrent = nn.Sequential(nn.Linear(6, 8), again, nn.Linear(8, 3))
    assert inner is not None
    for net in (learnt, integrates, recurrent):
        sltt.OnlineStep(sltt.convert_(net, max_decay=1.0), F.cross_entropy)(x, y)
        assert net[0].weight.grad.abs().sum() > 0
    assert learnt[1].w.grad.abs() > 0
    whole = nn.Sequential(nn.Linear(6, 8), jelly(step_mode="m"))
    with pytest.raises(BadInput, match="step_mode"):
        sltt.convert_(whole)
    with pytest.raises(BadInput, match="keeps 0"):
        sltt.convert_(nn.Sequential(jelly(tau=20.0)))


def test_states_of_spikingjelly_are_read_and_put_back(jelly):
    x, _ = batch()
    net = convolutional(lambda: jelly(tau=5.0)).eval()
    with torch.no_grad():
        reset_(net)
        whole = [net(now) for now in x]
        reset_(net)
        [net(now) for now in x[:3]]
        kept = states(net)
        reset_(net)
        net(x[5])
        set_states_(net, kept)
        assert torch.equal(net(x[3]), whole[3])


def test_memory_optimizing_of_spikingjelly_is_exact_and_keeps_more_than_one_step(jelly):
    from spikingjelly.activation_based import memopt

    from memspan.ledger import saved_bytes

    class Block(nn.Sequential):
        pass

    def blocks():
        torch.manual_seed(0)
        return nn.Sequential(
            Block(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), jelly()),
            Block(nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), jelly()),
            nn.Flatten(), nn.Linear(512, 3),
        )  # fmt: skip

    x, y = batch(8)
    plain = blocks()

    def forward(net):
        reset_(net)
        for now in x:
            net(now)
        reset_(net)

    smaller = memopt.optimize_memory(blocks(), (Block,), forward, level=1)
    smaller = smaller[0] if isinstance(smaller, tuple) else smaller
    kept = {}
    for name, net in (("plain", plain), ("memopt", smaller)):
        reset_(net)
        loss = torch.stack([F.cross_entropy(net(now), y) for now in x]).mean()
        kept[name] = saved_bytes(loss, exclude=[x, y, net])
        loss.backward()
    online = sltt.convert_(blocks())
    kept["SLTT"] = saved_bytes(F.cross_entropy(online(x[0]), y), exclude=[x, y, online])
    assert kept["SLTT"] < kept["memopt"] < kept["plain"]


class Triangle:
    """Our surrogate as snnTorch takes it."""

    def __call__(self, x):
        from memspan.nn.spiking import surrogate

        return surrogate.triangle(x)


@pytest.mark.parametrize(
    ("mechanism", "delay", "detach"),
    [("zero", True, True), ("zero", False, False), ("subtract", False, False)],
)
def test_snntorch_gives_our_spikes_and_gradients(snn, mechanism, delay, detach):
    torch.manual_seed(0)
    x = 0.6 * torch.rand(12, 5, 7) if mechanism == "subtract" else torch.randn(12, 5, 7)
    theirs = snn.Leaky(
        beta=0.8, threshold=1.0, spike_grad=Triangle(), init_hidden=True, reset_mechanism=mechanism,
        reset_delay=delay,
    )  # fmt: skip
    found = []
    for way in ("theirs", "ours"):
        inputs = x.clone().requires_grad_()
        v, spikes = None, []
        for now in inputs:
            if way == "theirs":
                spikes.append(theirs(now))
            else:
                one, v = lif_step(now, v, 0.8, 1.0, mechanism, "triangle", 1.0, detach)
                spikes.append(one)
        total = torch.stack(spikes)
        weights = torch.arange(total.numel(), dtype=torch.float32).reshape(total.shape).sin()
        found.append((total.detach(), torch.autograd.grad((total * weights).sum(), inputs)[0]))
    assert found[0][0].sum() > 10
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], atol=2e-6, rtol=1e-5)


def test_the_delayed_subtraction_of_snntorch_is_none_of_ours(snn):
    x = torch.randn(30, 40)
    theirs = snn.Leaky(beta=0.8, init_hidden=True, reset_mechanism="subtract", reset_delay=True)
    v, differ = None, 0
    for now in x:
        one, v = lif_step(now, v, 0.8)
        differ += int((theirs(now) != one).sum())
    assert differ > 0


def test_snntorch_networks_train_online_nested_or_not(snn):
    inner = nn.Sequential(nn.Linear(6, 8), snn.Leaky(beta=0.5, init_hidden=True))
    other = snn.Synaptic(alpha=0.4, beta=0.5, init_hidden=True)
    torch.manual_seed(0)
    again = snn.RLeaky(beta=0.5, linear_features=8, init_hidden=True, all_to_all=True)
    net = nn.Sequential(inner, nn.Linear(8, 8), other, nn.Linear(8, 8), again, nn.Linear(8, 3))
    assert list(holders(net)) == ["0.1", "2", "4"]
    sltt.convert_(net)
    x, y = torch.randn(6, 4, 6), torch.arange(4) % 3
    step = sltt.OnlineStep(net, F.cross_entropy)
    for _ in range(3):  # their own reset looks at direct children alone: a second batch fails there
        loss, _ = step(x, y)
    assert torch.isfinite(loss)
    exact = nn.Sequential(nn.Linear(6, 8), snn.Leaky(beta=0.09090909, init_hidden=True), nn.Linear(8, 3))
    one = copy.deepcopy(exact)
    bptt = sltt.BPTTStep(exact, F.cross_entropy)
    cut = sltt.OnlineStep(sltt.convert_(one), F.cross_entropy)
    torch.testing.assert_close(bptt(x, y)[0], cut(x, y)[0])
    assert F.cosine_similarity(grads(exact), grads(one), 0) > 0.95
    detach_(net)
    with pytest.raises(BadInput, match="init_hidden=True"):
        sltt.convert_(nn.Sequential(snn.Leaky(beta=0.5)))
    with pytest.raises(BadInput, match=r"0\.9"):
        sltt.convert_(nn.Sequential(snn.Leaky(beta=0.9, init_hidden=True)))


@pytest.mark.parametrize("by", ["time", "count"])
def test_tonic_gives_our_frames_but_for_the_events_it_drops(by):
    tonic = pytest.importorskip("tonic", reason="pip install --no-deps -r requirements-peers-alone.txt")
    draws = np.random.default_rng(0)
    for n in (40, 700, 701, 1003):
        events = np.zeros(n, [("x", int), ("y", int), ("t", int), ("p", int)])
        for name, end in (("x", 9), ("y", 5), ("p", 2), ("t", 50_000)):
            events[name] = draws.integers(0, end, n)
        events = events[np.argsort(events["t"])]
        bins = {"time": "n_time_bins", "count": "n_event_bins"}[by]
        theirs = tonic.transforms.ToFrame(sensor_size=(9, 5, 2), **{bins: 7})(events)
        ours = bin_events(events, (9, 5), 7, by)
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        assert ours.sum() == n
        assert np.array_equal(ours[:-1], theirs[:-1])
        assert (ours[-1] - theirs[-1]).min() >= 0
        if theirs.sum() == n:
            assert np.array_equal(ours, theirs)
