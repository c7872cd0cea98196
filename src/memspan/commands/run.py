"""``memspan run NAME``: a recipe, with its own options."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from memspan.base import BadInput, nearest
from memspan.commands._shared import terminal

if TYPE_CHECKING:
    from memspan.recipes.engine.options import OptionSpec
    from memspan.recipes.engine.recipe import Recipe

__all__ = ["run"]


class Recipes(click.Group):
    """``memspan run NAME``: a command for each recipe, made when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the recipes, without importing any."""
        from memspan.recipes import names

        return names()

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of a recipe, with the recipe's own options."""
        from memspan.recipes import names

        if cmd_name not in names() and not cmd_name.endswith(".py") and not Path(cmd_name).is_dir():
            raise click.UsageError(f"no recipe {cmd_name!r}; {nearest(cmd_name, names())}", ctx)
        from memspan.recipes.engine.registry import find

        return _recipe_command(find(cmd_name), cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the names; importing every recipe for its help would take seconds."""
        with formatter.section("Recipes (memspan ls tells what each one answers)"):
            formatter.write_text(", ".join(self.list_commands(ctx)) or "none installed")


@click.command(cls=Recipes, subcommand_metavar="NAME [OPTIONS]")
def run() -> None:
    """Run a recipe: NAME, or the path of your own file or folder.

    Each recipe has its own options: memspan run NAME --help.
    """


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
        print_result(done.result, terminal())
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
