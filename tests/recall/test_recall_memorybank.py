"""MemoryBank: the law of retention, sweeps that do not compound, budgets, summaries and portraits."""

from __future__ import annotations

import json
import warnings
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memspan.base import BadInput
from memspan.base.rng import rng
from memspan.data import HashingEmbedder
from memspan.recall.chat import ChatClient
from memspan.recall.memorybank import (
    LLMTraits,
    MemoryBankPolicy,
    Portrait,
    days,
    expected_survivors,
    gini,
    lifetime,
    record_bytes,
    retention,
)
from memspan.recall.records import Policy, Record
from memspan.recall.store import SQLiteStore, UserStore
from memspan.recall.summarize import ExtractiveSummarizer, LLMSummarizer
from recall.scripted_server import Answer, ScriptedServer

START = datetime(2023, 5, 1, 12, tzinfo=UTC)
EMBED = HashingEmbedder(32)


@pytest.fixture
def store(tmp_path: Path) -> UserStore:
    return SQLiteStore(tmp_path / "m.db", EMBED).for_user("emily")


def turn(user: str, assistant: str = "I see.") -> list[dict[str, str]]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def test_retention_is_the_exponential_of_age_over_strength() -> None:
    age = rng("retention").uniform(0, days(60), 500)
    strength = 1.0 + rng("strength").integers(0, 9, 500)
    assert np.abs(retention(age, strength, days(3)) - np.exp(-age / (days(3) * strength))).max() < 1e-12
    table = retention(days(1) * np.array([1, 3, 7]), np.array([[1], [2], [3]]), days(1))
    wanted = [[0.3679, 0.0498, 0.0009], [0.6065, 0.2231, 0.0302], [0.7165, 0.3679, 0.0970]]
    assert np.abs(table - wanted).max() < 5e-5
    assert retention(0.0, 1) == 1.0
    as_tensor = retention(torch.tensor(age), torch.tensor(strength), days(3))
    assert as_tensor.dtype == torch.float64
    assert np.abs(as_tensor.numpy() - retention(age, strength, days(3))).max() < 1e-12


@given(st.floats(1, 1e7), st.floats(1, 30), st.floats(1.01, 3), st.sampled_from(["exponential", "power"]))
def test_retention_grows_with_strength_and_falls_with_age(
    age: float, s: float, more: float, curve: str
) -> None:
    assert retention(age, s * more, days(5), curve) > retention(age, s, days(5), curve)
    assert retention(age * more, s, days(5), curve) < retention(age, s, days(5), curve)


def test_the_form_without_brackets_would_let_strong_memories_fade_faster() -> None:
    faulty = [np.exp(-3 / 5 * s) for s in (1, 2, 3)]  # exp(-t / 5 * S) is exp(-t S / 5)
    assert faulty[0] > faulty[1] > faulty[2]
    assert list(retention(days(3), np.array([1, 2, 3]))) == sorted(retention(days(3), np.array([1, 2, 3])))


def test_a_clock_that_went_back_counts_as_no_age() -> None:
    with pytest.warns(UserWarning, match="clock"):
        assert retention(-5.0, 1) == 1.0


def test_lifetime_is_where_retention_meets_the_threshold() -> None:
    for curve in ("exponential", "power"):
        at = lifetime(3, 0.2, days(5), curve)
        assert abs(retention(at, 3, days(5), curve) - 0.2) < 1e-12


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"time_scale": 0}, "time_scale"),
        ({"time_scale": -1.0}, "time_scale"),
        ({"mode": "threshold", "threshold": 1.0}, "threshold"),
        ({"mode": "budget"}, "budget"),
        ({"mode": "budget", "budget": 100}, "budget"),
        ({"mode": "fifo"}, "mode"),
        ({"recency": -1}, "recency"),
    ],
)
def test_settings_without_a_meaning_are_refused(options: dict[str, object], argument: str) -> None:
    with pytest.raises(BadInput) as error:
        MemoryBankPolicy(**options)  # type: ignore[arg-type]
    assert error.value.argument == argument


def fill(store: UserStore, count: int) -> None:
    records = [Record(f"memory {i}", START) for i in range(count)]
    vectors = np.zeros((count, EMBED.dim), np.float32)
    vectors[:, 0] = 1
    store.add(records, vectors=vectors)


def alive(store: UserStore) -> set[str]:
    return {record.text for record in store.iterate()}


def test_survival_follows_retention_however_often_sweeps_run(tmp_path: Path) -> None:
    policy = MemoryBankPolicy(mode="sample", salt="law")
    survivors = []
    for name, hours in (
        ("once", [120]),
        ("daily", [24, 48, 72, 96, 120]),
        ("often", [*range(10, 120, 10), 120]),
    ):
        store = SQLiteStore(tmp_path / f"{name}.db", EMBED).for_user("u")
        ids = [f"01H0000000000000000000{i:04d}" for i in range(2000)]
        vectors = np.zeros((2000, EMBED.dim), np.float32)
        vectors[:, 0] = 1
        store.add([Record(f"memory {id}", START, id=id) for id in ids], vectors=vectors)
        for hour in hours:
            policy.forget(store, START + timedelta(hours=hour))
        survivors.append({record.id for record in store.iterate()})
    assert survivors[0] == survivors[1] == survivors[2]
    # The law itself, on the draws that the policy makes.
    draws = np.array([policy._draw(store, Record("x", START, id=f"id-{i}")) for i in range(20_000)])
    assert abs((retention(days(5), 1) >= draws).mean() - 0.3679) < 0.0103
    assert abs(len(survivors[0]) / 2000 - 0.3679) < 3 * 0.0108
    assert abs(expected_survivors(np.full(2000, days(5))) - 735.76) < 0.01


def test_sweeping_is_idempotent_and_later_sweeps_swallow_earlier_ones(tmp_path: Path) -> None:
    policy = MemoryBankPolicy(mode="sample", salt="s")
    stores = [SQLiteStore(tmp_path / f"{i}.db", EMBED).for_user("u") for i in (0, 1)]
    for store in stores:
        store.add([Record(f"m{i}", START, id=f"01H000000000000000000000{i:02d}") for i in range(60)])
    first, later = START + timedelta(days=2), START + timedelta(days=6)
    planned = policy.forget(stores[0], first, dry_run=True)
    assert len(alive(stores[0])) == 60
    assert policy.forget(stores[0], first) == planned
    assert policy.forget(stores[0], first) == []
    policy.forget(stores[0], later)
    policy.forget(stores[1], later)
    assert alive(stores[0]) == alive(stores[1])
    assert all("retention" in one.reason and one.retention is not None for one in planned)


def test_use_strengthens_and_starts_the_age_anew(store: UserStore) -> None:
    policy = MemoryBankPolicy()
    (id,) = policy.observe(store, turn("I visited Green Meadow Park"), START)
    for day in range(1, 8):
        hits = policy.recall(store, "which park?", 1, START + timedelta(days=day))
        assert [hit.record.id for hit in hits] == [id]
        store.reinforce(policy.used(hits, "It was Green Meadow Park."), START + timedelta(days=day))
    (record,) = store.get([id])
    assert record.strength == 8
    assert record.last_recalled == START + timedelta(days=7)
    later = START + timedelta(days=10)
    assert abs(policy.retention_of(record, later) - np.exp(-3 / (5 * 8))) < 1e-12
    policy.recall(store, "which park?", 1, later)
    assert store.get([id])[0].strength == 8


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(0, 40)), min_size=1, max_size=12),
    st.integers(600, 9000),
)
def test_a_budget_is_never_exceeded_and_keeps_the_best_retained(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[tuple[int, int]], budget: int
) -> None:
    store = SQLiteStore(tmp_path_factory.mktemp("budget") / "m.db", EMBED).for_user("u")
    store.add([Record("w" * n, START + timedelta(days=age)) for n, age in sizes])
    policy = MemoryBankPolicy(mode="budget", budget=budget)
    now = START + timedelta(days=41)
    before = list(store.iterate())
    gone = policy.forget(store, now)
    kept = list(store.iterate())
    assert sum(record_bytes(r, EMBED.dim) for r in kept) <= budget
    order = sorted(
        sorted(before, key=lambda r: r.id, reverse=True), key=lambda r: -policy.retention_of(r, now)
    )
    assert {r.id for r in kept} == {r.id for r in order[: len(kept)]}
    assert len(gone) + len(kept) == len(before)
    store.restore([one.id for one in gone])
    assert MemoryBankPolicy().forget(store, now) == []  # without a budget all is kept
    assert len(list(store.iterate())) == len(before)


def test_threshold_forgets_exactly_at_the_lifetime(store: UserStore) -> None:
    policy = MemoryBankPolicy(mode="threshold", threshold=0.3)
    fill(store, 3)
    life = timedelta(seconds=lifetime(1, 0.3))
    assert policy.forget(store, START + life - timedelta(seconds=1)) == []
    assert len(policy.forget(store, START + life + timedelta(seconds=1))) == 3


def test_time_zones_of_one_instant_give_one_retention(store: UserStore) -> None:
    policy = MemoryBankPolicy()
    berlin = timezone(timedelta(hours=2))
    (a,) = policy.observe(store, turn("in Berlin"), START.astimezone(berlin))
    (b,) = policy.observe(store, turn("in Greenwich"), START)
    now = START + timedelta(days=3)
    first, second = store.get([a, b])
    assert policy.retention_of(first, now) == policy.retention_of(second, now.astimezone(berlin))
    # The night when clocks are set back: 02:30 comes twice, an hour apart.
    zone = ZoneInfo("Europe/Berlin")
    early, late = (datetime(2023, 10, 29, 2, 30, tzinfo=zone, fold=fold) for fold in (0, 1))
    x, y = (policy.observe(store, turn(f"night {i}"), at)[0] for i, at in enumerate((early, late)))
    one, two = store.get([x, y])
    assert (two.created_at - one.created_at) == timedelta(hours=1)
    with pytest.raises(BadInput, match="zone"):
        policy.observe(store, turn("when?"), datetime(2023, 5, 1))


def test_days_are_condensed_once_they_are_over_and_the_overall_summary_is_remade(store: UserStore) -> None:
    policy = MemoryBankPolicy(summarizer=ExtractiveSummarizer(EMBED), summary_tokens=60)
    policy.observe(store, turn("I went to Green Meadow Park"), START)
    assert policy.condense(store, START) == []  # the day is not over
    policy.observe(store, turn("I saw a squirrel"), START + timedelta(days=1))
    assert len(policy.condense(store, START + timedelta(days=1))) == 2
    assert len(policy.condense(store, START + timedelta(days=2))) == 2
    summaries = list(store.iterate(kinds=("summary",)))
    assert sorted(s.metadata["scope"] for s in summaries) == ["day", "day", "global"]
    assert all(
        hit.record.metadata.get("scope") != "global"
        for hit in policy.recall(store, "park squirrel", 5, START + timedelta(days=2))
    )
    block = policy.context(store, "park", [], 400)
    assert "overall summary" in block[0]["content"]
    gone = policy.forget(store, START, [r.id for r in store.iterate(kinds=("turn",))])
    assert len(gone) == 2
    assert len(list(store.iterate(kinds=("summary",)))) == 3  # the gist outlives the detail


def test_a_failing_model_leaves_turns_whole_and_the_day_is_tried_once_more(store: UserStore) -> None:
    script = [Answer(status=400), Answer("", chunks=None), "A day in the park.", "Overall: a park."]
    with ScriptedServer(script) as server:
        client = ChatClient(server.url, "scripted", retries=0)
        policy = MemoryBankPolicy(summarizer=LLMSummarizer(client))
        policy.observe(store, turn("I went to the park"), START)
        later = START + timedelta(days=1)
        with pytest.warns(UserWarning, match="pending again"):
            assert policy.condense(store, later) == []
        assert [r.kind for r in store.iterate()] == ["turn"]
        with pytest.warns(UserWarning, match="failed"):
            assert policy.condense(store, later) == []
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert policy.condense(store, later) == []  # not tried a third time
        assert len(server) == 2
        # More words on that day open it again.
        policy.observe(store, turn("and home again"), START)
        assert len(policy.condense(store, later)) == 2
        first = next(iter(store.iterate(kinds=("summary",))))
        assert first.text == "Events of 2023-05-01: A day in the park."


def test_a_portrait_holds_claims_with_evidence_from_the_users_words_alone(store: UserStore) -> None:
    seen, unseen = ({"field": "Likes", "value": "hiking", "lines": [n]} for n in (0, 7))
    reply = json.dumps({"traits": [seen, {**unseen, "value": "chess"}]})
    with ScriptedServer(reply) as server:
        policy = MemoryBankPolicy(traits=LLMTraits(ChatClient(server.url, "scripted")))
        (id,) = policy.observe(store, turn("I love hiking", "You like skiing"), START)
        policy.condense(store, START + timedelta(days=1))
        assert "skiing" not in server.prompts()[0]
    portrait = Portrait(store)
    (trait,) = portrait.traits()
    assert (trait.field, trait.value, trait.evidence, trait.first_seen) == ("likes", "hiking", (id,), START)
    assert portrait.prose() == "likes: hiking"
    own = store.add(
        [Record("The user likes boxing", START, source={"role": "assistant", "trust": "assistant"})]
    )
    with pytest.raises(BadInput, match="user"):
        portrait.learn("likes", "boxing", store.get(own))
    portrait.learn("likes", "Hiking", store.get([id]))
    assert len(portrait.traits()) == 1
    assert portrait.forget("likes") == 1
    assert portrait.traits() == []
    # A privacy deletion of the only evidence takes the claim with it.
    portrait.learn("likes", "hiking", store.get([id]))
    store.erase([id], hard=True)
    assert portrait.traits() == []


def test_explanations_tell_strength_draw_and_when_it_fades(store: UserStore) -> None:
    policy = MemoryBankPolicy(salt="s", mode="sample")
    (id,) = policy.observe(store, turn("I like tea"), START)
    told = policy.explain(store, id)
    assert told["strength"] == 1
    assert told["said"] == START.isoformat()
    assert datetime.fromisoformat(str(told["fades_to_threshold"])) == START + timedelta(
        seconds=lifetime(1, 0.1)
    )
    gone = policy.forget(store, START + timedelta(days=100))
    assert [one.id for one in gone] == [id]
    assert policy.explain(store, id)["state"] == "deleted"
    with pytest.raises(BadInput, match="no such record"):
        policy.explain(store, "nothing")


def test_it_is_a_policy_and_strength_spread_is_told() -> None:
    assert isinstance(MemoryBankPolicy(), Policy)
    assert gini([3, 3, 3]) == 0
    assert gini([1, 1, 10]) > gini([1, 5, 6])
    assert gini([]) == 0


def test_recency_moves_older_memories_down(store: UserStore) -> None:
    plain, recent = MemoryBankPolicy(), MemoryBankPolicy(recency=1.0)
    (old,) = plain.observe(store, turn("tea with Ann in the garden"), START)
    (new,) = plain.observe(store, turn("tea"), START + timedelta(days=30))
    now = START + timedelta(days=30)
    assert plain.recall(store, "tea with Ann in the garden", 2, now)[0].record.id == old
    assert recent.recall(store, "tea with Ann in the garden", 2, now)[0].record.id == new
