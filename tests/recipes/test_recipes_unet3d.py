"""The recipe of the reversible U-Net: what it measures, and that its claims are read from the right rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from memspan.base import BadInput
from memspan.recipes import _unet3d_brains as brains
from memspan.recipes import _unet3d_show as show
from memspan.recipes import unet3d as recipe
from memspan.recipes.engine import Measurements, execute
from memspan.report.schema import Measurement

nib = pytest.importorskip("nibabel")
pytest.importorskip("nilearn")


def row(
    method: str, part: str, seed: int = 0, seconds: float | None = None,
    quality: dict[str, float] | None = None, **setting: str | int,
) -> Measurement:  # fmt: skip
    return Measurement(
        method=method, seed=seed, setting={"part": part, **setting}, quality=quality or {},
        bytes={"parameters": 1}, seconds={} if seconds is None else {"step": seconds},
    )  # fmt: skip


def test_claims_read_peaks_ratios_inside_rounds_and_differences_inside_seeds() -> None:
    rows = []
    for depth, plain, ours in ((1, 80, 20), (4, 320, 24)):
        rows.append(row(recipe.PLAIN, "bytes", depth=depth, quality={"peak_bytes": plain}))
        rows.append(row(recipe.OURS, "bytes", depth=depth, quality={"peak_bytes": ours}))
    for grow, ratio in (("volume", 3.0), ("depth", 8.0), ("channels", 1.5)):
        rows.append(row(recipe.OURS, "budget", grow=grow, quality={"ratio": ratio}))
    for turn in range(4):
        load = 1.0 + turn  # another load in each round; ratios do not feel it
        for method, seconds in ((recipe.PLAIN, 1.0), (recipe.CHECKPOINT, 1.5), (recipe.OURS, 1.2)):
            rows.append(row(method, "speed", turn, load * seconds))
    for seed in range(3):
        rows.append(row(recipe.PLAIN, "training", seed, quality={"dice": 0.1 * seed}))
        rows.append(row(recipe.OURS, "training", seed, quality={"dice": 0.1 * seed + 0.03}))
    claims = recipe.judge(Measurements(rows), recipe.Options())

    def told(part: str) -> tuple[float | None, bool | None]:
        (found,) = [claim for claim in claims if part in claim.text]
        return found.measured, found.holds

    assert told("at depth 1") == (4.0, True)
    assert told("at depth 4") == (pytest.approx(40 / 3), True)
    assert told("grows with depth") == (pytest.approx(100 * 4 / 240), True)
    assert told("the volume") == (3.0, True)
    assert told("times the depth") == (8.0, True)
    assert told("the channels") == (1.5, False)
    assert told("Mean Dice") == (pytest.approx(0.03), False)
    assert told("the plain one") == (pytest.approx(1.2), True)
    assert told("torch.utils.checkpoint") == (pytest.approx(0.8), True)


def test_brains_of_the_package_have_nested_regions_and_multiples_for_sides() -> None:
    known = brains.load_brains("mni152")
    assert [dataset.name for dataset in known.sets] == ["mni152"]
    for part in (known.train, known.valid, known.test):
        assert part.x.shape[2:] == part.y.shape[2:]
        assert all(side % brains.MULTIPLE == 0 for side in part.x.shape[2:])
        assert bool((part.y[:, 1:] <= part.y[:, :-1]).all())
        inside = part.x[part.x != 0]
        assert abs(float(inside.mean())) < 1e-3
        assert float(part.y.mean()) > 0.01


def test_masks_survive_their_way_into_a_result_and_out() -> None:
    maps = (torch.rand(1, 3, 6, 8, 4) > torch.tensor([0.2, 0.5, 0.8]).view(1, 3, 1, 1, 1)).float().cumprod(1)
    part = brains.Part(torch.randn(1, 1, 6, 8, 4), maps)
    series = show.packed(part, maps)
    at = int(maps[0, -1].sum((0, 1)).argmax())
    assert np.array_equal(show._unpacked(series["slice.truth"]), maps[0, :, :, :, at].sum(0).numpy())
    assert series["slice.mask"] == series["slice.truth"]
    one = Measurement(
        method="a", seed=0, setting={}, quality={"dice": 1.0}, bytes={}, seconds={}, series=series
    )
    (figure,) = show.slices(Measurements([one, one]))
    assert [picture.shape for picture in figure.rows[""]] == [(8, 6, 3)] * 4


@pytest.mark.slow
def test_distances_are_millimetres_and_left_out_where_a_region_is_missed() -> None:
    pytest.importorskip("monai")
    truth = torch.zeros(1, 2, 8, 8, 8)
    truth[:, :, 2:5, 2:5, 2:5] = 1
    assert show.hausdorff_95(truth.roll(1, 2), truth) == {"hd95_mm": pytest.approx(brains.SPACING)}
    assert show.hausdorff_95(torch.zeros_like(truth), truth) == {}


@pytest.mark.slow
def test_a_run_trains_measures_and_segments_a_volume_in_its_own_orientation(tmp_path: Path) -> None:
    pytest.importorskip("monai")
    affine = np.diag([-3.0, 2.0, 2.0, 1.0])
    values = np.random.default_rng(0).integers(0, 200, (14, 20, 18)).astype(np.uint8)
    nib.save(nib.Nifti1Image(values, affine), str(tmp_path / "mine.nii.gz"))
    assert recipe.RECIPE.tiny is not None
    options = replace(recipe.RECIPE.tiny, rounds=2, grow=True, peers=True, volume=tmp_path / "mine.nii.gz")
    finished = execute(recipe.RECIPE, options, seeds=2, out=tmp_path / "run")
    found = Measurements(finished.result.measurements)
    assert len(found.where(part="training")) == 2 * 5
    assert len(found.where(part="bytes", depth=2)) == 3
    assert len(found.where(part="speed")) == 2 * 5
    assert [len(found.where(part="budget", grow=grow)) for grow in recipe.CAPS] == [1, 1, 1]
    mask = nib.load(str(tmp_path / "run" / "mine_mask.nii.gz"))
    assert mask.shape == values.shape
    assert np.allclose(mask.affine, affine)
    assert set(np.unique(np.asarray(mask.dataobj))) <= {0, 1, 2, 3}
    assert finished.report is not None
    page = finished.report.read_text()
    assert "Masks over a slice" in page
    assert "mine_mask.nii.gz" in page
    ours, plain = (found.where(part="training", method=m, seed=0)[0] for m in (recipe.OURS, recipe.PLAIN))
    assert ours.bytes["saved_activations"] < plain.bytes["saved_activations"]


def test_a_bad_volume_or_size_is_refused_before_any_work(tmp_path: Path) -> None:
    assert recipe.RECIPE.tiny is not None
    for wrong, told in (
        ({"volume": tmp_path / "absent.nii.gz"}, "no such file"),
        ({"crop": 10}, "multiple of 4"),
        ({"channels": (4, 8)}, "three widths"),
    ):
        with pytest.raises(BadInput, match=told):
            execute(recipe.RECIPE, replace(recipe.RECIPE.tiny, **wrong), seeds=1, out=tmp_path / told)
