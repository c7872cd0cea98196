"""``memspan results``: committed results become the documents that show them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from memspan.base import BadInput
from memspan.commands._shared import by_room

if TYPE_CHECKING:
    from memspan.recipes.engine.recipe import Recipe

__all__ = ["results"]

_MARKERS = ("<!-- systems -->", "<!-- /systems -->")


@click.command()
@click.option(
    "--from",
    "source",
    type=click.Path(path_type=Path),
    default=Path("benchmarks/results"),
    show_default=True,
    help="Folder of committed results.",
)
@click.option(
    "--to",
    "target",
    type=click.Path(path_type=Path),
    default=Path("docs/RESULTS.md"),
    show_default=True,
    help="Document to write.",
)
@click.option(
    "--readme",
    type=click.Path(path_type=Path),
    default=Path("README.md"),
    show_default=True,
    help="Page whose table of systems is refreshed.",
)
@click.option("--check", is_flag=True, help="Write nothing; exit with 1 if a document is out of date.")
def results(source: Path, target: Path, readme: Path, check: bool) -> None:
    """Collate committed results into the documents."""
    from memspan.base.files import atomic_write
    from memspan.recipes.engine.registry import all_recipes
    from memspan.report.results import collate

    recipes, failed = all_recipes()
    if failed:
        raise ImportError("; ".join(f"{name}: {reason}" for name, reason in failed.items()))
    fresh = {target: collate(source), **_pictures(source, target.parent / "figures", recipes)}
    if readme.is_file():
        fresh[readme] = _with_systems(readme, recipes)
    stale = [path for path, text in fresh.items() if not path.is_file() or path.read_text("utf-8") != text]
    if check:
        if stale:
            named = ", ".join(map(str, stale))
            click.echo(f"memspan: out of date: {named}; run memspan results", err=True)
            raise click.exceptions.Exit(1)
        click.echo("documents are current")
        return
    for path in fresh:
        if path in stale:
            atomic_write(path, fresh[path])
        click.echo(f"{path}  {'written' if path in stale else 'current'}")


def _pictures(source: Path, folder: Path, recipes: Sequence[Recipe[Any]]) -> dict[Path, str]:
    """The first figure of each recipe, drawn from its committed result."""
    from memspan.recipes.engine.measurements import Measurements
    from memspan.recipes.engine.options import changed
    from memspan.report.draw import standalone
    from memspan.report.figures import Images, Lines
    from memspan.report.schema import read_result

    drawn = {}
    for recipe in recipes:
        path = source / f"{recipe.name}.json"
        if recipe.figures and path.is_file():
            result = read_result(path)
            given = {name: result.config[name] for name in vars(recipe.quick) if name in result.config}
            figures = recipe.figures(Measurements(result.measurements), changed(recipe.quick, given))
            figures = [figure for figure in figures if not isinstance(figure, Images)]
            if figures:  # quality against bytes, where a recipe draws it, comes before bars
                first = min(figures, key=lambda figure: not isinstance(figure, Lines))
                drawn[folder / f"{recipe.name}.svg"] = standalone(first)
    return drawn


def _with_systems(readme: Path, recipes: Iterable[Recipe[Any]]) -> str:
    text = readme.read_text("utf-8")
    start, end = (text.find(marker) for marker in _MARKERS)
    if start < 0 or end < start:
        raise BadInput("readme", str(readme), f"it needs the lines {_MARKERS[0]} and {_MARKERS[1]}")
    rows = ["| system | you want to | what it buys | import | quick run |", "|---|---|---|---|---|"]
    for title, members in by_room(recipes).items():
        rows.append(f"| **{title}** | | | | |")
        for one in members:
            page = readme.parent / "docs" / "systems" / f"{one.name}.md"
            name = f"[{one.name}](docs/systems/{one.name}.md)" if page.is_file() else one.name
            rows.append(f"| {name} | {one.problem} | {one.answer} | `{one.component}` | {one.quick_cost} |")
    return text[: start + len(_MARKERS[0])] + "\n" + "\n".join(rows) + "\n" + text[end:]
