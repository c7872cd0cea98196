"""UniPT's modules against their formulas: attention by ReLU and L1, confidence, windows, pooling, loss."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from memspan.base import BadInput
from memspan.training import unipt
from memspan.training.unipt.parts import fused


def drawn(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter and buffer anew; variances positive."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if tensor.is_floating_point():
                value = torch.randn(tensor.shape, generator=g, dtype=torch.float64)
                tensor.copy_(value.abs() + 0.5 if "running_var" in name else 0.4 * value)
    return module


def states(layers: int = 4, batch: int = 3, places: int = 6, width: int = 12) -> list[torch.Tensor]:
    return [torch.randn(batch, places, width) for _ in range(layers)]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 6), st.integers(1, 8), st.integers(0, 10_000))
def test_attention_rows_are_nonnegative_and_sum_to_one_or_zero(batch, queries, places, width, seed):
    torch.manual_seed(seed)
    mask = torch.rand(batch, places) < 0.7
    _, weights = unipt.ParallelInteraction(None)(
        torch.randn(batch, queries, width), torch.randn(batch, places, width), mask
    )
    sums = weights.sum(-1)
    assert (weights >= 0).all()
    assert (((sums - 1).abs() < 1e-4) | (sums < 1 - 1e-4)).all()
    assert torch.where(weights.amax(-1) > 1e-3, (sums - 1).abs() < 1e-4, sums >= 0).all()
    assert (weights.masked_select(~mask[:, None].expand_as(weights)) == 0).all()


def test_a_row_of_negative_scores_stays_zero():
    _, weights = unipt.ParallelInteraction(None)(-torch.ones(1, 2, 3), torch.ones(1, 4, 3))
    assert torch.equal(weights, torch.zeros(1, 2, 4))


def test_permuting_context_with_its_mask_leaves_the_merged_feature_without_the_identity():
    anchor, target, order = torch.randn(2, 5, 8), torch.randn(2, 7, 8), torch.randperm(7)
    mask = torch.tensor([[1, 1, 1, 0, 1, 0, 1], [1, 1, 1, 1, 1, 1, 1]])
    interact = unipt.ParallelInteraction(None)
    one, _ = interact(anchor, target, mask)
    other, _ = interact(anchor, target[:, order], mask[:, order])
    torch.testing.assert_close(one, other)


def test_scores_of_half_floats_do_not_overflow():
    big = torch.full((1, 2, 512), 60.0, dtype=torch.float16)  # S = 512 * 3600 > 65504
    merged, weights = unipt.ParallelInteraction()(big, big)
    assert merged.isfinite().all()
    assert merged.dtype == weights.dtype == torch.float16
    at_once = fused(big, big[:, None], torch.ones(1, 1, dtype=torch.float16), None, "identity", None)
    torch.testing.assert_close(at_once, merged)


def test_confidence_sums_to_one_and_one_layer_gets_all_of_it_without_gradient_to_the_gate():
    gate = drawn(unipt.ConfidenceAggregation(8))
    _, alpha = gate(torch.randn(5, 8), torch.randn(5, 3, 8), torch.randn(5, 3, 4, 8))
    torch.testing.assert_close(alpha.sum(1), torch.ones(5))
    merged = torch.randn(5, 1, 4, 8)
    total, alpha = gate(torch.randn(5, 8), torch.randn(5, 1, 8), merged)
    assert torch.equal(alpha, torch.ones(5, 1))
    torch.testing.assert_close(total, merged[:, 0])
    total.square().sum().backward()
    assert gate.gate.weight.grad.abs().max() == 0
    assert not gate.gate.bias.requires_grad  # it cancels in the softmax


def test_both_modules_pass_gradcheck():
    a, f = (torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    for residual in ("identity", "token", None):
        interact = unipt.ParallelInteraction(residual)
        assert torch.autograd.gradcheck(lambda x, y, i=interact: i(x, y, mask)[0], (a, f))
    gate = drawn(unipt.ConfidenceAggregation(4).double())
    inputs = [
        torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 4), (2, 3, 4), (2, 3, 5, 4))
    ]
    assert torch.autograd.gradcheck(lambda *x: gate(*x)[0], inputs)


@pytest.mark.parametrize("residual", ["identity", "token", None])
def test_the_written_out_gradient_passes_gradcheck(residual):
    shapes = ((2, 3, 4), (2, 2, 3, 4), (2, 2))
    a, f, c = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert torch.autograd.gradcheck(lambda *x: fused(*x, mask, residual, None), (a, f, c))


@pytest.mark.parametrize("residual", ["identity", "token", None])
@pytest.mark.parametrize("masked", [False, True])
def test_all_layers_at_once_equal_a_loop_over_layers(residual, masked):
    queries = 6 if residual == "identity" else 2
    anchor, targets = torch.randn(3, queries, 8), torch.randn(3, 4, 6, 8)
    mask = torch.rand(3, 6) < 0.6 if masked else None
    position = torch.tensor([1, 5, 0]) if residual == "token" else None
    gate, interact = drawn(unipt.ConfidenceAggregation(8)), unipt.ParallelInteraction(residual)
    pooled, means = torch.randn(3, 8), torch.randn(3, 4, 8)
    layers = [interact(anchor, one, mask, position)[0] for one in targets.unbind(1)]
    expected, alpha = gate(pooled, means, torch.stack(layers, dim=1))
    found = fused(anchor, targets, alpha, mask, residual, position)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for size in (1.0, 1e-8):  # scores that sum to less than the floor: a constant divides them
        a, f = (size * anchor).double().requires_grad_(), targets.double().requires_grad_()
        weigh = alpha.detach().double()
        merged = torch.stack([interact(a, one, mask, position)[0] for one in f.unbind(1)], dim=1)
        both = fused(a, f, weigh, mask, residual, position), (merged * weigh[:, :, None, None]).sum(1)
        grads = (torch.autograd.grad(y.square().sum(), (a, f)) for y in both)
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(one, other)
    torch.testing.assert_close(
        fused(anchor, targets, None, mask, residual, position),
        torch.stack(layers).mean(0),
        rtol=1e-5,
        atol=1e-6,
    )


def test_window_weights_sum_to_two_or_to_one_where_nothing_is_positive():
    align = drawn(unipt.SpatialAlign([5, 7, 9]))
    maps = [torch.randn(2, 5, 12, 8), torch.randn(2, 7, 6, 4), torch.randn(2, 9, 3, 2)]
    for stage, ratio in ((0, 4), (1, 2)):
        weights = align.weights(stage, maps[-1], maps[stage])
        assert weights.shape == (2, 3, ratio, 2, ratio)
        sums = weights.sum(dim=(2, 4))
        assert (((sums - 2).abs() < 1e-5) | ((sums - 1).abs() < 1e-5)).all()
        assert (weights >= 1 / ratio**2).all()  # the mean's part is added to each
    nothing = align.weights(0, maps[-1], -maps[0].abs()).sum(dim=(2, 4))
    torch.testing.assert_close(nothing, torch.ones_like(nothing))


def test_a_constant_map_gives_that_constant_times_the_windows_sum():
    align = drawn(unipt.SpatialAlign([4, 6]))
    anchor, constant = torch.randn(2, 6, 2, 2), torch.full((2, 4, 6, 6), 0.7)
    sums = align.weights(0, anchor, constant).sum(dim=(2, 4))
    (aligned,) = align([constant, anchor])
    torch.testing.assert_close(aligned, 0.7 * sums[:, None].expand(-1, 4, -1, -1))


def test_windows_equal_upsampling_and_unfolding():
    align = drawn(unipt.SpatialAlign([4, 6]))
    early, anchor = torch.randn(2, 4, 12, 12), torch.randn(2, 6, 4, 4)
    guide = nn.functional.interpolate(align.identity[0](anchor), scale_factor=3, mode="nearest")
    scores = nn.functional.unfold((guide * early).sum(1, keepdim=True), 3, stride=3).relu()
    share = scores / scores.sum(1, keepdim=True).clamp_min(1e-6) + 1 / 9
    expected = (nn.functional.unfold(early, 3, stride=3).view(2, 4, 9, 16) * share[:, None]).sum(2)
    torch.testing.assert_close(align([early, anchor])[0].flatten(2), expected, rtol=1e-5, atol=1e-5)


def test_maps_that_are_no_whole_multiples_are_refused():
    align = unipt.SpatialAlign([4, 6])
    for shape in ((9, 8), (8, 12), (2, 2)):
        with pytest.raises(BadInput, match="whole multiple"):
            align([torch.ones(1, 4, *shape), torch.ones(1, 6, 4, 4)])
    with pytest.raises(BadInput, match="maps"):
        align([torch.ones(1, 5, 8, 8), torch.ones(1, 6, 4, 4)])


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: unipt.ParallelInteraction("all"), "residual"),
        (lambda: unipt.ParallelInteraction()(torch.ones(1, 2, 3), torch.ones(1, 4, 3)), "identity needs"),
        (lambda: unipt.ParallelInteraction(None)(torch.ones(1, 2, 3), torch.ones(2, 4, 3)), "target"),
        (lambda: unipt.ConfidenceAggregation(4)(torch.ones(1, 4), torch.ones(2, 3, 4), []), "targets"),
        (lambda: unipt.ConfidenceAggregation(4)(torch.ones(2, 4), torch.ones(2, 3, 4), []), "merged"),
        (lambda: unipt.SpatialAlign([4]), "channels"),
        (lambda: unipt.HingeRetrievalLoss(-1), "margin"),
        (lambda: unipt.HingeRetrievalLoss()(torch.ones(1, 4), torch.ones(1, 4)), "2 pairs"),
        (lambda: unipt.GPO(code=3), "even"),
        (lambda: unipt.GPO()(torch.ones(2, 3, 4), torch.ones(2, 4)), "mask"),
    ],
)
def test_bad_input_is_refused_with_its_name(call, told):
    with pytest.raises(BadInput, match=told):
        call()


def test_the_hinge_loss_is_its_double_sum():
    a, b = (nn.functional.normalize(torch.randn(5, 4), dim=1) for _ in range(2))
    s = a @ b.T
    rows = [[max(0.0, 0.2 + s[i, j].item() - s[i, i].item()) for j in range(5) if j != i] for i in range(5)]
    columns = [
        [max(0.0, 0.2 + s[j, i].item() - s[i, i].item()) for j in range(5) if j != i] for i in range(5)
    ]
    every = sum(map(sum, rows)) + sum(map(sum, columns))
    hardest = sum(map(max, rows)) + sum(map(max, columns))
    assert unipt.HingeRetrievalLoss(hardest=False)(a, b).item() == pytest.approx(every, rel=1e-5)
    assert unipt.HingeRetrievalLoss()(3 * a, b).item() == pytest.approx(hardest, rel=1e-5)


def test_generalised_pooling_is_a_weighted_sum_of_sorted_values_whatever_the_padding():
    gpo, values = drawn(unipt.GPO()), torch.randn(3, 6, 4)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]])
    pooled = gpo(values, mask)
    for row, count in ((0, 6), (1, 3)):
        kept = values[row][mask[row].bool()].sort(dim=0, descending=True).values
        weights = gpo.weights(torch.tensor([count]))[0]
        assert weights.sum().item() == pytest.approx(1)
        torch.testing.assert_close(pooled[row], weights @ kept)
    assert torch.equal(pooled[2], torch.zeros(4))
    longer = gpo(torch.cat([values, torch.randn(3, 2, 4)], 1), torch.cat([mask, torch.zeros(3, 2)], 1))
    torch.testing.assert_close(longer, pooled)
    pooled.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in gpo.parameters())
