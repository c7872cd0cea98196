"""Matching two kinds of items in one space: the loss and the pooling of VSE∞."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from memspan.base import refuse
from memspan.training.unipt.parts import as_bool

__all__ = ["GPO", "HingeRetrievalLoss"]


class HingeRetrievalLoss(nn.Module):
    """Each pair must score above all others of its row and column by a margin (Faghri et al. 2018, "VSE++").

    Scores are cosines; the loss is a sum over the batch, as published.

    Args:
        margin: by how much.
        hardest: only the most violating negative of each row and column counts; False sums over all (VSE∞
            trains its first epoch so).

    Raises:
        BadInput: a negative margin; embeddings of other shapes than (B, d) twice, or a batch of one pair.

    Example:
        >>> loss = HingeRetrievalLoss(margin=0.2)
        >>> loss(torch.eye(3), torch.eye(3)).item(), round(loss(torch.eye(2), torch.eye(2).flip(0)).item(), 4)
        (0.0, 4.8)
    """

    def __init__(self, margin: float = 0.2, hardest: bool = True) -> None:
        super().__init__()
        if margin < 0:
            refuse("margin", margin, "give 0 or more")
        self.margin, self.hardest = margin, hardest

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        """Loss of embeddings (B, d) whose rows belong together."""
        if one.dim() != 2 or one.shape != other.shape or len(one) < 2:
            refuse("other", (tuple(one.shape), tuple(other.shape)), "give (B, d) twice, with 2 pairs or more")
        scores = F.normalize(one, dim=1) @ F.normalize(other, dim=1).mT
        own = scores.diagonal()
        same = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
        rows = (self.margin + scores - own[:, None]).clamp_min(0).masked_fill(same, 0)
        columns = (self.margin + scores - own[None, :]).clamp_min(0).masked_fill(same, 0)
        if self.hardest:
            return rows.amax(dim=1).sum() + columns.amax(dim=0).sum()
        return rows.sum() + columns.sum()


class GPO(nn.Module):
    """Generalised pooling: a learned weight for the largest value, the second largest, ... of each feature.

    The weights come from a recurrent network over positional codes, so they depend on the number of
    positions alone; mean and maximum are two of its settings. Source: Chen et al., "Learning the Best Pooling
    Strategy for Visual Semantic Embedding", CVPR 2021, section 3.

    Args:
        code: width of the positional codes, even.
        width: of the recurrent network.
        temperature: of the softmax over positions.

    Raises:
        BadInput: an odd code width; values or mask of the wrong shape.

    Example:
        >>> GPO()(torch.randn(2, 5, 8), torch.ones(2, 5)).shape
        torch.Size([2, 8])
    """

    def __init__(self, code: int = 32, width: int = 32, temperature: float = 0.1) -> None:
        super().__init__()
        if code < 2 or code % 2:
            refuse("code", code, "give an even width")
        self.code, self.temperature = code, temperature
        self.gru = nn.GRU(code, width, batch_first=True, bidirectional=True)
        self.score = nn.Linear(width, 1, bias=False)

    def forward(self, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pool (B, T, d) over the positions that the mask (B, T) keeps: (B, d); an empty row gives 0."""
        if values.dim() != 3 or not values.shape[1]:
            refuse("values", tuple(values.shape), "give (B, T, d)")
        if mask is None:
            mask = values.new_ones(values.shape[:2])
        kept = as_bool(mask, values.shape[:2])
        counts = kept.sum(dim=1)
        lengths, which = torch.unique(counts.clamp_min(1), return_inverse=True)
        weights = self.weights(lengths)[which]  # rows of one length share their weights
        longest = weights.shape[1]
        ordered = values.masked_fill(~kept.unsqueeze(-1), -math.inf).sort(dim=1, descending=True).values
        ordered = ordered[:, :longest].masked_fill(
            torch.arange(longest, device=values.device)[None, :, None] >= counts[:, None, None], 0
        )
        return (ordered * weights.unsqueeze(-1).to(values.dtype)).sum(dim=1)

    def weights(self, lengths: Tensor) -> Tensor:
        """Weights of the sorted places, rows summing to 1: lengths (n,) -> (n, longest)."""
        longest = int(lengths.max())
        codes = _codes(longest, self.code, self.score.weight).expand(len(lengths), -1, -1)
        packed = pack_padded_sequence(codes, lengths.cpu(), batch_first=True, enforce_sorted=False)
        both, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True)
        forward, backward = both.chunk(2, dim=-1)
        scores = self.score((forward + backward) / 2).squeeze(-1) / self.temperature
        beyond = torch.arange(longest, device=scores.device) >= lengths[:, None].to(scores.device)
        weights: Tensor = scores.masked_fill(beyond, -math.inf).softmax(dim=1)
        return weights


def _codes(length: int, width: int, like: Tensor) -> Tensor:
    """Sine and cosine codes of the places (length, width)."""
    place = torch.arange(length, dtype=like.dtype, device=like.device)[:, None]
    rate = torch.exp(
        torch.arange(0, width, 2, dtype=like.dtype, device=like.device) * (-math.log(1e4) / width)
    )
    return torch.stack([torch.sin(place * rate), torch.cos(place * rate)], dim=-1).flatten(1)
