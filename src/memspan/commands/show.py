"""``memspan show``: one result."""

from __future__ import annotations

from pathlib import Path

import click

from memspan.commands._shared import RUNS, find_result, terminal

__all__ = ["show"]


@click.command()
@click.argument("what")
@RUNS
def show(what: str, runs: Path) -> None:
    """Show one result.

    WHAT is a result.json, its folder, or a recipe's name (the latest run).
    """
    from memspan.report.tables import print_result

    path, result = find_result(what, runs)
    print_result(result, terminal())
    click.echo(f"\nresult  {path}")
