"""The learners' door: images and labels as users have them, and backbones by name or as modules."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from memspan.base import refuse
from memspan.base.rng import seed_of
from memspan.continual import nets
from memspan.continual.memo.nets import split_backbone

__all__ = ["Backbone", "Label", "build", "check_rows", "crop_flip", "to_input"]

Backbone = str | nn.Module | tuple[nn.Module, nn.Module]
Label = int | str | float | bool


def check_rows(X: Any, y: Any = None, shape: tuple[int, ...] | None = None) -> tuple[np.ndarray, list[Label]]:
    """Check one task's images and labels.

    Args:
        X: array or tensor (N, ...), or a map-style dataset of (image, label) pairs when ``y`` is None.
        y: (N,) labels.
        shape: the shape of one image seen before.

    Returns:
        Images as an array, labels as plain Python values.

    Raises:
        BadInput: no rows, lengths that differ, NaN, or another image shape.

    Example:
        >>> images, labels = check_rows(np.zeros((2, 8, 8), np.uint8), ["cat", "dog"])
        >>> images.shape, labels
        ((2, 8, 8), ['cat', 'dog'])
    """
    if y is None:
        X, y = _pairs(X)
    images = check_images(X, shape)
    labels = [value.item() if hasattr(value, "item") else value for value in y]
    if not len(images):
        refuse("X", images.shape, "a task needs at least one image; skip empty tasks")
    if len(labels) != len(images):
        refuse("y", f"{len(labels)} labels", f"give one label for each of the {len(images)} images")
    for label in labels:
        if not isinstance(label, int | str | float) or label != label:
            refuse("y", label, "labels are numbers or strings")
    return images, labels


def check_images(X: Any, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """Images as an array of uint8 or float32, of the shape seen before."""
    images = X.detach().cpu().numpy() if isinstance(X, Tensor) else np.asarray(X)
    if images.dtype != np.uint8:
        if images.dtype.kind not in "fiub":
            refuse("X", images.dtype, "give uint8 images, or float inputs")
        images = images.astype(np.float32)
        if not np.isfinite(images).all():
            refuse("X", "NaN or infinite values", "remove or repair these rows")
    if images.ndim < 2:
        refuse("X", images.shape, "give (N, H, W), (N, H, W, C) or (N, ...) inputs")
    if shape is not None and images.shape[1:] != shape:
        refuse("X", images.shape, f"earlier images have the shape {shape}; bring all to one shape")
    return images


def build(backbone: Backbone, channels: int, split_at: str | None, seed: int) -> tuple[nn.Module, nn.Module]:
    """The generalised and the specialised part of a backbone, new and independent of the template.

    Args:
        backbone: a name, a module image -> features, or the two parts.
        channels: of the images; a named network is built for them.
        split_at: the module that begins the specialised part; None puts all into it.
        seed: of the initial weights of a named network.

    Raises:
        BadInput: unknown name, or a pair that is to be split again.
    """
    if isinstance(backbone, tuple):
        g, s = (copy.deepcopy(part) for part in backbone)
        return (g, s) if split_at is not None else (nn.Identity(), nn.Sequential(g, s))
    if isinstance(backbone, str):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of("backbone", backbone, seed))
            model: nn.Module = nets.build(backbone, in_channels=channels)
    else:
        model = copy.deepcopy(backbone)
    return (nn.Identity(), model) if split_at is None else split_backbone(model, split_at)


def to_input(images: np.ndarray, device: str | torch.device, transform: Any = None) -> Tensor:
    """Network input of a batch: uint8 images become (N, C, H, W), in [-1, 1] or as ``transform`` has it.

    Example:
        >>> to_input(np.full((1, 2, 2), 255, np.uint8), "cpu").tolist()
        [[[[1.0, 1.0], [1.0, 1.0]]]]
    """
    x = torch.as_tensor(np.ascontiguousarray(images)).to(device)
    if x.dtype == torch.uint8:
        x = x.unsqueeze(1) if x.dim() == 3 else x.permute(0, 3, 1, 2)
        return transform(x) if transform is not None else x.float().div_(127.5).sub_(1)
    return transform(x) if transform is not None else x


def crop_flip(x: Tensor, generator: np.random.Generator) -> Tensor:
    """The paper's augmentation: crop after padding by 4, horizontal flip, brightness within ± 63/255.

    Args:
        x: (N, C, H, W) in [-1, 1].
        generator: source of the draws.

    Example:
        >>> crop_flip(torch.zeros(2, 1, 8, 8), np.random.default_rng(0)).shape
        torch.Size([2, 1, 8, 8])
    """
    n, _, height, width = x.shape
    offsets = torch.as_tensor(generator.integers(0, 9, size=(n, 2)))
    flip = torch.as_tensor(generator.random(n) < 0.5)
    gain = torch.as_tensor(generator.uniform(1 - 63 / 255, 1 + 63 / 255, size=(n, 1, 1, 1)), dtype=x.dtype)
    padded = nn.functional.pad(x, (4, 4, 4, 4), value=-1.0)
    rows = offsets[:, :1] + torch.arange(height)
    columns = torch.arange(width).expand(n, width)
    columns = torch.where(flip[:, None], width - 1 - columns, columns) + offsets[:, 1:]
    item = torch.arange(n)[:, None, None]
    cropped = padded.permute(0, 2, 3, 1)[item, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return ((cropped + 1) * gain.to(x.device) - 1).clamp(-1, 1)


def _pairs(dataset: Any) -> tuple[np.ndarray, Sequence[Any]]:
    if (
        not hasattr(dataset, "__getitem__")
        or not hasattr(dataset, "__len__")
        or isinstance(dataset, np.ndarray | Tensor)
    ):
        refuse("y", None, "give labels, or a map-style dataset of (image, label) pairs as X")
    items = [dataset[i] for i in range(len(dataset))]
    if not items:
        refuse("X", "an empty dataset", "a task needs at least one image; skip empty tasks")
    images = [item[0].numpy() if isinstance(item[0], Tensor) else np.asarray(item[0]) for item in items]
    return np.stack(images), [item[1] for item in items]
