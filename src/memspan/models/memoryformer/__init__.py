"""MemoryFormer (NeurIPS 2024): a transformer that trades bytes for arithmetic.

A model that answers one token at a time waits for its matrices: every weight is read for every token. Here
each fully connected layer is a set of tables: the signs of a few input entries choose one row of each, and
rows are summed. A token then reads and multiplies ``bits`` times less, while the tables hold 2**bits / bits
times more. Where RAM is plenty and arithmetic or bandwidth is not (CPU and edge decoding), that is a good
trade.

- :class:`MemoryLinear`, :class:`MultiMemoryLinear`, :class:`MemoryBlock`: the layers.
- :class:`MemoryFormerLM`: the language model, with generation, key-value cache and safetensors.
- :func:`from_linear`, :func:`convert_`: a trained model's linear layers as fitted tables, to be fine-tuned.
- :func:`memory_cost`: multiply-adds, bytes held and bytes read, beside the dense twin's.
- :func:`bucket_usage`: entropy of row use, and rows that nothing reads.

When not to use it: at large batches, in prefill and in training a matrix product is as fast or faster; where
RAM is short, tables are the wrong end of the trade. See ``docs/systems/memoryformer.md``.

Example:
    >>> import torch
    >>> from memspan.models import MemoryFormerConfig, MemoryFormerLM, MemoryLinear, memory_cost
    >>> y = MemoryLinear(512, 512, bits=8)(torch.randn(2, 512))  # in the place of nn.Linear(512, 512)
    >>> lm = MemoryFormerLM(MemoryFormerConfig(512, d_model=64, n_layers=2, n_heads=4, max_len=128))
    >>> cost = memory_cost(lm, seq_len=128)
    >>> cost.dense_macs // cost.lookup_macs, cost.table_bytes // cost.dense_bytes
    (18, 22)

References:
    Ding, Cheng, Chu, Lin, Tang, Guo, Han, "MemoryFormer: Minimize Transformer Computation by Removing
    Fully-Connected Layers", NeurIPS 2024; Zeng et al., "LookupFFN", ICML 2023 (its ancestor).
"""

from memspan.models.memoryformer.cost import MemoryCost, bucket_usage, memory_cost
from memspan.models.memoryformer.layers import (
    MemoryBlock,
    MemoryLinear,
    MultiMemoryLinear,
    convert_,
    flip_bit_order,
    from_linear,
)
from memspan.models.memoryformer.network import MemoryFormerConfig, MemoryFormerLayer, MemoryFormerLM
from memspan.nn.lookup import hash_codes

__all__ = [
    "MemoryBlock",
    "MemoryCost",
    "MemoryFormerConfig",
    "MemoryFormerLM",
    "MemoryFormerLayer",
    "MemoryLinear",
    "MultiMemoryLinear",
    "bucket_usage",
    "convert_",
    "flip_bit_order",
    "from_linear",
    "hash_codes",
    "memory_cost",
]
