"""What is measured: retrieval of every method, words of the answer in a context, a year under budgets."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memspan.base.rng import rng
from memspan.recall.chat import ChatClient, load_prompt
from memspan.recall.memorybank import days, expected_survivors
from memspan.recall.scores import longmemeval_ndcg
from memspan.recall.text import content_words, token_counter
from memspan.recipes.engine import Calls, Cell, Outcome, Task, option
from memspan.recipes.tracks.conversations import (
    Conversation,
    conversations,
    embedder_for,
    generated,
    locomo,
    memorybank,
)
from memspan.recipes.tracks.retrieval import METHODS, ranker
from memspan.report.metrics import hit_at_k, ndcg, recall_at_k


@dataclass(frozen=True)
class Options:
    """What a run can change."""

    conversations: str = option(
        "memorybank", "memorybank, locomo or generated; one not there gives generated"
    )
    compare: tuple[str, ...] = option(
        ("tim", "scm", "fts", "bm25", "minilm", "rrf"),
        "methods beside memorybank and the controls; also mem0",
    )
    embedder: str = option("minilm", "minilm or hashing")
    simulated_users: int = option(10, "users of the simulated year", minimum=2)
    endpoint: str = option("", "OpenAI-compatible address for answers; empty measures none")
    model: str = option("", "the model's name there")


PAPER = "MemoryBank, AAAI 2024"
KEEPERS = ("Ebbinghaus", "FIFO", "LRU", "LFU", "LRFU", "random")
SHARES = (0.1, 0.25, 0.5)
_TOKENS = token_counter(None)
_ANSWER = 200  # tokens of an answer at most


def run(task: Task[Options]) -> None:
    """Retrieval of every method, words of the answer in the context, a simulated year under byte budgets."""
    o = task.options
    asked = conversations(task, o.conversations)
    embed = embedder_for(o.embedder)
    task.note(f"vectors by {embed.id}")
    chosen = [name for name in METHODS if name in ("memorybank", *o.compare, "last window", "random")]
    if set(chosen) - {"fts", "bm25", "last window", "random"}:
        embed.warm(
            [t.text for talk in asked for t in talk.turns]
            + [q.text for talk in asked for q in talk.questions]
        )

    def found(cell: Cell) -> Outcome:
        return retrieved(cell, asked, embed)

    for name in chosen:
        try:
            task.measure(method=name, seed=0, setting={"part": "retrieval"}, work=found)
        except ImportError as error:
            task.note(f"{name} is absent: {error}")
    for name, k in (("no memory", 0), ("last 6 turns", 6), ("memorybank, k=6", 6), ("evidence", 0)):

        def covered(cell: Cell, name: str = name, k: int = k) -> Outcome:
            return coverage(name, k, asked, embed, o)

        task.measure(method=name, seed=0, setting={"part": "context"}, work=covered)
    if o.conversations == "memorybank" and memorybank():
        now = datetime(2023, 5, 10, 9, tzinfo=UTC)
        talks = memorybank() or []
        ages = [max(0.0, (now - turn.at).total_seconds()) for talk in talks for turn in talk.turns]
        for tau in (1, 5):

            def law(cell: Cell, tau: int = tau) -> Outcome:
                alive = expected_survivors(ages, 1.0, days(tau))
                return Outcome({"survivors": alive, "share": alive / len(ages)}, {"store": 800 * len(ages)})

            task.measure(method="sample sweep", seed=0, setting={"part": "law", "days": tau}, work=law)
    for share in SHARES:
        for name in KEEPERS:

            def kept(cell: Cell, name: str = name, share: float = share) -> Outcome:
                values = [year(name, share, user) for user in range(o.simulated_users)]
                return Outcome(
                    {"recall": float(np.mean(values))},
                    {"store": int(share * 365 * 800)},
                    series={"recall": values},
                )

            task.measure(method=name, seed=0, setting={"part": "year", "share": share}, work=kept)


def retrieved(cell: Cell, talks: list[Conversation], embed: Any) -> Outcome:
    """Metrics of one method over all questions; one index a user."""
    series: dict[str, list[float]] = {
        name: []
        for name in ("hit@6", "recall@1", "recall@5", "recall@10", "ndcg@10", "ndcg@10 LongMemEval", "unit")
    }
    held: dict[str, int] = {}
    write = read = 0.0
    placed: list[int] = []
    for unit, talk in enumerate(talks):
        by_id = {turn.id: turn.text for turn in talk.turns}
        begun = time.perf_counter()
        method = ranker(cell.method, talk, embed)
        write += time.perf_counter() - begun
        for category, count in method.held.items():
            held[category] = held.get(category, 0) + count
        for question in talk.questions:
            begun = time.perf_counter()
            ranked = method.rank(question.text, 10)
            read += time.perf_counter() - begun
            series["hit@6"].append(hit_at_k(ranked, question.evidence, 6))
            for k in (1, 5, 10):
                series[f"recall@{k}"].append(recall_at_k(ranked, question.evidence, k))
            series["ndcg@10"].append(ndcg(ranked, question.evidence, 10))
            series["ndcg@10 LongMemEval"].append(longmemeval_ndcg(ranked, question.evidence, 10))
            series["unit"].append(float(unit))
            placed.append(sum(_TOKENS(by_id[id]) for id in ranked[:6]))
        method.close()
        cell.step(unit + 1, len(talks))
    quality = {name: float(np.mean(values)) for name, values in series.items() if name != "unit"}
    quality["context tokens"] = float(np.mean(placed))
    quality["bytes a turn"] = sum(held.values()) / sum(len(talk.turns) for talk in talks)
    return Outcome(quality, held, {"write": write, "read": read}, series=series)


def coverage(name: str, k: int, talks: list[Conversation], embed: Any, o: Options) -> Outcome:
    """Share of the evidence's content words, less the question's, in a context, or in answers too."""
    shares: list[float] = []
    said: list[float] = []
    sizes: list[int] = []
    units: list[float] = []
    client = None
    if o.endpoint:
        client = ChatClient(o.endpoint, o.model)
    for unit, talk in enumerate(talks):
        by_id = {turn.id: turn.text for turn in talk.turns}
        method = ranker("memorybank" if name.startswith("memorybank") else "last window", talk, embed)
        for question in talk.questions:
            gold = " ".join(by_id[id] for id in question.evidence)
            wanted = content_words(gold) - content_words(question.text)
            if not wanted:
                continue
            ids = (
                list(question.evidence) if name == "evidence" else method.rank(question.text, k) if k else []
            )
            context = "\n".join(by_id[id] for id in ids)
            shares.append(len(wanted & content_words(context)) / len(wanted))
            sizes.append(len(question.text.encode()) + len(context.encode()))
            units.append(float(unit))
            if client is not None:
                messages = load_prompt("answer").messages(memory=context, question=question.text)
                reply = client.complete(messages, max_tokens=_ANSWER)
                said.append(len(wanted & content_words(reply.text)) / len(wanted))
        method.close()
    quality = {"coverage": float(np.mean(shares))} | ({"answer_words": float(np.mean(said))} if said else {})
    return Outcome(quality, {"prompt": int(np.mean(sizes))}, series={"coverage": shares, "unit": units})


def price(options: Options) -> list[Calls]:
    """Answers by the endpoint: one call a question and context; recalled turns are taken as mean turns."""
    if not options.endpoint:
        return []
    named = {"memorybank": memorybank, "locomo": locomo}
    talks = named.get(options.conversations, lambda: None)() or generated()
    prompt = load_prompt("answer")
    frame = _TOKENS(f"{prompt.system} {prompt.user}")
    questions = sent = 0
    held = dict.fromkeys(("no memory", "last 6 turns", "memorybank, k=6", "evidence"), 0)
    for talk in talks:
        size = {turn.id: _TOKENS(turn.text) for turn in talk.turns}
        for question in talk.questions:
            questions += 1
            sent += frame + _TOKENS(question.text)
            held["last 6 turns"] += sum([size[turn.id] for turn in talk.turns][-6:])
            held["memorybank, k=6"] += round(6 * sum(size.values()) / len(size))
            held["evidence"] += sum(size[id] for id in question.evidence)
    return [
        Calls(f"answers from {name}", questions, sent + more, questions * _ANSWER)
        for name, more in held.items()
    ]


def year(name: str, share: float, user: int) -> float:
    """Share of asks, in the last quarter of a simulated year, whose fact a store of ``share`` bytes holds.

    Each day a fact of 200 to 1,400 bytes arrives and a known fact is asked for, Zipf over a personal order;
    then the store is cut to its budget by the keeper.
    """
    draw = rng("memorybank.year", user)
    n = 365
    sizes = draw.integers(200, 1400, n)
    weight = 1.0 / (1 + draw.permutation(n)) ** 1.1
    budget = share * sizes.sum()
    last, count, crf = np.zeros(n), np.zeros(n), np.zeros(n)
    alive = np.zeros(n, bool)
    asked = kept = 0
    noise = draw.random(n)
    for day in range(n):
        alive[day], last[day], count[day], crf[day] = True, day, 1, 1
        for _ in range(3):  # questions of the day
            known = weight[: day + 1] / weight[: day + 1].sum()
            fact = int(draw.choice(day + 1, p=known))
            if day >= 3 * n // 4:
                asked, kept = asked + 1, kept + int(alive[fact])
            if alive[fact]:
                crf[fact] = 1 + crf[fact] * 0.5 ** ((day - last[fact]) / 30)
                last[fact], count[fact] = day, count[fact] + 1
        value = _worth(name, day, last, count, crf, noise)
        held = np.flatnonzero(alive)
        for fact in held[np.argsort(value[held], kind="stable")]:
            if sizes[alive].sum() <= budget:
                break
            alive[fact] = False
    return kept / max(1, asked)


def _worth(
    name: str, day: int, last: NDArray[Any], count: NDArray[Any], crf: NDArray[Any], noise: NDArray[Any]
) -> NDArray[Any]:
    age = np.maximum(0.0, day - last)
    if name == "Ebbinghaus":
        return np.asarray(-age / np.maximum(count, 1))  # the order of retention, whatever the time scale
    known: dict[str, NDArray[Any]] = {
        "FIFO": np.arange(len(last)), "LRU": last, "LFU": count, "LRFU": crf * 0.5 ** (age / 30),
        "random": noise,
    }  # fmt: skip
    return known[name]
