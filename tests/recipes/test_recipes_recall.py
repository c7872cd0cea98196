"""What a recipe of recall would ask of a language model, told before anything is asked."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner

from memspan.commands import cli
from memspan.recipes.scm import measure as scm
from memspan.recipes.tracks.retrieval import FTS5
from recall.scripted_server import ScriptedServer


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


def test_chinese_dialogues_are_searched_and_cut_by_signs() -> None:
    index = FTS5(["我喜欢喝茶", "他去了公园", "I like tea"])
    assert index.rank("你喜欢什么茶？") == [0]
    assert index.rank("tea") == [2]
    assert scm.words_of("我喜欢 green tea") == {"我喜", "喜欢", "green", "tea"}
    assert scm.tokens("我喜欢茶 two words") == 4 + 3
    assert scm._begin("我喜欢喝茶" * 20, 11) == ("我喜欢喝茶" * 20)[:11]
    assert scm._begin("one two three four", 4) == "one two three"
