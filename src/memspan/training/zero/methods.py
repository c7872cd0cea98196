"""The three stages as the planner's methods ``zero1``, ``zero2`` and ``zero3``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from memspan.base import refuse
from memspan.ledger import Method
from memspan.ledger.world import shard_ as fully_shard_
from memspan.training.zero.optimizer import ZeroOptimizer, shard_

__all__ = ["METHODS"]

_MESH = "_memspan_zero_mesh"


def _mark_(model: nn.Module, mesh: Any = None) -> nn.Module:
    """Remember the ranks; the optimizer does the cutting, since both are cut alike."""
    _needs_ranks(mesh)
    model.__dict__[_MESH] = mesh
    return model


def _fully_shard_(model: nn.Module, mesh: Any = None) -> nn.Module:
    _needs_ranks(mesh)
    return fully_shard_(model, mesh)


def _optimizer(model: nn.Module, make: Callable[..., Optimizer], *, stage: int) -> ZeroOptimizer:
    mesh = model.__dict__.pop(_MESH)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return shard_(model, make, stage=stage, params=trained, group=mesh.get_group())


def _needs_ranks(mesh: Any) -> None:
    if mesh is None:
        refuse("world", 1, "nothing can be cut on one rank: give world=N (--world N)")


_STAGES = frozenset({"zero1", "zero2", "zero3"})

METHODS = [
    Method(
        f"zero{stage}",
        _mark_,
        optimizer=functools.partial(_optimizer, stage=stage),
        ranks=True,
        conflicts=_STAGES - {f"zero{stage}"} | {"slimfit"},
    )
    for stage in (1, 2)
] + [Method("zero3", _fully_shard_, ranks=True, conflicts=_STAGES - {"zero3"})]
