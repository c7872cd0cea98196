"""Where memspan keeps what it can fetch or compute again."""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder() -> Path:
    """The folder of downloads, features and trained models; it may not exist yet.

    ``MEMSPAN_CACHE`` where it is set, else the platform's cache folder of the user.

    Example:
        >>> import os
        >>> os.environ["MEMSPAN_CACHE"] = "/tmp/cache"
        >>> cache_folder().as_posix()
        '/tmp/cache'
        >>> del os.environ["MEMSPAN_CACHE"]
    """
    chosen = os.environ.get("MEMSPAN_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "memspan"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "memspan" / "Cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "memspan"
