"""Records are cut at line feeds and nowhere else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memspan import data
from memspan.base.lines import records

BREAKS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"


@given(
    st.lists(st.dictionaries(st.text(), st.text()), max_size=4),
    st.integers(1, 7),
    st.sampled_from(["\n", "\r\n"]),
)
def test_what_was_written_a_line_comes_back_whole_however_it_is_cut(
    rows: list[dict[str, str]], cut: int, end: str
) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + end for row in rows)
    content = text.encode("utf-8", "surrogatepass")
    assert [json.loads(line) for line in records(text)] == rows
    try:
        content.decode()
    except UnicodeDecodeError:
        return
    pieces = [content[i : i + cut] for i in range(0, len(content), cut)]
    assert [json.loads(line) for line in records(pieces)] == rows
    assert [json.loads(line) for line in records(content)] == rows


def test_a_file_of_records_keeps_texts_with_every_kind_of_break(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    texts = [f"one{mark}two" for mark in BREAKS]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    file.write_text("\n".join(lines) + "\n\n  \n", encoding="utf-8")
    assert list(data.read(file).parts["documents"]) == texts


def test_a_byte_order_mark_is_no_part_of_the_first_record() -> None:
    assert list(records(b'\xef\xbb\xbf{"a": 1}')) == ['{"a": 1}']


def test_bytes_that_are_not_utf8_are_told() -> None:
    with pytest.raises(UnicodeDecodeError):
        list(records([b'{"a": "\xff"}']))
