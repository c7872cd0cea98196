"""Networks known by their shape alone, so that a plan needs neither weights nor the library that holds them.

Llama as in Touvron et al., "LLaMA: Open and Efficient Foundation Language Models" (2023): pre-norm blocks of
rotary attention and a gated feed-forward layer, RMS norms, no biases, an untied head. Built under
:func:`~memspan.ledger.plan` it holds no bytes; built for real it computes what transformers' class computes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention, silu

__all__ = ["SHAPES", "Llama", "LlamaShape"]


class LlamaShape(NamedTuple):
    """Sizes of a Llama.

    Attributes:
        vocabulary: tokens.
        width: of the residual stream.
        layers: blocks.
        heads: of attention, each ``width / heads`` wide.
        inner: width inside the feed-forward layer.
        longest: tokens of a sequence at most.
    """

    vocabulary: int = 32000
    width: int = 4096
    layers: int = 32
    heads: int = 32
    inner: int = 11008
    longest: int = 2048


#: By the names that ``memspan plan`` takes.
SHAPES = {"llama-7b": LlamaShape(), "llama-13b": LlamaShape(width=5120, layers=40, heads=40, inner=13824)}


class Llama(nn.Module):
    """Token ids to the mean loss of the next token.

    Args:
        shape: sizes.

    Example:
        >>> lm = Llama(LlamaShape(vocabulary=50, width=16, layers=2, heads=2, inner=24))
        >>> lm(torch.randint(50, (3, 8))).shape
        torch.Size([])
    """

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.embed = nn.Embedding(shape.vocabulary, shape.width)
        self.layers = nn.ModuleList(_Block(shape) for _ in range(shape.layers))
        self.norm = _Norm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        self.turned = shape.width // shape.heads

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
        """The mean loss, in nats, of each token given those before it.

        Args:
            input_ids: (B, T), token ids.
            labels: (B, T), the tokens to be predicted; None: ``input_ids``.
        """
        wanted = input_ids if labels is None else labels
        # The last place has nothing to predict: the loss leaves -100 out.
        wanted = torch.nn.functional.pad(wanted[:, 1:], (0, 1), value=-100)
        return cross_entropy(self.logits(input_ids).flatten(0, 1).float(), wanted.flatten())

    def logits(self, input_ids: Tensor) -> Tensor:
        """Map ids ``(B, T)`` to logits ``(B, T, vocabulary)``."""
        x = self.embed(input_ids)
        exponents = torch.arange(0, self.turned, 2, device=x.device, dtype=torch.float32) / self.turned
        places = torch.arange(input_ids.shape[1], device=x.device, dtype=torch.float32)
        angles = torch.outer(places, 10000.0**-exponents).repeat(1, 2)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


class _Block(nn.Module):
    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.attention_norm = _Norm(shape.width)
        self.query, self.key, self.value, self.out = (
            nn.Linear(shape.width, shape.width, bias=False) for _ in range(4)
        )
        self.norm = _Norm(shape.width)
        self.gate, self.up = (nn.Linear(shape.width, shape.inner, bias=False) for _ in range(2))
        self.down = nn.Linear(shape.inner, shape.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y = self.attention_norm(x)
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query(y), self.key(y), self.value(y))
        )
        y = scaled_dot_product_attention(_turned(q, cos, sin), _turned(k, cos, sin), v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        y = self.norm(x)
        return x + self.down(silu(self.gate(y)) * self.up(y))  # type: ignore[no-any-return]


class _Norm(nn.Module):
    """RMS norm as transformers writes it, so that it saves the same tensors."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * y.to(x.dtype)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
