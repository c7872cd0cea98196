"""``memspan compare``: several results beside each other."""

from __future__ import annotations

from pathlib import Path

import click

from memspan.commands._shared import RUNS, find_result, terminal

__all__ = ["compare"]


@click.command()
@click.argument("what", nargs=-1, required=True)
@click.option("--page", type=click.Path(path_type=Path), help="Write the comparison as an HTML page too.")
@RUNS
def compare(what: tuple[str, ...], page: Path | None, runs: Path) -> None:
    """Show several results beside each other.

    Each WHAT is a result.json, its folder, or a recipe's name (the latest run).
    """
    from memspan.report.tables import print_comparison

    if len(what) < 2:
        raise click.UsageError("name two results or more")
    found = [find_result(one, runs)[1] for one in what]
    print_comparison(found, terminal())
    if page is not None:
        from memspan.report.page import compare_page

        compare_page(found, page)
        click.echo(f"page  {page}")
