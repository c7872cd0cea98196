"""An approximate index of one user's vectors (HNSW by usearch), for users with very many memories.

Vectors are quantised to int8 in the index; what it finds is scored again from the stored vectors. The file is
named by the generation it was built from, so that one that does not belong to the rows is never read.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memspan.base import optional
from memspan.base.files import atomic_path

__all__ = ["NearIndex"]

_CONNECTIVITY, _BUILD, _SEARCH = 16, 64, 256
_USUAL = 200_000  # vectors up to which that breadth of search is enough; beyond, it grows with the root
_CHUNK = 256  # vectors added while a search may have to wait


class NearIndex:
    """The index of one user.

    Args:
        dim: numbers of a vector.
        epoch: of the user's rows; after a deletion for good the index is built anew.
    """

    def __init__(self, dim: int, epoch: int) -> None:
        self.dim, self.epoch = dim, epoch
        self.version = 0  # changes up to here are in it
        self._lock = threading.Lock()
        self._index: Any = optional("usearch.index", extra="recall").Index(
            ndim=dim,
            metric="cos",
            dtype="i8",
            connectivity=_CONNECTIVITY,
            expansion_add=_BUILD,
            expansion_search=_SEARCH,
        )

    def __len__(self) -> int:
        return len(self._index)

    def put(self, rids: NDArray[np.int64], vectors: NDArray[np.float32], stop: threading.Event) -> bool:
        """Add or replace vectors; False when told to stop on the way."""
        for start in range(0, len(rids), _CHUNK):
            if stop.is_set():
                return False
            with self._lock:
                keys = rids[start : start + _CHUNK].astype(np.uint64)
                known = keys[np.asarray(self._index.contains(keys))]
                if len(known):
                    self._index.remove(known)
                self._index.add(keys, vectors[start : start + _CHUNK])
        return True

    def search(self, query: NDArray[np.float32], count: int) -> list[int]:
        """Row numbers near to a query, about nearest first."""
        with self._lock:
            self._index.expansion_search = breadth(len(self._index))
            return [int(key) for key in self._index.search(query, count).keys]

    def save(self, folder: Path, owner: int) -> None:
        """Write the index under its generation and remove former ones."""
        name = f"{owner}-{self.epoch}-{self.version}-{self.dim}.usearch"
        with atomic_path(folder / name) as temporary:
            self._index.save(str(temporary))
        remove(folder, owner, keep=name)

    @classmethod
    def load(cls, folder: Path, owner: int, epoch: int, dim: int, newest: int) -> NearIndex | None:
        """The newest index of these rows, or None."""
        found = []
        for path in folder.glob(f"{owner}-{epoch}-*-{dim}.usearch"):
            with contextlib.suppress(ValueError):
                found.append((int(path.name.split("-")[2]), path))
        for version, path in sorted(found, reverse=True):
            if version <= newest:
                near = cls(dim, epoch)
                try:
                    near._index.load(str(path))
                except Exception:  # noqa: S112 (damaged or of another usearch: it is built anew)
                    continue
                near.version = version
                return near
        return None

    def nbytes(self) -> int:
        """Bytes of memory."""
        return int(self._index.memory_usage)


def breadth(size: int) -> int:
    """How many candidates a search follows in an index of this size.

    Example:
        >>> breadth(1000), breadth(200_000), breadth(800_000)
        (256, 256, 512)
    """
    return int(_SEARCH * max(1.0, size / _USUAL) ** 0.5)


def remove(folder: Path, owner: int, keep: str = "") -> None:
    """Remove a user's index files but one."""
    files: Iterable[Path] = list(folder.glob(f"{owner}-*.usearch")) + list(folder.glob(f".{owner}-*.tmp"))
    for path in files:
        if path.name != keep:
            path.unlink(missing_ok=True)
