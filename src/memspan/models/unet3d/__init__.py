"""Reversible 3-D U-Net: train on whole volumes, deeper or wider, in the bytes that a plain one would take.

A U-Net on volumes runs out of memory for activations: each layer keeps a volume. Here what is done at one
resolution is a chain of reversible couplings (:mod:`memspan.nn.reversible`) of mobile inverted bottlenecks,
of which only the last output is kept; the rest comes back in the backward pass. The weights and the outputs
are those of the plain network: one flag, ``memory``, tells them apart.

>>> import torch
>>> from memspan.models.unet3d import ReversibleUNet3d, soft_dice_loss
>>> net = ReversibleUNet3d(in_channels=1, out_channels=2, channels=(8, 16), depth=2)
>>> volume, masks = torch.randn(1, 1, 8, 8, 8), torch.zeros(1, 2, 8, 8, 8)
>>> soft_dice_loss(net(volume), masks).backward()

:func:`predict_bytes` tells before a run what it holds, :func:`plan_volume` the largest cube that fits.

When not: where the activations are not what fills memory (small crops, a huge optimizer state), and where
``torch.utils.checkpoint`` on an existing network is saving enough, which needs no change of architecture.

References:
    Pendse, Thangarasa, Chiley, Holmdahl, Hestness, DeCoste, "Memory Efficient 3D U-Net with Reversible Mobile
    Inverted Bottlenecks for Brain Tumor Segmentation", BrainLes at MICCAI 2020, arXiv 2104.09648.
    Brügger, Baumgartner, Konukoglu, "A Partially Reversible U-Net for Memory-Efficient Volumetric Image
    Segmentation", MICCAI 2019, arXiv 1906.06148.
"""

from memspan.models.unet3d.formulas import plan_volume, predict_bytes
from memspan.models.unet3d.losses import dice_scores, nested_regions, soft_dice_loss
from memspan.models.unet3d.network import Conv3dBlock, MBConv3d, ReversibleMBConv3d, ReversibleUNet3d

__all__ = [
    "Conv3dBlock",
    "MBConv3d",
    "ReversibleMBConv3d",
    "ReversibleUNet3d",
    "dice_scores",
    "nested_regions",
    "plan_volume",
    "predict_bytes",
    "soft_dice_loss",
]
