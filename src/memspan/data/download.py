"""Fetch an official file once: resumed where it broke off, checked, and put in place whole or not at all.

A part that arrived is kept beside the target (``NAME.part``) and continued by an HTTP range request. The file
takes its name only when its size and its published checksum agree; otherwise nothing is left that could be
taken for the data.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import os
import urllib.error
import urllib.request
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from memspan.base.files import CorruptFile

__all__ = ["DownloadFailed", "Remote", "check", "checksum_of", "fetch", "size_text"]

_CHUNK = 1 << 18
_TRIES = 4
_TIMEOUT = 30.0  # seconds without a byte


class DownloadFailed(OSError):
    """The file could not be fetched; the message names the address and what to do. What arrived is kept."""


@dataclass(frozen=True)
class Remote:
    """An official file.

    Attributes:
        url: its address (http or https).
        size: bytes, 0 where unknown.
        checksum: ``"sha256:..."`` or ``"md5:..."`` as published by its owner or a well-known mirror of the
            catalogue (md5 finds damage, not malice).
        filename: name on disk; the last part of the address by default.
    """

    url: str
    size: int
    checksum: str
    name: str = ""

    @property
    def filename(self) -> str:
        """Its name on the disk."""
        return self.name or self.url.rsplit("/", 1)[-1]


def size_text(count: int) -> str:
    """Bytes for people.

    Example:
        >>> size_text(30_900_000), size_text(512)
        ('29.5 MiB', '512 B')
    """
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def checksum_of(path: Path, algorithm: str) -> str:
    """``"sha256:..."`` or ``"md5:..."`` of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False))
    return f"{algorithm}:{digest.hexdigest()}"


def fetch(remote: Remote, path: Path, *, progress: bool = True) -> Path:
    """Bring a remote file to ``path``.

    Args:
        remote: address, size and checksum.
        path: where it shall lie. A file that is there is checked and not fetched again.
        progress: show a progress bar on standard error.

    Returns:
        ``path``.

    Raises:
        CorruptFile: a file is there, or arrived, whose size or checksum differs. What arrived is removed.
        DownloadFailed: the server refuses, cannot be reached, or breaks off again and again; what arrived is
            kept and continued by the next call.
        OSError: the disk is full or not writable; what arrived is kept where it can be.
    """
    if path.exists():
        check(remote, path)
        return path
    algorithm = remote.checksum.partition(":")[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    _fetch_part(remote, part, progress)
    found = checksum_of(part, algorithm)
    if found != remote.checksum:
        size = part.stat().st_size
        part.unlink()
        raise CorruptFile(
            f"{remote.url} gave {size} bytes with {found}, but {remote.checksum} is published: refused "
            "and removed. Try again; if it stays so, the file at this address has changed"
        )
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    part.replace(path)
    return path


def check(remote: Remote, path: Path) -> None:
    """Refuse a file that does not have its published checksum.

    Raises:
        CorruptFile: names the file.
    """
    algorithm = remote.checksum.partition(":")[0]
    if checksum_of(path, algorithm) != remote.checksum:
        raise CorruptFile(f"{path} does not have the published {algorithm}: remove it and fetch it again")


def _fetch_part(remote: Remote, part: Path, progress: bool) -> None:
    last: Exception | None = None
    for _ in range(_TRIES):
        before = part.stat().st_size if part.exists() else 0
        try:
            if _stream(remote, part, progress):
                return
            last = None
        except urllib.error.HTTPError as error:
            raise DownloadFailed(
                error.code,
                f"{remote.url} answered {error.code} {error.reason}: the file may have moved; "
                "get it by another way",
            ) from error
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            last = error
        after = part.stat().st_size if part.exists() else 0
        if after <= before:
            break
    kept = size_text(part.stat().st_size) if part.exists() else "nothing"
    raise DownloadFailed(
        errno.EIO,
        f"{remote.url} could not be fetched ({last or 'the connection ends early'}); {kept} is kept: run the "
        "same command again to continue",
    )


def _stream(remote: Remote, part: Path, progress: bool) -> bool:
    """Append what is missing to ``part``; True when the server says that this was all."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(remote.url, headers={"User-Agent": "memspan"})  # noqa: S310
    if request.type not in ("http", "https"):
        raise DownloadFailed(errno.EINVAL, f"{remote.url} is not an http address")
    if have and have == remote.size:
        return True
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        answer = urllib.request.urlopen(request, timeout=_TIMEOUT)  # noqa: S310
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing beyond what is there: let the checksum decide
            return True
        raise
    with ExitStack() as stack:
        stack.enter_context(answer)
        resumed = answer.status == 206 and (answer.headers["Content-Range"] or "").startswith(
            f"bytes {have}-"
        )
        if not resumed:  # a server without ranges sends the whole file again
            have = 0
        total = have + int(answer.headers["Content-Length"] or 0)
        file = stack.enter_context(_open(part, "ab" if resumed else "wb"))
        advance = _bar(stack, remote.filename, total or remote.size, have) if progress else None
        while chunk := answer.read(_CHUNK):
            file.write(chunk)
            have += len(chunk)
            if advance is not None:
                advance(have)
        return have >= total


def _open(path: Path, mode: str) -> BinaryIO:
    return path.open(mode)  # type: ignore[return-value]


def _bar(stack: ExitStack, text: str, total: int, done: int):  # type: ignore[no-untyped-def]
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    bar = stack.enter_context(
        Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            console=Console(stderr=True),
        )
    )
    task = bar.add_task(text, total=total or None, completed=done)
    return lambda completed: bar.update(task, completed=completed)
