"""Features of a frozen network, computed once and kept.

The key is what the features depend on: the weights, the data, and how inputs are prepared. The file is
written atomically and carries the checksum of its content, so that processes may race and a damaged file is
noticed, reported and computed anew.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from memspan.base import BadInput, refuse
from memspan.base.files import CorruptFile, fingerprint, load_state, save_state
from memspan.data.cache import cache_folder
from memspan.data.sets import content_sha256

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from memspan.data.backbones import Backbone

__all__ = ["cache_features", "cached_features", "feature_file"]

Batch = TypeVar("Batch")


def feature_file(key: Mapping[str, Any]) -> Path:
    """Where the features with this key are kept."""
    return cache_folder() / "features" / f"{fingerprint(dict(key))[:32]}.safetensors"


def cache_features(
    fn: Callable[[Batch], Tensor],
    loader: Iterable[Batch],
    key: Mapping[str, Any],
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``torch.cat([fn(batch) for batch in loader])``, computed once for a key.

    Args:
        fn: batch -> tensor ``(n, ...)``; gradients are not kept.
        loader: the batches, always in the same order; not touched when the features are kept already.
        key: JSON values that tell all that the features depend on, checksums of weights and data included.
        dtype: what they are kept as and returned in, e.g. ``torch.float16``; None leaves them as they are.

    Returns:
        The features on the CPU.

    Raises:
        BadInput: the key is not JSON, or there is no batch.

    Warns:
        UserWarning: the kept file is damaged and computed anew, or the new one could not be written.

    Example:
        >>> import os, tempfile, torch
        >>> os.environ["MEMSPAN_CACHE"] = tempfile.mkdtemp()
        >>> first = cache_features(lambda x: x * 2, [torch.ones(2, 3)], {"fn": "double"})
        >>> again = cache_features(lambda x: x * 0, [], {"fn": "double"})
        >>> torch.equal(first, again)
        True
        >>> del os.environ["MEMSPAN_CACHE"]
    """
    import torch

    full = {"key": dict(key), "dtype": str(dtype)}
    path = feature_file(full)
    try:
        tensors, header = load_state(path, expect=full)
        features = tensors["features"]
        if header.get("sha256") != _sha256(features):
            raise CorruptFile(f"{path} was altered: its content does not have its checksum")
        return features
    except FileNotFoundError:
        pass
    except (CorruptFile, BadInput, KeyError) as error:
        warnings.warn(f"features are computed anew: {error}", stacklevel=2)
    with torch.no_grad():
        parts = [fn(batch).detach().cpu() for batch in loader]
    if not parts:
        refuse("loader", "no batch", "give at least one batch")
    features = torch.cat(parts)
    if dtype is not None:
        features = features.to(dtype)
    try:
        save_state(path, {"features": features}, {**full, "sha256": _sha256(features)})
    except OSError as error:
        warnings.warn(f"features are not kept: {error}", stacklevel=2)
    return features


def cached_features(
    backbone: Backbone,
    x: NDArray[Any] | Sequence[str],
    *,
    batch_size: int = 64,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Features of images or texts under a backbone, computed once.

    Args:
        backbone: from :func:`memspan.data.backbone`, its weights as published.
        x: images uint8 ``(N, H, W)`` or ``(N, H, W, 3)``, or texts.
        batch_size: items at a time.
        dtype: see :func:`cache_features`.

    Returns:
        ``(N, feature_dim)`` on the CPU.

    Raises:
        BadInput: nothing to compute features of.
    """
    if batch_size < 1:
        refuse("batch_size", batch_size, "at least 1")
    if not len(x):
        refuse("x", "empty", "give at least one image or text")
    content = x if isinstance(x, np.ndarray) else list(x)
    key = {
        "backbone": backbone.name,
        "weights": _weights(backbone),
        "recipe": backbone.recipe,
        "data": content_sha256({"x": content}),
    }
    batches = (x[i : i + batch_size] for i in range(0, len(x), batch_size))
    return cache_features(backbone.features, batches, key, dtype)


def _weights(backbone: Backbone) -> str:
    """Checksum of the weights as they are now: a trained backbone is another one."""
    return content_sha256({name: _array(tensor) for name, tensor in backbone.module.state_dict().items()})


def _array(tensor: Tensor) -> NDArray[Any]:
    import torch

    tensor = tensor.detach().cpu().contiguous()
    return tensor.view(torch.uint8).numpy() if tensor.dtype is torch.bfloat16 else tensor.numpy()


def _sha256(tensor: Tensor) -> str:
    return content_sha256({"dtype": str(tensor.dtype), "features": _array(tensor)})
