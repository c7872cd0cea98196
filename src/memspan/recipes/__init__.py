"""One runnable file or folder per system: data, our method, its rivals and a control, in bytes and quality.

``memspan run NAME`` runs one; copy it, change it, and ``memspan run path/to/copy`` runs yours. A folder holds
the story and ``RECIPE`` (``__init__``), options and cells (``measure``), claims and figures (``claims``).
What every recipe needs (options, progress, seeds, resume, result files) is :mod:`memspan.recipes.engine`;
what several measure the same way is :mod:`memspan.recipes.tracks`.
"""

from __future__ import annotations

import pkgutil

__all__ = ["names"]


def names() -> list[str]:
    """Names of the recipes that are installed, found in this folder; imports none of them.

    Example:
        >>> "engine" in names()
        False
    """
    return sorted(
        module.name
        for module in pkgutil.iter_modules(__path__)
        if not module.name.startswith("_") and module.name not in ("engine", "tracks")
    )
