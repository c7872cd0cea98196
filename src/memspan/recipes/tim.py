"""Think-in-Memory: do facts buy more than transcripts, are they found however one asks, does hashing pay?

Facts are read by rules (or, on LoCoMo, given with the data); no language model is called. Whatever rules do
not read is lost to the facts: the recipe reports it as evidence lost.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np

from memspan.base.rng import rng
from memspan.recall.text import content_words
from memspan.recall.tim import AngularLSH, Drop, RuleExtractor, RuleOrganiser, Thought
from memspan.recipes import _recall_data as recall_data
from memspan.recipes._recall_methods import FTS5
from memspan.recipes.engine import Cell, Measurements, Outcome, Recipe, Task, option
from memspan.report import claim
from memspan.report.figures import Figure, Lines, Series
from memspan.report.schema import Claim
from memspan.report.stats import bootstrap, mean_interval, paired_difference


@dataclass(frozen=True)
class Options:
    """What a run can change."""

    conversations: str = option("memorybank", "memorybank, locomo (with its given facts) or generated")
    budgets: tuple[int, ...] = option((250, 500, 1000), "of a prompt", unit="tokens")
    embedder: str = option("minilm", "minilm or hashing, for the hash tables")
    draws: int = option(20, "draws of the hash's directions", minimum=2)
    vectors: int = option(20_000, "most synthetic vectors for the timing; 0 leaves it out")
    streams: int = option(10, "scripted streams with planted contradictions", minimum=2)


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
    """Form of the memory, consistency, hashing, and tidying."""
    o = task.options
    talks = {"memorybank": recall_data.memorybank, "locomo": recall_data.locomo}.get(
        o.conversations, lambda t: None
    )(task)
    if talks is None:
        talks = recall_data.generated(task)
        task.note("conversations are generated: the named ones are not there (see MEMSPAN_DATA)")
    asked = [talk for talk in talks if talk.questions]
    methods = ("turns", "thoughts", "thoughts, then turns", "random turns")
    for budget in o.budgets:
        for name in methods:
            work = partial(form, talks=asked, budget=budget)
            task.measure(method=name, seed=0, setting={"part": "form", "tokens": budget}, work=work)
    chinese = recall_data.memorybank(language="cn") if o.conversations == "memorybank" else None
    for language, said in (("English", asked), ("Chinese", [t for t in chinese or () if t.questions])):
        for name in methods[:3] if said else ():
            work = partial(consistency, talks=said, forms=PARAPHRASES[language])
            task.measure(
                method=name, seed=0, setting={"part": "consistency", "language": language}, work=work
            )
    embed = recall_data.embedder_for(o.embedder)
    task.note(f"vectors by {embed.id}")
    texts, queries = (
        [t.text for talk in asked for t in talk.turns],
        [q.text for talk in asked for q in talk.questions],
    )
    embed.warm(texts + queries)
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
    for name in ("rules", "keep all"):
        task.measure(method=name, seed=0, setting={"part": "tidy"}, work=partial(tidied, streams=o.streams))


Piece = tuple[str, tuple[str, ...]]  # text, ids of the turns behind it


def pieces_of(talk: recall_data.Conversation, method: str) -> list[Piece]:
    """What a method can recall."""
    turns: list[Piece] = [(turn.text, (turn.id,)) for turn in talk.turns]
    if "turns" in method and "thoughts" not in method:
        return turns
    facts = list(talk.facts)
    if not facts:
        for turn in talk.turns:
            found = RuleExtractor()(turn.query, turn.response, turn.at, talk.user)
            facts += [(f"{turn.at:%Y-%m-%d} {fact.text}", (turn.id,)) for fact in found]
    return facts if method == "thoughts" else facts + turns


def ranked(pieces: list[Piece], index: FTS5, query: str, method: str) -> list[Piece]:
    """Pieces by words; at random for the control."""
    if method == "random turns":
        return [pieces[i] for i in rng("tim.random", query).permutation(len(pieces))]
    return [pieces[i] for i in index.rank(query)]


def form(cell: Cell, talks: list[recall_data.Conversation], budget: int) -> Outcome:
    """Answer words and evidence inside a budget of tokens, 1.3 a blank-separated word."""
    shares: list[float] = []
    evidence: list[float] = []
    spent: list[float] = []
    units: list[float] = []
    lost: list[float] = []
    held = 0
    for unit, talk in enumerate(talks):
        pieces = pieces_of(talk, cell.method)
        index = FTS5([text for text, _ in pieces])
        by_id = {turn.id: turn.text for turn in talk.turns}
        reachable = {id for _, ids in pieces for id in ids}
        held += sum(len(text.encode()) for text, _ in pieces)
        for question in talk.questions:
            gold = question.answer or " ".join(by_id[id] for id in question.evidence)
            wanted = content_words(gold) - content_words(question.text)
            if not wanted:
                continue
            taken: list[Piece] = []
            left = float(budget)
            for piece in ranked(pieces, index, question.text, cell.method):
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
            lost.append(1 - len(reachable & set(question.evidence)) / len(question.evidence))
            units.append(float(unit))
    per_token = [100 * share / cost for share, cost in zip(shares, spent, strict=True)]
    quality = {
        "coverage": float(np.mean(shares)), "coverage per 100 tokens": float(np.mean(per_token)),
        "evidence": float(np.mean(evidence)), "tokens": float(np.mean(spent)),
        "evidence lost": float(np.mean(lost)),
    }  # fmt: skip
    series = {"coverage": shares, "per_token": per_token, "evidence": evidence, "unit": units}
    return Outcome(quality, {"store.text": held}, series=series)


def consistency(cell: Cell, talks: list[recall_data.Conversation], forms: tuple[str, ...]) -> Outcome:
    """Mean Jaccard of the evidence that five wordings of a question find among five pieces.

    Two wordings that find nothing agree in nothing.
    """
    values: list[float] = []
    empty: list[float] = []
    units: list[float] = []
    held = 0
    for unit, talk in enumerate(talks):
        pieces = pieces_of(talk, cell.method)
        index = FTS5([text for text, _ in pieces])
        held += sum(len(text.encode()) for text, _ in pieces)
        for question in talk.questions:
            sets = []
            for form_ in forms:
                best = ranked(pieces, index, form_.format(question.text), cell.method)[:5]
                sets.append({id for _, ids in best for id in ids})
            empty.append(float(not sets[0]))
            values.append(
                float(np.mean([len(a & b) / len(a | b) if a | b else 0.0 for a, b in combinations(sets, 2)]))
            )
            units.append(float(unit))
    return Outcome(
        {"agreement": float(np.mean(values)), "nothing found": float(np.mean(empty))},
        {"store.text": held},
        series={"agreement": values, "unit": units},
    )


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
    """Planted contradictions and repeats: what is dropped, and whether the latest value stays."""
    precision, recall, latest, size = [], [], [], []
    for stream in range(streams):
        draw = rng("tim.tidy", stream)
        thoughts: list[Thought] = []
        stale: set[int] = set()
        current: dict[tuple[str, str], int] = {}
        for day in range(40):
            head = ("Linda", "Ann")[int(draw.integers(2))]
            relation = ("lives in", "works as", "likes", "visited")[int(draw.integers(4))]
            tail = _TAILS[relation][int(draw.integers(4))]
            if relation == "likes" and draw.random() < 0.4:
                relation = "not likes"
            at = datetime(2024, 1, 1, tzinfo=UTC) + timedelta(days=day)
            base = relation.removeprefix("not ")
            key = (head, base if base in ("lives in", "works as") else f"{base} {tail}")
            if key in current:
                stale.add(current[key])
            current[key] = day
            thoughts.append(Thought(head, relation, tail, f"{head} {relation} {tail}.", at, id=f"{day:03d}"))
        ops = RuleOrganiser()(thoughts) if cell.method == "rules" else []
        dropped = {op.id for op in ops if isinstance(op, Drop)}
        precision.append(len(dropped & stale) / len(dropped) if dropped else 1.0)
        recall.append(len(dropped & stale) / len(stale) if stale else 1.0)
        latest.append(float(all(place not in dropped for place in current.values())))
        size.append(1 - len(dropped) / len(thoughts))
    quality = {
        "precision": float(np.mean(precision)), "recall": float(np.mean(recall)),
        "latest kept": float(np.mean(latest)), "size": float(np.mean(size)),
    }  # fmt: skip
    return Outcome(quality, {"store": int(40 * 700 * np.mean(size))}, series={"recall": recall})


def judge(found: Measurements, options: Options) -> list[Claim]:
    """The form of the memory, agreement between wordings, and what hashing buys."""
    claims = []
    low = min(options.budgets)
    rows = found.where(part="form", tokens=low)
    ratio = None
    if rows:
        a, b = (rows.one(method=name).series for name in ("thoughts", "turns"))
        pairs = np.stack([a["per_token"], b["per_token"]], axis=1)
        units = [int(u) for u in a["unit"]]
        ratio = bootstrap(pairs, lambda r: float(r[:, 0].mean() / max(r[:, 1].mean(), 1e-6)), units=units)
    text = (
        f"a token of thoughts covers at least 1.5 times the answer words of a token of turns, at {low} tokens"
    )
    why = ""
    if rows and ratio is not None and ratio.high < 1.5:
        had = rows.one(method="turns").quality["coverage"]
        why = f"turns hold {had:.0%} of these words in a prompt this long: at best {1 / had:.2g} times can be"
        if options.conversations != "locomo":
            why += "; a fact keeps the point of a turn and few of its words"
    claims.append(claim(text, f"{PAPER}, table 4", ratio, ">= 1.5", "x", why=why))
    gain = None
    if rows:
        a, b = (rows.one(method=name).series for name in ("thoughts, then turns", "turns"))
        gain = paired_difference(a["evidence"], b["evidence"], [int(u) for u in a["unit"]]).scaled(100)
    text = f"thoughts with turns behind them find more of the evidence than turns alone, at {low} tokens"
    claims.append(claim(text, "not in the paper", gain, "> 0", "points"))
    for language in PARAPHRASES:
        same = found.where(part="consistency", language=language)
        if not same:
            continue
        a, b = (same.one(method=name).series for name in ("thoughts", "turns"))
        gap = paired_difference(a["agreement"], b["agreement"], [int(u) for u in a["unit"]])
        text = (
            f"five {language} wordings of a question find the same evidence among thoughts at least as often"
            " as among turns"
        )
        nothing = same.one(method="thoughts").quality["nothing found"]
        why = f"for {nothing:.0%} of the questions rules have read no thought at all" if gap.high < 0 else ""
        claims.append(claim(text, f"{PAPER}, section 1", gap, ">= 0", why=why))
    for buckets in BUCKETS[1:]:
        for row in found.where(method="one bucket", buckets=buckets):
            text = f"one bucket, as in the paper, misses over half of the true neighbours ({buckets} buckets)"
            claims.append(claim(text, f"{PAPER}, section 3.2", mean_interval(row.series["recall"]), "< 0.5"))
    timed_rows = sorted(found.where(part="time"), key=lambda row: int(row.setting["n"]))
    for row in {int(r.setting["n"]): r for r in (timed_rows[:1] + timed_rows[-1:])}.values():
        n = int(row.setting["n"])
        why = "exact search over so few vectors takes less than computing a hash" if n == SIZES[0] else ""
        text = f"hashing at recall .9 is faster than exact search at {n:,} vectors"
        span = bootstrap(row.series["hash over exact"], np.median)
        claims.append(claim(text, f"{PAPER}, table 6", span, "< 1", "x", expected=not why, why=why))
    for row in timed_rows[-1:]:
        if "hash over usearch" in row.series:
            span = bootstrap(row.series["hash over usearch"], np.median)
            text = f"hashing at recall .9 is faster than usearch's graph at {int(row.setting['n']):,} vectors"
            why = "a graph compares a small part of what the buckets hold"
            claims.append(claim(text, "not in the paper", span, "< 1", "x", expected=False, why=why))
    for row in found.where(method="rules", part="tidy"):
        text = "rules drop only what a newer statement contradicts or repeats"
        claims.append(
            claim(
                text,
                f"{PAPER}, section 3.3",
                mean_interval([row.quality["precision"]] * 2),
                ">= 0.99",
                exact=True,
            )
        )
    return claims


def figures(found: Measurements, options: Options) -> list[Figure]:
    """Where hashing pays, and what the form of the memory covers for its tokens."""
    shown: list[Figure] = []
    rows = sorted(found.where(part="time"), key=lambda row: int(row.setting["n"]))
    curves = {}
    for name in ("hash", "exact", "usearch"):
        points = [(float(r.setting["n"]), r.quality[f"{name} ms"]) for r in rows if f"{name} ms" in r.quality]
        if points:
            curves[name] = Series([n for n, _ in points], [ms for _, ms in points])
    if curves:
        title = "Time of a query at recall@10 of .9, by number of vectors"
        shown.append(Lines(title, "vectors", "milliseconds", curves, x_scale="log"))
    forms = {}
    for name in ("turns", "thoughts", "thoughts, then turns", "random turns"):
        held = sorted(found.where(part="form", method=name), key=lambda row: int(row.setting["tokens"]))
        if held:
            forms[name] = Series([r.quality["tokens"] for r in held], [r.quality["evidence"] for r in held])
    if forms:
        shown.append(Lines("Evidence found, by tokens of the prompt", "tokens", "share of evidence", forms))
    return shown


_TAILS = {
    "lives in": ("Rome", "Oslo", "Lima", "Kyoto"), "works as": ("a nurse", "a baker", "a welder", "a clerk"),
    "likes": ("tea", "chess", "rain", "jazz"), "visited": ("Spain", "Peru", "Chad", "Fiji"),
}  # fmt: skip

RECIPE = Recipe(
    name="tim",
    title="Think-in-Memory: facts instead of transcripts, and what a hash of angles finds",
    paper="Think-in-Memory: Recalling and Post-thinking Enable LLMs with Long-Term Memory, arXiv 2311.08719",
    room="recall",
    component="memspan.recall.TiMPolicy",
    problem="recall conclusions instead of transcripts",
    answer="one fact a sentence, with evidence and validity, tidied by checked edits",
    quick_cost="about 1 min",
    options=Options,
    quick=Options(),
    full=Options(conversations="locomo", vectors=100_000, draws=50, streams=50),
    tiny=Options("generated", (100,), "hashing", draws=2, vectors=0, streams=2),
    run=run,
    judge=judge,
    figures=figures,
    control="random turns",
    seeds=(1, 1),
    extras=("recipes", "recall"),
    devices=("cpu",),
)
