"""The folder of one run: what it is, its finished cells, its lock. Whole files; nothing is ever overwritten.

``run.json`` says which configuration and which code the cells belong to, so that a run is only ever continued
as itself. A cell is one JSON file with a checksum. A lock (released by the system when a process dies) keeps
a second process out.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from pydantic import BaseModel, ConfigDict, ValidationError

from memspan.base import BadInput, refuse
from memspan.base.files import CorruptFile, atomic_write, fingerprint
from memspan.report.schema import DataSource, Measurement

try:
    import fcntl
except ImportError:  # Windows has no flock: two processes on one folder are not noticed there
    fcntl = None  # type: ignore[assignment]

__all__ = ["CellFile", "RunFolder", "differences", "fresh_folder", "newest_unfinished"]


class CellFile(BaseModel):
    """A finished cell as stored: its measurement, and the data and notes that its work named."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    measurement: Measurement
    data: list[DataSource] = []
    notes: list[str] = []


class RunFolder:
    """The open, locked folder of a run.

    Args:
        path: the folder; made if it does not exist.
        identity: configuration and code as JSON; the cells belong to it.

    Raises:
        FileExistsError: the folder holds a finished result, or files of something else.
        BadInput: it belongs to another configuration (the differences are told), or another process runs in
            it.
        CorruptFile: its ``run.json`` is not whole.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(path)
        try:
            self._claim(identity)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def result(self) -> Path:
        """Where the result goes."""
        return self.path / "result.json"

    def cell_path(self, key: Mapping[str, Any]) -> Path:
        """The file of a cell; its name tells people the method and seed, its digits the whole key."""
        slug = re.sub(r"[^A-Za-z0-9]+", "-", str(key["method"])).strip("-")[:40] or "cell"
        return self.path / "cells" / f"{slug}-{key['seed']}-{fingerprint(dict(key))[:16]}.json"

    def read_cell(self, key: Mapping[str, Any]) -> CellFile | None:
        """The finished cell, or None where it has not finished.

        Raises:
            CorruptFile: truncated or altered; it is left as it is.
        """
        path = self.cell_path(key)
        if not path.exists():
            return None
        try:
            stored = json.loads(path.read_bytes())
            told = stored.pop("sha256")
            if told != fingerprint(stored) or stored.pop("key") != dict(key):
                _corrupt(path, "its checksum does not match its content")
            return CellFile.model_validate(stored)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, CorruptFile):
                raise
            _corrupt(path, str(error).splitlines()[0])

    def write_cell(self, key: Mapping[str, Any], cell: CellFile) -> CellFile:
        """Store a finished cell, whole, and give it back as it will be read."""
        content = {"key": dict(key), **cell.model_dump()}
        try:
            CellFile.model_validate({name: content[name] for name in ("measurement", "data", "notes")})
            text = json.dumps(content | {"sha256": fingerprint(content)}, indent=1, allow_nan=False)
        except (ValidationError, ValueError) as error:
            refuse("cell", dict(key), f"the measurement does not validate: {error}")
        atomic_write(self.cell_path(key), text + "\n", overwrite=False)
        again = self.read_cell(key)
        assert again is not None
        return again

    def finished_cells(self) -> int:
        """How many cells are stored."""
        return sum(1 for _ in (self.path / "cells").glob("*.json"))

    def _claim(self, identity: Mapping[str, Any]) -> None:
        for folder in (self.path, self.path / "cells", self.path / "checkpoints"):
            for torn in folder.glob(".*.tmp"):  # what a kill left of a write; whole files have other names
                torn.unlink(missing_ok=True)
        if self.result.exists():
            raise FileExistsError(
                f"{self.path} holds a finished result and is not overwritten; "
                "choose another --out or remove it"
            )
        stored = _read_identity(self.path)
        if stored is None:
            others = sorted(item.name for item in self.path.iterdir() if not item.name.startswith("."))
            if others:
                raise FileExistsError(
                    f"{self.path} holds other files ({', '.join(others[:3])}); "
                    "choose a new or empty folder for --out"
                )
            started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            document = {
                "identity": dict(identity),
                "fingerprint": fingerprint(dict(identity)),
                "started": started,
            }
            atomic_write(self.path / "run.json", json.dumps(document, indent=1) + "\n", overwrite=False)
            return
        found = differences(stored, identity)
        if found:
            refuse(
                "out", str(self.path),
                f"an unfinished run with another configuration lies there ({'; '.join(found)}); "
                "give the same options to continue it, or choose another --out",
            )  # fmt: skip


def differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two identities, in words.

    Example:
        >>> differences({"options": {"epochs": 8}, "seeds": 1}, {"options": {"epochs": 9}, "seeds": 1})
        ['options.epochs: 8 there, 9 now']
    """
    found: list[str] = []
    for name in dict.fromkeys((*there, *now)):
        one, other = there.get(name), now.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            found += [f"{name}.{line}" for line in differences(one, other)]
        elif one != other:
            if name.startswith("code of"):
                found.append(f"the {name} has changed")
            else:
                found.append(f"{name}: {_short(one)} there, {_short(other)} now")
    return found


def fresh_folder(base: Path) -> Path:
    """A new folder under ``base`` named by the time; two in one second get two folders.

    Example:
        >>> import tempfile
        >>> base = Path(tempfile.mkdtemp())
        >>> fresh_folder(base) != fresh_folder(base)
        True
    """
    base.mkdir(parents=True, exist_ok=True)
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    for place in _places(stamp):
        with contextlib.suppress(FileExistsError):
            (base / place).mkdir()
            return base / place
    raise AssertionError("endless")


def newest_unfinished(base: Path, identity: Mapping[str, Any]) -> Path:
    """The newest folder under ``base`` whose run has this identity and no result yet.

    Raises:
        BadInput: there is none; the newest unfinished one and its differences are told.
    """
    nearest_miss = ""
    folders = sorted((item.parent for item in base.glob("*/run.json")), key=_age, reverse=True)
    for folder in folders:
        if (folder / "result.json").exists():
            continue
        try:
            stored = _read_identity(folder)
        except CorruptFile:
            continue
        found = differences(stored or {}, identity)
        if not found:
            return folder
        nearest_miss = nearest_miss or f"; {folder} is unfinished, but differs ({'; '.join(found)})"
    refuse(
        "resume", str(base), f"no unfinished run with this configuration{nearest_miss}; run without --resume"
    )


def _age(folder: Path) -> tuple[int, str]:
    return (folder / "run.json").stat().st_mtime_ns, folder.name


def _places(stamp: str) -> Iterator[str]:
    yield stamp
    count = 2
    while True:
        yield f"{stamp}-{count}"
        count += 1


def _read_identity(folder: Path) -> dict[str, Any] | None:
    path = folder / "run.json"
    if not path.exists():
        return None
    try:
        stored = json.loads(path.read_bytes())
        identity: dict[str, Any] = stored["identity"]
        if stored["fingerprint"] != fingerprint(identity):
            raise ValueError("its checksum does not match its content")
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptFile(
            f"{path} is truncated or altered ({error}); the run cannot be told from others: "
            "choose another --out, or remove the folder"
        ) from error
    return identity


def _corrupt(path: Path, reason: str) -> NoReturn:
    raise CorruptFile(
        f"{path} is truncated or altered ({reason}); remove this file and run again: "
        "only this cell is measured anew"
    )


def _locked(folder: Path) -> int | None:
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    if fcntl is None:
        return handle
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if not isinstance(error, BlockingIOError):
            return None  # a file system without locks
        raise BadInput(
            "out", str(folder), "another process is running here; wait for it, or choose another --out"
        ) from None
    return handle


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
