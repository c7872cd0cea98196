"""SlimFit: train a few layers in each step, others every time, and keep what remains in few bits.

Fine-tuning a transformer runs out of memory because of activations, which LoRA barely reduces: it still
back-propagates through every layer. SlimFit updates only the layers that moved most when they last trained;
the set changes every step, so the whole model still trains. What freezing cannot remove (inputs of GELU,
operands of attention, normalised inputs) is kept in 8 bits, 4 bits or pruned. Outputs are always exact: only
saved copies are compressed.

Source: Ardakani et al., "SlimFit: Memory-Efficient Fine-Tuning of Transformer-based Models Using Training
Dynamics", NAACL 2024.

When not to use it: a linear probe or LoRA reaches your accuracy (they also save optimizer state, SlimFit
does not unless told to); or time does not matter, then checkpointing is exact; or sequences are long, then
keep torch's fused attention (``CompressionPolicy.paper(attention="sdpa")``).

Example:
    >>> import torch
    >>> from torch import nn
    >>> from memspan.training import slimfit
    >>> layer = nn.TransformerEncoderLayer(16, 2, 64, activation="gelu", batch_first=True)
    >>> model = nn.TransformerEncoder(layer, 2)
    >>> model = slimfit.compress_(model)
    >>> opt = torch.optim.AdamW(model.parameters(), 1e-3)
    >>> sched = slimfit.FreezingScheduler(model, freeze_rate=0.9, optimizer=opt)
    >>> for _ in range(3):
    ...     active = sched.before_forward()
    ...     model(torch.randn(4, 5, 16)).square().mean().backward()
    ...     opt.step()
    ...     opt.zero_grad(set_to_none=True)
    ...     sched.after_step()
    >>> tuple(sched.history.shape), int(sched.history.sum())
    ((3, 12), 6)
"""

from memspan.training.slimfit.codes import (
    CompressionPolicy,
    Sparse,
    fixed_point,
    from_fixed_point,
    top_k,
)
from memspan.training.slimfit.convert import convert_, optimizer_for, unconvert_
from memspan.training.slimfit.kernels import (
    compressed_attention,
    compressed_dropout,
    compressed_gelu,
    compressed_layer_norm,
    compressed_linear,
    compressed_silu,
)
from memspan.training.slimfit.modules import (
    CompressedDropout,
    CompressedGELU,
    CompressedLayerNorm,
    CompressedLinear,
    CompressedMultiheadAttention,
    CompressedSiLU,
    compress_,
    decompress_,
    summary,
)
from memspan.training.slimfit.predict import predict_bytes
from memspan.training.slimfit.schedule import HEADS, FreezingScheduler, weight_update_distance

__all__ = [
    "HEADS",
    "CompressedDropout",
    "CompressedGELU",
    "CompressedLayerNorm",
    "CompressedLinear",
    "CompressedMultiheadAttention",
    "CompressedSiLU",
    "CompressionPolicy",
    "FreezingScheduler",
    "Sparse",
    "compress_",
    "compressed_attention",
    "compressed_dropout",
    "compressed_gelu",
    "compressed_layer_norm",
    "compressed_linear",
    "compressed_silu",
    "convert_",
    "decompress_",
    "fixed_point",
    "from_fixed_point",
    "optimizer_for",
    "predict_bytes",
    "summary",
    "top_k",
    "unconvert_",
    "weight_update_distance",
]
