"""Labelled scans for the recipe ``unet3d`` from a folder: the Decathlon's layout, BraTS's, or a user's own.

Each case is brought to about 2 mm by averaging whole blocks of voxels. Some cases train, some choose, some
test; which, is drawn once from their names, so that all methods and seeds see the same.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from memspan.base import refuse
from memspan.base.rng import rng
from memspan.data import FileSet
from memspan.data.sets import content_sha256
from memspan.data.volumes import Volume, read_volume
from memspan.models.unet3d import nested_regions
from memspan.recipes._unet3d_brains import SPACING, Brains, Part, padded, shrunk

__all__ = ["load_cases"]

LAYOUTS = (
    "give a folder with imagesTr, labelsTr and dataset.json (Medical Segmentation Decathlon), or with one "
    "folder a case that holds *_seg.nii.gz and the images (BraTS)"
)
# Whole tumour, tumour core, enhancing tumour: the two families of files number the tissues in other ways.
TUMOUR = ("whole tumour", "tumour core", "enhancing tumour")
DECATHLON_TUMOUR: tuple[set[int], ...] = ({1, 2, 3}, {2, 3}, {3})
BRATS_TUMOUR: tuple[set[int], ...] = ({1, 2, 3, 4}, {1, 3, 4}, {3, 4})  # 4 until 2023, 3 since


@dataclass(frozen=True)
class Case:
    """Files of one scan."""

    name: str
    images: tuple[Path, ...]
    labels: Path


def load_cases(folder: Path, limit: int) -> Brains:
    """Scans and regions of a folder; about a sixth of them choose, and as many test.

    Args:
        folder: in one of the two layouts. Tumours have BraTS's nested regions; other labels 1 to R become the
            nested regions "label 1 and above", "label 2 and above" and so on.
        limit: how many cases are taken at most.

    Raises:
        BadInput: another layout, fewer than three cases, cases of unequal channels, images and labels of
            unequal shapes, labels outside the regions.
    """
    cases, groups, names = _decathlon(folder) if (folder / "labelsTr").is_dir() else _brats(folder)
    if len(cases) < 3:
        refuse(
            "cases", str(folder), f"it holds {len(cases)} labelled cases, at least 3 are needed; {LAYOUTS}"
        )
    order = rng("unet3d.cases", 0).permutation(len(cases))[:limit]
    taken = [cases[int(place)] for place in order]
    if not groups:
        top = max(int(read_volume(case.labels).values.max()) for case in taken)
        groups = tuple(set(range(first, top + 1)) for first in range(1, top + 1))
        names = tuple(f"label {first} and above" for first in range(1, top + 1))
    parts = [_part(case, groups) for case in taken]
    widths = {part.x.shape[1] for part in parts}
    if len(widths) > 1:
        refuse("cases", str(folder), f"its cases have {sorted(widths)} images each; give one number")
    held = max(1, len(parts) // 6)
    files = {path.relative_to(folder).as_posix(): path for c in taken for path in (*c.images, c.labels)}
    found = FileSet(
        name=str(folder), source=f"folder of {len(taken)} cases", sha256=content_sha256(files), licence="",
        files=files, folder=folder,
    )  # fmt: skip
    return Brains(
        train=tuple(parts[2 * held :]),
        valid=tuple(parts[:held]),
        test=tuple(parts[held : 2 * held]),
        regions=names,
        sets=(found,),
        note=f"{len(parts) - 2 * held} cases train, {held} choose and {held} test, by a fixed draw.",
    )


def _decathlon(folder: Path) -> tuple[list[Case], tuple[set[int], ...], tuple[str, ...]]:
    labels = [path for path in sorted((folder / "labelsTr").glob("*.nii*")) if not path.name.startswith(".")]
    cases = []
    for path in labels:
        image = folder / "imagesTr" / path.name
        if not image.is_file():
            refuse("cases", str(folder), f"{path.name} has no image in imagesTr")
        cases.append(Case(path.name, (image,), path))
    about = folder / "dataset.json"
    try:
        told = json.loads(about.read_text("utf-8")) if about.is_file() else {}
    except ValueError as error:
        refuse("cases", str(about), f"it is no JSON ({error})")
    tumour = isinstance(told, dict) and str(told.get("name", "")).upper() == "BRATS"
    return (cases, DECATHLON_TUMOUR, TUMOUR) if tumour else (cases, (), ())


def _brats(folder: Path) -> tuple[list[Case], tuple[set[int], ...], tuple[str, ...]]:
    if not folder.is_dir():
        refuse("cases", str(folder), f"no such folder; {LAYOUTS}")
    cases = []
    for labels in sorted(folder.rglob("*seg.nii*")):
        images = tuple(path for path in sorted(labels.parent.glob("*.nii*")) if path != labels)
        if not images:
            refuse("cases", str(labels.parent), "it holds labels and no image")
        cases.append(Case(labels.parent.name, images, labels))
    return cases, BRATS_TUMOUR, TUMOUR


def _part(case: Case, groups: Sequence[Collection[int]]) -> Part:
    marked = read_volume(case.labels)
    volumes = [read_volume(path) for path in case.images]
    for volume in volumes:
        if volume.values.shape[:3] != marked.values.shape[:3] or marked.values.ndim != 3:
            refuse("cases", case.name, f"image {volume.values.shape} and labels {marked.values.shape} differ")
    channels = [one for volume in volumes for one in _channels(volume)]
    labels = np.rint(marked.values).astype(np.int64)
    known = {0, *groups[0]}
    if not set(np.unique(labels).tolist()) <= known:
        refuse("cases", case.name, f"labels {np.unique(labels).tolist()}; known are {sorted(known)}")
    block = _block(marked)
    x = torch.cat([shrunk(torch.from_numpy(channel.copy()), block) for channel in channels], 1)
    maps = F.avg_pool3d(nested_regions(torch.from_numpy(labels)[None], groups), block)
    return padded(x, maps)


def _channels(volume: Volume) -> list[NDArray[np.float32]]:
    values = volume.values
    return [values] if values.ndim == 3 else [values[..., place] for place in range(values.shape[3])]


def _block(volume: Volume) -> tuple[int, int, int]:
    """Voxels along each axis that make about 2 mm."""
    a, b, c = (max(1, round(SPACING / mm)) for mm in volume.spacing)
    return a, b, c
