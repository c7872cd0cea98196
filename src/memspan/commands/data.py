"""``memspan data``: data sets by name, and where they come from."""

from __future__ import annotations

import json
from typing import Any

import click

from memspan.commands._shared import Nearest, new_table, terminal

__all__ = ["data"]


@click.group(cls=Nearest)
def data() -> None:
    """Data sets by name, and where they come from."""


@data.command("ls")
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead of a table.")
def data_ls(as_json: bool) -> None:
    """List the data sets, and whether each can be had here without the network."""
    from memspan.data import catalog
    from memspan.report.units import human_bytes

    rows: list[dict[str, Any]] = []
    for name, entry in catalog().items():
        way = entry.available()
        rows.append(
            {
                "name": name,
                "kind": entry.kind.__name__,
                "title": entry.title,
                "licence": entry.licence,
                "bytes": entry.size,
                "here": way.resolver if way else None,
                "resolvers": list(entry.resolvers),
            }
        )
    if as_json:
        click.echo(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    table = new_table("name", "size", "here by", "licence", "what")
    for row in rows:
        here = str(row["here"] or "–")
        table.add_row(
            str(row["name"]),
            human_bytes(int(row["bytes"])),
            here,
            str(row["licence"]),
            str(row["title"]),
        )
    terminal().print(table)
    click.echo("– is not here yet: memspan data get NAME")


@data.command("get")
@click.argument("name")
def data_get(name: str) -> None:
    """Fetch a data set from its owners, with checksum and resume, where no other way gives it."""
    from memspan.data import get

    found = get(name)
    click.echo(f"{found.name}  {found.source}  sha256 {found.sha256}")
