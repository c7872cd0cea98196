"""``memspan key``: the keys of a server of more than one user."""

from __future__ import annotations

from pathlib import Path

import click

__all__ = ["key"]


@click.command()
@click.argument("user", required=False)
@click.option(
    "--file",
    "path",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("keys.json"),
    show_default=True,
    help="File of keys.",
)
@click.option(
    "--trusted", is_flag=True, help="It may act for any user: for a server of your own, not for a person."
)
@click.option("--remove", metavar="ID", help="Take a key back.")
def key(user: str | None, path: Path, trusted: bool, remove: str | None) -> None:
    """Make an API key for USER and show it once.

    Without USER, list the keys.
    """
    from memspan.server.keys import KeyRing

    ring = KeyRing(path)
    if remove is not None:
        click.echo(f"removed the key of {ring.remove(remove).user}")
    elif user is None:
        for caller in ring.callers():
            click.echo(f"{caller.id}  {caller.user}{'  trusted' if caller.trusted else ''}")
    else:
        click.echo(ring.add(user, trusted))
        click.echo(f"kept as a digest in {path}; it is not shown again", err=True)
