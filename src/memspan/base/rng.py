"""Random draws by key: the same answer in any order, process or machine.

A draw that belongs to something (a seed, a method, an item) is keyed by it, instead of depending on
how many draws came before. The keys are hashed into the counter-based generator Philox.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np

__all__ = ["Key", "rng", "seed_of", "uniform"]

Key = str | int | float | bool | None


def seed_of(*keys: Key) -> int:
    """A 63-bit seed that depends on the keys alone, for ``torch.manual_seed`` and the like.

    Example:
        >>> seed_of("memo", 0) == seed_of("memo", 0) != seed_of("memo", 1)
        True
    """
    return int.from_bytes(_digest(keys)[:8], "little") >> 1


def rng(*keys: Key) -> np.random.Generator:
    """A numpy generator that depends on the keys alone.

    Args:
        keys: strings, numbers or None; ``1`` and ``"1"`` are different keys.

    Example:
        >>> bool(rng("a", 1).random() == rng("a", 1).random())
        True
    """
    return np.random.Generator(np.random.Philox(key=int.from_bytes(_digest(keys)[:16], "little")))


def uniform(*keys: Key) -> float:
    """One draw from [0, 1) that depends on the keys alone.

    Example:
        >>> 0 <= uniform("user", 7) < 1
        True
    """
    return (int.from_bytes(_digest(keys)[:8], "little") >> 11) / 2.0**53


def _digest(keys: tuple[Key, ...]) -> bytes:
    return hashlib.sha256(json.dumps(keys).encode()).digest()
