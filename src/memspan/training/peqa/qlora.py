"""LoRA over a frozen base of b-bit integers: the rival that PEQA is compared with.

"QLoRA-like": Dettmers et al. 2023 use a 4-bit normal-float grid with quantized scales; the base here is our
own integer grid, so that rivals differ in what is trained and in nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from memspan.base import refuse
from memspan.training.baselines import lora_, unlora_
from memspan.training.peqa.convert import SKIP, _convert_, dequantize_, layers, predict_bytes
from memspan.training.peqa.layers import QuantLinear

__all__ = ["predict_qlora_bytes", "qlora_", "unqlora_"]


def qlora_(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 16.0,
    names: Sequence[str] | None = None,
    *,
    bits: int = 4,
    group_size: int | None = None,
    skip: Sequence[str] = SKIP,
    head: str | None = "",
    seed: int = 0,
    **quantization: Any,
) -> nn.Module:
    """Quantize a model, freeze all of it, and add LoRA to its quantized layers.

    Args:
        model: changed in place.
        rank: see :func:`~memspan.training.lora_`, as are ``alpha`` and ``seed``.
        alpha: likewise.
        names: quantized layers that get LoRA; None: all.
        bits: see :func:`~memspan.training.peqa.quantize_`, as are the next two.
        group_size: likewise.
        skip: likewise.
        head: dotted name of a layer that is trained whole; ``""``: none.
        seed: of the draws.
        quantization: further options of ``quantize_`` (``init``, ``calibration``, ...).

    Returns:
        The model.

    Raises:
        BadInput: as ``quantize_`` and ``lora_``; nothing is changed then.

    Example:
        >>> model = qlora_(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), rank=2)
        >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        ['0.lora_a', '0.lora_b', '2.lora_a', '2.lora_b']
        >>> sorted(unqlora_(model).state_dict())
        ['0.bias', '0.weight', '2.bias', '2.weight']
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        refuse("rank", rank, "give a whole number, 1 or more")
    made = _convert_(model, bits, group_size, skip=skip, **quantization)
    for layer in made:
        layer.scales.requires_grad_(False)
    try:
        chosen = [name for name, layer in layers(model).items() if isinstance(layer, QuantLinear)]
        return lora_(model, rank, alpha, chosen if names is None else names, head=head, seed=seed)
    except Exception:
        dequantize_(model)
        raise


def unqlora_(model: nn.Module, *, merge: bool = False) -> nn.Module:
    """Undo :func:`qlora_`: plain layers with Ŵ as their weight.

    Args:
        model: a model with LoRA over a quantized base.
        merge: add what was learned to Ŵ. The sum is not on the grid: quantizing it again loses part of it.

    Raises:
        BadInput: the model is not such a one.
    """
    if not layers(model):
        refuse("model", type(model).__name__, "qlora_ was not applied to it")
    learned: dict[str, Tensor] = {}
    for name, layer in layers(model).items():
        a, b = getattr(layer, "lora_a", None), getattr(layer, "lora_b", None)
        if merge and isinstance(a, Tensor) and isinstance(b, Tensor):
            learned[name] = getattr(type(layer), "_lora_scale") * (b @ a).detach()  # noqa: B009
    dequantize_(unlora_(model))
    with torch.no_grad():
        for name, change in learned.items():
            weight = model.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            weight += change if weight.shape == change.shape else change.t()
    return model


def predict_qlora_bytes(
    model: nn.Module, rank: int = 8, bits: int = 4, group_size: int | None = None, **options: Any
) -> dict[str, int]:
    """Model states of a step of :func:`qlora_` with Adam, from shapes alone; LoRA on all quantized layers.

    Example:
        >>> predict_qlora_bytes(nn.Sequential(nn.Linear(64, 32)), rank=2)["parameters.trained"]
        768
    """
    from memspan.training.peqa.convert import _selected, _shape_of

    skip, kinds = options.get("skip", SKIP), options.get("kinds", ("linear",))
    held = predict_bytes(model, bits, group_size, skip, kinds=kinds, train_scales=False)
    shapes = [_shape_of(part) for _, part in _selected(model, bits, group_size, skip, kinds, (), quiet=True)]
    trained = 4 * sum(rank * (n + m) for n, m in shapes)
    return held | {
        "parameters.trained": trained,
        "gradients": trained,
        "optimizer_state": 2 * trained + 8 * len(shapes),
    }
