"""What several commands use: the terminal, tables, results by name, near misses told."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from memspan.base import nearest, refuse

if TYPE_CHECKING:
    from memspan.recipes.engine.recipe import Recipe
    from memspan.report.schema import Result

__all__ = ["ROOMS", "RUNS", "Nearest", "by_room", "find_result", "new_table", "terminal", "told"]

RUNS = click.option(
    "--runs",
    type=click.Path(path_type=Path),
    default=Path("runs"),
    show_default=True,
    help="Folder of all runs.",
)


#: What the systems of a room are for.
ROOMS = {
    "ledger": "Know what a step holds",
    "training": "Train in fewer bytes",
    "models": "Networks that spend bytes well",
    "banks": "Networks with a memory inside",
    "continual": "Keep learning within N bytes",
    "recall": "A memory for language models",
    "memorization": "What a model has memorised",
    "hardware": "Where memory lives",
}


class Nearest(click.Group):
    """A group that offers the nearest names when a command is unknown."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click, but tells the nearest names."""
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            raise click.UsageError(f"no command {name!r}; {nearest(name, self.list_commands(ctx))}", ctx)
        return super().resolve_command(ctx, args)


def terminal() -> Any:
    from rich.console import Console

    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 100
    return Console(width=width)


def new_table(*columns: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim")
    for name in columns:
        table.add_column(
            name,
            overflow="fold",
            justify="right" if name in ("bytes", "share", "batch", "length") else "left",
        )
    return table


def find_result(what: str, runs: Path) -> tuple[Path, Result]:
    from memspan.recipes import names
    from memspan.report.schema import read_result

    path = Path(what)
    if path.exists():
        return path / "result.json" if path.is_dir() else path, read_result(path)
    finished = sorted(
        (runs / what).glob("*/result.json"), key=lambda one: (one.stat().st_mtime_ns, one.as_posix())
    )
    if finished:
        return finished[-1], read_result(finished[-1])
    if what in names():
        raise FileNotFoundError(f"no finished run of {what} under {runs}; make one with: memspan run {what}")
    refuse("what", what, f"give a result.json, its folder, or a recipe: {nearest(what, names())}")


def by_room(recipes: Iterable[Recipe[Any]]) -> dict[str, list[Recipe[Any]]]:
    """Recipes under the job of their room, in the order of ``ROOMS``."""
    found: dict[str, list[Recipe[Any]]] = {title: [] for title in ROOMS.values()}
    for one in recipes:
        found.setdefault(ROOMS.get(one.room, one.room), []).append(one)
    return {title: members for title, members in found.items() if members}


def told(error: BaseException) -> bool:
    """Whether the message alone tells a user what happened and what to do."""
    ours = type(error).__module__.split(".")[0] == "memspan"
    return ours or isinstance(error, OSError | ImportError)
