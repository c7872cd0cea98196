"""Which memory goes in raw, as its summary, or not at all: a pure function that never exceeds its budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from memspan.base import refuse
from memspan.recall.text import TokenCounter, shorten, token_counter

__all__ = ["Choice", "Item", "Packing", "pack"]

_TOO_LONG = "too long: its summary"
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

    All raw where that fits. Else, for every item but the best: dropped when its raw text does not suffice for
    the query, its summary when that suffices, else raw. Then raw items become summaries from the least
    similar on, then items are dropped from the least similar on. The best item is raw where it fits alone
    beside the flash memory, else its summary, else cut.

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
    kinds: list[Kind] = ["raw"] * len(items)
    reasons = ["everything fits"] * len(items)
    sizes = [(count(item.raw), count(item.summary)) for item in items]
    steps: list[str] = []
    asked = 0
    kept_flash = flash if count(flash) <= budget else shorten(flash, budget, count)
    if kept_flash != flash:
        steps.append("the flash memory alone exceeds the budget: cut")
    left = budget - count(kept_flash)

    def total() -> int:
        return sum(_size(kind, size) for kind, size in zip(kinds, sizes, strict=True))

    if items and total() > left:
        reasons = ["needed as it is"] * len(items)
        for place in range(1, len(items)):
            asked += 1
            if decide is not None and not decide(items[place].raw, "raw"):
                kinds[place], reasons[place] = "drop", "does not help with the query"
                continue
            if decide is None:
                continue
            asked += 1
            if decide(items[place].summary, "summary"):
                kinds[place], reasons[place] = "summary", "its summary suffices"
        steps.append(
            f"all raw needs {sum(raw for raw, _ in sizes)} of {left} tokens: {asked} questions asked"
        )
        for place in range(len(items) - 1, 0, -1):  # second pass, from the least similar
            if total() <= left:
                break
            if kinds[place] == "raw" and sizes[place][1] < sizes[place][0]:
                kinds[place], reasons[place] = "summary", _TOO_LONG
        for place in range(len(items) - 1, 0, -1):
            if total() <= left:
                break
            if kinds[place] != "drop":
                kinds[place], reasons[place] = "drop", "no room"
        reasons[0] = "most similar"
        if total() > left and sizes[0][1] < sizes[0][0]:
            kinds[0], reasons[0] = "summary", "most similar, too long: its summary"
        if total() > left:
            kinds[0], reasons[0] = "cut", "most similar, too long even as a summary: cut"
        for place in range(1, len(items)):  # the second pass may have freed more than it had to
            if reasons[place] == _TOO_LONG and total() - sizes[place][1] + sizes[place][0] <= left:
                kinds[place], reasons[place] = "raw", "room was left for it as it is"
    cuts: dict[int, str] = {}
    room = left - total()
    unplaced = next((i for i, reason in enumerate(reasons) if reason == "no room"), None)
    if unplaced is not None and kinds[0] == "raw" and room >= _LEAST_CUT:
        cuts[unplaced] = shorten(items[unplaced].raw, room, count)
        if cuts[unplaced]:
            reasons[unplaced] = "cut to the room that was left"
    choices = []
    for place, (item, kind, reason, size) in enumerate(zip(items, kinds, reasons, sizes, strict=True)):
        text = {"raw": item.raw, "summary": item.summary, "drop": ""}.get(kind)
        if text is None:
            text = shorten(item.raw, max(0, left), count)
            kind = "cut" if text else "drop"
        elif cuts.get(place):
            text, kind = cuts[place], "cut"
        choices.append(Choice(item, kind, text, _size(kind, size) if kind != "cut" else count(text), reason))
    choices.sort(key=lambda choice: choice.item.turn)
    used = count(kept_flash) + sum(choice.tokens for choice in choices)
    return Packing(tuple(choices), kept_flash, used, asked, tuple(steps))


def _size(kind: Kind, size: tuple[int, int]) -> int:
    return {"raw": size[0], "summary": size[1]}.get(kind, size[0] if kind == "cut" else 0)
