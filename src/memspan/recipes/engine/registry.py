"""Find recipes: those in this package, and any file or folder a user points to."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from memspan.base import BadInput, nearest, refuse
from memspan.base.files import fingerprint
from memspan.recipes import names
from memspan.recipes.engine.recipe import Recipe

__all__ = ["all_recipes", "find"]


def find(name: str) -> Recipe[Any]:
    """The recipe of this name, or the one in the Python file or folder at this path.

    Args:
        name: ``"memo"``, ``"path/to/recipe.py"``, or ``"path/to/folder"`` with an ``__init__.py``.

    Raises:
        BadInput: unknown name (the nearest are offered), or a module without ``RECIPE``.
        FileNotFoundError: no file at that path, or a folder without ``__init__.py``.
        ImportError: the recipe needs an extra that is not installed.

    Example:
        >>> find("no-such")
        Traceback (most recent call last):
        memspan.base.refusal.BadInput: recipe='no-such': ...
    """
    if name.endswith(".py") or "/" in name or (name not in names() and Path(name).is_dir()):
        module = _from_file(Path(name))
    else:
        known = names()
        if name not in known:
            refuse("recipe", name, f"{nearest(name, known)}; or give the path of your own")
        module = importlib.import_module(f"memspan.recipes.{name}")
    recipe = getattr(module, "RECIPE", None)
    if not isinstance(recipe, Recipe):
        refuse("recipe", name, "the file defines no RECIPE = Recipe(...)")
    return recipe


def all_recipes() -> tuple[list[Recipe[Any]], dict[str, str]]:
    """Every installed recipe, and the reason for each that cannot be imported."""
    found, failed = [], {}
    for name in names():
        try:
            found.append(find(name))
        except (ImportError, BadInput) as error:
            failed[name] = str(error)
    return found, failed


def _from_file(path: Path) -> ModuleType:
    folder = path.is_dir()
    path = path / "__init__.py" if folder else path
    if not path.is_file():
        raise FileNotFoundError(f"no recipe file at {path}")
    name = f"memspan_recipe_{fingerprint(str(path.resolve()).encode())[:16]}"
    # With its places to search the folder is a package: ``from .measure import run`` finds its own file.
    search = [str(path.parent)] if folder else None
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=search)
    if spec is None or spec.loader is None:
        refuse("recipe", str(path), "give a Python file, NAME.py, or a folder")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their annotations up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        for loaded in [one for one in sys.modules if one == name or one.startswith(f"{name}.")]:
            del sys.modules[loaded]
        raise
    return module
