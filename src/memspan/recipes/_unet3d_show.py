"""Beside the recipe ``unet3d``: MONAI's networks, masks over slices, and a user's own volume."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from memspan.base import optional
from memspan.data.volumes import Volume, write_volume
from memspan.nn.surgery import find_blocks
from memspan.recipes._unet3d_brains import SPACING, Part, normalised
from memspan.recipes.engine import Measurements
from memspan.report import Images
from memspan.training.baselines import checkpoint_

__all__ = ["METHODS", "hausdorff_95", "monai_networks", "packed", "segment_volume", "slices"]

METHODS = ("plain", "checkpoint", "reversible", "MONAI UNet", "MONAI UNet, checkpointed")
COLOURS = np.array([[86, 140, 214], [240, 164, 44], [214, 60, 84]], np.float64)


def monai_networks(
    channels: Sequence[int], images: int, regions: int
) -> tuple[dict[str, Callable[..., nn.Module]], str]:
    """MONAI's U-Net with about as many parameters, and with each of its units checkpointed."""
    try:
        nets = optional("monai.networks.nets", extra="volumes")
    except ImportError as error:
        return {}, f"MONAI's networks are absent: {error}"
    widths = [max(2, width * 3 // 4) for width in channels]

    def unet(depth: int = 1) -> nn.Module:
        return nets.UNet(3, images, regions, channels=widths, strides=(2, 2), num_res_units=depth)  # type: ignore[no-any-return]

    def checkpointed(depth: int = 1) -> nn.Module:
        newer = getattr(nets, "CheckpointUNet", None)  # what MONAI calls its own, where it has it
        if newer is not None:
            return newer(3, images, regions, channels=widths, strides=(2, 2), num_res_units=depth)  # type: ignore[no-any-return]
        model = unet(depth)
        units = [name for name, part in model.named_modules() if type(part).__name__ == "ResidualUnit"]
        return checkpoint_(model, units or list(find_blocks(model)))

    return {METHODS[3]: unet, METHODS[4]: checkpointed}, ""


def hausdorff_95(guess: Tensor, truth: Tensor) -> dict[str, float]:
    """95% Hausdorff distance in millimetres (MONAI), mean over regions; nothing where a region is missed."""
    try:
        metrics = optional("monai.metrics", extra="volumes")
    except ImportError:
        return {}
    if not bool((guess.flatten(2).sum(2) > 0).all() and (truth.flatten(2).sum(2) > 0).all()):
        return {}
    found = metrics.compute_hausdorff_distance(guess, truth, include_background=True, percentile=95)
    return {"hd95_mm": SPACING * float(found.mean())}


def packed(part: Part, guess: Tensor) -> dict[str, list[float]]:
    """The slice with most of the innermost region: image, truth and guess, as numbers that JSON can hold.

    Masks are written as (value, run) pairs after the shape: most of a mask is nothing.
    """
    at = int(part.y[0, -1].sum((0, 1)).argmax())
    image = part.x[0, 0, :, :, at]
    grey = ((image - image.min()) / (image.max() - image.min()).clamp(min=1e-6) * 255).round()
    grey = torch.where(image == 0, 0.0, grey)  # outside of the brain
    found = {"slice.image": [float(side) for side in grey.shape] + grey.flatten().tolist()}
    for name, maps in (("slice.truth", part.y), ("slice.mask", guess)):
        levels = maps[0, :, :, :, at].float().cumprod(0).sum(0)
        runs = [(value, len(list(run))) for value, run in groupby(levels.flatten().tolist())]
        found[name] = [float(side) for side in levels.shape] + [float(n) for pair in runs for n in pair]
    return found


def slices(found: Measurements) -> list[Images]:
    """The kept slice with the true regions, and with each method's."""
    rows: list[NDArray[np.uint8]] = []
    captions: list[str] = []
    for one in found:
        if "slice.image" not in one.series:
            continue
        height, width, *grey = one.series["slice.image"]
        image = np.array(grey).reshape(int(height), int(width))
        if not rows:
            rows, captions = [_upright(_painted(image, np.zeros_like(image)))], ["T1"]
            rows.append(_upright(_painted(image, _unpacked(one.series["slice.truth"]))))
            captions.append("true regions")
        rows.append(_upright(_painted(image, _unpacked(one.series["slice.mask"]))))
        captions.append(f"{one.method}: Dice {one.quality['dice']:.2f}")
    if not rows:
        return []
    note = (
        "Blue, orange, red: the nested regions from the outermost in. A slice of the test part, first seed."
    )
    return [Images("Masks over a slice that nobody trained on", {"": rows}, {"": captions}, note=note)]


@torch.no_grad()
def segment_volume(
    model: nn.Module, own: Volume, target: Path, *, window: int, device: torch.device
) -> list[float]:
    """Segment a volume of any orientation and voxel size; gives the regions' millilitres.

    The volume is brought to 2 mm, windows slide over it (MONAI), the maps go back to its own grid.
    """
    slide = optional("monai.inferers", extra="volumes").sliding_window_inference
    values = torch.from_numpy(own.values.copy())
    images = values[None] if values.dim() == 3 else values.movedim(-1, 0)
    shape = images.shape[1:]
    small = [max(1, round(side * mm / SPACING)) for side, mm in zip(shape, own.spacing, strict=True)]
    x = F.interpolate(images[None], small, mode="trilinear")[0]
    x = torch.stack([normalised(image.numpy()) for image in x])[None].to(device)
    logits = slide(x, (window,) * 3, 1, model, overlap=0.25, mode="gaussian")
    maps = F.interpolate(logits.cpu(), shape, mode="trilinear")[0] > 0
    levels = maps.float().cumprod(0).sum(0).numpy().astype(np.uint8)
    write_volume(target, levels, own)
    voxel = float(np.prod(own.spacing)) / 1000
    return [float((levels >= place).sum()) * voxel for place in range(1, maps.shape[0] + 1)]


def _unpacked(series: Sequence[float]) -> NDArray[np.float64]:
    height, width, *runs = series
    values, counts = np.array(runs[0::2]), np.array(runs[1::2], dtype=int)
    return np.repeat(values, counts).reshape(int(height), int(width))


def _painted(image: NDArray[np.float64], levels: NDArray[np.float64]) -> NDArray[np.uint8]:
    colours = np.repeat(image[:, :, None], 3, 2)
    for level, colour in enumerate(COLOURS, start=1):
        where = levels == level
        colours[where] = 0.55 * colours[where] + 0.45 * colour
    return colours.round().astype(np.uint8)


def _upright(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """X to the right, the front of the head on top."""
    return np.ascontiguousarray(picture.transpose(1, 0, 2)[::-1])
