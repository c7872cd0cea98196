"""UniPT: adapt a large frozen backbone at about the memory of running it.

Adapters and LoRA train few parameters but pass gradients through the whole backbone, so what autograd keeps
stays near full fine-tuning. UniPT trains a small network *beside* it that reads the hidden states of all
layers in parallel: the last layer asks every other one (attention by ReLU and L1 norm), and a confidence per
sample and layer sums the answers. The backbone runs under ``no_grad`` in eval mode, keeps nothing, and may be
quantized, compiled, or replaced by features computed once. Source: Diao et al., "UniPT: Universal Parallel
Tuning for Transfer Learning with Efficient Parameter and Memory", CVPR 2024. The ladder (LST) is its closest
rival and is here too.

When not to use it: where the last layer separates the task, a linear probe is cheaper; where the task needs
new low-level features (another modality or language), frozen features cap what any head can reach: use LoRA.

Example:
    >>> import torch
    >>> from torch import nn
    >>> from memspan.training import unipt
    >>> backbone = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))).eval()
    >>> model = unipt.UniPT(backbone, taps="?", out_dim=6)
    >>> features = model(torch.randn(2, 5, 8), mask=torch.ones(2, 5))
    >>> features.mean().backward()
    >>> features.shape, all(p.grad is None for p in backbone.parameters())
    (torch.Size([2, 5, 6]), True)
"""

from memspan.training.unipt.convert import predict_bytes, predict_side_bytes, side_tune_, unside_
from memspan.training.unipt.head import PRESETS, UniPTDecoderHead, UniPTHead, from_official
from memspan.training.unipt.ladder import LadderHead, LadderSideNetwork
from memspan.training.unipt.parts import ConfidenceAggregation, ParallelInteraction, SpatialAlign
from memspan.training.unipt.retrieval import GPO, HingeRetrievalLoss
from memspan.training.unipt.wrap import HiddenCache, SideTuned, SpatialUniPT, UniPT, cache_hidden, is_causal

__all__ = [
    "GPO",
    "PRESETS",
    "ConfidenceAggregation",
    "HiddenCache",
    "HingeRetrievalLoss",
    "LadderHead",
    "LadderSideNetwork",
    "ParallelInteraction",
    "SideTuned",
    "SpatialAlign",
    "SpatialUniPT",
    "UniPT",
    "UniPTDecoderHead",
    "UniPTHead",
    "cache_hidden",
    "from_official",
    "is_causal",
    "predict_bytes",
    "predict_side_bytes",
    "side_tune_",
    "unside_",
]
