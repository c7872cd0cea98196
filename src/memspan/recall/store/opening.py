"""A store by its address."""

from __future__ import annotations

import os
from typing import Any

from memspan.base import refuse
from memspan.data.embed import Embedder
from memspan.recall.store.interface import Store
from memspan.recall.store.sqlite import SQLiteStore

__all__ = ["open_store"]


def open_store(url: str | os.PathLike[str], embedder: Embedder, **options: Any) -> Store:
    """Open (and make, where missing) the store at an address.

    Args:
        url: ``sqlite:///file.db``, a plain path, or ``postgresql://user@host/database``.
        embedder: makes the vectors.
        options: of the backend: :class:`SQLiteStore` or ``PostgresStore``.

    Raises:
        BadInput: an address of another kind.
        ImportError: Postgres without the extra ``memspan[postgres]``.

    Example:
        >>> import tempfile
        >>> from memspan.data.embed import HashingEmbedder
        >>> store = open_store(tempfile.mkdtemp() + "/me.db", HashingEmbedder())
        >>> store.for_user("me").count()
        0
    """
    text = os.fspath(url)
    if text.startswith(("postgresql:", "postgres:")):
        from memspan.recall.store.postgres import PostgresStore

        return PostgresStore(text, embedder, **options)
    if "://" in text and not text.startswith("sqlite:///"):
        refuse("url", text, "use sqlite:///file.db, a path, or postgresql://...")
    return SQLiteStore(text, embedder, **options)
