import contextlib
import io
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from memspan.base.files import CorruptFile
from memspan.data.formats import (
    decode_jpeg,
    decode_mulaw,
    parse_idx,
    read_content,
    read_delimited,
    read_npz,
    split_jpegs,
)
from memspan.data.tables import read_chunks

CODES = {"uint8": 8, "int8": 9, "int16": 11, "int32": 12, "float32": 13, "float64": 14}
ARRAYS = st.sampled_from(sorted(CODES)).flatmap(
    lambda name: hnp.arrays(name, hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=5))
)
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\r\0\ufeff"), max_size=8)


def idx_bytes(array):
    header = struct.pack(">HBB", 0, CODES[array.dtype.name], array.ndim)
    return (
        header
        + struct.pack(f">{array.ndim}I", *array.shape)
        + array.astype(array.dtype.newbyteorder(">")).tobytes()
    )


@given(ARRAYS)
def test_any_idx_array_is_read_back_bit_for_bit(array):
    found = parse_idx(idx_bytes(array))
    assert found.dtype == array.dtype
    assert found.shape == array.shape
    assert found.tobytes() == array.tobytes()


@given(ARRAYS, st.data())
def test_an_idx_file_of_any_other_length_is_refused(array, data):
    content = idx_bytes(array)
    cut = data.draw(st.integers(0, len(content) - 1))
    with pytest.raises(CorruptFile):
        parse_idx(content[:cut], "train-images")
    with pytest.raises(CorruptFile, match="train-images"):
        parse_idx(content + b"x", "train-images")


@given(st.binary(max_size=64))
def test_random_bytes_never_crash_the_idx_parser(content):
    with contextlib.suppress(CorruptFile):
        parse_idx(content)


def test_a_header_that_asks_for_all_memory_is_refused():
    with pytest.raises(CorruptFile):
        parse_idx(struct.pack(">HBB4I", 0, 14, 4, *[2**32 - 1] * 4))


@given(
    st.lists(
        st.tuples(st.integers(-(2**62), 2**62), st.floats(allow_nan=False), TEXT), min_size=1, max_size=20
    ),
    st.integers(1, 7),
)
def test_tables_are_read_back_whole_and_in_chunks(tmp_path_factory, rows, size):
    import csv

    path = tmp_path_factory.mktemp("csv") / "a.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_NONNUMERIC)
        writer.writerow(["i", "f", "s"])
        writer.writerows([i, repr(f), s] for i, f, s in rows)
    types = {"i": int, "f": float, "s": str}
    whole = read_delimited(path, types)
    assert list(zip(whole["i"].tolist(), whole["f"].tolist(), whole["s"].tolist(), strict=True)) == rows
    chunks = list(read_chunks(path, types, rows=size))
    assert [len(chunk["i"]) for chunk in chunks[:-1]] == [size] * (len(chunks) - 1)
    for name in types:
        assert np.concatenate([chunk[name] for chunk in chunks]).tolist() == whole[name].tolist()


def test_quoted_line_breaks_belong_to_the_value(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'a,b\r\n"one\ntwo",3\r\n')
    columns = read_delimited(tmp_path / "a.csv")
    assert columns["a"].tolist() == ["one\ntwo"]
    assert columns["b"].tolist() == [3]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"a,b\n1,2\n3\n", "row 2 has 1 values, the header 2"),
        (b"a,a\n1,2\n", "twice"),
        (b"", "empty"),
        (b"a,b\n\xff\xfe,2\n", "decode"),
        (b'a,b\n"open,2\n', "unexpected end"),
    ],
)
def test_a_damaged_table_is_refused_with_its_name_and_reason(tmp_path, content, says):
    (tmp_path / "mine.csv").write_bytes(content)
    with pytest.raises(CorruptFile, match=says) as error:
        read_delimited(tmp_path / "mine.csv")
    assert "mine.csv" in str(error.value)


def test_a_column_that_is_missing_or_of_another_type_is_named(tmp_path):
    (tmp_path / "a.csv").write_text("x,y\n1,red\n")
    with pytest.raises(CorruptFile, match="column z is missing"):
        read_delimited(tmp_path / "a.csv", {"z": int})
    with pytest.raises(CorruptFile, match="column y"):
        read_delimited(tmp_path / "a.csv", {"y": float})


def test_npz_files_are_never_unpickled(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.array([{}], dtype=object))
    with pytest.raises(CorruptFile, match=r"a\.npz"):
        read_npz(tmp_path / "a.npz", ["x"])


def test_a_missing_array_is_named_with_those_that_are_there(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.ones(1))
    with pytest.raises(CorruptFile, match=r"lacks y.*it holds x"):
        read_npz(tmp_path / "a.npz", ["x", "y"])


@given(st.data())
def test_a_truncated_npz_file_is_refused(tmp_path_factory, data):
    buffer = io.BytesIO()
    np.savez_compressed(buffer, x=np.arange(100), y=np.ones(5))
    content = buffer.getvalue()
    path = tmp_path_factory.mktemp("npz") / "a.npz"
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(CorruptFile):
        read_npz(path, ["x", "y"])


@pytest.mark.parametrize("ending", ["gz", "xz"])
def test_a_truncated_packed_file_is_refused(tmp_path, ending):
    import gzip
    import lzma

    packed = {"gz": gzip.compress, "xz": lzma.compress}[ending](b"text" * 1000)
    path = tmp_path / f"a.txt.{ending}"
    path.write_bytes(packed)
    assert read_content(path) == b"text" * 1000
    path.write_bytes(packed[:-5])
    with pytest.raises(CorruptFile, match="truncated"):
        read_content(path)


def test_jpeg_images_are_cut_apart_and_decoded():
    image = pytest.importorskip("PIL.Image")
    files = []
    for shade in (0, 128, 255):
        buffer = io.BytesIO()
        image.new("RGB", (4, 3), (shade,) * 3).save(buffer, "JPEG")
        files.append(buffer.getvalue())
    packed = np.frombuffer(b"".join(files), np.uint8)
    offset = np.cumsum([0, *map(len, files)])
    assert split_jpegs(packed, offset, "set") == tuple(files)
    assert decode_jpeg(files)[:, 0, 0, 0].tolist() == [0, 128, 255]
    assert decode_jpeg(files).shape == (3, 3, 4, 3)
    with pytest.raises(CorruptFile, match="offsets"):
        split_jpegs(packed, offset[:-1], "set")
    with pytest.raises(CorruptFile, match="set, image 1"):
        decode_jpeg([files[0], files[1][: len(files[1]) // 3]], "set")


@given(hnp.arrays(np.uint8, 10))
def test_mulaw_is_odd_and_monotone(values):
    decoded = decode_mulaw(values)
    assert np.allclose(decoded, -decode_mulaw(255 - values))
    assert (np.diff(decode_mulaw(np.sort(values))) >= 0).all()
