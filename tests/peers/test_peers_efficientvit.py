"""EfficientViT beside timm's, on shared weights that make every part of the network matter."""

from __future__ import annotations

import copy
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memspan import models
from memspan.models.efficientvit import fuse_, load_timm_

pytestmark = pytest.mark.peers
NAMES = [f"efficientvit_m{i}" for i in range(6)]


def randomised(name: str) -> Any:
    """Fresh branches end in a zero weight, which hides any fault: random norms, calibrated statistics."""
    model = getattr(models, name)()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.weight.uniform_(0.75, 1.25)
            norm.bias.normal_(0, 0.05)
            norm.momentum = 1.0
        for key, parameter in model.named_parameters():
            if key.endswith("attention_biases"):
                parameter.normal_(0, 0.5)
        model.train()(torch.randn(8, 3, 224, 224))
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


def fuse_timm(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        setattr(module, name, child.fuse() if hasattr(child, "fuse") else fuse_timm(child))
    return module


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_outputs_equal_timms_on_shared_weights_fused_and_not(timm: ModuleType, name: str) -> None:
    ours, theirs = randomised(name), timm.create_model(name).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        out = theirs(x)
        assert (out[0] - out[1]).abs().max() > 0.5, "the statistics are not calibrated: two images look alike"
        torch.testing.assert_close(ours(x), out, rtol=0, atol=1e-4)
        for mine, peer in zip(ours.forward_intermediates(x), theirs.forward_intermediates(x)[1], strict=True):
            assert (mine - peer).abs().max() <= 1e-4 * peer.abs().max()
        torch.testing.assert_close(fuse_(ours)(x), fuse_timm(theirs)(x), rtol=0, atol=1e-4)


def break_bias(attention: Any) -> None:
    attention.attention_biases.data.zero_()


def turn_bias(attention: Any) -> None:
    """Swap rows and columns of the table: |Δrow| is read where |Δcol| belongs."""
    side = attention.resolution[0]
    table = attention.attention_biases.data.view(-1, side, side)
    attention.attention_biases.data = table.transpose(1, 2).reshape(len(table), -1)


def break_cascade(attention: Any) -> None:
    attention.cascade = False


@pytest.mark.parametrize("fault", [break_bias, turn_bias, break_cascade])
def test_the_comparison_notices_a_fault(timm: ModuleType, fault: Any) -> None:
    ours, theirs = randomised("efficientvit_m0"), timm.create_model("efficientvit_m0").eval()
    theirs.load_state_dict(ours.state_dict())
    for module in ours.modules():
        if isinstance(module, models.CascadedGroupAttention):
            fault(module)
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        assert (ours(x) - theirs(x)).abs().max() > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("name", ["efficientvit_m0", "efficientvit_m2"])
def test_gradients_equal_timms_in_float64(timm: ModuleType, name: str) -> None:
    ours, theirs = randomised(name).double().train(), timm.create_model(name).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(4, 3, 224, 224, dtype=torch.float64)
    projection = torch.randn(4, 1000, dtype=torch.float64)

    def gradient(model: nn.Module) -> Tensor:
        (model(x) * projection).sum().backward()
        named = sorted(model.named_parameters())
        return torch.cat([p.grad.flatten() for _, p in named if p.grad is not None])

    mine, peer = gradient(ours), gradient(theirs.train())
    assert mine.shape == peer.shape
    assert (mine - peer).norm() <= 1e-9 * peer.norm()


@pytest.mark.filterwarnings("ignore:img_size")
@pytest.mark.parametrize("size", [96, 160, 256, (224, 192)])
def test_other_sizes_and_interpolated_tables_equal_timms(timm: ModuleType, size: Any) -> None:
    source = randomised("efficientvit_m0")
    theirs = timm.create_model("efficientvit_m0").eval()
    theirs.load_state_dict(source.state_dict())
    theirs.set_input_size(size)
    ours = copy.deepcopy(source).set_input_size_(size)
    fresh = load_timm_(models.efficientvit_m0(img_size=size).eval(), source.state_dict())
    x = torch.randn(1, 3, *((size, size) if isinstance(size, int) else size))
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-4)
        assert torch.equal(fresh(x), ours(x))
