"""Rankers that the recipes of ``recall`` compare: a question in, ids of turns out, best first."""

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

from memspan.base.rng import rng
from memspan.data.embed import Embedder
from memspan.recall.memorybank import MemoryBankPolicy
from memspan.recall.rank import BM25, fuse
from memspan.recall.records import Record
from memspan.recall.scm.stream import rank as scm_rank
from memspan.recall.store import SQLiteStore
from memspan.recall.tim import RuleExtractor
from memspan.recipes._recall_data import Conversation

__all__ = ["FTS5", "METHODS", "SIGN", "Ranker", "close_mem0", "open_mem0", "ranker", "spaced"]

SIGN = "[\u3040-\u30ff\u3400-\u9fff]"
METHODS = ("memorybank", "tim", "scm", "fts", "bm25", "minilm", "rrf", "mem0", "last window", "random")


@dataclass
class Ranker:
    """A method on one conversation.

    Attributes:
        rank: question, k -> ids of turns.
        held: bytes by category.
        close: gives files back.
    """

    rank: Callable[[str, int], list[str]]
    held: dict[str, int]
    close: Callable[[], None] = lambda: None


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
    if name in ("memorybank", "mem0"):
        return _stored(talk, embed) if name == "memorybank" else _mem0(talk, embed)
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
    if name == "scm":
        ages = np.arange(len(ids) + 1, 1, -1)

        def recent(query: str, k: int) -> list[str]:
            return [ids[i] for i in scm_rank(rows @ embed([query])[0], ages, min(k, 50), 0.995, 1.0)[0]]

        return Ranker(recent, held)
    assert name == "tim", name
    facts: list[tuple[str, str, float]] = []
    for turn in talk.turns:
        for fact in RuleExtractor()(turn.query, turn.response, turn.at, talk.user):
            facts.append((fact.text, turn.id, 1.0 if fact.source == "user" else 0.8))
    thoughts = embed([text for text, _, _ in facts])
    trust = np.array([weight for _, _, weight in facts])

    def thinking(query: str, k: int) -> list[str]:
        """Thoughts that stand out as much as turns do, then turns."""
        vector = embed([query])[0]
        scores = [(float(s), facts[i][1]) for i, s in enumerate(trust * (thoughts @ vector))] if facts else []
        scores += [(float(s), id) for s, id in zip(rows @ vector, ids, strict=True)]
        return list(dict.fromkeys(id for _, id in sorted(scores, key=lambda pair: -pair[0])))[:k]

    return Ranker(
        thinking, {**held, "store.thoughts": thoughts.nbytes + sum(len(f[0].encode()) for f in facts)}
    )


def _stored(talk: Conversation, embed: Embedder) -> Ranker:
    """The default policy on a real store."""
    stack = contextlib.ExitStack()
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    database = SQLiteStore(Path(folder) / "m.db", embed)
    stack.callback(database.close)
    store = database.for_user(talk.user)
    known = dict(
        zip(store.add([Record(t.text, t.at) for t in talk.turns]), [t.id for t in talk.turns], strict=True)
    )
    policy, now = MemoryBankPolicy(), talk.turns[-1].at

    def recalled(query: str, k: int) -> list[str]:
        return [known[hit.record.id] for hit in policy.recall(store, query, k, now, reinforce=False)]

    return Ranker(recalled, dict(store.stats()["bytes"]), stack.close)


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
