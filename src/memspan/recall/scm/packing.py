"""Which memory goes in raw, as its summary, or not at all: a pure function that never exceeds its budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from memspan.base import refuse
from memspan.recall.text import TokenCounter, shorten, token_counter

__all__ = ["Choice", "Item", "Packing", "pack"]

_LEAST_CUT = 20  # tokens of room that are worth a cut item
Kind = Literal["raw", "summary", "cut", "drop"]


@dataclass(frozen=True)
class Item:
    """A memory that was activated for a query.

    Attributes:
        turn: its number; the output is in this order.
        raw: the whole text.
        summary: shorter, or the same.
        score: what the items are ranked by.
        id: of its record.
    """

    turn: int
    raw: str
    summary: str
    score: float = 0.0
    id: str = ""


@dataclass(frozen=True)
class Choice:
    """What was decided for an item.

    Attributes:
        item: the item.
        kind: ``raw``, ``summary``, ``cut`` (at a sentence end, with a mark) or ``drop``.
        text: what goes into the prompt; "" when dropped.
        tokens: of ``text``.
        reason: in words.
    """

    item: Item
    kind: Kind
    text: str
    tokens: int
    reason: str


@dataclass(frozen=True)
class Packing:
    """The result of :func:`pack`.

    Attributes:
        choices: one for each item, in order of turns.
        flash: the flash memory as it goes in.
        tokens: of all chosen texts and the flash memory.
        decisions: how often the controller was asked.
        steps: what was done, in words, in order.
    """

    choices: tuple[Choice, ...]
    flash: str
    tokens: int
    decisions: int
    steps: tuple[str, ...] = field(default=())

    @property
    def texts(self) -> list[str]:
        """Chosen texts in order of turns."""
        return [choice.text for choice in self.choices if choice.text]


def pack(
    items: Sequence[Item],
    budget: int,
    tokens: TokenCounter | Callable[[str], int] | None = None,
    decide: Callable[[str, str], bool] | None = None,
    flash: str = "",
) -> Packing:
    """Fit ranked memories into a budget of tokens (section 3.3, with an end for the second loop).

    All raw where that fits. Else every item gets its shortest form, best first and those whose text helps
    with the query before the others, the last one cut; and the room that is left goes to raw texts whose
    summary does not suffice, best first. The best is raw where it fits alone.

    Args:
        items: best first.
        budget: of tokens.
        tokens: counts; None is cautious.
        decide: ``decide(text, which)`` with which ``"raw"`` or ``"summary"``: does the text suffice for the
            query? None says yes to raw and no to summaries. Asked at most twice an item but the first, and
            never when all fits.
        flash: the turn before this one; cut when it exceeds the budget by itself.

    Returns:
        Choices in order of turns; ``tokens <= budget`` always.

    Raises:
        BadInput: a negative budget.
    """
    if budget < 0:
        refuse("budget", budget, "0 or more")
    count = token_counter(tokens)
    steps: list[str] = []
    kept_flash = flash if count(flash) <= budget else shorten(flash, budget, count)
    if kept_flash != flash:
        steps.append("the flash memory alone exceeds the budget: cut")
    room = budget - count(kept_flash)
    raw = [count(item.raw) for item in items]
    short = [min(size, count(item.summary)) for size, item in zip(raw, items, strict=True)]
    found: dict[int, tuple[Kind, str, str]] = {}  # place -> kind, text, reason
    asked = 0
    if sum(raw) <= room:
        found = {place: ("raw", item.raw, "everything fits") for place, item in enumerate(items)}
    else:
        helps, enough = [True] * len(items), [False] * len(items)
        for place in range(1, len(items)):
            if decide is None:
                break
            asked += 1
            helps[place] = decide(items[place].raw, "raw")
            if helps[place] and short[place] < raw[place]:
                asked += 1
                enough[place] = decide(items[place].summary, "summary")
        steps.append(f"all raw needs {sum(raw)} of {room} tokens: {asked} questions asked")
        # The best as it is, all others in their shortest form; then as they are where room is left.
        if raw and raw[0] <= room:
            found[0] = ("raw", items[0].raw, "most similar")
            room -= raw[0]
        for place in sorted(set(range(len(items))) - set(found), key=lambda place: not helps[place]):
            if short[place] <= room:
                whole = short[place] == raw[place]
                text = items[place].raw if whole else items[place].summary
                found[place] = ("raw" if whole else "summary", text, "in its shortest form")
                room -= short[place]
            elif room >= min(_LEAST_CUT, short[place]) and (
                text := shorten(items[place].summary, room, count)
            ):
                found[place] = ("cut", text, "cut to the room that was left")
                room -= count(text)
        for place in range(len(items)):
            more = raw[place] - short[place]
            shortened = place in found and found[place][0] == "summary"
            if shortened and helps[place] and not enough[place] and more <= room:
                found[place] = ("raw", items[place].raw, "room was left for it as it is")
                room -= more
    choices = []
    for place, item in enumerate(items):
        kind, text, reason = found.get(place, ("drop", "", "no room"))
        choices.append(Choice(item, kind, text, count(text) if text else 0, reason))
    choices.sort(key=lambda choice: choice.item.turn)
    used = count(kept_flash) + sum(choice.tokens for choice in choices)
    return Packing(tuple(choices), kept_flash, used, asked, tuple(steps))
