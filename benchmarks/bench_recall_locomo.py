"""Recall without a language model: the store's search against its parts and mem0, on LoCoMo.

Every turn of a LoCoMo conversation is one memory (``DATE SPEAKER: WORDS CAPTION``), every conversation one
user, and a question of categories 1 to 4 asks for the turns that its authors named as evidence (1,531
questions name one or more that exist). All methods see the same texts and the same MiniLM vectors; mem0
runs with ``infer=False``.

The weight of the vector list is chosen on other data: the English MemoryBank dialogues (GVD), 56 labelled
questions, mean of recall@5, recall@10 and nDCG@10. So few questions cannot tell neighbouring weights apart,
so the rule is the one-standard-error rule (Hastie, Tibshirani, Friedman, section 7.10): of the weights
within one standard error of the best the smallest, which leans most on words. ``--choose`` prints it.
``default_is_chosen`` says whether the store's default is that weight; the figures of all weights on LoCoMo
stand beside it.

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
from memspan.recall import Record, SQLiteStore
from memspan.recall.rank import BM25
from memspan.recall.store import DEFAULT_WEIGHTS
from memspan.recipes._recall_methods import close_mem0, open_mem0
from memspan.report.metrics import ndcg, recall_at_k
from memspan.report.stats import bootstrap

RESULT = Path(__file__).parent / "results" / "recall_locomo.json"
GRID = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
METRICS = ("recall@5", "recall@10", "ndcg@10")
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


def locomo() -> list[tuple[list[str], list[tuple[str, set[int]]]]]:
    """For each conversation its turns as texts, and its questions with the places of their evidence."""
    found = []
    for sample in json.loads(load("locomo")["locomo10"].read_text()):
        talk, texts, places = sample["conversation"], [], {}
        for number in range(1, 100):
            for turn in talk.get(f"session_{number}", []):
                places[turn["dia_id"]] = len(texts)
                caption = f" {turn['blip_caption']}" if turn.get("blip_caption") else ""
                texts.append(
                    f"{talk[f'session_{number}_date_time']} {turn['speaker']}: {turn['text']}{caption}"
                )
        questions = [
            (qa["question"], {places[id] for id in qa["evidence"] if id in places})
            for qa in sample["qa"]
            if qa["category"] != 5
        ]
        found.append((texts, [(question, gold) for question, gold in questions if gold]))
    return found


def gvd() -> list[tuple[list[str], list[tuple[str, set[int]]]]]:
    """The same of the English MemoryBank dialogues."""
    data = load("memorybank")
    bank = json.loads(data["memory_bank_en"].read_text())
    labelled = [json.loads(line) for line in data["evidence_en"].read_text().splitlines()]
    found = []
    for name, person in bank.items():
        texts, places = [], {}
        for date, turns in person["history"].items():
            for number, turn in enumerate(turns):
                places[date, number] = len(texts)
                texts.append(
                    f"Conversation content on {date}: [|User|]: {turn['query']}; [|AI|]: {turn['response']}"
                )
        questions = [
            (one["question"], {places[e["date"], e["turn"]] for e in one["evidence"]})
            for one in labelled
            if one["user"].strip() == name.strip()
        ]
        if questions:
            found.append((texts, questions))
    return found


def ours(texts: Sequence[str], embed: Cached, folder: Path, stack: ExitStack, **weights: float) -> Search:
    """The store, as a user has it."""
    store = SQLiteStore(folder / "store.db", embed, dtype="float16")
    stack.callback(store.close)
    user = store.for_user(f"user {len(store.users())}")
    begin = datetime(2023, 1, 1, tzinfo=UTC)
    ids = user.add([Record(text, begin + timedelta(minutes=n)) for n, text in enumerate(texts)])
    place = {id: n for n, id in enumerate(ids)}

    def search(question: str, k: int) -> list[int]:
        return [place[hit.record.id] for hit in user.search(question, k=k, weights=weights or None)]

    return search


def bm25(texts: Sequence[str]) -> Search:
    return BM25(texts).top


def mem0(texts: Sequence[str], embed: Cached, folder: Path, stack: ExitStack) -> Search:
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
        found.append([recall_at_k(ranked, gold, 5), recall_at_k(ranked, gold, 10), ndcg(ranked, gold, 10)])
    return found


def choose(embed: Cached) -> tuple[float, dict[str, list[float]]]:
    """The vector list's weight on the MemoryBank dialogues: metrics, their mean and its error by weight."""
    table: dict[str, list[float]] = {}
    means, errors = {}, {}
    for weight in GRID:
        rows: list[list[float]] = []
        for texts, questions in gvd():
            rows += on_files(partial(ours, embed=embed, words=1.0, vector=weight), texts, questions)
        each = np.mean(rows, axis=1)
        means[weight], errors[weight] = float(each.mean()), float(each.std(ddof=1) / np.sqrt(len(each)))
        table[str(weight)] = [*np.mean(rows, axis=0), means[weight], errors[weight]]
    best = max(GRID, key=lambda weight: means[weight])
    chosen = min(weight for weight in GRID if means[weight] >= means[best] - errors[best])
    return chosen, {weight: [round(value, 4) for value in row] for weight, row in table.items()}


def on_files(
    make: Callable[..., Search], texts: Sequence[str], questions: Sequence[tuple[str, set[int]]]
) -> list[list[float]]:
    """Scores of a method that keeps its files in a folder of its own, and is closed before it goes."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        return scores(make(texts, folder=Path(folder), stack=stack), questions)


def measure(embed: Cached, chosen: float) -> dict[str, Any]:
    conversations = locomo()
    methods: dict[str, Callable[..., Search]] = {
        "ours": partial(ours, embed=embed, words=1.0, vector=chosen),
        "words without stop words": partial(ours, embed=embed, words=1.0, vector=0.0),
        "BM25": lambda texts, **_: bm25(texts),
        "dense": partial(ours, embed=embed, words=0.0, vector=1.0),
        "equal fusion": partial(ours, embed=embed, words=1.0, vector=1.0),
    }
    swept: dict[float, list[list[float]]] = {weight: [] for weight in GRID}
    if importlib.util.find_spec("mem0"):
        methods["mem0"] = partial(mem0, embed=embed)
    rows: dict[str, list[list[float]]] = {name: [] for name in methods}
    units: list[int] = []
    for number, (texts, questions) in enumerate(conversations):
        units += [number] * len(questions)
        for name, make in methods.items():
            begin = time.perf_counter()
            rows[name] += on_files(make, texts, questions)
            print(f"conversation {number}: {name} {time.perf_counter() - begin:.1f} s", flush=True)
        for weight in GRID:
            make = partial(ours, embed=embed, words=1.0, vector=weight)
            swept[weight] += on_files(make, texts, questions)
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
        "turns": sum(len(texts) for texts, _ in conversations),
        "vector_weight": chosen,
        "default_is_chosen": {"words": 1.0, "vector": chosen} == DEFAULT_WEIGHTS,
        "by_weight": {str(weight): np.mean(rows, axis=0).round(4).tolist() for weight, rows in swept.items()},
        "methods": table,
        "ours_minus": differences,
        "holds": held,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--choose", action="store_true", help="only choose the weight on the MemoryBank dialogues"
    )
    parser.add_argument("--vectors", type=Path, default=None, help="file that keeps vectors between runs")
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    _torchvision()
    embed = Cached(options.vectors)
    chosen, table = choose(embed)
    print(f"weight of the vector list: {chosen}", json.dumps(table, indent=1))
    if options.choose:
        return
    result = {
        "benchmark": "recall_locomo",
        "claim": "the default search is at or above its parts, BM25, equal fusion and mem0 (infer=False) in"
        " recall@5, recall@10 and nDCG@10: mean difference >= 0, lower end of the 95 % interval > -.02",
        "setting": {"k": 10, "embedder": embed.id, "choice": {"data": "memorybank", "by weight": table}},
        "environment": {"python": platform.python_version(), "machine": platform.machine(), "device": "cpu"},
        "figures": measure(embed, chosen),
    }
    atomic_write(options.out, json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["figures"], indent=2))


if __name__ == "__main__":
    main()
