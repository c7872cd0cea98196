"""What tables cost and save: multiply-adds, bytes held, bytes read for a token, and how rows are used."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memspan.base import refuse
from memspan.ledger.bytes import Budget
from memspan.models.memoryformer.layers import MemoryLinear
from memspan.models.memoryformer.network import MemoryFormerLM
from memspan.nn.lookup import SlotUsage, slot_usage

__all__ = ["MemoryCost", "bucket_usage", "memory_cost"]


@dataclass(frozen=True)
class MemoryCost:
    """Costs of a model's memory layers beside those of the matrices they stand for.

    Multiply-adds are of one sequence of ``seq_len`` tokens; embeddings and the LM head are left out on both
    sides.

    Attributes:
        seq_len: s, tokens.
        lookup_macs: multiply-adds of the sums over rows, exact.
        attention_macs: 2 s² d a layer, of both models; 0 for a model that is no ``MemoryFormerLM``.
        hash_ops: entries whose sign and size are read.
        dense_macs: multiply-adds of the dense twin outside attention: 12 s d² a layer for a
            ``MemoryFormerLM`` (whose attention lacks an output projection that the twin has), else in x out
            of each layer.
        table_bytes: bytes of all tables.
        dense_bytes: bytes of the twin's matrices, at the tables' dtype.
        read_bytes: bytes of rows read for one token.
        dense_read_bytes: bytes of matrices read for one token at batch 1.
        moments_bytes: what Adam keeps for the tables in float32.
    """

    seq_len: int
    lookup_macs: int
    attention_macs: int
    hash_ops: int
    dense_macs: int
    table_bytes: int
    dense_bytes: int
    read_bytes: int
    dense_read_bytes: int
    moments_bytes: int

    def memory_bytes(self) -> dict[str, int]:
        """Bytes of the tables, as the ledger counts them."""
        return {"parameters.tables": self.table_bytes}

    def to_dict(self) -> dict[str, int]:
        """All numbers by name."""
        return asdict(self)

    def __str__(self) -> str:
        def line(what: str, ours: str, dense: str) -> str:
            return f"{what:34} {ours:>14} {dense:>14}"

        return "\n".join(
            [
                line(f"{self.seq_len} tokens", "tables", "dense twin"),
                line("multiply-adds outside attention", f"{self.lookup_macs:.3g}", f"{self.dense_macs:.3g}"),
                line("multiply-adds of attention", *2 * (f"{self.attention_macs:.3g}",)),
                line("bytes held", str(Budget(self.table_bytes)), str(Budget(self.dense_bytes))),
                line(
                    "bytes read for a token", str(Budget(self.read_bytes)), str(Budget(self.dense_read_bytes))
                ),
                line("Adam's moments", str(Budget(self.moments_bytes)), "in float32"),
            ]
        )


def memory_cost(model: nn.Module, seq_len: int) -> MemoryCost:
    """Costs of every memory layer in a model.

    Args:
        model: a :class:`MemoryFormerLM`, or any model with memory layers; ``device="meta"`` costs nothing.
        seq_len: tokens of a sequence.

    Raises:
        BadInput: no memory layer, ``seq_len`` below 1, or NaN in a table.

    Example:
        >>> print(memory_cost(MemoryLinear(512, 512), seq_len=1))  # doctest: +NORMALIZE_WHITESPACE
        1 tokens                                   tables     dense twin
        multiply-adds outside attention          3.28e+04       2.62e+05
        multiply-adds of attention                      0              0
        bytes held                                 32 MiB          1 MiB
        bytes read for a token                    128 KiB          1 MiB
        Adam's moments                             64 MiB     in float32
    """
    layers = {name: part for name, part in model.named_modules() if isinstance(part, MemoryLinear)}
    if not layers:
        refuse("model", type(model).__name__, "it has no MemoryLinear")
    if seq_len < 1:
        refuse("seq_len", seq_len, "give 1 token or more")
    for name, part in layers.items():
        if not part.tables.is_meta and bool(part.tables.isnan().any()):
            refuse(name or "tables", "NaN", "a table holds NaN: training diverged, or the file is damaged")
    parts = layers.values()
    dense = sum(part.in_features * part.out_features for part in parts)
    attention, size = 0, next(iter(parts)).tables.element_size()
    if isinstance(model, MemoryFormerLM):
        d, depth = model.config.d_model, model.config.n_layers
        dense, attention = 12 * d * d * depth, 2 * seq_len**2 * d * depth
    per_token = sum(part.tables.shape[0] * part.out_features for part in parts)
    return MemoryCost(
        seq_len=seq_len,
        lookup_macs=seq_len * per_token,
        attention_macs=attention,
        hash_ops=seq_len * sum(part.in_features for part in parts),
        dense_macs=seq_len * dense,
        table_bytes=sum(part.tables.nbytes for part in parts),
        dense_bytes=dense * size,
        read_bytes=per_token * size,
        dense_read_bytes=dense * size,
        moments_bytes=sum(8 * part.tables.numel() for part in parts),
    )


@torch.no_grad()
def bucket_usage(model: nn.Module, batches: Iterable[Any]) -> dict[str, SlotUsage]:
    """How evenly inputs fall on the rows of each memory layer, by the layer's name.

    Args:
        model: any model with memory layers.
        batches: what it is called with, one item a call (a tuple gives several arguments). Entropies of few
            inputs are biased low: give 32 for each row, 8,192 at 8 bits.

    Raises:
        BadInput: no memory layer, NaN in what a layer reads, no input that reaches one.

    Example:
        >>> usage = bucket_usage(MemoryLinear(8, 8, bits=2), [torch.randn(4096, 8)])
        >>> bool(usage[""].perplexity.min() > 3.9), int(usage[""].dead.sum())
        (True, 0)
    """
    layers = {name: part for name, part in model.named_modules() if isinstance(part, MemoryLinear)}
    if not layers:
        refuse("model", type(model).__name__, "it has no MemoryLinear")
    counts = {name: torch.zeros(part.tables.shape[:2], dtype=torch.float64) for name, part in layers.items()}

    def counting(name: str) -> Any:
        def hook(part: MemoryLinear, arguments: tuple[Tensor, ...]) -> None:
            if bool(arguments[0].isnan().any()):
                refuse("batches", "NaN", f"layer {name!r} reads NaN, which hashes to a row like any other")
            code, _ = part.hash(arguments[0])
            usage = slot_usage(code, 2**part.bits)
            counts[name] += usage.shares.double().cpu() * (code.numel() // code.shape[-1])

        return hook

    handles = [part.register_forward_pre_hook(counting(name)) for name, part in layers.items()]
    try:
        for item in batches:
            model(*item) if isinstance(item, tuple) else model(item)
    finally:
        for handle in handles:
            handle.remove()
    return {name: slot_usage(count[None]) for name, count in counts.items()}
