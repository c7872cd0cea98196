"""Tidying thoughts by operations over ids, each checked before anything is applied; nothing is lost."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Literal, Protocol, runtime_checkable

from pydantic import BaseModel, Field

from memspan.recall.chat import Chat, language_of, load_prompt
from memspan.recall.pack import as_data
from memspan.recall.tim.thoughts import Thought, ThoughtStore, fact_key

__all__ = [
    "Drop",
    "Edit",
    "Keep",
    "LLMOrganiser",
    "Merge",
    "Op",
    "Organiser",
    "RuleOrganiser",
    "apply_ops",
    "check_ops",
]

MOST = 300  # characters of a merged thought


class Keep(BaseModel):
    """Leave a thought as it is."""

    op: Literal["keep"]
    id: int


class Drop(BaseModel):
    """A thought that a newer or equal one contradicts or repeats."""

    op: Literal["drop"]
    id: int
    because: int


class Merge(BaseModel):
    """Thoughts about one head that become one sentence."""

    op: Literal["merge"]
    ids: list[int] = Field(min_length=2, max_length=50)
    text: str


Op = Annotated[Keep | Drop | Merge, Field(discriminator="op")]


class Edit(BaseModel):
    """What an organiser answers."""

    ops: list[Op] = Field(max_length=200)


@runtime_checkable
class Organiser(Protocol):
    """Thoughts, numbered by their place -> operations on these numbers."""

    calls_model: bool

    def __call__(self, thoughts: Sequence[Thought]) -> list[Keep | Drop | Merge]:
        """Decide."""
        ...


class LLMOrganiser:
    """Operations by a language model, checked by a schema.

    Args:
        client: of the model.
    """

    calls_model = True

    def __init__(self, client: Chat) -> None:
        self.client = client

    def __call__(self, thoughts: Sequence[Thought]) -> list[Keep | Drop | Merge]:
        """One call (one more where the answer is not valid).

        Raises:
            ChatFailed: no valid answer.
        """
        items = "\n".join(
            f'{{"id": {i}, "text": {as_data(one.text)}, "at": "{one.created_at:%Y-%m-%d}", '
            f'"source": {json.dumps(one.source)}}}'
            for i, one in enumerate(thoughts)
        )
        prompt = load_prompt("organise", language_of(items))
        return list(self.client.structured(prompt.messages(items=items), Edit).ops)


class RuleOrganiser:
    """Without a model: repeats, denials, and relations that hold one value; the newer statement wins."""

    calls_model = False

    def __call__(self, thoughts: Sequence[Thought]) -> list[Keep | Drop | Merge]:
        """Decide; nothing is merged, since joining sentences needs a model."""
        order = sorted(
            range(len(thoughts)), key=lambda i: (thoughts[i].created_at, thoughts[i].id), reverse=True
        )
        kept: list[int] = []
        ops: list[Keep | Drop | Merge] = []
        for place in order:
            winner = next((other for other in kept if _clashes(thoughts[place], thoughts[other])), None)
            if winner is None:
                kept.append(place)
                ops.append(Keep(op="keep", id=place))
            else:
                ops.append(Drop(op="drop", id=place, because=winner))
        return sorted(ops, key=_first)


def check_ops(thoughts: Sequence[Thought], ops: Sequence[Keep | Drop | Merge]) -> list[str]:
    """What is wrong with an edit, in words without content; empty when it may be applied.

    Every id is named exactly once; ``because`` is kept or merged and not older than what it drops; a merged
    text is at most 300 characters, joins thoughts of one head, and its capitalised words and numbers all
    stand in its inputs; not everything is dropped.
    """
    named: list[int] = []
    for op in ops:
        named += op.ids if isinstance(op, Merge) else [op.id]
    if unknown := sorted(set(named) - set(range(len(thoughts)))):
        return [f"unknown ids {unknown[:5]}"]
    problems = []
    if len(set(named)) != len(named):
        problems.append("an id is named twice")
    if lost := sorted(set(range(len(thoughts))) - set(named)):
        problems.append(f"ids {lost[:5]} are neither kept, dropped nor merged")
    staying = {op.id for op in ops if isinstance(op, Keep)} | {
        i for op in ops if isinstance(op, Merge) for i in op.ids
    }
    for op in ops:
        if isinstance(op, Drop):
            if op.because not in staying:
                problems.append(f"{op.id} is dropped because of {op.because}, which does not stay")
            elif thoughts[op.because].created_at < thoughts[op.id].created_at:
                problems.append(f"{op.id} is dropped because of an older thought")
        elif isinstance(op, Merge):
            inputs = " ".join(thoughts[i].text for i in op.ids)
            if not op.text.strip() or len(op.text) > MOST:
                problems.append(f"a merged text has {len(op.text)} characters; 1 to {MOST} are allowed")
            if len({thoughts[i].head.lower() for i in op.ids}) != 1:
                problems.append("thoughts of several heads are merged")
            if strange := _names(op.text) - _names(inputs, every=True):
                problems.append(f"a merged text holds {len(strange)} names or numbers that its inputs do not")
    return problems


def apply_ops(
    store: ThoughtStore, thoughts: Sequence[Thought], ops: Sequence[Keep | Drop | Merge], at: datetime
) -> list[str]:
    """Apply a checked edit in one transaction; ids of merged thoughts.

    Dropped thoughts are superseded by the one named; merged ones live on as children of the new thought,
    which has all their evidence.
    """
    written: list[str] = []
    with store.store.transaction():
        for op in ops:
            if isinstance(op, Merge):
                parts = [thoughts[i] for i in op.ids]
                evidence = tuple(dict.fromkeys(id for part in parts for id in part.evidence))
                assistant = any(part.source != "user" for part in parts)
                newest = max(part.created_at for part in parts)
                one = Thought(
                    parts[0].head, "; ".join(dict.fromkeys(part.relation for part in parts)),
                    "; ".join(dict.fromkeys(part.tail for part in parts)), op.text.strip(), newest, evidence,
                    children=tuple(part.id for part in parts), source="assistant" if assistant else "user",
                )  # fmt: skip
                written += store.add([one])
                for part in parts:
                    store.close(part.id, "merged", at, merged_into=written[-1])
            elif isinstance(op, Drop):
                store.close(thoughts[op.id].id, "superseded", at, superseded_by=thoughts[op.because].id)
    return written


def _clashes(older: Thought, newer: Thought) -> bool:
    """Whether the newer thought repeats or contradicts the older."""
    keys = [fact_key(one.head, one.relation, one.tail) for one in (older, newer)]
    return keys[0] == keys[1] and (newer.repeats(older) or newer.ends(older))


def _names(text: str, every: bool = False) -> set[str]:
    """Capitalised words and numbers (with ``every``: all words), in lower case."""
    words = re.findall(r"\w+", text)
    # The first word of a sentence is capitalised whatever it is; "and" and the like add no fact.
    plain = {"the", "a", "an", "and", "also", "he", "she", "they", "it", "both", "in", "on", "at"}
    return {
        w.lower() for w in words if every or ((w[0].isupper() or w[0].isdigit()) and w.lower() not in plain)
    }


def _first(op: Keep | Drop | Merge) -> int:
    return min(op.ids) if isinstance(op, Merge) else op.id
