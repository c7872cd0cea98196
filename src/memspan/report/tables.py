"""Results in the terminal: claims with marks, measurements, bytes; readable at 80 columns and in a pipe."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from memspan.report.schema import Claim, Result
from memspan.report.summary import Group, byte_heads, metric_label, mode_label, sentence, summarize
from memspan.report.units import human_bytes, number

__all__ = ["claim_line", "print_comparison", "print_result"]

_MOST_ROWS = 12  # of the breakdown; with more, the last setting stands for all
_STYLE = {"✓": "bold green", "✗": "bold red", "?": "bold yellow", "–": "dim"}


def claim_line(claim: Claim) -> Text:
    """One claim as a line: mark, statement, value with interval, and why where it is not simply held.

    Example:
        >>> claim_line(Claim(text="ours is ahead", paper="P", measured=2.0, unit="points", holds=True)).plain
        '✓ ours is ahead: 2 points'
        >>> claim_line(Claim(text="ours is ahead", paper="P", measured=None, unit="", holds=None,
        ...     needs="--full (about 40 min): 400 steps")).plain
        '– ours is ahead  needs --full (about 40 min): 400 steps'
    """
    line = Text()
    line.append(claim.mark, style=_STYLE[claim.mark])
    line.append(" " + _plain(claim.text))
    if claim.measured is not None:
        line.append(f": {measured(claim)}", style="bold")
    if claim.needs:
        line.append(f"  needs {_plain(claim.needs)}", style="dim")
    if not claim.expected:
        line.append("  (not expected to hold)", style="dim")
    if claim.why:
        line.append(f"\n  {_plain(claim.why)}", style="dim")
    return line


def measured(claim: Claim) -> str:
    """The measured value of a claim with its interval and unit.

    Example:
        >>> measured(Claim(text="t", paper="P", measured=2.0, low=1.0, high=3.5, unit="points", holds=True))
        '2 points (1 to 3.5)'
    """
    if claim.measured is None:
        return "not measured"
    in_bytes = claim.unit in ("bytes", "B")
    show = human_bytes if in_bytes else number
    unit = "" if in_bytes or not claim.unit else f" {claim.unit}"
    spread = ""
    if claim.low is not None and claim.high is not None and claim.low != claim.high:
        spread = f" ({show(claim.low)} to {show(claim.high)})"
    return f"{show(claim.measured)}{unit}{spread}"


def print_result(result: Result, console: Console | None = None) -> None:
    """Print one result: the sentence, the claims, the table of measurements.

    Args:
        result: what a recipe measured.
        console: where to; None is standard output.

    Example:
        >>> import io
        >>> from memspan.report.schema import Measurement
        >>> one = Measurement(method="MEMO", seed=0, quality={"accuracy": 0.8}, bytes={"replay": 1024},
        ...     seconds={})
        >>> out = io.StringIO()
        >>> print_result(Result(recipe="memo", mode="quick", config={}, environment={}, data=[],
        ...     measurements=[one], claims=[]), Console(file=out, width=80))
        >>> "MEMO" in out.getvalue() and "1.00 KiB" in out.getvalue()
        True
    """
    console = console or Console()
    console.print(Text.assemble((_plain(result.recipe), "bold"), "  ", (_plain(mode_label(result)), "dim")))
    console.print(Text(_plain(sentence(result))))
    if result.claims:
        console.print()
        for claim in result.claims:
            console.print(Padding(claim_line(claim), (0, 0, 0, 2)))
    groups = summarize(result)
    if groups:
        console.print()
        console.print(_measurements(groups, console.width))
        parts = byte_heads(groups)
        last = [group for group in groups if group.setting == groups[-1].setting]
        if len(parts) > 1:
            console.print(_breakdown(groups if len(groups) <= _MOST_ROWS else last, parts, console.width))
    for note in result.notes:
        console.print(Text(f"  {_plain(note)}", style="dim"))


def print_comparison(results: Iterable[Result], console: Console | None = None) -> None:
    """Print several results: one row a run, method and setting, then the claims.

    Args:
        results: of the same recipe (two runs beside each other) or of several.
        console: where to; None is standard output.
    """
    console = console or Console()
    listed = list(results)
    if not listed:
        console.print("nothing to compare")
        return
    by_recipe: dict[str, list[Result]] = {}
    for result in listed:
        by_recipe.setdefault(result.recipe, []).append(result)
    for recipe, runs in by_recipe.items():
        console.print(Text(_plain(recipe), style="bold"))
        groups = [
            Group(f"{group.method}{f' · run {place}' if len(runs) > 1 else ''}", *group[1:])
            for place, run in enumerate(runs, start=1)
            for group in summarize(run)
        ]
        if groups:
            console.print(_measurements(groups, console.width))
        for place, run in enumerate(runs, start=1):
            for claim in run.claims:
                prefix = f"run {place} ({mode_label(run)}) " if len(runs) > 1 else ""
                console.print(Padding(Text.assemble((prefix, "dim"), claim_line(claim)), (0, 0, 0, 2)))
        console.print()


def _measurements(groups: Sequence[Group], width: int) -> Table:
    metrics = list(dict.fromkeys(name for group in groups for name in group.quality))
    settings = any(group.setting for group in groups)
    times = [f"{group.seconds:.1f} s" if group.seconds else "–" for group in groups]
    # Names may fold, figures may not: as many metrics as their columns leave room for.
    fixed = min(24, max(len(group.method) for group in groups)) + max(map(len, times)) + 14
    trains = any(group.trained is not None for group in groups)
    fixed += max(7, *(len(number(group.trained)) for group in groups)) + 2 if trains else 0
    fixed += min(20, max(len(group.setting) for group in groups)) + 2 if settings else 0
    shown: list[str] = []
    for name in metrics:
        label = max(map(len, metric_label(name).split()))
        fixed += max(label, *(len(group.show(name)) for group in groups)) + 2
        if shown and fixed > width:
            break
        shown.append(name)
    table = _table(title=None)
    table.add_column("method", overflow="fold", min_width=8)
    if settings:
        table.add_column("setting", overflow="fold", style="dim")
    for name in shown:
        table.add_column(escape(_plain(metric_label(name)).replace(" ", "\n")), justify="right", no_wrap=True)
    if trains:
        table.add_column("trained", justify="right", no_wrap=True)
    table.add_column("held", justify="right", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    for group, time in zip(groups, times, strict=True):
        cells = [group.method, *([group.setting] if settings else []), *(group.show(name) for name in shown)]
        cells += [number(group.trained)] if trains else []
        table.add_row(*(Text(_plain(cell)) for cell in (*cells, human_bytes(group.total), time)))
    rest = metrics[len(shown) :]
    if rest:
        table.caption = f"also in the report: {escape(_plain(', '.join(map(metric_label, rest))))}"
    return table


def _breakdown(groups: Sequence[Group], parts: Sequence[str], width: int) -> Table:
    room = max(1, (width - 30) // 15)
    shown = list(parts[:room]) if len(parts) <= room else list(parts[: room - 1])
    table = _table(title="bytes held")
    table.add_column("method", overflow="fold", min_width=8)
    for part in shown:
        table.add_column(escape(_plain(part.replace("_", " "))), justify="right", overflow="fold")
    if len(shown) < len(parts):
        table.add_column("other", justify="right")
    for group in groups:
        heads = group.heads()
        cells = [human_bytes(heads[part]) if part in heads else "–" for part in shown]
        if len(shown) < len(parts):
            cells.append(human_bytes(sum(n for part, n in heads.items() if part not in shown)))
        label = f"{group.method} · {group.setting}" if group.setting else group.method
        table.add_row(*(Text(_plain(cell)) for cell in (label, *cells)))
    return table


def _table(title: str | None) -> Table:
    return Table(
        title=title, box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left", title_style="bold",
        caption_justify="left", header_style="dim",
    )  # fmt: skip


def _plain(text: str) -> str:
    """Text without control characters, so that a result cannot steer the terminal."""
    return "".join(
        " " if char in "\t\n\r" else char for char in text if char.isprintable() or char in "\t\n\r"
    )
