"""Pools: many rows into one, with masks and classes treated right."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from memspan.base import refuse

__all__ = ["class_means", "masked_mean"]


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the positions that the mask keeps; the divisor's floor of 1 makes an empty row 0.

    Args:
        values: (B, T, d), floating.
        mask: (B, T), true or 1 where a position counts.

    Returns:
        (B, d).

    Raises:
        BadInput: the shapes do not agree.

    Example:
        >>> masked_mean(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[1, 1, 0]])).tolist()
        [[2.0]]
    """
    if values.dim() != 3 or mask.shape != values.shape[:2]:
        refuse("mask", tuple(mask.shape), f"values are {tuple(values.shape)}: give (B, T, d) and (B, T)")
    weight = mask.to(values.dtype).unsqueeze(-1)
    return (values * weight).sum(dim=1) / weight.sum(dim=1).clamp_min(1)


def class_means(features: Tensor, labels: Tensor, n_classes: int | None = None) -> Tensor:
    """Unit mean of each class's unit features: the prototypes of a nearest-mean classifier.

    Every feature row is normalised, the rows of a class are averaged, the average is normalised. A class
    without rows, and a row or mean of zero length, gives zeros.

    Args:
        features: (N, d), floating.
        labels: (N,), class indices.
        n_classes: number of classes; None takes the largest label + 1.

    Returns:
        (n_classes, d), rows of unit length.

    Raises:
        BadInput: lengths differ, a label is outside, or a feature is not finite.

    Example:
        >>> class_means(torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 1, 1])).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    if features.dim() != 2 or labels.shape != features.shape[:1]:
        refuse("labels", tuple(labels.shape), f"features are {tuple(features.shape)}: give (N, d) and (N,)")
    if not torch.isfinite(features).all():
        refuse("features", "NaN or infinite", "remove these rows or mend the network that gave them")
    count = n_classes if n_classes is not None else (int(labels.max()) + 1 if len(labels) else 0)
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < count:
        refuse("labels", (int(labels.min()), int(labels.max())), f"class indices are 0 to {count - 1}")
    sums = features.new_zeros(count, features.shape[1])
    sums.index_add_(0, labels.to(features.device, torch.int64), F.normalize(features, dim=1))
    return F.normalize(sums, dim=1)
