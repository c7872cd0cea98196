"""Where memories live: one interface, two backends (SQLite in one file, Postgres with pgvector)."""

from __future__ import annotations

from memspan.recall.store.interface import Stats, Store, UserStore

__all__ = ["Stats", "Store", "UserStore"]
