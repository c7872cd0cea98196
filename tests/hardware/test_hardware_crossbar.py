"""Crossbars: the ideal array is the product, each imperfection has the distribution that is claimed."""

import copy
import time

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from memspan.base import BadInput
from memspan.base.files import load_state, save_state
from memspan.hardware import Crossbar, CrossbarLinear, ResistiveDevice, convert_, robustness_sweep
from memspan.nn.surgery import restore_

IDEAL = ResistiveDevice.ideal()


@pytest.mark.parametrize("tile", [(1, 1), (1, 2), (3, 4), (5, 14), (7, 3), (512, 512)])
def test_an_ideal_array_is_the_matrix_product(tile):
    w, x = torch.randn(13, 9), torch.randn(4, 2, 13)
    xb = Crossbar.programmed(w, IDEAL, tile=tile, adc_bits=None)
    torch.testing.assert_close(xb(x), x @ w, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(xb.read_cells(x), x @ w, atol=1e-5, rtol=1e-4)
    covered = torch.zeros(13, 9)
    for r, r_end, c, c_end in xb.tiles:
        covered[r:r_end, c:c_end] += 1
    assert bool((covered == 1).all())


def test_fresh_pairs_have_the_distribution_of_two_truncated_normals():
    device = ResistiveDevice(p_stuck_on=0, p_stuck_off=0)
    w = Crossbar.random(1000, 1000, device, scale=2.0, seed=3).weight.double().flatten().numpy()
    assert abs(w.mean()) < 4 * w.std() / 1000
    assert w.std() == pytest.approx(2 * 8.449533, rel=0.01)
    assert abs(stats.skew(w)) < 0.01
    low, high = (1 - 20) / 6, (60 - 20) / 6
    draws = np.random.default_rng(0)
    pairs = [stats.truncnorm.rvs(low, high, 20, 6, size=100_000, random_state=draws) for _ in range(2)]
    assert stats.ks_2samp(w[:100_000] / 2, pairs[0] - pairs[1]).pvalue > 0.01


def test_stuck_cells_are_binomial_and_leave_all_others_as_they_were():
    clean = ResistiveDevice(p_stuck_on=0, p_stuck_off=0).sample((500, 400), seed=1)
    device = ResistiveDevice(p_stuck_on=0.02, p_stuck_off=0.05)
    cells = device.sample((500, 400), seed=1)
    on, off = cells == device.g_max, cells == device.g_min
    for found, share in ((on, 0.02), (off, 0.05)):
        assert stats.binomtest(int(found.sum()), 200_000, share).pvalue > 0.001
    assert torch.equal(cells[~(on | off)], clean[~(on | off)])
    worse = ResistiveDevice(p_stuck_on=0.04, p_stuck_off=0.05).sample((500, 400), seed=1)
    assert bool((worse[on] == device.g_max).all())  # a sweep adds stuck cells to those that are


def test_read_noise_per_output_is_noise_per_cell():
    xb = Crossbar.random(
        24, 6, ResistiveDevice(read_noise=0.05), scale=0.01, seed=0, adc_bits=None, tile=(10, 8)
    )
    x = torch.rand(24)
    reads = 4000
    draws = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    ours = xb(x.expand(reads, -1), generator=draws[0])
    theirs = torch.cat([xb.read_cells(x.expand(500, -1), generator=draws[1]) for _ in range(reads // 500)])
    wanted = (0.01 * 0.05) ** 2 * ((x**2) @ (xb.g_plus**2 + xb.g_minus**2))
    for found in (ours, theirs):
        torch.testing.assert_close(found.var(0), wanted, rtol=0.12, atol=0)
        assert bool(((found.mean(0) - x @ xb.weight).abs() < 5 * (wanted / reads).sqrt()).all())
    assert found.var(0).mean().item() == pytest.approx(ours.var(0).mean().item(), rel=0.05)
    for place in range(6):
        assert stats.ks_2samp(ours[:, place].numpy(), theirs[:, place].numpy()).pvalue > 0.01 / 6
    correlation = np.corrcoef(ours.numpy().T) - np.eye(6)
    assert np.abs(correlation).max() < 0.08
    assert xb(torch.zeros(2, 24)).abs().max() == 0
    xb.read_noise = False
    assert torch.equal(xb(x), xb(x))


@pytest.mark.slow
def test_noise_per_output_costs_a_tenth_of_noise_per_cell_at_most():
    xb = Crossbar.random(264, 200, scale=0.01, adc_bits=None)
    x = (torch.rand(16, 264) < 0.1).float()
    ratios = []
    for _ in range(5):
        spent = []
        for read in (xb, xb.read_cells):
            read(x)
            begun = time.process_time()
            for _ in range(3):
                read(x)
            spent.append(time.process_time() - begun)
        ratios.append(spent[1] / spent[0])
    assert np.median(ratios) >= 10  # a ratio in one interleaved run; 80 on an idle machine


def test_a_converter_has_its_levels_and_its_errors():
    w = torch.full((1, 1), 1.0)
    for bits in (2, 4, 8):
        xb = Crossbar.programmed(w, IDEAL, adc_bits=bits)
        xb.adc_range.fill_(1.0)
        x = torch.linspace(-0.999, 0.999, 20_001)[:, None]
        y = xb(x)
        assert len(torch.unique(y)) <= 2**bits
        step = 2 / 2**bits
        inside = x < 1 - step / 2
        error = (y - x)[inside]
        assert error.abs().max() <= step / 2 + 1e-6
        assert error.var().item() == pytest.approx(step**2 / 12, rel=0.1)
        assert xb(torch.tensor([[9.0], [-9.0]])).flatten().tolist() == pytest.approx([1 - step, -1.0])
    rows = torch.randn(12, 4)
    counts = [
        Crossbar.programmed(rows, IDEAL, tile=(r, 8)).energy(torch.ones(1, 12)).conversions for r in (12, 4)
    ]
    assert counts == [4, 12]


def test_calibrating_spends_the_bits_on_the_data():
    w, x = torch.randn(64, 10), (torch.rand(200, 64) < 0.1).float()
    wide = Crossbar.programmed(w, IDEAL, adc_bits=6)
    narrow = copy.deepcopy(wide).calibrate_(x)
    errors = [(xb(x) - x @ w).std().item() for xb in (wide, narrow)]
    assert errors[1] < 0.5 * errors[0]


def test_programming_in_levels_is_monotone_and_within_half_a_step():
    device = ResistiveDevice(read_noise=0, p_stuck_on=0, p_stuck_off=0, levels=9)
    w = torch.linspace(-1, 1, 101)[:, None]
    read = Crossbar.programmed(w, device, adc_bits=None).weight
    assert (read - w).abs().max() <= 1 / 16 + 1e-6
    assert bool((read.diff(dim=0) >= -1e-6).all())
    assert len(torch.unique((read * 1e4).round())) == 17


def test_one_seed_is_one_array_on_disk_too(tmp_path):
    one, again, other = (Crossbar.random(60, 50, seed=seed) for seed in (4, 4, 5))
    assert torch.equal(one.weight, again.weight)
    assert abs(np.corrcoef(one.weight.flatten(), other.weight.flatten())[0, 1]) < 0.05
    save_state(tmp_path / "array.safetensors", one.state_dict())
    other.load_state_dict(load_state(tmp_path / "array.safetensors")[0])
    other.read_noise = one.read_noise = False
    x = torch.randn(3, 60)
    assert torch.equal(one(x), other(x))
    assert sum(one.memory_bytes().values()) == sum(b.nbytes for b in one.buffers())


def test_drift_lowers_all_weights_alike():
    xb = Crossbar.random(5, 4, ResistiveDevice(drift_nu=0.1))
    fresh = xb.weight.clone()
    xb.age = 1000.0
    torch.testing.assert_close(xb.weight, fresh * 1000**-0.1)


def test_energy_by_hand_and_by_rate():
    g = torch.tensor([[20.0, 10.0], [30.0, 40.0]])
    xb = Crossbar(g, g / 2, 1.0, IDEAL)
    cost = xb.energy(torch.tensor([[1.0, 1.0]]))
    assert cost.cells == pytest.approx(0.04 * 150e-6 * 10e-9, rel=1e-6)
    assert cost.adc == pytest.approx(2 * 2e-12)
    half = xb.energy(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    assert half.cells == pytest.approx(cost.cells / 2)
    silent = xb.energy(torch.zeros(1, 2))
    assert silent.cells == silent.event_fp32 == 0
    assert silent.adc == cost.adc
    big = Crossbar(torch.full((264, 200), 20.0), torch.full((264, 200), 20.0), 1.0, IDEAL)
    x = torch.zeros(1, 264)
    x[0, :26] = 1
    told = big.energy(x)
    assert told.cells == pytest.approx(26 * 400 * 8e-15, rel=1e-3)
    assert told.event_fp32 / (told.cells + told.adc) == pytest.approx(64, abs=2)


def test_a_users_network_is_converted_swept_and_given_back(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 3))
    x = torch.randn(300, 20)
    y = x[:, :3].argmax(1)
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    before = net(x).detach()

    def score(model):
        return float((model(x).argmax(1) == y).float().mean())

    convert_(net, IDEAL, adc_bits=None)
    torch.testing.assert_close(net(x), before, atol=1e-4, rtol=1e-3)
    save_state(tmp_path / "chip.safetensors", net.state_dict())
    again = convert_(copy.deepcopy(restore_(net)), IDEAL, adc_bits=None, seed=9)
    again.load_state_dict(load_state(tmp_path / "chip.safetensors")[0])
    torch.testing.assert_close(again(x), before, atol=1e-4, rtol=1e-3)
    assert torch.equal(net(x), before)
    rows = robustness_sweep(net, score, noise=[0.0, 1.0], stuck=[0.0, 0.4], bits=[8, 1], calibrate=x)
    assert torch.equal(net(x), before)
    mean = {(r.what, r.value): np.mean([o.score for o in rows if o[:2] == r[:2]]) for r in rows}
    for what, good, bad in (("noise", 0.0, 1.0), ("stuck", 0.0, 0.4), ("bits", 8.0, 1.0)):
        assert mean[what, good] >= score(net) - 0.02
        assert mean[what, bad] < mean[what, good] - 0.02, what
    assert robustness_sweep(net, score, noise=[0.3], seeds=[1]) == robustness_sweep(
        net, score, noise=[0.3], seeds=[1]
    )


def test_gradients_reach_the_input_through_noise_and_converter():
    xb = Crossbar.programmed(torch.randn(6, 4), ResistiveDevice.stochastic())
    x = torch.randn(3, 6, requires_grad=True)
    xb(x).sum().backward()
    torch.testing.assert_close(x.grad, xb.weight.sum(1).expand(3, -1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: ResistiveDevice(g_min=-1), "g_max"), (lambda: ResistiveDevice(g_min=60), "g_max"),
        (lambda: ResistiveDevice(mean=90), "mean"), (lambda: ResistiveDevice(read_noise=-0.1), "read_noise"),
        (lambda: ResistiveDevice(p_stuck_on=0.6, p_stuck_off=0.6), "p_stuck"),
        (lambda: ResistiveDevice(levels=1), "levels"),
        (lambda: ResistiveDevice.from_samples([-1.0, 2.0]), "g="),
        (lambda: Crossbar.random(2, 2, tile=(0, 2)), "tile"),
        (lambda: Crossbar.random(2, 2, adc_bits=0), "adc_bits"),
        (lambda: Crossbar.random(2, 2, adc_bits=17), "adc_bits"),
        (lambda: Crossbar(-torch.ones(2, 2), torch.ones(2, 2), 1.0, IDEAL), "g_plus"),
        (lambda: Crossbar.random(2, 2)(torch.tensor([[0.0, float("nan")]])), "NaN"),
        (lambda: Crossbar.random(2, 2)(torch.ones(1, 3)), "rows"),
        (lambda: Crossbar.random(2, 2).program_(torch.ones(3, 2)), "weight"),
        (lambda: convert_(nn.Sequential(nn.ReLU()), IDEAL), "model"),
        (lambda: robustness_sweep(nn.Sequential(nn.Linear(2, 2)), lambda m: 0.0), "noise"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call, match):
    with pytest.raises(BadInput, match=match):
        call()


@pytest.mark.peers
def test_aihwkit_programs_with_an_error_of_the_same_order():
    reason = "pip install --no-deps -r requirements-peers-alone.txt"
    pytest.importorskip("aihwkit", reason=reason)
    from aihwkit.inference import ReRamWan2022NoiseModel
    from aihwkit.nn import AnalogLinear
    from aihwkit.simulator.configs import TorchInferenceRPUConfig

    torch.manual_seed(0)
    w, x = 0.2 * torch.randn(64, 20), torch.randn(500, 64)
    config = TorchInferenceRPUConfig(noise_model=ReRamWan2022NoiseModel(g_max=40.0))
    config.forward.is_perfect = True
    layer = AnalogLinear(64, 20, bias=False, rpu_config=config)
    layer.set_weights(w.t(), None)
    torch.testing.assert_close(layer(x).detach(), x @ w, atol=1e-4, rtol=1e-4)
    layer.eval()
    layer.program_analog_weights()
    layer.drift_analog_weights(1.0)
    theirs = (layer(x).detach() - x @ w).std() / (x @ w).std()
    noisy = layer(torch.eye(64)).detach()
    share = ((noisy - w).std() / w.abs().max()).item()
    device = ResistiveDevice(
        g_min=0, g_max=40, read_noise=0, p_stuck_on=0, p_stuck_off=0, program_error=share
    )
    ours = (Crossbar.programmed(w, device, adc_bits=None)(x) - x @ w).std() / (x @ w).std()
    assert 0.5 < (ours / theirs).item() < 2


def test_a_layer_keeps_its_bias_digital():
    layer = nn.Linear(4, 3)
    on_chip = CrossbarLinear.of(layer, IDEAL, adc_bits=None)
    assert torch.equal(on_chip.bias, layer.bias)
    with torch.no_grad():
        layer.bias.add_(1)
    assert not torch.equal(on_chip.bias, layer.bias)
