"""Checkpoints of the official repository and of timm, loaded by name.

timm's names are memspan's names. The official names are translated one by one, so that a checkpoint that
does not belong to the model is refused with the keys that do not fit, instead of being loaded in part.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from math import isqrt
from pathlib import Path

import torch
from torch import Tensor

from memspan.base import refuse
from memspan.models.efficientvit.network import EfficientViT, resize_bias_table

__all__ = ["load_file_", "load_official_", "load_timm_", "official_name"]


def official_name(name: str) -> str | None:
    """The name here of a tensor in an official checkpoint; None for what need not be loaded.

    Args:
        name: e.g. ``"blocks2.3.mixer.m.attn.qkvs.0.c.weight"``.

    Example:
        >>> official_name("blocks2.3.mixer.m.attn.qkvs.0.c.weight")
        'stages.1.blocks.0.mixer.m.attn.qkvs.0.conv.weight'
        >>> official_name("patch_embed.6.bn.bias")
        'patch_embed.conv4.bn.bias'
    """
    if name.endswith("attention_bias_idxs"):
        return None
    name = name.replace(".c.", ".conv.").replace(".l.", ".linear.")
    if stem := re.fullmatch(r"patch_embed\.([0246])\.(.+)", name):
        return f"patch_embed.conv{int(stem[1]) // 2 + 1}.{stem[2]}"
    if block := re.fullmatch(r"blocks([123])\.(\d+)\.(.+)", name):
        stage, place, rest = int(block[1]) - 1, int(block[2]), block[3]
        if stage == 0:
            return f"stages.0.blocks.{place}.{rest}"
        if place < 3:
            return f"stages.{stage}.downsample.{('res1', 'patchmerge', 'res2')[place]}.{rest}"
        return f"stages.{stage}.blocks.{place - 3}.{rest}"
    return name


def load_official_(model: EfficientViT, state_dict: Mapping[str, Tensor]) -> EfficientViT:
    """Load a checkpoint of the official repository (microsoft/Cream, EfficientViT), in place.

    Bias tables are interpolated where the window's side differs; 1x1 convolutions that old files keep as
    matrices get their two axes.

    Args:
        model: the model; unfused, with as many classes as the checkpoint.
        state_dict: the tensors by name, or the official file's mapping that holds them under ``"model"``.

    Returns:
        The same model.

    Raises:
        BadInput: keys that the model does not know, misses, or that have another shape; they are listed,
            and nothing is loaded.
    """
    renamed = {official_name(name): tensor for name, tensor in _tensors(state_dict).items()}
    return _load(model, {name: tensor for name, tensor in renamed.items() if name is not None})


def load_timm_(model: EfficientViT, state_dict: Mapping[str, Tensor]) -> EfficientViT:
    """Load a state dict with timm's names (timm's ``efficientvit_m0`` to ``m5``, or memspan's), in place.

    Args:
        model: the model; unfused, with as many classes as the checkpoint.
        state_dict: the tensors by name.

    Returns:
        The same model.

    Raises:
        BadInput: as :func:`load_official_`.

    Example:
        >>> from memspan.models.efficientvit import efficientvit_m0
        >>> a, b = efficientvit_m0(num_classes=2), efficientvit_m0(num_classes=2, img_size=160)
        >>> b = load_timm_(b, a.state_dict())
        >>> b.stages[1].blocks[0].mixer.m.attn.attention_biases.shape  # a 5x5 map at 160
        torch.Size([4, 25])
    """
    tensors = _tensors(state_dict)
    return _load(model, {n: t for n, t in tensors.items() if not n.endswith("attention_bias_idxs")})


def load_file_(model: EfficientViT, path: str | os.PathLike[str]) -> EfficientViT:
    """Load a checkpoint file of either layout; a head of another number of classes is left out.

    Args:
        model: the model.
        path: ``.safetensors``, or a torch file read with ``weights_only=True``.

    Raises:
        FileNotFoundError: no such file.
        BadInput: as :func:`load_official_`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        state: Mapping[str, Tensor] = load_file(path)
    else:
        state = _tensors(torch.load(path, map_location="cpu", weights_only=True))
    official = any(name.startswith("blocks1.") for name in state)
    renamed = {(official_name(name) if official else name): tensor for name, tensor in state.items()}
    tensors = {name: tensor for name, tensor in renamed.items() if name is not None}
    own = model.state_dict()
    for head in ("head", "head_dist"):
        weight = tensors.get(f"{head}.linear.weight")
        fits = weight is not None and f"{head}.linear.weight" in own
        if not (fits and weight is not None and weight.shape == own[f"{head}.linear.weight"].shape):
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{head}.")}
            tensors |= {name: tensor for name, tensor in own.items() if name.startswith(f"{head}.")}
    return load_timm_(model, tensors)


def _tensors(state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    inner = state_dict.get("model", state_dict)
    return inner if isinstance(inner, Mapping) else state_dict


def _load(model: EfficientViT, tensors: dict[str, Tensor]) -> EfficientViT:
    own = model.state_dict()
    for kind, names in (("unknown", tensors.keys() - own.keys()), ("missing", own.keys() - tensors.keys())):
        if names:
            refuse(
                "state_dict",
                f"{len(names)} {kind} keys",
                f"{', '.join(sorted(names)[:8])}{', ...' if len(names) > 8 else ''}; is it this variant, "
                "unfused, with this head?",
            )
    fitted = {name: _fit(name, tensor, own[name]) for name, tensor in tensors.items()}
    model.load_state_dict(fitted)
    return model


def _fit(name: str, tensor: Tensor, own: Tensor) -> Tensor:
    if tensor.shape == own.shape:
        return tensor
    if tensor.dim() == 2 and own.shape == (*tensor.shape, 1, 1):
        return tensor[:, :, None, None]
    if name.endswith("attention_biases") and tensor.shape[0] == own.shape[0]:
        old, new = isqrt(tensor.shape[1]), isqrt(own.shape[1])
        if old * old == tensor.shape[1]:
            return resize_bias_table(tensor, (old, old), (new, new))
    hint = "call model.reset_classifier first" if name.startswith("head") else "is it this variant?"
    refuse(name, tuple(tensor.shape), f"the model has {tuple(own.shape)} here; {hint}")
