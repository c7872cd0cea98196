"""The kernel: same numbers as the naive reference, exact gradients, and no float weight that stays alive."""

import importlib
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from memspan.ledger import Ledger
from memspan.nn.bits import pack_bits
from memspan.training.peqa import QuantLinear, quant_matmul, quant_matmul_naive, quantize_, scales

layers = importlib.import_module("memspan.training.peqa.layers")  # peqa.layers is a function
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


# ---- the device's kernels ---------------------------------------------------------------------------------


def close_to(dtype):
    """Relative errors of a result in a dtype whose inputs are exact."""
    return {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]


def norm_of_difference(found, expected):
    expected = expected.detach().cpu().double()
    return (found.detach().cpu().double() - expected).norm() / expected.norm().clamp_min(1e-30)


INTERPRETED = """
import importlib, itertools, torch
from memspan.nn.bits import pack_bits
layers = importlib.import_module("memspan.training.peqa.layers")
kernels = importlib.import_module("memspan.training.peqa._kernels_triton")
torch.manual_seed(0)

def near(found, expected, most, told):
    expected = expected.double()
    error = (found.double() - expected).norm() / expected.norm().clamp_min(1e-30)
    assert error <= most, (told, float(error))

def drawn(bits, n, m, groups):
    q = pack_bits(torch.randint(0, 1 << bits, (n, m)), bits)
    return q, torch.randn(n, groups), torch.randint(0, 1 << bits, (n, groups), dtype=torch.uint8)

shapes = (1, 1, 1), (5, 41, 1), (7, 15, 5), (3, 48, 2), (2, 1100, 1)
for bits, (n, m, groups) in itertools.product((2, 3, 4, 8), shapes):
    q, s, z = drawn(bits, n, m, groups)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        whole = layers._integers(q, z, bits, m, dtype)
        assert torch.equal(kernels.integers(q, z, None, bits, m, dtype), whole)
        expected = layers._scale_(whole, s)
        found = kernels.integers(q, z, s, bits, m, dtype)
        if dtype == torch.bfloat16:  # the interpreter cuts where a device rounds
            near(found, expected, 2**-7, (bits, n, m, groups))
        else:
            assert torch.equal(found, expected)

# Long rows of few outputs, whose sums several programs share.
q, s, z = drawn(3, 2, 9000, 1)
x, bias = torch.randn(3, 9000), torch.randn(2)
expected = x.double() @ layers._scale_(layers._integers(q, z, 3, 9000, torch.double), s.double()).T + bias
near(kernels.product(x, q, s, z, 3, bias), expected, 1e-5, "split")

plain = layers._on_device
most = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
cases = itertools.product((3, 4), ((9, 24, 1), (9, 40, 5)), most, (None, 300), ("input", "output"))
for bits, (n, m, groups), dtype, tile, save in cases:
    q, s, z = drawn(bits, n, m, groups)
    x, bias, dy = torch.randn(2, 3, m).to(dtype), torch.randn(n), torch.randn(n, 2, 3).to(dtype)
    found = []
    for on_device, kind in ((False, torch.float64), (True, dtype)):
        layers._on_device = (lambda x: True) if on_device else plain
        leaves = [x.detach().clone().to(kind), s.detach().clone(), bias.detach().clone()]
        for leaf in leaves:
            leaf.requires_grad_()
        given = leaves[0], q, leaves[1], z, bits, m, leaves[2]
        y = layers.quant_matmul(*given, tile_bytes=tile, save=save)
        with torch.no_grad():
            few = layers.quant_matmul(*given)
        found.append([y.detach(), few, *torch.autograd.grad(y, leaves, dy.movedim(0, -1).to(kind))])
    for told, expected, ours in zip(("y", "few", "dx", "ds", "db"), *found):
        near(ours, expected, most[dtype], (told, bits, n, m, groups, dtype, tile, save))
layers._on_device = lambda x: True
with torch.no_grad():
    assert layers.quant_matmul(torch.zeros(0, 40), q, s, z, bits, m).shape == (0, 9)
print("agree")
"""


FAKES = """
import importlib, torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from memspan.ledger import Ledger
from memspan.training.peqa import QuantLinear
layers = importlib.import_module("memspan.training.peqa.layers")
layers._on_device = lambda x: True
kernels = importlib.import_module("memspan.training.peqa._kernels_triton")

class Nothing:  # the interpreter copies what it is given, which a device does not
    def __getitem__(self, grid):
        return lambda *given: None

kernels._integers = kernels._of_scales = kernels._product = Nothing()
peaks = []
for group, trained in ((None, True), (16, True), (16, False)):
    for fake in (False, True):
        with FakeTensorMode() if fake else torch.enable_grad():
            model = nn.Sequential(*(QuantLinear(64, 48, 4, group) for _ in range(2)))
            model[1] = QuantLinear(48, 64, 3, None)
            x = torch.randn(5, 64, requires_grad=trained)
            with Ledger(model) as led, torch.set_grad_enabled(trained):
                y = model(x)
                if trained:
                    y.sum().backward()
        peaks.append(led.peak.total)
assert peaks[::2] == peaks[1::2], peaks
print("agree")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "code", [INTERPRETED, FAKES], ids=["kernels agree with torch", "fake tensors find the memory of a run"]
)
def test_the_device_kernels_under_their_interpreter(code):
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.stdout.strip() == "agree", done.stderr


on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.cuda
@on_cuda
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("group_size", "scale_dtype"), [(None, torch.float32), (64, torch.float32), (24, torch.bfloat16)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_device_a_weight_from_packed_integers_is_torchs_bit_for_bit(
    bits, group_size, dtype, scale_dtype
):
    m = 1001 if group_size is None else 960
    layer = layer_of(130, m, bits, group_size).cuda()
    q, z, s = layer.qweight, layer.zeros, layer.scales.detach().to(scale_dtype)
    kernels = layers._triton()
    assert kernels is not None
    expected = layers._integers(q, z, bits, m, dtype)
    assert torch.equal(kernels.integers(q, z, None, bits, m, dtype), expected)
    assert torch.equal(kernels.integers(q, z, s, bits, m, dtype), layers._scale_(expected, s))


@pytest.mark.cuda
@on_cuda
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [None, 64])
@pytest.mark.parametrize("save", ["input", "output"])
@pytest.mark.parametrize("tile_bytes", [None, 50_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_device_outputs_and_gradients_are_the_cpus_in_float64(bits, group_size, save, tile_bytes, dtype):
    layer = layer_of(130, 320, bits, group_size)
    x, dy = torch.randn(3, 11, 320).to(dtype), torch.randn(130, 3, 11).to(dtype)
    found = []
    for device, kind in (("cpu", torch.float64), ("cuda", dtype)):
        given = x.to(kind), layer.scales, layer.bias
        leaves = [one.to(device).detach().clone().requires_grad_() for one in given]
        q, z = layer.qweight.to(device), layer.zeros.to(device)
        y = quant_matmul(leaves[0], q, leaves[1], z, bits, 320, leaves[2], tile_bytes=tile_bytes, save=save)
        assert y.dtype == kind
        found.append([y, *torch.autograd.grad(y, leaves, dy.to(device, kind).movedim(0, -1))])
    for expected, ours in zip(*found, strict=True):
        assert ours.isfinite().all()
        assert norm_of_difference(ours, expected) <= close_to(dtype)


@pytest.mark.cuda
@on_cuda
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("n", "m", "group_size", "dtype"),
    [
        (130, 320, None, torch.float32),
        (130, 320, 64, torch.bfloat16),
        (97, 1001, 7, torch.float16),
        (6, 9000, None, torch.float16),
        (3000, 64, 32, torch.float32),
    ],
)
@pytest.mark.parametrize("rows", [0, 1, 3, 16, 17])
def test_on_a_device_a_few_rows_are_multiplied_by_packed_weights(bits, n, m, group_size, dtype, rows):
    layer, x = layer_of(n, m, bits, group_size), torch.randn(rows, m).to(dtype)
    expected = F.linear(x.double(), layer.dequantized().double(), layer.bias.double())
    layer.cuda()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        found = layer(x.cuda())
    assert found.dtype == dtype
    assert found.shape == (rows, n)
    if rows:
        assert norm_of_difference(found, expected) <= close_to(dtype)
    if rows <= 16 and n == 3000:
        assert torch.cuda.max_memory_allocated() - before < n * m * dtype.itemsize


@pytest.mark.cuda
@on_cuda
def test_on_a_device_gradients_of_scales_in_float16_do_not_overflow():
    dweight = torch.full((8, 512), 3000.0, dtype=torch.float16, device="cuda")
    q = pack_bits(torch.full((8, 512), 255), 8).cuda()
    z = torch.zeros(8, 1, dtype=torch.uint8, device="cuda")
    found = layers._triton().scale_gradient(dweight, q, z, 8, torch.float32)
    torch.testing.assert_close(found, torch.full_like(found, 3000.0 * 255 * 512))


@pytest.mark.cuda
@on_cuda
def test_on_a_device_a_training_step_holds_one_float_weight_at_a_time():
    layer = layer_of(2048, 2048, 4, 64).cuda()
    x = torch.randn(8, 2048, device="cuda", requires_grad=True)
    layer(x).sum().backward()  # cuBLAS takes its workspace now
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    layer(x).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 1.1 * 4 * 2048 * 2048


@pytest.mark.cuda
@on_cuda
def test_on_a_device_offsets_pass_two_to_the_thirty_first():
    n, m = 1 << 16, (1 << 15) + 8
    q = torch.zeros(n, m // 4, dtype=torch.uint8, device="cuda")
    q[-1] = 0b11100100
    z, s = torch.zeros(n, 1, dtype=torch.uint8, device="cuda"), torch.full((n, 1), 0.5, device="cuda")
    last = torch.arange(4.0, device="cuda").repeat(m // 4) / 2
    kernels = layers._triton()
    whole = kernels.integers(q, z, s, 2, m, torch.float16)
    assert torch.equal(whole[-1].float(), last)
    assert not whole[-2].any()
    ds = kernels.scale_gradient(whole, q, z, 2, torch.float32)
    torch.testing.assert_close(ds[-1:, 0], last.square().sum()[None] * 2)
    y = kernels.product(torch.ones(1, m, device="cuda"), q, s, z, 2, None)
    torch.testing.assert_close(y[0, -1], last.sum())
