"""NIfTI in and out: whatever the file's orientation, arrays are upright and masks lie on their images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memspan.base import BadInput
from memspan.data.volumes import Volume, read_volume, write_volume

nib = pytest.importorskip("nibabel")


def stored(path: Path, values: np.ndarray, affine: np.ndarray) -> Path:
    nib.save(nib.Nifti1Image(values, affine), str(path))
    return path


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    order=st.permutations([0, 1, 2]), flips=st.lists(st.sampled_from([-1, 1]), min_size=3, max_size=3),
    sizes=st.lists(st.sampled_from([0.5, 1.0, 2.5]), min_size=3, max_size=3),
)  # fmt: skip
def test_any_orientation_is_read_upright_and_written_back_as_it_was(
    tmp_path: Path, order: list[int], flips: list[int], sizes: list[float]
) -> None:
    values = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, world in enumerate(order):
        affine[world, axis] = flips[axis] * sizes[axis]
    affine[:3, 3] = (5, -7, 9)
    path = stored(tmp_path / "a.nii.gz", values, affine)
    volume = read_volume(path)
    expected = nib.as_closest_canonical(nib.load(str(path)))
    assert np.array_equal(volume.values, np.asarray(expected.dataobj))
    assert volume.spacing == pytest.approx(expected.header.get_zooms())
    write_volume(tmp_path / "b.nii.gz", volume.values.astype(np.int16), volume)
    back = nib.load(str(tmp_path / "b.nii.gz"))
    assert np.array_equal(np.asarray(back.dataobj), values)
    assert np.allclose(back.affine, affine)
    assert back.get_data_dtype() == np.int16


def test_modalities_stay_last(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((2, 3, 4, 2)).astype(np.float32)
    volume = read_volume(stored(tmp_path / "m.nii", values, np.diag([-1.0, 1, 1, 1])))
    assert np.array_equal(volume.values, values[::-1])


def test_what_is_no_volume_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such file"):
        read_volume(tmp_path / "absent.nii.gz")
    (tmp_path / "text.nii.gz").write_text("not a volume")
    with pytest.raises(BadInput, match="cannot be read as NIfTI"):
        read_volume(tmp_path / "text.nii.gz")
    holes = np.full((2, 2, 2), np.nan, np.float32)
    with pytest.raises(BadInput, match="not finite"):
        read_volume(stored(tmp_path / "nan.nii", holes, np.eye(4)))
    with pytest.raises(BadInput, match=r"give \(X, Y, Z"):
        read_volume(stored(tmp_path / "flat.nii", np.zeros((2, 2), np.float32), np.eye(4)))
    like = Volume(np.zeros((2, 2, 2), np.float32), np.eye(4), (2, 2, 2))
    with pytest.raises(BadInput, match="has shape"):
        write_volume(tmp_path / "x.nii", np.zeros((2, 2, 3)), like)
    with pytest.raises(BadInput, match="end it in"):
        write_volume(tmp_path / "x.img", np.zeros((2, 2, 2)), like)
