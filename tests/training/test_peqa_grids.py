"""Grids: the search is never worse than the range, integers stay in it, zero stays zero, OPTQ makes up."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memspan.base import BadInput
from memspan.training.peqa import dequantize, minmax_grid, optq_, quantize, rtn_grid

BITS = (2, 3, 4, 8)


def squared_errors(weight, grid, bits):
    """Squared error of every group, (n, groups)."""
    back = dequantize(quantize(weight, *grid, bits), *grid)
    return (weight - back).square().view(*grid[0].shape, -1).sum(-1)


def correlated(k=512, m=48):
    return torch.randn(k, m, dtype=torch.float64) @ torch.randn(m, m, dtype=torch.float64)


@settings(max_examples=25, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    group_size=st.sampled_from([None, 1, 4, 12, 24]),
    symmetric=st.booleans(),
    seed=st.integers(0, 10_000),
    shift=st.sampled_from([0.0, 0.5, 3.0, -3.0]),
)
def test_the_searched_grid_is_never_worse_and_every_grid_keeps_its_promises(
    bits, group_size, symmetric, seed, shift
):
    draws = torch.Generator().manual_seed(seed)
    weight = torch.randn(7, 24, generator=draws, dtype=torch.float64).pow(3) + shift
    weight[0] = 0
    weight[1, ::3] = 0
    full = minmax_grid(weight, bits, group_size, symmetric=symmetric)
    best = rtn_grid(weight, bits, group_size, symmetric=symmetric)
    worse = squared_errors(weight, best, bits) - squared_errors(weight, full, bits)
    assert worse.max() <= 1e-12
    for s, z in (full, best):
        q = quantize(weight, s, z, bits)
        assert z.dtype == q.dtype == torch.uint8
        assert int(q.max()) < 1 << bits
        back = dequantize(q, s, z)
        assert (back[weight == 0] == 0).all()
        low = (-z.double() * s).unsqueeze(-1)
        high = (((1 << bits) - 1 - z.double()) * s).unsqueeze(-1)
        grouped, off = (t.view(*s.shape, -1) for t in (weight, (weight - back).abs()))
        inside = (grouped >= low) & (grouped <= high)
        assert (off <= s.unsqueeze(-1) * (0.5 + 1e-9))[inside].all()


def test_a_group_of_zeros_gets_scale_one_and_comes_back_as_zeros():
    s, z = rtn_grid(torch.zeros(2, 8), 3, 4)
    assert s.eq(1).all()
    assert dequantize(quantize(torch.zeros(2, 8), s, z, 3), s, z).eq(0).all()


@pytest.mark.parametrize("make", [minmax_grid, rtn_grid])
def test_layers_of_tiny_and_of_huge_weights_get_their_own_scales(make):
    weight = torch.randn(4, 32, dtype=torch.float64)
    s, z = make(weight, 3, 8)
    for factor in (2.0**-30, 2.0**30):  # nothing clamps a scale
        scaled = make(weight * factor, 3, 8)
        assert torch.equal(scaled[0], s * factor)
        assert torch.equal(scaled[1], z)


def test_the_search_in_parts_equals_the_search_of_each_row():
    weight = torch.randn(40, 9000)  # more than one part
    s, z = rtn_grid(weight, 3)
    for row in (0, 17, 39):
        one = rtn_grid(weight[row : row + 1], 3)
        assert torch.equal(one[0], s[row : row + 1])
        assert torch.equal(one[1], z[row : row + 1])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("grid", ["rtn", "minmax"])
def test_optq_with_inputs_that_do_not_vary_together_is_plain_rounding(bits, group_size, grid):
    weight = torch.randn(16, 48, dtype=torch.float64)
    make = rtn_grid if grid == "rtn" else minmax_grid
    expected = make(weight, bits, group_size)
    found = optq_(weight.clone(), 3.7 * torch.eye(48), bits, group_size, grid=grid)
    torch.testing.assert_close(found.scales, expected[0], rtol=0, atol=0)
    assert torch.equal(found.zeros, expected[1])
    assert torch.equal(found.q, quantize(weight, *expected, bits))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("grid", "low", "high"), [("minmax", 1.4, 2.4), ("rtn", 1.25, 2.1)])
def test_optq_loses_less_of_the_output_where_inputs_vary_together(bits, grid, low, high):
    ratios = []
    for _ in range(6):
        weight, x = torch.randn(32, 48, dtype=torch.float64), correlated()
        make = rtn_grid if grid == "rtn" else minmax_grid
        plain = dequantize(quantize(weight, *make(weight, bits), bits), *make(weight, bits))
        rounded = weight.clone()
        optq_(rounded, x.T @ x, bits, grid=grid)
        lost = [float((x @ (weight - w).T).square().sum()) for w in (plain, rounded)]
        ratios.append(lost[0] / lost[1])
    assert min(ratios) > 1
    assert low < sum(ratios) / len(ratios) < high


@pytest.mark.parametrize("group_size", [None, 8])
def test_optq_is_its_published_loop_with_a_hundredth_of_the_mean_diagonal_added(group_size):
    weight, x = torch.randn(4, 24, dtype=torch.float64), correlated(m=24)
    found = optq_(weight.clone(), x.T @ x, 3, group_size, grid="minmax")
    h = x.T @ x
    h += 0.01 * h.diagonal().mean() * torch.eye(24)
    upper, w = torch.linalg.cholesky(torch.linalg.inv(h), upper=True), weight.clone()
    scales, size = [], group_size or 24
    for j in range(24):
        if j % size == 0:
            grid = minmax_grid(w[:, j : j + size], 3)
            scales.append(grid[0])
        back = dequantize(quantize(w[:, j : j + 1], *grid, 3), *grid)
        w[:, j + 1 :] -= (w[:, j : j + 1] - back) / upper[j, j] * upper[j, j + 1 :]
        w[:, j : j + 1] = back
    torch.testing.assert_close(found.scales, torch.cat(scales, 1))
    torch.testing.assert_close(dequantize(found.q, found.scales, found.zeros), w)


@pytest.mark.parametrize("group_size", [None, 12])
@pytest.mark.parametrize("act_order", [False, True])
def test_optq_does_not_depend_on_how_many_columns_are_updated_at_once(group_size, act_order):
    weight, x = torch.randn(8, 48, dtype=torch.float64), correlated()
    found = []
    for block in (1, 16, 128):
        rounded = weight.clone()
        optq_(rounded, x.T @ x, 3, group_size, block=block, act_order=act_order)
        found.append(rounded)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-4)


def test_a_row_alone_is_rounded_as_in_the_batch():
    weight, x = torch.randn(8, 48, dtype=torch.float64), correlated()
    whole, alone = weight.clone(), weight[3:4].clone()
    optq_(whole, x.T @ x, 3, 16)
    optq_(alone, x.T @ x, 3, 16)
    torch.testing.assert_close(alone, whole[3:4], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("group_size", [None, 12])
def test_the_order_of_columns_is_told_and_what_is_returned_is_what_was_written(group_size):
    weight, x = torch.randn(8, 48, dtype=torch.float64), correlated()
    grid = optq_(weight, x.T @ x, 3, group_size, act_order=True)
    back = dequantize(grid.q, grid.scales, grid.zeros)
    assert (grid.perm is None) == (group_size is None)
    torch.testing.assert_close(weight if grid.perm is None else weight[:, grid.perm], back, rtol=0, atol=0)


def test_inputs_that_are_always_zero_get_weight_zero_and_bad_hessians_are_refused():
    weight, x = torch.randn(4, 8), torch.randn(64, 8)
    x[:, 2] = 0
    rounded = weight.clone()
    optq_(rounded, x.T @ x, 4)
    assert rounded[:, 2].eq(0).all()
    assert rounded.isfinite().all()
    with pytest.raises(BadInput, match="hessian="):
        optq_(weight, torch.full((8, 8), float("nan")), 4)
    with pytest.raises(BadInput, match=r"\(8, 8\)"):
        optq_(weight, torch.eye(7), 4)
