"""``memspan fit``: the largest batch within a budget, and the cheapest methods that get there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from memspan.base import BadInput
from memspan.commands._shared import new_table, terminal
from memspan.commands._step import BATCH, DEVICE, MODEL_HELP, OPTIMIZER, TOKENS, WORLD, optimizer_of

if TYPE_CHECKING:
    from memspan.recipes.engine.recipe import Recipe

__all__ = ["fit"]


@click.command(epilog=MODEL_HELP)
@click.argument("model")
@click.option("--budget", required=True, help="Bytes that the step may take, e.g. 8GiB.")
@click.option("--methods", default="all", show_default=True, help="all, or names separated by commas.")
@click.option(
    "--most", type=click.IntRange(min=1), default=2, show_default=True, help="Methods combined at once."
)
@OPTIMIZER
@DEVICE
@WORLD
@BATCH
@TOKENS
@click.option(
    "--grow",
    type=click.Choice(["batch", "length"]),
    default="batch",
    show_default=True,
    help="What is made as large as fits: the batch, or the length of its sequences.",
)
@click.option(
    "--data",
    "source",
    type=click.Path(path_type=Path),
    help="Train what fits on your data: .npz, .csv, a folder of images, a text.",
)
@click.option("--target", help="Column to be predicted, with --data of a table.")
@click.option(
    "--steps",
    type=click.IntRange(min=2),
    default=100,
    show_default=True,
    help="Training steps of each method, with --data.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder of the run, with --data. [runs/fit/STAMP]"
)
@click.option(
    "--jobs",
    type=int,
    default=1,
    show_default=True,
    help="Processes that trace the combinations; -1 is one a core.",
)
@click.option("--why", is_flag=True, help="Tell why a combination does not apply.")
@click.option("--run", "verified", is_flag=True, help="Run one real step of the best and compare.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead of a table.")
def fit(
    model: str,
    budget: str,
    methods: str,
    most: int,
    optimizer: str,
    device: str,
    world: int,
    batch: int,
    tokens: int | None,
    grow: Literal["batch", "length"],
    source: Path | None,
    target: str | None,
    steps: int,
    out: Path | None,
    jobs: int,
    why: bool,
    verified: bool,
    as_json: bool,
) -> None:
    """Find the largest batch of MODEL within a budget, and the methods that get there.

    With --data the methods that fit are trained, and a report shows what their bytes buy; where none fits,
    nothing is trained and the exit status is 1.
    """
    from memspan.ledger import Budget
    from memspan.ledger.fitting import fit as make_fit
    from memspan.ledger.fitting import verify
    from memspan.ledger.named import load_model
    from memspan.report.units import human_bytes, number

    limit = Budget.parse(budget)
    own = None if source is None else _own_data(source, target)
    if own is not None and (world > 1 or grow != "batch"):
        raise BadInput(
            "data", str(source), "training runs on one rank and grows the batch: leave out the others"
        )
    made = load_model(model, batch=batch, tokens=tokens, classes=_classes(own))
    examples = None
    if own is not None:
        from memspan.commands._fit_recipe import examples_for

        examples = examples_for(made.batch, own)
    chosen: str | list[str] = "all" if methods == "all" else [one for one in methods.split(",") if one]
    console = terminal()
    with _tracing() as tell:
        found = make_fit(
            made.build_model,
            made.batch,
            limit,
            chosen,
            optimizer_of(optimizer),
            made.loss,
            device,
            most=most,
            grow=grow,
            largest=made.longest if grow == "length" else None,
            world=world,
            progress=tell,
            jobs=jobs,
        )
    checked = verify(found.best) if verified and found.best is not None else None
    if as_json:
        document: dict[str, Any] = {
            "budget": limit.bytes,
            "wanted": found.wanted,
            "candidates": found.table(),
        }
        document["best"] = found.best.name if found.best else None
        document["skipped"] = {one.name: one.skipped for one in found.skipped}
        if checked is not None:
            document["measured"] = {"planned": checked.planned, "ledger": checked.measured}
            document["measured"]["allocator"] = checked.allocator
        click.echo(json.dumps(document, indent=1))
        return
    table = new_table("", "methods", grow, "bytes", "flops each", "trained", "peak in", "exact")
    for row in found.table():
        table.add_row(
            "*" if row["front"] else "",
            str(row["methods"]),
            str(row[grow] or "does not fit"),
            human_bytes(int(row["bytes"] or 0)),
            "–" if row["flops per example"] is None else number(float(row["flops per example"])),
            f"{row['trained']:,}",
            str(row["peak"]),
            "yes" if row["exact"] else "about",
        )
    console.print(str(found), style="bold", markup=False, highlight=False)
    console.print(table)
    console.print(
        "* no other is cheaper, trains as much and takes as large a batch", style="dim", highlight=False
    )
    if why:
        for one in found.skipped:
            console.print(
                f"{one.name} does not apply: {one.skipped}", style="dim", markup=False, highlight=False
            )
    elif alone := [one.name for one in found.skipped if len(one.methods) == 1]:
        console.print(
            f"{', '.join(alone)}: not for this model (--why tells the reasons)", style="dim", highlight=False
        )
    if checked is not None:
        console.print(
            f"one real step with batch {checked.batch}: planned {human_bytes(checked.planned)}, ledger "
            f"{human_bytes(checked.measured)}, allocator {human_bytes(checked.allocator)} "
            f"({100 * checked.error:+.2f} %)",
            markup=False,
            highlight=False,
        )
    if examples is not None and found.best is not None:
        from memspan.commands._fit_recipe import fit_recipe

        _train_fit(fit_recipe(model, found, examples, own, steps), device, out)
    elif examples is not None:
        raise click.exceptions.Exit(1)


def _own_data(source: Path, target: str | None) -> Any:
    from memspan.data import read

    return read(source, target=target)


def _classes(own: Any) -> int | None:
    from memspan.data import ImageSet, TableSet

    if isinstance(own, ImageSet):
        return len(own.classes)
    if isinstance(own, TableSet) and own.target is not None:
        values = own.columns[own.target]
        if values.dtype.kind in "Oi" and values.min() != values.max():  # words, or whole numbers from 0 on
            return len(set(values)) if values.dtype == object else max(int(values.max()) + 1, 2)
    return None


def _train_fit(recipe: Recipe[Any], device: str, out: Path | None) -> None:
    from memspan.recipes.engine.progress import Progress
    from memspan.recipes.engine.run import execute
    from memspan.report.tables import print_result

    done = execute(recipe, device=device, out=out, progress=Progress())
    print_result(done.result, terminal())
    if done.report is not None:
        click.echo(f"\nreport  {done.report}")
    click.echo(f"result  {done.out / 'result.json'}")


@contextmanager
def _tracing() -> Iterator[Callable[[str], None]]:
    """A bar on the terminal's other stream that names what is being traced; nothing where there is none."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    err = Console(stderr=True)
    parts = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*parts, console=err, transient=True, disable=not err.is_terminal) as bar:
        row = bar.add_task("building", total=None)
        yield lambda name: bar.update(row, description=f"tracing {name}")
