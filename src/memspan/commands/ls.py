"""``memspan ls``: the systems, by what they are for."""

from __future__ import annotations

import json

import click

from memspan.commands._shared import by_room, new_table, terminal

__all__ = ["ls"]


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead of a table.")
def ls(as_json: bool) -> None:
    """List the systems, and what each one buys."""
    from rich.text import Text

    from memspan.recipes.engine.environment import missing_extras
    from memspan.recipes.engine.registry import all_recipes

    recipes, failed = all_recipes()
    if as_json:
        document = [
            {
                "name": one.name,
                "problem": one.problem,
                "component": one.component,
                "answer": one.answer,
                "paper": one.paper,
                "room": one.room,
                "quick_cost": one.quick_cost,
                "extras": list(one.extras),
                "missing_extras": missing_extras(one.extras),
            }
            for one in recipes
        ]
        document += [{"name": name, "error": reason} for name, reason in failed.items()]
        click.echo(json.dumps(document, indent=1, ensure_ascii=False))
        return
    console = terminal()
    table = new_table("name", "what it buys", "quick run", "install")
    for title, members in by_room(recipes).items():
        table.add_section()
        table.add_row("", Text(title, style="bold"))
        for one in members:
            lacking = missing_extras(one.extras)
            needs = f"memspan[{','.join(lacking)}]" if lacking else "✓"
            # As Text: a table reads brackets as markup, and would swallow the extra.
            table.add_row(*map(Text, (one.name, one.answer, one.quick_cost, needs)))
    console.print(table)
    for name, reason in failed.items():
        console.print(f"{name}: not usable here: {reason}", markup=False, highlight=False)
    console.print("\nmemspan run NAME runs one; memspan run NAME --help shows its options.", highlight=False)
