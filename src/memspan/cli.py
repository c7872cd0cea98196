"""The commands, thin: each calls what a program can call too; nothing heavy is imported before its need."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from memspan import __version__
from memspan.base import BadInput, nearest, refuse
from memspan.server.commands import COMMANDS

if TYPE_CHECKING:
    from memspan.recipes.engine.options import OptionSpec
    from memspan.recipes.engine.recipe import Recipe
    from memspan.report.schema import Result

__all__ = ["cli", "main"]

_RUNS = click.option(
    "--runs",
    type=click.Path(path_type=Path),
    default=Path("runs"),
    show_default=True,
    help="Folder of all runs.",
)
_MARKERS = ("<!-- systems -->", "<!-- /systems -->")


class Commands(click.Group):
    """A group that offers the nearest names when a command is unknown."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click, but tells the nearest names."""
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            raise click.UsageError(f"no command {name!r}; {nearest(name, self.list_commands(ctx))}", ctx)
        return super().resolve_command(ctx, args)


class Recipes(click.Group):
    """``memspan run NAME``: a command for each recipe, made when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the recipes, without importing any."""
        from memspan.recipes import names

        return names()

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of a recipe, with the recipe's own options."""
        from memspan.recipes import names

        if cmd_name not in names() and not cmd_name.endswith(".py") and "/" not in cmd_name:
            raise click.UsageError(f"no recipe {cmd_name!r}; {nearest(cmd_name, names())}", ctx)
        from memspan.recipes.engine.registry import find

        return _recipe_command(find(cmd_name), cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the names; importing every recipe for its help would take seconds."""
        with formatter.section("Recipes (memspan ls tells what each one answers)"):
            formatter.write_text(", ".join(self.list_commands(ctx)) or "none installed")


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="memspan")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """See where the bytes go, spend them better, show what each byte bought."""


for _command in COMMANDS:
    cli.add_command(_command)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; one clear line for an error, 2 for bad usage, 130 after Ctrl-C.

    Args:
        argv: arguments; None takes those of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else torch's profiler writes into the progress bars
    arguments = [item for item in arguments if item != "--debug"]
    try:
        code = cli.main(arguments, prog_name="memspan", standalone_mode=False, obj=arguments)
        sys.stdout.flush()
    except click.exceptions.Exit as end:
        code = end.exit_code
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("memspan: interrupted", err=True)
        code = 130
    except BrokenPipeError:  # the reader of the output has gone, as with head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:
        if debug or not _told(error):
            raise
        code = 2 if isinstance(error, BadInput) else 1
        _say_error(error)
    sys.exit(code if isinstance(code, int) else 0)


@cli.command()
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
    console = _console()
    for problem, members in _by_problem(recipes).items():
        table = _table("name", "import", "quick run", "what it buys")
        for one in members:
            lacking = missing_extras(one.extras)
            needs = f"  [needs memspan[{','.join(lacking)}]]" if lacking else ""
            table.add_row(one.name, one.component, one.quick_cost, one.answer + needs)
        console.print(f"\n{problem}", style="bold", markup=False, highlight=False)
        console.print(table)
    for name, reason in failed.items():
        console.print(f"{name}: not usable here: {reason}", markup=False, highlight=False)
    console.print("\nmemspan run NAME runs one; memspan run NAME --help shows its options.", highlight=False)


@cli.command(cls=Recipes, subcommand_metavar="NAME [OPTIONS]")
def run() -> None:
    """Run a recipe: NAME, or the path of your own recipe.py.

    Each recipe has its own options: memspan run NAME --help.
    """


@cli.command()
@click.argument("what")
@_RUNS
def show(what: str, runs: Path) -> None:
    """Show a result: WHAT is a result.json, its folder, or a recipe's name (the latest run)."""
    from memspan.report.tables import print_result

    path, result = _result(what, runs)
    print_result(result, _console())
    click.echo(f"\nresult  {path}")


@cli.command()
@click.argument("what", nargs=-1, required=True)
@click.option("--page", type=click.Path(path_type=Path), help="Write the comparison as an HTML page too.")
@_RUNS
def compare(what: tuple[str, ...], page: Path | None, runs: Path) -> None:
    """Show several results beside each other: paths, or names of recipes (their latest runs)."""
    from memspan.report.tables import print_comparison

    if len(what) < 2:
        raise click.UsageError("name two results or more")
    found = [_result(one, runs)[1] for one in what]
    print_comparison(found, _console())
    if page is not None:
        from memspan.report.page import compare_page

        compare_page(found, page)
        click.echo(f"page  {page}")


@cli.command()
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
    from memspan.report.figures import Lines
    from memspan.report.schema import read_result

    drawn = {}
    for recipe in recipes:
        path = source / f"{recipe.name}.json"
        if recipe.figures and path.is_file():
            result = read_result(path)
            given = {name: result.config[name] for name in vars(recipe.quick) if name in result.config}
            figures = recipe.figures(Measurements(result.measurements), changed(recipe.quick, given))
            lines = next((figure for figure in figures if isinstance(figure, Lines)), None)
            if lines is not None:
                drawn[folder / f"{recipe.name}.svg"] = standalone(lines)
    return drawn


@cli.group(cls=Commands)
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
    table = _table("name", "size", "here by", "licence", "what")
    for row in rows:
        here = str(row["here"] or "–")
        table.add_row(
            str(row["name"]),
            human_bytes(int(row["bytes"])),
            here,
            str(row["licence"]),
            str(row["title"]),
        )
    _console().print(table)
    click.echo("– is not here yet: memspan data get NAME")


@data.command("get")
@click.argument("name")
def data_get(name: str) -> None:
    """Fetch a data set from its owners, with checksum and resume, where no other way gives it."""
    from memspan.data import get

    found = get(name)
    click.echo(f"{found.name}  {found.source}  sha256 {found.sha256}")


_MODEL_HELP = (
    "MODEL is path/to/file.py:function, where function() returns (build_model, batch) or "
    "(build_model, batch, loss); or a config.json of transformers or a folder with one; or a name: a model "
    "type or class of transformers (llama, BertForSequenceClassification), a cached name of the hub, a model "
    "of timm (resnet50). Weights are never fetched."
)
_BATCH = click.option(
    "--batch", type=click.IntRange(min=1), default=8, show_default=True, help="Examples, for a MODEL by name."
)
_TOKENS = click.option(
    "--tokens", type=click.IntRange(min=1), help="Length of sequences, for a MODEL of text by name. [512]"
)
_WORLD = click.option(
    "--world",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Ranks over which FSDP2, or a method that shards, spreads the model; the batch is each rank's.",
)
_OPTIMIZER = click.option(
    "--optimizer",
    type=click.Choice(["adamw", "adam", "sgd", "none"]),
    default="adamw",
    show_default=True,
    help="Optimizer of the step.",
)
_DEVICE = click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")


@cli.command(epilog=_MODEL_HELP)
@click.argument("model")
@click.option("--budget", help="Say whether the step fits, e.g. 8GiB.")
@click.option("--method", "methods", multiple=True, help="Apply a training method first; may be repeated.")
@_OPTIMIZER
@_DEVICE
@_WORLD
@_BATCH
@_TOKENS
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
        _optimizer(optimizer),
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
    table = _table("held at the peak", "bytes", "share")
    for name, size, share in found.table():
        table.add_row(name, human_bytes(size), f"{100 * share:.1f} %")
    console = _console()
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


@cli.command(epilog=_MODEL_HELP)
@click.argument("model")
@click.option("--budget", required=True, help="Bytes that the step may take, e.g. 8GiB.")
@click.option("--methods", default="all", show_default=True, help="all, or names separated by commas.")
@click.option(
    "--most", type=click.IntRange(min=1), default=2, show_default=True, help="Methods combined at once."
)
@_OPTIMIZER
@_DEVICE
@_WORLD
@_BATCH
@_TOKENS
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
    verified: bool,
    as_json: bool,
) -> None:
    """Find the largest batch of MODEL that fits a budget, and the cheapest methods that get there.

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
        from memspan.recipes._fit_own import examples_for

        examples = examples_for(made.batch, own)
    chosen: str | list[str] = "all" if methods == "all" else [one for one in methods.split(",") if one]
    console = _console()
    tell = None if as_json else _status(console)
    found = make_fit(
        made.build_model,
        made.batch,
        limit,
        chosen,
        _optimizer(optimizer),
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
    table = _table("", "methods", grow, "bytes", "flops each", "trained", "peak in", "exact")
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
    for one in found.skipped:
        console.print(f"{one.name} does not apply: {one.skipped}", style="dim", markup=False, highlight=False)
    if checked is not None:
        console.print(
            f"one real step with batch {checked.batch}: planned {human_bytes(checked.planned)}, ledger "
            f"{human_bytes(checked.measured)}, allocator {human_bytes(checked.allocator)} "
            f"({100 * checked.error:+.2f} %)",
            markup=False,
            highlight=False,
        )
    if examples is not None and found.best is not None:
        from memspan.recipes._fit_own import fit_recipe

        _train_fit(fit_recipe(model, found, examples, own, steps), device, out)
    elif examples is not None:
        raise click.exceptions.Exit(1)


def _own_data(source: Path, target: str | None) -> Any:
    from memspan.data import read

    return read(source, target=target)


def _classes(own: Any) -> int | None:
    named = getattr(own, "classes", None)
    return len(named) if named is not None else None


def _train_fit(recipe: Recipe[Any], device: str, out: Path | None) -> None:
    from memspan.recipes.engine.progress import Progress
    from memspan.recipes.engine.run import execute
    from memspan.report.tables import print_result

    done = execute(recipe, device=device, out=out, progress=Progress())
    print_result(done.result, _console())
    if done.report is not None:
        click.echo(f"\nreport  {done.report}")
    click.echo(f"result  {done.out / 'result.json'}")


@cli.command()
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or auto.")
@_RUNS
def tour(device: str, runs: Path) -> None:
    """Run the short recipes and write one HTML report (under five minutes)."""
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
            if not _told(error):
                raise
            skipped.append(f"{one.name}: {error}")
            click.echo(f"skipped, {skipped[-1]}", err=True)
            continue
        finished[one.name] = (one, done)
        print_result(done.result, _console())
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


def _recipe_command(recipe: Recipe[Any], asked: str) -> click.Command:
    from memspan.recipes.engine.options import specs

    own = {spec.name: spec for spec in specs(recipe.options)}
    parameters: list[click.Parameter] = [_parameter(spec, recipe) for spec in own.values()]
    quick, full = recipe.seeds
    if recipe.takes_budget:
        parameters.append(
            click.Option(["--budget"], help="Bytes to spend, e.g. 2MiB, in place of the recipe's own.")
        )
    parameters += [
        click.Option(["--full"], is_flag=True, help="The size at which the paper's claim is tested."),
        click.Option(
            ["--seeds"], type=click.IntRange(min=1), help=f"How many seeds. [quick {quick}; full {full}]"
        ),
        click.Option(
            ["--device"], default="cpu", show_default=True, help=f"{', '.join(recipe.devices)} or auto."
        ),
        click.Option(
            ["--threads"], type=click.IntRange(min=1), help="CPU threads. [as the recipe is fastest]"
        ),
        click.Option(
            ["--out"],
            type=click.Path(path_type=Path, file_okay=False),
            help="Folder of the run; an unfinished run there is continued. [runs/NAME/STAMP]",
        ),
        click.Option(["--resume"], is_flag=True, help="Continue the newest unfinished run of these options."),
        click.Option(
            ["--check"], is_flag=True, help="Exit with 1 if a claim fails that is expected to hold."
        ),
        click.Option(["--quiet"], is_flag=True, help="Only say where the result is."),
    ]
    if recipe.price is not None:
        parameters.append(
            click.Option(
                ["--dry-run"], is_flag=True, help="Tell the language-model calls and tokens; run nothing."
            )
        )

    def callback(**given: Any) -> None:
        chosen = {name: given.pop(name) for name in own}
        if given.pop("dry_run", False):
            _tell_price(recipe, {k: v for k, v in chosen.items() if v is not None}, given["full"])
            return
        _run(recipe, {name: value for name, value in chosen.items() if value is not None}, **given)

    return click.Command(
        asked,
        params=parameters,
        callback=callback,
        context_settings={"help_option_names": ["-h", "--help"]},
        help=f"{recipe.title}\n\n{_sentence(recipe.problem)} {_sentence(recipe.answer)}\n\n"
        f"Quick mode takes {recipe.quick_cost} on two CPU cores. Source: {recipe.paper}.",
    )


def _run(
    recipe: Recipe[Any],
    chosen: Mapping[str, Any],
    *,
    full: bool,
    seeds: int | None,
    device: str,
    threads: int | None,
    out: Path | None,
    resume: bool,
    check: bool,
    quiet: bool,
    budget: str | None = None,
) -> None:
    from memspan.recipes.engine.environment import missing_extras
    from memspan.recipes.engine.options import changed
    from memspan.recipes.engine.progress import Progress
    from memspan.recipes.engine.run import Interrupted, execute
    from memspan.report.tables import print_result

    lacking = missing_extras(recipe.extras)
    if lacking:
        raise ImportError(f"recipe {recipe.name} needs: pip install 'memspan[{','.join(lacking)}]'")
    options = changed(recipe.full if full else recipe.quick, chosen)
    try:
        done = execute(
            recipe,
            options,
            mode="full" if full else "quick",
            seeds=seeds,
            device=device,
            threads=threads,
            budget=budget,
            out=out,
            resume=resume,
            progress=Progress(style="quiet" if quiet else None),
        )
    except Interrupted as stop:
        click.echo(f"memspan: interrupted; {stop}. Continue with: {_again(stop.out)}", err=True)
        raise click.exceptions.Exit(130) from None
    if not quiet:
        print_result(done.result, _console())
        if done.report is not None:
            click.echo(f"\nreport  {done.report}")
    click.echo(f"result  {done.out / 'result.json'}")
    surprises = [claim.text for claim in done.result.claims if claim.expected and claim.holds is False]
    if check and surprises:
        click.echo(f"memspan: expected claims that do not hold: {'; '.join(surprises)}", err=True)
        raise click.exceptions.Exit(1)


def _tell_price(recipe: Recipe[Any], chosen: Mapping[str, Any], full: bool) -> None:
    from memspan.recipes.engine.options import changed

    assert recipe.price is not None
    asked = recipe.price(changed(recipe.full if full else recipe.quick, chosen))
    for part in asked:
        click.echo(
            f"{part.what}: {part.calls:,} calls, about {part.prompt_tokens:,} tokens sent,"
            f" at most {part.completion_tokens:,} received"
        )
    if not asked:
        click.echo("a run with these options calls no language model")
        return
    calls = sum(part.calls for part in asked)
    sent, got = sum(part.prompt_tokens for part in asked), sum(part.completion_tokens for part in asked)
    click.echo(
        f"in all: {calls:,} calls, about {sent:,} tokens sent, at most {got:,} received; nothing was run"
    )


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."


def _again(out: Path) -> str:
    given = click.get_current_context().find_root().obj
    kept: list[str] = []
    for item in given if isinstance(given, list) else []:
        if kept and kept[-1] == "--out":
            kept.pop()
        elif item != "--resume" and not item.startswith("--out="):
            kept.append(item)
    return shlex.join(["memspan", *kept, "--out", str(out)])


def _parameter(spec: OptionSpec, recipe: Recipe[Any]) -> click.Option:
    from memspan.recipes.engine.options import parse

    class Kind(click.ParamType[Any]):
        name = "value"

        def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
            try:
                return parse(spec, value)
            except BadInput as error:
                self.fail(f"{value!r}: {error.remedy}", param, ctx)

    quick, full = (_shown(getattr(mode, spec.name)) for mode in (recipe.quick, recipe.full))
    sizes = f"[{quick}]" if quick == full else f"[quick {quick}; full {full}]"
    help = f"{spec.help[:1].upper()}{spec.help[1:]}{f' ({spec.unit})' if spec.unit else ''}. {sizes}"
    if spec.kind is bool:
        return click.Option([f"{spec.flag}/--no-{spec.flag[2:]}", spec.name], default=None, help=help)
    return click.Option([spec.flag, spec.name], type=Kind(), metavar=_metavar(spec), default=None, help=help)


def _metavar(spec: OptionSpec) -> str:
    words = spec.allowed
    if "separated by commas" in words:
        return "A,B,..."
    for sign, name in (
        ("whole", "N"),
        ("number", "X"),
        ("bytes", "BYTES"),
        ("path", "PATH"),
        ("text", "TEXT"),
    ):
        if sign in words.split(",")[0]:
            return name
    return "|".join(words.removesuffix(", or none").split(" or "))


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_shown, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value).replace(" ", "")


def _result(what: str, runs: Path) -> tuple[Path, Result]:
    from memspan.recipes import names
    from memspan.report.schema import read_result

    path = Path(what)
    if path.exists():
        return path / "result.json" if path.is_dir() else path, read_result(path)
    finished = sorted(
        (runs / what).glob("*/result.json"), key=lambda one: (one.stat().st_mtime_ns, one.as_posix())
    )
    if finished:
        return finished[-1], read_result(finished[-1])
    if what in names():
        raise FileNotFoundError(f"no finished run of {what} under {runs}; make one with: memspan run {what}")
    refuse("what", what, f"give a result.json, its folder, or a recipe: {nearest(what, names())}")


def _with_systems(readme: Path, recipes: Iterable[Recipe[Any]]) -> str:
    text = readme.read_text("utf-8")
    start, end = (text.find(marker) for marker in _MARKERS)
    if start < 0 or end < start:
        raise BadInput("readme", str(readme), f"it needs the lines {_MARKERS[0]} and {_MARKERS[1]}")
    rows = ["| system | you want to | what it buys | import | quick run |", "|---|---|---|---|---|"]
    for members in _by_problem(recipes).values():
        for one in members:
            page = readme.parent / "docs" / "systems" / f"{one.name}.md"
            name = f"[{one.name}](docs/systems/{one.name}.md)" if page.is_file() else one.name
            rows.append(f"| {name} | {one.problem} | {one.answer} | `{one.component}` | {one.quick_cost} |")
    return text[: start + len(_MARKERS[0])] + "\n" + "\n".join(rows) + "\n" + text[end:]


def _by_problem(recipes: Iterable[Recipe[Any]]) -> dict[str, list[Recipe[Any]]]:
    found: dict[str, list[Recipe[Any]]] = {}
    for one in recipes:
        found.setdefault(one.problem, []).append(one)
    return dict(sorted(found.items()))


def _optimizer(name: str) -> Any:
    import torch

    return {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD, "none": None}[name]


def _status(console: Any) -> Callable[[str], None]:
    from rich.console import Console

    err = Console(stderr=True)
    return lambda name: err.print(f"tracing {name}", style="dim", markup=False, highlight=False)


def _told(error: BaseException) -> bool:
    """Whether the message alone tells a user what happened and what to do."""
    ours = type(error).__module__.split(".")[0] == "memspan"
    return ours or isinstance(error, OSError | ImportError)


def _say_error(error: BaseException) -> None:
    lines = [str(error) or type(error).__name__, *getattr(error, "__notes__", [])]
    click.echo(f"memspan: {lines[0]}", err=True)
    for line in lines[1:]:
        click.echo(f"  {line}", err=True)


def _console() -> Any:
    from rich.console import Console

    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 100
    return Console(width=width)


def _table(*columns: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim")
    for name in columns:
        table.add_column(
            name,
            overflow="fold",
            justify="right" if name in ("bytes", "share", "batch", "length") else "left",
        )
    return table


if __name__ == "__main__":
    main()
