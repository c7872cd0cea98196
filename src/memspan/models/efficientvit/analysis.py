"""What a network's time goes to, and how alike its heads are: the measurements that motivate EfficientViT."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memspan.base import refuse
from memspan.models.efficientvit.network import CascadedGroupAttention, MultiHeadAttention

__all__ = ["TimeShare", "head_similarity", "memory_bound_share"]

_COMPUTE = ("conv", "addmm", "bmm", "mm", "linear", "matmul", "scaled_dot_product", "gemm")


@dataclass(frozen=True)
class TimeShare:
    """Where the time of a forward pass goes; the parts sum to 1.

    Attributes:
        memory_bound: share of operators that wait for memory: copies, reshapes, sums, activations, softmax,
            normalisation, pooling, padding.
        compute_bound: share of convolutions and matrix products.
        by_operator: share of each operator, largest first.
    """

    memory_bound: float
    compute_bound: float
    by_operator: dict[str, float]


@torch.inference_mode()
def memory_bound_share(model: nn.Module, x: Any, repeats: int = 5) -> TimeShare:
    """Measure how much of a network's own time goes to operators that memory traffic bounds.

    Any network will do. Time is each operator's own, without its callees', from torch's profiler; Python
    between operators is not counted.

    Args:
        model: the network; its mode is left as it is, so call ``.eval()`` first.
        x: an input of its forward.
        repeats: profiled passes, after two that warm up.

    Raises:
        BadInput: the pass runs no operator that takes time.

    References:
        Liu et al., CVPR 2023, section 2.1 (memory efficiency).

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        >>> share = memory_bound_share(network, torch.randn(1, 3, 32, 32))
        >>> abs(share.memory_bound + share.compute_bound - 1) < 1e-9
        True
    """
    on_cuda = next((p.is_cuda for p in model.parameters()), False)
    for _ in range(2):
        model(x)
    # Off CUDA torch's older recorder is enough; the newer one writes lines to the terminal.
    with torch.autograd.profiler.profile(
        use_device="cuda" if on_cuda else None, use_kineto=on_cuda
    ) as profile:
        for _ in range(repeats):
            model(x)
    times: dict[str, float] = defaultdict(float)
    for event in profile.key_averages():
        if event.key.startswith("aten::"):
            times[event.key] += event.self_device_time_total if on_cuda else event.self_cpu_time_total
    total = sum(times.values())
    if total <= 0:
        refuse("x", type(x).__name__, "the forward pass ran no operator that takes time")
    shares = {name: time / total for name, time in sorted(times.items(), key=lambda item: -item[1])}
    compute = sum(share for name, share in shares.items() if any(word in name for word in _COMPUTE))
    return TimeShare(1 - compute, compute, shares)


@torch.no_grad()
def head_similarity(model: nn.Module, x: Tensor) -> dict[str, float]:
    """How alike the heads of each attention are: mean cosine between their attention maps.

    1 means that all heads look at the same positions; diverse heads give less.

    Args:
        model: an :class:`EfficientViT` or any module that holds its attentions; fused or not.
        x: an input of the model's forward.

    Returns:
        Name of the attention -> mean over pairs of heads, images and windows of the cosine between their
        ``N x N`` maps. Attentions with one head are absent.

    Raises:
        BadInput: the model has no attention with two heads or more.

    Example:
        >>> from memspan.models.efficientvit import efficientvit_m0
        >>> similarity = head_similarity(efficientvit_m0(num_classes=2).eval(), torch.randn(1, 3, 224, 224))
        >>> len(similarity), all(0 <= value <= 1 for value in similarity.values())
        (6, True)
    """
    attentions = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, CascadedGroupAttention | MultiHeadAttention) and module.num_heads > 1
    }
    if not attentions:
        refuse("model", type(model).__name__, "it holds no attention of memspan with two heads or more")
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen[name] = inputs[0]

        return hook

    handles = [module.register_forward_pre_hook(keep(name)) for name, module in attentions.items()]
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    result = {}
    for name, inputs in seen.items():
        maps = F.normalize(attentions[name].attention_maps(inputs).flatten(2).double(), dim=-1)
        pairs = combinations(range(maps.shape[1]), 2)
        result[name] = float(torch.stack([(maps[:, i] * maps[:, j]).sum(-1).mean() for i, j in pairs]).mean())
    return result
