"""Recall without a language model: the store's search against its parts and mem0, on LoCoMo.

Every turn of a LoCoMo conversation is one memory (``DATE SPEAKER: WORDS CAPTION``) of its session, every
conversation one user, and a question of categories 1 to 4 asks for the turns that its authors named as
evidence (1,531 questions name one or more that exist). All methods see the same texts and the same MiniLM
vectors; mem0 runs with ``infer=False``.

The default weights were set by hand. ``by_context`` shows how much they matter: all weights of neighbours
and sessions times 0, a half, 1 and 1.5, on both halves of the MemoryBank dialogues' users and on LoCoMo.
``small_talk`` is the share of 100 lines of small talk and world knowledge (``small_talk.txt``; the floor was
set on the first half) for which anything of a MemoryBank user would be sent to a model, and the share of the
56 questions for which nothing is.

Differences are paired by question; their 95 % intervals resample whole conversations (10). Figures go to
``benchmarks/results/recall_locomo.json``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from memspan.base.files import atomic_write
from memspan.data import load
from memspan.data.embed import MiniLMEmbedder
from memspan.recall import Memory, Record, SQLiteStore
from memspan.recall.rank import BM25, fuse
from memspan.recall.store import DEFAULT_WEIGHTS
from memspan.recipes.tracks.retrieval import FTS5, close_mem0, open_mem0
from memspan.report.metrics import hit_at_k, ndcg, recall_at_k
from memspan.report.stats import bootstrap

RESULT = Path(__file__).parent / "results" / "recall_locomo.json"
CONTEXT = (0.0, 0.5, 1.0, 1.5)
METRICS = ("recall@5", "recall@10", "ndcg@10", "hit@6")
Talk = tuple[list[str], list[str], list[tuple[str, set[int]]]]  # texts, their sessions, questions
Search = Callable[[str, int], list[int]]  # question, k -> places of turns, best first


def _torchvision() -> None:
    """Beside a CPU build of torch its wheel imports only with operators declared first, as the tests do."""
    if importlib.util.find_spec("torchvision"):
        sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
        from torchvision_schemas import import_torchvision

        import_torchvision()


class Cached:
    """An embedder that embeds each text once, and keeps the vectors in a file when one is named."""

    def __init__(self, file: Path | None) -> None:
        self.inner = MiniLMEmbedder(batch_size=64)
        self.dim, self.id = self.inner.dim, self.inner.id
        self.file = file
        self.known: dict[str, NDArray[np.float32]] = {}
        if file is not None and file.exists():
            with np.load(file) as held:
                self.known = dict(zip(held["texts"].tolist(), held["rows"], strict=True))

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        new = sorted({text for text in texts if text not in self.known})
        if new:
            self.known.update(zip(new, self.inner(new), strict=True))
            if self.file is not None and len(new) > 100:
                np.savez(
                    self.file, texts=np.array(list(self.known)), rows=np.stack(list(self.known.values()))
                )
        return np.stack([self.known[text] for text in texts])


def locomo() -> list[Talk]:
    """For each conversation its turns as texts, their sessions, and questions with the places of evidence."""
    found = []
    for sample in json.loads(load("locomo")["locomo10"].read_text()):
        talk, texts, sessions, places = sample["conversation"], [], [], {}
        for number in range(1, 100):
            for turn in talk.get(f"session_{number}", []):
                places[turn["dia_id"]] = len(texts)
                sessions.append(f"session {number}")
                caption = f" {turn['blip_caption']}" if turn.get("blip_caption") else ""
                texts.append(
                    f"{talk[f'session_{number}_date_time']} {turn['speaker']}: {turn['text']}{caption}"
                )
        questions = [
            (qa["question"], {places[id] for id in qa["evidence"] if id in places})
            for qa in sample["qa"]
            if qa["category"] != 5
        ]
        found.append((texts, sessions, [(question, gold) for question, gold in questions if gold]))
    return found


def gvd() -> list[Talk]:
    """The same of the English MemoryBank dialogues."""
    data = load("memorybank")
    bank = json.loads(data["memory_bank_en"].read_text())
    labelled = [json.loads(line) for line in data["evidence_en"].read_text().splitlines()]
    found = []
    for name, person in bank.items():
        texts, sessions, places = [], [], {}
        for date, turns in person["history"].items():
            for number, turn in enumerate(turns):
                places[date, number] = len(texts)
                sessions.append(date)
                texts.append(
                    f"Conversation content on {date}: [|User|]: {turn['query']}; [|AI|]: {turn['response']}"
                )
        questions = [
            (one["question"], {places[e["date"], e["turn"]] for e in one["evidence"]})
            for one in labelled
            if one["user"].strip() == name.strip()
        ]
        if questions:
            found.append((texts, sessions, questions))
    return found


def ours(
    texts: Sequence[str],
    embed: Cached,
    folder: Path,
    stack: ExitStack,
    sessions: Sequence[str],
    weights: dict[str, float] | None = None,
) -> Search:
    """The store, as a user has it."""
    store = SQLiteStore(folder / "store.db", embed, dtype="float16")
    stack.callback(store.close)
    user = store.for_user(f"user {len(store.users())}")
    begin = datetime(2023, 1, 1, tzinfo=UTC)
    ids = user.add(
        [
            Record(text, begin + timedelta(minutes=n), source={"session": session})
            for n, (text, session) in enumerate(zip(texts, sessions, strict=True))
        ]
    )
    place = {id: n for n, id in enumerate(ids)}

    def search(question: str, k: int) -> list[int]:
        return [place[hit.record.id] for hit in user.search(question, k=k, weights=weights)]

    return search


def bm25(texts: Sequence[str]) -> Search:
    return BM25(texts).top


def rrf(texts: Sequence[str], embed: Cached) -> Search:
    """Words by FTS5 and vectors, fused by reciprocal rank."""
    words, rows = FTS5(texts), embed(texts)

    def search(question: str, k: int) -> list[int]:
        near = np.argsort(-(rows @ embed([question])[0]), kind="stable")
        both = fuse({"words": words.rank(question), "vector": [int(place) for place in near]})
        return [place for place, _ in both[:k]]

    return search


def mem0(texts: Sequence[str], embed: Cached, folder: Path, stack: ExitStack, **_: Any) -> Search:
    """mem0 as it comes, without its language model and its telemetry, with our embedder."""
    memory = open_mem0(folder, embed)
    stack.callback(close_mem0, memory)
    for n, text in enumerate(texts):
        memory.add(text, user_id="user", infer=False, metadata={"place": n})

    def search(question: str, k: int) -> list[int]:
        return [r["metadata"]["place"] for r in memory.search(question, user_id="user", limit=k)["results"]]

    return search


def scores(search: Search, questions: Sequence[tuple[str, set[int]]]) -> list[list[float]]:
    found = []
    for question, gold in questions:
        ranked = search(question, 10)
        found.append([recall_at_k(ranked, gold, 5), recall_at_k(ranked, gold, 10), ndcg(ranked, gold, 10),
                      hit_at_k(ranked, gold, 6)])  # fmt: skip
    return found


def scaled(context: float) -> dict[str, float]:
    """The default weights with those of what stands around a turn multiplied."""
    own = ("words", "vector")
    return {name: weight * (1 if name in own else context) for name, weight in DEFAULT_WEIGHTS.items()}


def on_gvd(embed: Cached) -> dict[str, dict[str, list[float]]]:
    """Metrics on both halves of the MemoryBank users, by how much the context weighs."""
    talks = gvd()
    halves = {"first half of the users": talks[::2], "second half": talks[1::2]}
    return {
        name: {
            str(context): np.mean(
                [
                    row for talk in some
                    for row in on_files(partial(ours, embed=embed, weights=scaled(context)), talk)
                ],
                axis=0,
            ).round(4).tolist()
            for context in CONTEXT
        }
        for name, some in halves.items()
    }  # fmt: skip


def small_talk(embed: Cached) -> dict[str, Any]:
    """How often the default policy would send anything for what needs no memory, and what that costs."""
    lines = (Path(__file__).parent / "small_talk.txt").read_text(encoding="utf-8").split("\n")
    lines = [line for line in lines if line]
    sent: list[list[bool]] = []
    kept: list[bool] = []
    for texts, sessions, questions in gvd():
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            store = SQLiteStore(Path(folder) / "store.db", embed)
            stack.callback(store.close)
            memory = Memory(store, "user")
            begin = datetime(2023, 1, 1, tzinfo=UTC)
            memory.store.add(
                [
                    Record(text, begin + timedelta(minutes=n), source={"session": session})
                    for n, (text, session) in enumerate(zip(texts, sessions, strict=True))
                ]
            )
            sent.append([bool(memory.prompt(line)) for line in lines])
            kept += [bool(memory.prompt(question)) for question, _ in questions]
    half = len(lines) // 2
    return {
        "lines": len(lines),
        "recalled on the first half": round(float(np.mean([row[:half] for row in sent])), 4),
        "recalled on the second half": round(float(np.mean([row[half:] for row in sent])), 4),
        "questions with nothing recalled": round(1 - float(np.mean(kept)), 4),
    }


def on_files(make: Callable[..., Search], talk: Talk) -> list[list[float]]:
    """Scores of a method that keeps its files in a folder of its own, and is closed before it goes."""
    texts, sessions, questions = talk
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        return scores(make(texts, folder=Path(folder), stack=stack, sessions=sessions), questions)


def measure(embed: Cached) -> dict[str, Any]:
    conversations = locomo()
    methods: dict[str, Callable[..., Search]] = {
        "ours": partial(ours, embed=embed),
        "words without stop words": partial(ours, embed=embed, weights={"words": 1.0}),
        "BM25": lambda texts, **_: bm25(texts),
        "dense": partial(ours, embed=embed, weights={"vector": 1.0}),
        "RRF": lambda texts, **_: rrf(texts, embed),
    }
    swept: dict[float, list[list[float]]] = {context: [] for context in CONTEXT}
    if importlib.util.find_spec("mem0"):
        methods["mem0"] = partial(mem0, embed=embed)
    rows: dict[str, list[list[float]]] = {name: [] for name in methods}
    units: list[int] = []
    for number, talk in enumerate(conversations):
        units += [number] * len(talk[2])
        for name, make in methods.items():
            begin = time.perf_counter()
            rows[name] += on_files(make, talk)
            print(f"conversation {number}: {name} {time.perf_counter() - begin:.1f} s", flush=True)
        for context in CONTEXT:
            make = partial(ours, embed=embed, weights=scaled(context))
            swept[context] += rows["ours"][-len(talk[2]) :] if context == 1 else on_files(make, talk)
    table = {
        name: dict(zip(METRICS, np.mean(value, axis=0).round(4).tolist(), strict=True))
        for name, value in rows.items()
    }
    differences: dict[str, dict[str, dict[str, float]]] = {}
    held = True
    for name in list(methods)[1:]:
        gap = np.array(rows["ours"]) - np.array(rows[name])
        differences[name] = {}
        for column, metric in enumerate(METRICS):
            interval = bootstrap(gap[:, column], units=units, samples=2000)
            differences[name][metric] = {
                "mean": round(interval.mean, 4),
                "low": round(interval.low, 4),
                "high": round(interval.high, 4),
            }
            held &= interval.mean >= 0 and interval.low > -0.02
    return {
        "questions": len(units),
        "turns": sum(len(talk[0]) for talk in conversations),
        "by_context": {
            str(context): np.mean(rows, axis=0).round(4).tolist() for context, rows in swept.items()
        },
        "methods": table,
        "ours_minus": differences,
        "holds": held,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vectors", type=Path, default=None, help="file that keeps vectors between runs")
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    _torchvision()
    embed = Cached(options.vectors)
    result = {
        "benchmark": "recall_locomo",
        "claim": "the default search is at or above its parts, BM25, RRF and mem0 (infer=False) in"
        " recall@5, recall@10, nDCG@10 and hit@6: mean difference >= 0, lower end of the 95 %"
        " interval > -.02",
        "setting": {"k": 10, "embedder": embed.id, "weights": dict(DEFAULT_WEIGHTS)},
        "environment": {"python": platform.python_version(), "machine": platform.machine(), "device": "cpu"},
        "figures": measure(embed) | {"memorybank": on_gvd(embed), "small_talk": small_talk(embed)},
    }
    atomic_write(options.out, json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["figures"], indent=2))


if __name__ == "__main__":
    main()
