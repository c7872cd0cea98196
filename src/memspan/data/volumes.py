"""NIfTI volumes in and out, in one orientation: axes run to the right, to the front and up.

Scanners store axes in any order and direction. A volume is turned on reading and turned back on writing, so
that what works on arrays needs to know nothing of it, and a mask lies on its image in every viewer.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memspan.base import optional, refuse
from memspan.base.files import atomic_write

__all__ = ["Volume", "read_volume", "write_volume"]


@dataclass(frozen=True)
class Volume:
    """A volume with its place in the world.

    Attributes:
        values: float32 ``(X, Y, Z)`` or ``(X, Y, Z, modalities)``; X to the right, Y to the front, Z up.
        affine: (4, 4), voxel to world millimetres, as in the file.
        shape: spatial shape in the file.
    """

    values: NDArray[np.float32]
    affine: NDArray[np.float64]
    shape: tuple[int, ...]

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Millimetres of a voxel along X, Y and Z."""
        turns = _turns(self.affine)
        sizes = np.sqrt((self.affine[:3, :3] ** 2).sum(0))
        ordered = [float(sizes[int(np.flatnonzero(turns[:, 0] == axis)[0])]) for axis in range(3)]
        return ordered[0], ordered[1], ordered[2]


def read_volume(path: str | os.PathLike[str]) -> Volume:
    """Read a NIfTI file (``.nii``, ``.nii.gz``).

    Raises:
        BadInput: no such file, not NIfTI, fewer than three dimensions, or values that are not finite.
        ImportError: nibabel is not installed (extra ``volumes``).

    Example:
        >>> path = Path(tempfile.mkdtemp()) / "small.nii.gz"
        >>> before = Volume(np.ones((2, 3, 4), np.float32), np.diag([-2.0, 2.0, 2.0, 1.0]), (2, 3, 4))
        >>> write_volume(path, before.values, before)
        >>> after = read_volume(path)
        >>> after.values.shape, after.spacing
        ((2, 3, 4), (2.0, 2.0, 2.0))
    """
    nib = optional("nibabel", extra="volumes")
    if not Path(path).is_file():
        refuse("path", str(path), "no such file; give a .nii or .nii.gz file")
    try:
        image = nib.load(str(path))
        stored = np.asarray(image.dataobj, dtype=np.float32)
    except (nib.filebasedimages.ImageFileError, OSError, EOFError, ValueError) as error:
        refuse("path", str(path), f"cannot be read as NIfTI ({error})")
    affine = getattr(image, "affine", None)
    if affine is None or stored.ndim not in (3, 4) or not stored.size:
        refuse("path", str(path), f"it holds an array of shape {stored.shape}; give (X, Y, Z[, modalities])")
    if not np.isfinite(stored).all():
        refuse("path", str(path), "it holds values that are not finite; replace them first")
    turned = nib.orientations.apply_orientation(stored, _turns(affine))
    return Volume(np.ascontiguousarray(turned), np.asarray(affine, dtype=np.float64), stored.shape[:3])


def write_volume(path: str | os.PathLike[str], values: NDArray[Any], like: Volume) -> None:
    """Write values in the place and orientation of the file that ``like`` was read from; whole or not at all.

    Args:
        path: ends in ``.nii`` or ``.nii.gz``.
        values: ``(X, Y, Z)`` in the orientation of ``like.values``; the dtype is kept.
        like: gives the affine.

    Raises:
        BadInput: another shape or ending.
        ImportError: nibabel is not installed (extra ``volumes``).
    """
    nib = optional("nibabel", extra="volumes")
    if not str(path).endswith((".nii", ".nii.gz")):
        refuse("path", str(path), "end it in .nii or .nii.gz")
    if values.shape != like.values.shape[:3]:
        refuse("values", values.shape, f"the volume has shape {like.values.shape[:3]}")
    upright = np.array([[0, 1], [1, 1], [2, 1]])
    back = nib.orientations.ornt_transform(upright, _turns(like.affine))
    stored = nib.orientations.apply_orientation(values, back)
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / ("draft.nii.gz" if str(path).endswith(".gz") else "draft.nii")
        nib.save(nib.Nifti1Image(stored, like.affine), str(draft))
        atomic_write(path, draft.read_bytes())


def _turns(affine: NDArray[np.float64]) -> NDArray[Any]:
    nib = optional("nibabel", extra="volumes")
    turns: NDArray[Any] = nib.orientations.io_orientation(affine)
    if np.isnan(turns).any():
        refuse("affine", affine.tolist(), "an axis has no direction; repair the file's header")
    return turns
