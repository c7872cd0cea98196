"""``memspan tour``: the short recipes, and one page that shows them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from memspan.commands._shared import RUNS, terminal, told

if TYPE_CHECKING:
    from memspan.recipes.engine.recipe import Recipe

__all__ = ["tour"]


@click.command()
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or auto.")
@RUNS
def tour(device: str, runs: Path) -> None:
    """Run the short recipes and write one page (under five minutes)."""
    from memspan.recipes.engine.environment import missing_extras
    from memspan.recipes.engine.progress import Progress
    from memspan.recipes.engine.registry import all_recipes
    from memspan.recipes.engine.run import Finished, execute
    from memspan.recipes.engine.store import fresh_folder
    from memspan.report.page import write_index
    from memspan.report.tables import print_result

    recipes, failed = all_recipes()
    chosen = [one for one in recipes if one.in_tour]
    folder = fresh_folder(runs / "tour")
    finished: dict[str, tuple[Recipe[Any], Finished]] = {}
    skipped = [f"{name}: {reason}" for name, reason in failed.items()]
    for place, one in enumerate(chosen, start=1):
        click.echo(f"\n{place}/{len(chosen)}  {one.title}  ({one.quick_cost})", err=True)
        lacking = missing_extras(one.extras)
        if lacking:
            skipped.append(f"{one.name}: needs pip install 'memspan[{','.join(lacking)}]'")
            click.echo(f"skipped, {skipped[-1]}", err=True)
            continue
        try:
            done = execute(
                one, one.tour or one.quick, device=device, out=folder / one.name, progress=Progress()
            )
        except Exception as error:
            if not told(error):
                raise
            skipped.append(f"{one.name}: {error}")
            click.echo(f"skipped, {skipped[-1]}", err=True)
            continue
        finished[one.name] = (one, done)
        print_result(done.result, terminal())
    for line in skipped:
        click.echo(f"not in the report: {line}", err=True)
    if not finished:
        raise click.ClickException("no recipe of the tour could run")
    page = folder / "index.html"
    write_index(
        [done.result for _, done in finished.values()],
        page,
        title="memspan: a tour",
        titles={name: one.title for name, (one, _) in finished.items()},
        figures={name: done.figures for name, (_, done) in finished.items()},
        asked={name: one.problem for name, (one, _) in finished.items()},
        answers={name: one.answer for name, (one, _) in finished.items()},
        links={name: f"{name}/report.html" for name in finished},
    )
    click.echo(f"\nreport  {page}")
