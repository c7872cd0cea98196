"""The recipes of recall: their smallest runs, what a run with a model would cost, and a real endpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from memspan.cli import cli
from memspan.recipes import memorybank, scm, tim
from memspan.recipes.engine import execute
from recall.scripted_server import ScriptedServer


@pytest.mark.parametrize("recipe", [memorybank.RECIPE, tim.RECIPE, scm.RECIPE], ids=lambda one: one.name)
def test_the_smallest_run_measures_and_judges(recipe, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    done = execute(recipe, recipe.tiny, out=tmp_path / "run")
    assert {one.method for one in done.result.measurements} >= {recipe.control}
    assert done.result.claims
    assert all(one.bytes for one in done.result.measurements)


def test_a_dry_run_tells_calls_and_tokens_and_makes_none(tmp_path: Path) -> None:
    with ScriptedServer("a park") as server:
        given = ["--conversations", "generated", "--embedder", "hashing", "--compare", "fts"]
        given += ["--simulated-users", "2", "--endpoint", server.url, "--model", "scripted"]
        told = CliRunner().invoke(cli, ["run", "memorybank", *given, "--dry-run"])
        assert told.exit_code == 0, told.output
        assert len(server) == 0
        last = told.output.splitlines()[-1]
        assert last.startswith("in all: ")
        said = [int(word.replace(",", "")) for word in last.split() if word.replace(",", "").isdigit()]
        calls, sent, _ = said
        out = ["--out", str(tmp_path / "run"), "--quiet"]
        done = CliRunner().invoke(cli, ["run", "memorybank", *given, *out])
        assert done.exit_code == 0, done.output
        assert len(server) == calls
        real = sum(len(prompt) for prompt in server.prompts()) / 3  # the cautious counter's letters a token
        assert 0.5 * real < sent < 2 * real
    free = CliRunner().invoke(cli, ["run", "memorybank", "--conversations", "generated", "--dry-run"])
    assert free.output == "a run with these options calls no language model\n"
