"""The one reader of pictures, against what a person sees in a viewer."""

from __future__ import annotations

import io
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memspan import data
from memspan.base import BadInput
from memspan.base.files import CorruptFile
from memspan.data.pictures import read_picture

Image = pytest.importorskip("PIL.Image")
RAMP = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40


def encoded(image: Any, form: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_by_their_range_and_not_cut(form: str) -> None:
    image = Image.fromarray(RAMP.astype(np.uint16) * 257)
    picture = read_picture(encoded(image, form))
    assert (picture.values == RAMP).all()
    assert picture.done == ("16 bits scaled to 8",)


def test_big_endian_sixteen_bits_read_as_little_endian_ones() -> None:
    header = b"P5 3 2 65535\n" + (RAMP.astype(">u2") * 257).tobytes()
    assert (read_picture(header).values == RAMP).all()


def test_floats_in_one_are_scaled_and_other_floats_refused() -> None:
    unit = Image.fromarray((RAMP / 255).astype(np.float32))
    assert (read_picture(encoded(unit, "TIFF")).values == RAMP).all()
    for worse in (RAMP.astype(np.float32), RAMP / np.float32(255) - 0.1, np.full((2, 2), np.nan, np.float32)):
        with pytest.raises(BadInput, match=r"0\.\.1"):
            read_picture(encoded(Image.fromarray(worse), "TIFF"))


def test_integers_without_a_range_are_refused() -> None:
    with pytest.raises(BadInput, match="range"):
        read_picture(encoded(Image.fromarray(RAMP.astype(np.int32)), "TIFF"))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_a_picture_is_turned_as_its_file_says(orientation: int, form: str) -> None:
    upright = np.zeros((16, 24), np.uint8)
    upright[:8, :8] = 255  # white at the top left, wherever the camera was held
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.T,
        6: lambda a: np.rot90(a),
        7: lambda a: a[::-1, ::-1].T,
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    more = {"quality": 100} | ({"lossless": True} if form == "WEBP" else {})
    content = encoded(Image.fromarray(np.ascontiguousarray(undo(upright))), form, exif=exif, **more)
    picture = read_picture(content)
    grey = picture.values if picture.values.ndim == 2 else picture.values[..., 0]
    assert grey.shape == upright.shape
    assert np.abs(grey.astype(int) - upright).max() < 8
    assert ("turned as EXIF says" in picture.done) == (orientation != 1)


def test_palettes_give_their_colours_and_transparency_is_laid_on_white() -> None:
    palette = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    colours = [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    assert read_picture(encoded(palette)).values.tolist() == [colours]
    clear = read_picture(encoded(palette, transparency=1))
    assert clear.values.tolist() == [[colours[0], [255, 255, 255], colours[2]]]
    assert clear.done == ("laid on white",)
    both = np.zeros((1, 2, 4), np.uint8)
    both[0, 0] = [9, 8, 7, 255]
    assert read_picture(encoded(Image.fromarray(both))).values.tolist() == [[[9, 8, 7], [255, 255, 255]]]
    opaque = read_picture(encoded(Image.fromarray(both[:, :1])))
    assert (opaque.values.tolist(), opaque.done) == ([[[9, 8, 7]]], ())
    grey = Image.fromarray(np.array([[[7, 255], [7, 0]]], np.uint8), "LA")
    assert read_picture(encoded(grey)).values.tolist() == [[7, 255]]


def test_one_bit_and_print_colours() -> None:
    assert read_picture(encoded(Image.fromarray(RAMP > 90))).values.tolist() == [[0, 0, 0], [255, 255, 255]]
    white = read_picture(encoded(Image.new("CMYK", (4, 4), (0, 0, 0, 0)), "JPEG"))
    assert white.values.min() > 250
    assert white.done == ("CMYK as RGB",)


@pytest.mark.parametrize("form", ["GIF", "TIFF", "WEBP"])
def test_several_frames_are_refused(form: str) -> None:
    frames = [Image.fromarray(RAMP), Image.fromarray(255 - RAMP)]
    with pytest.raises(BadInput, match="2 frames"):
        read_picture(encoded(frames[0], form, save_all=True, append_images=frames[1:]))


def test_damage_is_told_from_absence(tmp_path: Path) -> None:
    whole = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)))
    for content in (
        whole[:-400],
        whole[:40],
        b"",
        b"no picture",
        whole[:60] + zlib.compress(b"x") + whole[90:],
    ):
        with pytest.raises(CorruptFile):
            read_picture(content)
    with pytest.raises(BadInput, match="no such file"):
        read_picture(tmp_path / "absent.png")


def _folder(path: Path) -> Path:
    for label in "ab":
        (path / label).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(RAMP).save(path / label / f"{i}.png")
    return path


def test_a_folder_tells_what_was_done_and_counts_what_is_broken(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "mine")
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(folder / "a" / "deep.png")
    images = data.read(folder)
    assert "1 16 bits scaled to 8" in images.source
    assert all((image == RAMP).all() for image in (*images.x_train, *images.x_test))
    (folder / "b" / "1.png").write_bytes(b"torn")
    (folder / "b" / "2.png").write_bytes(b"")
    with pytest.raises(CorruptFile, match=r"2 of 9 pictures .*1\.png.*skip_broken=True"):
        data.read(folder)
    fewer = data.read(folder, skip_broken=True)
    assert len(fewer.x_train) + len(fewer.x_test) == 7
    assert "2 left out" in fewer.source


def test_a_folder_with_nothing_that_can_be_read_is_refused(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "mine")
    for file in folder.rglob("*.png"):
        file.write_bytes(b"torn")
    with pytest.raises(CorruptFile, match="8 of 8"):
        data.read(folder, skip_broken=True)
