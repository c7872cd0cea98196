"""``memspan demo``: what the library is for, in a minute and a half, on the terminal and on one page."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from memspan.commands._shared import terminal

if TYPE_CHECKING:
    from memspan.commands.demo.parts import Held

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
    "one example of 2,048 tokens, float32, planned for CUDA, AdamW with foreach=False (the default there "
    "holds one more copy of the weights for a moment); nothing is allocated"
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

    say = terminal().print

    def line(text: str = "", style: str | None = None) -> None:
        say(text, style=style, markup=False, highlight=False, soft_wrap=True)

    line("\n1  Does a step of a 7-billion-parameter Llama fit a card of 24 GiB?", "bold")
    with busy.status("tracing three steps on tensors without bytes"):
        held = parts.does_it_fit()
    for text in _bars(held, parts.BUDGET):
        line(text)
    line(f"   {parts.sentence(held[0])}.", "bold")
    line(f"   {_CONDITIONS[0].upper()}{_CONDITIONS[1:]}.", "dim")

    line("\n2  Is that true? One small step for real", "bold")
    with busy.status("one small step"):
        step = parts.is_it_true()
    line(
        f"   planned {step.planned:,} bytes · counted {step.counted:,} · allocator {step.allocator:,} · "
        f"difference {step.planned - step.allocator:,}"
    )
    line(f"   ({_SMALL.format(step.numbers)})", "dim")

    line("\n3  Does it still learn?", "bold")
    with busy.status("training") as status:
        learned = parts.does_it_learn(tell=lambda name: status.update(f"training: {name}"))
    line(f"   {'':<18}{'accuracy':>9}{'a step holds':>16}{'numbers trained':>19}", "dim")
    for way in learned:
        line(f"   {way.name:<18}{way.mean:>9.1%}{_size(way.held):>16}{way.trained:>19,}")
    line(f"   ({_DIGITS})", "dim")

    line("\n4  A memory: told, asked, corrected, forgotten", "bold")
    moments = parts.remember()
    for one in moments:
        line(f"   {one.clock}  {one.what:<10}{one.text}")
        if one.what == "asked":
            line(f"{'':20}→ {one.found}  ({one.why})")

    line("\n5  Yours:", "bold")
    for command, what in NEXT:
        line(f"   {command}")
        line(f"      {what}", "dim")
    write(page, held, step, learned, moments)
    line(f"\npage  {page}")


def write(page: Path, held: Any, step: Any, learned: Any, moments: Any) -> None:
    """Write the page of all parts."""
    from memspan.commands.demo.parts import BUDGET, sentence
    from memspan.report.page import write_own

    page.parent.mkdir(parents=True, exist_ok=True)
    template = resources.files("memspan.commands.demo").joinpath("page.html.j2").read_text("utf-8")
    write_own(
        page, template, title="memspan: a demo", held=held, budget=BUDGET, sentence=sentence(held[0]),
        conditions=_CONDITIONS, step=step, small=_SMALL.format(step.numbers), learned=learned,
        digits=_DIGITS, moments=moments, commands=NEXT, size=_size,
    )  # fmt: skip


def _bars(held: list[Held], budget: int) -> list[str]:
    """A bar a way, by kind, to one scale; ┃ is the card."""
    most = max(row.total for row in held)
    card = round(_CELLS * budget / most)
    rows = [
        "   " + " " * 24 + "   ".join(f"{shade} {kind}" for kind, shade in _SHADES.items()) + "   ┃ the card"
    ]
    for row in held:
        cells = [" "] * (_CELLS + 1)
        done = 0
        for kind, shade in _SHADES.items():
            start, done = done, done + row.kinds[kind]
            first, last = round(_CELLS * start / most), round(_CELLS * done / most)
            cells[first:last] = shade * (last - first)
        cells[card] = "┃"
        rows.append(f"   {row.name:<24}{''.join(cells)}{_size(row.total):>9}")
    return rows


def _size(count: int) -> str:
    from memspan.report.units import human_bytes

    return human_bytes(count)
