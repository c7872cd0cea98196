"""Small networks of the class-incremental literature: image -> features, without a head.

The residual networks for 32 x 32 images follow He et al. 2016, section 4.2 (three stages of width 16, 32, 64;
shortcuts without parameters); ResNet-18 is that of section 4.1. Pooling adapts to the image size, and the
shortcut pads with zeros instead of multiplying by 0, so that a NaN in a channel does not spread.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from memspan.base import nearest, refuse

__all__ = ["ConvNet2", "ImageResNet", "SmallResNet", "build", "names"]


class SmallResNet(nn.Module):
    """Residual network for small images: ``stem``, ``stage1``, ``stage2``, ``stage3``, ``pool``.

    Args:
        blocks: residual blocks a stage; depth is 6 · blocks + 2.
        in_channels: of the image.
        widths: channels of the three stages.
        stem_stride: 2 quarters the work of all stages.

    Shapes:
        x (B, in_channels, H, W) -> (B, widths[2]).

    Example:
        >>> import torch
        >>> net = SmallResNet(5)
        >>> sum(p.numel() for p in net.parameters()), net(torch.zeros(2, 3, 32, 32)).shape
        (463504, torch.Size([2, 64]))
    """

    def __init__(
        self,
        blocks: int,
        in_channels: int = 3,
        widths: tuple[int, int, int] = (16, 32, 64),
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        self.feature_dim = widths[2]
        self.stem = _conv_norm_relu(in_channels, widths[0], stem_stride)
        self.stage1 = _stage(_PlainShortcutBlock, widths[0], widths[0], blocks, 1)
        self.stage2 = _stage(_PlainShortcutBlock, widths[0], widths[1], blocks, 2)
        self.stage3 = _stage(_PlainShortcutBlock, widths[1], widths[2], blocks, 2)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, widths[2]) of images (B, in_channels, H, W)."""
        return self.pool(self.stage3(self.stage2(self.stage1(self.stem(x)))))  # type: ignore[no-any-return]


class ImageResNet(nn.Module):
    """ResNet-18 without a head: ``stem``, ``stage1`` to ``stage4``, ``pool``.

    Args:
        in_channels: of the image.
        width: channels of the first stage.

    Shapes:
        x (B, in_channels, H, W) -> (B, 8 · width).

    Example:
        >>> sum(p.numel() for p in ImageResNet().parameters())
        11176512
    """

    def __init__(self, in_channels: int = 3, width: int = 64) -> None:
        super().__init__()
        self.feature_dim = 8 * width
        self.stem = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(in_channels, width, 7, 2, 3, bias=False),
                norm=nn.BatchNorm2d(width),
                relu=nn.ReLU(inplace=True),
                pool=nn.MaxPool2d(3, 2, 1),
            )
        )
        self.stage1 = _stage(_ConvShortcutBlock, width, width, 2, 1)
        self.stage2 = _stage(_ConvShortcutBlock, width, 2 * width, 2, 2)
        self.stage3 = _stage(_ConvShortcutBlock, 2 * width, 4 * width, 2, 2)
        self.stage4 = _stage(_ConvShortcutBlock, 4 * width, 8 * width, 2, 2)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, 8 · width) of images (B, in_channels, H, W)."""
        x = self.stage4(self.stage3(self.stage2(self.stage1(self.stem(x)))))
        return self.pool(x)  # type: ignore[no-any-return]


class ConvNet2(nn.Module):
    """Two convolutions, the smallest network of the paper's sweep: ``stage1``, ``stage2``, ``pool``.

    Args:
        in_channels: of the image.
        width: channels.

    Shapes:
        x (B, in_channels, H, W) -> (B, width).

    Example:
        >>> sum(p.numel() for p in ConvNet2().parameters())
        38976
    """

    def __init__(self, in_channels: int = 3, width: int = 64) -> None:
        super().__init__()
        self.feature_dim = width
        self.stage1 = _conv_pool(in_channels, width)
        self.stage2 = _conv_pool(width, width)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, width) of images (B, in_channels, H, W)."""
        return self.pool(self.stage2(self.stage1(x)))  # type: ignore[no-any-return]


_NETS: dict[str, Callable[..., nn.Module]] = {
    **{f"resnet{6 * n + 2}": lambda n=n, **options: SmallResNet(n, **options) for n in (1, 2, 3, 4, 5)},
    "resnet18": ImageResNet,
    "convnet2": ConvNet2,
}


def names() -> list[str]:
    """Names that :func:`build` knows.

    Example:
        >>> names()
        ['resnet8', 'resnet14', 'resnet20', 'resnet26', 'resnet32', 'resnet18', 'convnet2']
    """
    return list(_NETS)


def build(name: str, in_channels: int = 3, **options: int) -> nn.Module:
    """A new network by name.

    Args:
        name: one of :func:`names`.
        in_channels: of the image.
        **options: of the network's class, such as ``stem_stride=2`` for the small residual networks.

    Raises:
        BadInput: unknown name; near ones are offered.

    Example:
        >>> import torch
        >>> build("resnet8", in_channels=1)(torch.zeros(1, 1, 28, 28)).shape
        torch.Size([1, 64])
    """
    if name not in _NETS:
        refuse("backbone", name, nearest(name, _NETS))
    return _NETS[name](in_channels=in_channels, **options)


class _PlainShortcutBlock(nn.Module):
    """Two convolutions; the shortcut takes every second pixel and pads new channels with zeros."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(c_out)
        self.stride, self.new_channels = stride, c_out - c_in

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        if self.stride > 1 or self.new_channels:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))
        return F.relu(x + y)


class _ConvShortcutBlock(nn.Module):
    """Two convolutions; the shortcut is a 1 x 1 convolution where the shape changes."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(c_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or c_in != c_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(self.shortcut(x) + y)


def _conv_norm_relu(c_in: int, c_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False),
            norm=nn.BatchNorm2d(c_out),
            relu=nn.ReLU(inplace=True),
        )
    )


def _conv_pool(c_in: int, c_out: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(c_in, c_out, 3, 1, 1),
            norm=nn.BatchNorm2d(c_out),
            relu=nn.ReLU(inplace=True),
            pool=nn.MaxPool2d(2),
        )
    )


def _stage(block: type[nn.Module], c_in: int, c_out: int, count: int, stride: int) -> nn.Sequential:
    return nn.Sequential(block(c_in, c_out, stride), *(block(c_out, c_out, 1) for _ in range(count - 1)))


def _initialise(net: nn.Module) -> None:
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
