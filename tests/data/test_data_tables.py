"""Tables in chunks: polars and the csv module give the same values and refuse the same files."""

from __future__ import annotations

import gzip

import numpy as np
import pytest

from memspan.base.files import CorruptFile
from memspan.data import read_chunks, tables

pytest.importorskip("polars")


@pytest.fixture(params=["polars", "csv"])
def reader(request, monkeypatch):
    if request.param == "csv":

        def absent(module, extra):
            raise ImportError(module)

        monkeypatch.setattr(tables, "optional", absent)
    return request.param


def read(path, *args, **options):
    chunks = list(read_chunks(path, *args, **options))
    return {name: np.concatenate([chunk[name] for chunk in chunks]).tolist() for name in chunks[0]}


def test_types_hold_for_the_whole_file_and_blank_lines_are_no_rows(tmp_path, reader):
    (tmp_path / "a.csv").write_text("i,f,s\n1,1,1\n\n2,2.5,x\n3,-inf,\n\n")
    found = read(tmp_path / "a.csv", rows=1)
    assert found == {"i": [1, 2, 3], "f": [1.0, 2.5, -np.inf], "s": ["1", "x", ""]}
    assert isinstance(found["i"][0], int)
    assert read(tmp_path / "a.csv", ["f"], rows=2) == {"f": found["f"]}


def test_a_file_without_header_is_named_and_unpacked(tmp_path, reader):
    with gzip.open(tmp_path / "a.txt.gz", "wt") as file:
        file.write("# of 3\n1 2 3\n4 5 6\n")
    found = read(tmp_path / "a.txt.gz", {"c": int, "a": float}, delimiter=" ", names=("a", "b", "c"), skip=1)
    assert found == {"c": [3, 6], "a": [1.0, 4.0]}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("a,b\n1,x\n2\n", "row 3 has 1 values, the header 2"),
        ("a,b\n1,x,y\n", ""),
        ("a,b\n1,x\n,y\n", "column a"),
        ("a,b\nthree,x\n", "three"),
        ("a,b\n1.5,x\n", r"1\.5"),
        ("a,b\n99999999999999999999,x\n", ""),
        ('a,b\n1,"open\n', ""),
        ("a,a\n1,2\n", "twice"),
    ],
)
def test_a_damaged_table_is_refused_whoever_reads_it(tmp_path, reader, content, says):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(CorruptFile, match=rf"a\.csv.*{says}"):
        list(read_chunks(tmp_path / "a.csv", {"a": int} if "a,a" not in content else None, rows=1))


def test_text_that_is_not_utf_8_is_refused(tmp_path, reader):
    (tmp_path / "a.csv").write_bytes(b"a,b\n1,\xff\xfe\n")
    with pytest.raises(CorruptFile, match="utf-8"):
        list(read_chunks(tmp_path / "a.csv"))


def test_missing_values_of_parquet_are_nan_or_empty_and_never_an_integer(tmp_path):
    import polars

    frame = polars.DataFrame({"i": [1, None], "f": [None, 0.5], "s": ["x", None], "u": [1, 2**40]})
    frame.write_parquet(tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet", ["f", "s", "u"])
    assert np.isnan(found["f"][0])
    assert (found["f"][1], found["s"], found["u"]) == (0.5, ["x", ""], [1, 2**40])
    with pytest.raises(CorruptFile, match=r"column i.*columns=\{'i': float\}"):
        read(tmp_path / "a.parquet", ["i"])
    assert read(tmp_path / "a.parquet", {"i": float})["i"][0] == 1.0
