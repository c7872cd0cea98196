"""From 4-bit layers to the format of torchao's compiled kernels: the same integers, served faster."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from memspan.base import optional, refuse
from memspan.nn.bits import unpack_bits
from memspan.training.peqa.convert import _replace, layers
from memspan.training.peqa.layers import Quantized, QuantLinear

__all__ = ["export"]

_GROUPS = (256, 128, 64, 32)


@torch.no_grad()
def export(
    model: nn.Module, to: Literal["torchao"] = "torchao", dtype: torch.dtype | None = None
) -> nn.Module:
    """A copy of a tuned model whose 4-bit layers are ``nn.Linear`` over torchao's int4 weights, for the CPU.

    The kernels take groups of 32, 64, 128 or 256 inputs and ``w = (q - 8) s + o`` with ``o = (8 - z) s``: the
    integers stay as they are. One scale a row is repeated over the largest group that divides it.

    Args:
        model: not changed. Layers that are not quantized are copied as they are.
        to: ``"torchao"``.
        dtype: of scales and offsets, which the inputs must have too; None: the scales' own.

    Raises:
        BadInput: nothing is quantized, or layers that these kernels do not serve (other widths, other groups,
            a column order, convolutions and embeddings): all are named.
        ImportError: torchao is not installed, or has no int4 weights for the CPU.
    """
    if to != "torchao":
        refuse("to", to, "use 'torchao'; dequantize_ gives plain layers, and state_dict the packed integers")
    found = layers(model)
    if not found:
        refuse("model", type(model).__name__, "nothing in it is quantized; call quantize_ first")
    unserved = [f"{name} ({why})" for name, layer in found.items() if (why := _unserved(layer))]
    if unserved:
        more = ", ..." if len(unserved) > 10 else ""
        refuse(
            "model", ", ".join(unserved[:10]) + more, "torchao's int4 kernels serve 4-bit linear layers alone"
        )
    kind = optional("torchao.prototype.quantization.int4", extra="peers").Int4OpaqueTensor
    made = copy.deepcopy(model)
    _replace(made, QuantLinear, lambda layer: _served(layer, kind, dtype))
    return made.eval()


def _unserved(layer: Quantized) -> str:
    if type(layer) is not QuantLinear:
        return type(layer).__name__
    if layer.bits != 4:
        return f"{layer.bits} bits"
    if layer.perm is not None:
        return "act_order"
    if layer.out_features % 16:
        return f"{layer.out_features} outputs, not a multiple of 16"
    if _group(layer) is None:
        seen = layer.group_size if layer.groups > 1 else layer.in_features
        return f"groups of {seen}: 32, 64, 128, 256, or one scale for a multiple of 32 inputs"
    if layer.qweight.device.type != "cpu":
        return f"on {layer.qweight.device.type}"
    return ""


def _group(layer: Quantized) -> int | None:
    if layer.groups > 1:
        return layer.group_size if layer.group_size in _GROUPS else None
    return next((size for size in _GROUPS if layer.in_features % size == 0), None)


def _served(layer: QuantLinear, kind: Any, dtype: torch.dtype | None) -> nn.Module:
    n, m, size = layer.out_features, layer.in_features, _group(layer)
    assert size is not None
    q = unpack_bits(layer.qweight, 4, m).to(torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)

    def spread(values: Tensor) -> Tensor:  # (n, groups) to (m / size, n)
        return values.expand(n, m // size).t() if layer.groups == 1 else values.t()

    scales = layer.scales.to(dtype or layer.scales.dtype)
    offsets = ((8 - layer.zeros.to(layer.scales.dtype)) * layer.scales).to(scales.dtype)
    both = torch.stack((spread(scales), spread(offsets)), dim=-1).contiguous()
    with torch.device("meta"):
        linear = nn.Linear(m, n, bias=layer.bias is not None)
    weight = kind(packed, both, [1, size], torch.Size((n, m)))
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.register_parameter("bias", layer.bias)
    return linear
