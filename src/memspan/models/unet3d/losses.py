"""Soft Dice over nested regions, each example and region by itself."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from memspan.base import refuse

__all__ = ["dice_scores", "nested_regions", "soft_dice_loss"]


def soft_dice_loss(logits: Tensor, target: Tensor, smooth: float = 1.0) -> Tensor:
    """Mean over examples and regions of 1 - (2 Σ pq + s) / (Σ p + Σ q + s), with p = sigmoid(logits).

    Sums run over the voxels of one example and region: a batch gives the mean of its examples' losses, and a
    region that is empty and predicted empty costs nothing.

    Args:
        logits: ``(B, R, ...)``, one map for each region.
        target: q, of the same shape; 0 or 1, or anything between.
        smooth: s.

    Returns:
        A number: float32, or float64 where the logits are.

    Raises:
        BadInput: shapes differ, or fewer than three dimensions.

    Example:
        >>> target = torch.tensor([[[0.0, 1.0, 1.0, 0.0]]])
        >>> float(soft_dice_loss(1000 * (target - 0.5), target))
        0.0
    """
    if logits.shape != target.shape or logits.dim() < 3:
        remedy = "give (B, R, ...) logits and a target of the same shape (nested_regions makes it of labels)"
        refuse("target", tuple(target.shape), f"the logits are {tuple(logits.shape)}; {remedy}")
    # A sum over a volume leaves the range of 16-bit floats: float16 would give NaN.
    wide = logits if logits.dtype == torch.float64 else logits.float()
    p, q = torch.sigmoid(wide).flatten(2), target.to(wide.dtype).flatten(2)
    overlap, total = (p * q).sum(2), p.sum(2) + q.sum(2)
    return (1 - (2 * overlap + smooth) / (total + smooth)).mean()


def nested_regions(labels: Tensor, groups: Sequence[Collection[int]]) -> Tensor:
    """Maps of regions that contain one another, from a volume of labels.

    Args:
        labels: whole numbers, ``(B, ...)``.
        groups: labels of each region, outermost first; each contains the next. For BraTS
            ``[{1, 2, 4}, {1, 4}, {4}]`` gives whole tumour, tumour core, enhancing tumour.

    Returns:
        ``(B, R, ...)`` float32, 0 and 1.

    Raises:
        BadInput: labels that are not whole numbers; a region that is empty or not inside the one before.

    Example:
        >>> nested_regions(torch.tensor([[0, 1, 2]]), [{1, 2}, {2}]).tolist()
        [[[0.0, 1.0, 1.0], [0.0, 0.0, 1.0]]]
    """
    if labels.is_floating_point() or labels.dim() < 2:
        refuse("labels", f"{labels.dtype} {tuple(labels.shape)}", "give whole numbers of shape (B, ...)")
    if not groups:
        refuse("groups", groups, "give the labels of one region or more")
    for place, group in enumerate(groups):
        if not group:
            refuse("groups", groups, f"region {place} has no labels")
        if place and not set(group) <= set(groups[place - 1]):
            refuse("groups", groups, f"region {place} is not inside region {place - 1}; give outermost first")
    maps = [torch.isin(labels, torch.tensor(sorted(group), device=labels.device)) for group in groups]
    return torch.stack(maps, 1).float()


def dice_scores(prediction: Tensor, target: Tensor) -> Tensor:
    """Dice overlap 2|A∩B| / (|A| + |B|) of each example and region; 1 where both are empty.

    Args:
        prediction: ``(B, R, ...)``, yes/no (or 0 and 1).
        target: of the same shape.

    Raises:
        BadInput: shapes differ.

    Example:
        >>> dice_scores(torch.tensor([[[1, 1, 0]]]), torch.tensor([[[1, 0, 0]]])).tolist()
        [[0.666...]]
    """
    if prediction.shape != target.shape:
        refuse("target", tuple(target.shape), f"the prediction is {tuple(prediction.shape)}")
    a, b = prediction.bool().flatten(2), target.bool().flatten(2)
    total = (a.sum(2) + b.sum(2)).float()
    return torch.where(total > 0, 2 * (a & b).sum(2) / total.clamp(min=1), torch.ones_like(total))
