"""What a ledger saw, as figures and as a page: bytes over time, and who held them at the peak."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from memspan.base import refuse
from memspan.report.figures import Bars, Figure, Icicle, StackedArea
from memspan.report.page import Section, write_document
from memspan.report.units import human_bytes

if TYPE_CHECKING:
    from memspan.ledger.snapshot import Snapshot, Timeline

__all__ = ["memory_figure", "memory_page"]

_MOMENTS = 600  # of a timeline that are drawn; more than a screen has columns for


def memory_figure(led: Any) -> list[Figure]:
    """Figures of what a ledger or a snapshot holds.

    Args:
        led: a ``Ledger`` (after its block), a ``Snapshot`` or a ``Timeline``.

    Returns:
        Bytes over time (where a timeline was kept), categories at the peak, modules at the peak (where the
        holdings are known), in this order.

    Raises:
        BadInput: something else, or a ledger that has seen nothing.

    Example:
        >>> from memspan.ledger.snapshot import Holding, Snapshot
        >>> peak = Snapshot.of([Holding(96, "parameters.trained", "net.head"), Holding(32, "inputs")])
        >>> [type(figure).__name__ for figure in memory_figure(peak)]
        ['Bars', 'Icicle']
    """
    peak, line = _parts(led)
    figures: list[Figure] = []
    if line is not None and len(line):
        figures.append(_over_time(line))
    if peak is not None:
        held = {name: float(count) for name, count in peak.by_category.items() if count > 0}
        if held:
            during = f" during {peak.phase}" if peak.phase else ""
            figures.append(
                Bars(f"What was held at the peak{during}", "bytes", {f"peak on {peak.device}": held})
            )
        if peak.holdings:
            figures.append(_modules(peak))
    if not figures:
        refuse("led", led, "run something inside the ledger first")
    return figures


def memory_page(led: Any, path: str | os.PathLike[str], *, title: str = "Memory at the peak") -> None:
    """Write one self-contained HTML file on what a ledger saw.

    Args:
        led: as in :func:`memory_figure`.
        path: the file; replaced when it exists.
        title: of the page.

    Example:
        >>> import tempfile, pathlib
        >>> from memspan.ledger.snapshot import Holding, Snapshot
        >>> target = pathlib.Path(tempfile.mkdtemp()) / "peak.html"
        >>> memory_page(Snapshot.of([Holding(96, "inputs")]), target)
        >>> target.read_text().startswith("<!doctype html>")
        True
    """
    peak, line = _parts(led)
    lead, sections = _story(peak, line)
    write_document(
        path, title=title, lead=lead, figures=memory_figure(led), sections=sections, kicker="ledger"
    )


def _story(peak: Snapshot | None, line: Timeline | None) -> tuple[str, list[Section]]:
    if peak is None:
        moment = line.peak() if line is not None else None
        return (f"The peak was {human_bytes(moment.total)}." if moment else ""), []
    during = f", reached during {peak.phase}" if peak.phase else ""
    lead = f"The peak was {human_bytes(peak.total)} on {peak.device}{during}."
    if peak.by_category:
        name, count = max(peak.by_category.items(), key=lambda item: item[1])
        share = f" ({count / peak.total:.0%})" if peak.total else ""
        lead += f" Most of it was {name.replace('_', ' ').replace('.', ', ')}: {human_bytes(count)}{share}."
    ranked = sorted(peak.by_category.items(), key=lambda item: -item[1])
    rows = [
        (name, human_bytes(count), f"{count:,}", f"{count / peak.total:.1%}" if peak.total else "–")
        for name, count in ranked
    ]
    sections = [Section("By category", ("category", "held", "bytes", "share"), rows)]
    if peak.allocator is not None:
        ratio = f"{peak.ratio:.4f}" if peak.ratio is not None else "–"
        sections.append(
            Section(
                "Against the allocator",
                ("ledger saw", "allocator reported", "ratio"),
                [(human_bytes(peak.attributed), human_bytes(peak.allocator), ratio)],
            )
        )
    if peak.holdings:
        largest = [
            (
                human_bytes(block.bytes), block.category, block.module or "–", block.operator or "–",
                "×".join(map(str, block.shape)) or "–", block.dtype or "–", block.phase or "–",
            )
            for block in peak.top(25)
        ]  # fmt: skip
        columns = ("held", "category", "module", "operator", "shape", "dtype", "made in")
        sections.append(Section("Largest blocks", columns, largest))
    return lead, sections


def _over_time(line: Timeline) -> StackedArea:
    points = _thinned(line.points)
    names = dict.fromkeys(name for point in points for name in point.by_category)
    bands = {name: [max(0, point.by_category.get(name, 0)) for point in points] for name in names}
    marks: list[tuple[float, str]] = [(float(event), name) for event, name in line.marks]
    if not marks:
        marks = _phases(points)
    note = f"{line.dropped:,} earlier events are no longer kept." if line.dropped else ""
    return StackedArea(
        "What was held over time", [point.event for point in points], bands, marks=marks, note=note
    )


def _thinned(points: Sequence[Any]) -> list[Any]:
    """At most ``_MOMENTS`` points, of each stretch the one that held most, so that no peak is lost."""
    if len(points) <= _MOMENTS:
        return list(points)
    stretches = np.array_split(np.arange(len(points)), _MOMENTS)
    totals = np.array([point.total for point in points])
    return [points[int(stretch[totals[stretch].argmax()])] for stretch in stretches]


def _phases(points: Sequence[Any]) -> list[tuple[float, str]]:
    """Where the head of the phase (``forward``, ``backward``, ``optimizer``) changes."""
    marks: list[tuple[float, str]] = []
    for point in points:
        head = point.phase.split(":")[0]
        if head and (not marks or marks[-1][1] != head):
            marks.append((float(point.event), head))
    return marks if len(marks) <= 12 else []


def _modules(peak: Snapshot) -> Icicle:
    sums: dict[str, float] = {}
    for block in peak.holdings:
        name = block.module or f"({block.category.split('.')[0].replace('_', ' ')})"
        sums[name] = sums.get(name, 0.0) + max(0, block.bytes)
    return Icicle("Which modules held it at the peak", sums, root="peak")


def _parts(led: Any) -> tuple[Snapshot | None, Timeline | None]:
    if hasattr(led, "points") and hasattr(led, "marks"):
        return None, led
    if hasattr(led, "by_category") and hasattr(led, "holdings"):
        return led, None
    peak = getattr(led, "peak", None)
    if peak is None or not hasattr(peak, "by_category"):
        refuse("led", led, "give a Ledger that has seen something, a Snapshot or a Timeline")
    timeline = getattr(led, "timeline", None)
    try:
        line = timeline() if callable(timeline) else timeline
    except (ValueError, RuntimeError):  # a ledger at level="peak" keeps no timeline
        line = None
    return peak, line
