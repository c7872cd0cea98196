"""The two modules of the paper and the alignment of maps; each small enough to read as its formula.

Shapes: B samples, L layers beside the anchor, T positions, d the mapping width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from memspan.base import refuse
from memspan.nn.pool import masked_mean

__all__ = ["FLOOR", "ConfidenceAggregation", "ParallelInteraction", "Residual", "SpatialAlign", "rows_to_one"]

Residual = Literal["identity", "token"] | None

#: Smallest divisor of an L1 normalisation: a row of zeros stays zeros.
FLOOR = 1e-6


def rows_to_one(scores: Tensor, dim: int = -1) -> Tensor:
    """``ReLU(scores)`` divided by its sum along a dimension, the divisor at least :data:`FLOOR`.

    Example:
        >>> rows_to_one(torch.tensor([[1.0, 3.0, -2.0], [-1.0, -1.0, 0.0]])).tolist()
        [[0.25, 0.75, 0.0], [0.0, 0.0, 0.0]]
    """
    positive = scores.relu()
    return positive / positive.sum(dim=dim, keepdim=True).clamp_min(FLOOR)


class ParallelInteraction(nn.Module):
    """The anchor asks one layer, with attention that is a ReLU and an L1 norm in place of a softmax.

    ``S = A Fᵀ`` (not divided by √d), masked columns 0, ``C = ReLU(S) / Σ ReLU(S)`` per row, and the merged
    feature is ``(C + I) F``. It has no parameters, and layers do not see one another. S is computed in
    float32 whatever the inputs are: without √d it would overflow in 16 bits. Source: UniPT, CVPR 2024,
        section 3.2.

    Padded queries give values too, and ``I`` lets padded positions through: mask what you pool afterwards.

    Args:
        residual: ``"identity"`` adds the same position of the layer (needs as many queries as positions),
            ``"token"`` adds one chosen position to every query, None adds nothing.

    Raises:
        BadInput: shapes or mask that do not agree.

    Example:
        >>> merged, weights = ParallelInteraction()(torch.ones(2, 3, 4), torch.ones(2, 3, 4))
        >>> merged.shape, weights.sum(-1).tolist()
        (torch.Size([2, 3, 4]), [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    """

    def __init__(self, residual: Residual = "identity") -> None:
        super().__init__()
        if residual not in ("identity", "token", None):
            refuse("residual", residual, 'use "identity", "token" or None')
        self.residual: Residual = residual

    def forward(
        self, anchor: Tensor, target: Tensor, mask: Tensor | None = None, position: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Merge a layer as the anchor sees it.

        Args:
            anchor: A (B, Tq, d).
            target: F of one layer (B, Tk, d).
            mask: (B, Tk), 1 where a position counts.
            position: (B,) the place that residual ``"token"`` adds; None takes place 0.

        Returns:
            M (B, Tq, d) and C (B, Tq, Tk), without the residual.
        """
        if anchor.dim() != 3 or target.dim() != 3 or anchor.shape[::2] != target.shape[::2]:
            refuse("target", tuple(target.shape), f"anchor is {tuple(anchor.shape)}: give (B, Tk, d)")
        if self.residual == "identity" and anchor.shape != target.shape:
            refuse(
                "target", tuple(target.shape), f"the identity needs the anchor's shape {tuple(anchor.shape)}"
            )
        scores = wide_product(anchor, target)
        if mask is not None:
            scores = scores.masked_fill(~as_bool(mask, target.shape[:2])[:, None], 0.0)
        weights = rows_to_one(scores).to(target.dtype)
        merged = weights @ target
        if self.residual == "identity":
            merged = merged + target
        elif self.residual == "token":
            merged = merged + at_position(target, position)
        return merged, weights


class ConfidenceAggregation(nn.Module):
    """One trust per sample and layer, from what anchor and layer are on average; layers are summed by it.

    ``c_i = w (ā ⊙ f̄_i) + b``, ``α = softmax(c)`` over the layers, ``M = Σ α_i M_i``. Source: UniPT, section
    3.3.

    Args:
        width: d.

    Raises:
        BadInput: shapes that do not agree.

    Example:
        >>> gate = ConfidenceAggregation(4)
        >>> merged, alpha = gate(torch.ones(2, 4), torch.ones(2, 3, 4), torch.ones(2, 3, 5, 4))
        >>> merged.shape, bool(torch.allclose(alpha, torch.full((2, 3), 1 / 3)))
        (torch.Size([2, 5, 4]), True)
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 1)
        # A softmax does not feel what is added to all: b has no gradient. It stays for the official layout.
        self.gate.bias.requires_grad_(False)

    def confidence(self, anchor: Tensor, targets: Tensor) -> Tensor:
        """α (B, L) from pooled features: anchor (B, d), targets (B, L, d)."""
        if targets.dim() != 3 or anchor.shape != targets[:, 0].shape:
            refuse("targets", tuple(targets.shape), f"anchor is {tuple(anchor.shape)}: give (B, L, d)")
        scores: Tensor = self.gate(anchor.unsqueeze(1) * targets).squeeze(-1)
        return scores.softmax(dim=1)

    def forward(
        self, anchor: Tensor, targets: Tensor, merged: Tensor | Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Sum the merged layers by their confidence.

        Args:
            anchor: ā (B, d).
            targets: f̄ (B, L, d).
            merged: M (B, L, T, d), or its L layers (B, T, d).

        Returns:
            M (B, T, d) and α (B, L).
        """
        alpha = self.confidence(anchor, targets)
        layers = merged.unbind(1) if isinstance(merged, Tensor) else list(merged)
        if len(layers) != alpha.shape[1]:
            refuse("merged", f"{len(layers)} layers", f"targets have {alpha.shape[1]}")
        total = layers[0] * alpha[:, 0, None, None]
        for place, layer in enumerate(layers[1:], start=1):
            total = total + layer * alpha[:, place, None, None]
        return total, alpha


class SpatialAlign(nn.Module):
    """Bring the maps of earlier stages to the size of the last one, guided by the last one.

    The last stage's map, by a 1 x 1 convolution and ReLU in the channels of stage i, is laid over the r x r
    positions that each of its own covers there; the product with stage i, summed over channels, weighs each
    position. Inside a window: ReLU, L1 norm, plus 1 / r² (the mean), and a weighted sum. So a window's
    weights sum to 2, or to 1 where nothing is positive. Nothing is upsampled: the window is a view of the
    map.

    Args:
        channels: of each stage, the last one included.

    Raises:
        BadInput: fewer than two stages; maps of other channels or of sizes that are no whole multiples.

    Example:
        >>> align = SpatialAlign([8, 16])
        >>> [m.shape[2:] for m in align([torch.ones(1, 8, 6, 6), torch.ones(1, 16, 3, 3)])]
        [torch.Size([3, 3])]
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        if len(channels) < 2:
            refuse("channels", channels, "give two stages or more, the last one is the anchor")
        self.channels = tuple(channels)
        self.identity = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels[-1], own, 1), nn.ReLU()) for own in channels[:-1]
        )

    def weights(self, stage: int, anchor: Tensor, target: Tensor) -> Tensor:
        """Weights of the positions of a stage.

        Args:
            stage: its place.
            anchor: the last stage's map (B, C, h, w).
            target: this stage's map (B, C_i, r h, r w).

        Returns:
            (B, h, r, w, r).
        """
        ratio = _ratio(anchor, target)
        guide: Tensor = self.identity[stage](anchor)
        mixed = (_windows(target, ratio) * guide[:, :, :, None, :, None]).sum(dim=1)
        positive = mixed.relu()
        norm = positive.sum(dim=(2, 4), keepdim=True).clamp_min(FLOOR)
        return positive / norm + 1.0 / ratio**2

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps of all stages but the last (B, C_i, h, w), from maps (B, C_i, r_i h, r_i w)."""
        if [one.shape[1] if one.dim() == 4 else None for one in maps] != list(self.channels):
            refuse(
                "maps", [tuple(one.shape) for one in maps], f"give maps (B, C, H, W) with C {self.channels}"
            )
        anchor = maps[-1]
        return [
            (_windows(one, _ratio(anchor, one)) * self.weights(stage, anchor, one).unsqueeze(1)).sum(
                dim=(3, 5)
            )
            for stage, one in enumerate(maps[:-1])
        ]


def as_bool(mask: Tensor, shape: torch.Size) -> Tensor:
    """The mask (B, T) as booleans.

    Raises:
        BadInput: another shape, or an additive mask (0 and -inf).
    """
    if mask.shape != shape:
        refuse("mask", tuple(mask.shape), f"give (B, T) = {tuple(shape)}, 1 where a position counts")
    real = type(mask) is Tensor and not mask.is_meta and not torch.compiler.is_compiling()
    if real and mask.is_floating_point() and bool((mask < 0).any()):
        refuse(
            "mask",
            "values below 0",
            "this looks like an additive mask; give 1 where a position counts, else 0",
        )
    return mask.bool()


def mean_over(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the positions that count: (B, T, d) -> (B, d)."""
    return values.mean(dim=1) if mask is None else masked_mean(values, mask)


def running_means(values: Tensor, mask: Tensor | None, last: int) -> Tensor:
    """Mean up to each of the last positions, over those that count: (B, T, d) -> (B, last, d).

    Example:
        >>> running_means(torch.tensor([[[2.0], [4.0], [9.0]]]), None, 2).tolist()
        [[[3.0], [5.0]]]
    """
    wide = values if values.dtype == torch.float64 else values.float()  # a long sum loses 16-bit numbers
    if mask is None:
        counts = torch.arange(1, values.shape[1] + 1, device=values.device, dtype=wide.dtype)[:, None]
    else:
        weight = mask.to(wide.dtype).unsqueeze(-1)
        wide, counts = wide * weight, weight.cumsum(1).clamp_min(1)
    return (wide.cumsum(1) / counts)[:, -last:].to(values.dtype)


def at_position(values: Tensor, position: Tensor | None) -> Tensor:
    """One position of each sample, (B, T, d) -> (B, 1, d)."""
    if position is None:
        return values[:, :1]
    if position.shape != values.shape[:1] or position.is_floating_point():
        refuse("position", tuple(position.shape), f"give whole numbers of shape ({values.shape[0]},)")
    return values[torch.arange(len(values), device=values.device), position].unsqueeze(1)


def flat(features: Tensor) -> Tensor:
    """A map (B, C, h, w) as positions (B, h w, C)."""
    return features.flatten(2).mT


def _windows(features: Tensor, ratio: int) -> Tensor:
    batch, channels, high, wide = features.shape
    return features.reshape(batch, channels, high // ratio, ratio, wide // ratio, ratio)


def _ratio(anchor: Tensor, target: Tensor) -> int:
    high, wide = target.shape[2] / anchor.shape[2], target.shape[3] / anchor.shape[3]
    if high != wide or high != int(high) or high < 1:
        refuse(
            "maps",
            (tuple(target.shape[2:]), tuple(anchor.shape[2:])),
            "each stage must be a whole multiple of the last one's size; choose an input size that all "
            "strides divide",
        )
    return int(high)


def fused(
    anchor: Tensor,
    targets: Tensor,
    alpha: Tensor | None,
    mask: Tensor | None,
    residual: Residual,
    position: Tensor | None,
) -> Tensor:
    """``Σ α_i (C_i F_i + residual_i)`` for all layers in two matrix products, no M_i is ever made.

    The layers stand side by side as positions, so that one product gives all S_i, and α is folded into the
    normalisation. Equal to :class:`ParallelInteraction` per layer and :class:`ConfidenceAggregation`.

    Args:
        anchor: (B, Tq, d).
        targets: (B, L, Tk, d).
        alpha: (B, L); None weighs all layers alike.
        mask: (B, Tk) or None.
        residual: see :class:`ParallelInteraction`.
        position: likewise.
    """
    batch, layers = targets.shape[:2]
    keep = None if mask is None else as_bool(mask, targets.shape[::2][:2])
    if alpha is None:
        alpha = targets.new_full((batch, layers), 1 / layers)
    side_by_side = targets.flatten(1, 2)
    exact = anchor.dtype in (torch.float32, torch.float64)
    with torch.autocast(anchor.device.type, enabled=False):
        given = [t if exact else t.float() for t in (anchor, side_by_side, alpha)]
        merged = _Merge.apply(*given, keep, residual == "identity")  # type: ignore[no-untyped-call]
    merged = merged.to(targets.dtype)
    if residual == "token":
        one = torch.stack([at_position(layer, position) for layer in targets.unbind(1)], dim=1)
        merged = merged + (alpha.to(one.dtype).unsqueeze(1) @ one.flatten(2))
    return merged  # type: ignore[no-any-return]


class _Merge(torch.autograd.Function):
    """``Σ α_i (C_i + I) F_i`` with its gradient written out, added up inside the matrix products.

    Autograd would write one full-size gradient of F per use and add them; on CPUs that costs as much as the
    products. Shapes: anchor (B, Tq, d), targets (B, L Tk, d), alpha (B, L), keep (B, Tk) or None.
    """

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, targets: Tensor, alpha: Tensor, keep: Tensor | None, identity: bool
    ) -> Tensor:
        batch, layers = alpha.shape
        scores = torch.bmm(anchor, targets.mT).view(batch, anchor.shape[1], layers, -1)
        if keep is not None:
            scores.masked_fill_(~keep[:, None, None], 0.0)
        positive = scores.relu_()
        scale = positive.sum(dim=-1).clamp_min_(FLOOR).reciprocal_()
        weights = positive * (scale * alpha.unsqueeze(1)).unsqueeze(-1)
        if identity:
            weights.diagonal(dim1=1, dim2=3).add_(alpha.unsqueeze(-1))
        ctx.save_for_backward(anchor, targets, alpha, positive, scale, weights)
        ctx.identity = identity
        return torch.bmm(weights.flatten(2), targets)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        anchor, targets, alpha, positive, scale, weights = ctx.saved_tensors
        (given,) = grads
        with torch.autocast(given.device.type, enabled=False):  # some run backward inside it
            by_target = torch.bmm(weights.flatten(2).mT, given)
            by_weight = torch.bmm(given, targets.mT).view_as(weights)
            by_share = (by_weight * positive).sum(dim=-1)
            by_alpha = (by_share * scale).sum(dim=1)
            if ctx.identity:
                by_alpha = by_alpha + by_weight.diagonal(dim1=1, dim2=3).sum(dim=-1)
            # A row below the floor is divided by a constant: its sum has no gradient.
            share = alpha.unsqueeze(1) * scale
            by_sum = -(by_share * share * scale).masked_fill_(scale >= 1 / FLOOR, 0.0)
            by_score = (by_weight * share.unsqueeze(-1)).add_(by_sum.unsqueeze(-1))
            by_score = by_score.masked_fill_(positive == 0, 0.0).flatten(2)
            by_anchor = torch.bmm(by_score, targets)
            by_target.baddbmm_(by_score.mT, anchor)
        return by_anchor, by_target, by_alpha, None, None


def wide_product(anchor: Tensor, target: Tensor) -> Tensor:
    """``A Fᵀ`` in float32 (float64 where given), also under autocast."""
    if anchor.dtype == torch.float64:
        return anchor @ target.mT
    with torch.autocast(anchor.device.type, enabled=False):
        return anchor.float() @ target.float().mT


def linear_norm(inputs: int, outputs: int) -> nn.Sequential:
    """A Linear layer and its LayerNorm."""
    return nn.Sequential(nn.Linear(inputs, outputs), nn.LayerNorm(outputs))


def conv_norm(inputs: int, outputs: int) -> nn.Sequential:
    """A 1 x 1 convolution and its BatchNorm."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1), nn.BatchNorm2d(outputs))


def same_batch(hidden: Sequence[Tensor]) -> None:
    """Refuse taps of different batch size."""
    sizes = [one.shape[0] for one in hidden]
    if len(set(sizes)) > 1:
        refuse("taps", sizes, "all taps must have one batch size; tap modules that see every sample once")


def spread(features: Tensor, like: Tensor) -> Tensor:
    """Positions (B, h w, C) back as a map of the size of another."""
    return features.mT.reshape(features.shape[0], features.shape[2], *like.shape[2:])
