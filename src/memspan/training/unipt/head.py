"""The trained part of UniPT: reads hidden states of all layers, knows nothing of the backbone.

A head works on given hidden states, so it trains from live, quantized, compiled or cached features alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from memspan.base import nearest, refuse
from memspan.training.unipt.parts import (
    ConfidenceAggregation,
    ParallelInteraction,
    Residual,
    SpatialAlign,
    as_bool,
    conv_norm,
    flat,
    fused,
    linear_norm,
    mean_over,
    rows_to_one,
    running_means,
    same_batch,
    spread,
    wide_product,
)

__all__ = ["PRESETS", "Preset", "Save", "UniPTDecoderHead", "UniPTHead", "from_official"]

Preset = Literal["token", "map", "embedding", "joint"]
Save = Literal["all", "recompute", "half"]

#: What each wiring of the official code is for.
PRESETS = {
    "token": "tokens of an encoder (VSE∞ on text)",
    "map": "feature maps of a CNN's stages (VSE∞ on images)",
    "embedding": "one embedding of a two-tower model (CLIP4Clip)",
    "joint": "tokens of a joint encoder (CLIP-ViL, MDETR's encoder)",
}
_LONG = 1024  # positions from which T² per layer is worth a second computation


class UniPTHead(nn.Module):
    """Parallel interaction of all layers with an anchor, weighed by confidence, mapped to ``out_dim``.

    Per layer ``F_i = LN(W_i H_i + b_i)`` of width d = out_dim / reduction; the anchor A is the last one's;
    ``M = Σ α_i (C_i + I) F_i`` over the others; ``y = Up(A + P(M))``. Source: Diao et al., UniPT, CVPR 2024,
    section 3; the four wirings are those of the official code.

    Args:
        hidden_sizes: D_i of every hidden state, the anchor last (preset ``embedding``: of every layer; the
            anchor is the embedding).
        out_dim: width of the output.
        reduction: out_dim / d, a divisor of out_dim.
        preset: the wiring, see :data:`PRESETS`.
        save: what stays for the backward pass. ``"all"``: what autograd keeps. ``"recompute"``: of each layer
            its hidden state, M_i and a mean; the rest is computed again. ``"half"``: likewise, with hidden
            states rounded to bfloat16. Above 1,024 positions layers are computed one after the other anyway.
        interaction: False leaves C_i out (an ablation: M_i = F_i).
        confidence: False weighs all layers alike (an ablation).
        up: False leaves Up out: the output is A + P(M), of width d (MDETR's encoder memory).
        causal: positions see themselves and earlier ones alone, in C_i and in the means behind α_i: for
            language models. Not of the paper. Presets token and joint.

    Shape:
        token, joint: hidden states (B, T, D_i) -> (B, T, out_dim); map: (B, D_i, r_i h, r_i w) ->
        (B, h w, out_dim); embedding: (B, T, D_i) and e (B, out_dim) -> (B, out_dim).

    Raises:
        BadInput: an unknown preset, a reduction that does not divide out_dim, too few layers; hidden states
            of the wrong number, width, batch or length; a mask of another shape or an additive one.

    Example:
        >>> head = UniPTHead([768] * 13, out_dim=1024, reduction=2)
        >>> sum(p.numel() for p in head.parameters())
        5921281
        >>> head([torch.randn(2, 5, 768)] * 13, torch.ones(2, 5)).shape
        torch.Size([2, 5, 1024])
    """

    def __init__(
        self,
        hidden_sizes: Sequence[int],
        out_dim: int,
        reduction: int = 2,
        preset: Preset = "token",
        *,
        save: Save = "all",
        interaction: bool = True,
        confidence: bool = True,
        up: bool = True,
        causal: bool = False,
    ) -> None:
        super().__init__()
        if causal and preset not in ("token", "joint"):
            refuse("causal", causal, f"preset {preset} has no order of positions; use token or joint")
        self.causal = causal
        sizes = tuple(int(size) for size in hidden_sizes)
        _check(sizes, out_dim, reduction, preset, save)
        width = out_dim // reduction
        self.hidden_sizes, self.out_dim, self.width = sizes, out_dim, width
        self.preset: Preset = preset
        self.save: Save = save
        self.interaction = interaction
        residual: Residual = "token" if preset == "embedding" else "identity"
        self.interact = ParallelInteraction(residual)
        self.aggregate = ConfidenceAggregation(width) if confidence else None
        self.align: SpatialAlign | None = None
        self.query: nn.Module | None = None
        self.project: nn.Module | None
        if preset == "map":
            self.align = SpatialAlign(sizes)
            self.down = nn.ModuleList(conv_norm(size, width) for size in sizes)
            self.project = conv_norm(width, width)
        elif preset == "embedding":
            self.down = nn.ModuleList(nn.Sequential(nn.ReLU(), nn.Linear(size, width)) for size in sizes)
            self.query = nn.Sequential(nn.ReLU(), nn.Linear(out_dim, width))
            self.project = None
        else:
            self.down = nn.ModuleList(linear_norm(size, width) for size in sizes)
            self.project = (
                linear_norm(width, width)
                if preset == "token"
                else nn.Sequential(
                    nn.Linear(width, out_dim), nn.ReLU(), nn.Linear(out_dim, width), nn.LayerNorm(width)
                )
            )
        self.up = _up(preset, width, out_dim) if up else None

    def forward(
        self,
        hidden: Sequence[Tensor],
        mask: Tensor | None = None,
        *,
        embedding: Tensor | None = None,
        position: Tensor | None = None,
        last: int | None = None,
    ) -> Tensor:
        """Read the hidden states.

        Args:
            hidden: one tensor per layer, shallow first, without gradients.
            mask: (B, T), 1 where a position counts; not for preset ``map``.
            embedding: e (B, out_dim), for preset ``embedding`` alone.
            position: (B,) the class or end-of-text place of each sample, for preset ``embedding`` (None: 0).
            last: of a causal head: how many positions at the end are asked for; None: all.
        """
        hidden, mask = self._checked(hidden, mask, embedding)
        if self.causal:
            return self._causal(hidden, mask, last)
        if last is not None:
            refuse("last", last, "every position sees all others here: only a causal head gives a part")
        layers, anchor = self._layers(hidden, embedding)
        pooled = anchor[:, 0] if self.query is not None else mean_over(anchor, mask)
        if self._one_by_one(layers):
            merged = self._merge_one_by_one(layers, anchor, pooled, mask, position)
        else:
            targets = self._targets(layers)
            alpha = self._confidence(pooled, targets, mask)
            merged = self._merge(targets, anchor, alpha, mask, position)
        return self._out(anchor, merged, hidden[-1], embedding)

    def confidence(
        self, hidden: Sequence[Tensor], mask: Tensor | None = None, *, embedding: Tensor | None = None
    ) -> Tensor:
        """α (B, L): how much each sample trusts each layer, the anchor left out.

        Raises:
            BadInput: as in ``forward``, or the head was made without confidence.
        """
        if self.aggregate is None:
            refuse("confidence", False, "this head weighs all layers alike")
        hidden, mask = self._checked(hidden, mask, embedding)
        layers, anchor = self._layers(hidden, embedding)
        pooled = anchor[:, 0] if self.query is not None else mean_over(anchor, mask)
        alpha = self._confidence(pooled, self._targets(layers), mask)
        assert alpha is not None
        return alpha

    # -- the parts of a forward pass -------------------------------------------------------------------------

    def _layers(self, hidden: Sequence[Tensor], embedding: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """What interacts, layer by layer (maps aligned, not yet projected), and the projected anchor."""
        if self.query is not None:
            assert embedding is not None
            return list(hidden), self.query(embedding.to(self._dtype)).unsqueeze(1)
        if self.align is not None:
            whole = [one.to(self._dtype) for one in hidden]
            return self.align(whole), flat(self.down[-1](whole[-1]))
        return list(hidden[:-1]), self._project(len(hidden) - 1, hidden[-1])

    def _targets(self, layers: Sequence[Tensor]) -> Tensor:
        return torch.stack([self._project(place, layer) for place, layer in enumerate(layers)], dim=1)

    def _project(self, place: int, hidden: Tensor) -> Tensor:
        """F of one layer (B, T, d); where hidden states alone are kept, through a checkpoint."""
        if self.save != "all" and torch.is_grad_enabled():
            projected: Tensor = checkpoint(self._down, place, hidden, use_reentrant=False)
            return projected
        return self._down(place, hidden)

    def _down(self, place: int, hidden: Tensor) -> Tensor:
        projected: Tensor = self.down[place](hidden.to(self._dtype))
        return flat(projected) if self.align is not None else projected

    def _confidence(self, pooled: Tensor, targets: Tensor, mask: Tensor | None) -> Tensor | None:
        if self.aggregate is None:
            return None
        if mask is None:
            return self.aggregate.confidence(pooled, targets.mean(dim=2))
        share = mask.to(targets.dtype)
        share = share / share.sum(dim=1, keepdim=True).clamp_min(1)
        means = share[:, None, None] @ targets  # as a product: nothing of the size of F is written
        return self.aggregate.confidence(pooled, means.squeeze(2))

    def _merge(
        self,
        targets: Tensor,
        anchor: Tensor,
        alpha: Tensor | None,
        mask: Tensor | None,
        position: Tensor | None,
    ) -> Tensor:
        if self.interaction:
            return fused(anchor, targets, alpha, mask, self.interact.residual, position)
        if alpha is None:
            return targets.mean(dim=1)
        return (alpha.unsqueeze(1) @ targets.flatten(2)).view_as(targets[:, 0])

    def _one_by_one(self, layers: Sequence[Tensor]) -> bool:
        places = layers[0].shape[2:].numel() if self.align is not None else layers[0].shape[1]
        return self.interaction and torch.is_grad_enabled() and (self.save != "all" or places > _LONG)

    def _merge_one_by_one(
        self,
        layers: Sequence[Tensor],
        anchor: Tensor,
        pooled: Tensor,
        mask: Tensor | None,
        position: Tensor | None,
    ) -> Tensor:
        """Layer after layer, so that T² exists for one layer at a time."""
        merged, means = [], []
        for place, layer in enumerate(layers):
            # A norm with running statistics must see its batch once: maps are projected outside.
            given = self._down(place, layer) if self.align is not None else layer
            one, mean = checkpoint(self._one, place, given, anchor, mask, position, use_reentrant=False)
            merged.append(one)
            means.append(mean)
        if self.aggregate is None:
            return torch.stack(merged).mean(dim=0)
        total, _ = self.aggregate(pooled, torch.stack(means, dim=1), merged)
        return total  # type: ignore[no-any-return]

    def _one(
        self, place: int, layer: Tensor, anchor: Tensor, mask: Tensor | None, position: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        target = layer if self.align is not None else self._down(place, layer)
        merged, _ = self.interact(anchor, target, mask, position)
        return merged, mean_over(target, mask)

    def _causal(self, hidden: Sequence[Tensor], mask: Tensor | None, last: int | None) -> Tensor:
        """As the parallel wiring, but each position as if the sequence ended there."""
        places = hidden[0].shape[1]
        last = places if last is None else last
        anchor = self._project(len(hidden) - 1, hidden[-1])
        averages = running_means(anchor, mask, last)
        scores, merged = [], []
        seen = anchor.new_ones(last, places, dtype=torch.bool).tril(places - last)
        keep = seen if mask is None else seen & mask[:, None]
        again = torch.is_grad_enabled() and (self.save != "all" or places > _LONG)
        for place, layer in enumerate(hidden[:-1]):
            given = (place, layer, anchor[:, -last:], averages, keep, mask)
            one, score = (
                checkpoint(self._one_causal, *given, use_reentrant=False)
                if again
                else self._one_causal(*given)
            )
            merged.append(one)
            scores.append(score)
        shares = torch.stack(scores, dim=-1).softmax(dim=-1)  # (B, last, L)
        total = (torch.stack(merged, dim=-1) * shares.unsqueeze(2)).sum(-1)
        return self._out(anchor[:, -last:], total, hidden[-1], None)

    def _one_causal(
        self,
        place: int,
        layer: Tensor,
        asking: Tensor,
        averages: Tensor,
        keep: Tensor,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """M_i of the last positions (B, Q, d) and what each thinks of the layer (B, Q)."""
        target = self._project(place, layer)
        last = asking.shape[1]
        merged = target[:, -last:]
        if self.interaction:
            weights = rows_to_one(wide_product(asking, target).masked_fill(~keep, 0.0)).to(target.dtype)
            merged = merged + weights @ target
        if self.aggregate is None:
            return merged, merged.new_zeros(merged.shape[:2])
        trusted: Tensor = self.aggregate.gate(averages * running_means(target, mask, last)).squeeze(-1)
        return merged, trusted

    def _out(self, anchor: Tensor, merged: Tensor, last: Tensor, embedding: Tensor | None) -> Tensor:
        if embedding is not None:
            assert self.up is not None
            lifted: Tensor = self.up(merged).squeeze(1)
            return embedding.to(lifted.dtype) + lifted
        assert self.project is not None
        if self.align is not None:
            summed = spread(anchor, last) + self.project(spread(merged, last))
            return flat(self.up(summed) if self.up is not None else summed)
        summed = anchor + self.project(merged)
        answer: Tensor = self.up(summed) if self.up is not None else summed
        return answer

    # -- at the door -----------------------------------------------------------------------------------------

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.down.parameters()).dtype

    def _checked(
        self, hidden: Sequence[Tensor], mask: Tensor | None, embedding: Tensor | None
    ) -> tuple[list[Tensor], Tensor | None]:
        if len(hidden) != len(self.hidden_sizes):
            refuse("hidden", f"{len(hidden)} tensors", f"this head reads {len(self.hidden_sizes)} layers")
        check_hidden(hidden, self.hidden_sizes, maps=self.align is not None)
        if self.align is not None and mask is not None:
            refuse("mask", tuple(mask.shape), "maps have no padding; leave the mask out")
        if (embedding is not None) != (self.query is not None):
            refuse(
                "embedding",
                embedding,
                f"give the final embedding with preset embedding alone, not {self.preset}",
            )
        if embedding is not None and embedding.shape != (hidden[0].shape[0], self.out_dim):
            refuse("embedding", tuple(embedding.shape), f"give (B, {self.out_dim})")
        mask = None if mask is None else as_bool(mask, hidden[0].shape[:2])
        if self.save == "half":
            return [one.to(torch.bfloat16) for one in hidden], mask
        return list(hidden), mask


class UniPTDecoderHead(nn.Module):
    """UniPT beside a decoder: layers first ask the encoder's side memory, then the anchor asks the layers.

    MDETR's wiring: each selected layer adds ``LN(Linear(C memory))``, with C the same ReLU-L1 attention
    without identity; the anchor is the last layer and does not ask the memory. All selected layers and the
    merged one are given, for a loss on each.

    Args:
        hidden_sizes: of the selected layers, the last decoder layer (the anchor) at the end.
        out_dim: width of the output.
        reduction: out_dim / d.

    Raises:
        BadInput: as :class:`UniPTHead`.

    Example:
        >>> encoder = UniPTHead([64] * 4, 64, preset="joint", up=False)  # layers 1, 3, 5 and the last
        >>> memory = encoder([torch.randn(2, 9, 64)] * 4)
        >>> UniPTDecoderHead([64] * 4, 64)([torch.randn(2, 5, 64)] * 4, memory).shape
        torch.Size([4, 2, 5, 64])
    """

    def __init__(self, hidden_sizes: Sequence[int], out_dim: int, reduction: int = 2) -> None:
        super().__init__()
        self.side = UniPTHead(hidden_sizes, out_dim, reduction, "joint", up=False)
        width = self.side.width
        self.ask = ParallelInteraction(residual=None)
        self.cross = nn.ModuleList(linear_norm(width, width) for _ in hidden_sizes[:-1])
        self.up = nn.Sequential(nn.ReLU(), nn.Linear(width, out_dim), nn.LayerNorm(out_dim))

    def forward(self, hidden: Sequence[Tensor], memory: Tensor, memory_mask: Tensor | None = None) -> Tensor:
        """Read the decoder's hidden states.

        Args:
            hidden: (B, Q, D_i) per layer, the last decoder layer at the end.
            memory: the encoder head's output (B, T, d).
            memory_mask: (B, T), 1 where a position counts.

        Returns:
            (n, B, Q, out_dim): the n - 1 selected layers, then the merged one.
        """
        side = self.side
        hidden, _ = side._checked(hidden, None, None)
        if memory.dim() != 3 or memory.shape[::2] != (hidden[0].shape[0], side.width):
            refuse("memory", tuple(memory.shape), f"give (B, T, {side.width}), the encoder head's output")
        anchor, targets = side._project(len(hidden) - 1, hidden[-1]), []
        for place, layer in enumerate(hidden[:-1]):
            target = side._project(place, layer)
            related, _ = self.ask(target, memory, memory_mask)
            targets.append(target + self.cross[place](related))
        stacked = torch.stack(targets, dim=1)
        alpha = side._confidence(anchor.mean(dim=1), stacked, None)
        merged = side._out(anchor, side._merge(stacked, anchor, alpha, None, None), anchor, None)
        answer: Tensor = self.up(torch.stack([*targets, merged]))
        return answer


def from_official(state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Rename the tensors of an official checkpoint's side module to those of :class:`UniPTHead`.

    Args:
        state: a state_dict of the VSE∞, CLIP4Clip or CLIP-ViL code.
        prefix: what stands before the side module's names; other entries are left out.

    Returns:
        A state that loads strictly into a head of the same sizes and preset.

    Raises:
        BadInput: an unknown name under the prefix, or nothing under it.

    Example:
        >>> list(from_official({"txt.gate_layer.weight": torch.zeros(1, 4)}, "txt."))
        ['aggregate.gate.weight']
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not name.startswith(prefix):
            continue
        first, _, rest = name.removeprefix(prefix).partition(".")
        if first == "side_downsamples_l":  # CLIP-ViL keeps the embedding output's projection apart
            place, _, rest = rest.partition(".")
            renamed[f"down.{int(place) + 1}.{rest}"] = tensor
        elif first in _OFFICIAL:
            renamed[f"{_OFFICIAL[first]}.{rest}"] = tensor
        else:
            refuse("state", name, f"not a name of the official side modules; {nearest(first, _OFFICIAL)}")
    if not renamed:
        refuse("prefix", prefix, "no entry begins with it")
    return renamed


_OFFICIAL = {
    "downsample_layers": "down",
    "downsample_layer": "query",
    "projection_layer": "project",
    "upsample_layer": "up",
    "gate_layer": "aggregate.gate",
    "identity_layers": "align.identity",
    "side_first_downsample_l": "down.0",
    "side_projection_l": "project",
    "side_final_upsample_l": "up",
    "side_gate_layer_l": "aggregate.gate",
}


def check_hidden(hidden: Sequence[Tensor], sizes: Sequence[int], *, maps: bool) -> None:
    """Refuse hidden states of another rank, width, batch or length.

    Raises:
        BadInput: what is wrong, and where.
    """
    same_batch(hidden)
    for place, (one, size) in enumerate(zip(hidden, sizes, strict=True)):
        rank, channel, kind = (4, 1, "maps (B, D, H, W)") if maps else (3, 2, "tokens (B, T, D)")
        if one.dim() != rank or one.shape[channel] != size:
            remedy = f"layer {place} must be {kind} with D = {size}"
            if one.dim() == 4 and not maps:
                remedy += '; feature maps go to SpatialUniPT, or preset="map"'
            refuse("hidden", tuple(one.shape), remedy)
    if not maps and len({one.shape[1] for one in hidden}) > 1:
        refuse(
            "hidden",
            [tuple(one.shape) for one in hidden],
            "all layers must have one length T; for stages of different size use SpatialUniPT",
        )


def _check(sizes: tuple[int, ...], out_dim: int, reduction: int, preset: str, save: str) -> None:
    if preset not in PRESETS:
        refuse("preset", preset, nearest(str(preset), PRESETS))
    if save not in ("all", "recompute", "half"):
        refuse("save", save, 'use "all", "recompute" or "half"')
    if save != "all" and preset == "map":
        refuse("save", save, 'maps keep "all": their norms must not see a batch twice')
    if len(sizes) < (1 if preset == "embedding" else 2) or min(sizes, default=0) < 1:
        refuse("hidden_sizes", sizes, "give the widths of two layers or more, the anchor last")
    if out_dim < 1 or reduction < 1 or out_dim % reduction:
        refuse("reduction", reduction, f"choose a divisor of out_dim={out_dim}")


def _up(preset: Preset, width: int, out_dim: int) -> nn.Sequential:
    if preset == "joint":
        return nn.Sequential(nn.Linear(width, out_dim))
    if preset == "map":
        return nn.Sequential(nn.ReLU(), nn.Conv2d(width, out_dim, 1))
    return nn.Sequential(nn.ReLU(), nn.Linear(width, out_dim))
