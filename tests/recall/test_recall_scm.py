"""Self-controlled memory: gates, ranking, packing, long documents, and prompts of bounded length."""

from __future__ import annotations

import io
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memspan.base import BadInput
from memspan.data import HashingEmbedder
from memspan.recall.chat import ChatClient
from memspan.recall.memory import Memory
from memspan.recall.records import Policy
from memspan.recall.scm import (
    HeuristicController,
    Item,
    LearnedController,
    LLMController,
    SCMPolicy,
    SelfControlledMemory,
    SummarizeLong,
    pack,
    read_choice,
)
from memspan.recall.scm.documents import DoesNotShrink
from memspan.recall.store import SQLiteStore, UserStore
from memspan.recall.summarize import ExtractiveSummarizer
from recall.scripted_server import Answer, ScriptedServer

START = datetime(2023, 5, 1, 12, tzinfo=UTC)
EMBED = HashingEmbedder(64)
ITEMS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=8)


@pytest.fixture
def store(tmp_path: Path) -> UserStore:
    return SQLiteStore(tmp_path / "m.db", EMBED).for_user("u")


def items_of(lengths: list[tuple[int, int]]) -> list[Item]:
    return [Item(i, "r " * (a // 2) + "r" * (a % 2), "s" * b, -float(i)) for i, (a, b) in enumerate(lengths)]


@settings(max_examples=100, deadline=None)
@given(ITEMS, st.integers(0, 150), st.text(max_size=80), st.randoms(use_true_random=False))
def test_packing_never_exceeds_its_budget_and_ends(
    lengths: list[tuple[int, int]], budget: int, flash: str, random: object
) -> None:
    items = items_of(lengths)
    asked: list[str] = []

    def decide(text: str, which: str) -> bool:
        asked.append(which)
        return random.random() < 0.5  # type: ignore[attr-defined, no-any-return]

    packing = pack(items, budget, len, decide, flash)
    assert packing.tokens <= budget
    assert packing.tokens == len(packing.flash) + sum(len(text) for text in packing.texts)
    assert len(asked) == packing.decisions <= 3 * len(items)
    assert [choice.item.turn for choice in packing.choices] == sorted(item.turn for item in items)
    if items and len(items[0].raw) + len(packing.flash) <= budget:
        best = next(choice for choice in packing.choices if choice.item is items[0])
        assert best.kind == "raw"


def test_everything_goes_in_raw_without_questions_where_it_fits() -> None:
    items = items_of([(20, 5), (10, 3), (8, 8)])
    packing = pack(items, 38 + 4, len, lambda text, which: pytest.fail("asked"), "last")
    assert [choice.kind for choice in packing.choices] == ["raw"] * 3
    assert packing.decisions == 0


@pytest.mark.parametrize(
    ("answers", "budget", "kinds"),
    [
        ((False, False), 60, ["raw", "summary", "summary"]),
        ((True, True), 60, ["raw", "summary", "summary"]),
        ((True, False), 60, ["raw", "raw", "summary"]),  # the least similar gives way
        ((True, False), 45, ["raw", "summary", "summary"]),
        ((True, False), 36, ["raw", "drop", "drop"]),
    ],
)
def test_scripted_controllers_lead_to_known_choices(
    answers: tuple[bool, bool], budget: int, kinds: list[str]
) -> None:
    items = items_of([(33, 9), (21, 4), (22, 5)])
    packing = pack(items, budget, len, lambda text, which: answers[which == "summary"])
    assert [choice.kind for choice in packing.choices] == kinds


def test_one_item_longer_than_the_budget_is_cut_at_a_sentence_with_a_mark() -> None:
    raw = "First sentence. Second sentence. Third sentence."
    packing = pack([Item(1, raw, raw)], 30, len)
    assert packing.texts == ["First sentence. [cut]"]
    assert pack([Item(1, raw, "short")], 30, len).texts == ["short"]
    assert pack([Item(1, raw, raw)], 0, len).texts == []


def test_ranking_adds_recency_to_the_searchs_score(store: UserStore) -> None:
    observe(SCMPolicy(), store, 30)
    for weight in (0.0, 0.25, 500.0):
        policy = SCMPolicy(gate="always", recency_weight=weight, gamma=0.9)
        hits = policy.recall(store, "topic3 or topic7 or topic20", 8, START)
        for hit in hits:
            age = 31 - hit.record.metadata["turn"]
            assert abs(hit.parts["recency"] - 0.9**age) < 1e-12
            assert abs(hit.score - (hit.parts["relevance"] + weight * 0.9**age)) < 1e-9
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
        if weight == 500.0:  # recency alone decides
            assert [hit.record.metadata["turn"] for hit in hits][:3] == [29, 28, 27]
    for k in (0, 51):
        with pytest.raises(BadInput):
            policy.recall(store, "topic3", k, START)


def test_every_activated_memory_gets_in_where_their_shortest_forms_fit() -> None:
    raw, short = [900, 1200, 700, 2600, 400, 300], [80, 90, 60, 120, 400, 300]
    items = [Item(i, "r" * raw[i], "s" * short[i], -rank) for rank, i in enumerate((3, 0, 1, 2, 4, 5))]
    packing = pack(items, 2500, len)
    assert {choice.item.turn: choice.kind for choice in packing.choices} == {
        3: "summary", 0: "raw", 1: "summary", 2: "summary", 4: "raw", 5: "raw"
    }  # fmt: skip
    assert packing.tokens <= 2500


CHOICES = {
    "(A)": True, "A.": True, "Yes": True, "是": True, "(A) yes / (B) no": False, "": True, "I cannot": True,
    "(B)否": False, "a": True, "  (b)": False, "b)": False, "No.": False, "不需要": False,
    "Answer: B": False, "不是": False, "(A)是": True,
}  # fmt: skip


@pytest.mark.parametrize(("text", "yes"), CHOICES.items())
def test_a_gates_words_are_read_as_tabled(text: str, yes: bool) -> None:
    assert read_choice(text) is yes


def observe(policy: SCMPolicy, store: UserStore, count: int, words: int = 5) -> None:
    for i in range(count):
        policy.observe(
            store,
            [
                {"role": "user", "content": f"question {i} about topic{i} " + "word " * words},
                {"role": "assistant", "content": f"answer {i} " + "reply " * words},
            ],
            START + timedelta(minutes=i),
        )


def test_turns_are_numbered_and_shown_in_order_with_their_numbers(store: UserStore) -> None:
    policy = SCMPolicy(gate="always")
    observe(policy, store, 8)
    hits = policy.recall(store, "topic2 or topic5", 4, START)
    packed = policy.context(store, "topic2 or topic5", hits, 2000)
    lines = packed[0]["content"].split("<memory>\n")[1].splitlines()[:-1]
    numbers = [int(line.split("Turn ")[1].split()[0]) for line in lines]
    assert numbers == sorted(numbers)
    assert numbers[-1] == 8  # the last turn, as flash memory
    for line, number in zip(lines, numbers, strict=True):
        assert f"question {number - 1} " in line


def test_the_last_turn_is_flash_memory_and_never_ranked(store: UserStore) -> None:
    policy = SCMPolicy(gate="always")
    observe(policy, store, 1)
    assert policy.recall(store, "topic0", 3, START) == []
    observe(policy, store, 1)
    assert [hit.record.metadata["turn"] for hit in policy.recall(store, "topic0", 3, START)] == [1]


def test_calls_of_the_model_are_counted_turn_by_turn(tmp_path: Path) -> None:
    def script(body: dict) -> str:  # type: ignore[type-arg]
        text = str(body["messages"][-1]["content"])
        return "(A)" if "Answer:" in text else "Said this. Answered that."

    with ScriptedServer(script) as server:
        client = ChatClient(server.url, "scripted")
        policy = SCMPolicy(controller=LLMController(client, test=False))
        mem = SelfControlledMemory(client, tmp_path / "m.db", budget=600, k=9, policy=policy, embedder=EMBED)
        for i in range(7):
            mem.observe(user=f"short topic{i}", assistant="yes", at=START)
        assert len(server) == 0  # short turns are their own summary
        mem.say("what about topic3?", at=START)
        assert len(server) == 2  # the gate and the answer; all fits, so nothing else is asked
        for i in range(4):
            mem.observe(user=f"long topic{i} " + "word " * 220, assistant="yes " * 60, at=START)
        before = len(server)
        assert before == 2  # without a summarizer sentences are picked
        mem.say("what about topic3?", at=START)
        assert 2 < len(server) - before <= 1 + 2 * (9 - 1) + 1
        assert mem.last_trace["calls"] == len(server) - before - 2


def test_short_turns_are_their_own_summary_and_a_failing_summary_is_replaced_and_marked(
    store: UserStore,
) -> None:
    from memspan.recall.summarize import LLMSummarizer

    long = "The park was green. " * 60
    with ScriptedServer(["The user saw a park. The assistant agreed.", Answer(status=400)]) as server:
        policy = SCMPolicy(summarizer=LLMSummarizer(ChatClient(server.url, "scripted", retries=0)))
        texts = [("hi", "hello"), (long, "I agree."), (long, "Well.")]
        for query, response in texts:
            policy.observe(
                store, [{"role": "user", "content": query}, {"role": "assistant", "content": response}], START
            )
        assert len(server) == 2
    first, second, third = store.iterate(kinds=("turn",))
    assert first.metadata["summary"] == "[Turn 1] User: hi Assistant: hello"
    assert "saw a park" in second.metadata["summary"]
    assert third.metadata["summary_by"] == "extractive, since ChatFailed"
    assert 0 < len(third.metadata["summary"]) < len(long)


def test_prompts_stay_bounded_over_two_hundred_turns_while_the_history_grows(tmp_path: Path) -> None:
    mem = Memory(tmp_path / "m.db", policy=SCMPolicy(), embedder=EMBED)
    sizes, history = [], 0
    for i in range(200):
        packed = mem.prompt(f"As we discussed before, what about topic{i // 2}?", 6, 700, at=START)
        sizes.append(packed.tokens)
        text = f"question about topic{i} " + "word " * 40
        mem.observe(user=text, assistant="reply " * 40, at=START)
        history += mem.counter(text) + 40
    assert max(sizes) <= 700
    assert np.mean(sizes[150:]) < 1.5 * np.mean(sizes[20:70])
    assert history > 20 * max(sizes)


def test_a_gate_that_says_no_leaves_only_the_last_turn(store: UserStore) -> None:
    policy = SCMPolicy()
    observe(policy, store, 5)
    hits = policy.recall(store, "Translate good morning into French.", 3, START)
    assert hits == []
    assert not hits.decision
    packed = policy.context(store, "Translate good morning into French.", hits, 500)
    assert packed.trace["gate"]["needed"] is False
    assert packed[0]["content"].count("[Turn ") == 1


def test_the_trace_is_kept_with_its_turn_and_erased_with_it(tmp_path: Path) -> None:
    with ScriptedServer("fine") as server:
        mem = SelfControlledMemory(ChatClient(server.url, "s"), tmp_path / "m.db", embedder=EMBED)
        mem.observe(user="I like tea", assistant="Good", at=START)
        mem.observe(user="and cake", assistant="Good", at=START)
        mem.say("Do you remember what I said before?", at=START)
        trace = next(iter(mem.store.iterate(kinds=("trace",))))
        assert trace.metadata["gate"]["needed"] is True
        assert [item["turn"] for item in trace.metadata["items"]] == [1]
        assert mem.why(trace.metadata["items"][0]["id"])["placed_in_prompts"] == 1
        mem.forget(trace.evidence[0], hard=True)
        assert list(mem.store.iterate(kinds=("trace",))) == []


def test_counting_questions_scan_more_turns_shortly(store: UserStore) -> None:
    policy = SCMPolicy(gate="always")
    observe(policy, store, 20, words=60)
    assert len(policy.recall(store, "How many topics did I ask about?", 4, START)) == 16
    assert len(policy.recall(store, "topic4 again", 4, START)) == 4


def test_sufficiency_grows_with_relevant_text() -> None:
    controller = HeuristicController()
    query = "Which park near the river did Emily visit in May?"
    texts = [
        "",
        "Nothing here.",
        "Emily is here.",
        "Emily is here. A park.",
        "Emily: a park by the river. May. visit near",
    ]
    shares = [controller.sufficient(text, query).p for text in texts]
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert controller.sufficient(f"She asked: {query}", query).p == 1


def test_two_requests_at_once_keep_turn_numbers_unique_and_users_apart(tmp_path: Path) -> None:
    store = SQLiteStore(tmp_path / "m.db", EMBED)
    policy = SCMPolicy(gate="always")
    barrier = threading.Barrier(4)

    def talk(user: str) -> None:
        handle = store.for_user(user)
        barrier.wait()
        for i in range(10):
            policy.observe(handle, [{"role": "user", "content": f"{user} says {i}"}], START)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(talk, ["ann", "ann", "bob", "bob"]))
    for user, other in (("ann", "bob"), ("bob", "ann")):
        turns = list(store.for_user(user).iterate(kinds=("turn",)))
        assert [turn.metadata["turn"] for turn in turns] == list(range(1, 21))
        assert [turn.id for turn in turns] == sorted(turn.id for turn in turns)
        packed = policy.context(
            store.for_user(user), "says", policy.recall(store.for_user(user), "says", 3, START), 900
        )
        assert other not in packed[0]["content"]


def test_a_model_that_ranks_backwards_is_reported() -> None:
    def backwards(body: dict) -> Answer:  # type: ignore[type-arg]
        remembers = any(
            word in str(body["messages"][-1]["content"])
            for word in ("before", "last week", "remember", "first question", "Did I")
        )
        return Answer("A", top_logprobs={"A": -3.0 if remembers else -0.1, "B": -0.1 if remembers else -3.0})

    with ScriptedServer(backwards) as server:
        controller = LLMController(ChatClient(server.url, "scripted"))
        with pytest.warns(UserWarning, match="HeuristicController"):
            decision = controller.need_memory("What is the capital of Peru?", "")
        assert controller.auc == 0
        assert decision
        assert controller.calls == 11


def test_a_learned_controller_repeats_and_refuses_one_class() -> None:
    queries, labels = (
        ["do you remember my cat?", "what is a cat?", "what did I say before?", "name a tree"] * 3,
        [1, 0, 1, 0] * 3,
    )
    one, two = (LearnedController(HashingEmbedder(32)).fit(queries, labels) for _ in range(2))
    assert np.array_equal(one.weights_, two.weights_)
    assert ((one.predict_proba(queries) > 0.5) == np.array(labels)).all()
    with pytest.raises(BadInput):
        LearnedController().fit(["a"], [1])
    with pytest.raises(BadInput):
        LearnedController().need_memory("a", "")


BOOK = " ".join(f"Chapter {i} tells that the key number {i} is made of metal {i * 7}." for i in range(60))


def test_a_long_document_becomes_a_tree_that_leads_back_to_its_chunks() -> None:
    done = SummarizeLong(ExtractiveSummarizer(EMBED), 150, 150, chunk_summary_tokens=60).run(BOOK)
    assert "".join(done.chunks) == BOOK
    assert [len(level) for level in done.levels] == sorted(
        (len(level) for level in done.levels), reverse=True
    )
    assert len(done.levels[-1]) == 1
    assert done.sources(0) == list(range(len(done.chunks)))
    assert done.verify() == []
    plan = SummarizeLong(ExtractiveSummarizer(EMBED), 150, 150, chunk_summary_tokens=60).plan(BOOK)
    assert done.calls <= plan.calls
    assert plan.chunks == len(done.chunks)


def test_a_killed_run_makes_exactly_the_missing_calls(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text(BOOK)

    def said(body: dict) -> str:  # type: ignore[type-arg]
        text = str(body["messages"][-1]["content"])
        return f"Chapter {text.split('Chapter ')[-1][:3]} and a key."

    def killed(body: dict) -> Answer | str:  # type: ignore[type-arg]
        return said(body) if len(first.calls) <= 4 else Answer(status=400)

    def job(server: ScriptedServer) -> SummarizeLong:
        return SummarizeLong(ChatClient(server.url, "scripted", retries=0), 150, 100, chunk_summary_tokens=60)

    with ScriptedServer(said) as server:
        whole = job(server).run(BOOK)
        all_calls = len(server)
    assert whole.calls == all_calls
    with ScriptedServer(killed) as first:
        with pytest.raises(Exception, match="refused"):
            job(first).run(path)
        answered = len(first) - 1
    checkpoint = tmp_path / "book.txt.summary.jsonl"
    with checkpoint.open("a") as file:
        file.write('{"key": "half of a li')  # what a kill in the middle of a write leaves
    with ScriptedServer(said) as server:
        resumed = job(server).run(path)
        assert len(server) == all_calls - answered
        assert (resumed.text, resumed.levels) == (whole.text, whole.levels)
        assert job(server).run(path.open()).calls == 0


def test_summaries_that_do_not_shrink_end_with_an_error_naming_the_chunk() -> None:
    class Echo:
        id = "echo"

        def __call__(self, texts: list[str], **options: object) -> str:
            return " ".join(texts)

    with pytest.raises(DoesNotShrink, match="of chunk"):
        SummarizeLong(Echo(), 100, 60).run(BOOK)  # type: ignore[arg-type]


def test_groups_keep_their_order_and_limit() -> None:
    from memspan.recall.scm.documents import Node

    job = SummarizeLong(ExtractiveSummarizer(EMBED), 100, 100, counter=len)
    nodes = [Node(0, i, "x" * n, (i,)) for i, n in enumerate((30, 60, 20, 150, 90, 10, 5))]
    groups = job._groups(nodes)
    assert [i for group in groups for i in group] == list(range(7))
    assert all(len(group) == 1 or sum(len(nodes[i].text) for i in group) <= 100 for group in groups)


@pytest.mark.parametrize("source", [io.BytesIO(b"caf\xe9 latin"), io.StringIO("a\x00b"), io.StringIO("  ")])
def test_what_is_no_text_is_refused_with_its_bytes(source: object) -> None:
    with pytest.raises(BadInput, match="source"):
        SummarizeLong(ExtractiveSummarizer(EMBED)).run(source)  # type: ignore[arg-type]


def test_small_budgets_and_odd_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="budget"):
        SelfControlledMemory(ChatClient("http://127.0.0.1:1", "m"), tmp_path / "m.db", budget=199)
    mem = Memory(tmp_path / "m.db", policy=SCMPolicy(), embedder=EMBED)
    with pytest.raises(BadInput, match="budget_tokens"):
        mem.prompt("x", budget_tokens=100)
    for options in ({"gamma": 0}, {"recency_weight": -1}, {"gate": "never"}, {"embed": "x"}):
        with pytest.raises(BadInput):
            SCMPolicy(**options)  # type: ignore[arg-type]
    assert isinstance(SCMPolicy(), Policy)
