"""What a data set is once it is loaded: arrays, texts or files, and where they came from.

Every kind carries ``name``, ``source`` (where this copy came from, for people), ``sha256`` of its content
(the same for the same content, whichever file held it) and ``licence``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memspan.base import nearest, refuse
from memspan.base.files import fingerprint
from memspan.base.rng import rng

__all__ = ["AnySet", "ArraySet", "FileSet", "ImageSet", "TableSet", "TextSet", "content_sha256"]

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """What all kinds share.

    Attributes:
        name: the catalogue's name, or the path of the user's own data.
        source: where this copy came from, e.g. ``"MEMSPAN_DATA: images/mnist_10k_2k.npz"``.
        sha256: 64 hexadecimal digits over the content.
        licence: the licence of the data as its owners state it.
    """

    name: str
    source: str
    sha256: str
    licence: str


@dataclass(frozen=True, kw_only=True)
class ImageSet(DataSet):
    """Labelled images in a training and a test part.

    Attributes:
        x_train: uint8 ``(N, H, W)`` or ``(N, H, W, 3)``, 0 to 255.
        y_train: int64 ``(N,)``, positions in ``classes``.
        x_test: like ``x_train``.
        y_test: like ``y_train``.
        classes: the classes' names.
        jpeg_train: the compressed images where the set came as JPEG, else None.
        jpeg_test: the same for the test part.
    """

    x_train: Array
    y_train: Array
    x_test: Array
    y_test: Array
    classes: tuple[str, ...]
    jpeg_train: tuple[bytes, ...] | None = None
    jpeg_test: tuple[bytes, ...] | None = None

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            x, y = getattr(self, f"x_{part}"), getattr(self, f"y_{part}")
            if x.dtype != np.uint8 or x.ndim not in (3, 4) or (x.ndim == 4 and x.shape[3] != 3):
                refuse(
                    f"x_{part}", f"{x.dtype} {x.shape}", "images are uint8 of shape (N, H, W) or (N, H, W, 3)"
                )
            if y.dtype != np.int64 or y.shape != (len(x),):
                refuse(f"y_{part}", f"{y.dtype} {y.shape}", f"labels are int64 of shape ({len(x)},)")
            if len(y) and not (y.min() >= 0 and y.max() < len(self.classes)):
                refuse(
                    f"y_{part}",
                    f"{y.min()} to {y.max()}",
                    f"labels lie between 0 and {len(self.classes) - 1}",
                )
        if self.x_train.shape[1:] != self.x_test.shape[1:]:
            refuse("x_test", self.x_test.shape, f"images of both parts have shape {self.x_train.shape[1:]}")

    def subset(
        self,
        train_per_class: int | None = None,
        test_per_class: int | None = None,
        *,
        seed: int | None = None,
    ) -> ImageSet:
        """As many images of each class as asked for, in their original order.

        Args:
            train_per_class: training images to keep of each class; None keeps all.
            test_per_class: test images to keep of each class; None keeps all.
            seed: draws them; None takes the first of each class.

        Raises:
            BadInput: a class has fewer images.

        Example:
            >>> from memspan import data
            >>> small = data.load("digits").subset(20, 10, seed=0)
            >>> small.x_train.shape, small.x_test.shape
            ((200, 8, 8), (100, 8, 8))
        """
        train = _per_class(self.y_train, train_per_class, "train_per_class", seed)
        test = _per_class(self.y_test, test_per_class, "test_per_class", seed)
        arrays = {
            "x_train": self.x_train[train],
            "y_train": self.y_train[train],
            "x_test": self.x_test[test],
            "y_test": self.y_test[test],
        }
        draw = "first of each class" if seed is None else f"drawn with seed {seed}"
        return replace(
            self,
            **arrays,  # type: ignore[arg-type]
            jpeg_train=None if self.jpeg_train is None else tuple(self.jpeg_train[i] for i in train),
            jpeg_test=None if self.jpeg_test is None else tuple(self.jpeg_test[i] for i in test),
            source=f"{self.source} ({len(train)} + {len(test)} images, {draw})",
            sha256=content_sha256(arrays),
        )


@dataclass(frozen=True, kw_only=True)
class TextSet(DataSet):
    """Texts by part.

    Attributes:
        parts: e.g. ``{"train": ("...",), "valid": ("...",)}``; one string a document.
        meta: what is known of each document of a part (title, year, ...), where anything is.
    """

    parts: Mapping[str, tuple[str, ...]]
    meta: Mapping[str, tuple[Mapping[str, Any], ...]]

    def text(self, part: str) -> str:
        """All documents of a part, parted by a line break.

        Raises:
            BadInput: there is no such part; the parts are listed.
        """
        if part not in self.parts:
            refuse("part", part, f"{self.name}: {nearest(part, self.parts)}")
        return "\n".join(self.parts[part])


@dataclass(frozen=True, kw_only=True)
class TableSet(DataSet):
    """Columns of equal length.

    Attributes:
        columns: name -> int64, float64 or (text) object array of ``str``, in the order of the file.
        target: the column to be predicted, where there is one.
    """

    columns: Mapping[str, Array]
    target: str | None = None

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def __getitem__(self, column: str) -> Array:
        if column not in self.columns:
            refuse("column", column, f"{self.name}: {nearest(column, self.columns)}")
        return self.columns[column]


@dataclass(frozen=True, kw_only=True)
class ArraySet(DataSet):
    """Named arrays: features, sound, images without a split.

    Attributes:
        arrays: name -> array; the catalogue's entry says what each holds.
    """

    arrays: Mapping[str, Array]

    def __getitem__(self, key: str) -> Array:
        if key not in self.arrays:
            refuse("key", key, f"{self.name}: {nearest(key, self.arrays)}")
        return self.arrays[key]


@dataclass(frozen=True, kw_only=True)
class FileSet(DataSet):
    """Checked files in a format that their user parses.

    Attributes:
        files: name -> path; every file was there, and whole, when the set was loaded.
        folder: the folder that holds them, for layouts that other programs read.
    """

    files: Mapping[str, Path]
    folder: Path

    def __getitem__(self, file: str) -> Path:
        if file not in self.files:
            refuse("file", file, f"{self.name}: {nearest(file, self.files)}")
        return self.files[file]


AnySet = ImageSet | TextSet | TableSet | ArraySet | FileSet


def content_sha256(content: Mapping[str, Any]) -> str:
    """One checksum over named arrays, texts, bytes and files, whatever the order of the names.

    Example:
        >>> content_sha256({"a": b"1", "b": b"2"}) == content_sha256({"b": b"2", "a": b"1"})
        True
    """
    digest = hashlib.sha256()
    for name in sorted(content):
        value = content[name]
        if isinstance(value, np.ndarray) and value.dtype == object:
            value = [str(item) for item in value]
        elif isinstance(value, np.ndarray):
            value = np.ascontiguousarray(value)
        digest.update(f"{name}\0{fingerprint(value)}\n".encode())
    return digest.hexdigest()


def _per_class(y: Array, count: int | None, argument: str, seed: int | None) -> NDArray[np.int64]:
    if count is None:
        return np.arange(len(y))
    if count < 1:
        refuse(argument, count, "keep at least one image of each class")
    kept = []
    for label in np.unique(y):
        rows = np.flatnonzero(y == label)
        if len(rows) < count:
            refuse(argument, count, f"class {label} has {len(rows)} images only")
        if seed is not None:
            rows = rng(seed, argument, int(label)).permutation(rows)
        kept.append(rows[:count])
    return np.sort(np.concatenate(kept))
