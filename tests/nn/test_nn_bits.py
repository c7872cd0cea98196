"""Packed integers: exact inverses, exact bytes, low end first."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memspan.base import BadInput
from memspan.nn.bits import WIDTHS, pack_bits, packed_length, unpack_bits


@pytest.mark.parametrize("bits", WIDTHS)
def test_unpacking_what_was_packed_gives_the_same_values_in_exactly_the_bytes_promised(bits):
    for m in range(1, 41):
        values = torch.randint(0, 1 << bits, (5, m))
        packed = pack_bits(values, bits)
        assert packed.dtype == torch.uint8
        assert packed.nbytes == 5 * -(-m * bits // 8) == 5 * packed_length(m, bits)
        assert torch.equal(unpack_bits(packed, bits, m), values.to(torch.uint8))


@pytest.mark.parametrize(("bits", "m"), [(1, 9), (2, 5), (3, 4), (4, 3)])
def test_every_short_row_of_values_comes_back(bits, m):
    rows = torch.tensor(list(itertools.product(range(1 << bits), repeat=m)))
    assert torch.equal(unpack_bits(pack_bits(rows, bits), bits, m), rows.to(torch.uint8))


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_row_is_one_bit_stream_with_the_low_end_first(bits):
    values = torch.randint(0, 1 << bits, (37,)).tolist()
    stream = sum(value << bits * place for place, value in enumerate(values))
    expected = stream.to_bytes(packed_length(37, bits), "little")
    assert bytes(pack_bits(torch.tensor(values), bits).tolist()) == expected


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(WIDTHS),
    st.lists(st.integers(0, 4), min_size=0, max_size=2),
    st.integers(0, 70),
    st.sampled_from([torch.uint8, torch.int16, torch.int64]),
)
def test_any_shape_and_dtype_round_trips(bits, lead, m, dtype):
    values = torch.randint(0, 1 << bits, (*lead, m)).to(dtype)
    again = unpack_bits(pack_bits(values, bits), bits, m)
    assert again.shape == values.shape
    assert torch.equal(again, values.to(torch.uint8))


def test_views_at_odd_places_and_transposed_values_are_packed_alike():
    base = torch.randint(0, 8, (17, 33), dtype=torch.uint8)
    for values in (base[3:, 5:], base.T, base[::2], base[:1].expand(4, -1)):
        m = values.shape[-1]
        packed = pack_bits(values, 3)
        assert torch.equal(packed, pack_bits(values.clone(), 3))
        wider = torch.zeros(packed.shape[0], packed.shape[1] + 1, dtype=torch.uint8)
        wider[:, 1:] = packed
        assert torch.equal(unpack_bits(wider[:, 1:], 3, m), values)
        assert torch.equal(unpack_bits(packed.T.contiguous().T, 3, m), values)


def test_masks_take_one_bit_and_eight_bits_are_a_copy():
    mask = torch.rand(4, 21) > 0.5
    assert torch.equal(unpack_bits(pack_bits(mask, 1), 1, 21).bool(), mask)
    values = torch.arange(256, dtype=torch.uint8)
    packed = pack_bits(values, 8)
    assert torch.equal(packed, values)
    assert packed.data_ptr() != values.data_ptr()


def test_shapes_are_known_without_data():
    with torch.device("meta"):
        assert unpack_bits(pack_bits(torch.zeros(3, 11, dtype=torch.uint8), 3, check=False), 3, 11).shape == (
            3,
            11,
        )


def test_bad_values_widths_and_lengths_are_refused():
    with pytest.raises(BadInput, match="bits=5"):
        pack_bits(torch.zeros(3, dtype=torch.uint8), 5)
    with pytest.raises(BadInput, match="values="):
        pack_bits(torch.zeros(3), 4)
    with pytest.raises(BadInput, match=r"0 to 7"):
        pack_bits(torch.tensor([8]), 3)
    with pytest.raises(BadInput, match="values="):
        pack_bits(torch.tensor([-1]), 3)
    with pytest.raises(BadInput, match="packed="):
        unpack_bits(torch.zeros(3), 4)
    with pytest.raises(BadInput, match="length="):
        unpack_bits(torch.zeros(3, dtype=torch.uint8), 4, 3)
