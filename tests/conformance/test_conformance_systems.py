"""Each system keeps the contracts of its kind, and has a recipe and a page that keep theirs."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conformance.contracts import CHECKS, System, check_trained, component, run_check
from conformance.systems import SYSTEMS
from memspan.base.files import atomic_write
from memspan.data import ImageSet, TextSet, loading
from memspan.recipes import names
from memspan.recipes.engine import Cell, Recipe, Task, execute
from memspan.recipes.engine.options import as_json
from memspan.recipes.engine.registry import find
from memspan.recipes.engine.run import Interrupted
from memspan.recipes.engine.store import RunFolder
from memspan.report import page
from memspan.report.schema import read_result

ROOT = Path(__file__).parents[2]
NAMES = sorted({system.story for system in SYSTEMS})
EXTRAS = (
    "sklearn",
    "matplotlib",
    "PIL",
    "transformers",
    "timm",
    "torchvision",
    "polars",
    "psutil",
    "avalanche",
)
PAIRS = [
    pytest.param(system, check, id=f"{system.name}-{check.__name__.removeprefix('check_')}")
    for system in SYSTEMS
    for check in CHECKS[system.kind]
]


@pytest.mark.parametrize(("system", "check"), PAIRS)
def test_contract(system: System, check: Any, tmp_path: Path) -> None:
    run_check(check, system, tmp_path)


def test_every_recipe_has_its_line_here() -> None:
    assert set(names()) == set(NAMES)
    assert len({system.name for system in SYSTEMS}) == len(SYSTEMS)


def test_a_recipe_in_a_folder_imports_its_own_files_relatively() -> None:
    """Else a copy of the folder would run the original's files, whatever its owner changes."""
    for recipe in map(find, names()):
        for path in recipe.files if len(recipe.files) > 1 else []:
            assert f"memspan.recipes.{recipe.name}" not in path.read_text("utf-8"), path


@pytest.mark.parametrize("name", NAMES)
def test_the_component_that_the_recipe_names_is_there(name: str) -> None:
    recipe = find(name)
    assert recipe.name == name
    assert component(recipe.component) is not None
    assert importlib.import_module(f"memspan.{recipe.room}").__doc__


READ: dict[tuple[str, str], Any] = {}


def read_once(read: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """All runs read the same files; one that changed what it was given would make the next one differ."""

    def reading(item: Any, way: Any) -> Any:
        key = (item.name, way.source())
        if key not in READ:
            READ[key] = beginning(read(item, way))
        return READ[key]

    return reading


def beginning(found: Any) -> Any:
    """Less of a text and fewer digits: whether a run goes on alike does not hang on how much it reads."""
    if isinstance(found, TextSet):
        parts = {name: tuple(text[:30_000] for text in texts) for name, texts in found.parts.items()}
        return dataclasses.replace(found, parts=parts)
    if isinstance(found, ImageSet) and found.name == "digits":
        train, test = found.y_train < 6, found.y_test < 6
        return dataclasses.replace(
            found, x_train=found.x_train[train], y_train=found.y_train[train],
            x_test=found.x_test[test], y_test=found.y_test[test], classes=found.classes[:6],
        )  # fmt: skip
    return found


def settled() -> None:
    """What is loaded by now stays: the collection after each cell need not look through it again."""
    gc.collect()
    gc.freeze()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_has_a_control_and_resumes_to_the_same_result(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is broken off half way: after the first checkpoint of a cell, or between two cells.

    What stands before the break are the straight run's own files: the same calls in another fresh folder
    would only write them once more. From the break on every cell is measured a second time.
    """
    monkeypatch.setattr(page, "write_page", lambda result, path, *_, **__: atomic_write(path, "<html>"))
    monkeypatch.setattr(loading, "_read", read_once(loading._read))
    recipe: Recipe[Any] = find(name)
    tiny = recipe.tiny or recipe.quick
    measure, save, write, written, armed = Task.measure, Cell.save, RunFolder.write_cell, [], []

    def noted(folder: RunFolder, key: Any, cell: Any) -> Any:
        if not written:
            settled()  # most of a recipe's libraries are loaded in its first cell
        written.append(folder.cell_path(key).name)
        return write(folder, key, cell)

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "write_cell", noted)
        straight = execute(recipe, tiny, seeds=1, out=tmp_path / "straight")
    settled()
    found = read_result(straight.out)
    assert recipe.control in {one.method for one in found.measurements}
    assert found.claims
    assert found.data
    assert all(sum(one.bytes.values()) > 0 for one in found.measurements if one.method != recipe.control)
    cells = len(found.measurements)
    assert len(written) == cells
    half = (cells - 1) // 2
    (tmp_path / "resumed" / "cells").mkdir(parents=True)
    for place in ("run.json", *(f"cells/{cell}" for cell in written[:half])):
        shutil.copyfile(straight.out / place, tmp_path / "resumed" / place)

    def until(task: Task[Any], **arguments: Any) -> Any:
        if armed or cells == 1:  # the cell in which it was to end keeps no checkpoints
            raise KeyboardInterrupt
        armed[:] = [True] * (len(task.measurements) == half)
        return measure(task, **arguments)

    def until_saved(cell: Cell, *arguments: Any, **named: Any) -> None:
        save(cell, *arguments, **named)
        if armed:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Task, "measure", until)
        patched.setattr(Cell, "save", until_saved)
        with pytest.raises(Interrupted):
            execute(recipe, tiny, seeds=1, out=tmp_path / "resumed")
    resumed = execute(recipe, tiny, seeds=1, out=tmp_path / "resumed")
    assert resumed.result.without_times() == straight.result.without_times()
    if recipe.room == "training":  # elsewhere a control may be plain training
        check_trained(straight.result.measurements, recipe.control)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda p: p.stem
)
def test_a_committed_result_trains_what_its_rows_say(path: Path) -> None:
    if '"claims"' in path.read_text("utf-8"):
        result = read_result(path)
        recipe = find(result.recipe)
        if recipe.room == "training":
            check_trained(result.measurements, recipe.control)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda p: p.stem
)
def test_a_committed_result_says_how_it_was_run(path: Path) -> None:
    """It is quick or full with the recipe's own options alone; else custom, and names those that differ."""
    if '"claims"' not in path.read_text("utf-8"):
        return
    result = read_result(path)
    recipe = find(result.recipe)
    full = result.mode == "full" or bool(result.changed.get("full"))
    usual = as_json(recipe.full if full else recipe.quick) | {"seeds": recipe.seeds[full]}
    differ = {name: value for name, value in result.config.items() if usual.get(name, value) != value}
    told = {name: value for name, value in result.changed.items() if name != "full"}
    assert differ.items() <= told.items(), "say mode custom, and what was changed"
    assert (result.mode == "custom") == bool(result.changed)


@pytest.mark.parametrize("name", NAMES)
def test_a_page_tells_how_to_use_it_on_your_own_model(name: str) -> None:
    text = (ROOT / "docs" / "systems" / f"{name}.md").read_text("utf-8").lower()
    assert "\n## on your own model" in text


def test_importing_a_component_loads_no_extra() -> None:
    components = [find(name).component.rpartition(".")[0] for name in NAMES]
    code = f"import sys, importlib; [importlib.import_module(m) for m in {components}]; "
    code += f"print([m for m in {EXTRAS} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
