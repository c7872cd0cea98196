"""A quantized model on disk, and back, without its floats in memory.

``from_pretrained`` knows nothing of packed layers and would draw them anew. Here the description of the
layers lies beside their tensors (safetensors, no pickle), and the model is put together from it over a
skeleton: the same network unquantized, whose own weights are not read and may be meta.
"""

from __future__ import annotations

import copy
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memspan.base import refuse
from memspan.base.files import load_state, save_state
from memspan.training.peqa.convert import (
    _RECORD,
    BASE,
    _kind,
    _refuse_merges_,
    _remember,
    _shape_of,
    layers,
)
from memspan.training.peqa.layers import QuantConv2d, QuantEmbedding, Quantized, QuantLinear

__all__ = ["load", "save"]

_FILE = "peqa.safetensors"
_KIND = "peqa.model"
_KINDS: dict[str, type[Quantized]] = {
    "linear": QuantLinear,
    "conv2d": QuantConv2d,
    "embedding": QuantEmbedding,
}


def save(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write a quantized model into a folder: every tensor once, and what its layers are.

    Args:
        model: from :func:`~memspan.training.peqa.quantize_`, tuned or not.
        folder: made where it is missing; holds ``peqa.safetensors`` afterwards, written whole or not at all.

    Raises:
        BadInput: nothing in the model is quantized.
        OSError: the file cannot be written; an earlier one stays whole.
    """
    if not layers(model):
        refuse("model", type(model).__name__, "nothing in it is quantized; call quantize_ first")
    first: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    for name, tensor in _tensors(model).items():
        known = first.setdefault(id(tensor), name)
        if known == name:
            tensors[name] = tensor
        else:
            ties[name] = known
    base: dict[str, Tensor] = vars(model).get(BASE, {})
    header = {
        "kind": _KIND,
        "layers": {
            name: {
                "is": next(key for key, kind in _KINDS.items() if type(layer) is kind),
                "shape": [layer.out_features, layer.in_features],
                "bits": layer.bits,
                "groups": layer.groups,
                "error": None if math.isnan(layer.error) else layer.error,
                "dtype": str(vars(layer).get("plain", {"dtype": torch.float32})["dtype"]).removeprefix(
                    "torch."
                ),
            }
            for name, layer in _everywhere(model).items()
        },
        "ties": ties,
        "trained": [name for name, parameter in model.named_parameters() if parameter.requires_grad],
        "trained_before": vars(model).get(_RECORD),
    }
    save_state(Path(folder) / _FILE, tensors | {f"{BASE}/{name}": one for name, one in base.items()}, header)


def load(folder: str | os.PathLike[str], base: nn.Module) -> nn.Module:
    """Read what :func:`save` wrote, over the network that was quantized.

    Args:
        folder: given to :func:`save`.
        base: the same network, not quantized. It is not changed, and its values are not read: build it under
            ``torch.device("meta")`` and no float of a quantized layer is ever in memory.

    Returns:
        The quantized model on the CPU, in ``base``'s mode; the same numbers train as when it was saved.

    Raises:
        FileNotFoundError: there is no such file.
        CorruptFile: it is truncated or altered.
        BadInput: the file of something else; layers or tensors that ``base`` lacks, has beside them, or has
            in another shape.

    Example:
        >>> import tempfile
        >>> from memspan.training import peqa
        >>> folder, build = tempfile.mkdtemp(), lambda: nn.Sequential(nn.Linear(8, 4), nn.ReLU())
        >>> model = peqa.quantize_(build(), bits=4)
        >>> peqa.save(model, folder)
        >>> with torch.device("meta"):
        ...     skeleton = build()
        >>> x = torch.ones(2, 8)
        >>> bool(torch.equal(peqa.load(folder, skeleton)(x), model(x)))
        True
    """
    tensors, header = load_state(Path(folder) / _FILE, expect={"kind": _KIND})
    if layers(base):
        refuse("base", type(base).__name__, "it is quantized; give the network as it was before quantize_")
    model = _skeleton(base)
    for name, told in header["layers"].items():
        _put(model, name, told, perm=header["ties"].get(f"{name}.perm", f"{name}.perm") in tensors)
    for name, tensor in tensors.items():
        if name.startswith(f"{BASE}/"):
            vars(model).setdefault(BASE, {})[name.removeprefix(f"{BASE}/")] = tensor
    given = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{BASE}/")}
    wanted = _tensors(model)
    told_of = set(given) | set(header["ties"])
    for lacking, names in (("it lacks", told_of - set(wanted)), ("the file lacks", set(wanted) - told_of)):
        if names:
            refuse("base", sorted(names)[:5], f"{lacking} these tensors: give the same network")
    for name, tensor in given.items():
        if wanted[name].shape != tensor.shape:
            seen = f"{tuple(wanted[name].shape)}, the file {tuple(tensor.shape)}"
            refuse("base", name, f"it has {seen}: give the same network")
    trained = set(header["trained"])
    ready: dict[str, Tensor] = {
        name: nn.Parameter(tensor, requires_grad=name in trained)
        if isinstance(wanted[name], nn.Parameter)
        else tensor
        for name, tensor in given.items()
    }
    for name in wanted:
        owner, _, key = name.rpartition(".")
        part = model.get_submodule(owner)
        held = part._parameters if key in part._parameters else part._buffers
        held[key] = ready[header["ties"].get(name, name)]  # type: ignore[assignment]
    if header["trained_before"] is not None:
        vars(model)[_RECORD] = header["trained_before"]
    _refuse_merges_(model)
    return model


def _everywhere(model: nn.Module) -> dict[str, Quantized]:
    """Quantized layers under every name that they have."""
    named = model.named_modules(remove_duplicate=False)
    return {name: part for name, part in named if isinstance(part, Quantized)}


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under all their names, those too that a state_dict leaves out (rotary)."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _skeleton(base: nn.Module) -> nn.Module:
    """A copy without values."""
    memo: dict[int, Any] = {
        id(one): nn.Parameter(torch.empty_like(one, device="meta"), requires_grad=False)
        for one in base.parameters()
    }
    memo |= {id(one): torch.empty_like(one, device="meta") for one in base.buffers()}
    return copy.deepcopy(base, memo)


def _put(model: nn.Module, name: str, told: dict[str, Any], perm: bool) -> None:
    """An empty quantized layer in the place of the plain one."""
    try:
        part = model.get_submodule(name)
    except AttributeError:
        refuse("base", name, "it has no such layer: give the network that was quantized")
    if isinstance(part, Quantized):  # one module under several names: the first has replaced it
        return
    n, m = told["shape"]
    if _kind(part) != told["is"] or _shape_of(part) != (n, m):
        seen = f"{type(part).__name__}{tuple(_shape_of(part)) if _kind(part) else ''}"
        refuse("base", f"{name}: {seen}", f"a layer of kind {told['is']!r} and shape {(n, m)} was quantized")
    bias = getattr(part, "bias", None)
    dtype = getattr(torch, told["dtype"])
    layer = _KINDS[told["is"]](
        m, n, told["bits"], m // told["groups"], bias is not None, device="meta", dtype=dtype
    )
    layer.bias = bias
    layer.error = math.nan if told["error"] is None else told["error"]
    if perm:
        layer.perm = torch.empty(m, dtype=torch.int64, device="meta")
    _remember(layer, part)
    vars(layer)["plain"]["dtype"] = dtype  # the skeleton's may be another
    layer.train(part.training)
    for parent in list(model.modules()):
        for place, child in list(parent._modules.items()):
            if child is part:
                parent._modules[place] = layer
