"""Brains for the recipe ``unet3d``: real T1 volumes at 2 mm, cut in parts for training, choice and test.

The same shape serves labelled scans of a user's own (:mod:`memspan.recipes._unet3d_cases`).

Colin27 (one person) with AAL's regions and ICBM152 (an average of 152) lie in one space, so that AAL's
regions can score both. Where Colin27 is not at hand, ICBM152 with its tissue maps serves alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from memspan import data
from memspan.data.volumes import read_volume
from memspan.models.unet3d import nested_regions

__all__ = ["Brains", "Part", "load_brains", "normalised", "padded", "shrunk"]

Array = NDArray[Any]
SPACING = 2.0  # millimetres
MULTIPLE = 4  # of all sides: three levels


@dataclass(frozen=True)
class Part:
    """A piece of a brain: ``x`` (1, C, D, H, W), ``y`` (1, R, D, H, W)."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Brains:
    """What is trained on, chosen by, and tested on, with the names of the nested regions."""

    train: tuple[Part, ...]
    valid: tuple[Part, ...]
    test: tuple[Part, ...]
    regions: tuple[str, ...]
    sets: tuple[data.FileSet, ...]
    note: str

    @property
    def images(self) -> int:
        """Images of a scan, the channels of the network's input."""
        return self.train[0].x.shape[1]


def load_brains(name: str) -> Brains:
    """``"colin27"``, ``"mni152"``, or ``"first"`` of them that is there."""
    sets = ("colin27", "mni152") if name == "first" else (name,)
    found = data.load_first(sets, data.FileSet)
    return _colin(found) if found.name == "colin27" else _average(found)


def normalised(values: Array) -> Tensor:
    """(D, H, W) to mean 0 and deviation 1 where there is brain (above 0), 0 elsewhere."""
    volume = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    inside = volume > 0
    brain = volume[inside]
    return torch.where(inside, (volume - brain.mean()) / brain.std().clamp(min=1e-6), 0.0)


def _colin(colin: data.FileSet) -> Brains:
    icbm = data.load("mni152", data.FileSet)
    t1, labels = (read_volume(colin[key]).values for key in ("t1", "labels"))
    average = read_volume(icbm["t1"]).values[8:189, 9:226, 1:182]  # on Colin27's grid, voxel by voxel
    codes = _codes(colin["names"].read_text("utf-8"))
    known = codes[labels.astype(np.int64)]
    kinds = np.zeros(known.shape, np.int64)
    limbic = (known >= 4101) & (known <= 4202)
    deep = (known >= 7001) & (known <= 7102)
    striatum = np.isin(known, (7001, 7002, 7011, 7012))
    for kind, where in ((1, (t1 > 0) | (known > 0)), (2, limbic | deep), (3, striatum)):
        kinds[where] = kind
    here = kinds.copy()
    here[(average > 0) & (here == 0)] = 1
    here[(average == 0) & (here == 1)] = 0
    left, right = slice(0, 90), slice(180, 90, -1)  # the midline is voxel 90; the right one is mirrored
    return Brains(
        train=(_part(t1[left], kinds[left], 3),),
        valid=(_part(t1[right], kinds[right], 3),),
        test=(_part(average[left], here[left], 3),),
        regions=("brain", "deep grey and limbic", "striatum"),
        sets=(colin, icbm),
        note="Trained on one brain's left hemisphere, tested on an average brain: two brains tell whether "
        "methods are equal, not how well a clinic would be served. Both lie in one template space, so that "
        "copying the training masks is a strong rival; the regions of the test are those drawn on the first.",
    )


def _average(icbm: data.FileSet) -> Brains:
    t1, grey, white = (read_volume(icbm[key]).values[8:98, 9:225, 1:181] for key in ("t1", "gm", "wm"))
    kinds = np.zeros(t1.shape, np.int64)
    for kind, where in ((1, t1 > 0), (2, grey + white > 127), (3, white > 127)):
        kinds[where] = kind
    back, middle, front = (slice(start, start + 72) for start in (0, 72, 144))
    return Brains(
        train=(_part(t1[:, back], kinds[:, back], 3),),
        valid=(_part(t1[:, middle], kinds[:, middle], 3),),
        test=(_part(t1[:, front], kinds[:, front], 3),),
        regions=("brain", "grey and white matter", "white matter"),
        sets=(icbm,),
        note="One average brain alone: trained on the back third of its left hemisphere, tested on the front "
        "third (its hemispheres mirror each other). It tells whether methods are equal, nothing more.",
    )


def shrunk(values: Tensor, block: int | tuple[int, int, int]) -> Tensor:
    """(D, H, W) averaged over blocks and normalised, (1, 1, d, h, w)."""
    small = F.avg_pool3d(values.float()[None, None], block)
    return normalised(small[0, 0].numpy())[None, None]


def padded(x: Tensor, maps: Tensor) -> Part:
    """Both padded to multiples; a region holds a voxel if it holds more than half of it."""
    missing = [(0, -side % MULTIPLE) for side in reversed(x.shape[2:])]
    pad = [end for pair in missing for end in pair]
    return Part(F.pad(x, pad), F.pad((maps > 0.5).float(), pad))


def _part(t1: Array, kinds: Array, regions: int) -> Part:
    """At 2 mm, from volumes at 1 mm."""
    groups: Sequence[set[int]] = [set(range(first, regions + 1)) for first in range(1, regions + 1)]
    maps = F.avg_pool3d(nested_regions(torch.from_numpy(kinds.copy())[None], groups), 2)
    return padded(shrunk(torch.from_numpy(np.ascontiguousarray(t1, dtype=np.float32)), 2), maps)


def _codes(text: str) -> Array:
    """AAL's code of each label; 0 stays 0."""
    table: Mapping[int, int] = {
        int(r[0]): int(r[2]) for r in map(str.split, text.splitlines()) if len(r) == 3
    }
    codes = np.zeros(256, np.int64)
    for label, code in table.items():
        codes[label] = code
    return codes
