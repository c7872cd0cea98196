"""The recipe of the reversible U-Net: what it measures, and that its claims are read from the right rows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from memspan.base import BadInput
from memspan.recipes import _unet3d_brains as brains
from memspan.recipes import _unet3d_cases as cases
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
    for turn in range(5):  # fewer equal ratios decide nothing
        load = 1.0 + turn  # another load in each round; ratios do not feel it
        for method, seconds in ((recipe.PLAIN, 1.0), (recipe.CHECKPOINT, 1.5), (recipe.OURS, 1.2)):
            rows.append(row(method, "speed", turn, load * seconds))
    for seed in range(5):
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
    for part in (*known.train, *known.valid, *known.test):
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


def scan(path: Path, values: np.ndarray, spacing: tuple[float, ...] = (1.0, 1.0, 1.0)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, np.diag([*spacing, 1.0])), str(path))


def decathlon(folder: Path, count: int = 6, name: str = "BRATS") -> None:
    """Four images a case in one file; tissue of label 3 inside 2 inside 1."""
    draw = np.random.default_rng(1)
    for case in range(count):
        labels = np.zeros((16, 16, 16), np.uint8)
        for label, side in ((1, 12), (2, 8), (3, 4)):
            labels[2 : 2 + side, 2 : 2 + side, 2 : 2 + side] = label
        images = (draw.random((16, 16, 16, 4)) * 9 + 40 * (labels[..., None] + 1)).astype(np.float32)
        scan(folder / "imagesTr" / f"{name}_{case:03}.nii.gz", images)
        scan(folder / "labelsTr" / f"{name}_{case:03}.nii.gz", labels)
    (folder / "labelsTr" / f"._{name}_000.nii.gz").write_bytes(b"left by another system")
    (folder / "dataset.json").write_text(json.dumps({"name": name}))


def test_scans_of_both_layouts_become_the_same_parts(tmp_path: Path) -> None:
    decathlon(tmp_path / "msd")
    for label in sorted((tmp_path / "msd" / "labelsTr").glob("BRATS*")):
        image = nib.load(str(tmp_path / "msd" / "imagesTr" / label.name))
        marked = np.asarray(nib.load(str(label)).dataobj)
        relabelled = np.array([0, 2, 1, 4], np.uint8)[marked]  # oedema, core, enhancing as BraTS numbers them
        case = tmp_path / "brats" / label.name.removesuffix(".nii.gz")
        for place, kind in enumerate(("a_flair", "b_t1", "c_t1ce", "d_t2")):
            scan(case / f"{kind}.nii.gz", np.asarray(image.dataobj)[..., place])
        scan(case / "z_seg.nii.gz", relabelled)
    msd, brats = (cases.load_cases(tmp_path / kind, 6) for kind in ("msd", "brats"))
    assert (len(msd.train), len(msd.valid), len(msd.test), msd.images) == (4, 1, 1, 4)
    assert msd.regions == brats.regions == ("whole tumour", "tumour core", "enhancing tumour")

    def parts(known: brains.Brains) -> list[tuple[bytes, bytes]]:
        every = (*known.train, *known.valid, *known.test)
        return sorted((p.x.numpy().tobytes(), p.y.numpy().tobytes()) for p in every)

    assert parts(msd) == parts(brats)
    part = msd.train[0]
    assert part.x.shape == (1, 4, 8, 8, 8)  # 2 mm
    assert [int(region.sum()) for region in part.y[0]] == [6**3, 4**3, 2**3]
    assert part.x[part.x != 0].std().item() == pytest.approx(1, abs=0.01)


def test_other_labels_nest_by_number_and_thick_slices_stay(tmp_path: Path) -> None:
    for case in range(3):
        labels = np.zeros((8, 8, 4), np.uint8)
        labels[:4], labels[:2] = 1, 2
        scan(tmp_path / "labelsTr" / f"{case}.nii.gz", labels, (1.0, 1.0, 5.0))
        scan(tmp_path / "imagesTr" / f"{case}.nii.gz", labels + np.float32(case + 1), (1.0, 1.0, 5.0))
    known = cases.load_cases(tmp_path, 24)
    assert known.regions == ("label 1 and above", "label 2 and above")
    assert known.train[0].y[0, :, :, 0, 0].tolist() == [[1, 1, 0, 0], [1, 0, 0, 0]]
    assert known.train[0].x.shape == (1, 1, 4, 4, 4)


def test_folders_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such folder"):
        cases.load_cases(tmp_path / "absent", 9)
    decathlon(tmp_path / "few", count=2)
    with pytest.raises(BadInput, match="2 labelled cases, at least 3"):
        cases.load_cases(tmp_path / "few", 9)
    decathlon(tmp_path / "odd", count=3)
    scan(tmp_path / "odd" / "labelsTr" / "BRATS_001.nii.gz", np.full((16, 16, 16), 7, np.uint8))
    with pytest.raises(BadInput, match=r"BRATS_001.*7"):
        cases.load_cases(tmp_path / "odd", 9)
    scan(tmp_path / "odd" / "labelsTr" / "BRATS_001.nii.gz", np.zeros((16, 16, 8), np.uint8))
    with pytest.raises(BadInput, match="differ"):
        cases.load_cases(tmp_path / "odd", 9)
    (tmp_path / "odd" / "imagesTr" / "BRATS_002.nii.gz").unlink()
    with pytest.raises(BadInput, match=r"BRATS_002.* no image"):
        cases.load_cases(tmp_path / "odd", 9)


@pytest.mark.slow
def test_a_run_trains_on_a_folder_of_scans_and_segments_one_of_them(tmp_path: Path) -> None:
    pytest.importorskip("monai")
    decathlon(tmp_path / "msd")
    volume = tmp_path / "msd" / "imagesTr" / "BRATS_000.nii.gz"
    assert recipe.RECIPE.tiny is not None
    options = replace(recipe.RECIPE.tiny, cases=tmp_path / "msd", volume=volume)
    finished = execute(recipe.RECIPE, options, seeds=1, out=tmp_path / "run")
    rows = Measurements(finished.result.measurements).where(part="training")
    assert recipe.COPY not in rows.methods
    assert rows.where(method=recipe.EMPTY).values("dice") == [0.0]
    assert nib.load(str(tmp_path / "run" / "BRATS_000_mask.nii.gz")).shape == (16, 16, 16)
    with pytest.raises(BadInput, match="1 images, training has 4"):
        scan(tmp_path / "one.nii.gz", np.ones((8, 8, 8), np.float32))
        execute(recipe.RECIPE, replace(options, volume=tmp_path / "one.nii.gz"), seeds=1, out=tmp_path / "no")


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
    finished = execute(recipe.RECIPE, options, seeds=1, out=tmp_path / "run")
    found = Measurements(finished.result.measurements)
    assert len(found.where(part="training")) == 5
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
