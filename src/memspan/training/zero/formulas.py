"""Closed forms: bytes of model states on a rank, and bytes that it sends (the paper's sections 5 and 7)."""

from __future__ import annotations

import math

from torch import nn

from memspan.base import refuse
from memspan.training.zero.optimizer import default_bucket_bytes
from memspan.training.zero.partition import FlatPartition

__all__ = ["predict_bytes", "predict_traffic"]


def predict_bytes(
    params: float | None = None,
    world: int = 1,
    stage: int = 2,
    *,
    model: nn.Module | None = None,
    parameter_bytes: int | None = None,
    gradient_bytes: int | None = None,
    state_bytes: int | None = None,
) -> dict[str, int]:
    """Bytes of model states on a rank, by ledger category.

    Args:
        params: Ψ, number of trained parameters: the ideal, cut evenly.
        world: N, ranks.
        stage: 0 (nothing cut), 1, 2 or 3.
        model: instead of ``params``: its shapes, as they are really cut (the rank that holds the most, the
            default bucket, padding; at stage 3 FSDP2's rows).
        parameter_bytes: per element; None: 2 with ``params`` (mixed precision), the model's own with
            ``model``.
        gradient_bytes: per element; None: as ``parameter_bytes``.
        state_bytes: of the optimizer per element; None: 12 with 16-bit parameters (float32 copy and two
            moments), else 8.

    Raises:
        BadInput: neither or both of ``params`` and ``model``; a number below 1; a stage outside 0 to 3.

    Example:
        >>> sum(predict_bytes(7.5e9, world=64, stage=2).values()) / 1e9
        16.640625
        >>> predict_bytes(1000, world=4, stage=3, parameter_bytes=4)
        {'parameters.trained': 1000, 'gradients': 1000, 'optimizer_state': 2000}
    """
    _check(world, stage)
    if (params is None) == (model is None):
        refuse("params", params, "give the number of parameters, or model=, and not both")
    if model is not None:
        trained = [p for p in model.parameters() if p.requires_grad]
        p = parameter_bytes or max((one.element_size() for one in trained), default=4)
        whole, cut, padded, frozen = _of_model(model, world, stage)
    else:
        assert params is not None
        if params < 1:
            refuse("params", params, "give a number of parameters, 1 or more")
        p = parameter_bytes or 2
        whole = padded = math.ceil(params)
        cut, frozen = math.ceil(params / world), 0
    g = gradient_bytes or p
    o = state_bytes or (12 if p == 2 else 8)
    share = -(-padded // world) if stage in (1, 2) else cut
    found = {
        "parameters.trained": p * (cut if stage == 3 else padded if stage else whole),
        "gradients": g * (whole if stage == 0 else padded if stage == 1 else share),
        "optimizer_state": o * (cut if stage else whole),
    }
    return found | ({"parameters.frozen": frozen} if frozen else {})


def predict_traffic(
    params: float,
    world: int,
    stage: int,
    *,
    parameter_bytes: int = 2,
    gradient_bytes: int | None = None,
    accumulate: int = 1,
    root: float = 0,
) -> int:
    """Bytes that a rank sends in a step, with ring algorithms (the paper's section 7).

    Args:
        params: Ψ, number of trained parameters.
        world: N, ranks.
        stage: 0 (all-reduce), 1, 2 or 3.
        parameter_bytes: per element.
        gradient_bytes: per element; None: as ``parameter_bytes``.
        accumulate: micro-batches in a step; stages 2 and 3 send gradients for each, stage 3 gathers for each.
        root: at stage 3, parameters of the root unit, which stay whole between forward and backward.

    Raises:
        BadInput: a number below 1, or a stage outside 0 to 3.

    Example:
        >>> [predict_traffic(1000, 4, stage, parameter_bytes=4) for stage in range(4)]
        [6000, 6000, 6000, 9000]
    """
    _check(world, stage)
    g = gradient_bytes or parameter_bytes
    once = params * (world - 1) / world
    if stage == 0:
        return math.ceil(2 * g * once)
    if stage < 3:
        return math.ceil(once * (g * (accumulate if stage == 2 else 1) + parameter_bytes))
    again = (params - root) * (world - 1) / world
    return math.ceil(accumulate * (once * (g + parameter_bytes) + again * parameter_bytes))


def _of_model(model: nn.Module, world: int, stage: int) -> tuple[int, int, int, int]:
    """Elements whole, of the fullest rank, with padding; bytes of frozen parameters (a rank's own)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    whole = sum(p.numel() for p in trained)
    held = sum(_rows(p, world if stage == 3 else 1) * p.element_size() for p in frozen)
    if stage == 3:
        return whole, sum(_rows(p, world) for p in trained), whole, held
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    elements, owned, padded = default_bucket_bytes(size), [0] * world, 0
    for dtype in dict.fromkeys(p.dtype for p in trained):
        some = [p for p in reversed(trained) if p.dtype == dtype]
        width = some[0].element_size()
        cut = FlatPartition([p.numel() for p in some], world, max(1, elements // width), max(1, 16 // width))
        padded += sum(cut.buckets)
        for rank in range(world):
            owned[rank] += cut.owned(rank)
    return whole, max(owned), padded, held


def _rows(parameter: nn.Parameter, world: int) -> int:
    """Elements on rank 0 of a parameter that FSDP2 cuts along its first dimension."""
    if not parameter.dim() or not parameter.numel():
        return parameter.numel()
    return -(-parameter.shape[0] // world) * (parameter.numel() // parameter.shape[0])


def _check(world: int, stage: int) -> None:
    if isinstance(world, bool) or not isinstance(world, int) or world < 1:
        refuse("world", world, "give the number of ranks, 1 or more")
    if stage not in (0, 1, 2, 3):
        refuse("stage", stage, "use 0 (nothing cut), 1, 2 or 3")
