"""Closed forms: what a SlimFit step keeps, before it is run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from memspan.base import refuse

__all__ = ["predict_bytes"]


def predict_bytes(
    model: nn.Module | Mapping[str, int] | Any,
    batch: int,
    length: int,
    freeze_rate: float = 0.9,
    *,
    units: int | None = None,
) -> dict[str, int]:
    """Saved activations of a post-norm encoder's blocks, in the worst case over all schedules.

    Per block, with N = batch · length · H elements and A heads (float32, eager kernel, one-byte masks):
    ``9.6 N + batch · A · length² + 8 · batch · length`` when all is frozen, and at most 4 N for each of the k
    active units. Which k units they are does not matter: that is what 8 bits for the wide layer buy.

    Args:
        model: a model with a ``config`` (transformers), such a configuration, or a mapping with
            ``hidden_size``, ``num_hidden_layers`` and ``num_attention_heads``.
        batch: sequences.
        length: tokens of a sequence.
        freeze_rate: F.
        units: n; None counts 8 a block.

    Returns:
        ``{"saved_activations.static": ..., "saved_activations.dynamic": ...}``.

    Raises:
        BadInput: sizes that cannot be read, or below 1; a rate outside [0, 1).

    Example:
        >>> bert = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
        >>> round(predict_bytes(bert, 32, 128)["saved_activations.static"] / 12 / 1e6, 1)   # MB a block
        36.5
    """
    config = getattr(model, "config", model)
    read = config.get if isinstance(config, Mapping) else lambda name: getattr(config, name, None)
    sizes = {n: read(n) for n in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    for name, value in {**sizes, "batch": batch, "length": length}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            refuse(name, value, "give a whole number, 1 or more")
    if not 0 <= freeze_rate < 1:
        refuse("freeze_rate", freeze_rate, "give a share of at least 0 and below 1")
    width, layers, heads = (int(value or 0) for value in sizes.values())
    count = 8 * layers if units is None else units
    active = count - int(freeze_rate * count)
    n = batch * length * width
    static = 8 * n + 2 * 8 * (n // 10) + batch * heads * length**2 + 8 * batch * length
    return {"saved_activations.static": layers * static, "saved_activations.dynamic": 4 * n * active}
