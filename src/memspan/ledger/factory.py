"""A model builder and its example batch from the user's own file."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from memspan.base import refuse
from memspan.base.parallel import OWN_FILE
from memspan.ledger.step import Loss

__all__ = ["Factory", "load_factory"]


class Factory(NamedTuple):
    """What :func:`load_factory` gives: the arguments that :func:`plan` needs, and the longest sequence."""

    build_model: Callable[[], nn.Module]
    batch: Any
    loss: Loss | None = None
    longest: int | None = None


def load_factory(where: str) -> Factory:
    """Model builder and example batch from the user's own file.

    The file is run, as ``python FILE`` would.

    Args:
        where: ``"path/to/file.py:function"``; the function takes nothing and returns
            ``(build_model, example_batch)`` or ``(build_model, example_batch, loss)``.

    Raises:
        BadInput: no such file or function, or something else is returned.

    Example:
        >>> load_factory("model.py")
        Traceback (most recent call last):
        memspan.base.refusal.BadInput: model='model.py': write path/to/file.py:function, where function()
        returns (build_model, example_batch) or (build_model, example_batch, loss)
    """
    usage = "function() returns (build_model, example_batch) or (build_model, example_batch, loss)"
    name, colon, function = where.rpartition(":")
    path = Path(name)
    if not colon or not function.isidentifier() or path.suffix != ".py":
        refuse("model", where, f"write path/to/file.py:function, where {usage}")
    if not path.is_file():
        refuse("model", where, f"there is no file {path}; the part before the colon is a path")
    spec = importlib.util.spec_from_file_location(f"{OWN_FILE}{path.stem}", path)
    if spec is None or spec.loader is None:
        refuse("model", where, f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.resolve().parent))
    if not callable(getattr(module, function, None)):
        offered = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        refuse("model", where, f"{path} has no function {function}; it has: {', '.join(offered) or 'none'}")
    made = getattr(module, function)()
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not callable(made[0]):
        refuse("model", where, f"{usage}, but it returned {type(made).__name__}")
    return Factory(*made)
