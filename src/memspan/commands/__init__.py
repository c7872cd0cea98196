"""The command line, thin: each command is a file here and calls what a program can call too.

``SECTIONS`` is the whole table. A new command is one file, ``commands/NAME.py`` with a click command
``NAME``, and one line in the table. A file is imported when its command is asked for, and imports what is
heavy inside the command.
"""

from __future__ import annotations

import os
import pkgutil
import sys
from collections.abc import Sequence

import click

from memspan import __version__
from memspan.base import BadInput
from memspan.commands._shared import Nearest, told

__all__ = ["SECTIONS", "cli", "main"]

SECTIONS = {
    "Start": (
        "demo",
        "tour",
        "ls",
    ),
    "A training step within a budget": (
        "plan",
        "fit",
    ),
    "A memory for language models": (
        "serve",
        "chat",
        "mcp",
        "key",
    ),
    "Systems on real data": (
        "run",
        "show",
        "compare",
        "results",
        "data",
    ),
}


class Lazy(Nearest):
    """The commands of the table, each imported when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the table."""
        return [name for names in SECTIONS.values() for name in names]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of a name in the table, from the file of that name."""
        if cmd_name not in self.list_commands(ctx):
            return None
        found: click.Command = pkgutil.resolve_name(f"memspan.commands.{cmd_name}:{cmd_name}")
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """A section for each job."""
        for title, names in SECTIONS.items():
            found = {name: self.get_command(ctx, name) for name in names}
            with formatter.section(title):
                formatter.write_dl([(name, one.get_short_help_str(80)) for name, one in found.items() if one])


@click.group(cls=Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="memspan")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """See where the bytes go, spend them better, show what each byte bought."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; one clear line for an error, 2 for bad usage, 130 after Ctrl-C.

    Args:
        argv: arguments; None takes those of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    # Else torch's profiler and allocator write into the progress bars.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
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
        if debug or not told(error):
            raise
        code = 2 if isinstance(error, BadInput) else 1
        _say_error(error)
    sys.exit(code if isinstance(code, int) else 0)


def _say_error(error: BaseException) -> None:
    lines = [str(error) or type(error).__name__, *getattr(error, "__notes__", [])]
    click.echo(f"memspan: {lines[0]}", err=True)
    for line in lines[1:]:
        click.echo(f"  {line}", err=True)
