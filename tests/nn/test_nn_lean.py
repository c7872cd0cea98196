"""Lean frozen layers: the same numbers as torch's, the same gradients, and nothing kept but masks."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck

from memspan.base import BadInput
from memspan.data.efficientnet_lite import EfficientNetLite0
from memspan.ledger import saved_bytes
from memspan.nn import freeze_lean_, lean, restore_

D = torch.float64


def randomised(module):
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if tensor.is_floating_point():
                tensor.copy_(
                    torch.rand_like(tensor) + 0.5 if "var" in name else 0.3 * torch.randn_like(tensor)
                )
    return module


def image(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def gradient(module, x):
    x = x.detach().clone().requires_grad_()
    y = module(x + 0.0)  # not a leaf, so that in-place layers may work on it
    projection = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(3))
    (y * projection).sum().backward()
    return y.detach(), x.grad


SHAPED = [
    (nn.Linear(5, 7), (3, 2, 5)),
    (nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 9)),
    (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (2, 4, 9, 8)),
    (nn.Conv2d(4, 4, 4, padding="same", groups=4), (2, 4, 6, 6)),
    (nn.Conv3d(2, 3, 3, padding=1, bias=False), (1, 2, 4, 5, 3)),
    (nn.ConvTranspose1d(4, 2, 3, stride=2), (2, 4, 5)),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), (2, 4, 5, 5)),
    (nn.ConvTranspose3d(2, 2, 2, stride=2), (1, 2, 2, 3, 2)),
    (nn.BatchNorm1d(4).eval(), (6, 4)),
    (nn.BatchNorm2d(4).eval(), (2, 4, 5, 5)),
    (nn.BatchNorm2d(4, affine=False).eval(), (2, 4, 5, 5)),
    (nn.BatchNorm3d(2).eval(), (2, 2, 3, 3, 3)),
    (nn.ReLU(), (3, 7)),
    (nn.ReLU(inplace=True), (3, 7)),
    (nn.ReLU6(), (3, 7)),
    (nn.Hardtanh(-0.5, 0.7), (3, 7)),
    (nn.LeakyReLU(0.2), (3, 7)),
    (nn.MaxPool2d(3, 2, 1), (2, 3, 9, 9)),
    (nn.MaxPool2d((2, 3), dilation=(2, 1), ceil_mode=True), (2, 3, 9, 8)),
    (nn.AvgPool2d(3, 2, 1, count_include_pad=False), (2, 3, 9, 9)),
]


@pytest.mark.parametrize(("layer", "shape"), SHAPED, ids=lambda v: str(v)[:40])
def test_a_lean_layer_gives_torchs_output_and_gradient(layer, shape):
    plain = randomised(copy.deepcopy(layer)).to(D)
    twin = freeze_lean_(copy.deepcopy(plain))
    assert type(twin) is not type(plain)
    x = 2 * torch.randn(*shape, dtype=D)
    (y, g), (y_lean, g_lean) = gradient(plain, x), gradient(twin, x)
    assert torch.equal(y, y_lean)
    torch.testing.assert_close(g_lean, g, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("layer", "shape"), SHAPED, ids=lambda v: str(v)[:40])
def test_gradcheck_of_every_lean_layer_in_float64(layer, shape):
    twin = freeze_lean_(randomised(copy.deepcopy(layer)).to(D))
    x = (
        torch.randperm(torch.Size(shape).numel(), dtype=torch.int64).to(D).view(shape) / 50 - 1.003
    )  # no ties, no kinks
    assert gradcheck(lambda t: twin(t + 0.0), x.requires_grad_())


@pytest.mark.parametrize("stats", ["batch", "batch_detached"])
def test_gradcheck_of_batch_norm_with_statistics_of_the_batch(stats):
    x = image(4, 3, 2, 2, dtype=D)
    weight, bias = torch.randn(3, dtype=D), torch.randn(3, dtype=D)
    if stats == "batch":
        assert gradcheck(lambda t: lean.frozen_batchnorm(t, None, None, weight, bias, stats=stats), x)
    fixed = x.detach().var((0, 2, 3), correction=0), x.detach().mean((0, 2, 3))
    expected = torch.autograd.grad(
        lean.frozen_batchnorm(x, fixed[1], fixed[0], weight, bias).pow(2).sum(), x
    )[0]
    found = torch.autograd.grad(
        lean.frozen_batchnorm(x, None, None, weight, bias, stats="batch_detached").pow(2).sum(), x
    )[0]
    torch.testing.assert_close(found, expected)


@settings(max_examples=30, deadline=None)
@given(
    kernel=st.integers(1, 4), stride=st.integers(1, 3), dilation=st.integers(1, 2), side=st.integers(7, 12),
    ceil=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_place_inside_any_window_leads_back_to_torchs_index(kernel, stride, dilation, side, ceil, seed):
    torch.manual_seed(seed)
    x = torch.randn(2, 3, side, side + 1, dtype=D)
    setting = (kernel, stride, kernel // 2, dilation, ceil)
    _, plain = gradient(lambda t: F.max_pool2d(t, *setting), x)
    _, found = gradient(lambda t: lean.lean_max_pool2d(t, *setting), x)
    assert torch.allclose(plain, found)


def test_what_is_kept_is_masks_and_nothing_else():
    x = image(2, 4, 8, 8)
    conv, elements = nn.Conv2d(4, 4, 3, padding=1), x.numel()
    kept = {
        "convolution": saved_bytes(lean.frozen_conv2d(x, conv.weight, conv.bias, padding=1), exclude=[conv]),
        "linear": saved_bytes(lean.frozen_linear(x, torch.randn(3, 8)), exclude=[]),
        "norm": saved_bytes(lean.frozen_batchnorm(x, torch.zeros(4), torch.ones(4))),
        "detached": saved_bytes(lean.frozen_batchnorm(x, None, None, stats="batch_detached")),
        "batch": saved_bytes(lean.frozen_batchnorm(x, None, None, stats="batch")) // x.nbytes,
        "relu": saved_bytes(lean.lean_relu(x)),
        "pool": saved_bytes(lean.lean_max_pool2d(x, 2)),
        "average": saved_bytes(lean.lean_avg_pool2d(x, 2)),
    }
    assert kept == {
        "convolution": 0, "linear": 3 * 8 * 4, "norm": 16, "detached": 16, "batch": 1,
        "relu": elements // 8, "pool": elements // 4, "average": 0,
    }  # fmt: skip
    plain = nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False)
    assert saved_bytes(plain(x), exclude=[plain]) == x.nbytes  # what torch keeps all the same


@pytest.mark.parametrize("stats", ["source", "batch_detached"])
def test_a_whole_network_keeps_bits_and_its_gradient_is_the_naive_one(stats):
    network = randomised(EfficientNetLite0(classes=5)).to(D).eval()
    for part in network.modules():
        if isinstance(
            part, nn.BatchNorm2d
        ):  # running statistics of this very batch, so that both kinds agree
            part.momentum = 1.0
    x = torch.randn(2, 3, 32, 32, dtype=D)
    network.train()
    with torch.no_grad():
        for part in network.modules():
            part.training = not isinstance(part, nn.Dropout)
        network(x)
    network.eval().requires_grad_(False)
    _, plain = gradient(network, x)
    naive = saved_bytes(network(image(2, 3, 32, 32, dtype=D)), exclude=[network])
    buffers = copy.deepcopy(dict(network.named_buffers()))
    twin = freeze_lean_(copy.deepcopy(network), "source")
    _, found = gradient(twin, x)
    assert float((found - plain).norm() / plain.norm()) < 1e-10
    assert saved_bytes(twin(image(2, 3, 32, 32, dtype=D)), exclude=[twin]) < naive / 30
    other = freeze_lean_(copy.deepcopy(network), stats).train()
    other.dropout.eval()
    other(x)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in other.named_buffers())


def test_frozen_parameters_get_no_gradient_and_restoring_trains_them_again():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    net[4].bias.requires_grad_(False)
    kinds, names = [type(part) for part in net], list(net.state_dict())
    x = image(2, 3, 4, 4)
    freeze_lean_(net)
    assert list(net.state_dict()) == names
    net(x).sum().backward()
    assert x.grad is not None
    assert all(parameter.grad is None for parameter in net.parameters())
    with pytest.raises(BadInput, match="lean already"):
        freeze_lean_(net)
    with pytest.raises(BadInput, match="lean already"):
        freeze_lean_(net[:2])
    copied = restore_(copy.deepcopy(net))
    assert [type(part) for part in copied] == kinds
    assert isinstance(net[0], lean.LeanConv2d)
    restore_(net)
    assert [type(part) for part in net] == kinds
    assert [p.requires_grad for p in net.parameters()] == [True] * 5 + [False]
    with pytest.raises(BadInput, match="nothing was"):
        restore_(net)


def test_unknown_layers_pass_through_and_bad_input_is_refused():
    net = freeze_lean_(nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.LayerNorm(4)))
    assert [type(part).__name__ for part in net] == ["LeanLinear", "GELU", "LayerNorm"]
    assert not any(parameter.requires_grad for parameter in net.parameters())
    mirrored = nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")
    assert type(freeze_lean_(mirrored)) is nn.Conv2d
    with pytest.raises(BadInput, match="stats='other'"):
        freeze_lean_(nn.ReLU(), "other")
    with pytest.raises(BadInput, match="two values a channel"):
        lean.frozen_batchnorm(torch.zeros(1, 3), None, None, stats="batch_detached")
    with pytest.raises(BadInput, match="no running statistics"):
        lean.frozen_batchnorm(torch.zeros(2, 3), None, None)
    with pytest.raises(BadInput, match="give a batch"):
        lean.frozen_conv2d(torch.zeros(3, 4, 4), torch.zeros(2, 3, 1, 1))


@pytest.mark.peers
@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100", "densenet121", "tf_efficientnet_lite0"])
def test_timms_networks_become_lean_with_the_same_gradient(timm, name):
    network = randomised(timm.create_model(name, num_classes=3)).to(D).eval().requires_grad_(False)
    x = torch.randn(2, 3, 64, 64, dtype=D)
    network.train()
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = 1.0
    with torch.no_grad():
        network(x)
    network.eval()
    y, plain = gradient(network, x)
    naive = saved_bytes(network(x.clone().requires_grad_()), exclude=[network])
    freeze_lean_(network)
    y_lean, found = gradient(network, x)
    torch.testing.assert_close(y_lean, y)
    assert float((found - plain).norm() / plain.norm()) < 1e-10
    assert saved_bytes(network(x.clone().requires_grad_()), exclude=[network]) < naive / 15
