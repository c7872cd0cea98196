"""Decoding of the formats that the catalogue's sets come in: npz, idx, JPEG, delimited text, mu-law sound.

Each reader refuses a truncated or altered file with :class:`~memspan.base.files.CorruptFile`, which names
the file and what to do. Nothing here can run code that a file holds.
"""

from __future__ import annotations

import bz2
import contextlib
import csv
import gzip
import io
import lzma
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from memspan.base.files import CorruptFile
from memspan.data.pictures import read_picture

__all__ = [
    "File",
    "column",
    "decode_jpeg",
    "decode_mulaw",
    "parse_idx",
    "read_content",
    "read_delimited",
    "read_npz",
    "split_jpegs",
    "whole",
]

Array = NDArray[Any]
_REMEDY = "replace it with a whole copy, or remove it to let the next resolver answer"
_IDX_TYPES = {8: "u1", 9: "i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
_IDX_MAX = 1 << 33  # bytes; a damaged header must not ask for all memory


class File(Protocol):
    """A file on the disk (``pathlib.Path``) or inside a wheel (``zipfile.Path``)."""

    @property
    def name(self) -> str:
        """Last part of its path."""
        ...

    def read_bytes(self) -> bytes:
        """Its content."""
        ...


@contextlib.contextmanager
def whole(file: object) -> Iterator[None]:
    """Turn whatever a damaged file raises while it is decoded into :class:`CorruptFile`."""
    try:
        yield
    except CorruptFile:
        raise
    except FileNotFoundError:
        raise
    except (
        ValueError,
        KeyError,
        EOFError,
        OSError,
        IndexError,
        struct.error,
        zipfile.BadZipFile,
        zlib.error,
        lzma.LZMAError,
        NotImplementedError,
        csv.Error,
        SyntaxError,  # a damaged npy header
    ) as error:
        raise CorruptFile(f"{file} is truncated or altered ({error}): {_REMEDY}") from error


def read_content(file: File) -> bytes:
    """The bytes of a file, unpacked where its name ends in ``.gz``, ``.bz2`` or ``.xz``."""
    with whole(file):
        content = file.read_bytes()
        if file.name.endswith(".gz"):
            return gzip.decompress(content)
        if file.name.endswith(".bz2"):
            return bz2.decompress(content)
        if file.name.endswith(".xz"):
            return lzma.decompress(content)
        return content


def read_npz(file: File, keys: Sequence[str]) -> dict[str, Array]:
    """Arrays of an ``.npz`` file, never unpickled.

    Args:
        file: the file.
        keys: the arrays wanted; all must be there.

    Raises:
        CorruptFile: truncated, altered, without one of the keys, or holding pickled objects.
    """
    with whole(file), np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as archive:
        missing = [key for key in keys if key not in archive.files]
        if missing:
            raise CorruptFile(
                f"{file} lacks {', '.join(missing)} (it holds {', '.join(archive.files)}): {_REMEDY}"
            )
        return {key: archive[key] for key in keys}


def parse_idx(content: bytes, name: str = "idx data") -> Array:
    """Parse the idx format of MNIST: a typed header, the dimensions, then the values.

    Args:
        content: the unpacked bytes.
        name: shown in errors.

    Returns:
        An array of the header's type (native byte order) and shape.

    Raises:
        CorruptFile: not idx, or more or fewer bytes than the header says.

    Example:
        >>> parse_idx(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 8, 9]))
        array([7, 8, 9], dtype=uint8)
    """
    with whole(name):
        zeros, code, dimensions = struct.unpack(">HBB", content[:4])
        if zeros or code not in _IDX_TYPES:
            raise ValueError(f"magic number {content[:4].hex()} is not idx")
        shape = struct.unpack(f">{dimensions}I", content[4 : 4 + 4 * dimensions])
        dtype = np.dtype(_IDX_TYPES[code])
        expected = math.prod(shape) * dtype.itemsize
        body = memoryview(content)[4 + 4 * dimensions :]
        if expected != len(body) or expected > _IDX_MAX:
            raise ValueError(f"{len(body)} bytes of values where the header says {expected}")
        return np.frombuffer(body, dtype).reshape(shape).astype(dtype.newbyteorder("="))


def split_jpegs(content: Array, offset: Array, name: str) -> tuple[bytes, ...]:
    """Cut concatenated JPEG files apart: image i is ``content[offset[i]:offset[i + 1]]``.

    Raises:
        CorruptFile: the offsets do not run from 0 to the end.
    """
    with whole(name):
        if offset.ndim != 1 or not len(offset) or offset[0] != 0 or offset[-1] != len(content):
            raise ValueError("the offsets do not cover the images")
        if (np.diff(offset) <= 0).any():
            raise ValueError("the offsets do not rise")
        packed = content.tobytes()
        return tuple(packed[a:b] for a, b in zip(offset[:-1].tolist(), offset[1:].tolist(), strict=True))


def decode_jpeg(images: Sequence[bytes], name: str = "JPEG images") -> NDArray[np.uint8]:
    """Decode JPEG files of one size.

    Args:
        images: the files' bytes.
        name: shown in errors.

    Returns:
        uint8 ``(N, H, W, 3)``.

    Raises:
        CorruptFile: one cannot be decoded or has another size.
        ImportError: Pillow is not installed.
    """
    decoded: NDArray[np.uint8] | None = None
    for i, image in enumerate(images):
        try:
            pixels = read_picture(image).values
        except CorruptFile as error:
            raise CorruptFile(f"{name}, image {i}: {error}") from error
        with whole(f"{name}, image {i},"):
            if pixels.ndim == 2:
                pixels = np.repeat(pixels[..., None], 3, axis=2)
            if decoded is None:
                decoded = np.empty((len(images), *pixels.shape), np.uint8)
            if pixels.shape != decoded.shape[1:]:
                raise ValueError(f"size {pixels.shape}, others {decoded.shape[1:]}")
            decoded[i] = pixels
    return np.empty((0, 0, 0, 3), np.uint8) if decoded is None else decoded


def decode_mulaw(values: Array) -> NDArray[np.float32]:
    """Sound samples of 8-bit mu-law codes (mu = 255): ``y = 2 v / 255 - 1``, ``sign(y) (256^|y| - 1) / 255``.

    Args:
        values: uint8, any shape.

    Returns:
        float32 samples in [-1, 1], same shape.

    Example:
        >>> decode_mulaw(np.array([0, 255], np.uint8))
        array([-1.,  1.], dtype=float32)
    """
    y = values.astype(np.float64) * (2 / 255) - 1
    return (np.sign(y) * (256.0 ** np.abs(y) - 1) / 255).astype(np.float32)


def read_delimited(
    file: File,
    columns: Mapping[str, type] | None = None,
    *,
    delimiter: str = ",",
    quoted: bool = True,
    names: Sequence[str] | None = None,
) -> dict[str, Array]:
    """A delimited text file (CSV, TSV; packed or not) as columns.

    Args:
        file: UTF-8 text.
        columns: the columns expected and their types (int, float, str), all of which must be there; None
            takes every column and finds the types: int where all values are integers, else float, else str.
        delimiter: one character.
        quoted: False where quotation marks are ordinary characters.
        names: the columns' names where the file has no header.

    Returns:
        Column -> int64, float64 or object array of ``str``.

    Raises:
        CorruptFile: a row of another length, a value of another type, a missing column.
    """
    with whole(file):
        text = read_content(file).decode("utf-8-sig")
        rows = csv.reader(
            io.StringIO(text, newline=""),
            delimiter=delimiter,
            quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
            strict=quoted,
        )
        header = list(names) if names is not None else next(rows, [])
        if not header or len(set(header)) != len(header):
            raise ValueError(f"header {header} is empty or names a column twice")
        missing = [name for name in columns or () if name not in header]
        if missing:
            raise ValueError(f"column {', '.join(missing)} is missing; the file has {', '.join(header)}")
        table: list[list[str]] = []
        for number, row in enumerate(rows, start=1):
            if row and len(row) != len(header):
                raise ValueError(f"row {number} has {len(row)} values, the header {len(header)}")
            if row:
                table.append(row)
        wanted = columns if columns is not None else dict.fromkeys(header)
        result = {}
        for name, kind in wanted.items():
            position = header.index(name)
            result[name] = column([row[position] for row in table], kind, name)
        return result


def column(values: Sequence[str], kind: type | None, name: str) -> Array:
    """One column of text as int64, float64 or objects: as ``kind`` says, else the first that fits all.

    Raises:
        ValueError: a value does not fit ``kind``; names the column.

    Example:
        >>> column(["1", "2.5"], None, "price")
        array([1. , 2.5])
    """
    for candidate, dtype in ((int, np.int64), (float, np.float64)):
        if kind in (candidate, None):
            try:
                return np.array([candidate(value) for value in values], dtype=dtype)
            except (ValueError, OverflowError) as error:
                if kind is not None:
                    raise ValueError(f"column {name}: {error}") from error
    text = np.empty(len(values), dtype=object)
    text[:] = values
    return text
