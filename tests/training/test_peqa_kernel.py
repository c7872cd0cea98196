"""The kernel: same numbers as the naive reference, exact gradients, and no float weight that stays alive."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from memspan.ledger import Ledger
from memspan.nn.bits import pack_bits
from memspan.training.peqa import QuantLinear, quant_matmul, quant_matmul_naive, quantize_, scales

BITS = (2, 3, 4, 8)


def drawn(bits, n=6, m=10, groups=1, dtype=torch.float64):
    """Random integers, scales (either sign) and zero points."""
    q = pack_bits(torch.randint(0, 1 << bits, (n, m)), bits)
    z = torch.randint(0, 1 << bits, (n, groups), dtype=torch.uint8)
    return q, torch.randn(n, groups, dtype=dtype).requires_grad_(), z


def layer_of(n, m, bits, group_size=None, bias=True):
    layer = QuantLinear(m, n, bits, group_size, bias)
    q, s, z = drawn(bits, n, m, layer.groups, torch.float32)
    with torch.no_grad():
        layer.qweight.copy_(q)
        layer.scales.copy_(s)
        layer.zeros.copy_(z)
        if bias:
            layer.bias.normal_()
    return layer


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0,)])
def test_forward_is_a_linear_layer_with_the_dequantized_weight(bits, group_size, dtype, close, shape):
    layer = layer_of(9, 24, bits, group_size)
    x = torch.randn(*shape, 24).to(dtype)
    expected = F.linear(x.double(), layer.dequantized().double(), layer.bias.double())
    found = layer(x)
    assert found.dtype == dtype
    assert found.shape == (*shape, 9)
    if found.numel():
        assert (found.double() - expected).norm() <= close * expected.norm()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("groups", [1, 5])
@pytest.mark.parametrize("save", ["input", "output"])
@pytest.mark.parametrize("tile_bytes", [1 << 20, 200])
def test_gradients_agree_with_finite_differences_and_with_the_naive_reference(bits, groups, save, tile_bytes):
    q, s, z = drawn(bits, groups=groups)
    with torch.no_grad():
        s[0, 0] = 0.0  # a scale of 0 has a gradient: training may pass through it
    x = torch.randn(2, 3, 10, dtype=torch.float64, requires_grad=True)
    b = torch.randn(6, dtype=torch.float64, requires_grad=True)

    def ours(x, s, b):
        return quant_matmul(x, q, s, z, bits, 10, b, tile_bytes=tile_bytes, save=save)

    assert torch.autograd.gradcheck(ours, (x, s, b))
    weights = torch.randn(2, 3, 6, dtype=torch.float64)
    found = torch.autograd.grad((ours(x, s, b) * weights).sum(), (x, s, b))
    naive = quant_matmul_naive(x, q, s, z, bits, 10, b)
    expected = torch.autograd.grad((naive * weights).sum(), (x, s, b))
    torch.testing.assert_close(ours(x, s, b), naive, rtol=1e-9, atol=1e-9)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("save", ["input", "output"])
def test_sixteen_bit_inputs_give_float32_gradients_of_the_scales_and_do_not_overflow(dtype, save):
    layer = layer_of(16, 512, 8)
    layer.scales.data.abs_().mul_(1e-3)
    x = (40 * torch.randn(64, 512)).to(dtype)  # products with the integers alone pass 65,504
    found = quant_matmul(x, layer.qweight, layer.scales, layer.zeros, 8, 512, save=save)
    exact = x.float() @ layer.dequantized().T
    assert found.isfinite().all()
    assert (found - exact).norm() < 2e-2 * exact.norm()
    weights = torch.randn(64, 16)
    (ds,) = torch.autograd.grad((found.float() * weights).sum(), layer.scales)
    (reference,) = torch.autograd.grad((exact * weights).sum(), layer.scales)
    assert ds.dtype == torch.float32
    assert (ds - reference).norm() < 3e-2 * reference.norm()


def test_the_gradient_of_a_scale_needs_the_output_alone():
    layer = layer_of(12, 40, 4)
    y = layer(torch.randn(7, 40))
    dy = torch.randn_like(y)
    y.backward(dy)
    expected = (dy * (y - layer.bias)).sum(0)
    found = (layer.scales * layer.scales.grad).squeeze(1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_scales_times_their_gradients_are_a_loss_that_is_homogeneous_in_the_outputs():
    layer = layer_of(12, 40, 3, bias=False)
    loss = layer(torch.randn(7, 40)).abs().sum()
    loss.backward()
    torch.testing.assert_close((layer.scales * layer.scales.grad).sum(), loss, rtol=1e-4, atol=1e-3)


def stack(depth=6, width=512, kernel=quant_matmul):
    torch.manual_seed(0)

    class Layer(QuantLinear):
        def forward(self, x):
            return kernel(x, self.qweight, self.scales, self.zeros, self.bits, self.in_features, self.bias)

    model = quantize_(
        nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(depth))), 4, init="minmax"
    )
    if kernel is not quant_matmul:
        for layer in model:
            layer.__class__ = Layer
    return model


def peak(model, batch=16, width=512):
    x = torch.randn(batch, width, requires_grad=True)
    with Ledger(model) as led:
        y = model(x)
        after_forward = led.current
        y.square().sum().backward()
    return led.peak, after_forward


def test_a_stack_holds_packed_weights_and_activations_and_the_naive_reference_more_than_full_fine_tuning():
    ours, after = peak(stack())
    naive, naive_after = peak(stack(kernel=quant_matmul_naive))
    full, _ = peak(nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(6))))
    float_weight = 4 * 512 * 512
    assert max(hold.bytes for hold in after.holdings) < float_weight
    assert max(hold.bytes for hold in naive_after.holdings) >= float_weight
    assert ours.total < 2.6 * 2**20
    assert naive.total > full.total > 4 * ours.total


@pytest.mark.parametrize(("group_size", "most"), [(None, 1.25), (64, 2.25)])
def test_temporaries_stay_within_one_tile_and_the_outputs(group_size, most):
    model = quantize_(nn.Sequential(nn.Linear(512, 3000, bias=False)), 4, group_size, init="minmax")
    layer, tile = model[0], 1 << 20  # 512 rows a tile
    x = torch.randn(8, 512, requires_grad=True)
    with Ledger(model) as led:
        y = quant_matmul(x, layer.qweight, layer.scales, layer.zeros, 4, 512, tile_bytes=tile)
        y.sum().backward()
    states = layer.qweight.nbytes + layer.zeros.nbytes + 2 * layer.scales.nbytes
    outputs = 3 * y.nbytes + 3 * x.nbytes + 64
    assert led.peak.total <= states + outputs + most * tile + layer.scales.nbytes


def test_doubling_the_depth_adds_packed_weights_and_activations_alone():
    small, large = (peak(stack(depth))[0].total for depth in (4, 8))
    added = 4 * (512 * 512 // 2 + 512 * (1 + 4 + 4) + 16 * 512 * 4)
    assert abs(large - small - added) <= 0.02 * added


def test_frozen_scales_keep_nothing_of_the_input():
    model = stack(depth=2)
    for scale in scales(model):
        scale.requires_grad_(False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(torch.randn(4, 512, requires_grad=True)).sum().backward()
    assert not any(tensor.shape == (4, 512) for tensor in kept)


def test_quantizing_never_holds_more_than_the_model_and_a_part_of_one_layer():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(1024, 2048, bias=False) for _ in range(2)))
    one = 4 * 1024 * 2048
    with Ledger(model) as led:
        quantize_(model, 4)
    assert led.peak.total <= 2 * one + one / 8 + 2048 * 5 + 0.75 * one
    assert led.current.total < 0.15 * 2 * one
