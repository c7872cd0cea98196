"""The pages say what the code does: names, arguments, commands and options are looked up, examples run."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from memspan.commands import cli
from memspan.data import DataNotFound
from recall.scripted_server import ScriptedServer
from torchvision_schemas import import_torchvision

with contextlib.suppress(ImportError):  # beside CPU torch transformers is not imported without this
    import_torchvision()

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`(memspan [^`\n]+)`")


def _python(page: Path) -> list[str]:
    return [text for kind, text in _FENCE.findall(page.read_text("utf-8")) if kind == "python"]


def _blocks(language: str) -> list[Any]:
    params = []
    for page in PAGES:
        name = page.relative_to(ROOT).as_posix()
        found = [text for kind, text in _FENCE.findall(page.read_text("utf-8")) if kind == language]
        for place, text in enumerate(found, start=1):
            params.append(pytest.param(text, id=f"{name}-{place}"))
    return params


def _commands() -> list[Any]:
    params = []
    for page in PAGES:
        text = page.read_text("utf-8")
        fenced = [line for _, block in _FENCE.findall(text) for line in block.splitlines()]
        lines = [line.removeprefix("$ ").partition("  #")[0].strip() for line in fenced]
        lines = [line for line in lines if line.startswith("memspan ")] + _INLINE.findall(
            _FENCE.sub("", text)
        )
        for line in dict.fromkeys(lines):
            params.append(pytest.param(line, id=f"{page.name}: {line}"))
    return params


def _imported(tree: ast.Module) -> dict[str, Any]:
    """What the import statements of a block bind; one of a name that is not there raises."""
    bound: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in ("memspan", "torch"):
                    module = importlib.import_module(alias.name)
                    bound[alias.asname or alias.name.split(".")[0]] = module
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("memspan", "torch"):
            source = importlib.import_module(str(node.module))
            for alias in node.names:
                if not hasattr(source, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")
                bound[alias.asname or alias.name] = getattr(source, alias.name)
    return bound


def _made(tree: ast.Module, bound: dict[str, Any]) -> dict[str, type]:
    """The classes of names that stand for a new object: ``x = Class(...)``, ``with Class(...) as x``."""
    pairs: list[tuple[ast.expr | None, ast.expr]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            pairs.append((node.targets[0], node.value))
        elif isinstance(node, ast.With):
            pairs += [(item.optional_vars, item.context_expr) for item in node.items]
    made = {}
    for target, value in pairs:
        called = _value(value.func, bound, {}) if isinstance(value, ast.Call) else None
        if isinstance(target, ast.Name) and inspect.isclass(called):
            made[target.id] = called
    return made


def _value(node: ast.expr, bound: dict[str, Any], made: dict[str, type]) -> Any:
    """What an expression of names and attributes stands for; None where that is not told by imports."""
    if isinstance(node, ast.Name):
        return bound.get(node.id)
    if not isinstance(node, ast.Attribute):
        return None
    if isinstance(node.value, ast.Name) and node.value.id in made:
        kind = made[node.value.id]
        ours = [one for one in kind.__mro__ if one.__module__.split(".")[0] == "memspan"]
        there = hasattr(kind, node.attr) or any(
            node.attr in inspect.get_annotations(one)
            or re.search(rf"self\.{node.attr}\b", inspect.getsource(one))
            for one in ours
        )
        assert there or not ours, f"{kind.__name__} has no {node.attr}"
        found = getattr(kind, node.attr, None)
        return functools.partial(found, None) if inspect.isfunction(found) else None
    owner = _value(node.value, bound, made)
    return getattr(owner, node.attr) if inspect.ismodule(owner) or inspect.isclass(owner) else None


@pytest.mark.parametrize("text", _blocks("python"))
def test_an_example_names_what_there_is_and_calls_it_as_it_can_be_called(text: str) -> None:
    tree = ast.parse(text)
    bound = _imported(tree)
    made = _made(tree, bound)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            _value(node, bound, made)
        elif isinstance(node, ast.Call) and callable(called := _value(node.func, bound, made)):
            if any(isinstance(item, ast.Starred) for item in node.args):
                continue
            try:
                signature = inspect.signature(called)
            except ValueError:
                continue
            named = {item.arg: None for item in node.keywords if item.arg is not None}
            signature.bind_partial(*[None] * len(node.args), **named)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("from memspan.ledger import plann", ImportError),
        ("from memspan.training import peqa\npeqa.scale(model)", AttributeError),
        ("from memspan.ledger import plan\nplan(model, batch, optimiser=None)", TypeError),
        ("from memspan.ledger import Ledger\nwith Ledger() as led:\n    led.peek", AssertionError),
        ("from memspan.ledger import Ledger\nled = Ledger()\nled.mark(place='x')", TypeError),
    ],
)
def test_an_example_that_the_code_left_behind_is_caught(text: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        test_an_example_names_what_there_is_and_calls_it_as_it_can_be_called(text)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """A chat endpoint where the pages say that one is: its answers hold nothing."""
    with ScriptedServer('{"answer": "A", "facts": [], "thoughts": []}') as server:
        yield server.url


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if _python(page)], ids=lambda page: page.name)
def test_the_blocks_of_a_page_run_as_printed(
    page: Path, endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other, as a reader types them; an address of an endpoint is that of one that is there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEMSPAN_CACHE", str(tmp_path / "cache"))
    names: dict[str, Any] = {"__name__": "page"}
    for place, text in enumerate(_python(page), start=1):
        printed = text.replace("http://127.0.0.1:8000/v1", endpoint)
        try:
            exec(compile(printed, f"{page.name}, block {place}", "exec"), names)
        except DataNotFound as error:
            pytest.skip(f"{page.name} needs {error}")


@pytest.mark.parametrize("line", _commands())
def test_a_command_and_its_options_are_there(line: str) -> None:
    words = [word for word in shlex.split(line)[1:] if word not in ("...", "|")]
    command: click.Command = cli
    context = click.Context(cli)
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        name = words.pop(0)
        if not re.fullmatch(r"[a-z0-9-]+", name):  # NAME, path/to/recipe.py
            return
        found = command.get_command(context, name)
        assert found is not None, f"memspan has no {name}"
        command = found
    options = {"--help", "-h"} | {
        name for item in command.params for name in (*item.opts, *item.secondary_opts)
    }
    told = {word.partition("=")[0].strip("[],") for word in words if word.startswith("-")}
    assert told <= options, f"no such option: {sorted(told - options)}"
