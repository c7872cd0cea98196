"""The policy: recall thoughts, answer, think afterwards, tidy up."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal

from memspan.base import refuse
from memspan.recall.memory import Plan
from memspan.recall.memorybank import check_time, hit_piece, turns_of
from memspan.recall.pack import Packed, pack_prompt, piece_of
from memspan.recall.records import Forgotten, Hit, Message, Record
from memspan.recall.store import UserStore
from memspan.recall.text import TokenCounter
from memspan.recall.tim.extract import Extractor, Fact, RuleExtractor
from memspan.recall.tim.organise import Organiser, RuleOrganiser, apply_ops, check_ops
from memspan.recall.tim.thoughts import Thought, ThoughtStore

__all__ = ["TiMPolicy"]

_NAME, _EVENTS, _GAINED = "tim.name", "tim.events", "tim.gained"


@dataclass(frozen=True)
class TiMPolicy:
    """Keeps thoughts beside the turns that they come from, tidies them, and recalls them before turns.

    Attributes:
        extractor: None is :class:`~memspan.recall.tim.RuleExtractor`. One that calls a model works in
            ``condense``, from a queue that survives a kill; rules work at once.
        organiser: None is :class:`~memspan.recall.tim.RuleOrganiser`.
        buckets: of a hash table, even.
        tables: hash tables.
        probes: buckets looked at in each.
        k: thoughts in a prompt, where nothing else is asked.
        organise_every: a bucket is tidied when it gained so many thoughts, or holds more than four times as
            many.
        turns: turns are recalled where thoughts are ``pending``, to ``fill`` up to k, or ``never``.
        assistant_weight: of the score of what the assistant said: it may be invented.
        counter: of tokens.

    Raises:
        BadInput: odd buckets, more probes than buckets, numbers below 1.
    """

    extractor: Extractor | None = None
    organiser: Organiser | None = None
    buckets: int = 16
    tables: int = 1
    probes: int = 4
    k: int = 5
    organise_every: int = 4
    turns: Literal["pending", "fill", "never"] = "fill"
    assistant_weight: float = 0.8
    exact_below: float = 5e6
    counter: TokenCounter | Callable[[str], int] | None = field(default=None, repr=False)

    name = "tim"
    reinforce = "placed"

    def __post_init__(self) -> None:
        if self.buckets < 2 or self.buckets % 2:
            refuse("buckets", self.buckets, "an even number, 2 or more")
        if not 1 <= self.probes <= self.buckets:
            refuse("probes", self.probes, f"between 1 and the {self.buckets} buckets")
        for name in ("tables", "k", "organise_every"):
            if getattr(self, name) < 1:
                refuse(name, getattr(self, name), "at least 1")
        if self.turns not in ("pending", "fill", "never"):
            refuse("turns", self.turns, 'use "pending", "fill" or "never"')
        object.__setattr__(self, "extractor", self.extractor or RuleExtractor())
        object.__setattr__(self, "organiser", self.organiser or RuleOrganiser())

    @property
    def thinks_later(self) -> bool:
        """Whether turns wait for ``condense``: a model is asked, and no chat should wait for that."""
        assert self.extractor is not None
        return self.extractor.calls_model

    def observe(self, store: UserStore, messages: Sequence[Message], at: datetime) -> list[str]:
        """Keep each exchange as a turn that waits to be thought about; rules think at once."""
        check_time(at)
        records = [
            replace(one, metadata={**one.metadata, "think": "pending"}) for one in turns_of(messages, at)
        ]
        if not records:
            return []
        ids = store.add(records)
        assert self.extractor is not None
        if not self.extractor.calls_model:
            for record in store.get(ids):
                self._think(store, record)
        return ids

    def condense(self, store: UserStore, at: datetime) -> list[str]:
        """Think about the turns that wait, oldest first; ids of new thoughts. A failure leaves it waiting."""
        check_time(at)
        written: list[str] = []
        for record in list(store.iterate(kinds=("turn",), where={"metadata.think": ["pending", "again"]})):
            try:
                written += self._think(store, record)
            except Exception as error:
                last = record.metadata["think"] == "again"
                state = "failed" if last else "again"
                store.update(record.id, metadata={**record.metadata, "think": state})
                self._log(store, "extract", type(error).__name__)
                warnings.warn(f"a turn is not thought about ({type(error).__name__}): {state}", stacklevel=2)
        return written

    def recall(self, store: UserStore, query: str, k: int, at: datetime, reinforce: bool = True) -> list[Hit]:
        """Thoughts by cosine; turns where they wait, or to fill up."""
        check_time(at)
        if k < 1:
            refuse("k", k, "at least 1")
        hits = []
        for hit in self._thoughts(store).search(query, k):
            said = hit.record.source.get("trust", "user")
            score = hit.score * (self.assistant_weight if said != "user" else 1.0)
            hits.append(replace(hit, score=score, parts={**hit.parts, "retention": 1.0}))
        if self.turns != "never":
            where = {"metadata.think": ["pending", "again", "failed"]} if self.turns == "pending" else None
            covered = {id for hit in hits for id in hit.record.evidence}
            found = store.search(query, k=k + len(covered), kinds=("turn", "document"), where=where)
            fresh = [hit for hit in found if hit.record.id not in covered]
            waiting = [
                hit for hit in fresh if hit.record.metadata.get("think") in ("pending", "again", "failed")
            ]
            others = [hit for hit in fresh if hit not in waiting]
            hits = _by_cosine(hits + waiting)[:k]
            if self.turns == "fill":
                hits += others[: k - len(hits)]
        hits = hits[:k]
        if reinforce:
            store.reinforce([hit.record.id for hit in hits], at)
        return hits

    def context(self, store: UserStore, query: str, hits: Sequence[Hit], budget_tokens: int) -> Packed:
        """One message: thoughts and turns with date and source, marked as data."""
        pieces = [piece_of(h.record) if h.record.kind == "thought" else hit_piece(h.record) for h in hits]
        return pack_prompt(pieces, budget_tokens, self.counter)

    def forget(
        self, store: UserStore, at: datetime, ids: Sequence[str] | None = None, dry_run: bool = False
    ) -> list[Forgotten]:
        """Forget named records and the thoughts whose every evidence is gone. A sweep forgets nothing."""
        check_time(at)
        if ids is None:
            return []
        known = store.get(list(ids))
        gone = {one.id for one in known}
        orphans = [
            t
            for t in self._thoughts(store).all()
            if t.evidence and set(t.evidence) <= gone and t.id not in gone
        ]
        told = [Forgotten(one.id, "asked for", None, len(one.text.encode())) for one in known]
        told += [
            Forgotten(one.id, "its evidence is forgotten", None, len(one.text.encode())) for one in orphans
        ]
        if told and not dry_run:
            with store.transaction():
                for one in told:
                    store.erase([one.id], reason=one.reason)
        return told

    def before_erase(self, store: UserStore, ids: Sequence[str]) -> list[str]:
        """For a deletion without trace: merged sentences that hold a deleted turn go, other children stay."""
        gone = set(ids)
        thoughts = self._thoughts(store)
        also: list[str] = []
        for one in list(thoughts.all(states=("active", "merged", "superseded"))):
            if one.children and gone & set(one.evidence):
                also.append(one.id)
                children = thoughts.get(list(one.children))
                thoughts.reopen(
                    [
                        child.id
                        for child in children
                        if not gone & set(child.evidence) and child.id not in gone
                    ]
                )
        return also

    def explain(self, store: UserStore, id: str) -> dict[str, float | str]:
        """The triple, its evidence, when it held, and what replaced or joined it."""
        found = store.get([id])
        if not found:
            refuse("id", id, "no such record of this user")
        record = found[0]
        told = record.metadata
        return {
            "kind": record.kind,
            "state": record.state,
            "said": record.created_at.isoformat(),
            "triple": " | ".join(str(told.get(part, "")) for part in ("head", "relation", "tail")),
            "valid_from": (record.valid_from or record.created_at).isoformat(),
            "valid_to": record.valid_to.isoformat() if record.valid_to else "",
            "evidence": ", ".join(record.evidence),
            "children": ", ".join(told.get("children", ())),
            "replaced_by": str(told.get("superseded_by", told.get("merged_into", ""))),
            "source": str(record.source.get("trust", "")),
            "bucket": float(told.get("bucket0", -1)),
            "strength": record.strength,
        }

    def thoughts(
        self, store: UserStore, entity: str | None = None, as_of: datetime | None = None
    ) -> list[Thought]:
        """Thoughts about an entity, active now or at a time."""
        return list(self._thoughts(store).all(entity, as_of=as_of))

    def events(self, store: UserStore) -> list[dict[str, Any]]:
        """Edits and extractions that were refused, without content; the last 100."""
        return list(store.get_setting(_EVENTS) or [])

    def organise(self, store: UserStore, bucket: int, at: datetime, head: str | None = None) -> list[str]:
        """Tidy one bucket, and what is said about the same head; a refused edit changes nothing."""
        thoughts = self._thoughts(store)
        members = {one.id: one for one in thoughts.bucket(bucket)}
        assert self.organiser is not None
        if head is not None and not self.organiser.calls_model:
            members.update(
                {one.id: one for one in thoughts.all(head)}
            )  # rules are cheap: contradictions may hash apart
        items = sorted(members.values(), key=lambda one: one.id)
        if len(items) < 2:
            return []
        try:
            ops = self.organiser(items)
        except Exception as error:
            self._log(store, "organise", type(error).__name__)
            return []
        if problems := check_ops(items, ops):
            self._log(store, "organise", "; ".join(problems)[:300])
            return []
        return apply_ops(thoughts, items, ops, at)

    def plan(self, messages: Sequence[Message], counter: Callable[[str], int]) -> Plan:
        """One call an exchange, and one each ``organise_every`` thoughts (one an exchange is assumed)."""
        assert self.extractor is not None
        assert self.organiser is not None
        pairs = list(turns_of(messages, datetime.now(UTC)))
        sent = sum(counter(pair.text) + 400 for pair in pairs) if self.extractor.calls_model else 0
        calls = len(pairs) if self.extractor.calls_model else 0
        tidy = len(pairs) // self.organise_every if self.organiser.calls_model else 0
        return Plan(calls + tidy, sent + tidy * 600, (calls + tidy) * 200, 2 * len(pairs), 2 * len(pairs))

    def _think(self, store: UserStore, record: Record) -> list[str]:
        assert self.extractor is not None
        query, response = (str(record.metadata.get(part, "")) for part in ("query", "response"))
        facts = self.extractor(query, response, record.created_at, str(store.get_setting(_NAME) or ""))
        facts = [
            fact
            for fact in facts
            if fact.source in ("user", "assistant") and _supported(fact, query, response)
        ]
        thoughts = self._thoughts(store)
        with store.transaction():
            for fact in facts:
                if (
                    fact.relation in ("is named", "叫")
                    and fact.source == "user"
                    and not store.get_setting(_NAME)
                ):
                    store.set_setting(_NAME, fact.tail)
            ids = thoughts.add(
                [
                    Thought(
                        f.head, f.relation, f.tail, f.text, record.created_at, (record.id,),
                        record.created_at, source=f.source, confidence=f.confidence,
                    )
                    for f in facts
                ]
            )  # fmt: skip
            now = store.get([record.id])[0]
            store.update(record.id, metadata={**now.metadata, "think": "done"})
        self._tidy(store, thoughts, ids, record.created_at)
        return ids

    def _tidy(self, store: UserStore, thoughts: ThoughtStore, ids: Sequence[str], at: datetime) -> None:
        gained: dict[str, int] = dict(store.get_setting(_GAINED) or {})
        due: dict[int, str | None] = {}
        for record in store.get(list(ids)):
            bucket = int(record.metadata["bucket0"])
            gained[str(bucket)] = gained.get(str(bucket), 0) + 1
            head = str(record.metadata["head"])
            assert self.organiser is not None
            full = gained[str(bucket)] >= self.organise_every
            if (
                full
                or not self.organiser.calls_model
                or len(thoughts.bucket(bucket)) > 4 * self.organise_every
            ):
                due[bucket] = head
                gained[str(bucket)] = 0
        if ids:
            store.set_setting(_GAINED, gained)
        for bucket, name in due.items():
            self.organise(store, bucket, at, name)
        count = store.count(kinds=("thought",))
        wanted = 16 if count < 1000 else 2 ** round(0.5 * (count.bit_length() - 1))
        if self.buckets == 16 and wanted >= 2 * thoughts.hashing.buckets:
            thoughts.rehash(wanted)

    def _thoughts(self, store: UserStore) -> ThoughtStore:
        return ThoughtStore(store, self.buckets, self.tables, self.probes, self.exact_below)

    def _log(self, store: UserStore, what: str, why: str) -> None:
        events = [
            *(store.get_setting(_EVENTS) or []),
            {"at": datetime.now(UTC).isoformat(), "what": what, "why": why},
        ]
        store.set_setting(_EVENTS, events[-100:])


def _supported(fact: Fact, query: str, response: str) -> bool:
    """Whether the numbers of a fact's tail stand in the exchange: models invent these most easily."""
    said = query + response
    return all(number in said for number in re.findall(r"\d+", fact.tail)) and len(fact.text) <= 300


def _by_cosine(hits: Sequence[Hit]) -> list[Hit]:
    return sorted(
        hits, key=lambda hit: -(hit.score if hit.record.kind == "thought" else hit.parts.get("cosine", 0.0))
    )
