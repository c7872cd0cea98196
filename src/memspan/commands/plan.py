"""``memspan plan``: what one training step will hold, before it runs."""

from __future__ import annotations

import json

import click

from memspan.commands._shared import new_table, terminal
from memspan.commands._step import BATCH, DEVICE, MODEL_HELP, OPTIMIZER, TOKENS, WORLD, optimizer_of

__all__ = ["plan"]


@click.command(epilog=MODEL_HELP)
@click.argument("model")
@click.option("--budget", help="Say whether the step fits, e.g. 8GiB.")
@click.option("--method", "methods", multiple=True, help="Apply a training method first; may be repeated.")
@OPTIMIZER
@DEVICE
@WORLD
@BATCH
@TOKENS
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead of a table.")
def plan(
    model: str,
    budget: str | None,
    methods: tuple[str, ...],
    optimizer: str,
    device: str,
    world: int,
    batch: int,
    tokens: int | None,
    as_json: bool,
) -> None:
    """Tell the peak memory of one training step of MODEL before it runs."""
    from memspan.ledger import Budget
    from memspan.ledger.named import load_model
    from memspan.ledger.planner import plan as make_plan
    from memspan.report.units import human_bytes

    limit = None if budget is None else Budget.parse(budget)
    made = load_model(model, batch=batch, tokens=tokens)
    found = make_plan(
        made.build_model,
        made.batch,
        optimizer_of(optimizer),
        list(methods),
        made.loss,
        device=device,
        world=world,
    )
    fits = None if limit is None else found.fits(limit)
    if as_json:
        document = {
            "total": found.total,
            "by_category": found.by_category,
            "phase": found.phase,
            "exact": found.exact,
            "batch": found.batch,
            "world": world,
            "parameters": found.parameters,
            "trained": found.trained,
            "note": found.note,
            "budget": None if limit is None else limit.bytes,
            "fits": fits,
        }
        click.echo(json.dumps(document, indent=1))
        return
    table = new_table("held at the peak", "bytes", "share")
    for name, size, share in found.table():
        table.add_row(name, human_bytes(size), f"{100 * share:.1f} %")
    console = terminal()
    sign = "" if found.exact else "about "
    console.print(
        f"{sign}{human_bytes(found.total)} at the peak{f' of each of {world} ranks' if world > 1 else ''}, "
        f"batch {found.batch}, {found.device}; peak in {found.phase}",
        style="bold",
        markup=False,
        highlight=False,
    )
    console.print(table)
    console.print(f"{found.parameters:,} parameters, {found.trained:,} trained", highlight=False)
    console.print(found.advice, markup=False, highlight=False)
    if found.note:
        console.print(found.note, style="dim", markup=False, highlight=False)
    if limit is not None:
        verdict = "fits" if fits else f"does not fit; memspan fit {model} --budget {budget} tries the methods"
        console.print(f"budget {limit}: {verdict}", markup=False, highlight=False)
