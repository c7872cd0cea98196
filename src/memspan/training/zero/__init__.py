"""ZeRO: training states cut over ranks, and the same losses (Rajbhandari et al. 2020, SC 2020).

Data parallelism keeps a copy of parameters, gradients and optimizer states on every rank. ZeRO keeps one
copy in all, and moves pieces when they are needed: stage 1 cuts optimizer states, stage 2 gradients too,
stage 3 parameters too (by torch's FSDP2). With mixed-precision Adam a rank holds 16Ψ bytes, then 4Ψ + 12Ψ/N,
2Ψ + 14Ψ/N, 16Ψ/N. Traffic stays that of an all-reduce, and is 1.5 times that at stage 3.

With ``deterministic=True`` a run on N ranks has the bits of one process that accumulates the ranks' batches.

Example:
    >>> {stage: sum(predict_bytes(7.5e9, world=64, stage=stage).values()) / 1e9 for stage in range(4)}
    {0: 120.0, 1: 31.40625, 2: 16.640625, 3: 1.875}
"""

from memspan.training.zero.activations import ContiguousBuffer, partitioned_checkpoint
from memspan.training.zero.buckets import BucketReducer
from memspan.training.zero.checkpoint import export
from memspan.training.zero.formulas import predict_bytes, predict_traffic
from memspan.training.zero.fsdp import deterministic_
from memspan.training.zero.norm import clip_grad_norm_
from memspan.training.zero.optimizer import Sharded, ZeroOptimizer, shard_, unshard_
from memspan.training.zero.partition import FlatPartition
from memspan.training.zero.trainer import save_shards_callback

__all__ = [
    "BucketReducer",
    "ContiguousBuffer",
    "FlatPartition",
    "Sharded",
    "ZeroOptimizer",
    "clip_grad_norm_",
    "deterministic_",
    "export",
    "partitioned_checkpoint",
    "predict_bytes",
    "predict_traffic",
    "save_shards_callback",
    "shard_",
    "unshard_",
]
