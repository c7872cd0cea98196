"""Committed results collated into one Markdown document: figures come from validated files, none is typed."""

from __future__ import annotations

import os
from pathlib import Path

from memspan.base import refuse
from memspan.base.files import atomic_write
from memspan.report.schema import Claim, Result, read_result
from memspan.report.summary import metric_label, mode_label, sentence, summarize, tally
from memspan.report.tables import measured
from memspan.report.units import human_bytes, number

__all__ = ["collate"]

_HEAD = """# Results

Made by `memspan results` from the result files in `{folder}`; do not edit. ✓ holds, ✗ does not, ? not
decided at this size, – needs a larger run. ± is half of the 95 % interval over seeds. A claim marked
*not expected* was published, and is known not to survive an honest protocol at this size; the reason stands
beside it.
"""


def collate(folder: str | os.PathLike[str], target: str | os.PathLike[str] | None = None) -> str:
    """Collate ``folder/**/*.json`` (results of schema 1) into a Markdown document.

    Args:
        folder: where the result files are; benchmarks' files of another shape are left out.
        target: the document to write; None writes nothing (to check that a committed one is current).

    Returns:
        The document.

    Raises:
        BadInput: no such folder.
        CorruptFile: a file says ``"schema"`` and ``"recipe"`` but does not validate.

    Example:
        >>> import tempfile
        >>> collate(tempfile.mkdtemp()).startswith("# Results")
        True
    """
    folder = Path(folder)
    if not folder.is_dir():
        refuse("folder", str(folder), "give the folder of the result files")
    results = [(path, read_result(path)) for path in sorted(folder.rglob("*.json")) if _is_result(path)]
    results.sort(key=lambda item: (item[1].recipe, item[1].mode != "full", item[0].as_posix()))
    lines = [_HEAD.format(folder=folder.name)]
    if results:
        lines += [
            "| recipe | mode | device | ✓ | ✗ | ✗ expected | ? | – | file |",
            "|---|---|---|--:|--:|--:|--:|--:|---|",
        ]
        for path, result in results:
            n = tally([result])
            name, file = _cell(result.recipe), _cell(path.relative_to(folder).as_posix())
            counts = " | ".join(str(n[kind]) for kind in ("holds", "fails", "known", "open", "later"))
            link = f"[{name}](#{_anchor(result)})"
            lines.append(f"| {link} | {result.mode} | {_device(result)} | {counts} | {file} |")
        lines.append("")
    else:
        lines.append("No result has been committed yet.\n")
    for _, result in results:
        lines += _chapter(result)
    text = "\n".join(lines).rstrip() + "\n"
    if target is not None:
        atomic_write(target, text)
    return text


def _is_result(path: Path) -> bool:
    head = path.read_text(encoding="utf-8", errors="replace")
    return '"recipe"' in head and '"measurements"' in head and '"claims"' in head


def _chapter(result: Result) -> list[str]:
    lines = [f"## {_cell(result.recipe)} ({result.mode})", "", _cell(sentence(result)), ""]
    if result.changed:
        lines += [f"Run as {_cell(mode_label(result))}.", ""]
    if result.claims:
        lines += ["| | claim | measured |", "|---|---|---|", *map(_claim, result.claims), ""]
    lines += ['<details markdown="1">', "<summary>Reasons, measurements, data</summary>", ""]
    lines += map(_reason, result.claims)
    if result.claims:
        lines.append("")
    groups = summarize(result)
    if groups:
        metrics = list(dict.fromkeys(name for group in groups for name in group.quality))
        settings = any(group.setting for group in groups)
        trains = any(group.trained is not None for group in groups)
        flops = any(group.flops is not None for group in groups)
        heads = ["method", *(["setting"] if settings else []), *map(metric_label, metrics)]
        heads += [*(["trained"] if trains else []), "bytes held"]
        heads += ["seconds", *(["FLOPs"] if flops else []), "seeds"]
        texts = 2 if settings else 1
        lines.append("| " + " | ".join(map(_cell, heads)) + " |")
        lines.append("|" + "---|" * texts + "--:|" * (len(heads) - texts))
        for group in groups:
            cells = [
                group.method,
                *([group.setting] if settings else []),
                *(group.show(name) for name in metrics),
            ]
            cells += [number(group.trained)] if trains else []
            cells += [human_bytes(group.total), number(group.seconds, 3) if group.seconds else "–"]
            cells += [number(group.flops, 3)] if flops else []
            cells.append(str(len(group.seeds)))
            lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
        lines.append("")
    for source in result.data:
        licence = f", {_cell(source.licence)}" if source.licence else ""
        lines.append(
            f"Data: {_cell(source.name)}{licence}; {_cell(source.source)}; SHA-256 `{source.sha256[:16]}…`.  "
        )
    if result.data:
        lines.append("")
    for note in result.notes:
        lines.append(f"- {_cell(note)}")
    if result.notes:
        lines.append("")
    return [*lines, "</details>", ""]


def _claim(claim: Claim) -> str:
    value = f"**{_cell(measured(claim))}**" if claim.measured is not None else ""
    tag = "" if claim.expected else " *(not expected)*"
    return f"| {claim.mark} | {_cell(claim.text)}{tag} | {value} |"


def _reason(claim: Claim) -> str:
    """Why a claim stands as it stands, and whose it is."""
    needs = f" Needs {_cell(claim.needs)}." if claim.needs else ""
    why = f" {_cell(claim.why)}" if claim.why else ""
    return f"- {_cell(claim.text)} ({_cell(claim.paper)}).{needs}{why}"


def _device(result: Result) -> str:
    return _cell(str(result.environment.get("device", "–")))


def _anchor(result: Result) -> str:
    kept = "".join(char for char in result.recipe.lower() if char.isalnum() or char in "-_")
    return f"{kept}-{result.mode}"


def _cell(text: str) -> str:
    """Text that stays text inside a Markdown table: no markup, no cell or line breaks."""
    text = " ".join(text.split())
    for char, safe in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "&#124;"), ("`", "&#96;")):
        text = text.replace(char, safe)
    for char in "[]*_":
        text = text.replace(char, "\\" + char)
    return text
