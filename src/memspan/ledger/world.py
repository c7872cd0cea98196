"""One rank of many, traced on one machine: torch's ``fake`` process group, and FSDP2 over it.

The group answers every collective at once and moves nothing, so rank 0 of N runs as it would beside the
others. Its tensors may be fake as well; then nothing is allocated either.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import nn

from memspan.base import refuse

__all__ = ["fake_ranks", "shard_"]


@contextmanager
def fake_ranks(world: int) -> Iterator[Any]:
    """Rank 0 of ``world`` ranks while the block runs; gives the device mesh (None for one rank).

    Enter it outside fake tensors: the mesh looks at values.

    Raises:
        BadInput: this process belongs to a group already, or torch is built without distributed.
    """
    if world == 1:
        yield None
        return
    if not dist.is_available():
        refuse("world", world, "this build of torch has no torch.distributed; only world=1 can be planned")
    if dist.is_initialized():
        refuse(
            "world", world, "this process belongs to a process group: plan before it is made, or in another"
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)  # type: ignore[no-untyped-call]
    try:
        yield init_device_mesh("cpu", (world,))
    finally:
        dist.destroy_process_group()


def shard_(model: nn.Module, mesh: Any) -> nn.Module:
    """Shard a model with FSDP2: each block of its outermost lists, then what is left at the root.

    Args:
        model: changed in place; its parameters become DTensors over the mesh.
        mesh: of one dimension.
    """
    from torch.distributed.fsdp import fully_shard

    for block in _blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Children of the outermost ``ModuleList`` and ``Sequential``, as far as they hold parameters."""
    listed = isinstance(module, nn.ModuleList | nn.Sequential)
    for child in module.children():
        if not listed or isinstance(child, nn.ModuleList):
            yield from _blocks(child)
        elif any(True for _ in child.parameters()):
            yield child
