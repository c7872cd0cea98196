"""Tables larger than memory, a chunk of rows at a time."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memspan.base import nearest, optional, refuse
from memspan.base.files import CorruptFile
from memspan.data.formats import column

__all__ = ["read_chunks"]


def read_chunks(
    path: str | Path,
    columns: Sequence[str] | Mapping[str, type] | None = None,
    *,
    rows: int = 65536,
    delimiter: str | None = None,
) -> Iterator[dict[str, NDArray[Any]]]:
    """Read a CSV, TSV or Parquet file in chunks; no more than one chunk is held.

    Args:
        path: ``.csv``, ``.tsv`` (UTF-8, with a header) or ``.parquet`` (needs the extra ``tables``).
        columns: the columns wanted, or a mapping from column to int, float or str; None takes all. Types not
            given are found in the first chunk and then hold for the file.
        rows: rows in a chunk, except the last.
        delimiter: of text files; by the file's ending when None.

    Yields:
        Column -> int64, float64 or object array of ``str``, all of the same length.

    Raises:
        BadInput: no such file or column, another kind of file, or ``rows`` below 1.
        CorruptFile: a row of another length, or a value that does not fit the column's type.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.csv"
        >>> _ = path.write_text(chr(10).join(["user,item", "1,a", "2,b", "3,c"]))
        >>> [chunk["user"].tolist() for chunk in read_chunks(path, ["user"], rows=2)]
        [[1, 2], [3]]
    """
    path = Path(path)
    if rows < 1:
        refuse("rows", rows, "at least 1")
    if not path.is_file():
        refuse("path", str(path), "there is no such file")
    ending = path.suffix.lower()
    if ending not in (".csv", ".tsv", ".parquet"):
        refuse("path", str(path), "give a .csv, .tsv or .parquet file")
    types: dict[str, type | None] | None = None
    if isinstance(columns, Mapping):
        types = dict(columns)
    elif columns is not None:
        types = dict.fromkeys(columns)
    if ending == ".parquet":
        return _parquet(path, types, rows)
    return _text(path, types, rows, delimiter or ("\t" if ending == ".tsv" else ","))


def _text(
    path: Path, types: dict[str, type | None] | None, rows: int, delimiter: str
) -> Iterator[dict[str, NDArray[Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            header = next(reader, [])
            if types is None:
                types = dict.fromkeys(header)
            _check_columns(types, header)
            number = 1
            while block := list(islice(reader, rows)):
                for row in block:
                    number += 1
                    if row and len(row) != len(header):
                        raise ValueError(f"row {number} has {len(row)} values, the header {len(header)}")
                table = [row for row in block if row]
                chunk = {}
                for name, kind in types.items():
                    position = header.index(name)
                    chunk[name] = column([row[position] for row in table], kind, name)
                    types[name] = {"i": int, "f": float}.get(chunk[name].dtype.kind, str)
                if table:
                    yield chunk
        except (csv.Error, UnicodeDecodeError, ValueError) as error:
            if isinstance(error, csv.Error | UnicodeDecodeError) or type(error) is ValueError:
                raise CorruptFile(
                    f"{path}: {error}; mend the file, or give the type, e.g. columns={{'name': str}}"
                ) from error
            raise


def _parquet(
    path: Path, types: dict[str, type | None] | None, rows: int
) -> Iterator[dict[str, NDArray[Any]]]:
    polars = optional("polars", extra="tables")
    try:
        scan = polars.scan_parquet(path)
        header = scan.collect_schema().names()
        total = scan.select(polars.len()).collect().item()
    except (polars.exceptions.PolarsError, OSError) as error:
        raise CorruptFile(
            f"{path} is truncated or not Parquet ({error}); replace it with a whole copy"
        ) from error
    if types is None:
        types = dict.fromkeys(header)
    _check_columns(types, header)
    for start in range(0, total, rows):
        frame = scan.select(list(types)).slice(start, rows).collect()
        chunk = {}
        for name, kind in types.items():
            values = frame[name]
            if kind is None:
                kind = int if values.dtype.is_integer() else float if values.dtype.is_numeric() else str
                types[name] = kind
            chunk[name] = _cast(values.to_list(), kind, name, path)
        yield chunk


def _cast(values: list[Any], kind: type, name: str, path: Path) -> NDArray[Any]:
    if kind is str:
        text = np.empty(len(values), dtype=object)
        text[:] = ["" if value is None else str(value) for value in values]
        return text
    if kind is float:
        values = [float("nan") if value is None else value for value in values]
    try:
        return np.array([kind(value) for value in values], np.int64 if kind is int else np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise CorruptFile(
            f"{path}, column {name}: {error}; missing integers need columns={{{name!r}: float}}"
        ) from error


def _check_columns(types: Mapping[str, type | None], header: Sequence[str]) -> None:
    for name, kind in types.items():
        if name not in header:
            refuse("columns", name, nearest(name, header))
        if kind not in (None, int, float, str):
            refuse("columns", f"{name}: {kind}", "types are int, float and str")
