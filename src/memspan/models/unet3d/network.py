"""The network: MBConv blocks, reversible chains of them, and a 3-D U-Net of such chains.

The U-Net is the partially reversible one of Brügger et al. 2019: pooling, changes of width and upsampling
between levels are ordinary layers, what is done at one width is a reversible chain.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memspan.base import refuse
from memspan.nn.reversible import Memory, ReversibleBlock, ReversibleSequential

__all__ = ["Conv3dBlock", "MBConv3d", "ReversibleMBConv3d", "ReversibleUNet3d"]

Norm = Literal["group", "batch"]
Act = Literal["leaky_relu", "silu"]
GROUPS = 30  # of the published networks; narrower layers take the largest divisor below


class MBConv3d(nn.Sequential):
    """A mobile inverted bottleneck without an identity skip: widen, look around channel by channel, narrow.

    Each convolution follows a norm and an activation, so that the block's output has a bounded gain whatever
    the size of its input; a reversible chain then loses little to rounding.

    Args:
        channels: c, of input and output.
        expansion: t, inner channels over c.
        kernel_size: of the depthwise convolution; odd.
        norm: ``"group"`` (largest number of groups up to 30 that divides c) or ``"batch"``.
        act: ``"leaky_relu"`` (0.01) or ``"silu"``.
        se_ratio: width of a squeeze-excite over c; 0 leaves it out.

    Shape:
        ``(B, c, D, H, W)`` to the same. Parameters: 2tc² + k³tc in convolutions (without biases), and
        2c + 4tc in norms.

    Raises:
        BadInput: a width, expansion, kernel or ratio that makes no block.

    Example:
        >>> block = MBConv3d(30, expansion=4)
        >>> sum(p.numel() for p in block.parameters() if p.dim() > 1)
        10440
        >>> block(torch.zeros(1, 30, 4, 4, 4)).shape
        torch.Size([1, 30, 4, 4, 4])
    """

    def __init__(
        self,
        channels: int,
        expansion: int = 4,
        kernel_size: int = 3,
        norm: Norm = "group",
        act: Act = "leaky_relu",
        se_ratio: float = 0.0,
    ) -> None:
        if channels < 1:
            refuse("channels", channels, "use 1 or more")
        if not isinstance(expansion, int) or expansion < 1:
            refuse("expansion", expansion, "use a whole number, 1 or more (1 to 6 are usual)")
        if kernel_size < 1 or kernel_size % 2 == 0:
            refuse("kernel_size", kernel_size, "use an odd number, so that the shape is kept")
        if not 0 <= se_ratio <= 1:
            refuse("se_ratio", se_ratio, "use 0 (no squeeze-excite) to 1")
        inner = expansion * channels
        layers: list[nn.Module] = [
            _norm(norm, channels, channels), _act(act), nn.Conv3d(channels, inner, 1, bias=False),
            _norm(norm, inner, channels), _act(act),
            nn.Conv3d(inner, inner, kernel_size, padding=kernel_size // 2, groups=inner, bias=False),
            _norm(norm, inner, channels), _act(act),
        ]  # fmt: skip
        if se_ratio:
            layers.append(_SqueezeExcite(inner, max(1, round(channels * se_ratio))))
        layers.append(nn.Conv3d(inner, channels, 1, bias=False))
        super().__init__(*layers)
        self.expansion = expansion
        _initialise(self)


class Conv3dBlock(nn.Sequential):
    """Norm, activation and one dense 3x3x3 convolution: the part of the predecessor (Brügger et al. 2019).

    Args:
        channels: of input and output.
        norm: as in :class:`MBConv3d`.
        act: as in :class:`MBConv3d`.

    Example:
        >>> Conv3dBlock(4)(torch.zeros(1, 4, 4, 4, 4)).shape
        torch.Size([1, 4, 4, 4, 4])
    """

    def __init__(self, channels: int, norm: Norm = "group", act: Act = "leaky_relu") -> None:
        convolution = nn.Conv3d(channels, channels, 3, padding=1, bias=False)
        super().__init__(_norm(norm, channels, channels), _act(act), convolution)
        _initialise(self)


class ReversibleMBConv3d(ReversibleBlock):
    """A coupling whose F and G are :class:`MBConv3d` of half of the channels.

    Args:
        channels: C, even; F and G work on C/2.
        options: of :class:`MBConv3d`.

    Raises:
        BadInput: an odd number of channels, or as :class:`MBConv3d`.

    Example:
        >>> block, x = ReversibleMBConv3d(8), torch.randn(1, 8, 4, 4, 4)
        >>> torch.allclose(block.inverse(block(x)), x, atol=1e-5)
        True
    """

    def __init__(self, channels: int, **options: Any) -> None:
        half = _half(channels)
        super().__init__(MBConv3d(half, **options), MBConv3d(half, **options))


class ReversibleUNet3d(nn.Module):
    """A 3-D U-Net that trains on larger volumes, deeper or wider in the same bytes.

    At each level of resolution an encoder chain and a decoder chain of ``depth`` couplings; max pooling and a
    1x1x1 convolution go down, a 1x1x1 convolution and interpolation go up, skips are added. The state dict is
    the same whatever ``memory`` is, and so are the outputs.

    Args:
        in_channels: modalities of the volume.
        out_channels: maps; logits, one for each nested region.
        channels: widths of the levels, finest first; even.
        depth: couplings in each chain, one number or one for each level.
        block: ``"mbconv"`` (:class:`MBConv3d`) or ``"conv"`` (:class:`Conv3dBlock`).
        memory: ``"reversible"``, ``"store"`` or ``"checkpoint"``; may be set later (``net.memory = ...``).
        skip: ``"add"``, or ``"concat"`` (and a 1x1x1 convolution), which keeps twice as much there.
        upsample: ``"trilinear"`` or ``"nearest"``.
        options: of the block: ``expansion``, ``norm``, ``act``, ``se_ratio``, ``kernel_size``.

    Shape:
        ``(B, in_channels, D, H, W)`` to ``(B, out_channels, D, H, W)``; D, H and W divisible by
        ``net.multiple`` = 2^(levels - 1), else refused: pad, or use sliding windows.

    Raises:
        BadInput: odd widths, depths below 1, unknown names; in the forward pass another shape.

    Example:
        >>> net = ReversibleUNet3d(4, 3, channels=(8, 16), depth=2)
        >>> net(torch.zeros(1, 4, 8, 8, 8)).shape
        torch.Size([1, 3, 8, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: Sequence[int] = (60, 120, 240, 360, 480),
        depth: int | Sequence[int] = 1,
        block: Literal["mbconv", "conv"] = "mbconv",
        memory: Memory = "reversible",
        skip: Literal["add", "concat"] = "add",
        upsample: Literal["trilinear", "nearest"] = "trilinear",
        **options: Any,
    ) -> None:
        super().__init__()
        for name, count in (("in_channels", in_channels), ("out_channels", out_channels)):
            if count < 1:
                refuse(name, count, "use 1 or more")
        if not channels:
            refuse("channels", channels, "give the width of one level or more")
        depths = (depth,) * len(channels) if isinstance(depth, int) else tuple(depth)
        if len(depths) != len(channels) or min(depths) < 1:
            refuse("depth", depth, f"give 1 or more couplings, once or for each of {len(channels)} levels")
        kinds = {"mbconv": MBConv3d, "conv": Conv3dBlock}
        for name, value, known in (
            ("block", block, tuple(kinds)), ("skip", skip, ("add", "concat")),
            ("upsample", upsample, ("trilinear", "nearest")),
        ):  # fmt: skip
            if value not in known:
                refuse(name, value, f"use one of {', '.join(map(repr, known))}")
        self.in_channels, self.channels, self.depths = in_channels, tuple(channels), depths
        self.multiple: int = 2 ** (len(self.channels) - 1)
        self.skip, self.upsample, self.block = skip, upsample, block
        part = kinds[block]

        def chain(level: int) -> ReversibleSequential:
            half = _half(self.channels[level])
            blocks = (
                ReversibleBlock(part(half, **options), part(half, **options)) for _ in range(depths[level])
            )
            return ReversibleSequential(*blocks, memory=memory)

        steps = list(pairwise(self.channels))
        self.stem = nn.Conv3d(in_channels, self.channels[0], 3, padding=1, bias=False)
        self.down = nn.ModuleList(nn.Conv3d(fine, coarse, 1) for fine, coarse in steps)
        self.encoder = nn.ModuleList(chain(level) for level in range(len(self.channels)))
        self.decoder = nn.ModuleList(chain(level) for level in range(len(self.channels)))
        self.up = nn.ModuleList(nn.Conv3d(coarse, fine, 1) for fine, coarse in steps)
        joins = steps if skip == "concat" else ()
        self.join = nn.ModuleList(nn.Conv3d(2 * fine, fine, 1) for fine, _ in joins)
        self.head = nn.Conv3d(self.channels[0], out_channels, 1)
        _initialise(self.stem, self.down, self.up, self.join)

    @property
    def memory(self) -> Memory:
        """What the chains keep for the backward pass."""
        return next(self.chains()).memory

    @memory.setter
    def memory(self, value: Memory) -> None:
        for chain in self.chains():
            chain.memory = value

    def chains(self) -> Iterator[ReversibleSequential]:
        """All reversible chains, encoder first."""
        for chain in (*self.encoder, *self.decoder):
            assert isinstance(chain, ReversibleSequential)
            yield chain

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the maps."""
        if x.dim() != 5 or x.shape[1] != self.in_channels:
            refuse("x", tuple(x.shape), f"give (B, {self.in_channels}, D, H, W)")
        if any(side % self.multiple or not side for side in x.shape[2:]):
            remedy = (
                f"sides must be multiples of {self.multiple}; pad the volume, or predict in sliding windows"
            )
            refuse("x", tuple(x.shape), remedy)
        x = self.encoder[0](self.stem(x))
        skips = []
        for narrow, chain in zip(self.down, list(self.encoder)[1:], strict=True):
            skips.append(x)
            x = chain(narrow(F.max_pool3d(x, 2)))
        for level in range(len(self.channels) - 1, 0, -1):
            x = self._enlarged(self.up[level - 1](self.decoder[level](x)))
            x = self._joined(x, skips.pop(), level - 1)
        return self.head(self.decoder[0](x))  # type: ignore[no-any-return]

    def _enlarged(self, x: Tensor) -> Tensor:
        if self.upsample == "nearest":
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        return F.interpolate(x, scale_factor=2.0, mode="trilinear", align_corners=False)

    def _joined(self, x: Tensor, skip: Tensor, level: int) -> Tensor:
        if self.skip == "add":
            return x + skip
        return self.join[level](torch.cat((x, skip), 1))  # type: ignore[no-any-return]


class _SqueezeExcite(nn.Module):
    """Scale channels by what their means say."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv3d(channels, inner, 1)
        self.excite = nn.Conv3d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean((2, 3, 4), keepdim=True)
        return x * torch.sigmoid(self.excite(F.silu(self.squeeze(means))))


def _half(channels: int) -> int:
    if channels < 2 or channels % 2:
        refuse("channels", channels, "use an even number: a coupling splits it in two halves")
    return channels // 2


def _norm(kind: str, channels: int, divisible: int) -> nn.Module:
    if kind == "batch":
        return nn.BatchNorm3d(channels)
    if kind != "group":
        refuse("norm", kind, "use 'group' or 'batch'")
    groups = next(n for n in range(min(GROUPS, divisible), 0, -1) if divisible % n == 0)
    return nn.GroupNorm(groups, channels)


def _act(kind: str) -> nn.Module:
    if kind == "leaky_relu":
        return nn.LeakyReLU(0.01)
    if kind != "silu":
        refuse("act", kind, "use 'leaky_relu' or 'silu'")
    return nn.SiLU()


def _initialise(*modules: nn.Module) -> None:
    for module in modules:
        for part in module.modules():
            if isinstance(part, nn.Conv3d):
                nn.init.kaiming_normal_(part.weight, a=0.01)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
