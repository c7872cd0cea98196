import io
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from rich.console import Console

from memspan.base import BadInput
from memspan.base.files import CorruptFile
from memspan.ledger.snapshot import Holding, Point, Snapshot, Timeline
from memspan.report import (
    Bars,
    Icicle,
    Images,
    Lines,
    Series,
    StackedArea,
    collate,
    memory_figure,
    memory_page,
    print_comparison,
    print_result,
    write_result,
)
from memspan.report.figures import png
from memspan.report.memory import _thinned
from memspan.report.summary import summarize
from memspan.report.units import human_bytes

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 9))


@settings(deadline=None)
@given(SHAPES.flatmap(lambda s: arrays.arrays(np.uint8, st.sampled_from([s, (*s, 3)]))))
def test_png_round_trips_through_pillow(picture: np.ndarray) -> None:
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png(picture)))), picture)


def test_float_pictures_are_clipped_to_their_range() -> None:
    picture = np.array([[-1.0, 0.5, 2.0, math.nan]])
    assert np.asarray(Image.open(io.BytesIO(png(picture)))).tolist() == [[0, 128, 255, 0]]


@settings(deadline=None)
@given(st.integers(0, 2**60))
def test_human_bytes_keep_three_digits(count: int) -> None:
    text, unit = human_bytes(count).split()
    size = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}[unit]
    assert float(text.replace(",", "")) * size == pytest.approx(count, rel=0.0051)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Series([1], [1, 2]), "y="),
        (lambda: Series([], []), "at least one"),
        (lambda: Series([1], [math.nan]), "finite"),
        (lambda: Series([1], [1], low=[0]), "both ends"),
        (lambda: Lines("t", "x", "y", {}), "one curve"),
        (lambda: Lines("t", "x", "y", {"a": Series([0], [1])}, "log"), "above 0"),
        (lambda: Bars("t", "bytes", {"a": {"b": -1}}), "0 or more"),
        (lambda: StackedArea("t", [0, 1], {"a": [1]}), "2 finite values"),
        (lambda: Icicle("t", {}), "at least one"),
        (lambda: Images("t", {"a": []}), "one picture"),
        (lambda: Images("t", {"a": [np.zeros((2, 2))]}, {"a": ["x", "y"]}), "captions"),
        (lambda: png(np.zeros((2, 2, 4))), "H, W"),
        (lambda: memory_figure(3), "Ledger"),
    ],
)
def test_bad_figures_are_refused(call, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        call()


@settings(deadline=None)
@given(st.dictionaries(st.text("ab.", min_size=1, max_size=6), st.integers(0, 99), min_size=1, max_size=12))
def test_parts_of_an_icicle_never_exceed_their_parent(parts: dict[str, int]) -> None:
    figure = Icicle("t", parts)

    def check(prefix: str, held: float, depth: int) -> None:
        children = figure.children(prefix)
        assert sum(value for _, value in children) <= held
        for name, value in children:
            if name and depth:
                check(name, value, depth - 1)

    check("", figure.total, 4)
    assert sum(value for _, value in figure.children("")) == figure.total


def peak() -> Snapshot:
    blocks = [
        Holding(4096, "parameters.trained", "net.blocks.0", "", "existing", (32, 32), "float32"),
        Holding(8192, "saved_activations", "net.blocks.1", "forward:net", "aten.gelu", (64, 32), "float32"),
        Holding(100, "inputs"),
    ]
    return Snapshot.of(blocks, phase="backward:net.blocks.1", allocator=12500)


def test_a_snapshot_becomes_figures_whose_sums_are_its_own() -> None:
    bars, icicle = memory_figure(peak())
    assert isinstance(bars, Bars)
    assert isinstance(icicle, Icicle)
    assert sum(next(iter(bars.rows.values())).values()) == 12500
    assert icicle.total == 4096 + 8192 + 100


@settings(deadline=None)
@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=3000))
def test_thinning_a_timeline_never_loses_its_peak(totals: list[int]) -> None:
    points = [Point(i, total, {"inputs": total}, "forward") for i, total in enumerate(totals)]
    kept = _thinned(points)
    assert max(p.total for p in kept) == max(totals)
    assert len(kept) <= 600
    assert [p.event for p in kept] == sorted(p.event for p in kept)


def test_a_ledger_becomes_a_page_with_its_timeline(tmp_path) -> None:
    class Led:
        def __init__(self) -> None:
            self.peak = peak()

        def timeline(self) -> Timeline:
            rising = [
                Point(i, i * 10, {"inputs": i * 10}, "forward:net" if i < 5 else "backward") for i in range(9)
            ]
            return Timeline(tuple(rising))

    assert [type(one).__name__ for one in memory_figure(Led())] == ["StackedArea", "Bars", "Icicle"]
    memory_page(Led(), tmp_path / "peak.html")
    text = (tmp_path / "peak.html").read_text()
    for part in ("12.2 KiB", "saved activations", "net.blocks.1", "Against the allocator", "aten.gelu"):
        assert part in text


def terminal(width: int, colour: bool = False) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, width=width, force_terminal=colour), out


@pytest.mark.parametrize("width", [60, 80, 120])
def test_tables_fit_the_terminal_and_show_marks(result, width: int) -> None:
    console, out = terminal(width)
    print_result(result, console)
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert "\x1b" not in text
    for part in (
        "✓ MEMO is ahead",
        "✗ MEMO is far ahead",
        "? the order flips",
        "not expected",
        "1.00 MiB",
        "±",
    ):
        assert part in text


def test_a_comparison_names_each_run(result) -> None:
    console, out = terminal(100)
    print_comparison([result, result.model_copy(update={"mode": "full"})], console)
    assert "MEMO · run 1" in out.getvalue()
    assert "run 2 (full)" in out.getvalue()
    print_comparison([], console)


def test_a_result_cannot_steer_the_terminal(result) -> None:
    console, out = terminal(80, colour=False)
    bad = "[bold]x[/nope] \x1b[2J\x07 [link=http://a]y"
    claims = [result.claims[0].model_copy(update={"text": bad, "why": bad})]
    rows = [one.model_copy(update={"method": bad, "quality": {bad: 1.0}}) for one in result.measurements]
    update = {"recipe": bad, "notes": [bad], "claims": claims, "measurements": rows}
    print_result(result.model_copy(update=update), console)
    assert "\x1b" not in out.getvalue()
    assert "\x07" not in out.getvalue()
    assert "[bold]x[/nope]" in out.getvalue()


def test_a_summary_has_means_over_seeds_and_only_settings_that_differ(result) -> None:
    groups = summarize(result)
    assert [(one.method, one.setting) for one in groups] == [
        ("MEMO", "1.00 MiB"), ("MEMO", "2.00 MiB"), ("Replay", "1.00 MiB"), ("Replay", "2.00 MiB"),
    ]  # fmt: skip
    mine = [m.quality["average_accuracy"] for m in result.measurements[:3]]
    assert groups[0].quality["average_accuracy"].mean == pytest.approx(np.mean(mine))
    assert groups[0].total == 2**20


def test_collated_results_come_from_the_files(result, tmp_path) -> None:
    write_result(tmp_path / "in" / "memo.json", result)
    write_result(tmp_path / "in" / "full" / "memo.json", result.model_copy(update={"mode": "full"}))
    (tmp_path / "in" / "speed.json").write_text(json.dumps({"ratio": 2}))
    text = collate(tmp_path / "in", tmp_path / "RESULTS.md")
    assert (tmp_path / "RESULTS.md").read_text() == text == collate(tmp_path / "in")
    assert text.index("## memo (full)") < text.index("## memo (quick)")
    assert "| ✓ | MEMO is ahead | **3 points (1 to 5)** |" in text
    assert "- MEMO is ahead (A paper, 2023)." in text[text.index("<details") :], "reasons are folded"
    assert "| MEMO | 1.00 MiB | " in text
    assert "speed" not in text


def test_markdown_in_results_stays_text(result, tmp_path) -> None:
    rows = [one.model_copy(update={"method": "a|b<img>`*"}) for one in result.measurements]
    write_result(tmp_path / "a.json", result.model_copy(update={"measurements": rows}))
    assert "a&#124;b&lt;img&gt;&#96;\\*" in collate(tmp_path)


def test_a_damaged_result_is_named_not_skipped(result, tmp_path) -> None:
    write_result(tmp_path / "a.json", result)
    (tmp_path / "a.json").write_text((tmp_path / "a.json").read_text()[:-20])
    with pytest.raises(CorruptFile, match=r"a\.json"):
        collate(tmp_path)
    with pytest.raises(BadInput, match="folder"):
        collate(tmp_path / "absent")
