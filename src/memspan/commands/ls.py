"""``memspan ls``: the systems, by the problem they solve."""

from __future__ import annotations

import json

import click

from memspan.commands._shared import by_problem, new_table, terminal

__all__ = ["ls"]


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead of tables.")
def ls(as_json: bool) -> None:
    """List the systems by the problem they solve."""
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
    for problem, members in by_problem(recipes).items():
        table = new_table("name", "import", "quick run", "what it buys")
        for one in members:
            lacking = missing_extras(one.extras)
            needs = f"  [needs memspan[{','.join(lacking)}]]" if lacking else ""
            table.add_row(one.name, one.component, one.quick_cost, one.answer + needs)
        console.print(f"\n{problem}", style="bold", markup=False, highlight=False)
        console.print(table)
    for name, reason in failed.items():
        console.print(f"{name}: not usable here: {reason}", markup=False, highlight=False)
    console.print("\nmemspan run NAME runs one; memspan run NAME --help shows its options.", highlight=False)
