"""A small causal language model with nothing hidden: the dense network that others are compared with.

Sequential pre-norm blocks of plain scaled-dot-product attention and a feed-forward layer. Positions are
rotary over a share of each head (0.25, as in Pythia) or learned. Everything is an explicit argument; a
key-value cache and generation are included, and shared with networks whose blocks are of another kind.

References:
    Vaswani et al., "Attention Is All You Need", NeurIPS 2017; Su et al., "RoFormer: Enhanced Transformer with
    Rotary Position Embedding", 2021; Biderman et al., "Pythia", ICML 2023 (rotary share, untied embeddings).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memspan.base import refuse

__all__ = [
    "CausalAttention",
    "CausalLM",
    "CausalLMBlock",
    "FeedForward",
    "KVCache",
    "LayerCache",
    "TokenEmbedding",
    "attend",
    "generate",
    "next_token_loss",
]


class CausalLM(nn.Module):
    """Token ids to logits over the next token.

    Args:
        vocab_size: V, number of tokens.
        d_model: width of the residual stream; divisible by ``n_heads``.
        n_layers: blocks.
        n_heads: attention heads.
        max_len: T, the longest sequence.
        ffn_dim: width inside the feed-forward layer; None takes ``4 * d_model``.
        rotary: share of each head's width that is rotated by position; 0 learns a vector a position instead.
        tied: the head is the token embedding transposed.
        bias: linear layers of the blocks have biases.

    Raises:
        BadInput: a size below 1, ``d_model`` not divisible by the heads, or a rotary share outside [0, 1].

    Example:
        >>> lm = CausalLM(vocab_size=50, d_model=32, n_layers=2, n_heads=4, max_len=16)
        >>> ids = torch.randint(50, (3, 16))
        >>> lm(ids).shape, lm.generate(ids[:, :4], 5).shape
        (torch.Size([3, 16, 50]), torch.Size([3, 9]))
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int = 256,
        n_layers: int = 4,
        n_heads: int = 4,
        max_len: int = 128,
        *,
        ffn_dim: int | None = None,
        rotary: float = 0.25,
        tied: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        ffn_dim = 4 * d_model if ffn_dim is None else ffn_dim
        check_sizes(vocab_size=vocab_size, n_layers=n_layers, max_len=max_len, ffn_dim=ffn_dim)
        rotated = rotary_width(d_model, n_heads, rotary)
        self.vocab_size, self.d_model, self.n_layers, self.n_heads = vocab_size, d_model, n_layers, n_heads
        self.max_len = max_len
        self.embed = TokenEmbedding(vocab_size, d_model, max_len, positions=rotated == 0)
        self.blocks = nn.ModuleList(
            CausalLMBlock(d_model, n_heads, ffn_dim, rotated, bias) for _ in range(n_layers)
        )
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, vocab_size, bias=False)
        self._draw()
        if tied:
            self.head.weight = self.embed.tokens.weight

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits of the next token at every position.

        Args:
            ids: (B, T), integer token ids.
            cache: keys and values of earlier positions; the new ones are added to it, and ``ids`` continues
                there.

        Returns:
            (B, T, V).

        Raises:
            BadInput: ids of another shape or type, outside the vocabulary, or past ``max_len``.
        """
        x = self.embed(ids, 0 if cache is None else cache.length)
        for index, block in enumerate(self.blocks):
            x = block(x, None if cache is None else cache[index])
        return self.head(self.norm(x))  # type: ignore[no-any-return]

    def new_cache(self, batch: int = 1, max_len: int | None = None) -> KVCache:
        """An empty cache for ``batch`` sequences of up to ``max_len`` tokens (None: the model's own)."""
        weight, width = self.embed.tokens.weight, self.d_model // self.n_heads
        length = self.max_len if max_len is None else max_len
        return KVCache(self.n_layers, batch, self.n_heads, length, width, weight.dtype, weight.device)

    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        stop: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue ``ids`` (B, T) by up to ``max_new_tokens``; see :func:`generate`."""
        return generate(
            self, ids, max_new_tokens, temperature=temperature, top_k=top_k, stop=stop, generator=generator
        )

    @torch.no_grad()
    def _draw(self) -> None:
        """Weights from N(0, 0.02²), those that write to the residual stream smaller with depth (GPT-2)."""
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                last = name.endswith(("attention.out.weight", "ffn.down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.n_layers) if last else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)


class TokenEmbedding(nn.Module):
    """Token vectors, plus learned vectors of positions where asked for.

    Args:
        vocab_size: V.
        d_model: width.
        max_len: positions.
        positions: learn a vector a position (False where attention is rotary).
    """

    def __init__(self, vocab_size: int, d_model: int, max_len: int, *, positions: bool) -> None:
        super().__init__()
        self.max_len = max_len
        self.tokens = nn.Embedding(vocab_size, d_model)
        self.positions = nn.Embedding(max_len, d_model) if positions else None

    def forward(self, ids: Tensor, start: int = 0) -> Tensor:
        """Map ids ``(B, T)``, whose first position is ``start``, to ``(B, T, d_model)``."""
        if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32) or not ids.shape[1]:
            refuse("ids", f"{ids.dtype} {tuple(ids.shape)}", "give integer token ids of shape (B, T), T >= 1")
        if start + ids.shape[1] > self.max_len:
            refuse(
                "ids", f"{start + ids.shape[1]} tokens", f"the model takes {self.max_len} at most: cut them"
            )
        # Reading values would wait for a GPU, and cannot be traced.
        if type(ids) is Tensor and ids.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = ids.aminmax()
            if ids.numel() and not 0 <= int(low) <= int(high) < self.tokens.num_embeddings:
                refuse("ids", (int(low), int(high)), f"token ids are 0 to {self.tokens.num_embeddings - 1}")
        x: Tensor = self.tokens(ids)
        if self.positions is not None:
            x = x + self.positions(torch.arange(start, start + ids.shape[1], device=ids.device))
        return x


class CausalLMBlock(nn.Module):
    """``z = x + attention(norm(x))``, then ``z + ffn(norm(z))``.

    Args:
        d_model: width.
        n_heads: heads.
        ffn_dim: width inside the feed-forward layer.
        rotated: channels of each head that are rotated by position; even.
        bias: linear layers have biases.
    """

    def __init__(self, d_model: int, n_heads: int, ffn_dim: int, rotated: int = 0, bias: bool = True) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(d_model)
        self.attention = CausalAttention(d_model, n_heads, rotated, bias)
        self.ffn_norm = nn.LayerNorm(d_model)
        self.ffn = FeedForward(d_model, ffn_dim, bias)

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        """Map ``(B, T, d_model)`` to the same shape."""
        x = x + self.attention(self.attention_norm(x), cache)
        return x + self.ffn(self.ffn_norm(x))  # type: ignore[no-any-return]


class CausalAttention(nn.Module):
    """Multi-head causal self-attention with separate projections; arguments as :class:`CausalLMBlock`."""

    is_causal = True

    def __init__(self, d_model: int, n_heads: int, rotated: int = 0, bias: bool = True) -> None:
        super().__init__()
        self.n_heads, self.rotated = n_heads, rotated
        self.query = nn.Linear(d_model, d_model, bias=bias)
        self.key = nn.Linear(d_model, d_model, bias=bias)
        self.value = nn.Linear(d_model, d_model, bias=bias)
        self.out = nn.Linear(d_model, d_model, bias=bias)

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        """Map ``(B, T, d_model)`` to the same shape; a cache adds earlier positions."""
        q, k, v = self.query(x), self.key(x), self.value(x)
        return self.out(attend(q, k, v, self.n_heads, self.rotated, cache))  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    """Linear, GELU, linear.

    Args:
        d_model: width outside.
        ffn_dim: width inside.
        bias: linear layers have biases.
    """

    def __init__(self, d_model: int, ffn_dim: int, bias: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, ffn_dim, bias=bias)
        self.down = nn.Linear(ffn_dim, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., d_model)`` to the same shape."""
        return self.down(F.gelu(self.up(x)))  # type: ignore[no-any-return]


@dataclass
class LayerCache:
    """Keys and values of one layer, ``(B, heads, max_len, width)``; ``length`` positions are filled."""

    keys: Tensor
    values: Tensor
    length: int = 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add ``(B, heads, T, width)`` and give all positions so far.

        Raises:
            BadInput: the cache is full, or was made for another number of sequences.
        """
        end = self.length + keys.shape[2]
        if end > self.keys.shape[2] or keys.shape[0] != self.keys.shape[0]:
            batch, _, room, _ = self.keys.shape
            refuse(
                "cache", (keys.shape[0], end), f"it holds {batch} sequences of {room} tokens: make a new one"
            )
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class KVCache:
    """Keys and values of all layers, allocated once.

    Args:
        n_layers: attention layers.
        batch: sequences.
        n_heads: heads.
        max_len: tokens it can hold.
        width: of a head.
        dtype: of the keys and values.
        device: where they lie.

    Example:
        >>> lm = CausalLM(vocab_size=9, d_model=8, n_layers=1, n_heads=2, max_len=4).eval()
        >>> ids, cache = torch.tensor([[1, 2, 3]]), lm.new_cache()
        >>> steps = torch.cat([lm(ids[:, i : i + 1], cache) for i in range(3)], dim=1)
        >>> bool(torch.allclose(steps, lm(ids), atol=1e-6)), cache.memory_bytes()
        (True, {'kv_cache': 256})
    """

    def __init__(
        self,
        n_layers: int,
        batch: int,
        n_heads: int,
        max_len: int,
        width: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        check_sizes(n_layers=n_layers, batch=batch, n_heads=n_heads, max_len=max_len, width=width)
        shape = (batch, n_heads, max_len, width)
        self._layers = [
            LayerCache(
                torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device)
            )
            for _ in range(n_layers)
        ]

    def __getitem__(self, layer: int) -> LayerCache:
        return self._layers[layer]

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Iterator[LayerCache]:
        return iter(self._layers)

    @property
    def length(self) -> int:
        """Tokens held of each sequence."""
        return self._layers[0].length

    def crop_(self, length: int) -> KVCache:
        """Forget the positions from ``length`` on, in place."""
        if not 0 <= length <= self.length:
            refuse("length", length, f"the cache holds {self.length} tokens: keep that many or fewer")
        for layer in self._layers:
            layer.length = length
        return self

    def memory_bytes(self) -> dict[str, int]:
        """Bytes allocated, filled or not."""
        return {"kv_cache": sum(layer.keys.nbytes + layer.values.nbytes for layer in self._layers)}


def attend(
    q: Tensor, k: Tensor, v: Tensor, n_heads: int, rotated: int = 0, cache: LayerCache | None = None
) -> Tensor:
    """Causal multi-head attention of given queries, keys and values.

    Args:
        q: queries, (B, T, d); head i reads channels i·d/heads to (i+1)·d/heads.
        k: keys, likewise.
        v: values, likewise.
        n_heads: heads.
        rotated: first channels of each head whose queries and keys are rotated by position; even, 0 for none.
        cache: earlier keys and values; the new ones are added.

    Returns:
        (B, T, d).
    """
    batch, tokens, d = q.shape
    heads = (batch, tokens, n_heads, d // n_heads)
    q, k, v = (part.view(heads).transpose(1, 2) for part in (q, k, v))
    start = 0 if cache is None else cache.length
    if rotated:
        cos, sin = _rotation(start, tokens, rotated, q)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    mask = None
    if cache is not None:
        k, v = cache.append(k, v)
        if start and tokens > 1:  # query i stands at position start + i
            mask = torch.ones(tokens, start + tokens, dtype=torch.bool, device=q.device).tril(start)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=start == 0 and tokens > 1)
    return out.transpose(1, 2).reshape(batch, tokens, d)


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean cross-entropy, in nats, of each token given those before it.

    Args:
        logits: (B, T, V).
        ids: (B, T), the tokens that were read; the first is not predicted.

    Raises:
        BadInput: shapes that do not agree, or fewer than two tokens.

    Example:
        >>> round(float(next_token_loss(torch.zeros(1, 3, 8), torch.tensor([[1, 2, 3]]))), 4)
        2.0794
    """
    if logits.dim() != 3 or logits.shape[:2] != ids.shape or ids.shape[1] < 2:
        refuse("ids", tuple(ids.shape), f"logits are {tuple(logits.shape)}: give (B, T) with T >= 2")
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten().long())


class Generator(Protocol):
    """What :func:`generate` asks of a language model."""

    max_len: int

    def __call__(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits (B, T, V)."""
        ...

    def new_cache(self, batch: int = 1, max_len: int | None = None) -> KVCache:
        """An empty cache."""
        ...


@torch.no_grad()
def generate(
    model: Generator,
    ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    stop: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue token sequences with a key-value cache.

    Args:
        model: a :class:`CausalLM`, or any network with its call, ``new_cache`` and ``max_len``.
        ids: (B, T), the beginning; T at least 1.
        max_new_tokens: how many tokens to add at most.
        temperature: 0 takes the likeliest token; else logits are divided by it and a token is drawn.
        top_k: draw among the k likeliest only.
        stop: a token after which a sequence is ended (and filled with it).
        generator: of the draws.

    Returns:
        (B, T + n), n at most ``max_new_tokens``.

    Raises:
        BadInput: more tokens than the model can hold, a negative temperature, ``top_k`` below 1.
    """
    if temperature < 0 or (top_k is not None and top_k < 1):
        refuse("temperature, top_k", (temperature, top_k), "give 0 or more, and 1 or more (or None)")
    if max_new_tokens < 0 or ids.dim() != 2 or ids.shape[1] + max_new_tokens > model.max_len:
        refuse(
            "max_new_tokens",
            max_new_tokens,
            f"ids are {tuple(ids.shape)} and the model holds {model.max_len} tokens a sequence",
        )
    if max_new_tokens == 0:
        return ids
    cache = model.new_cache(ids.shape[0], ids.shape[1] + max_new_tokens)
    ended = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
    fresh = ids
    for _ in range(max_new_tokens):
        logits = model(fresh, cache)[:, -1].float()
        fresh = _pick(logits, temperature, top_k, generator).to(ids.dtype)
        if stop is not None:
            fresh = torch.where(ended[:, None], stop, fresh)
            ended |= fresh[:, 0] == stop
        ids = torch.cat([ids, fresh], dim=1)
        if stop is not None and bool(ended.all()):
            break
    return ids


def rotary_width(d_model: int, n_heads: int, rotary: float) -> int:
    """Channels of a head that a rotary share turns: even, at or below ``rotary * width``, but 2 at least.

    Raises:
        BadInput: sizes that do not divide, a share outside [0, 1], a head too narrow to rotate.

    Example:
        >>> rotary_width(512, 8, 0.25), rotary_width(512, 8, 0.0)
        (16, 0)
    """
    check_sizes(d_model=d_model, n_heads=n_heads)
    if d_model % n_heads:
        refuse("n_heads", n_heads, f"give a divisor of d_model = {d_model}")
    width = d_model // n_heads
    if not 0 <= rotary <= 1 or (rotary and width < 2):
        refuse(
            "rotary", rotary, f"give a share from 0 to 1; heads are {width} wide and 2 channels are needed"
        )
    return max(2, int(rotary * width) // 2 * 2) if rotary else 0


def check_sizes(**sizes: int) -> None:
    """Refuse sizes that are not whole numbers of 1 or more."""
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            refuse(name, value, "give a whole number, 1 or more")


def _pick(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)


def _rotation(start: int, tokens: int, rotated: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``(tokens, rotated / 2)`` of position times 10000^(-2i/rotated); exact in float32."""
    exact = torch.promote_types(like.dtype, torch.float32)
    places = torch.arange(start, start + tokens, device=like.device, dtype=exact)
    speeds = 10000.0 ** (torch.arange(0, rotated, 2, device=like.device, dtype=exact) / -rotated)
    angles = places[:, None] * speeds
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channel pairs (i, i + rotated/2) of ``(B, heads, T, width)``; the channels after them stay."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)
