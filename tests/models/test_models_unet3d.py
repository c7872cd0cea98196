"""The reversible 3-D U-Net: one network whatever is kept, closed forms that meet what is measured."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from memspan.base import BadInput
from memspan.base.files import load_state, save_state
from memspan.ledger import AllocatorPeak, Ledger, nbytes, plan, saved_bytes
from memspan.models import MBConv3d, ReversibleMBConv3d, ReversibleUNet3d, nested_regions, plan_volume
from memspan.models.unet3d import Conv3dBlock, dice_scores, predict_bytes, soft_dice_loss
from memspan.nn.reversible import MEMORY, ReversibleSequential, reconstruction_error


def chain_of(count: int, channels: int = 8, **options: object) -> ReversibleSequential:
    return ReversibleSequential(*(ReversibleMBConv3d(channels, **options) for _ in range(count)))


def gradients(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output, and all gradients as one vector."""
    module.zero_grad()
    x = x.detach().requires_grad_()
    y = module(x)
    (torch.linspace(-1, 1, y.numel(), dtype=y.dtype) * y.flatten()).sum().backward()
    assert x.grad is not None
    found = [x.grad, *(p.grad for p in module.parameters() if p.grad is not None)]
    return y.detach(), torch.cat([one.double().flatten() for one in found])


def difference(module: nn.Module, x: Tensor) -> float:
    found = {}
    for module.memory in ("store", "reversible"):  # type: ignore[assignment]
        found[module.memory] = gradients(module, x)
    assert torch.equal(found["store"][0], found["reversible"][0])
    a, b = found["store"][1], found["reversible"][1]
    return float((a - b).norm() / a.norm())


def randomised(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return module


# ---- blocks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("c", "t", "k"), [(30, 4, 3), (8, 1, 3), (6, 6, 5)])
def test_parameters_of_a_bottleneck_are_the_closed_form_exactly(c: int, t: int, k: int) -> None:
    counted = sum(p.numel() for p in MBConv3d(c, t, k).parameters())
    assert counted == 2 * t * c * c + k**3 * t * c + 2 * c + 4 * t * c


def test_bottleneck_and_chain_pass_gradcheck() -> None:
    x = torch.randn(1, 2, 4, 4, 4, dtype=torch.double, requires_grad=True)
    for block in (MBConv3d(2, 2), MBConv3d(2, 2, norm="batch", act="silu", se_ratio=0.5), Conv3dBlock(2)):
        assert torch.autograd.gradcheck(randomised(block).double(), x, fast_mode=True)
    chain = randomised(chain_of(2, 4, expansion=2)).double()
    x = torch.randn(1, 4, 4, 4, 4, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: chain(x), (x, *chain.parameters()), fast_mode=True)


@pytest.mark.parametrize("count", [1, 4, 16, 64])
def test_gradients_of_bottleneck_chains_equal_the_stored_ones_in_float64(count: int) -> None:
    chain = randomised(chain_of(count, 4, expansion=2)).double()
    assert difference(chain, torch.randn(1, 4, 5, 5, 5, dtype=torch.double)) <= 1e-11


@pytest.mark.parametrize(("count", "allowed"), [(1, 1e-5), (4, 1e-5), (16, 1e-4)])
def test_float32_gradients_of_bottleneck_chains_stay_close(count: int, allowed: float) -> None:
    assert difference(chain_of(count), torch.randn(1, 8, 8, 8, 8)) <= allowed


def test_sixteen_bottleneck_couplings_invert_in_float64() -> None:
    errors = reconstruction_error(chain_of(16).double(), torch.randn(1, 8, 6, 6, 6, dtype=torch.double))
    assert max(errors) <= 1e-12


def test_under_autocast_gradients_hold_with_float32_streams_and_not_with_bfloat16_ones() -> None:
    torch.manual_seed(1)
    chain, x = randomised(chain_of(8)), torch.randn(1, 8, 8, 8, 8)
    low = copy.deepcopy(chain).bfloat16()

    def cosine(module: nn.Module, x: Tensor, autocast: bool) -> float:
        found = {}
        for module.memory in ("store", "reversible"):  # type: ignore[assignment]
            module.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = module(x)
            assert y.dtype == x.dtype
            y.float().square().sum().backward()
            parts = [p.grad.double().flatten() for p in module.parameters() if p.grad is not None]
            found[module.memory] = torch.cat(parts)
        return float(nn.functional.cosine_similarity(found["store"], found["reversible"], 0))

    assert cosine(chain, x, True) >= 0.999
    assert cosine(low, x.bfloat16(), False) < 0.999


# ---- the network ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"depth": (2, 1, 3)}, {"skip": "concat"}, {"upsample": "nearest"}, {"block": "conv"},
     {"norm": "batch"}, {"act": "silu", "se_ratio": 0.25}],
)  # fmt: skip
def test_every_variant_gives_equal_outputs_and_gradients_in_all_three_ways(
    options: dict[str, object],
) -> None:
    net = ReversibleUNet3d(2, 3, (4, 8, 12), **options).double()  # type: ignore[arg-type]
    randomised(net)
    x = torch.randn(2, 2, 8, 12, 8, dtype=torch.double)
    found = {}
    for net.memory in MEMORY:
        found[net.memory] = gradients(net, x)
    for memory in ("checkpoint", "reversible"):
        assert torch.equal(found["store"][0], found[memory][0])
        scale = float(found["store"][1].norm())
        assert float((found["store"][1] - found[memory][1]).norm()) <= 1e-11 * scale


def test_the_published_network_gives_maps_of_the_volume_s_shape() -> None:
    with torch.device("meta"):  # shapes alone
        assert ReversibleUNet3d(4, 3)(torch.zeros(1, 4, 64, 64, 64)).shape == (1, 3, 64, 64, 64)


def test_one_state_dict_serves_all_ways_copies_files_and_exports(tmp_path: Path) -> None:
    net, x = ReversibleUNet3d(1, 2, (4, 8)), torch.randn(1, 1, 8, 8, 8)
    save_state(tmp_path / "net.safetensors", net.state_dict())
    expected = net(x)
    for memory in MEMORY:
        other = ReversibleUNet3d(1, 2, (4, 8), memory=memory)
        assert list(other.state_dict()) == list(net.state_dict())
        other.load_state_dict(load_state(tmp_path / "net.safetensors")[0])
        assert torch.equal(copy.deepcopy(other)(x), expected)
    exported = torch.export.export(net.eval(), (x,)).module()
    assert torch.allclose(exported(x), expected, atol=1e-5)


def test_a_step_trains_every_parameter_and_follows_the_plain_network() -> None:
    start = ReversibleUNet3d(1, 2, (4, 8), depth=2)
    x = torch.randn(1, 1, 8, 8, 8)
    target = (torch.rand(1, 2, 8, 8, 8) > 0.5).float()
    ends = []
    for memory in ("store", "reversible"):
        net = copy.deepcopy(start)
        net.memory = memory  # type: ignore[assignment]
        optimizer = torch.optim.Adam(net.parameters(), 1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            soft_dice_loss(net(x), target).backward()
            optimizer.step()
        ends.append(net)
    for (name, before), one, two in zip(
        start.named_parameters(), *(end.parameters() for end in ends), strict=True
    ):
        assert not torch.equal(before, two), name
        assert torch.allclose(one, two, atol=1e-3)


# ---- bytes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"depth": 3},
        {"skip": "concat", "expansion": 2},
        {"block": "conv"},
        {"norm": "batch"},
        {"se_ratio": 0.25},
    ],
)
@pytest.mark.parametrize("memory", MEMORY)
def test_saved_bytes_are_the_closed_form(memory: str, options: dict[str, object]) -> None:
    net = ReversibleUNet3d(1, 3, (8, 16, 32), memory=memory, **options)  # type: ignore[arg-type]
    x = torch.randn(2, 1, 16, 16, 20)
    told = predict_bytes(net, x.shape[2:], batch=2)["saved_activations"]
    assert saved_bytes(net(x), exclude=[x]) == pytest.approx(told, rel=2e-3)  # norms keep a few numbers more


def peak(net: ReversibleUNet3d, size: int) -> int:
    x = torch.randn(1, 1, size, size, size)
    net.zero_grad()
    with AllocatorPeak("cpu") as truth:
        net(x).sum().backward()
    return truth.peak


@pytest.mark.slow
def test_allocator_peaks_agree_with_the_formula_and_are_flat_in_depth() -> None:
    peaks = {}
    for depth in (1, 2, 4, 8):
        net = ReversibleUNet3d(1, 3, (16, 32), depth)
        for net.memory in MEMORY:
            told = predict_bytes(net, (16, 16, 16))
            formula = told["saved_activations"] + told["temporaries"] + told["gradients"]
            peaks[net.memory, depth] = peak(net, 16)
            assert abs(peaks[net.memory, depth] / formula - 1) <= 0.15, (net.memory, depth)
    slopes = {memory: peaks[memory, 8] - peaks[memory, 2] for memory in MEMORY}
    assert slopes["reversible"] < 0.05 * slopes["store"]
    assert peaks["store", 1] / peaks["reversible", 1] >= 2
    assert peaks["store", 4] / peaks["reversible", 4] >= 5


def test_a_planned_cube_fits_and_the_next_one_does_not() -> None:
    net = ReversibleUNet3d(1, 3, (16, 32, 64), 4)
    for net.memory in MEMORY:
        side = plan_volume(net, "64MiB")
        needs = [sum(predict_bytes(net, (s, s, s)).values()) for s in (side, side + net.multiple)]
        assert needs[0] <= 64 * 2**20 < needs[1]
        x, y = torch.randn(1, 1, side, side, side), torch.zeros(1, 3, side, side, side)
        with AllocatorPeak(torch.device("cpu")) as truth:
            soft_dice_loss(net(x), y).backward()
        held = truth.peak + nbytes(net) + nbytes(x) + nbytes(y)
        without = sum(predict_bytes(net, (side, side, side), optimizer_states=0).values())
        assert held == pytest.approx(without, rel=0.15)
        net.zero_grad(set_to_none=True)
    with pytest.raises(BadInput, match=r"budget='1 KiB': a cube of 4 voxels needs"):
        plan_volume(net, "1KiB")


@pytest.mark.slow
def test_the_planner_traces_the_network_without_running_it() -> None:
    net = ReversibleUNet3d(1, 3, (8,), 2)
    batch = (torch.zeros(1, 1, 16, 16, 16), torch.zeros(1, 3, 16, 16, 16))
    told = {}
    for net.memory in ("store", "reversible"):
        told[net.memory] = plan(net, batch, loss=soft_dice_loss, optimizer=None).total
        net.zero_grad(set_to_none=True)
        x, y = (part.clone() for part in batch)
        with Ledger(net, inputs=(x, y)) as ledger:
            soft_dice_loss(net(x), y).backward()
        assert told[net.memory] == ledger.peak.total  # no generator state is kept: nothing here draws
    assert told["reversible"] < 0.5 * told["store"]


# ---- losses -----------------------------------------------------------------------------------------------


def test_dice_of_identical_masks_and_of_two_empty_ones_costs_nothing() -> None:
    target = (torch.rand(2, 3, 4, 4, 4) > 0.5).float()
    assert float(soft_dice_loss(1e4 * (target - 0.5), target)) == 0
    empty = torch.zeros(2, 3, 4, 4, 4)
    assert float(soft_dice_loss(empty - 1e4, empty)) == 0
    assert float(soft_dice_loss(empty + 1e4, empty)) > 0.9


def test_dice_of_a_batch_is_the_mean_of_its_examples() -> None:
    logits, target = (
        torch.randn(3, 2, 4, 4, 4),
        (torch.rand(3, 2, 4, 4, 4) > torch.tensor([0.1, 0.5, 0.99]).view(3, 1, 1, 1, 1)).float(),
    )
    singles = [soft_dice_loss(logits[i : i + 1], target[i : i + 1]) for i in range(3)]
    assert torch.allclose(soft_dice_loss(logits, target), torch.stack(singles).mean(), atol=1e-7)


def test_regions_are_nested_and_scored_one_by_one() -> None:
    labels = torch.tensor([[[[0, 1], [2, 4]]]])
    maps = nested_regions(labels, [{1, 2, 4}, {1, 4}, {4}])
    assert maps.sum((0, 2, 3, 4)).tolist() == [3, 2, 1]
    assert bool((maps[:, 1:] <= maps[:, :-1]).all())
    guess = maps.clone()
    guess[0, 0] = 1
    assert torch.allclose(dice_scores(guess, maps), torch.tensor([[6 / 7, 1, 1]]))
    assert dice_scores(torch.zeros(1, 1, 4), torch.zeros(1, 1, 4)).tolist() == [[1.0]]


# ---- bad input --------------------------------------------------------------------------------------------


def test_volumes_that_do_not_fit_the_network_are_refused() -> None:
    net = ReversibleUNet3d(1, 2, (4, 8, 8))
    with pytest.raises(BadInput, match="multiples of 4; pad"):
        net(torch.zeros(1, 1, 8, 10, 8))
    with pytest.raises(BadInput, match=r"give \(B, 1, D, H, W\)"):
        net(torch.zeros(1, 2, 8, 8, 8))
    with pytest.raises(BadInput, match="multiples of 4"):
        predict_bytes(net, (8, 8, 9))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"channels": (5, 8)}, "even number"), ({"channels": ()}, "one level"),
        ({"depth": (1, 2)}, "each of 3"),
        ({"depth": 0}, "1 or more couplings"), ({"block": "resnet"}, "'mbconv', 'conv'"),
        ({"memory": "disk"}, "'reversible'"), ({"norm": "layer"}, "'group' or 'batch'"),
        ({"act": "gelu"}, "'leaky_relu' or 'silu'"), ({"expansion": 0}, "1 or more"),
        ({"kernel_size": 2}, "odd number"), ({"se_ratio": 2.0}, "squeeze-excite"),
        ({"skip": "gate"}, "'add', 'concat'"), ({"in_channels": 0}, "1 or more"),
    ],
)  # fmt: skip
def test_settings_that_make_no_network_are_refused(options: dict[str, object], told: str) -> None:
    with pytest.raises(BadInput, match=told):
        usual: dict[str, object] = {"in_channels": 1, "out_channels": 2, "channels": (4, 8, 8)}
        ReversibleUNet3d(**(usual | options))  # type: ignore[arg-type]


def test_losses_refuse_what_does_not_fit_together() -> None:
    with pytest.raises(BadInput, match="nested_regions makes it"):
        soft_dice_loss(torch.zeros(1, 2, 4), torch.zeros(1, 3, 4))
    with pytest.raises(BadInput, match="not inside region 0"):
        nested_regions(torch.zeros(1, 2, dtype=torch.long), [{1}, {2}])
    with pytest.raises(BadInput, match="no labels"):
        nested_regions(torch.zeros(1, 2, dtype=torch.long), [{1}, set()])
    with pytest.raises(BadInput, match="whole numbers"):
        nested_regions(torch.zeros(1, 2), [{1}])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_dice_loss_of_a_whole_volume_in_16_bits_is_that_of_float32(dtype):
    logits = torch.randn(1, 2, 48, 48, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
    target = (logits > 0.5).to(dtype)
    found = soft_dice_loss(logits, target)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, soft_dice_loss(logits.float(), target.float()))
