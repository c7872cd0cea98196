"""Long-term memory for applications of language models: local, inspectable, per user.

One store (:mod:`memspan.recall.store`: SQLite in one file, or Postgres), policies over it that say what is
kept, recalled and forgotten (MemoryBank, Think-in-Memory, Self-Controlled Memory), and :class:`Memory`, which
binds one user's handle, a policy and an embedder together.

Names are loaded when first used, so that importing this room loads no model and opens no file.
"""

from typing import TYPE_CHECKING

from memspan.base.lazy import lazy_names

if TYPE_CHECKING:
    from memspan.recall.chat import ChatClient, LocalChat, OpenAIEmbedder
    from memspan.recall.memory import Memory
    from memspan.recall.memorybank import MemoryBankPolicy, Portrait
    from memspan.recall.pack import Packed, pack_prompt
    from memspan.recall.records import Forgotten, Hit, Message, Plan, Policy, Record
    from memspan.recall.scm import SCMPolicy, SelfControlledMemory, SummarizeLong
    from memspan.recall.store import SQLiteStore, Store, StoreBusy, StoreFull, UserStore, open_store
    from memspan.recall.tim import TiMPolicy

_HOMES = {
    "ChatClient": "chat",
    "Forgotten": "records",
    "Hit": "records",
    "LocalChat": "chat",
    "Memory": "memory",
    "MemoryBankPolicy": "memorybank",
    "Message": "records",
    "OpenAIEmbedder": "chat",
    "Packed": "pack",
    "Plan": "records",
    "Policy": "records",
    "Portrait": "memorybank",
    "Record": "records",
    "SCMPolicy": "scm",
    "SQLiteStore": "store",
    "SelfControlledMemory": "scm",
    "Store": "store",
    "StoreBusy": "store",
    "StoreFull": "store",
    "SummarizeLong": "scm",
    "TiMPolicy": "tim",
    "UserStore": "store",
    "open_store": "store",
    "pack_prompt": "pack",
}

__all__ = [
    "ChatClient",
    "Forgotten",
    "Hit",
    "LocalChat",
    "Memory",
    "MemoryBankPolicy",
    "Message",
    "OpenAIEmbedder",
    "Packed",
    "Plan",
    "Policy",
    "Portrait",
    "Record",
    "SCMPolicy",
    "SQLiteStore",
    "SelfControlledMemory",
    "Store",
    "StoreBusy",
    "StoreFull",
    "SummarizeLong",
    "TiMPolicy",
    "UserStore",
    "open_store",
    "pack_prompt",
]


__getattr__, __dir__ = lazy_names(__name__, _HOMES)
