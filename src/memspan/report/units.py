"""Numbers as people read them: bytes in binary units, and no more digits than help."""

from __future__ import annotations

import math

__all__ = ["binary_unit", "human_bytes", "number"]

_UNITS = (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("B", 1))


def binary_unit(largest: float) -> tuple[str, int]:
    """The unit in which a set of byte counts up to ``largest`` reads best, and its size.

    Example:
        >>> binary_unit(3 * 2**20), binary_unit(900)
        (('MiB', 1048576), ('B', 1))
    """
    for name, size in _UNITS:
        if abs(largest) >= size:
            return name, size
    return "B", 1


def human_bytes(count: float) -> str:
    """A byte count with three or four significant digits and a binary unit.

    Example:
        >>> human_bytes(0), human_bytes(1536), human_bytes(1205862), human_bytes(-2 * 2**30)
        ('0 B', '1.50 KiB', '1.15 MiB', '-2.00 GiB')
    """
    unit, size = binary_unit(count)
    value = count / size
    if unit == "B":
        return f"{value:.0f} B" if value == round(value) else f"{value:.1f} B"
    digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:,.{digits}f} {unit}"


def number(value: float | None, digits: int = 4) -> str:
    """A value with ``digits`` significant digits, thousands apart; a dash where there is none.

    Example:
        >>> number(0.123456), number(1234567.0), number(-0.5), number(None), number(0.0)
        ('0.1235', '1,234,567', '-0.5', '–', '0')
    """
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value == round(value) and abs(value) < 1e15:
        return f"{value:,.0f}"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}" if abs(value) < 1e15 else f"{value:.{digits - 1}e}"
    return f"{value:.{digits}g}"
