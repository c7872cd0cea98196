"""The models that the recipe ``memoryformer`` compares, and the text they read."""

from __future__ import annotations

import math
import sys
from typing import Protocol

import torch
from torch import nn

from memspan import data
from memspan.base import optional
from memspan.data.sets import content_sha256
from memspan.ledger import macs
from memspan.models import CausalLM, MemoryFormerConfig, MemoryFormerLM, memory_cost

__all__ = [
    "CONTROL",
    "DENSE",
    "NARROW",
    "PKM",
    "VOCABULARY",
    "build",
    "decoder",
    "has_pkm",
    "operations",
    "same_rate",
    "some_text",
    "split",
    "tables",
]

DENSE, NARROW, PKM, CONTROL = (
    "dense twin",
    "dense, equal arithmetic",
    "product-key memory",
    "byte frequencies",
)
VOCABULARY = 256


class Sizes(Protocol):
    """The options that sizes are read from."""

    @property
    def width(self) -> int:
        """Of the trained models."""
        ...

    @property
    def layers(self) -> int:
        """Blocks."""
        ...

    @property
    def length(self) -> int:
        """Bytes of a sequence."""
        ...

    @property
    def bits(self) -> tuple[int, ...]:
        """Entries of a chunk, rising."""
        ...

    @property
    def decode_width(self) -> int:
        """Of the timed models."""
        ...


def tables(bits: int) -> str:
    """Label of a model of tables."""
    return f"tables, {bits} bits"


def same_rate(o: Sizes) -> str:
    """Label of the largest tables at the learning rate of the dense model."""
    return f"tables, {o.bits[-1]} bits, dense rate"


def build(method: str, o: Sizes) -> nn.Module:
    """The untrained model of a method."""
    heads = max(1, o.width // 24)
    if method == NARROW:
        return CausalLM(VOCABULARY, narrowed(o), o.layers, 1, o.length)
    if method in (DENSE, PKM):
        model = CausalLM(VOCABULARY, o.width, o.layers, heads, o.length)
        if method == PKM:
            make = optional("product_key_memory", extra="peers").PKM
            for block in model.blocks:
                block.ffn = make(dim=o.width, heads=2, num_keys=32, topk=8, dim_head=16)
        return model
    bits = o.bits[-1] if method == same_rate(o) else int(method.split()[1])
    return MemoryFormerLM(
        MemoryFormerConfig(VOCABULARY, o.width, o.layers, heads, bits=bits, max_len=o.length)
    )


def narrowed(o: Sizes) -> int:
    """Width of a dense model with the tables' arithmetic: 12 d² = K (4 width + (tau + 2) K)."""
    count = o.width // o.bits[-1]
    macs_of_tables = count * (4 * o.width + (o.bits[-1] + 2) * count)
    return max(8, round(math.sqrt(macs_of_tables / 12) / 8) * 8)


def operations(model: nn.Module, o: Sizes) -> int:
    """Operations of a sequence without its head, attention included: 2 per multiply-add."""
    if isinstance(model, MemoryFormerLM):
        cost = memory_cost(model, o.length)
        return 2 * (cost.lookup_macs + cost.attention_macs)
    ids = torch.zeros(1, o.length, dtype=torch.long, device=next(model.parameters()).device)
    head = o.length * model.head.weight.numel()  # type: ignore[union-attr,operator]
    return 2 * (macs(model, ids) - head)


def decoder(method: str, o: Sizes) -> nn.Module:
    """One block at the width that is timed, with random weights."""
    d, heads = o.decode_width, o.decode_width // 64
    if method == DENSE:
        return CausalLM(VOCABULARY, d, 1, heads, 64).eval()
    config = MemoryFormerConfig(VOCABULARY, d, 1, heads, bits=o.bits[-1], max_len=64)
    return MemoryFormerLM(config).eval()


def has_pkm() -> bool:
    """Whether the peer is installed."""
    try:
        return bool(optional("product_key_memory", extra="peers"))
    except ImportError:
        return False


def some_text() -> data.TextSet:
    """Shakespeare, else Wikipedia, else the language reference that comes with Python."""
    try:
        return data.load_first(("tiny-shakespeare", "wikitext2", "wikipedia-pages"), data.TextSet)
    except data.DataNotFound:
        from pydoc_data.topics import topics

        parts = {"text": tuple(topics[name] for name in sorted(topics))}
        return data.TextSet(
            name="python-topics", source=f"pydoc_data of Python {sys.version.split()[0]}",
            sha256=content_sha256(parts), licence="PSF-2.0", parts=parts, meta={},
        )  # fmt: skip


def split(text: data.TextSet) -> tuple[str, str]:
    """Training and held-out text: the set's own parts, else nine tenths and the rest."""
    if len(text.parts) == 2:
        first = "train" if "train" in text.parts else "valid"
        return text.text(first), text.text(next(part for part in text.parts if part != first))
    whole = text.text(next(iter(text.parts)))
    return whole[: len(whole) * 9 // 10], whole[len(whole) * 9 // 10 :]
