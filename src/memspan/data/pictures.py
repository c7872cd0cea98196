"""Pictures from files: the one reader of whatever cameras, scanners and drawing programs write.

A converter that only asks for "RGB" turns 16-bit and float pictures white or black, ignores the turn that a
phone wrote beside the pixels, and shows what was meant to be transparent. This one turns a picture as its
file says, scales by the range of its mode and not by its content, or refuses; and tells what it did.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from memspan.base import optional, refuse
from memspan.base.files import CorruptFile

__all__ = ["IMAGE_ENDINGS", "Picture", "read_picture"]

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff")
_ORIENTATION = 274  # EXIF's tag


class Picture(NamedTuple):
    """A decoded picture.

    Attributes:
        values: uint8 ``(H, W)`` for grey pictures, else ``(H, W, 3)``, upright.
        done: what was changed on the way, in words: ``("16 bits scaled to 8", "turned as EXIF says")``.
    """

    values: NDArray[np.uint8]
    done: tuple[str, ...]


def read_picture(file: str | Path | bytes) -> Picture:
    """Decode one picture as it is meant to be seen.

    Args:
        file: a path, or the file's content. Grey, palette, RGB, CMYK, YCbCr and HSV pictures of 8 bits;
            16-bit grey ones, scaled from 0..65535; float ones with values in 0..1. Transparent pixels are
            laid on white.

    Raises:
        BadInput: several frames, 32-bit integers, floats outside 0..1, or another mode that has no range.
        CorruptFile: truncated, altered, or no picture at all.
        ImportError: Pillow is not installed (extra ``recipes``).

    Example:
        >>> from PIL import Image
        >>> content = io.BytesIO()
        >>> Image.fromarray(np.array([[0, 257, 65535]], np.uint16)).save(content, "PNG")
        >>> read_picture(content.getvalue())
        Picture(values=array([[  0,   1, 255]], dtype=uint8), done=('16 bits scaled to 8',))
    """
    pillow = optional("PIL.Image", extra="recipes")
    name = f"a picture of {len(file)} bytes" if isinstance(file, bytes) else str(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pillow.DecompressionBombWarning)
            with pillow.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
                return _decoded(pillow, image, name)
    except FileNotFoundError:
        refuse("file", name, "there is no such file")
    except (pillow.DecompressionBombError, pillow.DecompressionBombWarning) as error:
        refuse("file", name, f"{error}; scale it down first")
    except pillow.UnidentifiedImageError as error:
        raise CorruptFile(f"{name} is not a picture that Pillow knows: remove or replace it") from error
    except (OSError, SyntaxError, EOFError, IndexError, KeyError) as error:
        raise CorruptFile(
            f"{name} is truncated or altered ({error}): replace it with a whole copy"
        ) from error


def _decoded(pillow: Any, image: Any, name: str) -> Picture:
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a phone's JPEG carries small copies of the same picture behind
        refuse("file", name, f"it holds {frames} frames; save the one that is meant as a file of its own")
    done = []
    turned = image.getexif().get(_ORIENTATION, 1) in range(2, 9)  # asked before: TIFFs are turned by loading
    image.load()
    if turned:
        image = optional("PIL.ImageOps", extra="recipes").exif_transpose(image)
        done.append("turned as EXIF says")
    mode = image.mode
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getextrema()[3] != (255, 255):
            paper = pillow.new("RGBA", image.size, (255, 255, 255, 255))
            image = pillow.alpha_composite(paper, image)
            done.append("laid on white")
        image = image.convert("L" if mode == "LA" else "RGB")
    elif mode.startswith("I;16") or (mode == "I" and image.format in ("PNG", "PPM")):
        values = np.asarray(image).astype(np.int64)
        image = ((values * 255 + 32767) // 65535).astype(np.uint8)
        done.append("16 bits scaled to 8")
    elif mode == "F":
        values = np.asarray(image)
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            seen = f"values from {values.min():g} to {values.max():g}"
            refuse(
                "file", name, f"float pictures have values in 0..1, this one {seen}; scale and save it anew"
            )
        image = np.rint(values * 255).astype(np.uint8)
        done.append("floats scaled to 8 bits")
    elif mode in ("1", "L"):
        image = image.convert("L")
    elif mode in ("P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"):
        grey = mode == "P" and image.palette is not None and image.palette.mode == "L"
        image = image.convert("L" if grey else "RGB")
        if mode not in ("P", "RGB", "RGBX"):
            done.append(f"{mode} as RGB")
    else:
        refuse(
            "file", name, f"mode {mode} has no range that says what is white; save it as 8-bit RGB or grey"
        )
    return Picture(np.asarray(image, dtype=np.uint8), tuple(done))
