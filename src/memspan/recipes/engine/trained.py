"""Train once, keep the weights: small models that several recipes or runs start from."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from memspan.base.files import CorruptFile, fingerprint, load_state, save_state
from memspan.recipes.engine.code import sources_called
from memspan.recipes.engine.task import seed_everything

__all__ = ["trained_once"]

M = TypeVar("M", bound=nn.Module)


def trained_once(
    name: str, build: Callable[[], M], train: Callable[[M, Any], object], data: Any, **config: Any
) -> M:
    """The model that ``build`` and ``train`` make, from the cache where it was trained before.

    The file lies in ``MEMSPAN_CACHE`` (else the user's cache folder) under ``trained``; its name changes with
    the source of both functions and of what they call, the data's checksum, the configuration and torch's
    version. Training is seeded by the name, and the caller's random generators are left as they were.

    Args:
        name: what it is, such as ``"tiny-lm"``.
        build: makes the untrained module.
        train: ``train(module, data)`` trains it in place.
        data: what it is trained on: anything with ``sha256``, an array, bytes or a JSON value.
        config: whatever else the training depends on (JSON values).

    Returns:
        The trained module, in eval mode, on the CPU.

    Raises:
        CorruptFile: the kept file is truncated or altered; the message names it.

    Example:
        >>> import os, tempfile
        >>> os.environ["MEMSPAN_CACHE"] = tempfile.mkdtemp()
        >>> def train(module, data):
        ...     nn.init.constant_(module.weight, data["value"])
        >>> first = trained_once("toy", lambda: nn.Linear(1, 1), train, {"value": 3})
        >>> trained_once("toy", lambda: nn.Linear(1, 1), train, {"value": 3}).weight.tolist()
        [[3.0]]
        >>> del os.environ["MEMSPAN_CACHE"]
    """
    from memspan.data.cache import cache_folder

    key = fingerprint(
        {
            "name": name,
            "code": sources_called(build, train),
            "data": getattr(data, "sha256", None) or fingerprint(data),
            "config": config,
            "torch": torch.__version__,
        }
    )
    path = cache_folder() / "trained" / f"{name}-{key[:16]}.safetensors"
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        seed_everything("trained_once", name)
        module = build()
        if path.exists():
            tensors, _ = load_state(path, expect={"key": key})
            try:
                module.load_state_dict(tensors)
            except RuntimeError as error:
                raise CorruptFile(
                    f"{path} does not fit its model ({error}); remove it to train anew"
                ) from error
        else:
            train(module, data)
            module.cpu()
            save_state(path, module.state_dict(), {"key": key, "name": name})
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])
    return module.eval()
