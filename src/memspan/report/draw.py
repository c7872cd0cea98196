"""Figures drawn as inline SVG, twice: for a wide screen and for a phone.

matplotlib draws with marker colours ("sentinels") that stand for roles; afterwards each becomes a CSS
variable, so that the page decides the colours, light or dark. Text stays text. Names are unique in the page,
and one figure gives the same bytes every time.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from html import escape
from importlib import resources
from typing import Any, NamedTuple
from xml.etree import ElementTree as xml

import numpy as np

from memspan.base import optional
from memspan.report.figures import Bars, Figure, Icicle, Lines, StackedArea
from memspan.report.units import binary_unit, human_bytes, number

__all__ = ["COLOURS", "Drawing", "Key", "draw", "slots", "standalone"]

COLOURS = 8  # of the palette; templates/style.css has them for both themes
_DASHES = ("", "7 3", "2 2.4", "9 3 2 3", "4 2", "1 2", "12 3", "6 2 1 2 1 2")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
_WIDE, _NARROW = 780, 360  # units of the drawing; about the pixels it is shown at, so text keeps its size
_TEXT = 12.5
_ROLES = {"ink": "#0a0001", "muted": "#0a0002", "grid": "#0a0003", "surface": "#0a0004", "axis": "#0a0005"}

# Where the ledger's categories sit in the palette, so that a category keeps its colour from page to page.
_CATEGORIES = {
    "parameters": 0, "buffers": 6, "gradients": 1, "optimizer_state": 7, "saved_activations": 2, "inputs": 5,
    "temporaries": 4, "communication": 6, "replay": 3, "memory_bank": 3, "store": 5, "unattributed": 6,
    "backbone": 0, "specialised": 7, "head": 5, "exemplars": 3,
}  # fmt: skip
_PALER = (1.0, 0.66, 0.42, 0.28)


class Key(NamedTuple):
    """How a name is shown in the legend: palette place, opacity, dash and marker ('' for areas)."""

    name: str
    colour: int
    opacity: float
    dash: str
    marker: str


class Drawing(NamedTuple):
    """SVG text for wide and narrow screens, and the legend. ``missing`` says why there is no picture."""

    wide: str
    narrow: str
    legend: tuple[Key, ...]
    missing: str = ""


def slots(figures: Sequence[Figure]) -> dict[str, Key]:
    """Give every name on a page one colour, marker and dash, the same in all its figures.

    Example:
        >>> from memspan.report.figures import Series
        >>> keys = slots([Lines("t", "x", "y", {"A": Series([1], [1]), "B": Series([1], [2])})])
        >>> keys["A"].colour, keys["B"].colour, keys["A"].marker != keys["B"].marker
        (0, 1, True)
    """
    keys: dict[str, Key] = {}
    lines = dict.fromkeys(name for one in figures if isinstance(one, Lines) for name in one.names)
    for place, name in enumerate(lines):
        turn = place // COLOURS
        marker = _MARKERS[(place + turn * 3) % len(_MARKERS)]
        keys[name] = Key(name, place % COLOURS, 1.0, _DASHES[(place + turn) % len(_DASHES)], marker)
    areas = dict.fromkeys(
        name for one in figures if isinstance(one, Bars | StackedArea) for name in one.names
    )
    used: dict[int, int] = {}
    free = (0, 1, 2, 3, 4, 5, 7, 6)  # grey last
    taken = {_CATEGORIES[name.split(".")[0]] for name in areas if name.split(".")[0] in _CATEGORIES}
    given: dict[str, int] = {}
    for name in areas:
        head = name.split(".")[0]
        if head not in given:
            open_ = [place for place in free if place not in taken] or list(free)
            given[head] = _CATEGORIES.get(head, open_[0])
            taken.add(given[head])
        colour = given[head]
        shade = used.get(colour, 0)
        used[colour] = shade + 1
        keys[f"area:{name}"] = Key(name, colour, _PALER[shade % len(_PALER)], "", "")
    parts = dict.fromkeys(name for one in figures if isinstance(one, Icicle) for name in one.names)
    for place, name in enumerate(parts):
        keys[f"part:{name}"] = Key(name, place % COLOURS, 1.0, "", "")
    return keys


def draw(figure: Figure, keys: Mapping[str, Key], name: str) -> Drawing:
    """Draw a figure.

    Args:
        figure: any but :class:`~memspan.report.figures.Images`, which needs no drawing.
        keys: from :func:`slots`, over all figures of the page.
        name: unique in the page; letters, digits and dashes.

    Returns:
        The drawing; without matplotlib, the reason in ``missing``.
    """
    prefix = {Lines: "", Bars: "area:", StackedArea: "area:", Icicle: "part:"}[type(figure)]  # type: ignore[index]
    legend = tuple(keys[prefix + one] for one in figure.names[:COLOURS])
    if not isinstance(figure, Icicle):
        legend = tuple(keys[prefix + one] for one in figure.names)
    try:
        optional("matplotlib", extra="recipes")
    except ImportError as error:
        return Drawing("", "", legend, str(error))
    return Drawing(_svg(figure, keys, f"{name}w", _WIDE), _svg(figure, keys, f"{name}n", _NARROW), legend)


def standalone(figure: Figure) -> str:
    """A figure with its title and legend as one SVG file that follows light and dark by itself.

    Args:
        figure: any but pictures (:class:`~memspan.report.figures.Images`).

    Raises:
        ImportError: matplotlib is not installed.

    Example:
        >>> from memspan.report.figures import Lines, Series
        >>> standalone(Lines("Accuracy", "budget", "%", {"ours": Series([1, 2], [3, 4])}))[:4]
        '<svg'
    """
    drawing = draw(figure, slots([figure]), "figure")
    if drawing.missing:
        raise ImportError(drawing.missing)
    inner = xml.fromstring(drawing.wide)  # noqa: S314  (matplotlib's own output)
    _, _, width, height = (float(number) for number in (inner.get("viewBox") or "").split())
    style = resources.files("memspan.report").joinpath("templates/style.css").read_text("utf-8")
    theme = style[: style.index("*, *::before")]
    place, row, legend = 24.0, 66.0, []
    for key in drawing.legend:
        step = 54 + 7.2 * len(key.name)
        if place + step > width - 16:
            place, row = 24.0, row + 24
        colour = f"var(--s{key.colour})"
        sample = (
            f'<line x1="{place:g}" y1="{row - 5:g}" x2="{place + 28:g}" y2="{row - 5:g}" stroke="{colour}" '
            f'stroke-width="2.5" stroke-dasharray="{key.dash or "none"}"/>'
            if key.marker
            else f'<rect x="{place + 14:g}" y="{row - 11:g}" width="13" height="13" rx="2" fill="{colour}" '
            f'fill-opacity="{key.opacity:g}"/>'
        )
        legend.append(
            f'{sample}<text x="{place + 34:g}" y="{row:g}" font-size="14" '
            f'fill="var(--ink)">{escape(key.name)}</text>'
        )
        place += step
    top = row + 14
    inner.set("x", "14")
    inner.set("y", f"{top:g}")
    inner.set("width", f"{width:g}")
    inner.set("height", f"{height:g}")
    whole, wide = top + height + 12, width + 24
    title = escape(figure.title)
    return (
        f'<svg xmlns="{_SVG}" viewBox="0 0 {wide:g} {whole:g}" width="{wide:g}" height="{whole:g}" '
        f'font-family="sans-serif"><style>{theme}</style>'
        f'<rect width="100%" height="100%" rx="8" fill="var(--surface)"/>'
        f'<text x="24" y="34" font-size="17" font-weight="600" fill="var(--ink)">{title}</text>'
        f"{''.join(legend)}{xml.tostring(inner, encoding='unicode')}</svg>\n"
    )


def _svg(figure: Figure, keys: Mapping[str, Key], name: str, width: int) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Canvas
    from matplotlib.text import Text

    settings = {
        "svg.fonttype": "none", "svg.hashsalt": "memspan", "text.parse_math": False, "font.size": _TEXT,
        "font.family": ["DejaVu Sans"], "axes.unicode_minus": True, "path.simplify": False,
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        canvas = Canvas(dpi=72)
        FigureCanvasSVG(canvas)
        if isinstance(figure, Lines):
            height = _lines(canvas, figure, keys, width)
        elif isinstance(figure, StackedArea):
            height = _area(canvas, figure, keys, width)
        elif isinstance(figure, Bars):
            height = _bars(canvas, figure, keys, width)
        else:
            assert isinstance(figure, Icicle)
            height = _icicle(canvas, figure, keys, width)
        out = io.BytesIO()
        for text in canvas.findobj(Text):
            text.set_text(_printable(text.get_text()))
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # glyphs that one font lacks; the browser has others
            canvas.savefig(out, format="svg", transparent=True, metadata=nothing)
    return _adapt(out.getvalue(), name, figure, width, height)


# Kinds of figure -------------------------------------------------------------------------------------------


def _lines(canvas: Any, figure: Lines, keys: Mapping[str, Key], width: int) -> float:
    wide = width > 500
    height = 400 if wide else 300
    every_x = [x for one in figure.series.values() for x in one.x]
    every_y = [y for one in figure.series.values() for y in (*one.y, *(one.low or ()), *(one.high or ()))]
    every_y = [y for y in every_y if math.isfinite(y)]
    x_name, x_size = binary_unit(max(every_x)) if figure.x_unit == "bytes" else ("", 1)
    y_name, y_size = binary_unit(max(every_y)) if figure.y_unit == "bytes" else ("", 1)
    axes = _axes(canvas, width, height, _tick_width(min(every_y) / y_size, max(every_y) / y_size))
    for place, (name, one) in enumerate(figure.series.items()):
        key = keys[name]
        colour = _series(key.colour)
        x, y = np.asarray(one.x) / x_size, np.asarray(one.y) / y_size
        floor = axes.transData  # drawn in data units; the order of drawing is the order of the legend
        if one.low is not None and one.high is not None and len(x) > 1:
            low, high = np.asarray(one.low) / y_size, np.asarray(one.high) / y_size
            axes.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0, zorder=2)
        elif one.low is not None and one.high is not None:
            ends = [one.low[0] / y_size, one.high[0] / y_size]
            axes.plot([x[0], x[0]], ends, color=colour, linewidth=1.6, alpha=0.6, zorder=2)
        marks = len(x) <= 24
        axes.plot(
            x, y, color=colour, linewidth=2.1, zorder=3 + place, transform=floor, solid_capstyle="round",
            dashes=[float(n) / 2.1 for n in key.dash.split()] or (None, None),
            marker=key.marker if marks else None, markersize=7.5, markeredgecolor=_ROLES["surface"],
            markeredgewidth=1.4,
        )  # fmt: skip
    if figure.x_scale == "log":
        _log_axis(axes, [x / x_size for x in every_x])
    else:
        _ticks(axes.xaxis, 7 if wide else 4)
    _ticks(axes.yaxis, 6)
    least, most = min(every_y) / y_size, max(every_y) / y_size
    pad = (most - least) * 0.07 or abs(most) * 0.1 or 1
    # An axis that nearly reaches zero starts there.
    bottom = 0.0 if 0 <= least < 0.35 * most else least - pad
    axes.set_ylim(bottom, most + pad)
    _axis_names(axes, width, height, _named(figure.x_label, x_name), _named(figure.y_label, y_name))
    return height


def _area(canvas: Any, figure: StackedArea, keys: Mapping[str, Key], width: int) -> float:
    wide = width > 500
    height = 420 if wide else 330
    at, peak = figure.peak
    unit, size = binary_unit(peak) if figure.unit == "bytes" else (figure.unit, 1)
    axes = _axes(canvas, width, height, _tick_width(0, peak / size), top=66)
    x = np.asarray(figure.x, dtype=float)
    base = np.zeros(len(x))
    top = peak * 1.06 / size if peak else 1.0
    span = float(x[-1] - x[0]) or 1.0
    inner = width - 90
    for name in figure.names:
        key = keys[f"area:{name}"]
        band = np.asarray(figure.bands[name], dtype=float) / size
        step = "post" if len(x) > 1 else None
        axes.fill_between(
            x, base, base + band, step=step, color=_series(key.colour), alpha=key.opacity,
            edgecolor=_ROLES["surface"], linewidth=0.7, zorder=2,
        )  # fmt: skip
        _name_band(axes, name, x, base, band, top, span, inner, height - 110, key)
        base += band
    axes.set_xlim(x[0], x[-1] if len(x) > 1 else x[0] + 1)
    axes.set_ylim(0, top)
    totals = base
    axes.plot(x, totals, color=_ROLES["ink"], linewidth=1.0, drawstyle="steps-post", zorder=4)
    right = (at - x[0]) / span > 0.6
    axes.plot([at], [peak / size], marker="o", markersize=6, color=_ROLES["ink"], zorder=6, clip_on=False,
              markeredgecolor=_ROLES["surface"], markeredgewidth=1.4)  # fmt: skip
    shown = human_bytes(peak) if figure.unit == "bytes" else f"{number(peak)} {figure.unit}"
    axes.annotate(
        f"peak {shown}", (at, peak / size), (-8 if right else 8, 7), textcoords="offset points",
        ha="right" if right else "left", va="bottom", color=_ROLES["ink"], fontweight="bold",
        annotation_clip=False,
    )  # fmt: skip
    last = -1e9
    for moment, label in figure.marks:
        place = (moment - x[0]) / span * inner
        axes.axvline(moment, color=_ROLES["muted"], linewidth=0.8, dashes=(2, 3), zorder=5)
        short = _fit(label, 90, _TEXT - 1.5)
        if place - last > 7.2 * len(short) + 10 and place + 6.5 * len(short) < inner + 6:
            axes.annotate(
                short, (moment, 1), (3, 22), xycoords=("data", "axes fraction"), textcoords="offset points",
                color=_ROLES["muted"], fontsize=_TEXT - 1.5, va="bottom", annotation_clip=False,
            )  # fmt: skip
            last = place
    _ticks(axes.xaxis, 6 if wide else 4)
    _ticks(axes.yaxis, 5)
    _axis_names(axes, width, height, figure.x_label, _named("held", unit))
    return height


def _name_band(
    axes: Any,
    name: str,
    x: Any,
    base: Any,
    band: Any,
    top: float,
    span: float,
    inner: float,
    tall: float,
    key: Key,
) -> None:
    """Write a category into its area, where the area is tall and long enough to hold it."""
    label = name.split(".")[-1] if name.startswith("temporaries") else name
    label = label.replace("_", " ").replace(".", ", ")
    need_x = (len(label) * _TEXT * 0.6 + 12) / inner * span
    need_y = (_TEXT + 5) / tall * top
    best, place = 0.0, None
    for start in range(len(x)):
        stop = int(np.searchsorted(x, x[start] + need_x))
        if stop >= len(x):
            break
        # the label stays level: the area must be free between the highest floor and the lowest ceiling
        floor, ceiling = base[start : stop + 1].max(), (base + band)[start : stop + 1].min()
        if ceiling - floor > max(best, need_y):
            best, place = ceiling - floor, (x[start] + need_x / 2, (floor + ceiling) / 2)
    if place:
        axes.text(*place, label, ha="center", va="center", fontsize=_TEXT, color=_on(key), zorder=7)


def _bars(canvas: Any, figure: Bars, keys: Mapping[str, Key], width: int) -> float:
    row, thick = 54, 24
    height = row * len(figure.rows) + 4
    axes = _plane(canvas, width, height)
    largest = max((sum(parts.values()) for parts in figure.rows.values()), default=0) or 1
    for place, (method, parts) in enumerate(figure.rows.items()):
        top = place * row
        total = figure.show(sum(parts.values()))
        room = width - 7.6 * len(total) - 16
        axes.text(
            0, top + 15, _fit(method, room, _TEXT), va="baseline", color=_ROLES["ink"], fontweight="bold"
        )
        axes.text(width, top + 15, total, va="baseline", ha="right", color=_ROLES["ink"])
        left = 0.0
        for name, value in parts.items():
            if not value:
                continue
            key = keys[f"area:{name}"]
            long = width * value / largest
            _box(axes, left, top + 22, max(long - (1.5 if long > 4 else 0), 0.6), thick, key)
            for label in (f"{_short(name)} {figure.show(value)}", figure.show(value), _short(name)):
                if len(label) * _TEXT * 0.6 + 10 < long:
                    axes.text(
                        left + 7, top + 22 + thick / 2 + 0.5, label, va="center_baseline",
                        fontsize=_TEXT - 0.5, color=_on(key),
                    )  # fmt: skip
                    break
            left += long
    return height


def _icicle(canvas: Any, figure: Icicle, keys: Mapping[str, Key], width: int) -> float:
    thick, gap = 30, 2
    levels = 1 + min(figure.depth, _depth(figure, "", figure.depth))
    height = levels * (thick + gap)
    axes = _plane(canvas, width, height)
    total = figure.total or 1.0
    root = Key(figure.root, 6, 0.22, "", "")
    _box(axes, 0, 0, width, thick, root)
    label = f"{figure.root}  {figure.show(figure.total)}"
    axes.text(9, thick / 2 + 0.5, _fit(label, width - 16, _TEXT), va="center_baseline", color=_ROLES["ink"],
              fontweight="bold")  # fmt: skip

    def place(prefix: str, left: float, level: int, key: Key | None) -> None:
        for name, value in figure.children(prefix):
            long = width * value / total
            own = key or keys[f"part:{name}"]
            if long >= 1.5:
                shade = own._replace(opacity=max(0.9 - 0.2 * (level - 1), 0.3))
                top = level * (thick + gap)
                _box(axes, left, top, max(long - 1.5, 0.6), thick, shade)
                tail = name.split(".")[-1] or "(no module)"
                for text in (f"{tail}  {figure.show(value)}", tail):
                    if len(text) * _TEXT * 0.6 + 14 < long:
                        axes.text(
                            left + 8, top + thick / 2 + 0.5, text, va="center_baseline", color=_on(shade),
                            fontsize=_TEXT - 0.5,
                        )  # fmt: skip
                        break
                if level < figure.depth and name:
                    place(name, left, level + 1, own)
            left += long

    place("", 0.0, 1, None)
    return height


def _depth(figure: Icicle, prefix: str, most: int) -> int:
    if most == 0:
        return 0
    under = [name for name, _ in figure.children(prefix)] if prefix or most == figure.depth else []
    return 1 + max((_depth(figure, name, most - 1) for name in under if name), default=0) if under else 0


# Parts of figures ------------------------------------------------------------------------------------------


def _plane(canvas: Any, width: float, height: float) -> Any:
    """Axes whose units are the drawing's own, from the top left corner."""
    canvas.set_size_inches(width / 72, height / 72)
    axes = canvas.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.axis("off")
    return axes


def _axes(canvas: Any, width: float, height: float, left: float, top: float = 34) -> Any:
    canvas.set_size_inches(width / 72, height / 72)
    bottom, right = 52, 14
    axes = canvas.add_axes((left / width, bottom / height, (width - left - right) / width,
                            (height - bottom - top) / height))  # fmt: skip
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_ROLES["axis"])
    axes.spines["bottom"].set_linewidth(1)
    axes.grid(axis="y", color=_ROLES["grid"], linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_ROLES["muted"], length=0, pad=7, labelsize=_TEXT)
    axes.tick_params(axis="x", length=4, color=_ROLES["axis"])
    return axes


def _axis_names(axes: Any, width: float, height: float, x: str, y: str) -> None:
    axes.figure.text(0, (height - 13) / height, _fit(y, width, _TEXT), color=_ROLES["muted"], va="center")
    right, low = (width - 14) / width, 10 / height
    axes.figure.text(right, low, _fit(x, width, _TEXT), color=_ROLES["muted"], ha="right", va="center")


def _ticks(axis: Any, most: int) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(most, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))


def _log_axis(axes: Any, values: Sequence[float]) -> None:
    """Powers of two as ticks, thinned to at most seven."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.set_xscale("log", base=2)
    low, high = math.floor(math.log2(min(values))), math.ceil(math.log2(max(values)))
    stride = max(1, -(-(high - low) // 6))
    axes.xaxis.set_major_locator(FixedLocator([2.0**p for p in range(low, high + 1, stride)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    spread = (max(values) / min(values)) ** 0.04 if max(values) > min(values) else 2**0.5
    axes.set_xlim(min(values) / spread, max(values) * spread)


def _tick(value: float) -> str:
    if value and (abs(value) >= 1e6 or abs(value) < 1e-4):
        return f"{value:.2g}"
    return f"{value:,.6g}".replace("-", "−")


def _tick_width(low: float, high: float) -> float:
    longest = max(len(_tick(float(f"{value:.3g}"))) for value in (low, high, (low + high) / 2))
    return min(longest, 8) * _TEXT * 0.66 + 14


def _named(label: str, unit: str) -> str:
    return f"{label} ({unit})" if unit else label


def _box(axes: Any, left: float, top: float, long: float, tall: float, key: Key) -> None:
    from matplotlib.patches import FancyBboxPatch, Rectangle

    style: dict[str, Any] = {"facecolor": _series(key.colour), "alpha": key.opacity, "linewidth": 0}
    if long > 8:
        shape: Any = FancyBboxPatch(
            (left + 3, top + 3), long - 6, tall - 6, boxstyle="round,pad=3,rounding_size=3", **style
        )
    else:
        shape = Rectangle((left, top), long, tall, **style)
    axes.add_patch(shape)


def _fit(text: str, room: float, size: float) -> str:
    """Text cut to a width; the table below the figure has it whole."""
    text = _printable(text)
    most = max(4, int(room / (size * 0.58)))
    return text if len(text) <= most else text[: most - 1] + "…"


def _short(name: str) -> str:
    return name.split(".")[-1].replace("_", " ")


def _on(key: Key) -> str:
    """The role that reads on an area: the page's background on a full colour, ink on a pale one."""
    return _ROLES["surface"] if key.opacity > 0.8 else _ROLES["ink"]


def _series(place: int) -> str:
    return f"#0b00{place:02x}"


# From matplotlib's SVG to ours -----------------------------------------------------------------------------

_SVG = "http://www.w3.org/2000/svg"
_LINK = "http://www.w3.org/1999/xlink"


@cache
def _variables() -> dict[str, str]:
    roles = {colour: f"var(--{role})" for role, colour in _ROLES.items()}
    return roles | {_series(place): f"var(--s{place})" for place in range(COLOURS)}


def _adapt(text: bytes, name: str, figure: Figure, width: float, height: float) -> str:
    xml.register_namespace("", _SVG)
    xml.register_namespace("xlink", _LINK)
    root = xml.fromstring(text)  # noqa: S314  (matplotlib's own output)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}style", f"{{{_SVG}}}metadata"):
                parent.remove(child)
    names = {one.get("id"): f"{name}-{place}" for place, one in enumerate(root.iter()) if one.get("id")}
    referred: set[str] = set()
    for one in root.iter():
        for attribute, value in list(one.attrib.items()):
            for found in re.findall(r"url\(#([^)]+)\)", value):
                referred.add(found)
                value = value.replace(f"url(#{found})", f"url(#{names[found]})")
            if attribute == f"{{{_LINK}}}href":
                referred.add(value[1:])
                del one.attrib[attribute]
                attribute, value = "href", f"#{names[value[1:]]}"
            if attribute == "style":
                value = re.sub(r"#0[ab]00[0-9a-f]{2}", lambda match: _variables()[match[0]], value)
                value = re.sub(r"'DejaVu Sans'[^;]*", "var(--sans)", value)
            if attribute in ("d", "x", "y", "transform", "width", "height"):
                value = re.sub(r"-?\d+\.\d{3,}", lambda match: f"{float(match[0]):.2f}", value)
                value = " ".join(value.split())
            one.set(attribute, value)
    for one in root.iter():
        if one.get("id") in names:
            if one.get("id") in referred:
                one.set("id", names[one.get("id")])
            else:
                del one.attrib["id"]
    for attribute in ("width", "height", "version"):
        root.attrib.pop(attribute, None)
    root.set("viewBox", f"0 0 {width:g} {height:g}")
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-t {name}-d")
    title, told = (
        xml.Element(f"{{{_SVG}}}title", {"id": f"{name}-t"}),
        xml.Element(f"{{{_SVG}}}desc", {"id": f"{name}-d"}),
    )
    title.text, told.text = _printable(figure.title), _printable(_told(figure))
    root.insert(0, told)
    root.insert(0, title)
    return xml.tostring(root, encoding="unicode")


def _told(figure: Figure) -> str:
    """A figure in words."""
    if isinstance(figure, Lines):
        ends = "; ".join(
            f"{name} from {number(one.y[0])} to {number(one.y[-1])}" for name, one in figure.series.items()
        )
        return f"{figure.y_label} against {figure.x_label}. {ends}."
    if isinstance(figure, Bars):
        return (
            "; ".join(f"{name} {figure.show(sum(parts.values()))}" for name, parts in figure.rows.items())
            + "."
        )
    if isinstance(figure, StackedArea):
        return (
            f"Peak {human_bytes(figure.peak[1])} at {number(figure.peak[0])}, from {', '.join(figure.names)}."
        )
    if isinstance(figure, Icicle):
        return (
            "; ".join(f"{name or 'no module'} {figure.show(value)}" for name, value in figure.children(""))
            + "."
        )
    return figure.title


def _printable(text: str) -> str:
    """Text without the characters that XML cannot hold."""
    return re.sub("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "", text).replace("\n", " ")
