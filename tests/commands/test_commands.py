"""The command line: every error is one clear line with the remedy, every exit code says what happened."""

from __future__ import annotations

import json
import os
import pkgutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from engine_toys import write_toy
from memspan import __version__, commands, recipes
from memspan.base.files import atomic_write
from memspan.recipes.engine import registry
from memspan.report import page
from memspan.report.schema import read_result


@pytest.fixture
def memspan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(page, "write_page", lambda result, path, *_, **__: atomic_write(path, "<html>"))

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            commands.main(arguments)
        told = capsys.readouterr()
        assert "Traceback" not in told.err
        return int(end.value.code or 0), told.out, told.err

    return call


@pytest.fixture
def toy(tmp_path: Path) -> str:
    return str(write_toy(tmp_path))


@pytest.fixture
def one_system(toy: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """As if the toy were the only recipe that is installed."""
    import dataclasses

    recipe = dataclasses.replace(registry.find(toy), in_tour=True)
    monkeypatch.setattr(registry, "all_recipes", lambda: ([recipe], {}))
    monkeypatch.setattr(recipes, "names", lambda: ["toy"])
    return recipe


def test_run_shows_the_result_and_where_it_lies(memspan: Any, toy: str, tmp_path: Path) -> None:
    code, out, err = memspan("run", toy)
    assert code == 0
    assert "✓ it works" in out
    result = Path(out.strip().splitlines()[-1].split()[-1])
    assert read_result(result).recipe == "toy"
    assert "[1/2] ours · seed 0" in err, "plain lines where there is no terminal"
    code, out, err = memspan("run", toy, "--quiet")
    assert (code, err) == (0, "")
    assert len(out.splitlines()) == 1


def test_help_of_a_recipe_tells_units_and_defaults(memspan: Any, toy: str) -> None:
    code, out, _ = memspan("run", toy, "--help")
    assert code == 0
    words = " ".join(out.split())
    assert "--epochs N Passes (epochs). [quick 2; full 3]" in words
    assert "--sizes A,B,... Budgets (bytes). [1KiB]" in words
    assert "--kind plain|other" in words
    assert "--fast / --no-fast" in words


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rn"], "did you mean run?"),
        (["run", "mem"], "did you mean memo"),
        (["run", "TOY", "--epoch", "3"], "--epochs"),
        (["run", "TOY", "--epochs", "0"], "'0': give a whole number, 1 or more (epochs)"),
        (["run", "TOY", "--epochs", "many"], "whole number"),
        (["run", "TOY", "--rate", "nan"], "a number from 0 to 4"),
        (["run", "TOY", "--kind", "third"], "use plain or other"),
        (["run", "TOY", "--sizes", "1KiB,2XB"], "KiB, MiB, GiB"),
        (["run", "TOY", "--budget", "lots"], "budget='lots'"),
        (["run", "TOY", "--device", "abacus"], "device='abacus'"),
        (["run", "TOY", "--seeds", "0"], "--seeds"),
        (["run", "TOY", "--resume"], "no unfinished run"),
        (["show", "nothing"], "what='nothing'"),
        (["compare", "one"], "two results or more"),
        (["plan", "model.py:make"], "there is no file model.py"),
        (["plan", "model.py:make", "--budget", "8 XB"], "KiB, MiB, GiB"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_usage_is_told_with_the_remedy_and_exits_with_2(
    memspan: Any, toy: str, tmp_path: Path, arguments: list[str], message: str
) -> None:
    code, _, err = memspan(*(toy if item == "TOY" else item for item in arguments))
    assert code == 2
    assert message in " ".join(err.split())
    assert not (tmp_path / "runs").exists()


def test_a_finished_out_is_refused_with_one_line(memspan: Any, toy: str) -> None:
    assert memspan("run", toy, "--out", "here")[0] == 0
    code, _, err = memspan("run", toy, "--out", "here")
    assert code == 1
    assert len(err.splitlines()) == 1
    assert "finished result" in err


def test_check_exits_with_1_on_an_unexpected_failure_of_a_claim(memspan: Any, toy: str) -> None:
    assert memspan("run", toy, "--check")[0] == 0
    assert memspan("run", toy, "--kind", "other")[0] == 0, "a sound run exits with 0 whatever the claims say"
    code, _, err = memspan("run", toy, "--kind", "other", "--check")
    assert code == 1
    assert "it works" in err


def test_interrupted_it_says_how_to_go_on_and_exits_with_130(memspan: Any, toy: str) -> None:
    path = Path(toy)
    stop = "\n\ndef _stop(place, cell):\n    raise KeyboardInterrupt\n\n\nHOOKS.append(_stop)\n"
    path.write_text(path.read_text() + stop)
    code, _, err = memspan("run", toy, "--epochs", "3")
    assert code == 130
    again = err.strip().rpartition("Continue with: memspan ")[2].split()
    assert again[:4] == ["run", toy, "--epochs", "3"]
    code, _, err = memspan(*again)
    assert code == 130, "it goes on in the same folder"
    assert err.strip().split()[-1] == again[-1]


def test_show_and_compare_read_the_latest_run(memspan: Any, toy: str, one_system: Any) -> None:
    code, _, err = memspan("show", "toy")
    assert code == 1
    assert "memspan run toy" in err
    memspan("run", toy)
    code, out, _ = memspan("show", "toy")
    assert code == 0
    assert "✓ it works" in out
    code, out, _ = memspan("compare", "toy", out.strip().split()[-1], "--page", "both.html")
    assert code == 0
    assert "run 2" in out
    assert Path("both.html").exists()


def test_ls_groups_systems_by_what_they_are_for_and_tells_the_missing_extra(
    memspan: Any, one_system: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = memspan("ls")
    assert code == 0
    assert one_system.answer in out
    assert "memspan[" not in out
    monkeypatch.setattr("memspan.recipes.engine.environment.missing_extras", lambda _: ["tuning"])
    assert "memspan[tuning]" in memspan("ls")[1], "brackets are text, not markup"
    monkeypatch.setattr("memspan.recipes.engine.environment.missing_extras", lambda _: [])
    document = json.loads(memspan("ls", "--json")[1])
    assert [(one["name"], one["missing_extras"]) for one in document] == [("toy", [])]


def test_ls_names_a_recipe_that_cannot_be_loaded(memspan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "all_recipes", lambda: ([], {"broken": "needs memspan[vision]"}))
    assert "broken: not usable here: needs memspan[vision]" in memspan("ls")[1]


def test_results_are_collated_and_checked(memspan: Any, toy: str, one_system: Any, tmp_path: Path) -> None:
    memspan("run", toy, "--out", "benchmarks/results/toy")
    Path("README.md").write_text("before\n<!-- systems -->\nold\n<!-- /systems -->\nafter\n")
    code, _, err = memspan("results", "--check")
    assert code == 1
    assert "out of date" in err
    assert memspan("results")[0] == 0
    assert memspan("results", "--check")[0] == 0
    text = Path("README.md").read_text()
    assert text.startswith("before\n<!-- systems -->\n| system |")
    assert "| toy | test the engine | one second | `memspan.base.nearest` | 1 s |" in text
    assert text.endswith("<!-- /systems -->\nafter\n")
    assert "it works" in Path("docs/RESULTS.md").read_text()


def test_the_tour_writes_one_page_and_tells_what_is_missing(
    memspan: Any, one_system: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dataclasses

    lacking = dataclasses.replace(one_system, name="second", extras=("vision",))
    monkeypatch.setattr(registry, "all_recipes", lambda: ([one_system, lacking], {}))
    monkeypatch.setattr("memspan.recipes.engine.environment.missing_extras", list)
    code, out, err = memspan("tour")
    assert code == 0
    report = Path(out.strip().split()[-1])
    assert "Toy: a recipe for tests" in report.read_text()
    assert "second: needs pip install 'memspan[vision]'" in err


def test_plan_and_fit_read_the_users_own_file(memspan: Any, tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(
        "import torch\nfrom torch import nn\n\n\ndef make():\n"
        "    batch = (torch.zeros(8, 16), torch.zeros(8, dtype=torch.long))\n"
        "    build = lambda: nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))\n"
        "    return build, batch, nn.functional.cross_entropy\n"
    )
    code, out, _ = memspan("plan", "model.py:make", "--budget", "1GiB")
    assert code == 0
    assert "budget 1 GiB: fits" in out
    assert json.loads(memspan("plan", "model.py:make", "--json")[1])["total"] > 0
    code, out, _ = memspan("fit", "model.py:make", "--budget", "64KiB", "--methods", "", "--json")
    assert code == 0
    assert json.loads(out)["best"] == "plain"
    told = memspan("fit", "model.py:make", "--budget", "64KiB", "--methods", "checkpoint,linear_probe")
    assert "checkpoint: not for this model (--why tells the reasons)" in " ".join(told[1].split())
    assert "does not apply" not in told[1]
    assert "tracing" not in told[2], "a bar is for a terminal"
    asked = ("fit", "model.py:make", "--budget", "64KiB", "--methods", "checkpoint", "--why")
    assert "checkpoint does not apply: " in memspan(*asked)[1]
    given = ("fit", "model.py:make", "--budget", "64KiB", "--methods", "", "--json")
    assert json.loads(memspan(*given, "--jobs", "2")[1]) == json.loads(out)
    code, _, err = memspan(*given, "--jobs", "0")
    assert code == 2
    assert "jobs=0: give the number of processes" in err
    small = ("fit", "model.py:make", "--methods", "linear_probe", "--budget")
    code, out, _ = memspan(*small, "2KiB")
    assert code == 0
    assert "nothing fits 2 KiB; the nearest is linear_probe, which needs" in out
    assert "does not fit" in out
    code, _, err = memspan(*small, "100B")
    assert code == 2
    assert "parameters and buffers take 1,360 bytes; a training step needs at least" in err


def test_plan_tells_one_rank_of_many_and_its_trained_parameters(memspan: Any, tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(
        "import torch\nfrom torch import nn\n\n\ndef make():\n"
        "    batch = (torch.zeros(8, 64), torch.zeros(8, dtype=torch.long))\n"
        "    return lambda: nn.Linear(64, 64), batch, nn.functional.cross_entropy\n"
    )
    one = json.loads(memspan("plan", "model.py:make", "--json")[1])
    four = json.loads(memspan("plan", "model.py:make", "--world", "4", "--json")[1])
    assert (one["world"], four["world"]) == (1, 4)
    assert four["by_category"]["parameters.trained"] < one["by_category"]["parameters.trained"] / 3
    out = memspan("plan", "model.py:make", "--world", "4")[1]
    assert "of each of 4 ranks" in out
    assert "4,160 parameters, 4,160 trained" in out


def test_fit_trains_what_fits_on_the_users_data(memspan: Any, tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(
        "import torch\nfrom torch import nn\n\n\ndef make():\n"
        "    batch = (torch.zeros(8, 3), torch.zeros(8, dtype=torch.long))\n"
        "    build = lambda: nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 2))\n"
        "    return build, batch, nn.functional.cross_entropy\n"
    )
    rows = [f"{i % 7},{i % 5},red,{'a' if i % 7 < 4 else 'b'}" for i in range(60)]
    (tmp_path / "mine.csv").write_text("one,two,colour,kind\n" + "\n".join(rows) + "\n")
    given = ("--budget", "64KiB", "--methods", "linear_probe", "--data", "mine.csv", "--steps", "5")
    code, out, err = memspan("fit", "model.py:make", *given, "--target", "kind", "--out", "trained")
    assert code == 0, err
    assert "All 2 claims hold" in out
    result = json.loads((tmp_path / "trained" / "result.json").read_text())
    by_method = {one["method"]: one for one in result["measurements"]}
    assert set(by_method) == {"untrained", "plain", "linear_probe"}
    assert by_method["plain"]["quality"]["planned"] == by_method["plain"]["quality"]["measured"]
    assert sum(by_method["plain"]["bytes"].values()) == by_method["plain"]["quality"]["measured"]
    assert (tmp_path / "trained" / "report.html").is_file()
    code, _, err = memspan("fit", "model.py:make", *given)
    assert code == 2
    assert "name the column to be predicted" in err
    code, _, err = memspan("fit", "model.py:make", *given, "--target", "kind", "--world", "2")
    assert code == 2
    assert "training runs on one rank" in err
    code, out, _ = memspan("fit", "model.py:make", "--budget", "1KiB", *given[2:], "--target", "kind")
    assert code == 1
    assert "nothing fits 1 KiB; the nearest is" in out


def test_data_lists_what_is_here(memspan: Any) -> None:
    rows = json.loads(memspan("data", "ls", "--json")[1])
    assert any(row["name"] == "digits" and row["here"] == "embedded" for row in rows)
    assert "digits" in memspan("data", "ls")[1]


def test_version_is_told(memspan: Any) -> None:
    assert __version__ in memspan("--version")[1]


def test_debug_shows_the_traceback(toy: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        commands.main(["run", "--debug", str(tmp_path / "none.py")])


def test_the_table_names_every_file_of_a_command_and_no_other() -> None:
    files = sorted(one.name for one in pkgutil.iter_modules(commands.__path__) if one.name[0] != "_")
    names = commands.cli.list_commands(click.Context(commands.cli))
    assert sorted(names) == files
    for name in names:
        found = commands.cli.get_command(click.Context(commands.cli), name)
        assert found is not None
        assert found.name == name
        assert found.help, f"{name} tells nothing in its help"


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom memspan.commands import main\n"
        "for arguments in (['--help'], ['ls', '--help'], ['run', '--help'], ['--version']):\n"
        "    try:\n        main(arguments)\n    except SystemExit as end:\n        assert not end.code\n"
        "heavy = [m for m in ('torch', 'matplotlib', 'pydantic', 'numpy') if m in sys.modules]\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_process_killed_from_outside_continues_by_the_same_command(toy: str, tmp_path: Path) -> None:
    """The signal is sent when the process itself has said that its first cell is stored."""
    command = [
        sys.executable,
        "-m",
        "memspan",
        "run",
        toy,
        "--out",
        str(tmp_path / "run"),
        "--epochs",
        "40",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        assert "[1/2]" in process.stderr.readline()
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "run" / "result.json").exists()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "kept from before" in done.stderr
    straight = registry.find(toy)
    from memspan.recipes.engine import execute
    from memspan.recipes.engine.options import changed

    expected = execute(straight, changed(straight.quick, {"epochs": 40}), out=tmp_path / "straight").result
    assert read_result(tmp_path / "run").without_times() == expected.without_times()
