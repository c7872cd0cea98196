"""Run a recipe: open or continue its folder, measure, judge, write the report and then the result."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from memspan import __version__
from memspan.base import refuse
from memspan.ledger.bytes import Budget
from memspan.recipes.engine.code import code_fingerprints
from memspan.recipes.engine.environment import environment, the_device
from memspan.recipes.engine.options import as_json, checked
from memspan.recipes.engine.progress import Progress
from memspan.recipes.engine.recipe import Recipe
from memspan.recipes.engine.store import RunFolder, fresh_folder, newest_unfinished
from memspan.recipes.engine.task import Task
from memspan.report.figures import Figure
from memspan.report.schema import Result, write_result

__all__ = ["Finished", "Interrupted", "execute"]

O = TypeVar("O")  # noqa: E741


@dataclass(frozen=True)
class Finished:
    """A finished run: its result, folder, page (None where the page's extra is missing) and figures."""

    result: Result
    out: Path
    report: Path | None
    figures: tuple[Figure, ...] = ()


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a run: where it lies and how many cells are finished."""

    def __init__(self, out: Path, cells: int) -> None:
        self.out, self.cells = out, cells
        super().__init__(f"{cells} finished cells are kept in {out}")


def execute(
    recipe: Recipe[O],
    options: O | None = None,
    *,
    mode: Literal["quick", "full"] = "quick",
    seeds: int | None = None,
    device: str = "cpu",
    threads: int | None = None,
    budget: Budget | str | int | None = None,
    out: Path | None = None,
    resume: bool = False,
    runs: Path = Path("runs"),
    progress: Progress | None = None,
) -> Finished:
    """Run a recipe to its result; after a kill, the same call with the same ``out`` continues.

    Args:
        recipe: what to run.
        options: its options; None uses those of the mode.
        mode: ``"quick"`` or ``"full"``: whose options, seeds and claims are meant. With other options than
            these the result's mode is ``"custom"``, and it names the options that make it so.
        seeds: how many seeds; None uses the recipe's count for the mode.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"`` or ``"auto"``; some recipes know the CPU alone.
        threads: torch's threads on the CPU; None leaves it to the recipe, else to torch.
        budget: bytes, for recipes that take one.
        out: the folder; None makes a new one, ``runs/NAME/STAMP``.
        resume: continue the newest unfinished run of this configuration under ``runs``.
        runs: where new folders are made.
        progress: what shows the progress; None is silent.

    Returns:
        The result and where it lies.

    Raises:
        BadInput: an option, or a folder with another configuration.
        FileExistsError: the folder holds a finished result.
        CorruptFile: a stored cell, checkpoint or run file is not whole.
        OSError: the disk is full; what was stored is whole.
        Interrupted: Ctrl-C.
    """
    usual = recipe.full if mode == "full" else recipe.quick
    options = checked(options if options is not None else usual)
    count = recipe.seeds[mode == "full"] if seeds is None else seeds
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        refuse("seeds", seeds, "give a count of 1 or more")
    if threads is not None and threads < 1:
        refuse("threads", threads, "give a count of 1 or more")
    if budget is not None and not recipe.takes_budget:
        refuse("budget", budget, f"recipe {recipe.name} takes none; see its options with --help")
    if resume and out is not None:
        refuse("resume", str(out), "an unfinished --out is continued without --resume; give one of them")
    spend = None if budget is None else Budget.parse(budget)
    place = the_device(device, recipe.devices)
    changed = _changed(recipe, options, mode, count, spend)
    called: Literal["quick", "full", "custom"] = "custom" if changed else mode
    with _settings(threads or recipe.threads, place):
        identity = _identity(recipe, options, called, count, spend, place)
        base = runs / recipe.name
        path = out if out is not None else newest_unfinished(base, identity) if resume else fresh_folder(base)
        with RunFolder(path, identity) as folder, progress or Progress(style="quiet") as shown:
            task = Task(
                recipe, options, mode=called, seeds=range(count), device=place, budget=spend,
                folder=folder, progress=shown,
            )  # fmt: skip
            try:
                recipe.run(task)
                return _conclude(task, folder, shown, config=_config(options, count, spend), changed=changed)
            except KeyboardInterrupt:
                raise Interrupted(folder.path, folder.finished_cells()) from None
            except Exception as error:
                kept = folder.finished_cells()
                if kept or any((path / "cells").glob("*")):
                    error.add_note(
                        f"{kept} finished cells are kept: the same options with --out {path} continue"
                    )
                raise


def _conclude(
    task: Task[O], folder: RunFolder, shown: Progress, config: dict[str, Any], changed: dict[str, Any]
) -> Finished:
    recipe, measured = task.recipe, task.measurements
    if not measured:
        refuse("run", recipe.name, "it measured nothing; call task.measure(...)")
    cost = f" ({recipe.full_cost})" if recipe.full_cost else ""
    claims = [
        one.model_copy(update={"needs": f"--full{cost}: {one.needs}"}) if one.needs else one
        for one in recipe.judge(measured, task.options)
    ]
    figures = list(recipe.figures(measured, task.options)) if recipe.figures else []
    result = Result(
        recipe=recipe.name, mode=task.mode, changed=changed, config=config,
        environment=environment(task.device), data=task.data, measurements=list(measured),
        claims=claims, notes=task.notes,
    )  # fmt: skip
    page = folder.path / "report.html"
    report: Path | None = page
    try:
        from memspan.report.page import write_page

        write_page(result, page, figures, recipe.title, asked=recipe.problem, answer=recipe.answer)
    except ImportError as error:
        shown.say(f"no report.html: {error}")
        report = None
    write_result(folder.result, result)
    return Finished(result, folder.path, report, tuple(figures))


def _identity(
    recipe: Recipe[O], options: O, mode: str, seeds: int, budget: Budget | None, device: torch.device
) -> dict[str, Any]:
    return {
        "recipe": recipe.name,
        "mode": mode,
        "options": as_json(options),
        "seeds": seeds,
        "budget": None if budget is None else budget.bytes,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "memspan": __version__,
        **code_fingerprints(recipe.files),
    }


def _changed(recipe: Recipe[O], options: O, mode: str, seeds: int, budget: Budget | None) -> dict[str, Any]:
    """What makes a run differ from the recipe's own quick or full one, as on the command line."""
    usual = recipe.full if mode == "full" else recipe.quick
    before, now = (as_json(one, whole_paths=False) for one in (usual, options))
    found = {name: value for name, value in now.items() if value != before[name]}
    if seeds != recipe.seeds[mode == "full"]:
        found["seeds"] = seeds
    if budget is not None:
        found["budget"] = budget.bytes
    return {"full": True, **found} if found and mode == "full" else found


def _config(options: object, seeds: int, budget: Budget | None) -> dict[str, Any]:
    config = as_json(options, whole_paths=False) | {"seeds": seeds}
    return config if budget is None else config | {"budget": budget.bytes}


@contextlib.contextmanager
def _settings(threads: int | None, device: torch.device) -> Iterator[None]:
    before = torch.get_num_threads(), torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        if device.type == "cuda":  # a resumed run must repeat a straight one
            torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before[1], before[2]
