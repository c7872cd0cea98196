"""EfficientViT of Microsoft Research: the whole network, from small blocks to the entry functions.

Problem: on CPUs, phones and small batches a vision transformer waits for memory (reshapes, sums, softmax,
normalisation), not for arithmetic. Idea: one attention between cheap convolutional blocks instead of
attention everywhere, heads that see one slice of the channels each and refine one another, and batch
normalisation alone, which folds into its convolution at inference.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memspan.base import refuse

__all__ = [
    "VARIANTS",
    "BNLinear",
    "CascadedGroupAttention",
    "ConvBN",
    "EfficientViT",
    "FeaturePyramid",
    "MultiHeadAttention",
    "PatchMerging",
    "Residual",
    "SandwichBlock",
    "WindowAttention",
    "efficientvit_m0",
    "efficientvit_m1",
    "efficientvit_m2",
    "efficientvit_m3",
    "efficientvit_m4",
    "efficientvit_m5",
    "features_only",
    "fuse_",
]

Mixer = Literal["cga", "group", "mhsa"]


class ConvBN(nn.Module):
    """Convolution without bias, then batch normalisation; one convolution after :meth:`fuse`.

    Args:
        in_channels: channels of the input ``(B, in_channels, H, W)``.
        out_channels: channels of the output.
        kernel_size: side of the kernel.
        stride: stride.
        padding: zeros on each side.
        groups: channel groups; ``in_channels`` for a depthwise convolution.
        zero: start the normalisation's weight at 0, so that a residual branch begins as the identity.

    Example:
        >>> layer = ConvBN(3, 8, 3, stride=2, padding=1).eval()
        >>> x = torch.randn(1, 3, 4, 4)
        >>> bool(torch.allclose(layer(x), layer.fuse()(x), atol=1e-6))
        True
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        zero: bool = False,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False
        )
        self.bn = nn.BatchNorm2d(out_channels)
        nn.init.constant_(self.bn.weight, 0.0 if zero else 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, in_channels, H, W)`` to ``(B, out_channels, H', W')``."""
        return self.bn(self.conv(x))  # type: ignore[no-any-return]

    @torch.no_grad()
    def fuse(self) -> nn.Conv2d:
        """One convolution that computes what this layer computes in evaluation mode.

        W' = W γ/√(σ²+ε) for each output channel, b' = β − μ γ/√(σ²+ε).

        Raises:
            BadInput: the layer is in training mode, where batch statistics are in use.
        """
        _must_be_eval(self)
        scale, shift = _scale_and_shift(self.bn)
        fused = _bare_conv(self.conv)
        fused.weight.copy_(self.conv.weight * scale[:, None, None, None])
        assert fused.bias is not None
        fused.bias.copy_(shift)
        return fused.eval()


class BNLinear(nn.Module):
    """Batch normalisation, then a linear layer: the classifier; one linear layer after :meth:`fuse`.

    Args:
        in_features: width of the input ``(B, in_features)``.
        out_features: number of classes.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(in_features)
        self.linear = nn.Linear(in_features, out_features)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, in_features)`` to ``(B, out_features)``.

        Raises:
            BadInput: training mode with one row, which has no variance.
        """
        if self.training and x.shape[0] == 1:
            refuse(
                "batch size",
                1,
                "the head's batch normalisation cannot train on one image: give 2 or more "
                "(DataLoader(drop_last=True)), or put the head's norm in eval mode: model.head.eval()",
            )
        return self.linear(self.bn(x))  # type: ignore[no-any-return]

    @torch.no_grad()
    def fuse(self) -> nn.Linear:
        """One linear layer: W' = W diag(γ/√(σ²+ε)), b' = b + W(β − μ γ/√(σ²+ε)).

        Raises:
            BadInput: the layer is in training mode.
        """
        _must_be_eval(self)
        scale, shift = _scale_and_shift(self.bn)
        linear = self.linear
        fused = nn.Linear(
            linear.in_features, linear.out_features, device=linear.weight.device, dtype=linear.weight.dtype
        )
        fused.weight.copy_(linear.weight * scale)
        fused.bias.copy_(linear.bias + linear.weight @ shift)
        return fused.eval()


class Residual(nn.Module):
    """x + m(x).

    Args:
        m: a module that keeps the shape.
    """

    def __init__(self, m: nn.Module) -> None:
        super().__init__()
        self.m = m

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape of ``x``."""
        return x + self.m(x)  # type: ignore[no-any-return]

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """Fold the sum into the branch where it is one depthwise convolution: its middle tap rises by 1.

        Saves reading and writing the whole map once. Other branches keep their sum.
        """
        conv = self.m
        if not (isinstance(conv, nn.Conv2d) and conv.groups == conv.in_channels == conv.out_channels):
            return self
        conv.weight[:, 0, conv.kernel_size[0] // 2, conv.kernel_size[1] // 2] += 1
        return conv


class FFN(nn.Module):
    """Two 1x1 convolutions with ReLU between and expansion 2 (transformers use 4).

    Args:
        dim: channels C of ``(B, C, H, W)``.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.pw1 = ConvBN(dim, 2 * dim)
        self.act = nn.ReLU(inplace=True)
        self.pw2 = ConvBN(2 * dim, dim, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape ``(B, C, H, W)``."""
        return self.pw2(self.act(self.pw1(x)))  # type: ignore[no-any-return]


class _BiasedAttention(nn.Module):
    """What both kinds of attention share: the bias table over |Δrow|, |Δcol| and how it is read.

    The table is gathered on every call while it may still change. A cache that outlives a loaded state or an
    optimizer step is a classic fault of this network; only :func:`fuse_`, which is final, keeps the result.
    """

    attention_biases: nn.Parameter
    fused_bias: Tensor | None

    def __init__(self, num_heads: int, resolution: tuple[int, int]) -> None:
        super().__init__()
        self.num_heads, self.resolution = num_heads, resolution
        self.attention_biases = nn.Parameter(torch.zeros(num_heads, resolution[0] * resolution[1]))
        self.register_buffer("fused_bias", None, persistent=False)
        self.register_load_state_dict_post_hook(_refresh_fused_bias)  # type: ignore[no-untyped-call]

    @property
    def bias_index(self) -> Tensor:
        """Where the bias of each pair of positions stands in the table, ``(N, N)``; made anew, never kept."""
        return _bias_index(self.resolution, self.attention_biases.device)

    def bias(self) -> Tensor:
        """The bias of every pair of positions, ``(heads, N, N)``."""
        if self.fused_bias is not None:
            return self.fused_bias
        index = self.bias_index
        return self.attention_biases.index_select(1, index.flatten()).view(-1, *index.shape)

    @torch.no_grad()
    def fuse_(self) -> Self:
        """Gather the bias once and keep it; the table stays in the state dict, frozen."""
        self.fused_bias = None
        self.fused_bias = self.bias().detach().clone()
        self.attention_biases.requires_grad_(False)
        return self

    @torch.no_grad()
    def set_resolution_(self, resolution: tuple[int, int]) -> Self:
        """Make the attention fit another window; the bias table is interpolated (bicubic, antialiased)."""
        if resolution != self.resolution:
            table = resize_bias_table(self.attention_biases, self.resolution, resolution)
            self.attention_biases = nn.Parameter(table, requires_grad=self.attention_biases.requires_grad)
            self.resolution = resolution
            if self.fused_bias is not None:
                self.fuse_()
        return self

    def attention_maps(self, x: Tensor) -> Tensor:
        """The attention of each head on windows ``(B, C, *resolution)``, as ``(B, heads, N, N)``."""
        raise NotImplementedError

    def _enter(self, x: Tensor) -> Tensor:
        if tuple(x.shape[-2:]) != self.resolution:
            refuse(
                "x",
                tuple(x.shape),
                f"this attention reads maps of {self.resolution[0]}x{self.resolution[1]}; wrap it in "
                "WindowAttention for larger ones, or call set_resolution_",
            )
        # Also for correctness: with one image, contiguous planes and norms in evaluation mode, torch (2.13,
        # CPU) derives a wrong gradient of batch normalisation from the transposed gradient of the query.
        return _channels_last(x)


class CascadedGroupAttention(_BiasedAttention):
    """Attention whose heads see one slice of the channels each, and the previous head's output.

    Head j reads u_j = X_j + O_{j-1} (u_1 = X_1), projects it to query, key and value by one 1x1 convolution,
    passes the query through a depthwise convolution, and gives O_j = V softmax(QᵀK/√d + b_j)ᵀ. Each head
    projects C/h channels instead of C: h times fewer parameters and operations for the projections. The
    heads are joined, rectified and mixed by a 1x1 convolution that starts at zero.

    Args:
        dim: channels C; the heads share them equally, and values have C/h channels.
        num_heads: heads h.
        key_dim: channels of queries and keys.
        resolution: rows and columns of the maps it reads.
        kernels: sides of the query convolutions, odd, one a head; more than h is allowed.
        cascade: False makes the heads independent (u_j = X_j), for ablation.

    Raises:
        BadInput: C not divisible by h, too few kernels, an even kernel, or a map of another size.

    References:
        Liu et al., "EfficientViT: Memory Efficient Vision Transformer with Cascaded Group Attention",
        CVPR 2023, section 3.2.

    Example:
        >>> mixer = CascadedGroupAttention(64, num_heads=4, kernels=(5, 5, 5, 5))
        >>> mixer(torch.randn(2, 64, 7, 7)).shape
        torch.Size([2, 64, 7, 7])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        key_dim: int = 16,
        resolution: tuple[int, int] = (7, 7),
        kernels: Sequence[int] = (5, 5, 5, 5),
        cascade: bool = True,
    ) -> None:
        _check_heads(dim, num_heads)
        if len(kernels) < num_heads:
            refuse("kernels", tuple(kernels), f"give one kernel size for each of the {num_heads} heads")
        if any(side % 2 == 0 for side in kernels):
            refuse("kernels", tuple(kernels), "use odd sizes: an even kernel changes the map's size")
        super().__init__(num_heads, resolution)
        self.dim, self.key_dim, self.value_dim, self.cascade = dim, key_dim, dim // num_heads, cascade
        self.qkvs = nn.ModuleList(
            ConvBN(dim // num_heads, 2 * key_dim + self.value_dim) for _ in range(num_heads)
        )
        self.dws = nn.ModuleList(
            ConvBN(key_dim, key_dim, side, padding=side // 2, groups=key_dim) for side in kernels[:num_heads]
        )
        self.proj = nn.Sequential(nn.ReLU(inplace=True), ConvBN(dim, dim, zero=True))

    def forward(self, x: Tensor) -> Tensor:
        """Mix the positions of ``(B, C, H, W)``; H and W as in ``resolution``."""
        return self.proj(self._heads(x)[0])  # type: ignore[no-any-return]

    def attention_maps(self, x: Tensor) -> Tensor:
        """The attention of each head on ``(B, C, H, W)``, as ``(B, heads, N, N)`` with rows that sum to 1."""
        return torch.stack(self._heads(x)[1], 1)

    def _heads(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = self._enter(x)
        bias = self.bias()
        outputs: list[Tensor] = []
        maps: list[Tensor] = []
        for j, (part, qkv, dw) in enumerate(
            zip(x.chunk(self.num_heads, 1), self.qkvs, self.dws, strict=True)
        ):
            u = part + outputs[-1] if self.cascade and j > 0 else part
            q, k, v = qkv(u).split((self.key_dim, self.key_dim, self.value_dim), 1)
            weights = _softmax_logits(dw(q).flatten(2), k.flatten(2), bias[j], self.key_dim**-0.5)
            out = weights @ v.flatten(2).transpose(1, 2)  # (B, N, d_v): channels last, as the map is kept
            outputs.append(out.view(-1, *x.shape[2:], self.value_dim).permute(0, 3, 1, 2))
            maps.append(weights)
        return torch.cat(outputs, 1), maps


class MultiHeadAttention(_BiasedAttention):
    """Plain multi-head self-attention with the same bias table: every head projects all channels.

    The baseline that :class:`CascadedGroupAttention` is compared with.

    Args:
        dim: channels C; values have C/h channels a head.
        num_heads: heads h.
        key_dim: channels of queries and keys of each head.
        resolution: rows and columns of the maps it reads.

    Raises:
        BadInput: C not divisible by h, or a map of another size.
    """

    def __init__(
        self, dim: int, num_heads: int, key_dim: int = 16, resolution: tuple[int, int] = (7, 7)
    ) -> None:
        _check_heads(dim, num_heads)
        super().__init__(num_heads, resolution)
        self.dim, self.key_dim, self.value_dim = dim, key_dim, dim // num_heads
        self.qkv = ConvBN(dim, 2 * num_heads * key_dim + dim)
        self.proj = nn.Sequential(nn.ReLU(inplace=True), ConvBN(dim, dim, zero=True))

    def forward(self, x: Tensor) -> Tensor:
        """Mix the positions of ``(B, C, H, W)``; H and W as in ``resolution``."""
        weights, values = self._read(x)
        out = (weights @ values.transpose(2, 3)).transpose(1, 2)  # (B, N, heads, d_v): channels last
        return self.proj(out.reshape(-1, *x.shape[2:], self.dim).permute(0, 3, 1, 2))  # type: ignore[no-any-return]

    def attention_maps(self, x: Tensor) -> Tensor:
        """The attention of each head on ``(B, C, H, W)``, as ``(B, heads, N, N)`` with rows that sum to 1."""
        return self._read(x)[0]

    def _read(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self._enter(x)
        heads, keys = self.num_heads, self.num_heads * self.key_dim
        q, k, v = (
            t.unflatten(1, (heads, -1)).flatten(3) for t in self.qkv(x).split((keys, keys, self.dim), 1)
        )
        logits = q.transpose(2, 3) @ k * self.key_dim**-0.5 + self.bias()
        return logits.softmax(-1).to(v.dtype), v


class WindowAttention(nn.Module):
    """An attention applied to the whole map where it fits its window, else inside windows.

    Larger maps are padded with zeros below and to the right to multiples of the window, without a mask:
    padded positions take part in the softmax, which published weights expect. There is no shift.

    Args:
        attn: attention on square windows of its ``resolution``.
    """

    attn: CascadedGroupAttention | MultiHeadAttention

    def __init__(self, attn: CascadedGroupAttention | MultiHeadAttention) -> None:
        super().__init__()
        self.attn = attn

    def forward(self, x: Tensor) -> Tensor:
        """Mix ``(B, C, H, W)`` inside each window; the shape stays."""
        rows, columns = self.attn.resolution
        height, width = x.shape[-2:]
        if (height, width) == (rows, columns):
            return self.attn(x)  # type: ignore[no-any-return]
        below, right = -height % rows, -width % columns
        if below or right:
            x = F.pad(x, (0, right, 0, below))
        # Channels come last inside, where the network keeps them: a window is then whole rows of memory.
        channels, down, across = x.shape[1], (height + below) // rows, (width + right) // columns
        windows = x.permute(0, 2, 3, 1).reshape(-1, down, rows, across, columns, channels).transpose(2, 3)
        mixed: Tensor = self.attn(windows.reshape(-1, rows, columns, channels).permute(0, 3, 1, 2))
        mixed = mixed.permute(0, 2, 3, 1).reshape(-1, down, across, rows, columns, channels).transpose(2, 3)
        whole = mixed.reshape(-1, height + below, width + right, channels).permute(0, 3, 1, 2)
        return whole[:, :, :height, :width] if below or right else whole


class SandwichBlock(nn.Module):
    """One attention between equal stacks of depthwise convolutions and FFNs, each with a residual sum.

    Args:
        dim: channels C.
        num_heads: heads of the mixer.
        key_dim: channels of queries and keys.
        window: rows and columns of the attention's window.
        kernels: sides of the query convolutions.
        ffn_depth: pairs (depthwise, FFN) on each side; published models have 1.
        mixer: ``"cga"``; ``"group"`` for the same without the cascade; ``"mhsa"`` for plain attention; None
            for no attention.

    Example:
        >>> SandwichBlock(32, num_heads=4, mixer="mhsa")(torch.randn(1, 32, 14, 14)).shape
        torch.Size([1, 32, 14, 14])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        key_dim: int = 16,
        window: tuple[int, int] = (7, 7),
        kernels: Sequence[int] = (5, 5, 5, 5),
        ffn_depth: int = 1,
        mixer: Mixer | None = "cga",
    ) -> None:
        super().__init__()
        attention: CascadedGroupAttention | MultiHeadAttention
        if mixer in ("cga", "group"):
            attention = CascadedGroupAttention(dim, num_heads, key_dim, window, kernels, mixer == "cga")
        elif mixer == "mhsa":
            attention = MultiHeadAttention(dim, num_heads, key_dim, window)
        elif mixer is not None:
            refuse("mixer", mixer, "use 'cga', 'group', 'mhsa' or None")
        # Published weights name the parts dw0, ffn0, mixer, dw1, ffn1; longer stacks continue with dw0_1, ...
        names = ["" if i == 0 else f"_{i}" for i in range(ffn_depth)]
        for name in names:
            self.add_module(f"dw0{name}", Residual(_depthwise(dim, zero=True)))
            self.add_module(f"ffn0{name}", Residual(FFN(dim)))
        if mixer is not None:
            self.add_module("mixer", Residual(WindowAttention(attention)))
        for name in names:
            self.add_module(f"dw1{name}", Residual(_depthwise(dim, zero=True)))
            self.add_module(f"ffn1{name}", Residual(FFN(dim)))

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape ``(B, C, H, W)``."""
        for part in self.children():
            x = part(x)
        return x


class SqueezeExcite(nn.Module):
    """Gate each channel by what the whole map holds: mean, 1x1 to a quarter, ReLU, 1x1 back, sigmoid.

    Args:
        dim: channels C.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, dim // 4, 1)
        self.act = nn.ReLU(inplace=True)
        self.fc2 = nn.Conv2d(dim // 4, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape ``(B, C, H, W)``."""
        gate = self.fc2(self.act(self.fc1(x.mean((2, 3), keepdim=True))))
        return x * torch.sigmoid(gate)


class PatchMerging(nn.Module):
    """Halve the map: 1x1 up to 4C, depthwise 3x3 with stride 2, squeeze-excite, 1x1 down to the new width.

    Args:
        dim: channels of the input ``(B, dim, H, W)``.
        out_dim: channels of the output ``(B, out_dim, (H-1)//2+1, (W-1)//2+1)``.
    """

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.conv1 = ConvBN(dim, 4 * dim)
        self.act = nn.ReLU(inplace=True)
        self.conv2 = ConvBN(4 * dim, 4 * dim, 3, stride=2, padding=1, groups=4 * dim)
        self.se = SqueezeExcite(4 * dim)
        self.conv3 = ConvBN(4 * dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Halve rows and columns, rounding up."""
        return self.conv3(self.se(self.act(self.conv2(self.act(self.conv1(x))))))  # type: ignore[no-any-return]


class _Stage(nn.Module):
    """One stage: an optional halving between two convolutional residuals, then sandwich blocks."""

    def __init__(self, in_dim: int, dim: int, blocks: Sequence[SandwichBlock], halve: bool) -> None:
        super().__init__()
        self.downsample: nn.Module = nn.Identity()
        if halve:
            self.downsample = nn.Sequential()
            self.downsample.add_module("res1", _convolutional(in_dim))
            self.downsample.add_module("patchmerge", PatchMerging(in_dim, dim))
            self.downsample.add_module("res2", _convolutional(dim))
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))  # type: ignore[no-any-return]


class EfficientViT(nn.Module):
    """The backbone and classifier: stride 16 at once, then three stages of sandwich blocks.

    Args:
        img_size: rows and columns of the images, or one number for both.
        in_chans: channels of the images.
        num_classes: classes; 0 gives pooled features ``(B, C3)``.
        embed_dim: widths C1, C2, C3 of the stages.
        depth: sandwich blocks in each stage.
        num_heads: heads in each stage.
        kernels: sides of the query convolutions; a stage with fewer heads uses the first ones.
        window: largest side of an attention window; a smaller map has a smaller window.
        distillation: add a second head, for a teacher's labels; training gives the pair of logits,
            evaluation their mean.
        key_dim: channels of queries and keys.
        mixer: see :class:`SandwichBlock`.

    Attributes:
        feature_info: channels and stride of each of the three maps.

    Raises:
        BadInput: widths not divisible by their heads or by 8 (the first), too few or even kernels.

    Example:
        >>> model = EfficientViT(112, num_classes=10, embed_dim=(32, 64, 96))
        >>> [tuple(m.shape) for m in model.forward_intermediates(torch.randn(2, 3, 112, 112))]
        [(2, 32, 7, 7), (2, 64, 4, 4), (2, 96, 2, 2)]
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: Sequence[int] = (64, 128, 192),
        depth: Sequence[int] = (1, 2, 3),
        num_heads: Sequence[int] = (4, 4, 4),
        kernels: Sequence[int] = (5, 5, 5, 5),
        window: int = 7,
        distillation: bool = False,
        key_dim: int = 16,
        mixer: Mixer | None = "cga",
    ) -> None:
        super().__init__()
        if not len(embed_dim) == len(depth) == len(num_heads) == 3:
            refuse("embed_dim", tuple(embed_dim), "give three widths, depths and head counts, one a stage")
        if embed_dim[0] % 8:
            refuse("embed_dim", tuple(embed_dim), "the first width must divide by 8: the stem starts there")
        self.img_size = _pair(img_size)
        self.in_chans, self.num_classes, self.window = in_chans, num_classes, window
        self.num_features = embed_dim[-1]
        self.feature_info = [{"channels": c, "stride": 16 * 2**i} for i, c in enumerate(embed_dim)]
        first = embed_dim[0]
        self.patch_embed = nn.Sequential()
        for i, width in enumerate((first // 8, first // 4, first // 2, first), start=1):
            previous = in_chans if i == 1 else width // 2
            self.patch_embed.add_module(f"conv{i}", ConvBN(previous, width, 3, stride=2, padding=1))
            if i < 4:
                self.patch_embed.add_module(f"relu{i}", nn.ReLU(inplace=True))
        stages: list[_Stage] = []
        for i, side in enumerate(self._windows()):
            blocks = [
                SandwichBlock(embed_dim[i], num_heads[i], key_dim, (side, side), kernels, mixer=mixer)
                for _ in range(depth[i])
            ]
            stages.append(_Stage(embed_dim[max(i - 1, 0)], embed_dim[i], blocks, halve=i > 0))
        self.stages = nn.Sequential(*stages)
        self.head: nn.Module = _classifier(self.num_features, num_classes)
        self.head_dist: nn.Module | None = (
            _classifier(self.num_features, num_classes) if distillation else None
        )
        self._warn_if_small()

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Classify images.

        Args:
            x: images ``(B, in_chans, *img_size)``, float, normalised as the weights expect.

        Returns:
            Logits ``(B, num_classes)``; with ``distillation``, a pair while training.

        Raises:
            BadInput: another size or number of channels, or one image while training.
        """
        pooled = self.forward_features(x).mean((2, 3))
        if self.head_dist is None:
            return self.head(pooled)  # type: ignore[no-any-return]
        first, second = self.head(pooled), self.head_dist(pooled)
        return (first, second) if self.training else (first + second) / 2

    def forward_features(self, x: Tensor) -> Tensor:
        """The last map, ``(B, C3, h, w)``, of images ``(B, in_chans, *img_size)``."""
        self._check(x)
        return self.stages(self.patch_embed(_channels_last(x)))  # type: ignore[no-any-return]

    def forward_intermediates(self, x: Tensor) -> list[Tensor]:
        """The maps after each of the three stages, at strides 16, 32 and 64."""
        self._check(x)
        x = self.patch_embed(_channels_last(x))
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def reset_classifier(self, num_classes: int) -> Self:
        """Replace the head (both, with distillation) by a fresh one; 0 classes gives pooled features."""
        device, dtype = next(self.stages.parameters()).device, next(self.stages.parameters()).dtype
        self.num_classes = num_classes
        head = _classifier(self.num_features, num_classes)
        self.head = head.to(device, dtype).train(self.training)
        if self.head_dist is not None:
            self.head_dist = (
                _classifier(self.num_features, num_classes).to(device, dtype).train(self.training)
            )
        return self

    def set_input_size_(self, img_size: int | tuple[int, int]) -> Self:
        """Make the model read images of another size, in place.

        Bias tables are interpolated where the window's side changes; nothing else depends on the size.

        Example:
            >>> model = efficientvit_m0(num_classes=2).eval().set_input_size_((256, 192))
            >>> model(torch.randn(1, 3, 256, 192)).shape
            torch.Size([1, 2])
        """
        self.img_size = _pair(img_size)
        for stage, side in zip(self.stages, self._windows(), strict=True):
            for module in stage.modules():
                if isinstance(module, _BiasedAttention):
                    module.set_resolution_((side, side))
        self._warn_if_small()
        return self

    def map_sizes(self) -> list[tuple[int, int]]:
        """Rows and columns of the three maps at the present ``img_size``."""
        sizes = [_halved(self.img_size, 4)]
        return [*sizes, _halved(sizes[0], 1), _halved(sizes[0], 2)]

    def _windows(self) -> list[int]:
        # The smaller side sets a square window, as in timm; square images do not tell the difference.
        return [min(self.window, *size) for size in self.map_sizes()]

    def _check(self, x: Tensor) -> None:
        if x.dim() != 4 or x.shape[1] != self.in_chans:
            refuse("x", tuple(x.shape), f"give images as (batch, {self.in_chans}, {self.img_size})")
        if tuple(x.shape[-2:]) != self.img_size:
            refuse(
                "x",
                tuple(x.shape),
                f"the model reads images of img_size={self.img_size}; resize them, or call "
                f"model.set_input_size_({tuple(x.shape[-2:])})",
            )

    def _warn_if_small(self) -> None:
        if min(self.img_size) < 112:
            sizes = ", ".join(f"{rows}x{columns}" for rows, columns in self.map_sizes())
            warnings.warn(
                f"img_size={self.img_size} leaves maps of {sizes}, too small for attention to do anything; "
                "use images of 112 or more",
                stacklevel=3,
            )


class FeaturePyramid(nn.Module):
    """A backbone alone: its forward gives the three stage maps. Made by :func:`features_only`.

    Attributes:
        channels: channels of each map.
        strides: stride of each map: 16, 32, 64.
    """

    def __init__(self, model: EfficientViT) -> None:
        super().__init__()
        model.reset_classifier(0)
        model.head_dist = None
        self.body = model
        self.channels = [info["channels"] for info in model.feature_info]
        self.strides = [info["stride"] for info in model.feature_info]

    def forward(self, x: Tensor) -> list[Tensor]:
        """The maps of images ``(B, in_chans, *img_size)`` at strides 16, 32 and 64."""
        return self.body.forward_intermediates(x)


def features_only(model: EfficientViT) -> FeaturePyramid:
    """Turn a classifier into a feature pyramid for detection or segmentation; the heads are dropped.

    Args:
        model: the model; it becomes part of the pyramid.

    Returns:
        A module whose forward gives three maps; ``.channels`` and ``.strides`` describe them.

    Example:
        >>> pyramid = features_only(efficientvit_m0(num_classes=2)).eval()
        >>> [tuple(m.shape) for m in pyramid(torch.randn(1, 3, 224, 224))]
        [(1, 64, 14, 14), (1, 128, 7, 7), (1, 192, 4, 4)]
    """
    return FeaturePyramid(model)


def fuse_(model: nn.Module) -> nn.Module:
    """Fold every batch normalisation into its convolution or linear layer, in place. Final: for inference.

    Works on any module built of :class:`ConvBN` and :class:`BNLinear`. Residual sums around one depthwise
    convolution are folded into it, and attention biases are gathered once.

    Args:
        model: a model in evaluation mode.

    Returns:
        The same model (or the fused layer, where the model itself is one :class:`ConvBN`).

    Raises:
        BadInput: training mode; nothing to fuse (a second call); a layer used at two places, which one
            fused layer cannot stand for; hooks or parametrizations on a layer, which fusing would drop.

    Example:
        >>> model = fuse_(efficientvit_m0(num_classes=2).eval())
        >>> any(isinstance(part, nn.BatchNorm2d | nn.BatchNorm1d) for part in model.modules())
        False
    """
    parts = [part for part in model.modules() if isinstance(part, ConvBN | BNLinear)]
    if not parts:
        refuse(
            "model",
            type(model).__name__,
            "nothing to fuse: it has no ConvBN or BNLinear, or is fused already",
        )
    for part in parts:  # refuse before anything is changed
        _must_be_eval(part)
    _refuse_unfusable(model)
    if isinstance(model, ConvBN | BNLinear):
        return model.fuse()
    _fuse_children(model)
    for module in model.modules():
        if isinstance(module, _BiasedAttention):
            module.fuse_()
    return model


def resize_bias_table(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Interpolate attention biases ``(heads, rows·columns)`` from one window to another.

    Bicubic with antialiasing, as published fine-tuning code does; the same size gives the same values.

    Example:
        >>> table = torch.arange(49.0)[None]
        >>> resize_bias_table(table, (7, 7), (4, 4)).shape
        torch.Size([1, 16])
    """
    if old == new:
        return table.detach().clone()
    grid = table.detach().float().view(1, -1, *old)
    grid = F.interpolate(grid, size=new, mode="bicubic", antialias=True)
    return grid.view(table.shape[0], -1).to(table.dtype)


@dataclass(frozen=True)
class Variant:
    """Widths, depths, heads and query kernels of one published model."""

    embed_dim: tuple[int, int, int]
    depth: tuple[int, int, int]
    num_heads: tuple[int, int, int]
    kernels: tuple[int, int, int, int]


VARIANTS = {
    "m0": Variant((64, 128, 192), (1, 2, 3), (4, 4, 4), (5, 5, 5, 5)),
    "m1": Variant((128, 144, 192), (1, 2, 3), (2, 3, 3), (7, 5, 3, 3)),
    "m2": Variant((128, 192, 224), (1, 2, 3), (4, 3, 2), (7, 5, 3, 3)),
    "m3": Variant((128, 240, 320), (1, 2, 3), (4, 3, 4), (5, 5, 5, 5)),
    "m4": Variant((128, 256, 384), (1, 2, 3), (4, 4, 4), (7, 5, 3, 3)),
    "m5": Variant((192, 288, 384), (1, 3, 4), (3, 3, 4), (7, 5, 3, 3)),
}
"""The published models, all with key width 16, window 7 and stride 16."""

Size = int | tuple[int, int]
Weights = str | os.PathLike[str] | None


def efficientvit_m0(
    num_classes: int = 1000, img_size: Size = 224, in_chans: int = 3, weights: Weights = None
) -> EfficientViT:
    """EfficientViT-M0: 2,349,436 parameters with 1000 classes, 79 million multiply-adds at 224.

    Args:
        num_classes: classes; 0 gives pooled features.
        img_size: rows and columns of the images, or one number for both.
        in_chans: channels of the images.
        weights: a checkpoint file in the layout of the official repository, of timm or of memspan
            (``.safetensors``, ``.pth``); a head of another number of classes is left out.

    Raises:
        BadInput: keys that the model does not know, or keys that it misses; they are listed.
        FileNotFoundError: no such file.

    Example:
        >>> model = efficientvit_m0(num_classes=10)
        >>> model(torch.randn(2, 3, 224, 224)).shape
        torch.Size([2, 10])
    """
    return _build("m0", num_classes, img_size, in_chans, weights)


def efficientvit_m1(
    num_classes: int = 1000, img_size: Size = 224, in_chans: int = 3, weights: Weights = None
) -> EfficientViT:
    """EfficientViT-M1: 2,980,560 parameters, 167 million multiply-adds; as :func:`efficientvit_m0`."""
    return _build("m1", num_classes, img_size, in_chans, weights)


def efficientvit_m2(
    num_classes: int = 1000, img_size: Size = 224, in_chans: int = 3, weights: Weights = None
) -> EfficientViT:
    """EfficientViT-M2: 4,187,554 parameters, 201 million multiply-adds; as :func:`efficientvit_m0`."""
    return _build("m2", num_classes, img_size, in_chans, weights)


def efficientvit_m3(
    num_classes: int = 1000, img_size: Size = 224, in_chans: int = 3, weights: Weights = None
) -> EfficientViT:
    """EfficientViT-M3: 6,900,722 parameters, 263 million multiply-adds; as :func:`efficientvit_m0`."""
    return _build("m3", num_classes, img_size, in_chans, weights)


def efficientvit_m4(
    num_classes: int = 1000, img_size: Size = 224, in_chans: int = 3, weights: Weights = None
) -> EfficientViT:
    """EfficientViT-M4: 8,804,228 parameters, 299 million multiply-adds; as :func:`efficientvit_m0`."""
    return _build("m4", num_classes, img_size, in_chans, weights)


def efficientvit_m5(
    num_classes: int = 1000, img_size: Size = 224, in_chans: int = 3, weights: Weights = None
) -> EfficientViT:
    """EfficientViT-M5: 12,473,772 parameters, 522 million multiply-adds; as :func:`efficientvit_m0`."""
    return _build("m5", num_classes, img_size, in_chans, weights)


def _build(name: str, num_classes: int, img_size: Size, in_chans: int, weights: Weights) -> EfficientViT:
    variant = VARIANTS[name]
    model = EfficientViT(
        img_size, in_chans, num_classes, variant.embed_dim, variant.depth, variant.num_heads, variant.kernels
    )
    if weights is not None:
        from memspan.models.efficientvit.weights import load_file_

        load_file_(model, weights)
    return model


def _channels_last(x: Tensor) -> Tensor:
    """Keep channels last in memory on CPU, where 1x1 and depthwise convolutions are faster that way."""
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x


def _depthwise(dim: int, zero: bool = False) -> ConvBN:
    return ConvBN(dim, dim, 3, padding=1, groups=dim, zero=zero)


def _convolutional(dim: int) -> nn.Sequential:
    return nn.Sequential(Residual(_depthwise(dim)), Residual(FFN(dim)))


def _classifier(features: int, classes: int) -> nn.Module:
    return BNLinear(features, classes) if classes > 0 else nn.Identity()


def _softmax_logits(q: Tensor, k: Tensor, bias: Tensor, scale: float) -> Tensor:
    """softmax(qᵀk·scale + bias) of ``(B, d, N)`` maps; float32 logits where the bias is wider (autocast)."""
    if bias.dtype == q.dtype:
        return torch.baddbmm(bias, q.transpose(1, 2), k, alpha=scale).softmax(-1)
    return (q.transpose(1, 2) @ k * scale + bias).softmax(-1).to(q.dtype)


def _bias_index(resolution: tuple[int, int], device: torch.device) -> Tensor:
    """|Δrow|·columns + |Δcol| of each pair of positions."""
    rows, columns = resolution
    place = torch.arange(rows * columns, device=device)
    row, column = place // columns, place % columns
    return (row[:, None] - row).abs() * columns + (column[:, None] - column).abs()


def _refresh_fused_bias(module: nn.Module, _: object) -> None:
    if isinstance(module, _BiasedAttention) and module.fused_bias is not None:
        module.fuse_()


def _fuse_children(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, ConvBN | BNLinear):
            setattr(module, name, child.fuse())
            continue
        _fuse_children(child)
        if isinstance(child, Residual):
            setattr(module, name, child.fuse())


def _refuse_unfusable(model: nn.Module) -> None:
    """Refuse what a fused layer would silently lose: a second place, hooks, parametrized weights."""
    seen: dict[int, str] = {}
    for name, part in model.named_modules(remove_duplicate=False):
        if not isinstance(part, ConvBN | BNLinear | Residual):
            continue
        if id(part) in seen:
            remedy = f"it is the same layer as {seen[id(part)]}; copy it (copy.deepcopy) before fusing"
            refuse("model", name, remedy)
        seen[id(part)] = name
        if isinstance(part, Residual):
            continue
        for inner in part.modules():
            if inner._forward_hooks or inner._forward_pre_hooks or inner._backward_hooks:
                refuse("model", name, "it has hooks, which fusing would drop; remove them first")
            if nn.utils.parametrize.is_parametrized(inner):
                refuse("model", name, "it is parametrized; call parametrize.remove_parametrizations first")


def _must_be_eval(module: nn.Module) -> None:
    if any(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) and m.training for m in module.modules()):
        refuse("model", "in training mode", "fusing uses the running statistics: call model.eval() first")


def _scale_and_shift(bn: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    assert bn.running_mean is not None
    assert bn.running_var is not None
    scale = bn.weight / (bn.running_var + bn.eps).sqrt()
    return scale, bn.bias - bn.running_mean * scale


def _bare_conv(conv: nn.Conv2d) -> nn.Conv2d:
    return nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        groups=conv.groups,
        device=conv.weight.device,
        dtype=conv.weight.dtype,
    )


def _check_heads(dim: int, num_heads: int) -> None:
    if num_heads < 1 or dim % num_heads:
        refuse(
            "dim",
            dim,
            f"give a width that divides by num_heads={num_heads}: each head has dim/heads channels",
        )


def _pair(size: Size) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(isinstance(side, int) and side >= 1 for side in pair):
        refuse("img_size", size, "give one positive number, or (rows, columns)")
    return pair[0], pair[1]


def _halved(size: tuple[int, int], times: int) -> tuple[int, int]:
    for _ in range(times):
        size = ((size[0] - 1) // 2 + 1, (size[1] - 1) // 2 + 1)
    return size
