"""EfficientViT of Microsoft Research (CVPR 2023): image backbones for machines that wait for memory.

Not MIT's EfficientViT (linear attention, arXiv 2205.14756), which has the same name.

On CPUs, phones and single images a vision transformer spends most of its time on operators that move bytes
and compute little. This network has few of them: one attention between cheap convolutional blocks; heads
that see a slice of the channels each and refine one another (:class:`CascadedGroupAttention`); and only
batch normalisation, which :func:`fuse_` folds away.

``efficientvit_m0`` to ``efficientvit_m5`` build the published models and load their published weights.
:func:`memory_bound_share` tells any network's share of time in memory-bound operators,
:func:`head_similarity` how alike its heads are; :func:`features_only` gives maps for detection, and
:func:`export_onnx` a file to serve.

References:
    Liu, Peng, Zheng, Yang, Hu, Yuan, "EfficientViT: Memory Efficient Vision Transformer with Cascaded Group
    Attention", CVPR 2023, arXiv 2305.07027.
"""

from memspan.models.efficientvit.analysis import TimeShare, head_similarity, memory_bound_share
from memspan.models.efficientvit.deploy import export_onnx, optimizer_and_schedule, parameter_groups
from memspan.models.efficientvit.network import (
    VARIANTS,
    BNLinear,
    CascadedGroupAttention,
    ConvBN,
    EfficientViT,
    FeaturePyramid,
    MultiHeadAttention,
    PatchMerging,
    Residual,
    SandwichBlock,
    WindowAttention,
    efficientvit_m0,
    efficientvit_m1,
    efficientvit_m2,
    efficientvit_m3,
    efficientvit_m4,
    efficientvit_m5,
    features_only,
    fuse_,
    resize_bias_table,
)
from memspan.models.efficientvit.weights import load_file_, load_official_, load_timm_

__all__ = [
    "VARIANTS",
    "BNLinear",
    "CascadedGroupAttention",
    "ConvBN",
    "EfficientViT",
    "FeaturePyramid",
    "MultiHeadAttention",
    "PatchMerging",
    "Residual",
    "SandwichBlock",
    "TimeShare",
    "WindowAttention",
    "efficientvit_m0",
    "efficientvit_m1",
    "efficientvit_m2",
    "efficientvit_m3",
    "efficientvit_m4",
    "efficientvit_m5",
    "export_onnx",
    "features_only",
    "fuse_",
    "head_similarity",
    "load_file_",
    "load_official_",
    "load_timm_",
    "memory_bound_share",
    "optimizer_and_schedule",
    "parameter_groups",
    "resize_bias_table",
]
