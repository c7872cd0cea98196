"""Long-term memory for applications of language models: local, inspectable, per user.

One store (:mod:`memspan.recall.store`: SQLite in one file, or Postgres), policies over it that say what is
kept, recalled and forgotten (MemoryBank, Think-in-Memory, Self-Controlled Memory), and :class:`Memory`, which
binds one user's handle, a policy and an embedder together.

Names are loaded when first used, so that importing this room loads no model and opens no file.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memspan.recall.records import Forgotten, Hit, Message, Policy, Record
    from memspan.recall.store import SQLiteStore, Store, StoreBusy, StoreFull, UserStore, open_store

_HOMES = {
    "Forgotten": "records",
    "Hit": "records",
    "Message": "records",
    "Policy": "records",
    "Record": "records",
    "SQLiteStore": "store",
    "Store": "store",
    "StoreBusy": "store",
    "StoreFull": "store",
    "UserStore": "store",
    "open_store": "store",
}

__all__ = [
    "Forgotten",
    "Hit",
    "Message",
    "Policy",
    "Record",
    "SQLiteStore",
    "Store",
    "StoreBusy",
    "StoreFull",
    "UserStore",
    "open_store",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
