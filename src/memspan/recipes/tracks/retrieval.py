"""Rankers over a conversation: a question in, ids of turns out, best first.

Policies of ours are the shipped ones, told every turn through :class:`memspan.recall.Memory` as an
application tells it; rivals see the same texts and the same vectors.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import sqlite3
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from memspan.base import refuse
from memspan.base.rng import rng
from memspan.data.embed import Embedder
from memspan.recall.memory import Memory
from memspan.recall.rank import BM25, fuse
from memspan.recall.records import Message, Policy, Record
from memspan.recall.store import SQLiteStore
from memspan.recall.turns import hit_piece
from memspan.recipes.tracks.conversations import Conversation

__all__ = [
    "FTS5", "METHODS", "OURS", "SIGN", "Piece", "Ranker", "close_mem0", "open_mem0", "ranker", "remembered",
    "spaced",
]  # fmt: skip

SIGN = "[\u3040-\u30ff\u3400-\u9fff]"
OURS = ("memorybank", "tim", "scm")
METHODS = (*OURS, "fts", "bm25", "minilm", "rrf", "mem0", "last window", "random")


Piece = tuple[str, tuple[str, ...]]  # a text, ids of the turns behind it


@dataclass
class Ranker:
    """A method on one conversation.

    Attributes:
        rank: question, k -> ids of turns.
        held: bytes by category.
        close: gives files back.
        pieces: question, k -> what would be shown, with the ids of the turns behind each; policies alone.
        piece: one record so.
        memory: of a policy.
    """

    rank: Callable[[str, int], list[str]]
    held: dict[str, int]
    close: Callable[[], None] = lambda: None
    pieces: Callable[[str, int], list[Piece]] = lambda query, k: []
    piece: Callable[[Record], Piece] = lambda record: (record.text, ())
    memory: Memory | None = None


def spaced(text: str) -> str:
    """Runs of Chinese and Japanese signs as pairs between blanks, so that an index of words finds them.

    Example:
        >>> spaced("我喜欢 tea")
        ' 我喜 喜欢  tea'
    """

    def pairs(found: re.Match[str]) -> str:
        run = found[0]
        return f" {' '.join(map(''.join, pairwise(run))) or run} "

    return re.sub(f"{SIGN}+", pairs, text)


class FTS5:
    """SQLite's full-text search over texts: porter stems, every word of the question joined by OR."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._db = sqlite3.connect(":memory:")
        self._db.execute("CREATE VIRTUAL TABLE f USING fts5(t, tokenize = 'porter unicode61')")
        self._db.executemany(
            "INSERT INTO f(rowid, t) VALUES (?, ?)", [(i, spaced(text)) for i, text in enumerate(texts)]
        )

    def rank(self, query: str, k: int = 1000) -> list[int]:
        """Places, best first, ties to the earlier."""
        words = " OR ".join(f'"{word}"' for word in dict.fromkeys(re.findall(r"\w+", spaced(query.lower()))))
        if not words:
            return []
        sql = "SELECT rowid FROM f WHERE f MATCH ? ORDER BY bm25(f), rowid LIMIT ?"
        return [int(row[0]) for row in self._db.execute(sql, (words, k))]


def ranker(name: str, talk: Conversation, embed: Embedder) -> Ranker:
    """A method by name on one conversation.

    Raises:
        ImportError: ``mem0`` without the package.
    """
    texts, ids = [turn.text for turn in talk.turns], [turn.id for turn in talk.turns]
    text_bytes = sum(len(text.encode()) for text in texts)
    if name in OURS:
        return remembered(name, talk, embed)
    if name == "mem0":
        return _mem0(talk, embed)
    if name == "last window":
        return Ranker(lambda query, k: ids[::-1][:k], {"window": text_bytes})
    if name == "random":
        return Ranker(
            lambda query, k: [ids[i] for i in rng("random", query).permutation(len(ids))[:k]], {"none": 0}
        )
    if name == "bm25":
        bm25 = BM25(texts)
        return Ranker(lambda query, k: [ids[i] for i in bm25.top(query, k)], {"store.text": text_bytes})
    words = FTS5(texts)
    if name == "fts":
        return Ranker(lambda query, k: [ids[i] for i in words.rank(query, k)], {"store.text": text_bytes})
    rows = embed(texts)
    held = {"store.text": text_bytes, "store.vectors": rows.nbytes}

    def near(query: str, k: int) -> list[int]:
        return [int(i) for i in np.argsort(-(rows @ embed([query])[0]), kind="stable")[:k]]

    if name == "minilm":
        return Ranker(lambda query, k: [ids[i] for i in near(query, k)], held)
    if name == "rrf":

        def fused(query: str, k: int) -> list[str]:
            both = fuse({"words": words.rank(query), "vector": near(query, len(ids))})
            return [ids[i] for i, _ in both[:k]]

        return Ranker(fused, held)
    refuse("name", name, f"one of {', '.join(METHODS)}")


def remembered(policy: str | Policy, talk: Conversation, embed: Embedder) -> Ranker:
    """A shipped policy on a store of its own, told every turn as an application tells it."""
    stack = contextlib.ExitStack()
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    database = SQLiteStore(Path(folder) / "m.db", embed)
    stack.callback(database.close)
    memory = Memory(database, talk.user, policy)
    behind: dict[str, list[str]] = {}
    for turn in talk.turns:
        said = [Message(role="user", content=turn.query)] if turn.query else []
        said += [Message(role="assistant", content=turn.response)] if turn.response else []
        for id in memory.observe_messages(said, turn.at, turn.session):
            behind.setdefault(id, []).append(turn.id)
    now = talk.turns[-1].at

    def piece(record: Record) -> Piece:
        ids = record.evidence if record.kind == "thought" else (record.id,)
        told = tuple(turn for id in ids for turn in behind.get(id, ()))
        return f"{record.created_at:%Y-%m-%d} {hit_piece(record).text}", told

    def pieces(query: str, k: int) -> list[Piece]:
        return [piece(hit.record) for hit in memory.recall(query, k, at=now)]

    def rank(query: str, k: int) -> list[str]:
        return list(dict.fromkeys(id for _, ids in pieces(query, k) for id in ids))[:k]

    return Ranker(rank, dict(memory.store.stats()["bytes"]), stack.close, pieces, piece, memory)


def open_mem0(folder: Path, embed: Embedder) -> Any:
    """mem0 on files in ``folder`` with our embedder, without telemetry; ``infer=False`` needs no model.

    Even when switched off, mem0's telemetry opens a client with a thread of its own at every call, and never
    closes it; so its calls are replaced by nothing, which costs mem0 no quality and spares it time.

    Raises:
        ImportError: mem0 is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.update(MEM0_TELEMETRY="False", MEM0_DIR=str(folder / "home"))
    os.environ.setdefault("OPENAI_API_KEY", "unused")  # its model's client is made, and never called
    main: Any = importlib.import_module("mem0.memory.main")
    main.capture_event, main.mem0_dir = (lambda *_, **__: None), str(folder / "home")
    files = {"path": str(folder / "qdrant"), "embedding_model_dims": embed.dim, "on_disk": True}
    memory = main.Memory.from_config(
        {
            "vector_store": {"provider": "qdrant", "config": files},
            "history_db_path": str(folder / "history.db"),
        }
    )
    memory.embedding_model = SimpleNamespace(
        embed=lambda text, *_, **__: [float(x) for x in embed([text])[0]],
        config=SimpleNamespace(embedding_dims=embed.dim),
    )
    return memory


def close_mem0(memory: Any) -> None:
    """Close what mem0 itself leaves open: its two vector stores and its history."""
    for store in (memory.vector_store, getattr(memory, "_telemetry_vector_store", None)):
        if store is not None:
            store.client.close()
    memory.db.close()


def _mem0(talk: Conversation, embed: Embedder) -> Ranker:
    """mem0 without a model (``infer=False``), over its own store and the same vectors."""
    stack = contextlib.ExitStack()
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    memory = open_mem0(folder, embed)
    stack.callback(close_mem0, memory)
    for turn in talk.turns:
        memory.add(turn.text, user_id="u", infer=False, metadata={"turn": turn.id})

    def found(query: str, k: int) -> list[str]:
        hits = memory.search(query, user_id="u", limit=k)["results"]
        return list(dict.fromkeys(hit["metadata"]["turn"] for hit in hits))

    held = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return Ranker(found, {"store.files": held}, stack.close)
