"""One self-contained HTML file for a result: what was asked, what came out, and all that stands behind it.

The file asks the network for nothing (its content security policy forbids it), follows a light or dark
screen, reads on a phone, and escapes every text that a result carries.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any, NamedTuple

from memspan.base import refuse
from memspan.base.files import atomic_write
from memspan.report.figures import Bars, Figure, Images, Lines
from memspan.report.schema import Claim, Result
from memspan.report.summary import Group, metric_label, mode_label, sentence, summarize, tally
from memspan.report.tables import measured
from memspan.report.units import human_bytes, number

if TYPE_CHECKING:
    from jinja2 import Environment, Template

__all__ = ["Section", "compare_page", "write_document", "write_index", "write_own", "write_page"]

_MOST_BARS = 14  # bars of the automatic byte breakdown


class Section(NamedTuple):
    """A table with a heading, for pages that are not of a recipe."""

    heading: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def write_page(
    result: Result,
    path: str | os.PathLike[str],
    figures: Sequence[Figure] = (),
    title: str | None = None,
    *,
    asked: str = "",
    answer: str = "",
) -> None:
    """Write the page of one result.

    Args:
        result: what a recipe measured.
        path: the file; replaced when it exists, whole or not at all.
        figures: from the recipe; bytes held by each method are added when no figure shows them.
        title: of the page; None takes the recipe's name.
        asked: the question, one sentence.
        answer: the answer, one sentence; empty says how many claims hold.

    Example:
        >>> import tempfile, pathlib
        >>> target = pathlib.Path(tempfile.mkdtemp()) / "report.html"
        >>> write_page(Result(recipe="memo", mode="quick", config={}, environment={}, data=[],
        ...     measurements=[], claims=[], notes=["<script>alert(1)</script>"]), target, title="MEMO")
        >>> "&lt;script&gt;alert(1)" in target.read_text()
        True
    """
    chapter = _chapter(result, figures, title or result.recipe, asked, answer)
    _write(path, "page.html.j2", title=chapter["title"], chapters=[chapter], single=True)


def write_index(
    results: Sequence[Result],
    path: str | os.PathLike[str],
    *,
    title: str = "memspan report",
    titles: Mapping[str, str] | None = None,
    figures: Mapping[str, Sequence[Figure]] | None = None,
    asked: Mapping[str, str] | None = None,
    answers: Mapping[str, str] | None = None,
    links: Mapping[str, str] | None = None,
) -> None:
    """Write one page on several results: an overview, then a chapter for each.

    Args:
        results: one or more.
        path: the file; replaced when it exists.
        title: of the page.
        titles: recipe -> title of its chapter.
        figures: recipe -> its figures.
        asked: recipe -> the question.
        answers: recipe -> the answer.
        links: recipe -> relative address of its own report.

    Raises:
        BadInput: no results.
    """
    if not results:
        refuse("results", results, "give one result or more")
    chapters = [
        _chapter(
            result,
            (figures or {}).get(result.recipe, ()),
            (titles or {}).get(result.recipe, result.recipe),
            (asked or {}).get(result.recipe, ""),
            (answers or {}).get(result.recipe, ""),
            link=(links or {}).get(result.recipe, ""),
            number_=place,
        )
        for place, result in enumerate(results, start=1)
    ]
    total = tally(results)
    _write(path, "index.html.j2", title=title, chapters=chapters, tally=total, single=False)


def compare_page(
    results: Sequence[Result], path: str | os.PathLike[str], *, title: str = "Results compared"
) -> None:
    """Write one page that sets runs beside each other: claims in columns, measurements in one table.

    Args:
        results: two or more, of the same recipe or of several; runs are named by recipe, mode and place.
        path: the file; replaced when it exists.
        title: of the page.

    Raises:
        BadInput: fewer than two results.
    """
    if len(results) < 2:
        refuse("results", len(results), "give two results or more to compare")
    names = [f"{chr(64 + place) if place <= 26 else place}" for place in range(1, len(results) + 1)]
    runs = [
        {
            "name": name,
            "recipe": run.recipe,
            "mode": run.mode,
            "sentence": sentence(run),
            "facts": _facts(run),
        }
        for name, run in zip(names, results, strict=True)
    ]
    texts = list(dict.fromkeys((claim.text, claim.paper) for run in results for claim in run.claims))
    claims = []
    for text, paper in texts:
        cells = []
        for run in results:
            found = next((one for one in run.claims if (one.text, one.paper) == (text, paper)), None)
            cells.append(_claim(found) if found else None)
        claims.append({"text": text, "paper": paper, "cells": cells})
    groups = [
        group._replace(method=f"{name} · {group.method}")
        for name, run in zip(names, results, strict=True)
        for group in summarize(run)
    ]
    differing = []
    for kind in ("config", "environment"):
        for key in dict.fromkeys(key for run in results for key in getattr(run, kind)):
            values = [_text(getattr(run, kind).get(key)) for run in results]
            if len(set(values)) > 1:
                differing.append([key, *values])
    bars = _breakdown(groups)
    _write(
        path, "compare.html.j2", title=title, runs=runs, names=names, claims=claims,
        table=_measurement_table(groups), differing=differing, figures=_drawn([bars] if bars else [], "c"),
    )  # fmt: skip


def write_document(
    path: str | os.PathLike[str],
    *,
    title: str,
    lead: str = "",
    figures: Sequence[Figure] = (),
    sections: Sequence[Section] = (),
    kicker: str = "",
) -> None:
    """Write a page of figures and tables in the same dress, for what is not a recipe's result.

    Args:
        path: the file; replaced when it exists.
        title: the heading.
        lead: one or two sentences.
        figures: drawn in order.
        sections: tables in order.
        kicker: a word above the heading.
    """
    _write(
        path, "document.html.j2", title=title, lead=lead, kicker=kicker,
        figures=_drawn(figures, "d"), sections=list(sections),
    )  # fmt: skip


def write_own(path: str | os.PathLike[str], template: str, *, title: str, **context: Any) -> None:
    """Write a page of the caller's own template in the same dress.

    Args:
        path: the file; replaced when it exists.
        template: text in Jinja's language that extends ``base.html.j2``; what it shows is escaped.
        title: of the page.
        context: what the template shows.

    Example:
        >>> import tempfile, pathlib
        >>> target = pathlib.Path(tempfile.mkdtemp()) / "own.html"
        >>> template = "{% extends 'base.html.j2' %}{% block main %}{{ shown }}{% endblock %}"
        >>> write_own(target, template, title="T", shown="<3")
        >>> "&lt;3" in target.read_text()
        True
    """
    _write(path, _environment().from_string(template), title=title, **context)


# What the templates are given ------------------------------------------------------------------------------


def _chapter(
    result: Result,
    figures: Sequence[Figure],
    title: str,
    asked: str,
    answer: str,
    *,
    link: str = "",
    number_: int = 1,
) -> dict[str, Any]:
    groups = summarize(result)
    bars = (
        None if any(isinstance(one, Bars) and one.unit == "bytes" for one in figures) else _breakdown(groups)
    )
    key = f"r{number_}"
    drawn = _drawn([*figures, *([bars] if bars else [])], key)
    breakdown = drawn.pop() if bars else None
    return {
        "key": key,
        "recipe": result.recipe,
        "title": title,
        "asked": asked,
        "answer": answer or sentence(result),
        "link": link if _relative(link) else "",
        "mode": result.mode,
        "facts": _facts(result),
        "tally": tally([result]),
        "claims": [_claim(one) for one in result.claims],
        "figures": drawn,
        "breakdown": breakdown,
        "table": _measurement_table(groups),
        "every": _every_measurement(result),
        "categories": _category_table(groups),
        "data": result.data,
        "config": [(name, _text(value)) for name, value in result.config.items()],
        "environment": [(name, _text(value)) for name, value in result.environment.items()],
        "notes": result.notes,
    }


def _facts(result: Result) -> list[tuple[str, str]]:
    seeds = {one.seed for one in result.measurements}
    methods = {one.method for one in result.measurements}
    seconds = math.fsum(s for one in result.measurements for s in one.seconds.values())
    facts: list[tuple[str, str]] = [("mode", mode_label(result))]
    if methods:
        facts += [("methods", str(len(methods))), ("seeds", str(len(seeds)))]
        facts += [("measured in", _duration(seconds))] if seconds else []
    device = result.environment.get("device")
    return [*facts, ("device", _text(device))] if device else facts


def _claim(claim: Claim) -> dict[str, Any]:
    state = "later" if claim.needs else {True: "holds", False: "fails", None: "open"}[claim.holds]
    word = {
        "holds": "holds",
        "fails": "does not hold",
        "open": "not decided at this size",
        "later": f"needs {claim.needs}",
    }[state]
    tag = ""
    if not claim.expected:
        tag = "held against expectation" if claim.holds else "not expected to hold"
    return {
        "text": claim.text, "paper": claim.paper, "mark": claim.mark, "state": state, "word": word,
        "tag": tag, "expected": claim.expected, "why": claim.why,
        "measured": "" if claim.needs else measured(claim),
        "span": _span(claim),
    }  # fmt: skip


def _span(claim: Claim) -> dict[str, float] | None:
    """Places, in per cent of a small strip, of an interval, its middle and zero."""
    if claim.measured is None or claim.low is None or claim.high is None or claim.low == claim.high:
        return None
    low, high = min(claim.low, 0.0), max(claim.high, 0.0)
    if min(abs(claim.low), abs(claim.high)) > 4 * (claim.high - claim.low):
        low, high = claim.low, claim.high  # zero is far away: show the interval alone
    pad = (high - low) * 0.08
    low, high = low - pad, high + pad

    def place(value: float) -> float:
        return round(100 * (value - low) / (high - low), 2)

    zero = {"zero": place(0.0)} if low < 0 < high else {}
    return {"low": place(claim.low), "high": place(claim.high), "mid": place(claim.measured), **zero}


def _measurement_table(groups: Sequence[Group]) -> dict[str, Any] | None:
    if not groups:
        return None
    metrics = list(dict.fromkeys(name for group in groups for name in group.quality))
    settings = any(group.setting for group in groups)
    trains = any(group.trained is not None for group in groups)
    flops = any(group.flops is not None for group in groups)
    unequal = len({len(group.seeds) for group in groups}) > 1
    columns = ["method", *(["setting"] if settings else []), *(metric_label(name) for name in metrics)]
    columns += [
        *(["trained"] if trains else []),
        "bytes held",
        "seconds",
        *(["FLOPs"] if flops else []),
        *(["seeds"] if unequal else []),
    ]
    rows = []
    for group in groups:
        row: list[tuple[str, float | str]] = [(group.method, group.method)]
        if settings:
            held = group.setting
            row.append((held, held))
        for name in metrics:
            row.append((group.show(name), group.quality[name].mean if name in group.quality else ""))
        if trains:
            row.append((number(group.trained), group.trained if group.trained is not None else ""))
        row.append((human_bytes(group.total), group.total))
        row.append((number(group.seconds, 3) if group.seconds else "–", group.seconds))
        if flops:
            row.append((_count(group.flops), group.flops if group.flops is not None else ""))
        if unequal:
            row.append((str(len(group.seeds)), len(group.seeds)))
        rows.append(row)
    texts = 2 if settings else 1
    spread = any("±" in cell for row in rows for cell, _ in row)
    return {"columns": columns, "rows": rows, "texts": texts, "spread": spread}


def _every_measurement(result: Result) -> dict[str, Any]:
    columns = ("method", "seed", "setting", "quality", "bytes", "seconds")
    rows = [
        (
            one.method, str(one.seed), _pairs(one.setting, _text),
            _pairs(one.quality, number), _pairs(one.bytes, human_bytes),
            _pairs(one.seconds, lambda s: number(s, 3)),
        )
        for one in result.measurements
    ]  # fmt: skip
    return {"columns": columns, "rows": rows}


def _category_table(groups: Sequence[Group]) -> dict[str, Any] | None:
    names = list(dict.fromkeys(name for group in groups for name, count in group.bytes.items() if count))
    if not names:
        return None
    settings = any(group.setting for group in groups)
    columns = [
        "method",
        *(["setting"] if settings else []),
        *(name.replace("_", " ") for name in names),
        "total",
    ]
    rows = []
    for group in groups:
        row: list[tuple[str, float | str]] = [(group.method, group.method)]
        if settings:
            row.append((group.setting, group.setting))
        for name in names:
            count = group.bytes.get(name)
            row.append((human_bytes(count) if count else "–", count or 0))
        row.append((human_bytes(group.total), group.total))
        rows.append(row)
    return {"columns": columns, "rows": rows, "texts": 2 if settings else 1, "spread": False}


def _breakdown(groups: Sequence[Group]) -> Bars | None:
    """Bytes held by each method, from the measurements; of the last setting where there are too many."""
    held = [group for group in groups if group.total > 0]
    note = ""
    if len(held) > _MOST_BARS:
        last = held[-1].setting
        held = [group for group in held if group.setting == last][:_MOST_BARS]
        note = f"Shown for {last}; the table of bytes has every setting." if last else ""
    settings = {group.setting for group in held}
    rows = {}
    for group in held:
        label = (
            group.method if len(settings) == 1 or not group.setting else f"{group.method} · {group.setting}"
        )
        rows[label] = {name: count for name, count in group.bytes.items() if count}
    return Bars("Bytes held, by what they are spent on", "bytes", rows, note=note) if rows else None


def _drawn(figures: Sequence[Figure], key: str) -> list[dict[str, Any]]:
    from memspan.report.draw import draw, slots

    names = slots(figures)
    result = []
    for place, figure in enumerate(figures, start=1):
        name = f"{key}-f{place}"
        table = figure.table()
        result.append(
            {
                "key": name, "title": figure.title, "note": figure.note, "table": table,
                "numeric": [_numeric(table.rows, column) for column in range(len(table.columns))],
                "images": figure.encoded() if isinstance(figure, Images) else None,
                "drawing": None if isinstance(figure, Images) else draw(figure, names, name),
                "y_label": figure.y_label if isinstance(figure, Lines) else "",
            }
        )  # fmt: skip
    return result


def _numeric(rows: Sequence[Sequence[str]], column: int) -> bool:
    cells = [row[column] for row in rows if row[column] not in ("", "–")]
    return bool(cells) and all(cell[:1].isdigit() or cell[:2].lstrip("-")[:1].isdigit() for cell in cells)


def _pairs(values: Mapping[str, Any], show: Callable[[Any], str]) -> str:
    return ", ".join(f"{metric_label(name)} {show(value)}" for name, value in values.items()) or "–"


def _text(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value, 6)
    if isinstance(value, str | int):
        return str(value)
    if isinstance(value, list | tuple) and all(isinstance(one, str | int | float) for one in value):
        return ", ".join(_text(one) for one in value)
    return json.dumps(value, ensure_ascii=False, default=str)


def _count(value: float | None) -> str:
    if value is None:
        return "–"
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return number(value)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 1 else f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _relative(link: str) -> bool:
    """Whether an address stays beside the page: no scheme, no host, no query."""
    return re.fullmatch(r"[\w.-][\w./-]*", link) is not None


# Templates -------------------------------------------------------------------------------------------------


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup

    folder = files("memspan.report") / "templates"

    def load(name: str) -> str:
        return (folder / name).read_text(encoding="utf-8")

    environment = Environment(
        loader=FunctionLoader(load),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["drawing"] = Markup  # SVG that report.draw serialised; its texts are escaped there
    return environment


@cache
def _asset(name: str) -> str:
    return (files("memspan.report") / "templates" / name).read_text(encoding="utf-8").strip()


def _write(path: str | os.PathLike[str], template: str | Template, **context: Any) -> None:
    from markupsafe import Markup

    style, script = _asset("style.css"), _asset("sort.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    # Two files of this package and the drawings are all that passes unescaped.
    own = {"style": Markup(style), "script": Markup(script)}  # noqa: S704
    text = _environment().get_or_select_template(template).render(policy=policy, **own, **context)
    atomic_write(path, text)
