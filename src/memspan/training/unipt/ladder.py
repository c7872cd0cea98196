"""Ladder side tuning (LST), the rival: a small copy of the network beside the backbone, one rung per layer.

Source: Sung, Cho, Bansal, "LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning",
NeurIPS 2022. Where UniPT reads the layers in parallel and needs hidden states alone, a ladder climbs them in
order, each rung a transformer block of a reduced width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memspan.base import refuse
from memspan.nn.surgery import FeatureTap, find_blocks
from memspan.training.unipt.head import check_hidden
from memspan.training.unipt.parts import as_bool
from memspan.training.unipt.wrap import Pick, SideTuned, is_causal, probe_sizes

__all__ = ["LadderHead", "LadderSideNetwork", "slice_block_"]


class LadderHead(nn.Module):
    """The ladder on given hidden states: ``h = μ_i down_i(H_i) + (1 - μ_i) h``, then a block; ``y = Up(h)``.

    ``μ_i = sigmoid(g_i / temperature)`` with ``g_i = 0`` at first.

    Args:
        hidden_sizes: of every hidden state, shallow first; the first one starts the ladder.
        out_dim: width of the output.
        reduction: last hidden size / width of the ladder.
        gate_temperature: divides the gates.
        heads: attention heads of a rung; None takes the largest count of at most 12 that divides the width.
        causal: positions see themselves and earlier ones alone: for language models.

    Raises:
        BadInput: a reduction that does not divide the last hidden size, heads that do not divide the width,
            fewer than two layers; hidden states or mask as in :class:`UniPTHead`.

    Example:
        >>> LadderHead([16] * 3, out_dim=16, reduction=4)([torch.randn(2, 5, 16)] * 3).shape
        torch.Size([2, 5, 16])
    """

    def __init__(
        self,
        hidden_sizes: Sequence[int],
        out_dim: int,
        reduction: int = 8,
        gate_temperature: float = 0.1,
        heads: int | None = None,
        *,
        causal: bool = False,
    ) -> None:
        super().__init__()
        self.causal = causal
        if len(hidden_sizes) < 2:
            refuse("hidden_sizes", hidden_sizes, "give the widths of two layers or more")
        if reduction < 1 or hidden_sizes[-1] % reduction:
            refuse("reduction", reduction, f"choose a divisor of the last hidden size {hidden_sizes[-1]}")
        if gate_temperature <= 0:
            refuse("gate_temperature", gate_temperature, "give a number above 0, such as 0.1")
        width = hidden_sizes[-1] // reduction
        heads = next(n for n in range(12, 0, -1) if width % n == 0) if heads is None else heads
        if heads < 1 or width % heads:
            refuse("heads", heads, f"choose a divisor of the ladder's width {width}")
        self.hidden_sizes, self.width, self.temperature = tuple(hidden_sizes), width, gate_temperature
        self.down = nn.ModuleList(nn.Linear(size, width) for size in hidden_sizes)
        self.gates = nn.Parameter(torch.zeros(len(hidden_sizes) - 1))
        self.rungs = nn.ModuleList(_Rung(width, heads) for _ in hidden_sizes[1:])
        self.up = nn.Linear(width, out_dim)

    def forward(
        self, hidden: Sequence[Tensor], mask: Tensor | None = None, *, last: int | None = None
    ) -> Tensor:
        """Climb: hidden states (B, T, D_i), mask (B, T) -> (B, T, out_dim); ``last`` gives the end alone."""
        if len(hidden) != len(self.hidden_sizes):
            refuse("hidden", f"{len(hidden)} tensors", f"this head reads {len(self.hidden_sizes)} layers")
        check_hidden(hidden, self.hidden_sizes, maps=False)
        seen = None
        if mask is not None:
            kept = as_bool(mask, hidden[0].shape[:2])
            # A row without any position attends to all: its values are finite, and are pooled away.
            seen = (kept | ~kept.any(dim=1, keepdim=True))[:, None, None]
        if self.causal:
            places = hidden[0].shape[1]
            earlier = torch.ones(places, places, dtype=torch.bool, device=hidden[0].device).tril()
            own = torch.eye(places, dtype=torch.bool, device=hidden[0].device)
            seen = earlier if seen is None else (earlier & seen) | own  # a padded place sees itself
        kind = self.up.weight.dtype
        h: Tensor = self.down[0](hidden[0].to(kind))
        for gate, down, rung, given in zip(self.gates, self.down[1:], self.rungs, hidden[1:], strict=True):
            share = torch.sigmoid(gate / self.temperature)
            h = rung(torch.lerp(h, down(given.to(kind)), share), seen)
        answer: Tensor = self.up(h if last is None else h[:, -last:])
        return answer


class LadderSideNetwork(SideTuned):
    """LST beside a backbone of tokens.

    Args:
        backbone: see :class:`SideTuned`.
        taps: likewise.
        out_dim: width of the output; None takes the last layer's.
        reduction: last hidden size / width of the ladder.
        gate_temperature: see :class:`LadderHead`.
        heads: likewise; None takes the backbone's own count where that divides the width.
        init: ``"random"``, or ``"sliced"``: every reduction-th row and column of the backbone's blocks. The
            latter needs to understand a block: separate query, key, value and output layers, a feed-forward
            part of four times the width, and two LayerNorms.
        pick: see :class:`SideTuned`.
        example: see :class:`UniPT`.
        causal: see :class:`UniPT`.

    Raises:
        BadInput: as :class:`UniPT` and :class:`LadderHead`; blocks that cannot be sliced.

    Example:
        >>> block = lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        >>> backbone = nn.Sequential(block(), block()).eval()
        >>> LadderSideNetwork(backbone, "?", reduction=2)(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    head: LadderHead

    def __init__(
        self,
        backbone: nn.Module,
        taps: str | Sequence[str],
        out_dim: int | None = None,
        reduction: int = 8,
        gate_temperature: float = 0.1,
        *,
        heads: int | None = None,
        init: Literal["random", "sliced"] = "random",
        pick: Pick = None,
        example: Any = None,
        causal: bool | None = None,
    ) -> None:
        if init not in ("random", "sliced"):
            refuse("init", init, 'use "random" or "sliced"')
        sizes = probe_sizes(backbone, taps, example, pick=pick)
        if heads is None:
            own = getattr(getattr(backbone, "config", None), "num_attention_heads", 0)
            heads = own if own and sizes[-1] // max(reduction, 1) % own == 0 else None
        head = LadderHead(
            sizes,
            sizes[-1] if out_dim is None else out_dim,
            reduction,
            gate_temperature,
            heads,
            causal=is_causal(backbone) if causal is None else causal,
        )
        super().__init__(backbone, taps, head, pick=pick)
        if init == "sliced":
            blocks = _blocks_of(backbone, taps, len(sizes) - 1)
            for rung, block in zip(self.head.rungs, blocks, strict=True):
                slice_block_(rung, block)


class _Rung(nn.Module):
    """A small post-norm encoder block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, seen: Tensor | None) -> Tensor:
        batch, places, width = x.shape
        q, k, v = (f(x).view(batch, places, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        x = self.norm1(x + self.o(attended.transpose(1, 2).reshape(batch, places, width)))
        y: Tensor = self.norm2(x + self.down(F.gelu(self.up(x))))
        return y


@torch.no_grad()
def slice_block_(rung: nn.Module, block: nn.Module) -> nn.Module:
    """Fill a rung with every r-th row and column of a transformer block (r = the ratio of their widths).

    Args:
        rung: of a :class:`LadderHead`.
        block: has, in this order, query, key, value and output layers (D, D), one layer (4 D, D), one (D, 4
            D) and two LayerNorms.

    Returns:
        The rung.

    Raises:
        BadInput: the block has other parts.
    """
    assert isinstance(rung, _Rung)
    width = rung.q.in_features
    norms = [part for part in block.modules() if isinstance(part, nn.LayerNorm)]
    layers = [part for part in block.modules() if isinstance(part, nn.Linear)]
    full = norms[0].normalized_shape[0] if norms else 0
    shapes = [(part.out_features, part.in_features) for part in layers]
    if len(norms) != 2 or full % width or shapes != [(full, full)] * 4 + [(4 * full, full), (full, 4 * full)]:
        refuse(
            "init",
            "sliced",
            f"a {type(block).__name__} has Linear layers {shapes} and {len(norms)} LayerNorms, which is no "
            'plain encoder block; use init="random"',
        )
    ratio = full // width
    for own, source in zip((rung.q, rung.k, rung.v, rung.o, rung.up, rung.down), layers, strict=True):
        own.weight.copy_(source.weight[::ratio, ::ratio])
        own.bias.zero_() if source.bias is None else own.bias.copy_(source.bias[::ratio])
    for norm, given in zip((rung.norm1, rung.norm2), norms, strict=True):
        norm.weight.copy_(given.weight[::ratio])
        norm.bias.copy_(given.bias[::ratio])
    return rung


def _blocks_of(backbone: nn.Module, taps: str | Sequence[str], count: int) -> list[nn.Module]:
    names = FeatureTap(backbone, taps).names
    blocks = [backbone.get_submodule(name) for name in names[1:]] or list(find_blocks(backbone).values())
    if len(blocks) != count:
        refuse("init", "sliced", f'{len(blocks)} blocks were found for {count} rungs; use init="random"')
    return blocks
