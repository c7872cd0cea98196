"""Closed forms: what a SlimFit step keeps, before it is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from memspan.base import refuse
from memspan.training.slimfit.modules import _wide_linears
from memspan.training.slimfit.schedule import FreezingScheduler

__all__ = ["predict_bytes"]


def predict_bytes(
    model: nn.Module | Mapping[str, int] | Any,
    batch: int,
    length: int,
    freeze_rate: float = 0.9,
    *,
    units: int | None = None,
    optimizer_state: str = "keep",
    **_other: Any,
) -> dict[str, int]:
    """What a SlimFit step holds at most.

    Saved activations of an encoder's blocks with LayerNorm and GELU: with N = batch · length · H elements, A
    heads and an inner width of 4 H (float32, eager kernel, one-byte masks) a block keeps
    ``9.6 N + batch · A · length² + 8 · batch · length`` bytes when all is frozen, and at most 4 N for each of
    the k active units. Which k units they are does not matter: that is what 8 bits for the wide layer buy.

    Of a model itself model states under Adam are told too, and what its embeddings keep. The k units with the
    most weights train then, so that gradients are the most there can be, and ``dynamic`` is what these keep.
    Where its blocks are of another kind, states alone.

    Args:
        model: a model, or the configuration of an encoder of transformers, or a mapping with
            ``hidden_size``, ``num_hidden_layers`` and ``num_attention_heads``.
        batch: sequences.
        length: tokens of a sequence.
        freeze_rate: F.
        units: n of a configuration; None counts 8 a block.
        optimizer_state: ``"keep"`` counts the moments of all units, ``"drop"`` those of active ones.
        _other: further options of :func:`convert_`, which are not in the closed form.

    Returns:
        ``{"saved_activations.static": ..., "saved_activations.dynamic": ...}``, and of a model also
        ``saved_activations.embeddings``, parameters, buffers, gradients and optimizer state.

    Raises:
        BadInput: sizes that cannot be read, or below 1; a rate outside [0, 1); nothing to schedule.

    Example:
        >>> bert = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
        >>> round(predict_bytes(bert, 32, 128)["saved_activations.static"] / 12 / 1e6, 1)   # MB a block
        36.5
    """
    config = getattr(model, "config", model)
    read = config.get if isinstance(config, Mapping) else lambda name: getattr(config, name, None)
    sizes: dict[str, Any] = {n: read(n) for n in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    known = not isinstance(model, nn.Module) or _encodes(model, sizes["num_hidden_layers"])
    for name, value in {**(sizes if known else {}), "batch": batch, "length": length}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            refuse(name, value, "give a whole number, 1 or more")
    if not 0 <= freeze_rate < 1:
        refuse("freeze_rate", freeze_rate, "give a share of at least 0 and below 1")
    told: dict[str, int] = {}
    if isinstance(model, nn.Module):
        told, largest = _states(model, freeze_rate, optimizer_state)
    if not known:
        return told
    width, layers, heads = (int(value) for value in sizes.values())
    count = 8 * layers if units is None else units
    active = count - int(freeze_rate * count)
    places = batch * length
    n, inner = places * width, places * int(read("intermediate_size") or 4 * width)
    norm = 8 * (n // 10) + 4 * places
    hidden, attention = (read(f"{name}_dropout_prob") != 0 for name in ("hidden", "attention_probs"))
    static = (3 + 2 * hidden + attention) * n + 2 * norm + inner // 2 + batch * heads * length**2
    told["saved_activations.static"] = layers * static
    told["saved_activations.dynamic"] = max(4 * n, inner) * active
    if isinstance(model, nn.Module):
        told["saved_activations.dynamic"] = _dynamic(model, largest, places, n)
        told["saved_activations.embeddings"] = norm + n * hidden
    return told


def _dynamic(model: nn.Module, units: Sequence[str], places: int, n: int) -> int:
    """What these units add while they train; layers beside each other read one input."""
    inputs: dict[tuple[str, int], int] = {}
    wide, norms = _wide_linears(model), 0
    for unit in units:
        name = unit.rpartition(".")[0]
        part = model.get_submodule(name)
        if isinstance(part, nn.LayerNorm):
            norms += 4 * n - 8 * (n // 10) + 4 * places
        elif isinstance(part, nn.Linear):
            size = places * part.in_features * (1 if part in wide else 4)
            inputs[name.rpartition(".")[0], part.in_features] = size
    return norms + sum(inputs.values())


def _encodes(model: nn.Module, layers: Any) -> bool:
    """Whether the closed form is about this model: LayerNorm twice a block, GELU, equally many heads."""
    kinds = [type(part).__name__ for part in model.modules()]
    norms = sum(isinstance(part, nn.LayerNorm) for part in model.modules())
    return isinstance(layers, int) and norms >= 2 * layers and any("GELU" in kind for kind in kinds)


def _states(
    model: nn.Module, freeze_rate: float, optimizer_state: str
) -> tuple[dict[str, int], Sequence[str]]:
    """Model states while the largest units train, and the names of these."""
    units = FreezingScheduler(model, freeze_rate).units
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    always = [p for name, p in named.items() if name not in units]
    active = len(units) - int(freeze_rate * len(units))
    largest = sorted(units, key=lambda unit: -named[unit].nbytes)[:active]
    trains = sum(named[unit].nbytes for unit in largest) + sum(p.nbytes for p in always)
    tensors = len(named) if optimizer_state == "keep" else active + len(always)
    moments = sum(p.nbytes for p in named.values()) if optimizer_state == "keep" else trains
    whole = sum(p.nbytes for p in model.parameters())
    return {
        "parameters.trained": trains,
        "parameters.frozen": whole - trains,
        "buffers": sum(b.nbytes for b in model.buffers()),
        "gradients": trains,
        "optimizer_state": 2 * moments + 4 * tensors,
    }, largest
