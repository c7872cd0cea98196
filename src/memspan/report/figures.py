"""Figures that carry data, not pixels: the same figure becomes a picture, a table and a line of text.

A recipe builds these; :mod:`memspan.report.page` draws them (matplotlib, extra ``recipes``) as inline SVG
whose colours are CSS variables, so that one file follows a light and a dark screen, and prints the numbers
below. Colours are told apart by people with colour vision deficiencies, and are never the only sign: lines
differ in marker and dash, areas carry their name.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from memspan.base import refuse
from memspan.report.units import human_bytes, number

__all__ = ["Bars", "Figure", "Icicle", "Images", "Lines", "Series", "StackedArea", "Table", "png"]

Scale = Literal["linear", "log"]


@dataclass(frozen=True)
class Table:
    """The numbers of a figure: column names and rows of text."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Series:
    """One curve, with an optional interval around it.

    Attributes:
        x: shape (n,), finite; need not be sorted.
        y: shape (n,), finite.
        low: lower ends, shape (n,), or None.
        high: upper ends, shape (n,), or None.

    Example:
        >>> Series([2, 1], [0.5, 0.4], low=[0.4, 0.3], high=[0.6, 0.5]).x
        (1.0, 2.0)
    """

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None

    def __post_init__(self) -> None:
        columns = {name: getattr(self, name) for name in ("x", "y", "low", "high")}
        if (self.low is None) != (self.high is None):
            refuse("low, high", (self.low, self.high), "give both ends of the interval, or neither")
        order = np.argsort(np.asarray(self.x, dtype=float), kind="stable")
        for name, values in columns.items():
            if values is None:
                continue
            vector = np.asarray(values, dtype=float)
            finite = np.isfinite(vector) if name in "xy" else ~np.isnan(vector)
            if vector.shape != (len(self.x),) or not vector.size or not finite.all():
                refuse(name, values, f"give {len(self.x)} finite numbers, one for each x, and at least one")
            object.__setattr__(self, name, tuple(vector[order].tolist()))


@dataclass(frozen=True)
class Lines:
    """Curves over a common axis: a frontier, accuracy after each task, loss over steps.

    Attributes:
        title: says what is to be seen.
        x_label: of the horizontal axis, without unit where ``x_unit`` is bytes.
        y_label: of the vertical axis.
        series: name -> curve; a series of one point is a marker alone.
        x_scale: ``"linear"`` or ``"log"``.
        x_unit: ``"bytes"`` writes the axis in binary units.
        y_unit: likewise.
        note: one sentence under the figure.

    Example:
        >>> Lines("Accuracy", "budget", "%", {"ours": Series([1, 2], [3, 4])}).table().rows
        (('ours', '1', '3'), ('ours', '2', '4'))
    """

    title: str
    x_label: str
    y_label: str
    series: Mapping[str, Series]
    x_scale: Scale = "linear"
    x_unit: Literal["", "bytes"] = ""
    y_unit: Literal["", "bytes"] = ""
    note: str = ""

    def __post_init__(self) -> None:
        if not self.series:
            refuse("series", self.series, "give one curve or more")
        if self.x_scale not in ("linear", "log"):
            refuse("x_scale", self.x_scale, 'use "linear" or "log"')
        if self.x_scale == "log" and any(min(one.x) <= 0 for one in self.series.values()):
            refuse("x_scale", self.x_scale, "a logarithmic axis needs x above 0; use linear")

    @property
    def names(self) -> tuple[str, ...]:
        """The series, in the order of the legend."""
        return tuple(self.series)

    def table(self) -> Table:
        """Every point as a row."""
        spread = any(one.low is not None for one in self.series.values())
        show_x = human_bytes if self.x_unit == "bytes" else number
        show_y = human_bytes if self.y_unit == "bytes" else number
        rows = []
        for name, one in self.series.items():
            for i, (x, y) in enumerate(zip(one.x, one.y, strict=True)):
                ends = (show_y(one.low[i]), show_y(one.high[i])) if one.low and one.high else ("–", "–")
                rows.append((name, show_x(x), show_y(y), *(ends if spread else ())))
        return Table(
            ("series", self.x_label, self.y_label, *(("low", "high") if spread else ())), tuple(rows)
        )


@dataclass(frozen=True)
class Bars:
    """Stacked horizontal bars: what each method holds, by category.

    Attributes:
        title: says what is to be seen.
        unit: ``"bytes"`` (written in MiB, KiB, ...), or the unit of the values.
        rows: method -> category -> value of 0 or more.
        note: one sentence under the figure.

    Example:
        >>> Bars("Bytes", "bytes", {"MEMO": {"parameters": 1024, "replay": 512}}).table().rows
        (('MEMO', '1.00 KiB', '512 B', '1.50 KiB'),)
    """

    title: str
    unit: str
    rows: Mapping[str, Mapping[str, float]]
    note: str = ""

    def __post_init__(self) -> None:
        if not self.rows:
            refuse("rows", self.rows, "give one bar or more")
        for method, parts in self.rows.items():
            if any(not 0 <= value < math.inf for value in parts.values()):
                refuse("rows", {method: parts}, "stacked values are finite and 0 or more")

    @property
    def names(self) -> tuple[str, ...]:
        """The categories, in the order of first appearance."""
        return tuple(dict.fromkeys(name for parts in self.rows.values() for name, n in parts.items() if n))

    def show(self, value: float) -> str:
        """A value with its unit."""
        return human_bytes(value) if self.unit == "bytes" else f"{number(value)} {self.unit}".strip()

    def table(self) -> Table:
        """One row a bar, with its total."""
        rows = tuple(
            (method, *(self.show(parts[name]) if name in parts else "–" for name in self.names),
             self.show(sum(parts.values())))
            for method, parts in self.rows.items()
        )  # fmt: skip
        return Table(("", *self.names, "total"), rows)


@dataclass(frozen=True)
class StackedArea:
    """What is held over time, by category.

    Attributes:
        title: says what is to be seen.
        x: the moments, shape (n,), rising.
        bands: category -> values at the moments, shape (n,), 0 or more.
        x_label: of the horizontal axis.
        unit: ``"bytes"`` or the unit of the values.
        marks: moments with a name (phases, marks of the user).
        note: one sentence under the figure.

    Example:
        >>> area = StackedArea("Held", [0, 1, 2], {"inputs": [8, 8, 0], "gradients": [0, 4, 4]})
        >>> area.peak
        (1.0, 12.0)
    """

    title: str
    x: Sequence[float]
    bands: Mapping[str, Sequence[float]]
    x_label: str = "allocations and releases"
    unit: str = "bytes"
    marks: Sequence[tuple[float, str]] = ()
    note: str = ""

    def __post_init__(self) -> None:
        if not len(self.x) or not self.bands:
            refuse("bands", self.bands, "give one moment and one band or more")
        for name, values in self.bands.items():
            vector = np.asarray(values, dtype=float)
            if vector.shape != (len(self.x),) or not np.isfinite(vector).all():
                refuse("bands", name, f"give {len(self.x)} finite values, one for each moment")

    @property
    def names(self) -> tuple[str, ...]:
        """The categories that ever hold something, from the ground up."""
        return tuple(name for name, values in self.bands.items() if any(values))

    @property
    def peak(self) -> tuple[float, float]:
        """The first moment of the largest total, and that total."""
        totals = np.sum([np.asarray(values, dtype=float) for values in self.bands.values()], axis=0)
        at = int(totals.argmax())
        return float(self.x[at]), float(totals[at])

    def table(self) -> Table:
        """Each category at the peak, and its own largest value."""
        at = list(self.x).index(self.peak[0])
        show = human_bytes if self.unit == "bytes" else number
        rows = [(name, show(self.bands[name][at]), show(max(self.bands[name]))) for name in self.names]
        return Table(("category", "at the peak", "own maximum"), (*rows, ("total", show(self.peak[1]), "")))


@dataclass(frozen=True)
class Icicle:
    """A flame graph hanging down: parts inside parts, width by value.

    Attributes:
        title: says what is to be seen.
        parts: dotted name (``"blocks.3.mlp"``) -> value held by that part itself, without its children.
        unit: ``"bytes"`` or the unit of the values.
        depth: levels drawn.
        root: what the top bar is called.
        note: one sentence under the figure.

    Example:
        >>> Icicle("At the peak", {"a.b": 3, "a.c": 1, "d": 4}).table().rows[:2]
        (('a', '4 B', '50.0 %'), ('a.b', '3 B', '37.5 %'))
    """

    title: str
    parts: Mapping[str, float]
    unit: str = "bytes"
    depth: int = 4
    root: str = "all"
    note: str = ""

    def __post_init__(self) -> None:
        if not self.parts or any(not 0 <= value < math.inf for value in self.parts.values()):
            refuse("parts", dict(self.parts), "give finite values of 0 or more, at least one")
        if self.depth < 1:
            refuse("depth", self.depth, "draw 1 level or more")

    @property
    def names(self) -> tuple[str, ...]:
        """The top-level parts, largest first."""
        return tuple(name for name, _ in self.children(""))

    def children(self, prefix: str) -> list[tuple[str, float]]:
        """Full names and values of the parts directly under a name, largest first.

        What a part holds itself beside its children is not a child and leaves a gap.
        """
        sums: dict[str, float] = {}
        start = f"{prefix}." if prefix else ""
        for name, value in self.parts.items():
            if name.startswith(start) and name != prefix and value:
                head = start + name[len(start) :].split(".")[0]
                sums[head] = sums.get(head, 0.0) + value
        return sorted(sums.items(), key=lambda item: (-item[1], item[0]))

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return float(sum(self.parts.values()))

    def show(self, value: float) -> str:
        """A value with its unit."""
        return human_bytes(value) if self.unit == "bytes" else f"{number(value)} {self.unit}".strip()

    def table(self) -> Table:
        """The parts to two levels, with their share."""
        total = self.total or 1.0
        rows = []
        for name, value in self.children(""):
            rows.append((name or "(no module)", self.show(value), f"{value / total:.1%}".replace("%", " %")))
            for child, held in self.children(name) if name else ():
                rows.append((child, self.show(held), f"{held / total:.1%}".replace("%", " %")))
        return Table(("part", "held", "share"), tuple(rows[:200]))


@dataclass(frozen=True)
class Images:
    """Rows of small pictures: training images beside what a model gives, masks over frames.

    Attributes:
        title: says what is to be seen.
        rows: row label -> pictures, each (H, W) or (H, W, 3), uint8, or float in [0, 1].
        captions: row label -> one text for each picture; may leave rows out.
        note: one sentence under the figure.

    Example:
        >>> Images("Pairs", {"data": [np.zeros((2, 2), np.uint8)]}).table().rows
        (('data', '1'),)
    """

    title: str
    rows: Mapping[str, Sequence[ArrayLike]]
    captions: Mapping[str, Sequence[str]] = field(default_factory=dict)
    note: str = ""

    def __post_init__(self) -> None:
        if not self.rows or not any(len(row) for row in self.rows.values()):
            refuse("rows", self.rows, "give one picture or more")
        for name, texts in self.captions.items():
            if name not in self.rows or len(texts) != len(self.rows[name]):
                refuse("captions", {name: texts}, "give one text for each picture of a row of that name")

    @property
    def names(self) -> tuple[str, ...]:
        """No colours are needed."""
        return ()

    def encoded(self) -> list[tuple[str, list[tuple[str, str]]]]:
        """Each row's label with (data URI, caption) of its pictures."""
        result = []
        for name, pictures in self.rows.items():
            texts = self.captions.get(name, [""] * len(pictures))
            uris = ["data:image/png;base64," + base64.b64encode(png(one)).decode() for one in pictures]
            result.append((name, list(zip(uris, texts, strict=True))))
        return result

    def table(self) -> Table:
        """How many pictures each row has, and what they are called."""
        if not self.captions:
            return Table(("row", "pictures"), tuple((name, str(len(row))) for name, row in self.rows.items()))
        rows = (
            (name, str(len(row)), "; ".join(self.captions.get(name, ()))) for name, row in self.rows.items()
        )
        return Table(("row", "pictures", "captions"), tuple(rows))


Figure: TypeAlias = Lines | Bars | StackedArea | Icicle | Images


def png(picture: ArrayLike) -> bytes:
    r"""Encode a picture as PNG.

    Args:
        picture: (H, W) grey, (H, W, 1), or (H, W, 3) RGB; uint8, or float, clipped to [0, 1].

    Raises:
        BadInput: another shape, or empty.

    Example:
        >>> png(np.zeros((2, 3), np.uint8))[:4]
        b'\x89PNG'
    """
    array: NDArray[Any] = np.asarray(picture)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3) or not array.size:
        refuse("picture", array.shape, "give (H, W) or (H, W, 3), uint8, or float in [0, 1]")
    if array.dtype != np.uint8:
        array = np.nan_to_num(np.clip(array.astype(np.float64), 0, 1) * 255).round().astype(np.uint8)
    height, width = array.shape[:2]
    kind = 0 if array.ndim == 2 else 2
    lines = np.zeros((height, 1 + array[0].size), np.uint8)  # each line starts with its filter: 0, none
    lines[:, 1:] = array.reshape(height, -1)

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    body = zlib.compress(lines.tobytes(), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
