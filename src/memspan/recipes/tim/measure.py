"""What is measured: the form of the memory, agreement between wordings, hashing, and changed facts."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from memspan.base.rng import rng
from memspan.data.embed import HashingEmbedder
from memspan.recall import Memory, SQLiteStore
from memspan.recall.text import content_words
from memspan.recall.tim import AngularLSH
from memspan.recipes.engine import Cell, Outcome, Task, option
from memspan.recipes.tracks.conversations import Conversation, conversations, embedder_for, memorybank
from memspan.recipes.tracks.retrieval import Piece, Ranker, ranker


@dataclass(frozen=True)
class Options:
    """What a run can change."""

    conversations: str = option("memorybank", "memorybank, locomo or generated")
    budgets: tuple[int, ...] = option((250, 500, 1000), "of a prompt", unit="tokens")
    embedder: str = option("minilm", "minilm or hashing")
    draws: int = option(20, "draws of the hash's directions", minimum=2)
    vectors: int = option(20_000, "most synthetic vectors for the timing; 0 leaves it out")
    streams: int = option(10, "scripted streams with planted contradictions", minimum=2)


METHODS = ("turns", "TiM", "thoughts alone", "random turns")
PAPER = "Think-in-Memory, arXiv 2311.08719"
PARAPHRASES = {
    "English": (
        "{}", "Tell me: {}", "Do you remember? {}", "I would like to know this: {}",
        "Quick question for you: {}",
    ),
    "Chinese": ("{}", "告诉我：{}", "你还记得吗？{}", "我想知道这件事：{}", "问你一个小问题：{}"),
}  # fmt: skip
BUCKETS = (4, 8, 16, 32)
SIZES = (140, 1000, 5000, 20_000, 100_000)  # 140 is the paper's
RECALL = 0.9  # that hashing and the graph are set to, on other queries, before they are timed


def run(task: Task[Options]) -> None:
    """Form of the memory, consistency, hashing, and changed facts."""
    o = task.options
    asked = conversations(task, o.conversations)
    embed = embedder_for(o.embedder)
    task.note(f"vectors by {embed.id}")
    texts, queries = (
        [t.text for talk in asked for t in talk.turns],
        [q.text for talk in asked for q in talk.questions],
    )
    embed.warm(texts + queries)
    shelf = Shelf(embed)
    for name in METHODS:
        for budget in o.budgets:
            work = partial(form, talks=asked, shelf=shelf, budget=budget)
            task.measure(method=name, seed=0, setting={"part": "form", "tokens": budget}, work=work)
    chinese = memorybank(language="cn") if o.conversations == "memorybank" else None
    for language, said in (("English", asked), ("Chinese", [t for t in chinese or () if t.questions])):
        for name in ("turns", "TiM") if said else ():
            work = partial(consistency, talks=said, shelf=shelf, forms=PARAPHRASES[language])
            setting = {"part": "consistency", "language": language}
            task.measure(method=name, seed=0, setting=setting, work=work)
    shelf.close()
    rows, asks = embed(texts), embed(queries)
    for buckets in BUCKETS:
        for name, tables, probes in (("one bucket", 1, 1), ("4 tables, 4 probes", 4, min(4, buckets))):
            work = partial(
                hashed, rows=rows, asks=asks, buckets=buckets, tables=tables, probes=probes, draws=o.draws
            )
            task.measure(method=name, seed=0, setting={"part": "hash", "buckets": buckets}, work=work)
    for n in [n for n in SIZES if n <= o.vectors]:
        task.measure(
            method="hash, exact, graph", seed=0, setting={"part": "time", "n": n}, work=partial(timed, n=n)
        )
    for name in ("TiM", "keep all"):
        work = partial(tidied, streams=o.streams)
        task.measure(method=name, seed=0, setting={"part": "tidy"}, work=work)


class Shelf:
    """The shipped policies' memories of each conversation, told once for all cells that ask them."""

    def __init__(self, embed: Any) -> None:
        self.embed, self.held = embed, dict[tuple[str, str, int], Ranker]()

    def open(self, method: str, talk: Conversation) -> Ranker:
        """The policy of a row; the control recalls at random."""
        name = {"turns": "memorybank", "random turns": "random"}.get(method, "tim")
        key = (name, talk.user, len(talk.turns))
        if key not in self.held:
            self.embed.warm([turn.text for turn in talk.turns])
            self.held[key] = ranker(name, talk, self.embed)
        return self.held[key]

    def close(self) -> None:
        """Give all files back."""
        for one in self.held.values():
            one.close()


def found(method: str, memory: Ranker, talk: Conversation, query: str, k: int) -> list[Piece]:
    """What a method would show, best first."""
    if method == "random turns":
        text = {turn.id: turn.text for turn in talk.turns}
        return [(text[id], (id,)) for id in memory.rank(query, k)]
    if method == "thoughts alone":
        assert memory.memory is not None
        hits = memory.memory.store.search(query, k=k, kinds=("thought",))
        return [memory.piece(hit.record) for hit in hits]
    return memory.pieces(query, k)


def form(cell: Cell, talks: list[Conversation], shelf: Shelf, budget: int) -> Outcome:
    """Answer words and evidence inside a budget of tokens, 1.3 a blank-separated word."""
    shares: list[float] = []
    evidence: list[float] = []
    spent: list[float] = []
    units: list[float] = []
    held = 0
    for unit, talk in enumerate(talks):
        by_id = {turn.id: turn.text for turn in talk.turns}
        memory = shelf.open(cell.method, talk)
        held += sum(memory.held.values())
        for question in talk.questions:
            gold = question.answer or " ".join(by_id[id] for id in question.evidence)
            wanted = content_words(gold) - content_words(question.text)
            if not wanted:
                continue
            taken: list[Piece] = []
            left = float(budget)
            for piece in found(cell.method, memory, talk, question.text, 40):
                cost = 1.3 * len(piece[0].split())
                if cost <= left:
                    taken.append(piece)
                    left -= cost
                if left < 10:
                    break
            words = content_words(" ".join(text for text, _ in taken))
            ids = {id for _, several in taken for id in several}
            shares.append(len(wanted & words) / len(wanted))
            evidence.append(len(ids & set(question.evidence)) / len(question.evidence))
            spent.append(max(1.0, budget - left))
            units.append(float(unit))
        cell.step(unit + 1, len(talks))
    per_token = [100 * share / cost for share, cost in zip(shares, spent, strict=True)]
    quality = {
        "coverage": float(np.mean(shares)), "coverage per 100 tokens": float(np.mean(per_token)),
        "evidence": float(np.mean(evidence)), "tokens": float(np.mean(spent)),
    }  # fmt: skip
    series = {"coverage": shares, "per_token": per_token, "evidence": evidence, "unit": units}
    return Outcome(quality, {"store": held}, series=series)


def consistency(cell: Cell, talks: list[Conversation], shelf: Shelf, forms: tuple[str, ...]) -> Outcome:
    """Mean Jaccard of the turns that five wordings of a question find among five pieces."""
    values: list[float] = []
    units: list[float] = []
    held = 0
    for unit, talk in enumerate(talks):
        memory = shelf.open(cell.method, talk)
        held += sum(memory.held.values())
        for question in talk.questions:
            sets = []
            for form_ in forms:
                best = found(cell.method, memory, talk, form_.format(question.text), 5)
                sets.append({id for _, ids in best for id in ids})
            values.append(
                float(np.mean([len(a & b) / len(a | b) if a | b else 0.0 for a, b in combinations(sets, 2)]))
            )
            units.append(float(unit))
    series = {"agreement": values, "unit": units}
    return Outcome({"agreement": float(np.mean(values))}, {"store": held}, series=series)


def hashed(cell: Cell, rows: Any, asks: Any, buckets: int, tables: int, probes: int, draws: int) -> Outcome:
    """Recall of the exact ten and share scanned, over draws of the directions; also centred, orthogonal."""
    exact = [set(np.argsort(-(rows @ q), kind="stable")[:10].tolist()) for q in asks]
    kinds: dict[str, dict[str, Any]] = {
        "": {},
        " centred": {"center": rows.mean(axis=0)},
        " orthogonal": {"orthogonal": True},
    }
    quality: dict[str, float] = {}
    series: dict[str, list[float]] = {}
    held: dict[str, int] = {}
    for kind, extra in kinds.items():
        recalls, scans = [], []
        for draw in range(draws if not kind else max(2, draws // 4)):
            index = AngularLSH(rows.shape[1], buckets, tables, probes, seed=draw, exact_below=0, **extra)
            index.add(range(len(rows)), rows)
            answers = index.query(asks, 10, batch=True)
            recalls.append(
                float(
                    np.mean([len(set(a) & e) / len(e) for (a, _, _), e in zip(answers, exact, strict=True)])
                )
            )
            scans.append(float(np.mean([scanned for _, _, scanned in answers])) / len(rows))
            held = index.memory_bytes()
        quality |= {f"recall@10{kind}": float(np.mean(recalls)), f"scanned{kind}": float(np.mean(scans))}
        series[f"recall{kind}"] = recalls
    return Outcome(quality, held, series=series)


def timed(cell: Cell, n: int) -> Outcome:
    """Milliseconds of a query by hash, exact NumPy and usearch's graph, in interleaved rounds.

    Hash and graph are the quickest of their settings whose recall@10 on 40 other queries is .9.
    """
    rows, queries = _vectors(n, 140)
    tune, asks = queries[:40], queries[40:]
    index, tried = _quickest(rows, tune)
    searches: dict[str, Callable[[Any], Any]] = {
        "hash": lambda q: index.query(q, 10)[0],
        "exact": lambda q: _exact(rows, q),
    }
    held = index.memory_bytes() | {"exact.vectors": rows.nbytes}
    if graph := _graph(rows, tune):
        searches["usearch"] = graph[0]
        held["usearch.graph"] = graph[1]
    times: dict[str, list[float]] = {name: [] for name in searches}
    hits: dict[str, list[float]] = {name: [] for name in searches}
    order = list(searches)
    for number, q in enumerate(asks):
        truth = set(_exact(rows, q))
        for name in order[number % len(order) :] + order[: number % len(order)]:
            searches[name](q)  # what the one before it pushed out of the cache comes back
            begun = time.perf_counter()
            found = searches[name](q)
            times[name].append(time.perf_counter() - begun)
            hits[name].append(len(truth & set(found)) / len(truth))
    quality = {f"{name} ms": 1000 * float(np.median(values)) for name, values in times.items()}
    quality |= {f"{name} recall@10": float(np.mean(values)) for name, values in hits.items()}
    quality |= {"buckets": float(index.buckets), "tables": float(index.tables), "probes": float(index.probes)}
    quality["scanned"] = float(np.mean([index.query(q, 10)[2] for q in asks])) / n
    quality["settings tried"] = float(tried)
    series = {
        f"hash over {name}": np.divide(times["hash"], times[name]).tolist()
        for name in searches if name != "hash"
    }  # fmt: skip
    return Outcome(quality, held, series=series)


def _vectors(n: int, queries: int) -> tuple[Any, Any]:
    draw = rng("tim.time", n)
    basis = draw.standard_normal((32, 384)) / np.sqrt(32)
    found = []
    for count in (n, queries):
        rows = draw.standard_normal((count, 32)) @ basis + 0.3 * draw.standard_normal((count, 384))
        found.append((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32))
    return found[0], found[1]


def _exact(rows: Any, q: Any) -> list[int]:
    return [int(i) for i in np.argpartition(-(rows @ q), 9)[:10]]


def _quickest(rows: Any, tune: Any) -> tuple[AngularLSH, int]:
    """The quickest index on the tuning queries among those that reach the recall."""
    truth = [set(_exact(rows, q)) for q in tune]
    best: tuple[float, AngularLSH] | None = None
    tried = 0
    for buckets, tables in ((16, 1), (16, 4), (64, 1), (64, 4), (256, 1)):
        index = AngularLSH(384, buckets, tables, seed=0, orthogonal=True, exact_below=0)
        index.add(range(len(rows)), rows)

        def recall(probes: int, index: AngularLSH = index) -> float:
            found = index.query(tune, 10, probes=probes, batch=True)
            return float(
                np.mean([len(set(ids) & t) / 10 for (ids, _, _), t in zip(found, truth, strict=True)])
            )

        low, high = 0, buckets  # recall grows with the probes
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if recall(middle) >= RECALL else (middle, high)
        index.probes = high
        spent = []
        for q in tune:
            begun = time.perf_counter()
            index.query(q, 10)
            spent.append(time.perf_counter() - begun)
        tried += 1
        if best is None or np.median(spent) < best[0]:
            best = float(np.median(spent)), index
    assert best is not None
    return best[1], tried


def _graph(rows: Any, tune: Any) -> tuple[Callable[[Any], list[int]], int] | None:
    """A graph of usearch (HNSW) at the recall; None without the package."""
    try:
        from usearch.index import Index
    except ImportError:
        return None
    graph = Index(ndim=rows.shape[1], metric="cos", connectivity=16, expansion_add=64)
    graph.add(np.arange(len(rows)), rows, threads=1)
    truth = [set(_exact(rows, q)) for q in tune]

    def search(q: Any) -> list[int]:
        return [int(i) for i in graph.search(q, 10, threads=1).keys]

    for breadth in (16, 32, 64, 128, 256, 512):
        graph.expansion_search = breadth
        if np.mean([len(set(search(q)) & t) / 10 for q, t in zip(tune, truth, strict=True)]) >= RECALL:
            break
    return search, int(graph.memory_usage)


def tidied(cell: Cell, streams: int) -> Outcome:
    """Planted changes and repeats, told as sentences: what is ended, and whether the latest value stays."""
    precision, recall, latest, size = [], [], [], []
    for stream in range(streams):
        draw = rng("tim.tidy", stream)
        told: list[tuple[str, tuple[str, str], str]] = []
        for _ in range(40):
            relation = ("lives in", "works as", "likes")[int(draw.integers(3))]
            tail = _TAILS[relation][int(draw.integers(4))]
            denied = relation == "likes" and draw.random() < 0.4
            words = {"lives in": "I live in", "works as": "I work as"}.get(relation, "I like")
            key = (relation, tail if relation == "likes" else "")
            told.append((f"{'I do not like' if denied else words} {tail}.", key, f"{denied} {tail}"))
        current = {key: value for _, key, value in told}
        with tempfile.TemporaryDirectory() as folder:
            policy = "tim" if cell.method == "TiM" else "memorybank"
            with SQLiteStore(Path(folder) / "m.db", HashingEmbedder(64)) as database:
                memory = Memory(database, "u", policy)
                for day, (text, _, _) in enumerate(told):
                    memory.observe(user=text, at=datetime(2024, 1, 1, tzinfo=UTC) + timedelta(days=day))
                kinds: Any = ("thought",) if policy == "tim" else ("turn",)
                held = memory.store.count(kinds=kinds)
                active = {
                    ((base := one.relation.removeprefix("not ")), one.tail if base == "likes" else ""): (
                        f"{one.denied} {one.tail}"
                    )
                    for one in memory.thoughts()
                }
        changes = {(key, value) for _, key, value in told} - set(current.items())
        wrong = {pair for pair in active.items() if pair not in set(current.items())}
        precision.append(float(all(active.get(key) == value for key, value in current.items())))
        recall.append(1 - len(wrong & changes) / max(1, len(changes)) if active else 0.0)
        latest.append(float(np.mean([active.get(key) == value for key, value in current.items()])))
        size.append(held / len(told))
    quality = {
        "nothing current ended": float(np.mean(precision)), "past ended": float(np.mean(recall)),
        "latest kept": float(np.mean(latest)), "size": float(np.mean(size)),
    }  # fmt: skip
    return Outcome(quality, {"store": int(40 * 700 * np.mean(size))}, series={"latest": latest})


_TAILS = {
    "lives in": ("Rome", "Oslo", "Lima", "Kyoto"), "works as": ("a nurse", "a baker", "a welder", "a clerk"),
    "likes": ("tea", "chess", "rain", "jazz"), "visited": ("Spain", "Peru", "Chad", "Fiji"),
}  # fmt: skip
