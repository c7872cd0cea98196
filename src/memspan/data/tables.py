"""Tables larger than memory, a chunk of rows at a time.

polars reads them on all cores, some 10 million rows of CSV in a second of a core, and holds a window of the
file; without the extra ``tables`` the csv module of Python reads text, some hundred times slower. polars
alone fills a row that is too short with nulls and says nothing, so that a chunk with a null, or with an empty
last value, sends the csv module over the file once: it tells short rows from empty values and blank lines.
"""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn, TextIO

import numpy as np
from numpy.typing import NDArray

from memspan.base import nearest, optional, refuse
from memspan.base.files import CorruptFile
from memspan.data.formats import column

__all__ = ["read_chunks"]

_ENDINGS = (".csv", ".tsv", ".txt", ".csv.gz", ".tsv.gz", ".txt.gz", ".parquet")


def read_chunks(
    path: str | Path,
    columns: Sequence[str] | Mapping[str, type] | None = None,
    *,
    rows: int = 65536,
    delimiter: str | None = None,
    names: Sequence[str] | None = None,
    skip: int = 0,
) -> Iterator[dict[str, NDArray[Any]]]:
    """Read a CSV, TSV or Parquet file in chunks; no more than a window of it is held.

    Args:
        path: ``.csv``, ``.tsv``, ``.txt`` (UTF-8, with a header; also ``.gz``) or ``.parquet`` (needs the
            extra
            ``tables``).
        columns: the columns wanted, or a mapping from column to int, float or str; None takes all. For a
            column
            of text without a given type the whole file is looked through first: int where all its values are
            integers, else float, else str.
        rows: rows in a chunk, except the last.
        delimiter: of text files; by the file's ending when None (tab for ``.tsv``, else comma).
        names: the columns of a text file without a header.
        skip: lines of a text file to pass over before its header, or before its first row where ``names`` are
            given.

    Yields:
        Column -> int64, float64 or object array of ``str``, all of the same length. Missing values are NaN
        or "" in Parquet; in text a number must be there.

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
    if not path.name.lower().endswith(_ENDINGS):
        refuse("path", str(path), "give a .csv, .tsv, .txt (or any of them with .gz) or .parquet file")
    types: dict[str, type | None] | None = None
    if isinstance(columns, Mapping):
        types = dict(columns)
    elif columns is not None:
        types = dict.fromkeys(columns)
    if path.suffix.lower() == ".parquet":
        return _parquet(path, types, rows)
    tabs = path.name.lower().removesuffix(".gz").endswith(".tsv")
    text = _Text(path, delimiter or ("\t" if tabs else ","), names, skip)
    return text.chunks(types, rows)


class _Text:
    """A text file: its header, and its rows by polars or by the csv module."""

    def __init__(self, path: Path, delimiter: str, names: Sequence[str] | None, skip: int) -> None:
        self.path, self.delimiter, self.named, self.skip = path, delimiter, names is not None, skip
        try:
            with self._open() as file:
                for _ in range(skip):
                    file.readline()
                first = next(csv.reader(file, delimiter=delimiter, strict=True), [])
        except (csv.Error, UnicodeDecodeError, OSError, EOFError) as error:
            self._corrupt(error)
        self.header = list(names) if names is not None else first
        if len(set(self.header)) != len(self.header):
            self._corrupt(f"the header names a column twice: {', '.join(self.header)}")

    def chunks(self, types: dict[str, type | None] | None, rows: int) -> Iterator[dict[str, NDArray[Any]]]:
        if types is None:
            types = dict.fromkeys(self.header)
        _check_columns(types, self.header)
        if not types:
            return iter(())
        try:
            polars = optional("polars", extra="tables")
        except ImportError:
            return self._by_csv(types, rows)
        return self._by_polars(polars, types, rows)

    def _by_polars(
        self, polars: Any, types: dict[str, type | None], rows: int
    ) -> Iterator[dict[str, NDArray[Any]]]:
        dtypes = {int: polars.Int64, float: polars.Float64}
        last = self.header[-1]
        blanks: NDArray[np.int64] | None = None  # rows that are blank lines, once the csv module looked
        start = 0
        try:
            if None in types.values():
                types, blanks = self._found_types(polars, types)
            schema = {name: dtypes.get(types.get(name) or str, polars.String) for name in self.header}
            wanted = list(dict.fromkeys([*types, last]))
            batches = self._scan(polars, schema).select(wanted)
            for frame in batches.collect_batches(chunk_size=rows, maintain_order=True):
                count = len(frame)
                short = frame[last] == "" if schema[last] == polars.String else frame[last].is_null()
                doubtful = bool(short.any()) or any(frame[name].null_count() for name in types)
                if doubtful and blanks is None:
                    blanks = self._blank_rows()
                if doubtful and blanks is not None:
                    gone = blanks[(blanks >= start) & (blanks < start + count)] - start
                    keep = np.ones(count, bool)
                    keep[gone] = False
                    kept = np.flatnonzero(keep)
                    frame = frame.filter(polars.Series(keep))
                    for name in types:
                        if frame[name].null_count():
                            row = start + int(kept[frame[name].is_null().arg_max()]) + 2 - self.named
                            raise ValueError(f"column {name}: row {row} has no value")
                start += count
                if len(frame):
                    yield {name: _array(frame[name]) for name in types}
        except (polars.exceptions.PolarsError, csv.Error, UnicodeDecodeError, ValueError) as error:
            self._corrupt(error)

    def _found_types(
        self, polars: Any, types: Mapping[str, type | None]
    ) -> tuple[dict[str, type | None], NDArray[np.int64] | None]:
        """Types of the columns that have none, from every row of the file."""
        text = self._scan(polars, dict.fromkeys(self.header, polars.String))
        unknown = [name for name, kind in types.items() if kind is None]
        blanks = None
        if text.select((polars.col(self.header[-1]) == "").any()).collect(engine="streaming").item():
            blanks = self._blank_rows()
            if len(blanks):
                text = text.with_row_index("_row").filter(~polars.col("_row").is_in(blanks.tolist()))
        fits = [
            polars.col(name)
            .str.strip_chars()
            .cast(dtype, strict=False)
            .is_not_null()
            .all()
            .alias(f"{i}.{kind}")
            for i, name in enumerate(unknown)
            for kind, dtype in (("int", polars.Int64), ("float", polars.Float64))
        ]
        row = text.select(fits).collect(engine="streaming").row(0, named=True)
        found = dict(types)
        for i, name in enumerate(unknown):
            found[name] = int if row[f"{i}.int"] else float if row[f"{i}.float"] else str
        return found, blanks

    def _scan(self, polars: Any, schema: Mapping[str, Any]) -> Any:
        return polars.scan_csv(
            self.path, separator=self.delimiter, schema=schema, has_header=not self.named,
            skip_lines=self.skip, empty_string_is_null=False, glob=False,
        )  # fmt: skip

    def _blank_rows(self) -> NDArray[np.int64]:
        """Places of blank lines among the rows; refuses a row of another length."""
        blanks = []
        for place, row in enumerate(self._rows()):
            if not row:
                blanks.append(place)
            elif len(row) != len(self.header):
                number = place + 2 - self.named
                raise ValueError(f"row {number} has {len(row)} values, the header {len(self.header)}")
        return np.array(blanks, np.int64)

    def _by_csv(self, types: dict[str, type | None], rows: int) -> Iterator[dict[str, NDArray[Any]]]:
        places = {name: self.header.index(name) for name in types}
        try:
            for name in [name for name, kind in types.items() if kind is None]:
                values = (row[places[name]] for row in self._rows() if len(row) > places[name])
                kinds = {"i": int, "f": float}  # one block after another: the widest of their types
                order = (int, float, str)
                widest = 0
                while block := list(islice(values, rows)):
                    kind = kinds.get(column(block, None, name).dtype.kind, str)
                    widest = max(widest, order.index(kind))
                types = {**types, name: order[widest]}
            reader, number = self._rows(), 1 - self.named
            while block_rows := list(islice(reader, rows)):
                table = []
                for row in block_rows:
                    number += 1
                    if row and len(row) != len(self.header):
                        raise ValueError(f"row {number} has {len(row)} values, the header {len(self.header)}")
                    if row:
                        table.append(row)
                if table:
                    yield {
                        name: column([row[places[name]] for row in table], kind, name)
                        for name, kind in types.items()
                    }
        except (csv.Error, UnicodeDecodeError, ValueError) as error:
            self._corrupt(error)

    def _rows(self) -> Iterator[list[str]]:
        with self._open() as file:
            for _ in range(self.skip):
                file.readline()
            reader = csv.reader(file, delimiter=self.delimiter, strict=True)
            if not self.named:
                next(reader, None)
            yield from reader

    def _open(self) -> TextIO:
        if self.path.name.lower().endswith(".gz"):
            return io.TextIOWrapper(gzip.open(self.path), encoding="utf-8-sig", newline="")
        return self.path.open(encoding="utf-8-sig", newline="")

    def _corrupt(self, error: object) -> NoReturn:
        first = str(error).partition("\n\n")[0].replace("\n", " ")
        raise CorruptFile(
            f"{self.path}: {first}; mend the file, or give the type, e.g. columns={{'name': str}}"
        ) from (error if isinstance(error, BaseException) else None)


def _parquet(
    path: Path, types: dict[str, type | None] | None, rows: int
) -> Iterator[dict[str, NDArray[Any]]]:
    polars = optional("polars", extra="tables")
    try:
        scan = polars.scan_parquet(path, glob=False)
        dtypes = dict(scan.collect_schema())
        if types is None:
            types = dict.fromkeys(dtypes)
        _check_columns(types, list(dtypes))
        kinds = {
            name: kind or (int if dtypes[name].is_integer() else float if dtypes[name].is_numeric() else str)
            for name, kind in types.items()
        }
        casts = {int: polars.Int64, float: polars.Float64}
        wanted = [
            polars.col(name).cast(casts[kind]) if kind in casts else polars.col(name)
            for name, kind in kinds.items()
        ]
        for frame in scan.select(wanted).collect_batches(chunk_size=rows, maintain_order=True):
            for name, kind in kinds.items():
                if kind is int and frame[name].null_count():
                    raise CorruptFile(
                        f"{path}, column {name}: a value is missing; missing integers need "
                        f"columns={{{name!r}: float}}"
                    )
            yield {name: _array(frame[name]) for name in kinds}
    except (polars.exceptions.PolarsError, OSError) as error:
        told = str(error).partition("\n\n")[0]
        raise CorruptFile(
            f"{path} is truncated, not Parquet, or holds a value that does not fit its type ({told}); "
            "replace it with a whole copy, or give the type, e.g. columns={'name': str}"
        ) from error


def _array(values: Any) -> NDArray[Any]:
    """int64 and float64 as they are, with NaN for a missing float; the rest as text, "" where missing."""
    if values.dtype.is_integer() or values.dtype.is_float():
        return np.array(values.to_numpy())  # polars' own memory is read-only
    text = np.empty(len(values), dtype=object)
    text[:] = ["" if value is None else str(value) for value in values.to_list()]
    return text


def _check_columns(types: Mapping[str, type | None], header: Sequence[str]) -> None:
    for name, kind in types.items():
        if name not in header:
            refuse("columns", name, nearest(name, header))
        if kind not in (None, int, float, str):
            refuse("columns", f"{name}: {kind}", "types are int, float and str")
