"""The language model whose blocks multiply no matrix: tables, norms and attention."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from torch import Tensor, nn

from memspan.base import nearest, refuse
from memspan.base.files import load_state, save_state
from memspan.models.lm import KVCache, LayerCache, TokenEmbedding, attend, check_sizes, generate, rotary_width
from memspan.models.memoryformer.layers import MAX_BYTES, MemoryBlock, MemoryLinear, MultiMemoryLinear
from memspan.nn.lookup import Weight

__all__ = ["MemoryFormerConfig", "MemoryFormerLM", "MemoryFormerLayer"]


@dataclass(frozen=True)
class MemoryFormerConfig:
    """Sizes of a :class:`MemoryFormerLM`.

    Attributes:
        vocab_size: V, number of tokens.
        d_model: width; divisible by ``bits`` and by ``n_heads``.
        n_layers: layers.
        n_heads: attention heads.
        bits: tau, entries of a chunk.
        expand_bits: bits that the second layer of a block has more.
        max_len: the longest sequence.
        rotary: share of each head that is rotated by position.
        temperature: as :class:`MemoryLinear`.
        weight: likewise.
        sparse: likewise.
        max_bytes: likewise, of each layer's tables.

    Example:
        >>> MemoryFormerConfig.tiny(vocab_size=512).d_model, MemoryFormerConfig.base().n_layers
        (512, 24)
    """

    vocab_size: int = 50304
    d_model: int = 512
    n_layers: int = 6
    n_heads: int = 8
    bits: int = 8
    expand_bits: int = 2
    max_len: int = 2048
    rotary: float = 0.25
    temperature: float = 1.0
    weight: Weight = "prob"
    sparse: bool = False
    max_bytes: int = MAX_BYTES

    @classmethod
    def tiny(cls, **options: Any) -> Self:
        """The size of Pythia-70M's twin: 6 layers of 512, 64 tables."""
        return cls(**{"d_model": 512, "n_layers": 6, "n_heads": 8, **options})

    @classmethod
    def small(cls, **options: Any) -> Self:
        """The size of Pythia-160M's twin: 12 layers of 768, 96 tables."""
        return cls(**{"d_model": 768, "n_layers": 12, "n_heads": 12, **options})

    @classmethod
    def base(cls, **options: Any) -> Self:
        """The size of Pythia-410M's twin: 24 layers of 1024, 128 tables; 13 GB in two-byte numbers."""
        return cls(**{"d_model": 1024, "n_layers": 24, "n_heads": 16, **options})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """From what :meth:`to_dict` gave; unknown names are refused with the nearest ones."""
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                refuse("config", name, nearest(name, known))
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """All sizes by name, as JSON can hold them."""
        return asdict(self)


class MemoryFormerLayer(nn.Module):
    """``z = x + attention of the looked-up queries, keys and values``, then ``z + block(norm(z))``.

    The three share one hash and one row; attention has no output projection. Arguments are a config's.
    """

    def __init__(self, config: MemoryFormerConfig) -> None:
        super().__init__()
        c, d = config, config.d_model
        options: dict[str, Any] = {
            "temperature": c.temperature, "weight": c.weight, "sparse": c.sparse, "max_bytes": c.max_bytes,
        }  # fmt: skip
        self.n_heads, self.rotated = c.n_heads, rotary_width(d, c.n_heads, c.rotary)
        self.attention_norm = nn.RMSNorm(d)
        self.qkv = MultiMemoryLinear(d, (d, d, d), c.bits, **options)
        self.block_norm = nn.RMSNorm(d)
        self.block = MemoryBlock(d, c.bits, c.expand_bits, **options)
        self.qkv.reset_parameters(std=math.sqrt(2 / (5 * d)))  # "small init" of the published training

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        """Map ``(B, T, d_model)`` to the same shape."""
        q, k, v = self.qkv(self.attention_norm(x))
        x = x + attend(q, k, v, self.n_heads, self.rotated, cache)
        return x + self.block(self.block_norm(x))  # type: ignore[no-any-return]


class MemoryFormerLM(nn.Module):
    """Token ids to logits over the next token; the head is the only matrix.

    Args:
        config: sizes.

    Raises:
        BadInput: sizes that do not divide or are below 1, tables above ``max_bytes``.

    Example:
        >>> import torch
        >>> lm = MemoryFormerLM(MemoryFormerConfig(50, d_model=32, n_layers=2, n_heads=4, bits=4, max_len=16))
        >>> ids = torch.randint(50, (3, 16))
        >>> lm(ids).shape, lm.generate(ids[:, :4], 5).shape
        (torch.Size([3, 16, 50]), torch.Size([3, 9]))
    """

    def __init__(self, config: MemoryFormerConfig) -> None:
        super().__init__()
        c = config
        check_sizes(
            vocab_size=c.vocab_size, n_layers=c.n_layers, max_len=c.max_len, expand_bits=c.expand_bits + 1
        )
        self.config, self.max_len = config, c.max_len
        rotated = rotary_width(c.d_model, c.n_heads, c.rotary)
        self.embed = TokenEmbedding(c.vocab_size, c.d_model, c.max_len, positions=rotated == 0)
        self.layers = nn.ModuleList(MemoryFormerLayer(config) for _ in range(c.n_layers))
        self.norm = nn.RMSNorm(c.d_model)
        self.head = nn.Linear(c.d_model, c.vocab_size, bias=False)
        for part in (*self.embed.modules(), self.head):
            if isinstance(part, nn.Embedding | nn.Linear):
                nn.init.normal_(part.weight, std=0.02)

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits (B, T, V) of integer ids (B, T); a cache continues where it ends, as in ``CausalLM``."""
        x = self.embed(ids, 0 if cache is None else cache.length)
        for index, layer in enumerate(self.layers):
            x = layer(x, None if cache is None else cache[index])
        return self.head(self.norm(x))  # type: ignore[no-any-return]

    def new_cache(self, batch: int = 1, max_len: int | None = None) -> KVCache:
        """An empty cache for ``batch`` sequences of up to ``max_len`` tokens (None: the model's own)."""
        c, weight = self.config, self.embed.tokens.weight
        length = self.max_len if max_len is None else max_len
        width = c.d_model // c.n_heads
        return KVCache(c.n_layers, batch, c.n_heads, length, width, weight.dtype, weight.device)

    def generate(self, ids: Tensor, max_new_tokens: int, **options: Any) -> Tensor:
        """Continue ``ids`` (B, T); options as :func:`memspan.models.lm.generate`."""
        return generate(self, ids, max_new_tokens, **options)

    def parameter_groups(self, lr: float, table_factor: float = 3.0) -> list[dict[str, Any]]:
        """Groups for an optimizer: tables at ``table_factor`` times ``lr`` (rows get gradients seldom)."""
        tables = [part.tables for part in self.modules() if isinstance(part, MemoryLinear)]
        known = {id(table) for table in tables}
        rest = [parameter for parameter in self.parameters() if id(parameter) not in known]
        return [{"params": rest, "lr": lr}, {"params": tables, "lr": table_factor * lr}]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights and config to one safetensors file, whole or not at all."""
        save_state(path, self.state_dict(), {"memoryformer": self.config.to_dict()})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """The model that :meth:`save` wrote.

        Raises:
            BadInput: the file holds something else.
        """
        tensors, header = load_state(path)
        if "memoryformer" not in header:
            refuse("path", os.fspath(path), "this file was not written by MemoryFormerLM.save")
        model = cls(MemoryFormerConfig.from_dict(header["memoryformer"]))
        model.load_state_dict(tensors)
        return model
