"""Layer analysis: CKA's identities, drift, gradient norms."""

import copy

import pytest
import torch
from torch import nn

from memspan.base import BadInput
from memspan.continual import nets
from memspan.continual.analysis import GradientNorms, layer_drift, linear_cka


def test_cka_is_blind_to_rotation_scale_and_shift():
    x = torch.randn(50, 6, dtype=torch.float64)
    q, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    assert linear_cka(x, 4 * x @ q + 3) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("width", [3, 40])
def test_cka_is_the_kernel_form(width):
    x, y = torch.randn(20, width).double(), torch.randn(20, width + 2).double()
    y[:, :width] += x
    centre = torch.eye(20).double() - 1 / 20
    k, m = (centre @ z @ z.T @ centre for z in (x, y))
    expected = torch.trace(k @ m) / (torch.trace(k @ k) * torch.trace(m @ m)).sqrt()
    assert linear_cka(x, y) == pytest.approx(float(expected), abs=1e-6)
    assert 0 <= linear_cka(x, y) <= 1


def test_independent_features_are_unlike_and_constant_ones_refused():
    assert linear_cka(torch.randn(2000, 8), torch.randn(2000, 8)) < 0.02
    with pytest.raises(BadInput, match="constant"):
        linear_cka(torch.ones(4, 2), torch.randn(4, 2))


def test_cka_refuses_other_rows_and_nan():
    with pytest.raises(BadInput, match="y="):
        linear_cka(torch.randn(4, 2), torch.randn(5, 2))
    with pytest.raises(BadInput, match="NaN"):
        linear_cka(torch.full((4, 2), float("nan")), torch.randn(4, 2))


def test_only_the_changed_block_moves_and_modes_are_given_back():
    before = nets.build("resnet8", in_channels=1).train()
    after = copy.deepcopy(before)
    with torch.no_grad():
        for parameter in after.stage3.parameters():
            parameter.add_(0.5)
    drift = layer_drift(before, after, [(torch.randn(8, 1, 12, 12), torch.zeros(8)) for _ in range(2)])
    assert list(drift) == ["stem", "stage1", "stage2", "stage3"]
    assert drift["stage2"].cka == pytest.approx(1)
    assert drift["stage2"].weights == 0
    assert drift["stage3"].weights == pytest.approx(0.25, rel=1e-4)
    assert drift["stage3"].cka < 0.999
    assert before.training
    assert after.stage3.training
    with pytest.raises(BadInput, match="loader"):
        layer_drift(before, after, [])


def test_gradient_norms_are_those_of_autograd_and_hooks_are_removed():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with GradientNorms(net) as norms:
        net(torch.randn(5, 3)).square().sum().backward()
    for name in ("0", "2"):
        squares = sum(p.grad.square().sum() for p in net.get_submodule(name).parameters())
        assert norms.mean()[name] == pytest.approx(float(squares.sqrt()), rel=1e-5)
    assert not any(p._backward_hooks for p in net.parameters())
