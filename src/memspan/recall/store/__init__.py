"""Where memories live: one interface, two backends (SQLite in one file, Postgres with pgvector)."""

from __future__ import annotations

from memspan.recall.store.interface import (
    DEFAULT_WEIGHTS,
    SEARCHED,
    Stats,
    Store,
    StoreBusy,
    StoreFull,
    StoreGone,
    UserStore,
)
from memspan.recall.store.opening import open_store
from memspan.recall.store.sqlite import SQLiteStore

__all__ = [
    "DEFAULT_WEIGHTS",
    "SEARCHED",
    "SQLiteStore",
    "Stats",
    "Store",
    "StoreBusy",
    "StoreFull",
    "StoreGone",
    "UserStore",
    "open_store",
]
