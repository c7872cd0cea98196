"""What to keep of the past: exemplars chosen by herding or at random, paid for in true bytes.

Herding (Welling 2009; as used by iCaRL, Rebuffi et al. 2017) picks images one by one so that the mean of the
picked features stays nearest to the class's mean. Its order is kept: a class gives way by dropping its last
images. What an exemplar costs is what its codec really wrote, not a number of images.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from memspan.base import optional, refuse
from memspan.base.rng import rng
from memspan.ledger.bytes import Budget

__all__ = ["ExemplarSet", "Reservoir", "herding"]

LABEL_BYTES = 8  # an int64 index a kept row
LENGTH_BYTES = 4  # an int32 length a kept row, where the codec's rows differ in size
Selection = Callable[[Tensor, int], Sequence[int]]
_TIE = 1e-12  # equal rows may differ by rounding; within this the lowest index wins


def herding(features: Tensor, q: int) -> Tensor:
    """Indices of the q rows whose running mean stays nearest to the mean, in the order of their choice.

    Rows are normalised: v_i. With μ = mean v (not normalised again), step k takes the remaining row with the
    least ||μ − (v_i + Σ chosen) / k||; ties take the lowest index. The first rows of a longer herd are the
    shorter herd.

    Args:
        features: (n, d), floating.
        q: rows wanted; n or more gives all, each once.

    Returns:
        (min(q, n),) int64, on the CPU.

    Raises:
        BadInput: features that are not finite or not (n, d), a negative q.

    Source:
        Rebuffi et al. 2017, algorithm 4, on unit features.

    Example:
        >>> herding(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), 2).tolist()
        [2, 0]
    """
    if features.dim() != 2:
        refuse("features", tuple(features.shape), "give one row for each image: (n, d)")
    if q < 0:
        refuse("q", q, "give 0 or more")
    if not torch.isfinite(features).all():
        refuse("features", "NaN or infinite", "remove these rows or mend the network that gave them")
    v = F.normalize(features.detach().cpu().double(), dim=1)
    mean, total = v.mean(dim=0), torch.zeros(v.shape[1], dtype=v.dtype)
    taken = torch.zeros(len(v), dtype=torch.bool)
    order: list[int] = []
    for k in range(1, min(q, len(v)) + 1):
        distance = (v - (k * mean - total)).square_().sum(dim=1).masked_fill_(taken, torch.inf)
        least = distance.min()
        best = int(torch.nonzero(distance <= least + _TIE * (1 + least))[0])
        order.append(best)
        taken[best] = True
        total += v[best]
    return torch.tensor(order, dtype=torch.int64)


class Reservoir:
    """A uniform sample of fixed size from a stream of unknown length (Vitter 1985, algorithm R).

    Args:
        capacity: rows kept at most.
        seed: of the draws; each depends on the seed and on how many rows came before.

    Example:
        >>> kept = Reservoir(2)
        >>> for start in (0, 3):
        ...     kept.add(torch.arange(start, start + 3))
        >>> len(kept), kept.seen, kept.memory_bytes()
        (2, 6, {'replay.rows': 16})
    """

    def __init__(self, capacity: int, seed: int = 0) -> None:
        if capacity < 1:
            refuse("capacity", capacity, "give 1 or more rows")
        self.capacity, self.seed, self.seen = capacity, seed, 0
        self._rows: Tensor | None = None

    def __len__(self) -> int:
        return 0 if self._rows is None else len(self._rows)

    @property
    def rows(self) -> Tensor:
        """The rows kept, (at most capacity, ...).

        Raises:
            BadInput: nothing was added yet.
        """
        if self._rows is None:
            refuse("rows", None, "add rows first")
        return self._rows

    def add(self, rows: Tensor) -> None:
        """Offer rows (n, ...), each of which is kept with probability capacity / rows seen.

        Raises:
            BadInput: another shape or dtype than the rows before.
        """
        if self._rows is not None and (rows.shape[1:], rows.dtype) != (
            self._rows.shape[1:],
            self._rows.dtype,
        ):
            refuse("rows", (tuple(rows.shape), rows.dtype), f"rows before were {tuple(self._rows.shape[1:])}")
        kept = list(self._rows) if self._rows is not None else []
        for row in rows:
            place = self.seen if self.seen < self.capacity else self._place()
            self.seen += 1
            if place >= self.capacity:
                continue
            kept[place : place + 1] = [row]
        if kept:
            self._rows = torch.stack(kept)

    def memory_bytes(self) -> dict[str, int]:
        """Bytes of the rows kept."""
        return {"replay.rows": 0 if self._rows is None else self._rows.nbytes}

    def state_dict(self) -> dict[str, Tensor]:
        """The rows and how many were seen, as tensors."""
        state = {"seen": torch.tensor(self.seen)}
        return state if self._rows is None else state | {"rows": self._rows}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self.seen = int(state["seen"])
        self._rows = state["rows"].clone() if "rows" in state else None

    def _place(self) -> int:
        return int(rng("reservoir", self.seed, self.seen).integers(self.seen + 1))


class ExemplarSet:
    """Exemplars of every class so far within a budget of bytes, balanced over the classes.

    Each class keeps its rows in the order of choice. All get the same number, as many as fit at their encoded
    size; what is left buys one more for as many classes as it can. Every row costs its encoded bytes, 8 for
    its label and, with PNG and JPEG, 4 for its length. Names of classes and the shape are not counted.

    Args:
        budget: bytes, ``"2MiB"`` or a :class:`~memspan.ledger.Budget`; None is unlimited.
        codec: "raw" (the array's own bytes, any dtype), "png" (lossless), "jpeg:Q" (quality 1 to 100), or
            "features:fp16" (keeps features instead of images).
        selection: "herding", "random", "reservoir" (rows that stay a uniform sample when a class is
            given again), or a callable ``(features (n, d), q) -> indices in order``.
        exact: "paper" gives each class ⌊m/C⌋ of the m = ⌊budget / image bytes⌋ rows, labels free; needs a
            codec whose rows are equal in size.
        seed: of random choices.

    Example:
        >>> kept = ExemplarSet(budget=3 * (4 + 8))
        >>> kept.update(np.arange(16, dtype=np.uint8).reshape(4, 2, 2), ["a", "a", "b", "b"], torch.eye(4))
        >>> len(kept), kept.nbytes, kept.arrays()[1].tolist()
        (3, 36, ['a', 'a', 'b'])
    """

    def __init__(
        self,
        budget: Budget | str | int | None,
        codec: str = "raw",
        selection: Literal["herding", "random", "reservoir"] | str | Selection = "herding",
        *,
        exact: Literal["paper"] | None = None,
        seed: int = 0,
    ) -> None:
        self.budget = _bytes_of(budget)
        self.quality = _quality(codec)
        if not callable(selection) and selection not in ("herding", "random", "reservoir"):
            refuse("selection", selection, 'use "herding", "random", "reservoir" or a callable')
        if exact not in (None, "paper"):
            refuse("exact", exact, 'use "paper" or None')
        if exact == "paper" and codec not in ("raw", "features:fp16"):
            refuse("exact", exact, f"rows of {codec} differ in size; use codec raw, or exact=None")
        self.codec, self.selection = codec, selection
        self.exact, self.seed = exact, seed
        self._kept: dict[int | str, list[bytes]] = {}
        self._shape: tuple[int, ...] = ()
        self._dtype = "uint8"

    def __len__(self) -> int:
        return sum(len(rows) for rows in self._kept.values())

    @property
    def classes(self) -> list[int | str]:
        """Classes in the order in which they came."""
        return list(self._kept)

    @property
    def counts(self) -> dict[int | str, int]:
        """Rows kept of each class."""
        return {label: len(rows) for label, rows in self._kept.items()}

    @property
    def nbytes(self) -> int:
        """Bytes held: encoded rows, labels, lengths."""
        return sum(self.memory_bytes().values())

    def memory_bytes(self) -> dict[str, int]:
        """Bytes held by part."""
        out = {
            "replay.exemplars": sum(len(row) for rows in self._kept.values() for row in rows),
            "replay.labels": LABEL_BYTES * len(self),
        }
        return out | {"replay.lengths": LENGTH_BYTES * len(self)} if self._varies else out

    def update(self, X: Any, y: Any, features: Tensor | np.ndarray | None = None) -> None:
        """Choose exemplars of the classes in ``y``; the classes before give way.

        A class that was there is replaced: give its kept rows together with the new ones to let them compete.
        A row that equals a kept one keeps its encoding, so that JPEG is not applied twice.

        Args:
            X: (N, H, W) or (N, H, W, C); uint8 for PNG and JPEG.
            y: (N,) ints or strings.
            features: (N, d) from the present model; not needed for "random" and "reservoir" images.

        Raises:
            BadInput: lengths differ, no rows, another shape or dtype than before, features missing or not
                finite, a budget below one row a class; the set is then as before.
        """
        images, labels = _array(X), _labels(y)
        if not len(images) or len(images) != len(labels):
            refuse("X", f"{len(images)} rows, {len(labels)} labels", "give a row or more, one label for each")
        vectors = None if features is None else torch.as_tensor(features).detach().cpu()
        if vectors is None and (self.selection not in ("random", "reservoir") or self._keeps_features):
            refuse("features", None, "this selection or codec needs them: give (N, d)")
        if vectors is not None:
            if vectors.dim() != 2 or len(vectors) != len(images):
                refuse("features", tuple(vectors.shape), f"give ({len(images)}, d)")
            if not torch.isfinite(vectors).all():
                refuse("features", "NaN or infinite", "remove these rows or mend the network that gave them")
        stored = images if not self._keeps_features else _half(vectors)
        self._check_rows(stored)
        kept, shape, dtype = dict(self._kept), stored.shape[1:], str(stored.dtype)
        groups: dict[int | str, list[int]] = {}
        for index, label in enumerate(labels):
            groups.setdefault(label, []).append(index)
        for label, rows in groups.items():
            kept[label] = self._encode_all(stored[rows], label)
        most = self._most(kept)
        for label, rows in groups.items():
            order = self._order(label, kept[label], None if vectors is None else vectors[rows], most)
            kept[label] = [kept[label][i] for i in order]
        self._kept = self._fit(kept)
        self._shape, self._dtype = tuple(shape), dtype

    def shrink(self, per_class: int) -> None:
        """Keep the first ``per_class`` rows of each class.

        Raises:
            BadInput: below 1.
        """
        if per_class < 1:
            refuse("per_class", per_class, "keep 1 row of each class or more")
        self._kept = {label: rows[:per_class] for label, rows in self._kept.items()}

    def resize(self, budget: Budget | str | int | None) -> None:
        """Set another budget and drop what no longer fits.

        Raises:
            BadInput: a budget below one row a class; nothing is dropped then.
        """
        before, self.budget = self.budget, _bytes_of(budget)
        try:
            self._kept = self._fit(self._kept)
        except ValueError:
            self.budget = before
            raise

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Decoded rows (M, ...) in their own dtype and labels (M,), class by class in the order of choice."""
        rows = [self._decode(row) for encoded in self._kept.values() for row in encoded]
        labels = np.array([label for label, encoded in self._kept.items() for _ in encoded])
        blank = np.zeros((0, *self._shape), self._dtype)
        return (np.stack(rows) if rows else blank), (labels if rows else np.zeros(0, np.int64))

    def dataset(self) -> tuple[Tensor, Tensor | np.ndarray]:
        """As :meth:`arrays`, as tensors; labels that are strings stay an array."""
        rows, labels = self.arrays()
        return torch.from_numpy(rows), torch.from_numpy(labels) if labels.dtype.kind == "i" else labels

    def state_dict(self) -> dict[str, Tensor]:
        """Encoded bytes, labels and lengths as tensors, for safetensors; ``header`` is JSON as bytes."""
        header = {
            "codec": self.codec,
            "classes": self.classes,
            "shape": list(self._shape),
            "dtype": self._dtype,
        }
        rows = [row for encoded in self._kept.values() for row in encoded]
        index = [i for i, encoded in enumerate(self._kept.values()) for _ in encoded]
        state = {
            "header": _bytes(json.dumps(header).encode()),
            "data": _bytes(b"".join(rows)),
            "labels": torch.tensor(index, dtype=torch.int64),
        }
        if self._varies:
            state["lengths"] = torch.tensor([len(row) for row in rows], dtype=torch.int32)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over the rows that :meth:`state_dict` gave; budget and selection stay as they are.

        Raises:
            BadInput: another codec, or parts that do not agree.
        """
        header = json.loads(state["header"].cpu().numpy().tobytes())
        if header["codec"] != self.codec:
            refuse("codec", self.codec, f"the state was written with {header['codec']!r}")
        data, index = state["data"].cpu().numpy().tobytes(), state["labels"].tolist()
        size = int(np.prod(header["shape"])) * np.dtype(header["dtype"]).itemsize
        lengths = state["lengths"].tolist() if self._varies else [size] * len(index)
        if sum(lengths) != len(data) or len(lengths) != len(index):
            refuse("state", f"{len(data)} bytes for {sum(lengths)}", "the state is not whole; save it again")
        kept: dict[int | str, list[bytes]] = {label: [] for label in header["classes"]}
        ends = np.cumsum(lengths).tolist()
        for label, length, end in zip(index, lengths, ends, strict=True):
            kept[header["classes"][label]].append(data[end - length : end])
        self._kept, self._shape, self._dtype = kept, tuple(header["shape"]), header["dtype"]

    @property
    def _varies(self) -> bool:
        return self.codec not in ("raw", "features:fp16")

    @property
    def _keeps_features(self) -> bool:
        return self.codec == "features:fp16"

    def _cost(self, row: bytes) -> int:
        if self.exact == "paper":
            return len(row)
        return len(row) + LABEL_BYTES + (LENGTH_BYTES if self._varies else 0)

    def _check_rows(self, rows: np.ndarray) -> None:
        if self._kept and (rows.shape[1:], str(rows.dtype)) != (self._shape, self._dtype):
            refuse("X", (rows.shape, str(rows.dtype)), f"rows before were {self._shape} {self._dtype}")
        colours = rows.ndim == 3 or (rows.ndim == 4 and rows.shape[3] in (1, 3))
        if self._varies and (rows.dtype != np.uint8 or not colours):
            refuse("X", (rows.shape, str(rows.dtype)), f"{self.codec} needs uint8 (N, H, W[, 1 or 3])")

    def _encode_all(self, rows: np.ndarray, label: int | str) -> list[bytes]:
        known = (
            {self._decode(row).tobytes(): row for row in self._kept.get(label, [])} if self._varies else {}
        )
        return [known.get(row.tobytes()) or self._encode(row) for row in rows]

    def _encode(self, row: np.ndarray) -> bytes:
        if not self._varies:
            return row.tobytes()
        image = optional("PIL.Image", extra="recipes").fromarray(
            row.squeeze(2) if row.ndim == 3 and row.shape[2] == 1 else row
        )
        file = io.BytesIO()
        if self.quality is None:
            image.save(file, "PNG", optimize=True)
        else:
            image.save(file, "JPEG", quality=self.quality, optimize=True)
        return file.getvalue()

    def _decode(self, row: bytes) -> np.ndarray:
        if not self._varies:
            return np.frombuffer(row, self._dtype).reshape(self._shape)
        return np.asarray(optional("PIL.Image", extra="recipes").open(io.BytesIO(row))).reshape(self._shape)

    def _most(self, kept: Mapping[int | str, list[bytes]]) -> int | None:
        """No class can get more rows than this: those that fit if each were as small as the smallest."""
        if self.budget is None:
            return None
        least = min(self._cost(row) for rows in kept.values() for row in rows)
        if self.exact == "paper":
            return self.budget // least // len(kept)
        return _level([len(rows) for rows in kept.values()], self.budget // least) + 1

    def _order(
        self, label: int | str, rows: list[bytes], features: Tensor | None, most: int | None
    ) -> list[int]:
        q = len(rows) if most is None else min(most, len(rows))
        if self.selection == "random":
            return [int(i) for i in rng("exemplars", self.seed, label).permutation(len(rows))[:q]]
        if self.selection == "reservoir":  # a key by content: who came first does not matter
            keys = [hashlib.sha256(f"{self.seed}".encode() + row).digest() for row in rows]
            return sorted(range(len(rows)), key=keys.__getitem__)[:q]
        assert features is not None
        if not callable(self.selection):
            return [int(i) for i in herding(features, q)]
        order = [int(i) for i in self.selection(features, q)]
        if len(order) > q or len(set(order)) != len(order) or not all(0 <= i < len(rows) for i in order):
            refuse("selection", order, f"it must give up to {q} different indices below {len(rows)}")
        return order

    def _fit(self, kept: Mapping[int | str, list[bytes]]) -> dict[int | str, list[bytes]]:
        if self.budget is None or not kept:
            return dict(kept)
        costs = {label: [self._cost(row) for row in rows] for label, rows in kept.items()}
        left, level = self.budget, 0
        if self.exact == "paper":
            size = max((max(rows, default=0) for rows in costs.values()), default=0)
            level = self.budget // max(size, 1) // len(kept)
        else:
            while (row := [rows[level] for rows in costs.values() if len(rows) > level]) and sum(row) <= left:
                left, level = left - sum(row), level + 1
        if level < 1:
            need = sum(rows[0] for rows in costs.values() if rows)
            refuse("budget", self.budget, f"one row for each of {len(kept)} classes needs {need} bytes")
        out = {label: rows[:level] for label, rows in kept.items()}
        for label, rows in kept.items():
            if self.exact is None and len(rows) > level and costs[label][level] <= left:
                left -= costs[label][level]
                out[label] = rows[: level + 1]
        return out


def _level(counts: Sequence[int], places: int) -> int:
    level = 0
    while (width := sum(count > level for count in counts)) and width <= places:
        places, level = places - width, level + 1
    return level


def _bytes_of(budget: Budget | str | int | None) -> int | None:
    if budget is None:
        return None
    size = Budget.parse(budget).bytes if isinstance(budget, str | Budget) or budget > 0 else 0
    if size < 1:
        refuse("budget", budget, "give a positive number of bytes, or None for no limit")
    return size


def _quality(codec: str) -> int | None:
    kind, _, text = codec.partition(":")
    if kind == "jpeg" and text.isdigit() and 1 <= int(text) <= 100:
        return int(text)
    if codec not in ("raw", "png", "features:fp16"):
        refuse("codec", codec, 'use "raw", "png", "jpeg:Q" with Q from 1 to 100, or "features:fp16"')
    return None


def _array(X: Any) -> np.ndarray:
    return np.ascontiguousarray(X.detach().cpu().numpy() if isinstance(X, Tensor) else X)


def _labels(y: Any) -> list[int | str]:
    values = y.tolist() if hasattr(y, "tolist") else list(y)
    for value in values:
        if not isinstance(value, int | str | np.integer) or isinstance(value, bool):
            refuse("y", value, "labels are ints or strings")
    return [value if isinstance(value, str) else int(value) for value in values]


def _half(features: Tensor | None) -> np.ndarray:
    assert features is not None
    if features.abs().max() > torch.finfo(torch.float16).max:
        refuse("features", float(features.abs().max()), "float16 ends at 65504; scale them or use codec raw")
    return features.to(torch.float16).numpy()


def _bytes(content: bytes) -> Tensor:
    return (
        torch.frombuffer(bytearray(content), dtype=torch.uint8)
        if content
        else torch.zeros(0, dtype=torch.uint8)
    )
