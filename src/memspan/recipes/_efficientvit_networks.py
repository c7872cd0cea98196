"""The networks that the recipe ``efficientvit`` times; those of timm only where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor, nn

from memspan.base import optional
from memspan.models import efficientvit_m0, efficientvit_m2, efficientvit_m5
from memspan.models.efficientvit import fuse_

__all__ = ["DEIT", "M2", "M5", "M5_PLAIN", "MOBILENET_V3", "MOBILENET_V4", "MOBILEVIT", "TIMM", "TIMM_FUSED"]

M0, M2, M5, M5_PLAIN = "EfficientViT-M0", "EfficientViT-M2", "EfficientViT-M5", "EfficientViT-M5, not fused"
TIMM, TIMM_FUSED, DEIT = "timm's M5", "timm's M5, fused", "plain ViT (DeiT-Ti)"
MOBILENET_V3, MOBILENET_V4 = "MobileNetV3-Large (timm)", "MobileNetV4-conv-S (timm)"
MOBILEVIT, REPVIT = "MobileViT-XXS (timm)", "RepViT-M0.9 (timm)"
RIVALS = {
    MOBILENET_V3: "mobilenetv3_large_100",
    MOBILENET_V4: "mobilenetv4_conv_small",
    MOBILEVIT: "mobilevit_xxs",
    REPVIT: "repvit_m0_9",
}

Factory = Callable[..., nn.Module]


def timm_models() -> tuple[Factory | None, str]:
    """Give the ``create_model`` of timm, or None and the reason why it cannot be had."""
    try:
        return optional("timm", extra="peers").create_model, ""
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
        return None, f"Networks of other libraries are absent: timm cannot be imported ({error})."


def contestants(timm: Factory | None) -> dict[str, nn.Module]:
    """All networks of the speed part, with 1000 classes and random weights, in evaluation mode."""
    found: dict[str, nn.Module] = {
        M5: fuse_(efficientvit_m5().eval()),
        M5_PLAIN: efficientvit_m5().eval(),
        DEIT: deit_tiny().eval(),
        M2: fuse_(efficientvit_m2().eval()),
        M0: fuse_(efficientvit_m0().eval()),
    }
    if timm is not None:
        found |= {
            TIMM: timm("efficientvit_m5").eval(),
            TIMM_FUSED: fuse_parts(timm("efficientvit_m5").eval()),
        }
        found |= {label: fuse_parts(timm(name).eval()) for label, name in RIVALS.items()}
    return found


def deit_tiny() -> nn.Module:
    """A plain vision transformer of DeiT-Ti's size: 12 blocks of width 192 with 3 heads on 196 patches."""
    layer = nn.TransformerEncoderLayer(192, 3, 768, 0.0, "gelu", batch_first=True, norm_first=True)
    blocks = nn.TransformerEncoder(layer, 12, nn.LayerNorm(192), enable_nested_tensor=False)
    return nn.Sequential(nn.Conv2d(3, 192, 16, 16), _Tokens(), blocks, _Mean(), nn.Linear(192, 1000))


def fuse_parts(module: nn.Module) -> nn.Module:
    """Let every part that offers ``fuse`` or ``fold_bn`` fuse itself, in place, as timm's own tool does."""
    for name, child in module.named_children():
        fuse = getattr(child, "fuse", None)
        setattr(module, name, fuse() if callable(fuse) else fuse_parts(child))
    return fold_norms(module)


def fold_norms(module: nn.Module) -> nn.Module:
    """Fold each batch normalisation into the convolution before it; keep an activation inside it."""
    names = list(dict(module.named_children()))
    for first, second in pairwise(names):
        conv, norm = getattr(module, first), getattr(module, second)
        if not (isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)):
            continue
        setattr(module, first, nn.utils.fuse_conv_bn_eval(conv, norm))
        rest = [
            part for part in (getattr(norm, "drop", None), getattr(norm, "act", None)) if part is not None
        ]
        setattr(module, second, nn.Sequential(*rest))
    return module


class _Tokens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)


class _Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)
