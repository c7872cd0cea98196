"""``memspan demo``: what the library is for, in a minute and a half, on the terminal and on one page."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import click

from memspan.commands._shared import terminal

if TYPE_CHECKING:
    from memspan.commands.demo.parts import Held, Learned, Moment, Step

__all__ = ["demo"]

NEXT = (
    (
        "memspan plan MODEL --budget 8GiB",
        "what a step of yours holds, before it runs; MODEL is your file.py:function, llama-7b, or, with "
        "memspan[tuning], a name that transformers knows",
    ),
    ("memspan fit MODEL --budget 8GiB", "the methods that make it fit, and the largest batch of each"),
    ("memspan serve", "a memory behind any chat application, with pages of it (memspan[serve])"),
)
_CONDITIONS = (
    "One example of 2,048 tokens, float32, planned for CUDA, AdamW with foreach=False (the",
    "default there holds one more copy of the weights for a moment); nothing is allocated.",
)
_SMALL = "a Llama of {:,} numbers, 8 x 64 tokens, AdamW, float32, on this CPU"
_DIGITS = "a network that reads digits meets them lying on their side; 300 steps, float32, CPU, 3 seeds"
_CELLS = 44
_SHADES = {"weights": "█", "gradients": "▓", "optimizer": "▒", "activations": "░"}


@click.command()
@click.option(
    "--page",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("runs/demo.html"),
    show_default=True,
    help="The page to write; replaced when it exists.",
)
def demo(page: Path) -> None:
    """See what a step holds, whether that is true, what it learns; and a memory.

    Takes about a minute on two CPU cores.
    """
    from rich.console import Console

    busy = Console(stderr=True)
    with busy.status("loading torch"):
        from memspan.commands.demo import parts

    say = functools.partial(terminal().print, markup=False, highlight=False, soft_wrap=True)

    say("\n1  Does a step of a 7-billion-parameter Llama fit a card of 24 GiB?", style="bold")
    with busy.status("tracing three steps on tensors without bytes"):
        held = parts.does_it_fit()
    say(card_text(held))

    say("\n2  Is that true? One small step for real", style="bold")
    with busy.status("one small step"):
        step = parts.is_it_true()
    say(step_text(step))

    say("\n3  Does it still learn?", style="bold")
    with busy.status("training") as status:
        learned = parts.does_it_learn(tell=lambda name: status.update(f"training: {name}"))
    say(learned_text(learned))

    say("\n4  A memory: told, asked, corrected, forgotten", style="bold")
    moments = parts.remember()
    say(memory_text(moments))

    say("\n5  Yours", style="bold")
    say("\n".join(f"   {command}\n      {what}" for command, what in NEXT))
    write(page, held, step, learned, moments)
    say(f"\npage  {page}")


def card_text(held: Sequence[Held]) -> str:
    """A bar a way to write the step, by kind, to one scale; ┃ is the card."""
    from memspan.commands.demo.parts import BUDGET, sentence

    most = max(row.total for row in held)
    card = round(_CELLS * BUDGET / most)
    legend = "   ".join(f"{shade} {kind}" for kind, shade in _SHADES.items())
    rows = [f"   {'':24}{legend}   ┃ the card"]
    for row in held:
        cells = [" "] * (_CELLS + 1)
        done = 0
        for kind, shade in _SHADES.items():
            start, done = done, done + row.kinds[kind]
            first, last = round(_CELLS * start / most), round(_CELLS * done / most)
            cells[first:last] = shade * (last - first)
        cells[card] = "┃"
        rows.append(f"   {row.name:<24}{''.join(cells)}{_size(row.total):>9}")
    return "\n".join([*rows, f"   {sentence(held[0])}.", *(f"   {line}" for line in _CONDITIONS)])


def step_text(step: Step) -> str:
    """Three counts of one step, and their difference."""
    return (
        f"   planned {step.planned:,} bytes · counted {step.counted:,} · allocator {step.allocator:,} · "
        f"difference {step.planned - step.allocator:,}\n   ({_SMALL.format(step.numbers)})"
    )


def learned_text(learned: Sequence[Learned]) -> str:
    """A row a way to train: accuracy, bytes, numbers trained."""
    rows = [f"   {'':<18}{'accuracy':>9}{'a step holds':>16}{'numbers trained':>19}"]
    rows += [f"   {way.name:<18}{way.mean:>9.1%}{_size(way.held):>16}{way.trained:>19,}" for way in learned]
    return "\n".join([*rows, f"   ({_DIGITS})"])


def memory_text(moments: Sequence[Moment]) -> str:
    """What happened to the memory, a line a moment, with the reason under each answer."""
    rows = []
    for one in moments:
        rows.append(f"   {one.clock}  {one.what:<11}{one.text}")
        if one.what == "asked":
            rows.append(f"{'':21}→ {one.found}  ({one.why})")
    return "\n".join(rows)


def write(
    page: Path, held: Sequence[Held], step: Step, learned: Sequence[Learned], moments: Sequence[Moment]
) -> None:
    """Write the page of all parts."""
    from memspan.commands.demo.parts import BUDGET, sentence
    from memspan.report.page import write_own

    page.parent.mkdir(parents=True, exist_ok=True)
    template = resources.files("memspan.commands.demo").joinpath("page.html.j2").read_text("utf-8")
    write_own(
        page, template, title="memspan: a demo", held=held, budget=BUDGET, sentence=sentence(held[0]),
        conditions=' '.join(_CONDITIONS), step=step, small=_SMALL.format(step.numbers), learned=learned,
        digits=_DIGITS, moments=moments, commands=NEXT, size=_size,
    )  # fmt: skip


def _size(count: int) -> str:
    from memspan.report.units import human_bytes

    return human_bytes(count)
