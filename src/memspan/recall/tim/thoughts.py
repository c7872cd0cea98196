"""Thoughts: one fact in one sentence with its triple, its evidence and the time for which it held."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from memspan.recall.records import Hit, Record, Source, State, Trust
from memspan.recall.tim.lsh import AngularLSH

if TYPE_CHECKING:
    from memspan.recall.store import UserStore

__all__ = ["Thought", "ThoughtStore"]

_INDEX = "tim.index"


@dataclass(frozen=True)
class Thought:
    """A fact that was concluded from turns.

    Attributes:
        head: whom or what it is about.
        relation: such as ``lives in``; ``not`` in front denies it.
        tail: the rest.
        text: one sentence; what is shown, embedded and hashed.
        evidence: ids of the turns.
        created_at: of the turn that it comes from.
        valid_from: since when it holds.
        valid_to: until when it held; None while it does.
        children: ids of the thoughts that were merged into it.
        source: who stated it.
        state: active, superseded, merged or deleted.
        confidence: of the extractor.
        id: of its record.
    """

    head: str
    relation: str
    tail: str
    text: str
    created_at: datetime
    evidence: tuple[str, ...] = ()
    valid_from: datetime | None = None
    valid_to: datetime | None = None
    children: tuple[str, ...] = ()
    source: Trust = "user"
    state: State = "active"
    confidence: float = 1.0
    id: str = ""

    @property
    def denied(self) -> bool:
        """Whether it says that something is not so."""
        return self.relation.startswith("not ")


class ThoughtStore:
    """Thoughts of one user on the shared store; the bucket is a field, so hashing works as a filter.

    Args:
        store: the user's.
        buckets: of each table; set when the index is made, doubled when the thoughts have quadrupled twice.
        tables: independent hash tables.
        probes: buckets looked at in each.
        exact_below: scan everything while thoughts times dimensions are below this.
    """

    def __init__(
        self, store: UserStore, buckets: int = 16, tables: int = 1, probes: int = 4, exact_below: float = 5e6
    ) -> None:
        self.store, self.exact_below = store, exact_below
        kept = store.get_setting(_INDEX)
        dim = store.embedder.dim
        if kept is None or kept["dim"] != dim:
            self.hashing = AngularLSH(dim, buckets, tables, min(probes, buckets), seed=0)
            self._keep()
        else:
            self.hashing = AngularLSH(
                dim, kept["buckets"], kept["tables"], min(probes, kept["buckets"]), kept["seed"]
            )
            self.hashing.R = (
                np.frombuffer(bytes.fromhex(kept["R"]), np.float32).reshape(self.hashing.R.shape).copy()
            )

    def add(self, thoughts: Sequence[Thought]) -> list[str]:
        """Embed, hash and write; their ids."""
        if not thoughts:
            return []
        vectors = self.store.embedder([thought.text for thought in thoughts])
        codes = self.hashing.hash(vectors)
        records = [_record(one, code.tolist()) for one, code in zip(thoughts, codes, strict=True)]
        return self.store.add(records, vectors=vectors)

    def get(self, ids: Sequence[str]) -> list[Thought]:
        """By id."""
        return [_thought(record) for record in self.store.get(ids)]

    def all(
        self, head: str | None = None, states: Sequence[State] = ("active",), as_of: datetime | None = None
    ) -> Iterator[Thought]:
        """Thoughts about a head (any case), in these states, or active at a time."""
        chosen: Sequence[State] = ("active", "superseded", "merged") if as_of is not None else states
        for record in self.store.iterate(kinds=("thought",), states=chosen):
            one = _thought(record)
            if head is not None and one.head.lower() != head.lower():
                continue
            since = one.valid_from or one.created_at
            if as_of is not None and not (since <= as_of and (one.valid_to is None or as_of < one.valid_to)):
                continue
            yield one

    def bucket(self, number: int, table: int = 0) -> list[Thought]:
        """The active thoughts of a bucket."""
        where = {f"metadata.bucket{table}": number}
        return [_thought(record) for record in self.store.iterate(kinds=("thought",), where=where)]

    def buckets_of(self, ids: Sequence[str]) -> set[int]:
        """Bucket numbers, in the first table, of thoughts."""
        return {int(record.metadata["bucket0"]) for record in self.store.get(ids)}

    def search(self, query: str, k: int) -> list[Hit]:
        """Best ``k`` active thoughts by cosine, from the probed buckets or, while that is cheap, from all."""
        vector = self.store.embedder([query])[0]
        count = self.store.count(kinds=("thought",))
        if count * self.hashing.dim < self.exact_below:
            found = self.store.search(
                vector=vector, k=k, kinds=("thought",), weights={"words": 0, "vector": 1}
            )
            return [replace(h, score=h.parts["cosine"], parts={**h.parts, "scanned": 1.0}) for h in found]
        z = self.hashing._margins(vector[None].astype(np.float64))[0]
        records: dict[str, Record] = {}
        for table, margins in enumerate(z):
            wanted = [int(i) for i in np.argsort(-margins, kind="stable")[: self.hashing.probes]]
            for record in self.store.iterate(kinds=("thought",), where={f"metadata.bucket{table}": wanted}):
                records[record.id] = record
        if len(records) < min(k, count) and self.exact_below > 0:
            records = {record.id: record for record in self.store.iterate(kinds=("thought",))}
        if not records:
            return []
        cosines = self.store.vectors(list(records)) @ vector
        order = np.argsort(-cosines, kind="stable")[:k]
        chosen = list(records.values())
        share = len(records) / max(1, count)
        return [
            Hit(chosen[i], float(cosines[i]), {"cosine": float(cosines[i]), "scanned": share}) for i in order
        ]

    def close(self, id: str, state: State, at: datetime, **told: Any) -> None:
        """Mark a thought superseded or merged since a time; nothing is lost."""
        (record,) = self.store.get([id])
        self.store.update(id, state=state, valid_to=at, metadata={**record.metadata, **told})

    def reopen(self, ids: Sequence[str]) -> None:
        """Make closed thoughts active again."""
        for record in self.store.get(ids):
            self.store.update(record.id, state="active", valid_to=None)

    def rehash(self, buckets: int) -> int:
        """Another number of buckets; every thought moves to its new one. How many."""
        with self.store.transaction():
            self.hashing.rehash(buckets)
            self._keep()
            moved = 0
            for state in ("active", "superseded", "merged"):
                for record in list(self.store.iterate(kinds=("thought",), states=(state,))):  # type: ignore[arg-type]
                    code = self.hashing.hash(self.store.vectors([record.id]))[0]
                    self.store.update(record.id, metadata={**record.metadata, **_codes(code.tolist())})
                    moved += 1
        return moved

    def _keep(self) -> None:
        h = self.hashing
        self.store.set_setting(
            _INDEX,
            {
                "dim": h.dim,
                "buckets": h.buckets,
                "tables": h.tables,
                "seed": h.seed,
                "R": h.R.tobytes().hex(),
            },
        )


def _codes(code: Sequence[int]) -> dict[str, int]:
    return {f"bucket{table}": int(bucket) for table, bucket in enumerate(code)}


def _record(one: Thought, code: Sequence[int]) -> Record:
    told = {
        "head": one.head, "relation": one.relation, "tail": one.tail, "children": list(one.children),
        "confidence": one.confidence, **_codes(code),
    }  # fmt: skip
    return Record(
        one.text, one.created_at, id=one.id, kind="thought", valid_from=one.valid_from, valid_to=one.valid_to,
        state=one.state, source=Source(role=one.source, trust=one.source), evidence=one.evidence,
        metadata=told,
    )  # fmt: skip


def _thought(record: Record) -> Thought:
    told = record.metadata
    return Thought(
        str(told.get("head", "")), str(told.get("relation", "")), str(told.get("tail", "")), record.text,
        record.created_at, record.evidence, record.valid_from, record.valid_to,
        tuple(told.get("children", ())), record.source.get("trust", "user"), record.state,
        float(told.get("confidence", 1.0)), record.id,
    )  # fmt: skip
