"""SlimFit's operators: exact outputs, gradients within the bounds that their codes allow."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck

from memspan.ledger import saved_bytes
from memspan.training import slimfit
from memspan.training.slimfit import kernels

D = torch.float64
PAPER = slimfit.CompressionPolicy.paper()
NONE = slimfit.CompressionPolicy.none()


def grads(output, inputs, seed=0):
    projection = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(seed))
    return torch.autograd.grad((output * projection).sum(), inputs), projection


# ---- GELU ----


def test_gelus_gradient_at_four_bits_is_within_a_fifth_and_the_output_exact():
    x = torch.linspace(-5, 5, 4001, requires_grad=True)
    y = slimfit.compressed_gelu(x)
    assert torch.equal(y, F.gelu(x))
    (found,) = torch.autograd.grad(y.sum(), x)
    (exact,) = torch.autograd.grad(F.gelu(x).sum(), x)
    assert float((found - exact).abs().max()) <= 0.2
    few = torch.linspace(-5, 5, 24, requires_grad=True)
    (found,) = torch.autograd.grad(slimfit.compressed_gelu(few).sum(), few)
    (exact,) = torch.autograd.grad(F.gelu(few).sum(), few)
    assert float((found - exact).abs().max()) == pytest.approx(0.171, abs=5e-4)


@pytest.mark.parametrize("kind", ["none", "tanh", "silu"])
def test_outside_the_grid_the_gradient_is_that_of_its_end(kind):
    def function(t):
        return slimfit.compressed_silu(t) if kind == "silu" else slimfit.compressed_gelu(t, kind)

    x = torch.tensor([-9.0, -4.2, 3.8, 50.0], dtype=D, requires_grad=True)
    ends = x.detach().clamp(-4.0, 3.5).requires_grad_()
    (found,) = torch.autograd.grad(function(x).sum(), x)
    plain = F.silu(ends) if kind == "silu" else F.gelu(ends, approximate=kind)
    (expected,) = torch.autograd.grad(plain.sum(), ends)
    torch.testing.assert_close(found, expected)


def test_gelu_keeps_half_a_byte_an_element_and_eight_bits_keep_one():
    x = torch.randn(7, 9, requires_grad=True)
    assert [saved_bytes(slimfit.compressed_gelu(x, bits=b)) for b in (4, 8)] == [32, 63]
    found = torch.autograd.grad(slimfit.compressed_gelu(x, bits=8).sum(), x)[0]
    exact = torch.autograd.grad(F.gelu(x).sum(), x)[0]
    assert float((found - exact).abs().max()) < 0.03


# ---- linear ----


@pytest.mark.parametrize("scale", ["fixed", "dynamic"])
def test_a_coded_inputs_weight_gradient_is_within_the_bound_row_by_row(scale):
    layer, x = nn.Linear(32, 8), torch.randn(4, 5, 32).clamp(-7.9, 7.9).requires_grad_()
    policy = slimfit.CompressionPolicy.paper(scale=scale)
    y = slimfit.compressed_linear(x, layer.weight, layer.bias, policy)
    assert torch.equal(y, layer(x))
    (dx, dw, db), dy = grads(y, (x, layer.weight, layer.bias))
    (ex, ew, eb), _ = grads(layer(x), (x, layer.weight, layer.bias))
    torch.testing.assert_close(dx, ex)
    torch.testing.assert_close(db, eb)
    bound = dy.abs().sum((0, 1)) / 32
    assert bool(((dw - ew).abs() <= bound[:, None] + 1e-5).all())
    assert not torch.equal(dw, ew)
    rows = 4 * 5 * 4 if scale == "dynamic" else 0
    again = slimfit.compressed_linear(x, layer.weight, layer.bias, policy)
    assert saved_bytes(again, exclude=[layer]) == x.numel() + rows


def test_a_frozen_linear_keeps_nothing_of_its_input():
    layer, x = nn.Linear(32, 8), torch.randn(4, 32, requires_grad=True)
    layer.weight.requires_grad_(False)
    assert saved_bytes(slimfit.compressed_linear(x, layer.weight, layer.bias, PAPER), exclude=[layer]) == 0


# ---- LayerNorm ----


def norm(shape, eps, trains, dtype=torch.float32):
    layer = nn.LayerNorm(shape, eps=eps).to(dtype)
    with torch.no_grad():
        layer.weight.normal_(1, 0.3)
        layer.bias.normal_()
    layer.weight.requires_grad_(trains)
    return layer


@pytest.mark.parametrize("size", [(6, 16), (2, 3, 16), (2, 3, 2, 16), (16,)])
@pytest.mark.parametrize("eps", [1e-12, 1e-5, 0.5])
@pytest.mark.parametrize("trains", [True, False])
def test_layernorm_is_exact_when_active_and_when_all_is_kept(size, eps, trains):
    layer = norm(16, eps, trains)
    x = (3 * torch.randn(size) + 1).requires_grad_()
    policy = slimfit.CompressionPolicy.paper(layernorm_keep=1.0)
    y = slimfit.compressed_layer_norm(x, (16,), layer.weight, layer.bias, eps, policy)
    assert torch.equal(y, layer(x))
    inputs = [x, layer.bias] + [layer.weight] * trains
    (found, _), (exact, _) = grads(y, inputs), grads(layer(x), inputs)
    for a, b in zip(found, exact, strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-6 * (10 if eps < 1e-6 else 1)


def test_layernorm_over_two_dimensions_and_without_weight():
    x = torch.randn(3, 4, 5, requires_grad=True)
    policy = slimfit.CompressionPolicy.paper(layernorm_keep=1.0)
    (found, _) = grads(slimfit.compressed_layer_norm(x, (4, 5), None, None, 1e-5, policy), [x])
    (exact, _) = grads(F.layer_norm(x, (4, 5)), [x])
    torch.testing.assert_close(found[0], exact[0])


def cosine(x, dy, policy):
    layer = norm(x.shape[-1], 1e-5, trains=False)
    y = slimfit.compressed_layer_norm(x, layer.normalized_shape, layer.weight, layer.bias, 1e-5, policy)
    found = torch.autograd.grad((y * dy).sum(), x)[0]
    exact = torch.autograd.grad((layer(x) * dy).sum(), x)[0]
    return float(F.cosine_similarity(found.flatten(), exact.flatten(), dim=0))


def test_a_tenth_of_the_normalised_input_gives_nearly_the_same_gradient_but_not_when_the_two_are_alike():
    x = torch.randn(64, 384, requires_grad=True)
    assert cosine(x, torch.randn(64, 384), PAPER) > 0.98
    normal = F.layer_norm(x.detach(), (384,))
    alike = cosine(x, normal + torch.randn(64, 384), PAPER)
    assert 0.70 < alike < 0.82  # a real limit: where gradient and input correlate, pruning shows


def test_per_token_pruning_serves_quiet_tokens_that_the_whole_tensors_largest_would_forget():
    spread = torch.cat((torch.ones(32, 1), torch.full((32, 1), 6.0)))  # loud rows have heavy tails
    x = (torch.randn(64, 384).sign() * torch.randn(64, 384).abs() ** spread).requires_grad_()
    kept = slimfit.top_k(F.layer_norm(x, (384,)), 0.1, per_token=True).places // 384
    assert set(kept.bincount(minlength=64).tolist()) == {math.ceil(38.4)}
    whole = slimfit.top_k(F.layer_norm(x, (384,)), 0.1).places // 384
    assert len(set(whole.bincount(minlength=64).tolist())) > 1
    assert cosine(x, torch.randn(64, 384), slimfit.CompressionPolicy.paper(per_token=True)) > 0.97


def test_a_frozen_layernorm_keeps_a_tenth_and_one_number_a_row():
    layer, x = norm(64, 1e-5, trains=False), torch.randn(4, 32, 64, requires_grad=True)
    y = slimfit.compressed_layer_norm(x, (64,), layer.weight, layer.bias, 1e-5, PAPER)
    assert saved_bytes(y, exclude=[layer]) == 8 * (x.numel() // 10) + 4 * 128


# ---- dropout ----


def test_dropout_keeps_one_byte_an_element_and_drops_the_share_it_should():
    x = torch.ones(400, 100, requires_grad=True)
    y = slimfit.compressed_dropout(x, 0.25)
    assert saved_bytes(y) == x.numel()
    (g,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(g, y)
    assert float((y == 0).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert sorted(set(y.unique().tolist())) == pytest.approx([0.0, 1 / 0.75])
    assert slimfit.compressed_dropout(x, 0.25, training=False) is x
    assert not slimfit.compressed_dropout(x, 1.0).any()


# ---- attention ----


def operands(b=2, a=3, t=5, s=5, d=4, dtype=torch.float32, layout="heads"):
    def one(length):
        flat = torch.randn(b, length, a, d, dtype=dtype)
        return (
            flat.transpose(1, 2) if layout == "heads" else flat.transpose(1, 2).contiguous()
        ).requires_grad_()

    return one(t), one(s), one(s)


MASKS = {
    "none": None,
    "padding": torch.tensor([[True] * 5, [True] * 3 + [False] * 2])[:, None, None, :],
    "added": 0.5 * torch.randn(5, 5),
    "by head": torch.randn(1, 3, 5, 5) > -0.5,
}


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("causal", [False, True])
def test_attention_gives_torchs_output_and_a_gradient_near_it(kernel, mask, causal):
    if causal and mask != "none":
        return
    q, k, v = operands(layout="heads" if causal else "plain")
    policy = slimfit.CompressionPolicy.paper(attention=kernel)
    y = slimfit.compressed_attention(q, k, v, MASKS[mask], causal=causal, policy=policy)
    exact = F.scaled_dot_product_attention(q, k, v, MASKS[mask], is_causal=causal)
    torch.testing.assert_close(y, exact, rtol=1e-5, atol=1e-6)
    (found, _), (expected, _) = grads(y, (q, k, v)), grads(exact, (q, k, v))
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).norm() / b.norm()) < 0.05


@pytest.mark.parametrize("scale", ["fixed", "dynamic"])
@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("mask", MASKS)
def test_attention_worked_through_in_parts_of_the_batch_is_the_same(kernel, mask, scale, monkeypatch):
    q, k, v = operands(b=2)
    policy = slimfit.CompressionPolicy.paper(attention=kernel, scale=scale)
    found = []
    for scores in (kernels._SCORES, 1):
        monkeypatch.setattr(kernels, "_SCORES", scores)
        torch.manual_seed(3)
        y = slimfit.compressed_attention(q, k, v, MASKS[mask], dropout=0.2, policy=policy)
        found.append((y, *grads(y, (q, k, v))[0]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("mask", MASKS)
def test_gradcheck_of_attention_with_compression_none(kernel, mask):
    q, k, v = operands(b=2, a=3, dtype=D)
    added = MASKS[mask]
    added = added.to(D) if added is not None and added.is_floating_point() else added
    policy = slimfit.CompressionPolicy(
        gelu=None, matmul=None, softmax=None, wide_linear=None, layernorm_keep=None, attention=kernel
    )
    assert gradcheck(lambda *x: slimfit.compressed_attention(*x, added, policy=policy), (q, k, v))


def test_gradcheck_of_the_other_operators_with_compression_none():
    x = torch.randn(3, 6, dtype=D, requires_grad=True)
    weight, bias = torch.randn(2, 6, dtype=D, requires_grad=True), torch.randn(2, dtype=D, requires_grad=True)
    gamma, beta = torch.randn(6, dtype=D, requires_grad=True), torch.randn(6, dtype=D, requires_grad=True)
    assert gradcheck(lambda t: slimfit.compressed_gelu(t, bits=None), x)
    assert gradcheck(lambda *t: slimfit.compressed_linear(*t, NONE), (x, weight, bias))
    assert gradcheck(
        lambda *t: slimfit.compressed_layer_norm(t[0], (6,), *t[1:], 1e-5, NONE), (x, gamma, beta)
    )
    whole = slimfit.CompressionPolicy.paper(layernorm_keep=1.0)
    frozen = gamma.detach()
    assert gradcheck(lambda t, b: slimfit.compressed_layer_norm(t, (6,), frozen, b, 1e-5, whole), (x, beta))
    stays = torch.manual_seed
    assert gradcheck(lambda t: (stays(1), slimfit.compressed_dropout(t, 0.5))[1], x)


def test_coded_probabilities_are_within_half_a_step_except_at_the_top():
    p = torch.linspace(0, 1, 100_001)
    error = (slimfit.from_fixed_point(slimfit.fixed_point(p, 0, 8, signed=False), 8) - p).abs()
    assert float(error[p <= 511 / 512].max()) <= 1 / 512 + 1e-7
    assert float(error.max()) == pytest.approx(1 / 256)


def test_eager_keeps_coded_operands_and_probabilities_and_sdpa_operands_alone():
    q, k, v = operands(b=2, a=4, t=16, s=16, d=8)
    n, scores = q.numel(), 2 * 4 * 16 * 16
    eager = slimfit.compressed_attention(q, k, v, dropout=0.1)
    assert saved_bytes(eager) == 3 * n + scores + n
    fused = slimfit.compressed_attention(
        q, k, v, dropout=0.1, policy=slimfit.CompressionPolicy.paper(attention="sdpa")
    )
    assert saved_bytes(fused) == 3 * n + n


def test_the_fused_kernels_gradient_is_that_of_attention_over_the_coded_operands():
    q, k, v = operands(b=2, a=2, t=7, s=7, d=8, dtype=D)
    policy = slimfit.CompressionPolicy.paper(attention="sdpa")
    found, _ = grads(slimfit.compressed_attention(q, k, v, policy=policy), (q, k, v))
    coded = [(x.detach() * 16).round().div(16).requires_grad_() for x in (q, k, v)]
    exact, _ = grads(F.scaled_dot_product_attention(*coded), coded)
    for a, b in zip(found, exact, strict=True):  # rows of probabilities sum to 1, so the two agree
        torch.testing.assert_close(a, b)


def test_dropout_falls_on_v_and_its_gradient_follows():
    q, k, v = operands(b=8, a=4, t=16, s=16, d=8, dtype=D)
    for kernel in ("eager", "sdpa"):
        policy = slimfit.CompressionPolicy(
            gelu=None, matmul=None, softmax=None, wide_linear=None, layernorm_keep=None, attention=kernel
        )
        torch.manual_seed(2)
        y = slimfit.compressed_attention(q, k, v, dropout=0.3, policy=policy)
        torch.manual_seed(2)
        stays = torch.empty_like(v, dtype=torch.bool).bernoulli_(0.7)
        expected = F.scaled_dot_product_attention(q, k, v * stays / 0.7)
        torch.testing.assert_close(y, expected)
        (found, _), (exact, _) = grads(y, (q, k, v)), grads(expected, (q, k, v))
        for a, b in zip(found, exact, strict=True):
            torch.testing.assert_close(a, b)


def test_a_learned_bias_of_positions_makes_attention_plain():
    q, k, v = operands()
    bias = torch.randn(1, 3, 5, 5, requires_grad=True)
    slimfit.compressed_attention(q, k, v, bias).sum().backward()
    assert bias.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, D])
def test_operators_run_in_other_types(dtype):
    q, k, v = operands(dtype=dtype)
    x = torch.randn(3, 8, dtype=dtype, requires_grad=True)
    layer = norm(8, 1e-5, trains=False, dtype=dtype)
    for kernel in ("eager", "sdpa"):
        policy = slimfit.CompressionPolicy.paper(attention=kernel)
        y = slimfit.compressed_attention(q, k, v, policy=policy)
        assert y.dtype == dtype
        y.sum().backward()
        assert q.grad.dtype == dtype
    for y in (
        slimfit.compressed_gelu(x),
        slimfit.compressed_layer_norm(x, (8,), layer.weight, layer.bias, 1e-5, PAPER),
        slimfit.compressed_linear(x, torch.randn(2, 8, dtype=dtype, requires_grad=True), None, PAPER),
    ):
        assert y.dtype == dtype
        y.sum().backward()
    assert x.grad.dtype == dtype
