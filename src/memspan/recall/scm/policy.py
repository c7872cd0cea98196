"""The policy: gate, activation memory, flash memory, packing; and the same bound to a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from memspan.base import refuse
from memspan.data.embed import Embedder
from memspan.recall.choose import choose
from memspan.recall.memory import Memory
from memspan.recall.pack import Packed, Piece, as_data, pack_prompt
from memspan.recall.records import Forgotten, Hit, Message, Plan, Policy, Record
from memspan.recall.scm.control import (
    Context,
    Controller,
    Decision,
    HeuristicController,
    wants_scan,
)
from memspan.recall.scm.packing import Item, pack
from memspan.recall.summarize import ExtractiveSummarizer, Summarizer
from memspan.recall.text import TokenCounter, sentences, shorten, token_counter
from memspan.recall.turns import check_time, turns_of

if TYPE_CHECKING:
    from memspan.recall.chat import Chat
    from memspan.recall.store import Store, UserStore

__all__ = ["Recalled", "SCMPolicy", "SelfControlledMemory"]

_NEWEST = 50  # turns among which the last one of a stream is looked for
_FRAME = 20  # tokens of a line's head beside its text


class Recalled(list[Hit]):
    """Hits, with what the gate said.

    Attributes:
        decision: the gate's.
        flash: the turn before, or None.
        scan: whether the question counts or lists.
    """

    def __init__(
        self, hits: Sequence[Hit], decision: Decision, flash: Record | None, scan: bool = False
    ) -> None:
        super().__init__(hits)
        self.decision, self.flash, self.scan = decision, flash, scan


@dataclass(frozen=True)
class SCMPolicy(Policy):
    """Keeps numbered turns with summaries; a controller decides what goes into a prompt of bounded length.

    Attributes:
        controller: None is :class:`~memspan.recall.scm.HeuristicController`.
        summarizer: of turns; None picks sentences.
        gate: ``"controller"`` asks for every message; ``"always"`` recalls always, as the official code does.
        gamma: recency of a turn is ``gamma ** (turns since)``.
        recency_weight: of recency beside the search's score; the paper's 1 costs recall, 0 is the official
            code.
        embed: what a turn is found by: ``"summaries"`` of both sides with equal weight (the paper), or the
            whole ``"turn"``.
        summary_over: turns of more tokens are summarised; shorter ones are their own summary.
        flash_tokens: the last turn goes in raw below this, else as its summary.
        session: keeps streams apart.
        trace: keep how each reply was made.
        counter: of tokens; None is cautious.
    """

    controller: Controller | None = None
    summarizer: Summarizer | None = None
    gate: Literal["controller", "always"] = "controller"
    gamma: float = 0.995
    recency_weight: float = 0.25
    embed: Literal["summaries", "turn"] = "summaries"
    summary_over: int = 300
    flash_tokens: int = 500
    session: str = ""
    trace: bool = True
    reinforce: Literal["on_use", "never"] = "never"
    counter: TokenCounter | Callable[[str], int] | None = field(default=None, repr=False)

    name = "scm"

    def __post_init__(self) -> None:
        _check_ranking(6, self.gamma)
        if self.recency_weight < 0:
            refuse("recency_weight", self.recency_weight, "0 or more")
        if self.gate not in ("controller", "always"):
            refuse("gate", self.gate, 'use "controller" or "always"')
        if self.embed not in ("summaries", "turn"):
            refuse("embed", self.embed, 'use "summaries" or "turn"')
        if self.controller is None:
            object.__setattr__(self, "controller", HeuristicController())

    def observe(self, store: UserStore, messages: Sequence[Message], at: datetime) -> list[str]:
        """Keep each exchange as a numbered turn with its summary (at most one call a turn)."""
        check_time(at)
        count = token_counter(self.counter)
        exchanges = list(turns_of(messages, at))
        prepared = []
        for one in exchanges:  # calls of a model stay outside the transaction
            query, response = str(one.metadata["query"]), str(one.metadata["response"])
            body = f"User: {query} Assistant: {response}"
            summary, by = body, "the turn itself"
            if count(body) > self.summary_over:
                summary, by = self._summary(store, body)
            prepared.append((one, query, response, summary, by))
        vectors = self._vectors(store, prepared)
        ids: list[str] = []
        with store.transaction():
            key = f"scm.turn.{self.session}"
            number = int(store.get_setting(key) or 0)
            for place, (one, _, _, summary, by) in enumerate(prepared):
                number += 1
                told = {
                    **one.metadata, "turn": number, "stream": self.session,
                    "summary": f"[Turn {number}] {summary}", "summary_by": by,
                }  # fmt: skip
                text = f"[Turn {number}] User: {told['query']} Assistant: {told['response']}"
                record = Record(text, at, source=one.source, metadata=told, key=one.key)
                ids += store.add(
                    [record], vectors=vectors[place : place + 1] if vectors is not None else None
                )
            store.set_setting(key, number)
        return ids

    def recall(self, store: UserStore, query: str, k: int, at: datetime) -> Recalled:
        """Activation memory: nothing when the gate says no; else the best turns but the last."""
        check_time(at)
        _check_ranking(k, self.gamma)
        flash = self._last(store)
        if flash is None:
            return Recalled([], Decision(0.0, "nothing is remembered"), None)
        scan = wants_scan(query)
        most = min(50, 4 * k) if scan else k
        found = store.search(query, k=4 * most + 10, kinds=("turn",), questions=most)
        near = {hit.record.id: hit.parts.get("cosine", 0.0) for hit in found}
        flash_cosine = near.pop(flash.id, 0.0)
        ours = [hit for hit in found if hit.record.id in near and _of(hit.record, self.session)]
        if not ours:
            return Recalled([], Decision(0.0, "only the last turn is there"), flash)
        decision = Decision(1.0, "always")
        if self.gate == "controller":
            assert self.controller is not None
            cosines = [near[hit.record.id] for hit in ours]
            context = Context(cosines, flash_cosine, ours, store.embedder.id)
            decision = self.controller.need_memory(query, _flash_text(flash), context)
        if not decision:
            return Recalled([], decision, flash)
        now = int(flash.metadata["turn"]) + 1
        ranked = []
        for hit in ours:
            recency = self.gamma ** (now - int(hit.record.metadata["turn"]))
            parts = {**hit.parts, "recency": recency, "relevance": hit.score, "gate": decision.p}
            ranked.append(Hit(hit.record, hit.score + self.recency_weight * recency, parts))
        ranked.sort(key=lambda hit: -hit.score)
        return Recalled(choose(ranked, query, most), decision, flash, scan)

    def relevant(self, store: UserStore, query: str, hits: Sequence[Hit]) -> Sequence[Hit]:
        """The gate has decided."""
        return hits

    def context(self, store: UserStore, query: str, hits: Sequence[Hit], budget_tokens: int) -> Packed:
        """One message of at most ``budget_tokens``: activated turns in order, each as packed, and the last.

        Raises:
            BadInput: fewer than 200 tokens.
        """
        if budget_tokens < 200:
            refuse("budget_tokens", budget_tokens, "at least 200")
        count = token_counter(self.counter)
        told = hits if isinstance(hits, Recalled) else Recalled(hits, Decision(1.0, "given"), None)
        flash = told.flash or self._last(store)
        flash_text = _flash_text(flash) if flash is not None else ""
        if flash is not None and count(flash_text) >= self.flash_tokens:
            flash_text = _summary_of(flash)
        items = [
            Item(
                int(hit.record.metadata.get("turn", 0)),
                _summary_of(hit.record) if told.scan else _flash_text(hit.record),
                _summary_of(hit.record), hit.score, hit.record.id,
            )
            for hit in hits if flash is None or hit.record.id != flash.id
        ]  # fmt: skip
        cache: dict[tuple[str, str], bool] = {}
        before = self.controller.calls if self.controller else 0

        def decide(text: str, which: str) -> bool:
            assert self.controller is not None
            if (text, which) not in cache:
                cache[(text, which)] = self.controller.suffices(text, query, which)
            return cache[(text, which)]

        def line(text: str) -> int:
            return count(as_data(text)) + _FRAME if text else 0

        frame = count(pack_prompt([Piece("x")], 10_000, count)[0]["content"]) + 4
        packing = pack(items, max(0, budget_tokens - frame), line, decide, flash_text)
        ages = {hit.record.id: hit.record.created_at for hit in hits}
        pieces = [
            Piece(c.text, c.item.id, c.kind, ages[c.item.id], "", f"Turn {c.item.turn}")
            for c in sorted(packing.choices, key=lambda c: -c.item.score) if c.text
        ]  # fmt: skip
        if packing.flash and flash is not None:
            number = flash.metadata.get("turn", "")
            pieces.insert(
                0, Piece(packing.flash, flash.id, "last turn", flash.created_at, "", f"Turn {number}")
            )
        packed = pack_prompt(pieces, budget_tokens, count, max_piece_tokens=budget_tokens)
        parts = {hit.record.id: dict(hit.parts) for hit in hits}
        packed.trace = {
            "query": query,
            "gate": {"needed": bool(told.decision), "p": told.decision.p, "reason": told.decision.reason},
            "items": [
                {
                    "turn": c.item.turn, "id": c.item.id, "score": c.item.score, "choice": c.kind,
                    "tokens": c.tokens, "reason": c.reason, **parts.get(c.item.id, {}),
                }
                for c in packing.choices
            ],
            "flash": flash.id if flash is not None else "",
            "steps": list(packing.steps),
            "tokens": packed.tokens,
            "decisions": packing.decisions,
            "calls": (self.controller.calls if self.controller else 0) - before,
            "controller": type(self.controller).__name__,
        }  # fmt: skip
        return packed

    def forget(
        self, store: UserStore, at: datetime, ids: Sequence[str] | None = None, dry_run: bool = False
    ) -> list[Forgotten]:
        """Forget named records; by itself this policy forgets nothing, it leaves out."""
        check_time(at)
        known = store.get(list(ids)) if ids is not None else []
        if dry_run or not known:
            return [Forgotten(one.id, "asked for", None, len(one.text.encode())) for one in known]
        return store.erase([one.id for one in known], reason="asked for")

    def explain(self, store: UserStore, id: str) -> dict[str, float | str]:
        """Turn number, who made the summary, and how often it was placed in a prompt."""
        found = store.get([id])
        if not found:
            refuse("id", id, "no such record of this user")
        told = found[0].metadata
        used = [
            trace for trace in store.iterate(kinds=("trace",))
            if any(item["id"] == id and item["choice"] != "drop" for item in trace.metadata.get("items", ()))
        ]  # fmt: skip
        return {
            "kind": found[0].kind,
            "said": found[0].created_at.isoformat(),
            "turn": float(told.get("turn", 0)),
            "summary": str(told.get("summary", "")),
            "summary_by": str(told.get("summary_by", "")),
            "placed_in_prompts": float(len(used)),
        }

    def plan(self, messages: Sequence[Message], counter: Callable[[str], int]) -> Plan:
        """At most one summary a long turn; gates are asked when reading, not when writing."""
        pairs = list(turns_of(messages, datetime.now(UTC)))
        long = [pair for pair in pairs if counter(pair.text) > self.summary_over]
        called = self.summarizer is not None and not isinstance(self.summarizer, ExtractiveSummarizer)
        calls = len(long) if called else 0
        sent = sum(counter(pair.text) + 80 for pair in long) if called else 0
        return Plan(
            calls,
            sent,
            calls * self.summary_over // 2,
            len(pairs) * (2 if self.embed == "summaries" else 1),
            len(pairs),
        )

    def _last(self, store: UserStore) -> Record | None:
        """The turn before this one of the stream: the flash memory."""
        newest = store.iterate(kinds=("turn",), newest_first=True, limit=_NEWEST)
        return next((record for record in newest if _of(record, self.session)), None)

    def _summary(self, store: UserStore, body: str) -> tuple[str, str]:
        extractive = ExtractiveSummarizer(store.embedder, counter=self.counter)
        most = max(30, self.summary_over // 2)
        if self.summarizer is None:
            return extractive([body], job="turn", max_tokens=most), extractive.id
        try:
            return self.summarizer([body], job="turn", max_tokens=most), self.summarizer.id
        except Exception as error:  # the turn is kept whatever the model does
            return extractive(
                [body], job="turn", max_tokens=most
            ), f"extractive, since {type(error).__name__}"

    def _vectors(self, store: UserStore, prepared: Sequence[tuple[Record, str, str, str, str]]) -> Any:
        """Mean of the two sides' vectors, so that a long reply does not drown a short question."""
        if self.embed == "turn" or not prepared:
            return None
        most = max(30, self.summary_over // 2)
        pairs = []
        for _, query, response, summary, by in prepared:
            told = [part for part in sentences(summary) if part.strip()]
            if by.startswith("llm") and len(told) == 2:
                pairs += [told[0], told[1]]
            else:
                pairs += [
                    shorten(query or response, most, self.counter),
                    shorten(response or query, most, self.counter),
                ]
        rows = store.embedder(pairs)
        mean = rows[0::2] + rows[1::2]
        norms = np.linalg.norm(mean, axis=1, keepdims=True)
        return np.where(norms > 1e-6, mean / np.maximum(norms, 1e-6), rows[0::2]).astype(np.float32)


class SelfControlledMemory(Memory):
    """A memory with :class:`SCMPolicy` bound to a chat model.

    Args:
        client: of the model.
        store: path, address, or an open store.
        user: the user's id.
        budget: tokens of all that is recalled into a prompt, at least 200.
        k: activated turns, 1 to 50.
        policy: None takes the defaults, with summaries by the model.
        embedder: None takes MiniLM where it is installed.

    Raises:
        BadInput: budget or k out of range.
    """

    def __init__(
        self,
        client: Chat,
        store: str | Path | Store = "memory.db",
        user: str = "me",
        budget: int = 2500,
        k: int = 6,
        policy: SCMPolicy | None = None,
        embedder: Embedder | None = None,
    ) -> None:
        if budget < 200:
            refuse("budget", budget, "at least 200 tokens")
        _check_ranking(k, 1.0)
        if policy is None:
            from memspan.recall.summarize import LLMSummarizer

            policy = SCMPolicy(summarizer=LLMSummarizer(client))
        super().__init__(store, user, policy, embedder, client, counter=policy.counter)
        self.client, self.budget, self.k = client, budget, k

    def say(self, message: str, at: datetime | None = None, **params: Any) -> str:
        """Recall within the budget, answer, remember; :attr:`last_trace` tells how."""
        return self.chat(self.client, message, self.k, self.budget, at=at, **params).text


def _of(record: Record, session: str) -> bool:
    return "turn" in record.metadata and record.metadata.get("stream", "") == session


def _check_ranking(k: int, gamma: float) -> None:
    if not 1 <= k <= 50:
        refuse("k", k, "between 1 and 50; the paper takes 3 to 10")
    if not 0 < gamma <= 1:
        refuse("gamma", gamma, "more than 0 and at most 1")


def _flash_text(record: Record) -> str:
    told = record.metadata
    if "query" not in told:
        return record.text
    return f"User: {told['query']} Assistant: {told.get('response', '')}"


def _summary_of(record: Record) -> str:
    summary = str(record.metadata.get("summary", ""))
    return summary.split("] ", 1)[-1] or _flash_text(record)
