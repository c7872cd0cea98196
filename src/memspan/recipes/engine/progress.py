"""What a run shows while it works: bars with the time left on a terminal, plain lines in a pipe, nothing."""

from __future__ import annotations

import time
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

__all__ = ["Progress", "Style"]

Style = Literal["bar", "plain", "quiet"]


class Progress:
    """Progress of a run over its cells, and within the present cell. A context manager.

    Args:
        console: where to; standard error as a rule.
        style: ``"bar"``, ``"plain"``, ``"quiet"``, or None to choose by the console.
    """

    def __init__(self, console: Console | None = None, style: Style | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.style = style or ("bar" if self.console.is_terminal else "plain")
        self._total: int | None = None
        self._done = self._kept = 0
        self._begun, self._quarter = 0.0, 0
        self._bars: RichProgress | None = None

    def __enter__(self) -> Progress:
        if self.style == "bar":
            self._bars = RichProgress(
                TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
                TimeElapsedColumn(), TimeRemainingColumn(), console=self.console, transient=True,
            )  # fmt: skip
            self._bars.start()
            self._all = self._bars.add_task("all", total=self._total)
            self._one = self._bars.add_task("", total=None, visible=False)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def expect(self, cells: int) -> None:
        """Tell how many cells there will be."""
        self._total = cells
        if self._bars is not None:
            self._bars.update(self._all, total=cells)

    def begin(self, label: str) -> None:
        """A cell starts."""
        self._begun, self._quarter = time.perf_counter(), 0
        if self._bars is not None:
            self._bars.reset(self._one, description=escape(label), total=None, visible=True)

    def step(self, done: float, total: float | None, text: str) -> None:
        """The present cell has come so far."""
        if self._bars is not None:
            update = {"description": escape(text)} if text else {}
            self._bars.update(self._one, completed=done, total=total, visible=True, **update)  # type: ignore[arg-type]
        elif self.style == "plain" and total:
            quarter = int(4 * done / total)
            long = time.perf_counter() - self._begun > 20
            if quarter > self._quarter and quarter < 4 and long:
                self._line(f"    {100 * done / total:.0f} %  {text}")
            self._quarter = max(quarter, self._quarter)

    def end(self, label: str, told: str) -> None:
        """The present cell is stored."""
        seconds = time.perf_counter() - self._begun
        self._advance()
        self._line(f"{self._place()} {label}  {told}  {seconds:.1f} s")

    def kept(self, label: str) -> None:
        """A cell was there from before."""
        self._kept += 1
        self._advance()
        self._line(f"{self._place()} {label}  kept from before")

    def say(self, text: str) -> None:
        """One line to the reader."""
        self._line(text)

    def _advance(self) -> None:
        self._done += 1
        if self._bars is not None:
            self._bars.update(self._all, completed=self._done)
            self._bars.update(self._one, visible=False)

    def _place(self) -> str:
        return f"[{self._done}/{self._total}]" if self._total else f"[{self._done}]"

    def _line(self, text: str) -> None:
        if self.style != "quiet":
            (self._bars.console if self._bars else self.console).print(text, markup=False, highlight=False)
