"""A torchvision that was built for another torch: every text network fails for want of it; none needs it."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

__all__ = ["broken_torchvision_hidden"]


@contextlib.contextmanager
def broken_torchvision_hidden(transformers: Any) -> Iterator[str]:
    """Load without a torchvision that was built for another torch.

    transformers imports torchvision wherever it is installed; beside a torch it was not built for that import
    raises RuntimeError, and no text network loads. A torchvision that works stays in its place.

    Args:
        transformers: the module; it is asked again what is installed.

    Yields:
        What is wrong with it and what to do, or "" where there is nothing to hide.
    """
    try:
        importlib.import_module("torchvision")
    except ImportError:
        pass
    except (RuntimeError, AttributeError):
        here, torch = version("torchvision"), version("torch")
        told = f"torchvision {here} was built for another torch than {torch}: install the build that fits it"
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.modules["torchvision"] = None  # type: ignore[assignment]  # "not installed", while this lasts
        for ask in ("is_torchvision_available", "is_torchvision_v2_available"):
            known: Any = getattr(transformers.utils.import_utils, ask, None)
            if hasattr(known, "cache_clear"):
                known.cache_clear()
        try:
            yield told
        finally:
            sys.modules.pop("torchvision", None)
        return
    yield ""
