"""Names of a package that are loaded when first used, so that importing one part does not load the others."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module

__all__ = ["lazy_names"]


def lazy_names(
    package: str, homes: Mapping[str, str]
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package whose names live in its modules (PEP 562).

    Args:
        package: the package's ``__name__``.
        homes: name -> module inside the package that defines it.

    Example:
        >>> get, names = lazy_names("memspan.base", {"lazy_names": "lazy"})
        >>> get("lazy_names") is lazy_names
        True
    """

    def get(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return get, names
