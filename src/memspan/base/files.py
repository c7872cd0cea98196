"""Files that are whole or absent, and state on disk without pickle.

A write goes to a temporary file in the same folder, is flushed to the disk and then renamed, so that a
kill or a full disk leaves either the old file or the new one. Tensors are kept as safetensors; what is
not a tensor is JSON in the file's header.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memspan.base.refusal import refuse

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CorruptFile", "atomic_path", "atomic_write", "fingerprint", "load_state", "save_state"]

_HEADER = "memspan"


class CorruptFile(ValueError):
    """A file that is truncated, altered, or not of the expected kind; the message names it and the remedy."""


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str], *, overwrite: bool = True) -> Iterator[Path]:
    """Give a temporary path that becomes ``path`` when the block ends without an error.

    Args:
        path: the file to write. Missing folders are made.
        overwrite: False refuses to replace an existing file, even one that appears meanwhile.

    Raises:
        FileExistsError: the file exists and ``overwrite`` is False.
        OSError: the disk is full or not writable; earlier files stay whole.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "a.txt"
        >>> with atomic_path(target) as temporary:
        ...     _ = temporary.write_text("whole")
        >>> target.read_text()
        'whole'
    """
    path = Path(path)
    if not overwrite and path.exists():
        raise FileExistsError(f"{path} exists and is not overwritten; choose another path or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        if overwrite:
            temporary.replace(path)
        else:
            try:
                os.link(temporary, path)
            except FileExistsError:
                raise FileExistsError(
                    f"{path} exists and is not overwritten; choose another path or remove it"
                ) from None
            temporary.unlink()
        _sync_folder(path.parent)
    except OSError as error:
        if isinstance(error, FileExistsError):
            raise
        raise OSError(
            error.errno, f"could not write {path}: {error.strerror or error}; earlier files are whole"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write(path: str | os.PathLike[str], content: bytes | str, *, overwrite: bool = True) -> None:
    """Write a file whole or not at all (see :func:`atomic_path`).

    Args:
        path: the file to write.
        content: bytes, or text written as UTF-8.
        overwrite: False refuses to replace an existing file.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "a.json"
        >>> atomic_write(target, "{}")
        >>> atomic_write(target, "[]", overwrite=False)
        Traceback (most recent call last):
        FileExistsError: ...a.json exists and is not overwritten; choose another path or remove it
    """
    with atomic_path(path, overwrite=overwrite) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def fingerprint(content: object) -> str:
    """SHA-256 of a file, of bytes, of a numpy array (dtype and shape included) or of anything JSON can hold.

    Args:
        content: a ``Path`` is read; bytes, arrays and JSON values are hashed as they are.

    Returns:
        64 hexadecimal digits.

    Raises:
        BadInput: the content has no canonical form.

    Example:
        >>> fingerprint({"b": 1, "a": 2}) == fingerprint({"a": 2, "b": 1})
        True
    """
    digest = hashlib.sha256()
    if isinstance(content, Path):
        with content.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if isinstance(content, bytes | bytearray | memoryview):
        digest.update(content)
    elif hasattr(content, "dtype") and hasattr(content, "tobytes"):
        digest.update(f"{content.dtype}{getattr(content, 'shape', ())}".encode())
        digest.update(content.tobytes())
    else:
        try:
            digest.update(
                json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
            )
        except (TypeError, ValueError) as error:
            refuse("content", content, f"give a Path, bytes, an array or a JSON value ({error})")
    return digest.hexdigest()


def save_state(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    header: Mapping[str, Any] | None = None,
    *,
    overwrite: bool = True,
) -> None:
    """Save tensors (safetensors) and a JSON header in one file, atomically.

    Args:
        path: the file to write.
        tensors: tensors by name; made contiguous, shared storages are written once for each name.
        header: anything JSON can hold; checked by :func:`load_state`.
        overwrite: False refuses to replace an existing file.

    Raises:
        BadInput: the header is not JSON.
        OSError: the file cannot be written.

    Example:
        >>> import tempfile, torch
        >>> target = Path(tempfile.mkdtemp()) / "state.safetensors"
        >>> save_state(target, {"w": torch.ones(2)}, {"task": 3})
        >>> tensors, header = load_state(target, expect={"task": 3})
        >>> tensors["w"].tolist(), header
        ([1.0, 1.0], {'task': 3})
    """
    from safetensors.torch import save_file

    try:
        text = json.dumps(dict(header or {}), sort_keys=True)
    except (TypeError, ValueError) as error:
        refuse("header", header, f"use only what JSON can hold ({error})")
    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with atomic_path(path, overwrite=overwrite) as temporary:
        try:
            save_file(whole, str(temporary), metadata={_HEADER: text})
        except OSError:
            raise
        except Exception as error:  # safetensors reports a failed write as its own error
            raise OSError(None, str(error)) from error


def load_state(
    path: str | os.PathLike[str], expect: Mapping[str, Any] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load what :func:`save_state` wrote.

    Args:
        path: the file.
        expect: header entries that must be there with these values.

    Returns:
        The tensors by name, and the header.

    Raises:
        FileNotFoundError: there is no such file.
        CorruptFile: truncated, altered, or without the header.
        BadInput: the header differs from ``expect``; both values are shown.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no file at {path}")
    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {})[_HEADER])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise CorruptFile(
            f"{path} is truncated or not a memspan state file ({error}); remove it to start anew"
        ) from error
    for name, value in (expect or {}).items():
        if header.get(name) != json.loads(json.dumps(value)):
            refuse(name, header.get(name), f"{path} was written with this value, but {value!r} is expected")
    return tensors, header


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems cannot sync a folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
