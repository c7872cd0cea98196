"""Self-controlled memory: how much of an answer is in a prompt of fixed length; what survives a long summary?

Coverage needs no language model: the share of the gold answer's content words, less the question's, that
stand in the context. Summaries pick sentences, so that the long-document part tests the plumbing and the law
of lengths, not prose.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np

from memspan import data
from memspan.base.rng import rng
from memspan.data.embed import HashingEmbedder
from memspan.recall.scm import HeuristicController, Item, SCMPolicy, SummarizeLong, pack
from memspan.recall.scm.control import Context, suffices
from memspan.recall.summarize import ExtractiveSummarizer
from memspan.recall.text import sentences
from memspan.recipes import _recall_data as recall_data
from memspan.recipes._recall_methods import FTS5, SIGN, spaced
from memspan.recipes.engine import Cell, Measurements, Outcome, Recipe, Task, option
from memspan.report import claim
from memspan.report.metrics import token_f1
from memspan.report.schema import Claim
from memspan.report.stats import Interval, bootstrap, paired_difference, wilson


@dataclass(frozen=True)
class Options:
    """What a run can change."""

    budgets: tuple[int, ...] = option((500, 1000, 2500), "of a prompt", unit="tokens")
    k: int = option(6, "activated turns", minimum=1, maximum=50)
    novel_words: int = option(30_000, "of the novel that is summarised; 0 leaves it out", unit="words")
    dialogues: str = option("scm-dialogues", "scm-dialogues or generated")


PAPER = "SCM, arXiv 2304.13343"
WINDOW, SIMILAR, IN_TIME, WHOLE, OURS = (
    "last window",
    "top 6 by likeness",
    "top 6 in time",
    "whole dialogue",
    "packed",
)
Dialogue = dict[
    str, Any
]  # id, turns (query, response), questions (text, answer, mode, the paper's own answers)


def run(task: Task[Options]) -> None:
    """Coverage by method and budget, the gate, the paper's own answers, and a long document."""
    o = task.options
    talks = _dialogues(task)
    for language, said in (("English", talks), ("Chinese", _dialogues(task, "zh"))):
        for budget in o.budgets if said else ():
            for method in (WINDOW, SIMILAR, IN_TIME, WHOLE, OURS):
                if method != WHOLE or budget == o.budgets[-1]:
                    setting = {"part": "coverage", "tokens": budget, "language": language}
                    work = partial(covered, talks=said, budget=budget, k=o.k)
                    task.measure(method=method, seed=0, setting=setting, work=work)
    task.measure(method="heuristic gate", seed=0, setting={"part": "gate"}, work=partial(gated, talks=talks))
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


def covered(cell: Cell, talks: list[Dialogue], budget: int, k: int) -> Outcome:
    """Coverage of gold answers in contexts of one method."""
    shares, modes, used, units = [], [], [], []
    for unit, talk in enumerate(talks):
        items = [f"[Turn {i}] User: {a} Assistant: {b}" for i, (a, b) in enumerate(talk["turns"], 1)]
        index = FTS5(items)
        for question in talk["questions"]:
            wanted = words_of(question["answer"]) - words_of(question["question"])
            if not wanted:
                continue
            context = _context(cell.method, items, index, question["question"], budget, k)
            shares.append(len(wanted & words_of(context)) / len(wanted))
            modes.append(float(question["mode"] == "multi-turn"))
            used.append(float(tokens(context)))
            units.append(float(unit))
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
    ranked = [Item(i + 1, items[i], _summary(items[i]), -float(place)) for place, i in enumerate(best)]
    controller = HeuristicController()
    decided = pack(ranked, budget, tokens, lambda text, which: suffices(controller, text, query, which))
    return "\n".join(decided.texts)


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


@cache
def _summary(text: str) -> str:
    """As the policy makes it: a turn of up to 300 tokens is its own summary, of a longer one half as many."""
    over = SCMPolicy().summary_over
    if tokens(text) <= over:
        return text
    return ExtractiveSummarizer(HashingEmbedder(128), counter=tokens)(
        [text], job="turn", max_tokens=over // 2
    )


def gated(cell: Cell, talks: list[Dialogue]) -> Outcome:
    """Questions about a dialogue need memory; the first words of other conversations do not."""
    embed = recall_data.CachedEmbedder(HashingEmbedder(256))
    controller = HeuristicController()
    firsts = [talk["turns"][0][0] for talk in talks]
    bank = recall_data.memorybank() or recall_data.generated()
    firsts += [
        one.query
        for talk in bank
        for i, one in enumerate(talk.turns)
        if i and one.session != talk.turns[i - 1].session
    ]
    yes, no = [], []
    for place, talk in enumerate(talks):
        rows = embed([f"User: {a} Assistant: {b}" for a, b in talk["turns"]])

        def ask(text: str, rows: Any = rows) -> float:
            cosines = rows @ embed([text])[0]
            return controller.need_memory(text, "", Context(cosines[:-1].tolist(), float(cosines[-1]))).p

        # The weights were fitted on the even ones.
        yes += [ask(question["question"]) for question in talk["questions"][1::2]]
        draw = rng("scm.gate", place)
        others = [text for i, text in enumerate(firsts) if i != place]
        no += [ask(str(others[i])) for i in draw.choice(len(others), len(talk["questions"]))[1::2]]
    said, wrong = sum(p >= 0.5 for p in yes), sum(p >= 0.5 for p in no)
    auc = float(np.mean([(a > b) + 0.5 * (a == b) for a in yes for b in no]))
    quality = {"recall": said / len(yes), "precision": said / max(1, said + wrong), "auc": auc}
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


def judge(found: Measurements, options: Options) -> list[Claim]:
    """Claims A and B on coverage, the gate, and the metric's check on the paper's own answers."""
    rows = found.where(part="coverage", language="English")
    claims = []
    budget = max(options.budgets)

    def row(method: str, at: int) -> Any:
        return rows.one(method=method, tokens=at)

    if rows:
        ours, window = row(OURS, budget), row(WINDOW, budget)
        for name, flag in (("several turns", 1.0), ("one turn", 0.0)):
            mask = np.array(ours.series["multi"]) == flag
            if mask.sum() < 2:
                continue
            pairs = np.stack([ours.series["coverage"], window.series["coverage"]], axis=1)[mask]
            ratio = bootstrap(pairs, lambda r: float(r[:, 0].mean() / max(r[:, 1].mean(), 1e-3)))
            text = f"activation memory covers at least twice what the last window does (questions on {name})"
            claims.append(claim(text, f"{PAPER}, table 2", ratio, ">= 2", "x"))
        for at in options.budgets:
            rival = max((SIMILAR, IN_TIME), key=lambda m: row(m, at).quality["coverage"])
            gain = paired_difference(row(OURS, at).series["coverage"], row(rival, at).series["coverage"])
            text = f"packing covers at least what truncating the same turns does, at {at} tokens"
            claims.append(claim(text, f"{PAPER}, table 3", gain.scaled(100), ">= 0", "points"))
    for gate in found.where(part="gate"):
        yes = gate.series["yes"]
        span = wilson(sum(p >= 0.5 for p in yes), len(yes))
        claims.append(
            claim(
                "the gate lets through most messages that need memory", f"{PAPER}, section 3.1", span, "> 0.5"
            )
        )
    for system, wanted in (("scm_davinci_answer", 0.7558), ("scm_turbo_answer", 0.5111)):
        for one in found.where(method=system):
            value = one.quality["answer_f1"]
            text = f"the answer metric gives the paper's own {system.split('_')[1]} answers their known score"
            span = Interval(value, value, value, 2)
            claims.append(
                claim(text, "check of the metric", span, f"in [{wanted - 5e-4}, {wanted + 5e-4}]", exact=True)
            )
    novel_rows = found.where(part="novel")
    if len(novel_rows) == 4:
        a, b = (novel_rows.one(method=m).series["facts"] for m in ("map-reduce, background", "truncate"))
        text = "more planted facts survive divide and conquer than truncation (sentences are picked)"
        claims.append(
            claim(
                text,
                f"{PAPER}, section 4.3",
                paired_difference(a, b).scaled(100),
                "> 0",
                "points",
                expected=False,
                why="sentences are picked for likeness to the whole, planted facts are unlike it",
            )
        )
    return claims


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
            for talk in recall_data.generated(task)
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

RECIPE = Recipe(
    name="scm",
    title="Self-controlled memory: answers covered by a prompt of fixed length",
    paper="Enhancing Large Language Model with Self-Controlled Memory Framework, arXiv 2304.13343",
    room="recall",
    component="memspan.recall.SCMPolicy",
    problem="converse for hundreds of turns with a small window",
    answer="a controller decides which turns go in whole, as summaries, or not at all",
    quick_cost="about 30 s",
    options=Options,
    quick=Options(),
    full=Options(novel_words=130_000),
    tiny=Options(dialogues="generated", budgets=(100, 300), novel_words=2000),
    run=run,
    judge=judge,
    control=WINDOW,
    seeds=(1, 1),
    extras=("recipes", "recall"),
    devices=("cpu",),
)
