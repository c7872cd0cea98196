"""The models that the recipe ``ledger`` counts: plain PyTorch, written the way users write them.

Each is small, and each holds its bytes in another way: an MLP (optimizer state), a CNN with BatchNorm and
in-place ReLU (one tensor serves two layers), a causal GPT (logits), an eager post-norm BERT (attention
matrices and dropout masks), a U-Net (skip connections), an EfficientNet (depthwise convolutions).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memspan.data.efficientnet_lite import EfficientNetLite0

__all__ = ["BERT", "CNN", "GPT", "MLP", "ModelCase", "UNet", "classify", "model_cases"]


class MLP(nn.Sequential):
    """256-1024-GELU-256-LN-10 by default. x: (B, inputs) float32 -> (B, classes)."""

    def __init__(self, inputs: int = 256, hidden: int = 1024, classes: int = 10) -> None:
        first, second = nn.Linear(inputs, hidden), nn.Linear(hidden, inputs)
        super().__init__(first, nn.GELU(), second, nn.LayerNorm(inputs), nn.Linear(inputs, classes))


_FOUR_GROUPS = functools.partial(nn.GroupNorm, 4)


def _double_conv(
    a: int,
    b: int,
    norm: Callable[[int], nn.Module] = _FOUR_GROUPS,
    act: Callable[[], nn.Module] = nn.SiLU,
    stride: int = 1,
    bias: bool = True,
) -> nn.Sequential:
    first = nn.Conv2d(a, b, 3, stride=stride, padding=1, bias=bias)
    return nn.Sequential(first, norm(b), act(), nn.Conv2d(b, b, 3, padding=1, bias=bias), norm(b), act())


class CNN(nn.Module):
    """Three stages of convolution, BatchNorm and in-place ReLU. x: (B, channels, H, W) -> (B, classes)."""

    def __init__(self, channels: int = 3, width: int = 32, classes: int = 10) -> None:
        super().__init__()
        sizes = (channels, width, 2 * width, 4 * width)
        norm, act = nn.BatchNorm2d, functools.partial(nn.ReLU, inplace=True)
        self.blocks = nn.ModuleList(
            _double_conv(a, b, norm, act, stride=stride, bias=False)
            for a, b, stride in zip(sizes, sizes[1:], (1, 2, 2), strict=False)
        )
        self.head = nn.Linear(sizes[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x.mean(dim=(2, 3)))
        return logits


class _GPTBlock(nn.Module):
    """Pre-norm block: causal attention in one fused operator, then a GELU MLP. x: (B, T, d)."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.qkv, self.out = nn.LayerNorm(d), nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.norm2 = nn.LayerNorm(d)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(b, t, d))
        x = x + self.mlp(self.norm2(x))
        return x


class GPT(nn.Module):
    """A causal language model without position embedding; untied head. tokens: (B, T) int64 -> (B, T, V)."""

    def __init__(self, vocabulary: int = 1000, d: int = 128, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, d)
        self.blocks = nn.ModuleList(_GPTBlock(d, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token at each position."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


class _BERTBlock(nn.Module):
    """Post-norm block with eager attention and dropout on the probabilities too. x: (B, T, H)."""

    def __init__(self, h: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(h, h) for _ in range(4))
        self.norm1, self.norm2 = nn.LayerNorm(h), nn.LayerNorm(h)
        self.up, self.down = nn.Linear(h, 4 * h), nn.Linear(4 * h, h)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        b, t, h = x.shape
        q, k, v = (
            layer(x).view(b, t, self.heads, h // self.heads).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        scores = q @ k.transpose(-1, -2) / (h // self.heads) ** 0.5
        weights = self.dropout(scores.softmax(dim=-1))
        attended = (weights @ v).transpose(1, 2).reshape(b, t, h)
        x = self.norm1(x + self.dropout(self.out(attended)))
        y: Tensor = self.norm2(x + self.dropout(self.down(F.gelu(self.up(x)))))
        return y


class BERT(nn.Module):
    """A small bidirectional encoder with a classifier on the first token. tokens: (B, T) -> (B, classes)."""

    def __init__(
        self, vocabulary: int = 1000, h: int = 64, depth: int = 2, heads: int = 4, length: int = 128,
        classes: int = 10, dropout: float = 0.1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, h), nn.Embedding(length, h)
        self.norm = nn.LayerNorm(h)
        self.blocks = nn.ModuleList(_BERTBlock(h, heads, dropout) for _ in range(depth))
        self.head = nn.Linear(h, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the sequence."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.norm(self.tokens(tokens) + self.positions(places))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x[:, 0])
        return logits


class UNet(nn.Module):
    """Two levels down and up with skip connections. x: (B, channels, H, W) -> (B, classes, H, W)."""

    def __init__(self, channels: int = 3, width: int = 16, classes: int = 4) -> None:
        super().__init__()
        self.down = nn.ModuleList((_double_conv(channels, width), _double_conv(width, 2 * width)))
        self.middle = _double_conv(2 * width, 4 * width)
        self.up = nn.ModuleList((_double_conv(6 * width, 2 * width), _double_conv(3 * width, width)))
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of each pixel."""
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.middle(x)
        for block, skip in zip(self.up, reversed(skips), strict=True):
            x = block(torch.cat((F.interpolate(x, scale_factor=2.0), skip), dim=1))
        logits: Tensor = self.head(x)
        return logits


def classify(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy over the class dimension, which is the last for sequences and the second for images."""
    if logits.dim() == 3:
        return F.cross_entropy(logits.flatten(0, 1), target.flatten())
    return F.cross_entropy(logits, target)


class ModelCase(NamedTuple):
    """A model of the recipe: how to build it, and how to make its batch of size B from images or text."""

    name: str
    build: Callable[[], nn.Module]
    kind: str
    batch: int


def model_cases() -> list[ModelCase]:
    """All models; ``kind`` tells the data: flat or square images, pixels to label, text to continue."""
    return [
        ModelCase("MLP", MLP, "flat", 64),
        ModelCase("CNN", CNN, "image", 16),
        ModelCase("GPT", GPT, "next", 2),
        ModelCase("BERT", BERT, "text", 4),
        ModelCase("U-Net", UNet, "pixels", 4),
        ModelCase("EfficientNet-Lite0", functools.partial(EfficientNetLite0, classes=10), "image", 4),
    ]
