"""Small integers packed into bytes: 1, 2, 3, 4 or 8 bits each, with nothing lost between them.

The last axis is one bit stream: value ``i`` lies in bits ``i * bits`` to ``(i + 1) * bits - 1``, low end
first, and each row is padded to whole bytes. So 3-bit values take 3.0 bits (eight in three bytes), not the
3.2 of ten in an int32. Values are spread and gathered a machine word at a time: a shift, an or and a mask
move 2 to 8 of them.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from memspan.base import refuse

__all__ = ["WIDTHS", "pack_bits", "packed_length", "unpack_bits"]

#: The widths that can be packed.
WIDTHS = (1, 2, 3, 4, 8)

# For each width: values a word, bytes a packed group, the word, and the (shift, mask) steps that spread a
# group over the bytes of a word.
_STEPS: dict[int, tuple[int, int, torch.dtype, tuple[tuple[int, int], ...]]] = {
    1: (8, 1, torch.int64, ((28, 0x0000000F0000000F), (14, 0x0003000300030003), (7, 0x0101010101010101))),
    2: (4, 1, torch.int32, ((12, 0x000F000F), (6, 0x03030303))),
    3: (8, 3, torch.int64, ((20, 0x00000FFF00000FFF), (10, 0x003F003F003F003F), (5, 0x0707070707070707))),
    4: (2, 1, torch.int16, ((4, 0x0F0F),)),
}


def packed_length(length: int, bits: int) -> int:
    """Bytes that ``length`` values of ``bits`` bits take: ⌈length · bits / 8⌉.

    Example:
        >>> packed_length(11, 3)
        5
    """
    _check(bits)
    return -(-length * bits // 8)


def pack_bits(values: Tensor, bits: int, *, check: bool = True) -> Tensor:
    """Pack small integers along the last axis.

    Args:
        values: (..., m) bool or any integer dtype, each from 0 to 2^bits - 1.
        bits: 1, 2, 3, 4 or 8.
        check: look for values out of range (a pass over them, and a wait for the device). Without it their
            high bits are cut off.

    Returns:
        (..., ⌈m · bits / 8⌉) uint8; bits after the last value are 0.

    Raises:
        BadInput: another width, floating values, no axis, or a value out of range.

    Example:
        >>> pack_bits(torch.tensor([1, 2, 3]), 4).tolist()
        [33, 3]
    """
    _check(bits)
    if values.is_floating_point() or values.is_complex() or values.ndim == 0:
        refuse("values", values.dtype if values.ndim else values, "give integers or bools along a last axis")
    if check and values.dtype != torch.bool and not (values.dtype == torch.uint8 and bits == 8):
        low, high = (int(v) for v in values.aminmax()) if values.numel() else (0, 0)
        if low < 0 or high >= 1 << bits:
            refuse("values", (low, high), f"{bits} bits hold 0 to {(1 << bits) - 1}")
    small = values.to(torch.uint8)
    if bits == 8:
        return small.clone() if small is values else small
    count, group, word, steps = _STEPS[bits]
    m = small.shape[-1]
    if small.numel() == 0:  # views of another item size are refused there
        return small.new_empty(*small.shape[:-1], packed_length(m, bits))
    padded = small.new_zeros(*small.shape[:-1], -(-m // count) * count)
    padded[..., :m] = small & ((1 << bits) - 1)
    words = padded.view(word)
    for place in reversed(range(len(steps))):
        mask = steps[place - 1][1] if place else (1 << 8 * group) - 1
        words = (words | (words >> steps[place][0])) & mask
    lead = small.shape[:-1]
    whole = (
        words.view(torch.uint8)
        .reshape(*lead, -(-m // count), count)[..., :group]
        .reshape(*lead, -(-m // count) * group)
    )
    return whole[..., : packed_length(m, bits)].contiguous()


def unpack_bits(packed: Tensor, bits: int, length: int | None = None) -> Tensor:
    """The exact inverse of :func:`pack_bits`.

    Args:
        packed: (..., bytes) uint8.
        bits: 1, 2, 3, 4 or 8.
        length: values in a row; None takes all that the bytes hold, padding included.

    Returns:
        (..., length) uint8.

    Raises:
        BadInput: another width or dtype, or a length that does not take these bytes.

    Example:
        >>> unpack_bits(torch.tensor([33, 3], dtype=torch.uint8), 4, 3).tolist()
        [1, 2, 3]
    """
    _check(bits)
    if packed.dtype != torch.uint8 or packed.ndim == 0:
        refuse("packed", packed.dtype, "give uint8 along a last axis, as pack_bits makes it")
    held = packed.shape[-1]
    m = held * 8 // bits if length is None else length
    if length is not None and packed_length(length, bits) != held:
        refuse("length", length, f"{held} bytes of {bits}-bit values hold another number of them")
    if bits == 8:
        return packed
    _, group, word, steps = _STEPS[bits]
    if packed.numel() == 0:
        return packed.new_empty(*packed.shape[:-1], m)
    if group == 1:
        words = packed.contiguous().to(word)
    else:
        if held % group:
            packed = torch.nn.functional.pad(packed, (0, -held % group))
        parts = packed.contiguous().view(*packed.shape[:-1], -(-held // group), group).unbind(-1)
        words = parts[0].to(word)
        for place, part in enumerate(parts[1:], start=1):
            words = words | (part.to(word) << 8 * place)
    for shift, mask in steps:
        words = (words | (words << shift)) & mask
    return words.view(torch.uint8)[..., :m]


def _check(bits: int) -> None:
    if bits not in WIDTHS:
        refuse("bits", bits, f"use {', '.join(map(str, WIDTHS[:-1]))} or {WIDTHS[-1]}")
    if sys.byteorder != "little":
        refuse("byteorder", sys.byteorder, "words are spread on little-endian machines alone")
