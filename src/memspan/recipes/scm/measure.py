"""What is measured: answer words in prompts of fixed length, the gate, and a summary of a long document."""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache, partial
from typing import Any

import numpy as np

from memspan import data
from memspan.base.rng import rng
from memspan.data.embed import HashingEmbedder
from memspan.recall.scm import SCMPolicy, SummarizeLong
from memspan.recall.summarize import ExtractiveSummarizer
from memspan.recall.text import sentences
from memspan.recipes.engine import Cell, Outcome, Task, option
from memspan.recipes.tracks.conversations import Conversation, Turn, embedder_for, generated, memorybank
from memspan.recipes.tracks.retrieval import FTS5, SIGN, Ranker, remembered, spaced
from memspan.report.metrics import token_f1


@dataclass(frozen=True)
class Options:
    """What a run can change."""

    budgets: tuple[int, ...] = option((500, 1000, 2500), "of a prompt", unit="tokens")
    k: int = option(6, "activated turns", minimum=1, maximum=50)
    novel_words: int = option(30_000, "of the novel that is summarised; 0 leaves it out", unit="words")
    dialogues: str = option("scm-dialogues", "scm-dialogues or generated")
    embedder: str = option("minilm", "minilm or hashing")


_NOW = datetime(2024, 1, 2, tzinfo=UTC)
PAPER = "SCM, arXiv 2304.13343"
WINDOW, SIMILAR, IN_TIME, WHOLE, OURS = (
    "last window",
    "top 6 by likeness",
    "top 6 in time",
    "whole dialogue",
    "SCM",
)
Dialogue = dict[
    str, Any
]  # id, turns (query, response), questions (text, answer, mode, the paper's own answers)


def run(task: Task[Options]) -> None:
    """Coverage by method and budget, the gate, the paper's own answers, and a long document."""
    o = task.options
    talks = _dialogues(task)
    embed = embedder_for(o.embedder)
    task.note(f"vectors by {embed.id}")
    for language, said in (("English", talks), ("Chinese", _dialogues(task, "zh"))):
        for budget in o.budgets if said else ():
            for method in (WINDOW, SIMILAR, IN_TIME, WHOLE, OURS):
                if method != WHOLE or budget == o.budgets[-1]:
                    setting = {"part": "coverage", "tokens": budget, "language": language}
                    work = partial(covered, talks=said, embed=embed, budget=budget, k=o.k)
                    task.measure(method=method, seed=0, setting=setting, work=work)
    task.measure(
        method="heuristic gate",
        seed=0,
        setting={"part": "gate"},
        work=partial(gated, talks=talks, embed=embed),
    )
    for system in ("scm_davinci_answer", "scm_turbo_answer"):
        if any(system in q for talk in talks for q in talk["questions"]):
            task.measure(method=system, seed=0, setting={"part": "paper"}, work=partial(scored, talks=talks))
    if o.novel_words:
        for name in ("map-reduce, background", "map-reduce, no background", "lead", "truncate"):
            task.measure(
                method=name,
                seed=0,
                setting={"part": "novel"},
                work=partial(novel, words=o.novel_words, task=task),
            )


def covered(cell: Cell, talks: list[Dialogue], embed: Any, budget: int, k: int) -> Outcome:
    """Coverage of gold answers in contexts of one method."""
    shares, modes, used, units = [], [], [], []
    for unit, talk in enumerate(talks):
        items = [f"[Turn {i}] User: {a} Assistant: {b}" for i, (a, b) in enumerate(talk["turns"], 1)]
        index = FTS5(items)
        told = _told(talk, embed) if cell.method == OURS else None
        for question in talk["questions"]:
            wanted = words_of(question["answer"]) - words_of(question["question"])
            if not wanted:
                continue
            if told is not None and told.memory is not None:
                packed = told.memory.prompt(
                    question["question"], k, budget, at=datetime(2024, 1, 2, tzinfo=UTC)
                )
                context = "\n".join(str(message["content"]) for message in packed)
            else:
                context = _context(cell.method, items, index, question["question"], budget, k)
            shares.append(len(wanted & words_of(context)) / len(wanted))
            modes.append(float(question["mode"] == "multi-turn"))
            used.append(float(tokens(context)))
            units.append(float(unit))
        if told is not None:
            told.close()
    multi = np.array(modes) == 1
    quality = {"coverage": float(np.mean(shares)), "tokens": float(np.mean(used))}
    for name, mask in (("multi", multi), ("single", ~multi)):
        if mask.any():
            quality[f"coverage {name}"] = float(np.mean(np.array(shares)[mask]))
    series = {"coverage": shares, "multi": modes, "unit": units}
    return Outcome(quality, {"prompt": int(np.mean(used) * 4)}, series=series)


def _context(method: str, items: list[str], index: FTS5, query: str, budget: int, k: int) -> str:
    if method == WHOLE:
        return "\n".join(items)
    if method == WINDOW:
        return _until(items[::-1], budget)
    best = index.rank(query, k)
    if method in (SIMILAR, IN_TIME):
        return _until([items[i] for i in (best if method == SIMILAR else sorted(best))], budget)
    raise AssertionError(method)


def _until(items: list[str], budget: int) -> str:
    """Items in order, the last one cut at a word, as the official code truncates."""
    taken: list[str] = []
    left = budget
    for item in items:
        taken.append(_begin(item, left))
        left -= tokens(taken[-1])
        if left <= 1:
            break
    return "\n".join(taken)


def _begin(text: str, budget: int) -> str:
    """As much of a text as fits, cut at a word; between signs in Chinese."""
    if not re.search(SIGN, text):
        return " ".join(text.split()[: int(budget / 1.3)])
    most = bisect_right(range(len(text) + 1), budget, key=lambda end: tokens(text[:end])) - 1
    return text[: max(0, most)]


def _told(talk: Dialogue, embed: Any) -> Ranker:
    """The shipped policy, told every turn; its gate is open, since the coverage of all is asked."""
    start = datetime(2024, 1, 1, tzinfo=UTC)
    turns = tuple(
        Turn(str(i), "", query, response, start + timedelta(minutes=i))
        for i, (query, response) in enumerate(talk["turns"])
    )
    return remembered(SCMPolicy(gate="always", counter=tokens), Conversation("user", turns, ()), embed)


def gated(cell: Cell, talks: list[Dialogue], embed: Any) -> Outcome:
    """Questions about a dialogue need memory; the first words of other conversations do not."""
    firsts = [talk["turns"][0][0] for talk in talks]
    bank = memorybank() or generated()
    firsts += [
        one.query
        for talk in bank
        for i, one in enumerate(talk.turns)
        if i and one.session != talk.turns[i - 1].session
    ]
    yes, no = [], []
    for place, talk in enumerate(talks):
        with closing(_told(talk, embed)) as told:
            assert told.memory is not None
            policy, store = SCMPolicy(), told.memory.store

            def ask(text: str, policy: SCMPolicy = policy, store: Any = store) -> float:
                return policy.recall(store, text, 6, _NOW).decision.p

            yes += [ask(question["question"]) for question in talk["questions"]]
            draw = rng("scm.gate", place)
            others = [text for i, text in enumerate(firsts) if i != place]
            no += [ask(str(others[i])) for i in draw.choice(len(others), len(talk["questions"]))]
    said, wrong = sum(p >= 0.5 for p in yes), sum(p >= 0.5 for p in no)
    auc = float(np.mean([(a > b) + 0.5 * (a == b) for a in yes for b in no]))
    quality = {"recall": said / len(yes), "precision": said / max(1, said + wrong), "auroc": auc}
    return Outcome(quality, {"weights": 72}, series={"yes": yes, "no": no})


def scored(cell: Cell, talks: list[Dialogue]) -> Outcome:
    """The paper's own outputs under the answer metric: multiset F1 over content words."""
    values = [
        token_f1(q[cell.method], q["answer"], normalize=lambda text: " ".join(_content(text)))
        for talk in talks for q in talk["questions"] if cell.method in q
    ]  # fmt: skip
    size = sum(len(q.get(cell.method, "")) for talk in talks for q in talk["questions"])
    return Outcome({"answer_f1": float(np.mean(values))}, {"answers": size}, series={"f1": values})


def novel(cell: Cell, words: int, task: Task[Options]) -> Outcome:
    """Twenty planted facts in a novel, and how many the final summary still tells."""
    try:
        text = task.use(data.load("robinson-crusoe", data.TextSet)).text("text")
    except (data.DataNotFound, ValueError):
        text = " ".join(f"On day {i} the ship sailed on and the sea was calm. " for i in range(words // 12))
    parts = sentences(" ".join(text.split()[:words]))
    facts = [f"The colour of key number {i} is {_COLOURS[i % 10]} {_STONES[i // 10]}. " for i in range(20)]
    for i, fact in enumerate(facts):
        parts.insert((i * len(parts)) // 20 + 3, fact)
    book = "".join(parts)
    summarizer = ExtractiveSummarizer(HashingEmbedder(128), counter=tokens)
    if cell.method.startswith("map-reduce"):
        background: Any = "none" if "no background" in cell.method else "previous"
        summary = SummarizeLong(summarizer, 3000, 2300, background=background, counter=tokens).run(book).text
    elif cell.method == "lead":
        firsts = parts[:: max(1, len(parts) // 60)]
        summary = _until(firsts, 1500)
    else:
        summary = _until([book], 1500)
    told = [float(f"key number {i} is" in summary) for i in range(20)]
    quality = {"facts": float(np.mean(told)), "tokens": float(tokens(summary))}
    return Outcome(quality, {"summary": len(summary.encode())}, series={"facts": told})


def words_of(text: str) -> set[str]:
    """Content words as sets: ``[a-z0-9]+`` without scikit-learn's stop words; pairs of Chinese signs."""
    return set(_content(text))


def tokens(text: str) -> int:
    """1.3 tokens a blank-separated word and one a Chinese sign, rounded up."""
    signs = len(re.findall(SIGN, text))
    words = len((re.sub(SIGN, " ", text) if signs else text).split())
    return int(np.ceil(1.3 * words)) + signs


def _content(text: str) -> list[str]:
    """Words without stop words; of Chinese each pair of neighbouring signs."""
    plain = spaced(text.lower())
    return [word for word in re.findall(f"[a-z0-9]+|{SIGN}{{1,2}}", plain) if word not in _stop_words()]


@cache
def _stop_words() -> frozenset[str]:
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    return frozenset(ENGLISH_STOP_WORDS)


def _dialogues(task: Task[Options], language: str = "en") -> list[Dialogue]:
    """In English, or generated where they are absent; in Chinese ("zh") none where they are absent."""
    try:
        if task.options.dialogues == "generated":
            raise data.DataNotFound("asked for")
        files = data.load("scm-dialogues", data.FileSet)
        if language == "en":
            task.use(files)
    except data.DataNotFound:
        if language == "zh":
            return []
        task.note("dialogues are generated: scm-dialogues is not there (see MEMSPAN_DATA)")
        return [
            {
                "turns": [(one.query, one.response) for one in talk.turns],
                "questions": [
                    {"question": q.text, "mode": "single-turn",
                     "answer": next(one.query for one in talk.turns if one.id == q.evidence[0])}
                    for q in talk.questions
                ],
            }
            for talk in generated(task)
        ]  # fmt: skip
    asked: dict[str, list[Any]] = {}
    for question in json.loads(files[f"questions_{language}"].read_text(encoding="utf-8")):
        asked.setdefault(question["id"], []).append(question)
    talks = []
    for one in json.loads(files[f"dialogue_{language}"].read_text(encoding="utf-8")):
        said = one["dialogue"]
        turns = [(said[i], said[i + 1] if i + 1 < len(said) else "") for i in range(0, len(said), 2)]
        talks.append({"turns": turns, "questions": asked.get(one["id"], [])})
    return talks


_COLOURS = ("red", "blue", "green", "white", "black", "amber", "violet", "silver", "copper", "pink")
_STONES = ("jade", "opal")
