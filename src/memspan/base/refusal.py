"""Refuse bad input at the door, with the argument's name, the value seen and the remedy."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType
from typing import Any, NoReturn

__all__ = ["BadInput", "nearest", "optional", "refuse"]


class BadInput(ValueError):
    """An argument that cannot be used; the message names it, shows its value and says what to do."""

    def __init__(self, argument: str, value: object, remedy: str) -> None:
        self.argument, self.value, self.remedy = argument, value, remedy
        super().__init__(f"{argument}={_short(value)}: {remedy}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.argument, self.value, self.remedy)


def refuse(argument: str, value: object, remedy: str) -> NoReturn:
    """Raise :class:`BadInput` for ``argument``.

    Args:
        argument: the argument's name as the caller wrote it.
        value: the value seen.
        remedy: what is allowed, and what to do.

    Raises:
        BadInput: always.

    Example:
        >>> refuse("bits", 5, "use 1, 2, 3, 4 or 8")
        Traceback (most recent call last):
        memspan.base.refusal.BadInput: bits=5: use 1, 2, 3, 4 or 8
    """
    raise BadInput(argument, value, remedy)


def nearest(name: str, known: Iterable[str]) -> str:
    """A clause that offers the known names nearest to ``name``.

    Example:
        >>> nearest("mem", ["memo", "ledger"])
        'did you mean memo? Known: ledger, memo'
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    offer = f"did you mean {' or '.join(close)}? " if close else ""
    return f"{offer}Known: {', '.join(names) or 'none'}"


def optional(module: str, extra: str) -> ModuleType:
    """Import a module that belongs to an optional extra.

    Args:
        module: dotted name of the module.
        extra: the extra of memspan that installs it.

    Returns:
        The imported module.

    Raises:
        ImportError: with the command that installs the extra.

    Example:
        >>> optional("json", extra="recipes").dumps([1])
        '[1]'
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module} is needed here ({error}); install it with: pip install 'memspan[{extra}]'"
        ) from error


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
