"""What a recipe declares: its story, its options, and three functions (measure, judge, draw)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from memspan.base import refuse
from memspan.recipes.engine.options import checked, specs

if TYPE_CHECKING:
    from memspan.recipes.engine.measurements import Measurements
    from memspan.recipes.engine.task import Task
    from memspan.report.figures import Figure
    from memspan.report.schema import Claim

__all__ = ["Calls", "Recipe"]

O = TypeVar("O")  # noqa: E741


class Calls(NamedTuple):
    """Calls of a language model that a part of a run would make.

    Attributes:
        what: they are for.
        calls: how many.
        prompt_tokens: sent in all of them, about.
        completion_tokens: received at most.
    """

    what: str
    calls: int
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, kw_only=True)
class Recipe(Generic[O]):
    """A runnable experiment: data, our method, its rivals, a control, and the paper's claims.

    Attributes:
        name: what users type; the file's name.
        title: what it is, in one line.
        paper: title, venue and year.
        room: the package its component lives in, such as ``"continual"``.
        component: dotted path of what a user imports.
        problem: what the user wants; systems are listed by it.
        answer: what the system buys, in one line.
        quick_cost: time of quick mode on two CPU cores, in words.
        full_cost: likewise of ``--full``; claims that only a full run judges tell it.
        options: the frozen dataclass of options.
        quick: what ``memspan run NAME`` uses.
        full: what ``--full`` uses.
        run: measures; cuts its work into cells with ``task.measure``.
        judge: claims over the measurements, each with an interval.
        figures: figures of the report, or None for those the report draws by itself.
        control: the method label of the do-nothing control.
        seeds: number of seeds in quick and in full mode.
        extras: extras of memspan that it needs.
        devices: kinds of device that it can run on.
        takes_budget: whether ``--budget`` means something to it.
        in_tour: whether ``memspan tour`` runs it.
        tour: options of the tour, or None for quick.
        tiny: options that run in seconds, for tests; None uses quick.
        threads: CPU threads at which its sizes run fastest; None uses all cores.
        price: for a recipe that can call language models: what a run with these options would ask of them,
            told by ``memspan run NAME --dry-run``; None for the others.

    Raises:
        BadInput: an option of another type than declared, a missing field, counts of seeds below 1.
    """

    name: str
    title: str
    paper: str
    room: str
    component: str
    problem: str
    answer: str
    quick_cost: str
    options: type[O]
    quick: O
    full: O
    run: Callable[[Task[O]], None]
    judge: Callable[[Measurements, O], Sequence[Claim]]
    figures: Callable[[Measurements, O], Sequence[Figure]] | None = None
    control: str
    seeds: tuple[int, int] = (1, 5)
    extras: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu", "cuda")
    takes_budget: bool = False
    full_cost: str = ""
    in_tour: bool = False
    tour: O | None = None
    tiny: O | None = None
    threads: int | None = None
    price: Callable[[O], Sequence[Calls]] | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, str) and field.name != "full_cost" and not value.strip():
                refuse(field.name, value, f"say it in recipe {self.name!r}")
        specs(self.options)
        for mode in ("quick", "full", "tour", "tiny"):
            options = getattr(self, mode)
            if options is None:
                continue
            if type(options) is not self.options:
                refuse(mode, options, f"give an instance of {self.options.__name__}")
            object.__setattr__(self, mode, checked(options))
        if len(self.seeds) != 2 or min(self.seeds) < 1:
            refuse("seeds", self.seeds, "give two counts of 1 or more: quick, full")

    @property
    def files(self) -> list[Path]:
        """The recipe's source: its file, or all Python files of its folder."""
        file = Path(self.run.__code__.co_filename)
        package = self.run.__module__.rpartition(".")[0]
        # A folder is a package that defines RECIPE; a file lies in one that does not.
        if "RECIPE" not in vars(sys.modules.get(package, object)):
            return [file]
        return sorted(file.parent.rglob("*.py"))
