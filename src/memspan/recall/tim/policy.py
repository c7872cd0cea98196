"""The policy: recall thoughts, answer, think afterwards, tidy up."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from memspan.base import refuse
from memspan.recall.choose import choose
from memspan.recall.pack import Packed, pack_prompt, piece_of
from memspan.recall.records import Forgotten, Hit, Message, Plan, Policy, Record
from memspan.recall.store import UserStore
from memspan.recall.text import TokenCounter
from memspan.recall.tim.extract import Extractor, Fact, RuleExtractor
from memspan.recall.tim.organise import Organiser, apply_ops, check_ops
from memspan.recall.tim.thoughts import Thought, ThoughtStore
from memspan.recall.turns import check_time, hit_piece, keep_turns, turns_of

__all__ = ["TiMPolicy"]

_EVENTS, _GAINED = "tim.events", "tim.gained"
_LONGEST = 50  # changes of one fact that are followed
_NEARER = 0.9  # share of its turn's cosine from which a thought, being shorter, stands for it
_BESIDE = 12  # thoughts that an organiser is shown around a new one


@dataclass(frozen=True)
class TiMPolicy(Policy):
    """Keeps thoughts beside the turns that they come from, tidies them, and ranks both in one list.

    A new fact finds what it repeats, denies or replaces by its key (:func:`~memspan.recall.tim.fact_key`); an
    organiser with a model also merges and drops among the thoughts that are like it.

    Attributes:
        extractor: None is :class:`~memspan.recall.tim.RuleExtractor`. One that calls a model works in
            ``condense``, from a queue that survives a kill; rules work at once.
        organiser: None tidies by keys alone.
        organise_every: the organiser is asked when so many thoughts are new.
        assistant_weight: of the score of what the assistant said: it may be invented.
        counter: of tokens.

    Raises:
        BadInput: numbers out of range.
    """

    extractor: Extractor | None = None
    organiser: Organiser | None = None
    organise_every: int = 4
    assistant_weight: float = 0.8
    counter: TokenCounter | Callable[[str], int] | None = field(default=None, repr=False)

    name = "tim"

    def __post_init__(self) -> None:
        if self.organise_every < 1:
            refuse("organise_every", self.organise_every, "at least 1")
        if not 0 <= self.assistant_weight <= 1:
            refuse("assistant_weight", self.assistant_weight, "between 0 and 1")
        object.__setattr__(self, "extractor", self.extractor or RuleExtractor())
        assert self.extractor is not None
        object.__setattr__(
            self, "thinks_later", self.extractor.calls_model or self.organiser is not None
        )  # a model is slow: no chat waits for it

    def observe(self, store: UserStore, messages: Sequence[Message], at: datetime) -> list[str]:
        """Keep each exchange as a turn that waits to be thought about; rules think at once."""
        check_time(at)
        records = [
            replace(one, metadata={**one.metadata, "think": "pending"}) for one in turns_of(messages, at)
        ]
        if not records:
            return []
        with store.transaction():
            ids = keep_turns(store, records)
            if not self.thinks_later:
                for record in store.get(list(dict.fromkeys(ids))):
                    if record.metadata.get("think") == "pending":
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
                self._log(store, "extract", f"{type(error).__name__}: {state}")
        return written

    def recall(self, store: UserStore, query: str, k: int, at: datetime) -> list[Hit]:
        """Turns and thoughts in one ranking; a thought stands for its turns, what is past behind the new."""
        check_time(at)
        if k < 1:
            refuse("k", k, "at least 1")
        turns = store.search(query, k=4 * k + 10, kinds=("turn", "document"), questions=k)
        found = store.search(query, k=2 * k, kinds=("thought",), weights={"words": 1.0, "vector": 1.0})
        place = {hit.record.id: hit for hit in turns}
        listed: dict[str, Hit] = {}
        for hit in found:
            trusted = hit.record.source.get("trust", "user") == "user"
            score = hit.score * (1.0 if trusted or hit.score < 0 else self.assistant_weight)
            behind = [place[id] for id in hit.record.evidence if id in place]
            best = max(behind, key=lambda turn: turn.score, default=None)
            if best is not None and hit.parts["cosine"] < _NEARER * best.parts["cosine"]:
                continue  # the turn itself is nearer
            score = max([score, *(turn.score for turn in behind)])
            listed[hit.record.id] = replace(hit, score=score)
            for turn in behind:
                place.pop(turn.record.id, None)
        ranked = sorted([*place.values(), *listed.values()], key=lambda hit: -hit.score)
        return choose(self._renewed(store, ranked, k), query, k)

    def _renewed(self, store: UserStore, ranked: Sequence[Hit], k: int) -> list[Hit]:
        """Before each turn of which something changed, what holds now."""
        out: list[Hit] = []
        there: set[str] = set()
        for hit in ranked:
            changed = hit.record.metadata.get("changed", {}) if len(out) < k else {}
            for id in changed.values():
                record = self._holding(store, id)
                if record is not None and not there & {record.id, *record.evidence}:
                    out.append(Hit(record, hit.score, {**hit.parts, "replaces": 1.0}))
                    there |= {record.id, *record.evidence}
            if hit.record.id not in there:
                out.append(hit)
                there |= {hit.record.id}
        return out

    def _holding(self, store: UserStore, id: str) -> Record | None:
        """The thought that holds now where another one ended, and then others."""
        for _ in range(_LONGEST):
            found = store.get([id])
            if not found or found[0].state == "active":
                return found[0] if found else None
            id = str(found[0].metadata.get("superseded_by", ""))
        return None

    def context(self, store: UserStore, query: str, hits: Sequence[Hit], budget_tokens: int) -> Packed:
        """One message: thoughts and turns with date and source, marked as data, and what is past as such."""
        pieces = []
        for hit in hits:
            past = "past, has changed since" if hit.record.metadata.get("changed") else ""
            pieces.append(
                piece_of(hit.record) if hit.record.kind == "thought" else hit_piece(hit.record, past)
            )
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
        """For a deletion without trace: merged sentences that hold a deleted turn go, other children stay.

        What a deleted statement had replaced holds again.
        """
        gone = set(ids)
        thoughts = self._thoughts(store)
        every = list(thoughts.all(states=("active", "merged", "superseded")))
        also = [one.id for one in every if one.children and gone & set(one.evidence)]
        gone |= {one.id for one in every if one.evidence and set(one.evidence) <= gone}
        children = {child for one in every if one.id in also for child in one.children}
        for record in store.get([one.id for one in every if one.state != "active"]):
            ended_by = record.metadata.get("superseded_by", record.metadata.get("merged_into"))
            stays = record.id not in gone and not gone & set(record.evidence)
            if stays and (ended_by in gone or record.id in children):
                thoughts.reopen([record.id])
                self._mark(store, record.evidence, record.id, None)
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

    def organise(self, store: UserStore, ids: Sequence[str], at: datetime) -> list[str]:
        """Show the organiser new thoughts with those like them; a refused edit changes nothing."""
        thoughts = self._thoughts(store)
        members = {one.id: one for one in thoughts.get(ids) if one.state == "active"}
        for one in list(members.values()):
            like = store.search(one.text, k=_BESIDE, kinds=("thought",), weights={"vector": 1.0})
            members.update({near.id: near for near in thoughts.get([hit.record.id for hit in like])})
        items = sorted(members.values(), key=lambda one: one.id)
        if len(items) < 2 or self.organiser is None:
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
        pairs = list(turns_of(messages, datetime.now(UTC)))
        sent = sum(counter(pair.text) + 400 for pair in pairs) if self.extractor.calls_model else 0
        calls = len(pairs) if self.extractor.calls_model else 0
        tidy = len(pairs) // self.organise_every if self.organiser is not None else 0
        return Plan(calls + tidy, sent + tidy * 600, (calls + tidy) * 200, 2 * len(pairs), 2 * len(pairs))

    def _think(self, store: UserStore, record: Record) -> list[str]:
        assert self.extractor is not None
        query, response = (str(record.metadata.get(part, "")) for part in ("query", "response"))
        thoughts = self._thoughts(store)
        facts = self.extractor(query, response, record.created_at, thoughts.name)
        with store.transaction():
            ids = [
                id for fact in facts
                if fact.source in ("user", "assistant") and _supported(fact, query, response)
                for id in self._take(store, thoughts, fact, record)
            ]  # fmt: skip
            now = store.get([record.id])[0]
            store.update(record.id, metadata={**now.metadata, "think": "done"})
            gained = [*(store.get_setting(_GAINED) or []), *ids] if self.organiser is not None else []
            if gained:
                due = len(gained) >= self.organise_every
                store.set_setting(_GAINED, [] if due else gained)
        if gained and due:
            self.organise(store, gained, record.created_at)
        return ids

    def _take(self, store: UserStore, thoughts: ThoughtStore, fact: Fact, turn: Record) -> list[str]:
        """Write a fact, or more evidence of a known one; end what it replaces."""
        one = Thought(
            fact.head, fact.relation, fact.tail, fact.text, turn.created_at, (turn.id,), turn.created_at,
            source=fact.source, confidence=fact.confidence,
        )  # fmt: skip
        known = thoughts.about(thoughts.key(one.head, one.relation, one.tail))
        for old in known:
            if old.repeats(one) and old.source == one.source:
                store.update(old.id, evidence=tuple(dict.fromkeys([*old.evidence, turn.id])))
                return []
        (id,) = thoughts.add([one])
        for old in known:
            if one.ends(old) and one.source == "user" and old.created_at <= one.created_at:
                thoughts.close(old.id, "superseded", turn.created_at, superseded_by=id)
                self._mark(store, old.evidence, old.id, id)
        return [id]

    def _mark(self, store: UserStore, turns: Sequence[str], old: str, new: str | None) -> None:
        """Note on turns which thought replaced one of theirs; None takes the note off."""
        for record in store.get(turns):
            changed = {k: v for k, v in record.metadata.get("changed", {}).items() if k != old}
            if new is not None:
                changed[old] = new
            store.update(record.id, metadata={**record.metadata, "changed": changed})

    def _thoughts(self, store: UserStore) -> ThoughtStore:
        return ThoughtStore(store)

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
