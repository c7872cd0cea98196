"""Find recipes: those in this package, and any file a user points to."""

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
    """The recipe of this name, or the one in the Python file at this path.

    Args:
        name: ``"memo"``, or ``"path/to/recipe.py"``.

    Raises:
        BadInput: unknown name (the nearest are offered), or a module without ``RECIPE``.
        FileNotFoundError: no file at that path.
        ImportError: the recipe needs an extra that is not installed.

    Example:
        >>> find("no-such")
        Traceback (most recent call last):
        memspan.base.refusal.BadInput: recipe='no-such': ...
    """
    if name.endswith(".py") or "/" in name:
        module = _from_file(Path(name))
    else:
        known = names()
        if name not in known:
            refuse("recipe", name, f"{nearest(name, known)}; or give the path of a recipe.py")
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
    if not path.is_file():
        raise FileNotFoundError(f"no recipe file at {path}")
    name = f"memspan_recipe_{fingerprint(str(path.resolve()).encode())[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        refuse("recipe", str(path), "give a Python file, NAME.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their annotations up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
