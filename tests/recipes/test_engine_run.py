"""A run of a recipe: stored whole, continued after a kill at any point, never mixed with another."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import memspan
from engine_toys import write_toy
from memspan.base import BadInput
from memspan.base.files import CorruptFile, atomic_write
from memspan.recipes import names
from memspan.recipes.engine import Recipe, code, execute, trained_once
from memspan.recipes.engine.code import files_reached
from memspan.recipes.engine.environment import the_device
from memspan.recipes.engine.options import changed
from memspan.recipes.engine.registry import find
from memspan.recipes.engine.run import Interrupted
from memspan.recipes.engine.store import RunFolder, fresh_folder
from memspan.report import claim, page
from memspan.report.schema import read_result
from memspan.report.stats import Interval


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Recipe[Any]:
    return find(str(write_toy(tmp_path_factory.mktemp("toy"))))


@pytest.fixture(autouse=True)
def _quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing and flushing take most of the time of so small a run; one test does both for real."""
    if request.node.originalname != "test_a_run_leaves_result_report_cells_and_checkpoints":
        monkeypatch.setattr(os, "fsync", lambda _: None)
        monkeypatch.setattr(page, "write_page", lambda result, path, *_, **__: atomic_write(path, "<html>"))


@pytest.fixture
def hooks(toy: Recipe[Any]) -> Any:
    found = sys.modules[toy.run.__module__].HOOKS
    yield found
    found.clear()


@pytest.fixture(scope="module")
def straight(toy: Recipe[Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return execute(toy, seeds=2, out=tmp_path_factory.mktemp("straight") / "run").result.without_times()


def test_a_run_leaves_result_report_cells_and_checkpoints(toy: Recipe[Any], tmp_path: Path) -> None:
    done = execute(toy, runs=tmp_path)
    assert done.out.parent == tmp_path / "toy"
    assert read_result(done.out) == done.result
    assert done.report is not None
    assert "<html" in done.report.read_text().lower()
    assert len(list((done.out / "cells").glob("*.json"))) == 2
    assert not list((done.out / "cells").glob("*.safetensors")), (
        "checkpoints inside cells go when the cell is stored"
    )
    assert len(list((done.out / "checkpoints").glob("ours*.safetensors"))) == 1
    assert [source.name for source in done.result.data] == ["drawn"]
    assert done.result.config["sizes"] == [1024]


def test_one_seed_repeats_and_two_differ(toy: Recipe[Any], straight: dict[str, Any], tmp_path: Path) -> None:
    assert execute(toy, seeds=2, runs=tmp_path).result.without_times() == straight
    values = [one["quality"]["accuracy"] for one in straight["measurements"]]
    assert len(set(values)) == len(values)


def test_a_run_killed_at_any_write_resumes_to_the_same_result(toy: Recipe[Any], tmp_path: Path) -> None:
    """At each flush to the disk the process is killed with SIGKILL, a temporary file half done."""
    straight = execute(toy, seeds=1, out=tmp_path / "straight").result.without_times()
    place = 0
    while True:
        out = tmp_path / f"run{place}"
        child = os.fork()
        if child == 0:
            calls = iter(range(10**6))

            def flush(_: int, calls: Any = calls, place: int = place) -> None:
                if next(calls) == place:
                    os.kill(os.getpid(), signal.SIGKILL)

            os.fsync = flush
            execute(toy, seeds=1, out=out)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        if (out / "result.json").exists():  # killed after the last rename: it is finished, and whole
            assert read_result(out).without_times() == straight
        else:
            assert execute(toy, seeds=1, out=out).result.without_times() == straight, place
        assert not list(out.rglob(".*.tmp")) or (out / "result.json").exists()
        place += 1
    assert place >= 20, "run file, cells, checkpoints, report and result were all reached"


def test_a_cell_goes_on_from_its_checkpoint_with_the_same_draws(
    toy: Recipe[Any], hooks: list[Any], straight: dict[str, Any], tmp_path: Path
) -> None:
    def stop(place: str, cell: Any) -> None:
        if place == "checkpoint" and cell.method == "nothing":
            raise KeyboardInterrupt

    hooks.append(stop)
    with pytest.raises(Interrupted, match="1 finished cells are kept"):
        execute(toy, seeds=2, out=tmp_path / "run")
    hooks[:] = [lambda place, cell: counted.append((place, getattr(cell, "method", "")))]
    counted: list[tuple[str, str]] = []
    assert execute(toy, seeds=2, out=tmp_path / "run").result.without_times() == straight
    assert counted.count(("checkpoint", "ours")) == 2, "the finished cell of seed 0 is not run again"
    assert counted.count(("checkpoint", "nothing")) == 3, "one epoch of the interrupted cell was kept"


def test_resume_continues_the_newest_unfinished_run_of_the_same_options(
    toy: Recipe[Any], hooks: list[Any], tmp_path: Path
) -> None:
    def stop(place: str, cell: Any) -> None:
        raise KeyboardInterrupt

    hooks.append(stop)
    outs = []
    for epochs in (2, 3):
        with pytest.raises(Interrupted) as stopped:
            execute(toy, changed(toy.quick, {"epochs": epochs}), runs=tmp_path)
        outs.append(stopped.value.out)
    hooks.clear()
    assert execute(toy, runs=tmp_path, resume=True).out == outs[0]
    with pytest.raises(BadInput, match=r"options.epochs: 3 there, 2 now"):
        execute(toy, runs=tmp_path, resume=True)


def test_another_configuration_is_refused_and_told(
    toy: Recipe[Any], hooks: list[Any], tmp_path: Path
) -> None:
    def stop(place: str, cell: Any) -> None:
        raise KeyboardInterrupt

    hooks.append(stop)
    with pytest.raises(Interrupted):
        execute(toy, out=tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(BadInput, match=r"options.rate: 0.5 there, 0.25 now; seeds: 1 there, 2 now"):
        execute(toy, changed(toy.quick, {"rate": 0.25}), seeds=2, out=tmp_path / "run")
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_changed_code_of_the_recipe_is_refused(tmp_path: Path) -> None:
    first = find(str(write_toy(tmp_path, "one.py")))
    sys.modules[first.run.__module__].HOOKS.append(_interrupt)
    with pytest.raises(Interrupted):
        execute(first, out=tmp_path / "run")
    (tmp_path / "two.py").write_text((tmp_path / "one.py").read_text() + "\n# changed\n")
    with pytest.raises(BadInput, match="the code of the recipe has changed"):
        execute(find(str(tmp_path / "two.py")), out=tmp_path / "run")


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of memspan's files, which stands for the code on the disk: a test may change it."""
    package = Path(memspan.__file__).parent
    for path in package.rglob("*.py"):
        copied = tmp_path / "memspan" / path.relative_to(package)
        copied.parent.mkdir(parents=True, exist_ok=True)
        copied.write_bytes(path.read_bytes())
    monkeypatch.setattr(memspan, "__file__", str(tmp_path / "memspan" / "__init__.py"))
    return tmp_path / "memspan"


@pytest.mark.parametrize("name", ["recipes/tracks/__init__.py", "ledger/bytes.py", "base/rng.py"])
def test_a_changed_helper_refuses_the_old_cells(name: str, house: Path, tmp_path: Path) -> None:
    """What the recipe imports, itself or through others, measured the cells with it."""
    path = write_toy(tmp_path)
    path.write_text(
        path.read_text().replace("import torch\n", "import torch\nimport memspan.recipes.tracks\n")
    )
    recipe = find(str(path))
    sys.modules[recipe.run.__module__].HOOKS.append(_interrupt)
    with pytest.raises(Interrupted):
        execute(recipe, out=tmp_path / "run")
    (house / name).write_text((house / name).read_text() + "\n# changed\n")
    code.seen.cache_clear()  # another process
    with pytest.raises(BadInput, match="the code of memspan has changed"):
        execute(recipe, out=tmp_path / "run")


@pytest.mark.parametrize("name", ["recall/text.py", "training/peqa/layers.py", "report/page.py"])
def test_a_changed_stranger_does_not(
    name: str, house: Path, toy: Recipe[Any], hooks: list[Any], straight: dict[str, Any], tmp_path: Path
) -> None:
    hooks.append(_interrupt)
    with pytest.raises(Interrupted):
        execute(toy, seeds=2, out=tmp_path / "run")
    hooks.clear()
    (house / name).write_text((house / name).read_text() + "\n# a comment elsewhere\n")
    code.seen.cache_clear()
    assert execute(toy, seeds=2, out=tmp_path / "run").result.without_times() == straight


def test_a_recipe_reaches_its_own_room_and_no_other() -> None:
    package = Path(memspan.__file__).parent
    rooms = ("continual", "models", "recall", "training")
    for recipe in map(find, names()):
        reached = {path.relative_to(package).parts[0] for path in files_reached(recipe.files, package)}
        assert {"base", "ledger", "recipes"} <= reached
        assert recipe.room not in rooms or recipe.room in reached
        assert recipe.room == "recall" or "recall" not in reached, recipe.name


def test_a_recipe_in_a_folder_is_copied_and_run_by_its_path(tmp_path: Path) -> None:
    """Its files find each other in the copy: the cells are those of the copy, not of the original."""
    story, _, rest = write_toy(tmp_path).read_text().partition("RECIPE = ")
    (tmp_path / "toy.py").unlink()
    results = []
    for name, metric in (("toy", "accuracy"), ("mine", "luck")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "measure.py").write_text(story.replace('"accuracy"', f'"{metric}"'))
        (folder / "__init__.py").write_text(
            "from .measure import Options, judge, run\n"
            f"from memspan.recipes.engine import Recipe\nRECIPE = {rest}"
        )
        recipe = find(str(folder))
        assert [path.name for path in recipe.files] == ["__init__.py", "measure.py"]
        results.append(execute(recipe, runs=tmp_path / "runs").result)
    assert [set(one.measurements[0].quality) for one in results] == [{"accuracy"}, {"luck"}]
    (tmp_path / "mine" / "__init__.py").unlink()
    with pytest.raises(FileNotFoundError, match="no recipe file at"):
        find(str(tmp_path / "mine"))


def test_a_run_is_quick_or_full_with_the_defaults_alone(toy: Recipe[Any], tmp_path: Path) -> None:
    quick = execute(toy, runs=tmp_path).result
    full = execute(toy, mode="full", runs=tmp_path).result
    assert [(one.mode, one.changed) for one in (quick, full)] == [("quick", {}), ("full", {})]
    other = execute(toy, changed(toy.quick, {"epochs": 1}), runs=tmp_path).result
    assert (other.mode, other.changed) == ("custom", {"epochs": 1})
    other = execute(toy, mode="full", seeds=1, budget="1KiB", runs=tmp_path).result
    assert (other.mode, other.changed) == ("custom", {"full": True, "seeds": 1, "budget": 1024})


def test_a_claim_below_its_least_size_is_not_judged(toy: Recipe[Any], tmp_path: Path) -> None:
    def judge(found: Any, options: Any) -> list[Any]:
        gain = Interval(1.0, 0.5, 1.5, 5)
        return [claim("ours is ahead", "P", gain, "> 0", least={"epochs": (options.epochs, 3)})]

    recipe = dataclasses.replace(toy, judge=judge, full_cost="about 9 min")
    (small,) = execute(recipe, runs=tmp_path).result.claims
    assert (small.mark, small.holds, small.measured) == ("–", None, None)
    assert small.needs == "--full (about 9 min): 3 epochs (2 here)"
    (large,) = execute(recipe, mode="full", runs=tmp_path).result.claims
    assert (large.mark, large.needs) == ("✓", "")


def test_what_was_trained_once_is_trained_anew_when_what_its_builder_calls_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The builder is the same to the letter; a function that a function of it calls is not, or a constant."""
    monkeypatch.setenv("MEMSPAN_CACHE", str(tmp_path / "cache"))
    text = (
        "from functools import partial\nfrom torch import nn\nWIDTH = 2\nTRAINED = []\n"
        "def first(width): return nn.Linear(width, width)\n"
        "class Net(nn.Sequential):\n    def __init__(self): super().__init__(first(WIDTH))\n"
        "def build(): return Net()\n"
        "def fill(value, module, data): TRAINED.append(nn.init.constant_(module[0].bias, value))\n"
        "train = partial(fill, 1.0)\n"
    )
    trained = []
    for number, (old, new) in enumerate(
        [("", ""), ("", "# a comment at the end\n"), ("WIDTH = 2", "WIDTH = 3"), ("1.0)", "2.0)"),
         ("(width, width)", "(width, width, True)")]
    ):  # fmt: skip
        path = tmp_path / f"nets{number}" / "nets.py"
        path.parent.mkdir()
        path.write_text(text.replace(old, new) if old else text + new)
        spec = importlib.util.spec_from_file_location("nets", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        trained_once("net", module.build, module.train, [1])
        trained.append(len(module.TRAINED))
    assert trained == [1, 0, 1, 1, 1]


def test_a_finished_result_is_never_overwritten(toy: Recipe[Any], tmp_path: Path) -> None:
    execute(toy, out=tmp_path / "run")
    before = (tmp_path / "run" / "result.json").read_bytes()
    with pytest.raises(FileExistsError, match="finished result"):
        execute(toy, out=tmp_path / "run")
    assert (tmp_path / "run" / "result.json").read_bytes() == before


def test_a_folder_with_other_files_is_refused(toy: Recipe[Any], tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"other files \(thesis.tex\)"):
        execute(toy, out=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name[0] != ".") == ["thesis.tex"]


def test_two_processes_on_one_folder_are_kept_apart_by_a_lock(tmp_path: Path) -> None:
    first = RunFolder(tmp_path / "run", {"recipe": "a"})
    with pytest.raises(BadInput, match="another process is running here"):
        RunFolder(tmp_path / "run", {"recipe": "a"})
    first.close()
    RunFolder(tmp_path / "run", {"recipe": "a"}).close()


def test_folders_made_in_one_second_do_not_collide(tmp_path: Path) -> None:
    assert len({fresh_folder(tmp_path) for _ in range(20)}) == 20


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "other"])
def test_a_damaged_cell_is_named_with_the_remedy_and_left_alone(
    toy: Recipe[Any], hooks: list[Any], tmp_path: Path, damage: str
) -> None:
    hooks.append(_interrupt_after_cell)
    with pytest.raises(Interrupted):
        execute(toy, out=tmp_path / "run")
    hooks.clear()
    (cell,) = (tmp_path / "run" / "cells").glob("*.json")
    text = cell.read_text()
    damaged = {
        "cut": text[: len(text) // 2],
        "flip": text.replace('"parameters": 12', '"parameters": 13'),
        "empty": "",
        "other": "[1, 2]",
    }[damage]
    assert damaged != text
    cell.write_text(damaged)
    with pytest.raises(CorruptFile, match=rf"{cell.name}.*remove this file and run again") as told:
        execute(toy, out=tmp_path / "run")
    assert "finished cells are kept" in "".join(told.value.__notes__)
    assert cell.read_text() == damaged
    cell.unlink()
    execute(toy, out=tmp_path / "run")


def test_a_truncated_checkpoint_is_named_with_the_remedy(
    toy: Recipe[Any], hooks: list[Any], tmp_path: Path
) -> None:
    hooks.append(_interrupt)
    with pytest.raises(Interrupted):
        execute(toy, out=tmp_path / "run")
    hooks.clear()
    (kept,) = (tmp_path / "run" / "cells").glob("*.safetensors")
    kept.write_bytes(kept.read_bytes()[:100])
    with pytest.raises(CorruptFile, match=rf"{kept.name} is truncated.*remove it"):
        execute(toy, out=tmp_path / "run")
    assert kept.stat().st_size == 100


def test_a_damaged_run_file_is_refused(toy: Recipe[Any], hooks: list[Any], tmp_path: Path) -> None:
    hooks.append(_interrupt)
    with pytest.raises(Interrupted):
        execute(toy, out=tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(CorruptFile, match=r"run.json is truncated"):
        execute(toy, out=tmp_path / "run")


def test_a_full_disk_is_told_and_earlier_cells_stay_whole(
    toy: Recipe[Any], hooks: list[Any], straight: dict[str, Any], tmp_path: Path
) -> None:
    """A limit on file size stands in for the full disk: writes fail part-way, with an error number."""
    out = tmp_path / "run"

    def fill(place: str, cell: Any) -> None:
        if place == "cell":
            resource.setrlimit(resource.RLIMIT_FSIZE, (700, before[1]))

    hooks.append(fill)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(OSError, match=r"could not write .*earlier files are whole"):
            execute(toy, seeds=2, out=out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    hooks.clear()
    assert not list(out.rglob("*.tmp"))
    assert len(list((out / "cells").glob("*.json"))) == 1
    assert execute(toy, seeds=2, out=out).result.without_times() == straight


def test_the_environment_tells_versions_and_nothing_about_who_or_where(
    toy: Recipe[Any], tmp_path: Path
) -> None:
    import getpass
    import platform

    done = execute(toy, out=tmp_path / "run", threads=1)
    told = done.result.environment
    assert told["torch"] == torch.__version__
    assert told["threads"] == 1
    assert told["device"] == "cpu"
    assert told["packages"]["numpy"]
    text = json.dumps(told) + json.dumps(done.result.config)
    assert str(Path.cwd()) not in text
    assert str(tmp_path) not in text
    assert not platform.node() or platform.node() not in text
    assert getpass.getuser() not in told.values()


def test_own_paths_do_not_stand_in_the_result(toy: Recipe[Any], tmp_path: Path) -> None:
    done = execute(toy, changed(toy.quick, {"file": tmp_path / "mine.csv"}), out=tmp_path / "run")
    assert done.result.config["file"] == "mine.csv"


def test_threads_and_generators_are_seeded_for_each_cell_alone(toy: Recipe[Any], tmp_path: Path) -> None:
    torch.manual_seed(1)
    one = execute(toy, runs=tmp_path).result.without_times()
    torch.manual_seed(2)
    assert execute(toy, runs=tmp_path).result.without_times() == one


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seeds": 0}, "seeds=0"),
        ({"threads": 0}, "threads=0"),
        ({"device": "abacus"}, "device='abacus'"),
        ({"budget": "3 apples"}, "budget='3 apples'"),
        ({"resume": True, "out": Path("x")}, "give one of them"),
    ],
)
def test_bad_arguments_are_refused_before_a_folder_is_made(
    toy: Recipe[Any], tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        execute(toy, runs=tmp_path / "runs", **arguments)
    assert not (tmp_path / "runs").exists()


def _interrupt(place: str, cell: Any) -> None:
    raise KeyboardInterrupt


def _interrupt_after_cell(place: str, cell: Any) -> None:
    if place == "cell":
        raise KeyboardInterrupt


def test_a_recipe_that_knows_one_device_refuses_others_and_auto_takes_its_own() -> None:
    assert the_device("auto", ("cpu",)).type == "cpu"
    for name in ("cuda", "meta", "abacus"):
        with pytest.raises(BadInput, match=f"device='{name}': .*use cpu or auto"):
            the_device(name, ("cpu",))
