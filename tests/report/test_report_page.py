import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import memspan.report.draw as drawing
from memspan.base import BadInput
from memspan.report import (
    Bars,
    DataSource,
    Icicle,
    Images,
    Interval,
    Lines,
    Measurement,
    Result,
    Series,
    StackedArea,
    claim,
    compare_page,
    write_index,
    write_page,
)

HOSTILE = [
    "<script>alert(1)</script>",
    "</title></style></script><img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "' onmouseover='alert(1)",
    "javascript:alert(1)",
    "{{ 7*7 }}{% raw %}",
    "]]><!-- -->&lt;&#60;",
    "$\\frac{1}{0}$ $unclosed",
    "_leading \x00\x1b[31m\u202e\ud7ff\uffff",
    "😀 Ünïcode 漢字",
]
VOID = {"meta", "img", "rect", "path", "use", "line", "circle"}


class Seen(HTMLParser):
    """What a browser would see: elements, their attributes, the text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data) -> None:
        self.text.append(data)


def check_safe(path: Path) -> Seen:
    seen = Seen(path.read_text(encoding="utf-8"))
    tags = [tag for tag, _ in seen.elements]
    assert tags.count("script") == 1
    assert tags.count("style") == 1
    assert not {"iframe", "object", "embed", "link", "base", "form", "foreignobject"} & set(tags)
    for tag, attributes in seen.elements:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        for name in ("src", "href", "xlink:href", "action", "data"):
            value = attributes.get(name, "#")
            assert value.startswith(("#", "data:image/png;base64,")) or re.fullmatch(r"[\w./-]+", value), (
                value
            )
        assert not re.search(r"url\((?!#)", attributes.get("style", ""))
    ids = [attributes["id"] for _, attributes in seen.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    referred = re.findall(r"url\(#([^)]+)\)", path.read_text(encoding="utf-8"))
    assert set(referred) <= set(ids)
    return seen


@pytest.fixture
def figures():
    pictures = [np.full((4, 5), 200, np.uint8), np.random.default_rng(0).random((4, 5, 3))]
    return [
        Lines("Quality", "budget", "accuracy", x_scale="log", x_unit="bytes", series={
            "MEMO": Series([2**20, 2**21], [0.7, 0.8], [0.6, 0.75], [0.8, 0.85]),
            "Replay": Series([2**20], [0.75], [0.7], [0.8]),
        }),
        Bars("Bytes", "bytes", {"MEMO": {"backbone": 2**20, "exemplars": 2**19, "odd": 3}, "none": {}}),
        StackedArea("Time", range(50), {"inputs": [8] * 50, "gradients": [*range(25), *range(25)]},
                    marks=[(0, "forward"), (25, "backward")]),
        Icicle("Modules", {"blocks.0.mlp": 50, "blocks.1.mlp": 40, "head": 5, "": 3}),
        Images("Pairs", {"data": pictures}, {"data": ["a", "b"]}),
    ]  # fmt: skip


def test_a_page_says_everything_that_the_result_says(result, figures, tmp_path) -> None:
    write_page(result, tmp_path / "a.html", figures, title="A title", asked="What?", answer="This.")
    text = " ".join(check_safe(tmp_path / "a.html").text)
    for part in (
        "A title",
        "What?",
        "This.",
        "digits",
        "ab" * 32,
        "BSD-3-Clause",
        "scikit-learn",
        "equal steps",
    ):
        assert part in text
    for one in result.claims:
        assert one.text in text
        assert one.why in text
    assert "not expected to hold" in text
    assert "±" in text
    assert "1.00 MiB" in text
    assert all(figure.title in text for figure in figures)
    assert text.count("The numbers") == len(figures)


def test_a_page_asks_nothing_of_the_network(result, figures, tmp_path) -> None:
    write_page(result, tmp_path / "a.html", figures)
    seen = check_safe(tmp_path / "a.html")
    policy = next(a["content"] for t, a in seen.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert "'unsafe-inline'" not in policy.split("script-src")[1]
    rest = re.sub(r'xmlns(:\w+)?="[^"]*"', "", (tmp_path / "a.html").read_text())
    assert "http://" not in rest
    assert "https://" not in rest
    assert "@import" not in rest


def test_the_same_result_gives_the_same_page(result, figures, tmp_path) -> None:
    write_page(result, tmp_path / "a.html", figures)
    write_page(result, tmp_path / "b.html", figures)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def hostile_result(text: str) -> Result:
    safe = text or "x"
    return Result(
        recipe=safe, mode="quick", config={safe: safe, "list": [safe, {"a": safe}]},
        environment={"device": safe},
        data=[DataSource(name=safe, source=safe, sha256="0" * 64, licence=safe)], notes=[safe],
        measurements=[
            Measurement(method=safe, seed=s, setting={"data": safe + str(s)}, quality={safe: 0.5},
                        bytes={safe: 9}, seconds={safe: 1})
            for s in (0, 1)
        ],
        claims=[claim(safe, safe, Interval(-1, -2, -0.5, 3), "> 0", safe, expected=False, why=safe)],
    )  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text_everywhere(text: str, tmp_path) -> None:
    result = hostile_result(text)
    drawn = [
        Lines(text, text, text, {text: Series([1, 2], [1, 2])}, note=text),
        Bars(text, text, {text: {text: 9}}, note=text),
        StackedArea(text, [0, 1], {text: [1, 2]}, text, text, [(0, text)], text),
        Icicle(text, {text: 9, text + ".b": 4}, root=text, note=text),
        Images(text, {text: [np.zeros((2, 2))]}, {text: [text]}, note=text),
    ]
    write_page(result, tmp_path / "a.html", drawn, title=text, asked=text, answer=text)
    seen = check_safe(tmp_path / "a.html")
    shown = "".join(seen.text)
    if text.isprintable():
        assert text in shown
    write_index([result, result], tmp_path / "b.html", title=text, links={text: text}, asked={text: text})
    check_safe(tmp_path / "b.html")
    compare_page([result, result], tmp_path / "c.html", title=text)
    check_safe(tmp_path / "c.html")


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text_stays_text(text: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(drawing, "_WIDE", 300)
    result = hostile_result(text)
    write_page(result, tmp_path / "a.html", [Bars(text, "bytes", {text: {text: 9}})], title=text)
    check_safe(tmp_path / "a.html")


def test_an_index_leads_to_every_result(result, figures, tmp_path) -> None:
    other = result.model_copy(update={"recipe": "slimfit"})
    write_index(
        [result, other], tmp_path / "i.html", title="Tour", figures={"memo": figures},
        titles={"slimfit": "SlimFit!"},
        links={"memo": "memo/report.html", "slimfit": "javascript:alert(1)"},
    )  # fmt: skip
    seen = check_safe(tmp_path / "i.html")
    links = [attributes["href"] for tag, attributes in seen.elements if tag == "a"]
    ids = {attributes.get("id") for _, attributes in seen.elements}
    assert "memo/report.html" in links
    assert {link[1:] for link in links if link.startswith("#")} <= ids
    assert "SlimFit!" in "".join(seen.text)


def test_a_comparison_sets_claims_and_differences_beside_each_other(result, tmp_path) -> None:
    other = result.model_copy(update={"mode": "full", "config": {"epochs": 30}, "claims": result.claims[:1]})
    compare_page([result, other], tmp_path / "c.html")
    text = " ".join(check_safe(tmp_path / "c.html").text)
    assert "What differs" in text
    assert "A · MEMO" in text
    assert "B · MEMO" in text


def test_pages_refuse_what_they_cannot_show(result, tmp_path) -> None:
    with pytest.raises(BadInput, match="one result"):
        write_index([], tmp_path / "a.html")
    with pytest.raises(BadInput, match="two results"):
        compare_page([result], tmp_path / "a.html")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_page_shows_the_numbers_and_says_why(
    result, figures, tmp_path, monkeypatch
) -> None:
    def absent(module: str, extra: str) -> None:
        raise ImportError(f"{module} is needed here; install it with: pip install 'memspan[{extra}]'")

    monkeypatch.setattr(drawing, "optional", absent)
    write_page(result, tmp_path / "a.html", figures)
    seen = check_safe(tmp_path / "a.html")
    assert "No picture" in "".join(seen.text)
    assert "pip install" in "".join(seen.text)
    assert sum(tag == "details" and "open" in attributes for tag, attributes in seen.elements) == 4


def test_drawings_take_all_their_colours_from_the_page(figures) -> None:
    keys = drawing.slots(figures)
    for place, figure in enumerate(figures[:4]):
        drawn = drawing.draw(figure, keys, f"f{place}")
        for svg in (drawn.wide, drawn.narrow):
            colours = set(re.findall(r"(?:fill|stroke|stop-color): ?([^;\"]+)", svg))
            assert {c for c in colours if not c.startswith("var(--")} <= {"none"}
            assert not re.search(r"#[0-9a-fA-F]{6}\b", svg)
            assert "<title" in svg
            assert "<desc" in svg
            sizes = [float(n) for n in re.findall(r"font(?:-size)?: (?:bold )?([\d.]+)px", svg)]
            assert sizes
            assert min(sizes) >= 11


def test_a_name_keeps_its_colour_in_all_figures_and_no_two_lines_look_alike() -> None:
    names = [f"m{i}" for i in range(16)]
    first = Lines("a", "x", "y", {name: Series([1, 2], [1, 2]) for name in names})
    second = Lines("b", "x", "y", {name: Series([1, 2], [1, 2]) for name in reversed(names[:3])})
    keys = drawing.slots([first, second])
    assert drawing.draw(second, keys, "b").legend == tuple(keys[name] for name in reversed(names[:3]))
    looks = {(keys[name].colour, keys[name].dash, keys[name].marker) for name in names}
    assert len(looks) == 16
    assert len({(keys[n].dash, keys[n].marker) for n in names[:8]}) == 8  # also without colour


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def themes() -> list[dict[str, str]]:
    style = (Path(drawing.__file__).parent / "templates" / "style.css").read_text()
    light, dark = style.split("prefers-color-scheme: dark", 1)
    found = [dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", part)) for part in (light, dark)]
    return [found[0], {**found[0], **found[1]}]


@pytest.mark.parametrize("theme", themes(), ids=["light", "dark"])
def test_both_themes_have_enough_contrast(theme: dict[str, str]) -> None:
    for background in ("page", "surface"):
        for text in ("ink", "muted", "accent", "good", "bad", "open"):
            assert contrast(theme[text], theme[background]) >= 4.5, (text, background)
    for place in range(drawing.COLOURS):
        assert (
            contrast(theme[f"s{place}"], theme["surface"]) >= 4.5
        )  # also holds text in the surface's colour
    for state in ("good", "bad", "open"):
        assert contrast(theme[state], theme[f"{state}-bg"]) >= 4.5
    assert contrast(theme["muted"], theme["quiet-bg"]) >= 4.5


# Full deuteranopia and protanopia on linear RGB: Machado, Oliveira, Fernandes 2009, table 1, severity 1.
MACHADO = {
    "none": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
}


def oklab(colour: str, seen: np.ndarray) -> np.ndarray:
    rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = seen @ np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_lms = np.array(
        [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
         [0.0883024619, 0.2817188376, 0.6299787005]]
    )  # fmt: skip
    to_lab = np.array(
        [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
         [0.0259040371, 0.7827717662, -0.8086757660]]
    )  # fmt: skip
    return to_lab @ np.cbrt(to_lms @ np.clip(linear, 0, 1))


@pytest.mark.parametrize("theme", themes(), ids=["light", "dark"])
@pytest.mark.parametrize("sight", list(MACHADO))
def test_the_first_five_colours_differ_to_every_eye(theme: dict[str, str], sight: str) -> None:
    colours = [oklab(theme[f"s{place}"], MACHADO[sight]) for place in range(5)]
    gaps = [float(np.linalg.norm(a - b)) for i, a in enumerate(colours) for b in colours[:i]]
    assert min(gaps) > 0.04  # about twice what is just noticed
