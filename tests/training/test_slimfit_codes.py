"""SlimFit's codes: grids, packing, largest elements; and the policy that chooses them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memspan.base import BadInput
from memspan.nn.bits import pack_bits
from memspan.training import slimfit
from memspan.training.slimfit import codes


@settings(max_examples=60, deadline=None)
@given(
    whole=st.integers(0, 4), fraction=st.integers(0, 3), signed=st.booleans(), seed=st.integers(0, 99),
    length=st.integers(1, 40),
)  # fmt: skip
def test_a_code_is_the_nearest_point_of_the_grid(whole, fraction, signed, seed, length):
    if whole + fraction + signed < 1:
        return
    torch.manual_seed(seed)
    x = 20 * torch.randn(length, dtype=torch.float64)
    found = slimfit.fixed_point(x, whole, fraction, signed)
    grid = codes.Grid(whole, fraction, signed)
    points = torch.arange(grid.low, grid.high + 1, dtype=torch.float64) / 2**fraction
    nearest = (x[:, None] - points).abs().min(dim=1).values
    there = (x - slimfit.from_fixed_point(found, fraction, torch.float64)).abs()
    assert torch.equal(nearest, there)


def test_the_papers_three_grids():
    x = torch.tensor([-9.0, -4.0, 0.24, 3.5, 99.0])
    assert slimfit.fixed_point(x, 2, 1).tolist() == [-8, -8, 0, 7, 7]
    assert slimfit.fixed_point(x, 3, 4).tolist() == [-128, -64, 4, 56, 127]
    assert slimfit.fixed_point(torch.tensor([0.0, 0.5, 1.0]), 0, 8, signed=False).tolist() == [0, 128, 255]


@pytest.mark.parametrize("length", [1, 2, 7, 4096, codes._PIECE - 1, codes._PIECE, codes._PIECE + 3])
def test_packed_codes_of_any_length_are_those_of_pack_bits(length):
    x = 3 * torch.randn(length)
    plain = (slimfit.fixed_point(x, 2, 1).int() + 8).to(torch.uint8)
    packed = codes.encode_packed(x, codes.GELU_GRID[4])
    assert torch.equal(packed, pack_bits(plain, 4))
    assert packed.numel() == (length + 1) // 2
    grad, table = torch.randn(length), torch.randn(16)
    assert torch.equal(
        codes.multiply_by_table(grad, packed, table, codes.GELU_GRID[4]), grad * table[plain.long()]
    )


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (3, 1, 0, 2), (0, 1, 2, 3)])
def test_codes_keep_the_tensors_order_in_memory(order):
    x = torch.randn(2, 3, 4, 5).permute(order)
    found = codes.encode(x, codes.MATMUL_GRID)
    assert torch.equal(found, slimfit.fixed_point(x.contiguous(), 3, 4))
    assert found.stride() == x.stride()
    gappy = torch.randn(2, 3, 8)[..., ::2]
    assert torch.equal(codes.encode(gappy, codes.MATMUL_GRID), slimfit.fixed_point(gappy.clone(), 3, 4))


def test_the_dynamic_scale_follows_each_rows_largest_magnitude():
    x = torch.randn(6, 16) * torch.logspace(-2, 3, 6)[:, None]
    kept = codes.keep(x, 8, "dynamic")
    error = (codes.read(kept, x.dtype) - x).abs().amax(1)
    assert bool((error <= x.abs().amax(1) / 254 * 1.001).all())
    clipped = codes.read(codes.keep(x, 8, "fixed"), x.dtype)
    assert float(clipped.abs().max()) <= 8.0


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 9), width=st.integers(1, 30), keep=st.floats(0.01, 1.0), token=st.booleans())
def test_the_largest_elements_are_kept_and_counted(rows, width, keep, token):
    x = torch.randn(rows, width)
    kept = slimfit.top_k(x, keep, per_token=token)
    dense = kept.dense(x.shape)
    count = -(-keep * width // 1) if token else max(1, int(keep * x.numel()))
    assert kept.places.dtype == torch.int32
    if token:
        assert (
            set((dense != 0).sum(1).tolist()) == {int(count)}
            or abs(keep * width - round(keep * width)) < 1e-6
        )
    else:
        assert kept.places.numel() == count
        rest = x[dense == 0]
        assert rest.numel() == 0 or float(rest.abs().max()) <= float(kept.values.abs().min())
    assert torch.equal(dense[dense != 0], x[dense != 0])


def test_per_token_keeps_the_rounded_up_tenth_of_every_row():
    for width, count in ((384, 39), (10, 1), (30, 3), (64, 7)):
        assert slimfit.top_k(torch.randn(5, width), 0.1, per_token=True).places.numel() == 5 * count


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gelu", 3), ("matmul", 4), ("softmax", 16), ("wide_linear", 2), ("layernorm_keep", 0.0),
        ("layernorm_keep", 1.5), ("scale", "other"), ("attention", "flash"),
    ],
)  # fmt: skip
def test_a_policy_that_nobody_can_follow_is_refused(name, value):
    with pytest.raises(BadInput, match=f"{name}="):
        slimfit.CompressionPolicy.paper(**{name: value})


def test_a_grid_of_no_bits_or_of_more_than_eight_is_refused():
    for bits in ((8, 1), (0, 0, False), (-1, 3)):
        with pytest.raises(BadInput, match="1 to 8 bits"):
            slimfit.fixed_point(torch.zeros(1), *bits)
