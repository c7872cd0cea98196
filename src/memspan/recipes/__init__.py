"""One runnable file per system: data, our method, its rivals and a control, in bytes and quality.

``memspan run NAME`` runs one; copy the file, change it, and ``memspan run path/to/copy.py`` runs yours.
What every recipe needs (options, progress, seeds, resume, result files) is :mod:`memspan.recipes.engine`.
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
        if not module.ispkg and not module.name.startswith(("_", "engine"))
    )
