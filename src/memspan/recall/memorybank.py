"""MemoryBank: what is used again lasts longer; the rest fades.

A chat application forgets its user after every session, and a prompt that holds everything does not scale.
MemoryBank (Zhong et al., AAAI 2024, arXiv 2305.10250) stores every turn, condenses days into event summaries
and a portrait, recalls by similarity, and lets a memory fade as Ebbinghaus measured: retention ``R = exp(-t /
(tau S))``, where the strength S grows by one and t starts anew whenever the memory is recalled.

What the paper leaves open is settled here: ``tau`` is 5 days (with the literal 1 day nothing survives a
week); a memory draws ONE uniform for each period between two recalls, so that sweeping often forgets no more
than sweeping once; and by default nothing is deleted at all (``mode="rank"``).

Example:
    >>> from datetime import timedelta
    >>> round(float(retention(days(5), 1)), 3), round(float(retention(days(5), 2)), 3)
    (0.368, 0.607)
    >>> round(lifetime(2, threshold=0.5) / days(1), 2)
    6.93

Use something simpler when the history fits the prompt, or when facts must never fade: then keep
``mode="rank"``.
"""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from memspan.base import refuse
from memspan.base.rng import uniform
from memspan.recall.choose import choose
from memspan.recall.pack import Piece, pack_prompt
from memspan.recall.records import Forgotten, Hit, Message, Policy, Record, Source
from memspan.recall.text import TokenCounter
from memspan.recall.turns import check_time, hit_piece, keep_turns, turns_of

if TYPE_CHECKING:
    from memspan.recall.chat import Chat
    from memspan.recall.store import UserStore
    from memspan.recall.summarize import Summarizer

__all__ = [
    "MemoryBankPolicy",
    "Portrait",
    "Trait",
    "days",
    "expected_survivors",
    "gini",
    "lifetime",
    "record_bytes",
    "retention",
]

Curve = Literal["exponential", "power"]
_DAY = 86_400.0
_TAU = 5 * _DAY
_SALT = "memorybank.salt"
_DAYS = "memorybank.days"  # day -> pending, failed (once) or done
# Rows, ids, times and index entries beside text and vector, as measured on the SQLite store's files.
_ROW = 512


def days(count: float) -> float:
    """Days in seconds.

    Example:
        >>> days(2)
        172800.0
    """
    return count * _DAY


def retention(age: Any, strength: Any, time_scale: float = _TAU, curve: Curve = "exponential") -> Any:
    """How much of a memory is left: ``exp(-age / (time_scale * strength))``.

    Args:
        age: seconds since it was learned or last recalled; numbers, NumPy arrays or torch tensors, which
            broadcast. Below 0 (a clock that went back) counts as 0, with a warning.
        strength: 1 when new, one more for each recall; likewise.
        time_scale: tau, in seconds.
        curve: ``"power"`` is ours: ``(1 + age / time_scale) ** (-1 / strength)``, which fits human data
            better.

    Returns:
        Between 0 and 1, in float64; a tensor where one was given.

    Raises:
        BadInput: a time scale or a strength that is not above 0, or an unknown curve.

    Example:
        >>> [round(float(retention(days(3), s, days(1))), 4) for s in (1, 2, 3)]
        [0.0498, 0.2231, 0.3679]
    """
    if not 0 < time_scale < float("inf"):
        refuse("time_scale", time_scale, "give seconds, more than 0")
    if curve not in ("exponential", "power"):
        refuse("curve", curve, 'use "exponential" or "power"')
    torch_like = next((x for x in (age, strength) if hasattr(x, "detach")), None)
    if torch_like is not None:
        import torch

        t = torch.as_tensor(age, dtype=torch.float64, device=torch_like.device)
        s = torch.as_tensor(strength, dtype=torch.float64, device=torch_like.device)
        _check_ages(bool((s <= 0).any()), bool((t < 0).any()), strength)
        t = t.clamp_min(0) / time_scale
        return torch.exp(-t / s) if curve == "exponential" else (1 + t) ** (-1 / s)
    x, y = np.asarray(age, np.float64), np.asarray(strength, np.float64)
    _check_ages(bool((y <= 0).any()), bool((x < 0).any()), strength)
    x = np.maximum(x, 0) / time_scale
    return np.exp(-x / y) if curve == "exponential" else (1 + x) ** (-1 / y)


def lifetime(
    strength: float, threshold: float, time_scale: float = _TAU, curve: Curve = "exponential"
) -> float:
    """Seconds until retention falls to ``threshold``: ``time_scale * strength * ln(1 / threshold)``.

    Raises:
        BadInput: a threshold outside (0, 1).
    """
    if not 0 < threshold < 1:
        refuse("threshold", threshold, "between 0 and 1, both excluded")
    if not strength > 0 or not time_scale > 0:
        refuse("strength, time_scale", (strength, time_scale), "more than 0")
    if curve == "power":
        return float(time_scale * (threshold**-strength - 1))
    return float(time_scale * strength * np.log(1 / threshold))


def expected_survivors(
    ages: Any, strengths: Any = 1.0, time_scale: float = _TAU, curve: Curve = "exponential"
) -> float:
    """How many memories of these ages (seconds) and strengths survive a ``"sample"`` sweep, on average.

    Example:
        >>> round(expected_survivors([days(1), days(5)]), 3)
        1.187
    """
    return float(np.sum(retention(ages, strengths, time_scale, curve)))


def gini(strengths: Iterable[float]) -> float:
    """How unequally strength is spread: 0 when all are alike, near 1 when few memories take every recall.

    Example:
        >>> gini([1, 1, 1, 1]), round(gini([1, 1, 1, 97]), 2)
        (0.0, 0.72)
    """
    values = np.sort(np.asarray(list(strengths), np.float64))
    if not values.size or values.sum() == 0:
        return 0.0
    place = np.arange(1, values.size + 1)
    return float((2 * place - values.size - 1) @ values / (values.size * values.sum()))


def record_bytes(record: Record, dim: int) -> int:
    """What a record counts in mode ``"budget"``: text twice (row, word index), float16 vector, row."""
    return 2 * len(record.text.encode()) + 2 * dim + _ROW


class TraitReader(Protocol):
    """A user's own words of one day -> traits, as (field, value, numbers of the lines that show it)."""

    def __call__(self, lines: Sequence[str], day: str) -> list[tuple[str, str, list[int]]]:
        """Read."""
        ...


@dataclass(frozen=True)
class Trait:
    """One claim about the user, with what shows it.

    Attributes:
        field: such as ``likes``.
        value: such as ``hiking``.
        evidence: ids of the turns.
        first_seen: earliest of them.
        last_seen: latest of them.
        id: of its record; delete it like any other.
    """

    field: str
    value: str
    evidence: tuple[str, ...]
    first_seen: datetime
    last_seen: datetime
    id: str = ""


class Portrait:
    """What is known of the user as a person: claims with evidence, each of them shown, and deletable.

    Args:
        store: the user's store; traits are its records of kind ``portrait``.
    """

    def __init__(self, store: UserStore) -> None:
        self.store = store

    def traits(self) -> list[Trait]:
        """All traits, by field and value."""
        found = [
            _trait(record) for record in self.store.iterate(kinds=("portrait",)) if "field" in record.metadata
        ]
        return sorted(found, key=lambda one: (one.field, one.value))

    def learn(self, field: str, value: str, turns: Sequence[Record]) -> str:
        """Add a trait or more evidence to it; its record's id.

        Raises:
            BadInput: a turn that the user did not say: only the user's own words may change a portrait.
        """
        if not turns or any(turn.source.get("trust", "user") != "user" for turn in turns):
            refuse("turns", [turn.id for turn in turns], "give turns of the user alone")
        field, value = field.strip().lower(), value.strip()
        first, last = min(t.created_at for t in turns), max(t.created_at for t in turns)
        ids = [turn.id for turn in turns]
        for known in self.traits():
            if known.field == field and known.value.lower() == value.lower():
                evidence = tuple(dict.fromkeys([*known.evidence, *ids]))
                seen = {"first_seen": min(first, known.first_seen), "last_seen": max(last, known.last_seen)}
                told = {"field": field, "value": known.value, **{k: v.isoformat() for k, v in seen.items()}}
                self.store.update(known.id, evidence=evidence, metadata=told)
                return known.id
        told = {
            "field": field,
            "value": value,
            "first_seen": first.isoformat(),
            "last_seen": last.isoformat(),
        }
        record = Record(
            f"{field}: {value}", last, kind="portrait", evidence=tuple(dict.fromkeys(ids)), metadata=told
        )
        return self.store.add([record])[0]

    def forget(self, field: str, value: str | None = None) -> int:
        """Delete traits for good; how many."""
        ids = [t.id for t in self.traits() if t.field == field and value in (None, t.value)]
        if ids:
            self.store.erase(ids, hard=True, reason="the user removed this trait")
        return len(ids)

    def prose(self) -> str:
        """All traits in one line a field, newest values first."""
        by_field: dict[str, list[Trait]] = {}
        for trait in self.traits():
            by_field.setdefault(trait.field, []).append(trait)
        return "\n".join(
            f"{name}: {', '.join(t.value for t in sorted(found, key=lambda t: t.last_seen, reverse=True))}"
            for name, found in sorted(by_field.items())
        )


@dataclass(frozen=True)
class MemoryBankPolicy(Policy):
    """Keeps turns, daily summaries and a portrait; recalls by likeness; forgets by retention.

    Attributes:
        time_scale: tau in seconds: how long an unused memory of strength 1 keeps a retention of 1/e.
        mode: what a sweep does: ``rank`` deletes nothing; ``sample`` forgets with probability 1 - R;
            ``threshold`` forgets what fell below ``threshold``; ``budget`` keeps what has most retention
            within ``budget`` bytes.
        threshold: of mode ``threshold``.
        budget: bytes of mode ``budget``, counted by :func:`record_bytes`.
        reinforce: memories grow stronger ``on_use`` (their words stand in the reply), or ``never``.
        curve: see :func:`retention`.
        recency: weight of log R in the score; 0 ranks by likeness alone.
        weights: of the fields of a search; ``{"vector": 1}`` is the paper's.
        salt: of the draws of mode ``sample``; "" makes one for each user and keeps it in the store.
        summarizer: makes daily and overall summaries; None makes none.
        traits: reads a portrait from the user's words; None (no portrait) unless the user agreed.
        summary_tokens: of a daily or overall summary.
        counter: of tokens in prompts.

    Raises:
        BadInput: a time scale, threshold or budget that cannot be used.
    """

    time_scale: float | timedelta = _TAU
    mode: Literal["rank", "sample", "threshold", "budget"] = "rank"
    threshold: float = 0.1
    budget: int | None = None
    reinforce: Literal["on_use", "never"] = "on_use"
    curve: Curve = "exponential"
    recency: float = 0.0
    weights: Mapping[str, float] | None = None
    salt: str = ""
    summarizer: Summarizer | None = None
    traits: TraitReader | None = None
    summary_tokens: int = 300
    counter: TokenCounter | Callable[[str], int] | None = field(default=None, repr=False)

    name = "memorybank"

    def __post_init__(self) -> None:
        if isinstance(self.time_scale, timedelta):
            object.__setattr__(self, "time_scale", self.time_scale.total_seconds())
        if not 0 < self._tau < float("inf"):
            refuse("time_scale", self.time_scale, "give seconds (or a timedelta), more than 0")
        if self.mode not in ("rank", "sample", "threshold", "budget"):
            refuse("mode", self.mode, 'use "rank", "sample", "threshold" or "budget"')
        if not 0 < self.threshold < 1:
            refuse("threshold", self.threshold, "between 0 and 1, both excluded")
        if self.mode == "budget" and (self.budget is None or self.budget <= _ROW):
            refuse("budget", self.budget, f"give the bytes to keep, more than the {_ROW} of an empty record")
        if self.recency < 0:
            refuse("recency", self.recency, "0 or more")
        if self.reinforce not in ("on_use", "never"):
            refuse("reinforce", self.reinforce, 'use "on_use" or "never"')

    def observe(self, store: UserStore, messages: Sequence[Message], at: datetime) -> list[str]:
        """Keep each exchange of a user's message and its reply as one turn; their day becomes pending."""
        check_time(at)
        records = list(turns_of(messages, at))
        if not records:
            return []
        day = f"{at:%Y-%m-%d}"
        with store.transaction():
            ids = keep_turns(store, records)
            known = dict(store.get_setting(_DAYS) or {})
            if known.get(day) != "pending":
                store.set_setting(_DAYS, {**known, day: "pending"})
        return ids

    def recall(self, store: UserStore, query: str, k: int, at: datetime) -> list[Hit]:
        """The ``k`` most like the query among turns and daily summaries; retention is among the parts."""
        check_time(at)
        hits = []
        for hit in store.search(query, k=4 * k + 10, weights=self.weights, questions=k):
            if hit.record.metadata.get("scope") == "global":
                continue
            left = self.retention_of(hit.record, at)
            score = hit.score + self.recency * float(np.log(max(left, 1e-300)))
            hits.append(replace(hit, score=score, parts={**hit.parts, "retention": left}))
        hits.sort(key=lambda hit: -hit.score)
        return choose(hits, query, k)

    def context(self, store: UserStore, query: str, hits: Sequence[Hit], budget_tokens: int) -> list[Message]:
        """One message: what was recalled (best first where room is short), portrait, overall summary."""
        pieces = [hit_piece(hit.record) for hit in hits]
        if prose := Portrait(store).prose():
            pieces.append(Piece(prose, label="portrait"))
        if overall := self._overall(store):
            pieces.append(Piece(overall.text, overall.id, "overall summary"))
        return pack_prompt(pieces, budget_tokens, self.counter)

    def forget(
        self, store: UserStore, at: datetime, ids: Sequence[str] | None = None, dry_run: bool = False
    ) -> list[Forgotten]:
        """Forget the named records, or what the mode lets go; can be undone with ``store.restore``."""
        check_time(at)
        chosen = self._named(store, ids) if ids is not None else list(self._fading(store, at))
        if chosen and not dry_run:
            with store.transaction():
                for one in chosen:
                    store.erase([one.id], reason=one.reason)
        return chosen

    def explain(self, store: UserStore, id: str) -> dict[str, float | str]:
        """Strength, age, retention, the draw, and when it will fade to the threshold."""
        found = store.get([id]) or [one for one in store.iterate(states=("deleted",)) if one.id == id]
        if not found:
            refuse("id", id, "no such record of this user")
        record = found[0]
        last = record.last_recalled or record.created_at
        at = datetime.now(tz=last.tzinfo)
        fades = lifetime(record.strength, self.threshold, self._tau, self.curve)
        return {
            "kind": record.kind,
            "state": record.state,
            "said": record.created_at.isoformat(),
            "last_recalled": last.isoformat(),
            "strength": record.strength,
            "age_days": max(0.0, (at - last).total_seconds()) / _DAY,
            "retention": self.retention_of(record, at),
            "draw": self._draw(store, record),
            "fades_to_threshold": (last + timedelta(seconds=min(fades, 3e10))).isoformat(),
            "mode": self.mode,
            "source": str(record.source.get("trust", record.source.get("role", ""))),
            "evidence": ", ".join(record.evidence),
        }

    def retention_of(self, record: Record, at: datetime) -> float:
        """Retention of one record at a time."""
        age = (at - (record.last_recalled or record.created_at)).total_seconds()
        return float(retention(age, record.strength, self._tau, self.curve))

    def before_erase(self, store: UserStore, ids: Sequence[str]) -> list[str]:
        """Days whose summaries go with their turns are to be summarised anew."""
        days = {str(one.metadata["day"]) for one in store.get(ids) if "day" in one.metadata}
        known = dict(store.get_setting(_DAYS) or {})
        if again := {day: "pending" for day in days if known.get(day) == "done"}:
            store.set_setting(_DAYS, {**known, **again})
        return []

    def condense(self, store: UserStore, at: datetime, today: bool = False) -> list[str]:
        """Summarise the days that are pending and over, then the overall summary and portrait.

        A day whose summary fails stays pending and is tried once more at the next call; a second failure
        marks it ``failed``. Nothing half-made is written.

        Args:
            store: the user's.
            at: now; only days before it are over.
            today: also condense the day of ``at``.

        Returns:
            Ids of the summaries written.
        """
        check_time(at)
        if self.summarizer is None and self.traits is None:
            return []
        now, known, written = f"{at:%Y-%m-%d}", dict(store.get_setting(_DAYS) or {}), []

        def mark(day: str, state: str) -> None:  # others may have marked days since they were read
            with store.transaction():
                store.set_setting(_DAYS, {**(store.get_setting(_DAYS) or {}), day: state})

        for day in sorted(day for day, state in known.items() if state.startswith("pending")):
            if day > now or (day == now and not today):
                continue
            turns = list(store.iterate(kinds=("turn",), where={"metadata.day": day}))
            try:
                summary = self._summarize(turns, day)
                read = self._read_traits(turns, day)
            except Exception as error:
                state = "pending again" if known[day] == "pending" else "failed"
                mark(day, state)
                warnings.warn(f"{day} is not condensed ({type(error).__name__}): {state}", stacklevel=2)
                continue
            with store.transaction():
                since = {turn.id for turn in store.iterate(kinds=("turn",), where={"metadata.day": day})}
                if since != {turn.id for turn in turns}:
                    continue  # the day went on, or lost a turn, while the model wrote: it stays pending
                if self.summarizer is not None and summary:
                    old = [one.id for one in store.iterate(kinds=("summary",), where={"metadata.day": day})]
                    record = Record(
                        f"Events of {day}: {summary}", turns[-1].created_at, kind="summary",
                        source=Source(role="assistant", trust="assistant"),
                        evidence=tuple(turn.id for turn in turns),
                        metadata={"day": day, "scope": "day", "by": self.summarizer.id},
                    )  # fmt: skip
                    if old:
                        store.erase(old, reason="made anew, since the day went on")
                    written += store.add([record])
                for name, value, lines in read:
                    if shown := [turns[i] for i in lines if 0 <= i < len(turns)]:
                        Portrait(store).learn(name, value, shown)
                mark(day, "done")
        if written:
            written += self._remake_overall(store, at)
        return written

    @property
    def _tau(self) -> float:
        return float(self.time_scale)  # type: ignore[arg-type]

    def _draw(self, store: UserStore, record: Record) -> float:
        """One uniform for each memory and period between recalls: the same in any process."""
        salt = self.salt or store.get_setting(_SALT)
        if not salt:
            with store.transaction():  # two sweepers at once must draw by one salt
                salt = store.get_setting(_SALT)
                if not salt:
                    salt = secrets.token_hex(16)
                    store.set_setting(_SALT, salt)
        return uniform(_SALT, salt, record.id, float(record.strength))

    def _fading(self, store: UserStore, at: datetime) -> Iterable[Forgotten]:
        if self.mode == "rank":
            return
        dim = store.embedder.dim
        records = [
            one
            for one in store.iterate(kinds=("turn", "summary", "thought", "document"))
            if one.metadata.get("scope") != "global"
        ]
        ages = [(at - (one.last_recalled or one.created_at)).total_seconds() for one in records]
        left = retention(ages, [one.strength for one in records] or 1.0, self._tau, self.curve)
        if self.mode == "budget":
            assert self.budget is not None
            room = self.budget
            # Ties go to the later id; a record that does not fit ends the list, so that the set is "the top".
            latest = sorted(range(len(records)), key=lambda i: records[i].id, reverse=True)
            order = sorted(latest, key=lambda i: -float(left[i]))
            full = False
            for i in order:
                size = record_bytes(records[i], dim)
                full = full or size > room
                if full:
                    why = f"beyond the budget of {self.budget} bytes, retention {float(left[i]):.4g}"
                    yield Forgotten(records[i].id, why, float(left[i]), size)
                else:
                    room -= size
            return
        for record, r in zip(records, np.atleast_1d(left).tolist(), strict=True):
            bound = self.threshold if self.mode == "threshold" else self._draw(store, record)
            if r < bound:
                what = "threshold" if self.mode == "threshold" else "draw"
                why = f"retention {r:.4g} is below the {what} {bound:.4g}"
                yield Forgotten(record.id, why, r, record_bytes(record, dim))

    def _named(self, store: UserStore, ids: Sequence[str]) -> list[Forgotten]:
        dim = store.embedder.dim
        return [Forgotten(one.id, "asked for", None, record_bytes(one, dim)) for one in store.get(list(ids))]

    def _overall(self, store: UserStore) -> Record | None:
        return next(
            iter(store.iterate(kinds=("summary",), where={"metadata.scope": "global"}, newest_first=True)),
            None,
        )

    def _summarize(self, turns: Sequence[Record], day: str) -> str:
        if self.summarizer is None or not turns:
            return ""
        return self.summarizer(
            [hit_piece(turn).text for turn in turns],
            job="day", max_tokens=self.summary_tokens, day=day,
        )  # fmt: skip

    def _read_traits(self, turns: Sequence[Record], day: str) -> list[tuple[str, str, list[int]]]:
        if self.traits is None or not turns:
            return []
        return self.traits([str(turn.metadata.get("query", turn.text)) for turn in turns], day)

    def _remake_overall(self, store: UserStore, at: datetime) -> list[str]:
        """The overall summary, from the daily ones alone; the old one stays when this fails."""
        assert self.summarizer is not None
        daily = list(store.iterate(kinds=("summary",), where={"metadata.scope": "day"}))
        daily.sort(key=lambda one: str(one.metadata["day"]))
        try:
            text = self.summarizer([one.text for one in daily], job="global", max_tokens=self.summary_tokens)
        except Exception as error:
            warnings.warn(f"the overall summary is not remade ({type(error).__name__})", stacklevel=3)
            return []
        old = self._overall(store)
        record = Record(
            text, at, kind="summary", source=Source(role="assistant", trust="assistant"),
            evidence=tuple(one.id for one in daily), metadata={"scope": "global", "by": self.summarizer.id},
        )  # fmt: skip
        with store.transaction():
            if old is not None:
                store.erase([old.id], reason="made anew, since a day was added")
            return store.add([record])


class LLMTraits:
    """Reads traits with a language model (a :class:`TraitReader`).

    Args:
        client: of the model.
    """

    def __init__(self, client: Chat) -> None:
        self.client = client

    def __call__(self, lines: Sequence[str], day: str) -> list[tuple[str, str, list[int]]]:
        """Read; traits without a line that exists are left out."""
        from pydantic import BaseModel, Field

        from memspan.recall.chat import language_of, load_prompt
        from memspan.recall.pack import as_data

        class One(BaseModel):
            field: str = Field(max_length=40)
            value: str = Field(max_length=200)
            lines: list[int] = Field(max_length=100)

        class Traits(BaseModel):
            traits: list[One] = Field(max_length=100)

        numbered = "\n".join(f"{i}: {as_data(line)}" for i, line in enumerate(lines))
        prompt = load_prompt("portrait", language_of("\n".join(lines)))
        found = self.client.structured(prompt.messages(day=day, lines=numbered), Traits)
        return [
            (one.field, one.value, shown) for one in found.traits
            if (shown := [i for i in one.lines if 0 <= i < len(lines)])
        ]  # fmt: skip


def _trait(record: Record) -> Trait:
    told = record.metadata
    first, last = (datetime.fromisoformat(str(told[when])) for when in ("first_seen", "last_seen"))
    return Trait(str(told["field"]), str(told["value"]), record.evidence, first, last, record.id)


def _check_ages(bad_strength: bool, back: bool, strength: Any) -> None:
    if bad_strength:
        refuse("strength", strength, "more than 0")
    if back:
        warnings.warn("a memory was used after now: its age counts as 0 (check the clock)", stacklevel=3)
