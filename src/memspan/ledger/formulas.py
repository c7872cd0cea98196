"""Closed forms for models that are never built: a first guess before a trace, and an oracle for it.

Formulas of the method systems live beside their methods; these belong to no method. All give bytes.
"""

from __future__ import annotations

from memspan.base import refuse

__all__ = ["bert_block_bytes", "gpt_block_bytes", "kv_cache_bytes", "rules_of_thumb", "state_bytes"]


def kv_cache_bytes(
    layers: int, kv_heads: int, head_dim: int, tokens: int, batch: int = 1, dtype_bytes: int = 2
) -> int:
    """Bytes of a transformer's key-value cache: two vectors per token, layer and key-value head.

    Args:
        layers: number of attention layers.
        kv_heads: key-value heads (fewer than query heads with grouped queries).
        head_dim: width of a head.
        tokens: tokens held per sequence.
        batch: sequences.
        dtype_bytes: 2 for bfloat16 or float16, 4 for float32, 1 for 8-bit.

    Raises:
        BadInput: a number below 1.

    Example:
        >>> kv_cache_bytes(layers=32, kv_heads=8, head_dim=128, tokens=8192) / 2**30
        1.0
    """
    _positive(
        layers=layers,
        kv_heads=kv_heads,
        head_dim=head_dim,
        tokens=tokens,
        batch=batch,
        dtype_bytes=dtype_bytes,
    )
    return 2 * layers * kv_heads * head_dim * tokens * batch * dtype_bytes


def bert_block_bytes(batch: int, tokens: int, width: int, heads: int) -> int:
    """Saved activations of one post-norm encoder block in float32 with eager attention and dropout on CUDA.

    ``66 N + 9 B A T²`` with N = B·T·H: the sum of what each layer saves, dropout masks at one byte. Row
    statistics of the norms (a few bytes per row) are left out.

    Args:
        batch: B, sequences.
        tokens: T, tokens per sequence.
        width: H, features.
        heads: A, attention heads.

    Raises:
        BadInput: a number below 1.

    Example:
        >>> bert_block_bytes(batch=4, tokens=32, width=64, heads=4)
        688128
    """
    _positive(batch=batch, tokens=tokens, width=width, heads=heads)
    return 66 * batch * tokens * width + 9 * batch * heads * tokens**2


def gpt_block_bytes(batch: int, tokens: int, width: int, heads: int) -> int:
    """Saved activations of one 16-bit GPT block with eager attention: ``34 s b h + 5 a s² b``.

    The count of Korthikanti et al. 2023, "Reducing Activation Recomputation in Large Transformer Models",
    section 4.1.

    Args:
        batch: b, sequences.
        tokens: s, tokens per sequence.
        width: h, features.
        heads: a, attention heads.

    Raises:
        BadInput: a number below 1.

    Example:
        >>> gpt_block_bytes(batch=1, tokens=2048, width=12288, heads=96) / 2**30
        2.671875
    """
    _positive(batch=batch, tokens=tokens, width=width, heads=heads)
    return 34 * tokens * batch * width + 5 * heads * tokens**2 * batch


def state_bytes(parameters: int, *, mixed: bool = False) -> dict[str, int]:
    """Model states under Adam: weights, gradients and two moments.

    Args:
        parameters: number of parameters, all trained.
        mixed: 16-bit weights and gradients with a float32 master copy (16 bytes per parameter, as with
            float32 throughout).

    Raises:
        BadInput: a number below 1.

    Example:
        >>> state_bytes(10)
        {'parameters.trained': 40, 'gradients': 40, 'optimizer_state': 80}
        >>> sum(state_bytes(10, mixed=True).values())
        160
    """
    _positive(parameters=parameters)
    weight = 2 if mixed else 4
    return {
        "parameters.trained": weight * parameters,
        "gradients": weight * parameters,
        "optimizer_state": (12 if mixed else 8) * parameters,
    }


def rules_of_thumb(parameters: int, world: int = 1) -> dict[str, int]:
    """Three public estimates of the memory of training with Adam, for comparison: none sees activations.

    Args:
        parameters: Ψ, number of parameters.
        world: N, ranks that share optimizer state in the second rule.

    Returns:
        ``"4 x weights"`` (popular calculators; float32 weights), ``"2Ψ + 18Ψ/N"`` (sharded mixed precision)
        and ``"16 B/parameter"``.

    Raises:
        BadInput: a number below 1.

    Example:
        >>> rules_of_thumb(1000)
        {'4 x weights': 16000, '2Ψ + 18Ψ/N': 20000, '16 B/parameter': 16000}
    """
    _positive(parameters=parameters, world=world)
    return {
        "4 x weights": 4 * 4 * parameters,
        "2Ψ + 18Ψ/N": 2 * parameters + -(-18 * parameters // world),
        "16 B/parameter": 16 * parameters,
    }


def _positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            refuse(name, number, "give a whole number, 1 or more")
