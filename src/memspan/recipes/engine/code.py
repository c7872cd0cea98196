"""Which code a cell was measured by: the recipe, and every file of memspan that it imports, however far.

Imports are read from the source, those inside functions too, so that nothing has to be loaded and the answer
does not depend on what has been. A file that the recipe never reaches may change while its run is unfinished.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import inspect
import json
import types
from collections.abc import Callable, Iterable, Mapping, ValuesView
from pathlib import Path
from typing import Any

import memspan
from memspan.base.files import fingerprint

__all__ = ["code_fingerprints", "files_reached", "seen", "sources_called"]

# These show or carry results and change no number in a cell.
_NO_NUMBERS = ("report", "commands", "server")


def code_fingerprints(own: Iterable[Path], package: Path | None = None) -> dict[str, str]:
    """Checksums of a recipe's own files and of what it imports of memspan.

    A process reads a file of memspan once: what runs is what was there when it started.

    Args:
        own: the recipe's files.
        package: memspan's folder; None is the one that runs.
    """
    own = [path.resolve() for path in own]
    root = (package or Path(memspan.__file__).parent).resolve()
    mine = [fingerprint(path) for path in own]
    reached = [path for path in files_reached(own, root) if path not in own]
    others = {path.relative_to(root).as_posix(): seen(path, root)[0] for path in reached}
    return {"code of the recipe": fingerprint(mine), "code of memspan": fingerprint(others)}


def files_reached(own: Iterable[Path], package: Path) -> list[Path]:
    """The files of memspan that these import, directly or through others; results' dress is left out."""
    found: set[Path] = set()
    waiting = list(own)
    while waiting:
        path = waiting.pop()
        for one in seen(path, package)[1] if path.is_relative_to(package) else _imports(path, package):
            if one not in found and one.relative_to(package).parts[0] not in _NO_NUMBERS:
                found.add(one)
                waiting.append(one)
    return sorted(found)


@functools.cache
def seen(path: Path, package: Path) -> tuple[str, tuple[Path, ...]]:
    """The checksum of a file of memspan and the files that it imports, as this process found them."""
    return fingerprint(path), _imports(path, package)


def _imports(path: Path, package: Path) -> tuple[Path, ...]:
    """The files that one file's import statements name."""
    inside = path.is_relative_to(package)
    here = path.relative_to(package.parent).with_suffix("").parts if inside else ()
    found: set[Path] = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found |= _files(alias.name.split("."), package)
        elif isinstance(node, ast.ImportFrom):
            start = node.module.split(".") if node.module else []
            if node.level and not inside:
                continue  # a neighbour in the user's own folder: it is one of the recipe's own files
            if node.level:
                start = [
                    *here[: len(here) - node.level],
                    *start,
                ]  # ``pkg/__init__`` counts as ``pkg.__init__``
            for alias in node.names:
                found |= _files([*start, alias.name], package)
    return tuple(sorted(found))


def _files(parts: list[str], package: Path) -> set[Path]:
    """The files that importing ``a.b.c`` runs: each package's ``__init__`` on the way, then the module."""
    if parts[0] != package.name:
        return set()
    found, place = set(), package
    for part in ["", *parts[1:]]:
        place = place / part if part else place
        for file in (place / "__init__.py", place.with_suffix(".py")):
            if part and file.is_file():
                found.add(file)
    return found


def sources_called(*functions: Callable[..., Any]) -> dict[str, str]:
    """Source of the functions, and of every function and class that they name, theirs and memspan's.

    Constants that they read from their modules, from what encloses them or from a ``partial`` count too; what
    lies in other libraries does not.

    Example:
        >>> from memspan.base import nearest
        >>> found = sources_called(lambda: nearest("a", ["b"]))
        >>> "memspan.base.refusal.nearest" in found
        True
    """
    found: dict[str, str] = {}
    waiting: list[Any] = list(functions)
    seen: set[int] = set()
    homes = {"memspan"} | {_home(function) for function in functions}
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, functools.partial):
            values = {str(place): value for place, value in enumerate(thing.args)} | thing.keywords
            waiting += [
                thing.func,
                *_kept(found, f"partial of {getattr(thing.func, '__qualname__', '')}", values),
            ]
        elif isinstance(thing, types.MethodType | staticmethod | classmethod):
            waiting.append(thing.__func__)
        elif isinstance(thing, property):
            waiting += [part for part in (thing.fget, thing.fset) if part is not None]
        elif isinstance(thing, types.FunctionType | type) and _home(thing) in homes:
            name = f"{thing.__module__}.{thing.__qualname__}"
            try:
                found[name] = inspect.getsource(thing)
            except (OSError, TypeError):  # made at a prompt
                found[name] = name
            if isinstance(thing, type):
                waiting += [*thing.__mro__[1:], *vars(thing).values()]
            else:
                waiting += _kept(found, name, _read(thing))
    return found


def _home(thing: Any) -> str:
    """The outermost package that something was written in."""
    while isinstance(thing, functools.partial):
        thing = thing.func
    return (getattr(thing, "__module__", None) or type(thing).__module__).partition(".")[0]


def _kept(found: dict[str, str], name: str, values: Mapping[str, Any]) -> list[Any]:
    """Constants are noted; functions and classes, also inside tables, are given back to be looked at."""
    more: list[Any] = []
    for key, value in values.items():
        with contextlib.suppress(TypeError, ValueError):
            found[f"{name} reads {key}"] = json.dumps(value, sort_keys=True)
            continue
        items = value.values() if isinstance(value, Mapping) else value
        more += items if isinstance(items, list | tuple | set | frozenset | ValuesView) else [value]
    return more


def _read(function: types.FunctionType) -> dict[str, Any]:
    """What a function reads from around it, by name: globals, cells, and attributes of memspan's modules."""
    names: set[str] = set()
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        names |= set(code.co_names)
        codes += [one for one in code.co_consts if isinstance(one, types.CodeType)]
    values = {name: function.__globals__[name] for name in names if name in function.__globals__}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # a cell that nothing has filled yet
            values[name] = cell.cell_contents
    # ``from memspan.x import y`` inside the function: both names are among its names.
    modules = [value for value in values.values() if isinstance(value, types.ModuleType)]
    modules += [importlib.import_module(name) for name in names if name.startswith("memspan.")]
    for module in modules:
        if module.__name__.startswith("memspan"):
            values |= {
                f"{module.__name__}.{name}": vars(module)[name] for name in names if name in vars(module)
            }
    return {name: value for name, value in values.items() if not isinstance(value, types.ModuleType)}
