"""Stage 3 stands on torch's FSDP2; ours are the plan, the ledger, and a reduction in the order of ranks."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from memspan.base import refuse
from memspan.ledger import world as planned

__all__ = ["Used", "deterministic_", "local", "shard_", "unshard_"]


def deterministic_(model: nn.Module) -> nn.Module:
    """Make the reduction of a model that FSDP2 has sharded add up in the order of ranks, undivided.

    Divide the loss by the number of ranks (``zero.shard_``'s optimizer does it in ``backward``): the run then
    has the bits of one process that accumulates the ranks' batches.

    Args:
        model: after ``torch.distributed.fsdp.fully_shard``; changed in place.

    Raises:
        BadInput: nothing in it is sharded by FSDP2.
    """
    units = _units(model)
    if not units:
        refuse("model", type(model).__name__, "apply torch.distributed.fsdp.fully_shard first")
    for unit in units:
        unit.set_custom_reduce_scatter(_InOrder())
        unit.set_force_sum_reduction_for_comms(True)  # else gloo is asked for a sum it does not know
        unit.set_gradient_divide_factor(1.0)
    return model


def shard_(model: nn.Module, group: Any, *, deterministic: bool) -> nn.Module:
    """Shard as the planner does: each block of the outermost lists, then the root."""
    device = next(model.parameters()).device.type
    world = dist.get_world_size(group)
    for name, parameter in model.named_parameters():
        if not parameter.dim():
            refuse(name, "a 0-dimensional parameter", "FSDP2 cuts the first dimension: give it shape (1,)")
        if not parameter.numel() and parameter.requires_grad:
            refuse(
                name,
                tuple(parameter.shape),
                "FSDP2 sends no parameter without elements: freeze it, or stage 2",
            )
    mesh = DeviceMesh.from_group(group, device)
    assert mesh.size() == world
    planned.shard_(model, mesh)
    for unit in _units(model):  # else ranks that use different parameters send blocks of different sizes
        unit.set_reduce_scatter_unused_params(True, recurse=False)
    return deterministic_(model) if deterministic else model


class Used:
    """Which parameters under FSDP2 got a gradient on this rank: zeros that were sent look alike."""

    def __init__(self) -> None:
        self.parameters: set[nn.Parameter] = set()
        self._watched: set[int] = set()
        self._handles: list[Any] = []

    def watch(self, model: nn.Module) -> None:
        """Look from its next forward pass on."""
        self._handles.append(model.register_forward_hook(self._look))

    def remove(self) -> None:
        """Look no more."""
        while self._handles:
            self._handles.pop().remove()

    def _look(self, model: nn.Module, *_: object) -> None:
        for unit in _units(model):
            for group in unit._get_fsdp_state()._fsdp_param_groups:
                for held in group.fsdp_params:
                    gathered = vars(held).get("_unsharded_param")  # made at its first use
                    if gathered is not None and id(gathered) not in self._watched and gathered.requires_grad:
                        self._watched.add(id(gathered))
                        add = functools.partial(self._came, held)
                        gathered.register_post_accumulate_grad_hook(add)

    def _came(self, held: Any, _: Tensor) -> None:
        self.parameters.add(held.sharded_param)


def unshard_(model: nn.Module) -> nn.Module:
    """Whole parameters back in place, and FSDP2 off the modules."""
    from torch.distributed._composable_state import _module_state_mapping

    whole: dict[int, nn.Parameter] = {}
    units = _units(model)
    for unit in units:
        unit.reshard()
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in whole:
                value = parameter.detach()
                full: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
                whole[id(parameter)] = nn.Parameter(full, requires_grad=parameter.requires_grad)
            module._parameters[name] = whole[id(parameter)]
    for unit in units:
        state = unit._get_fsdp_state()
        state._pre_forward_hook_handle.remove()
        state._post_forward_hook_handle.remove()
        _module_state_mapping.pop(unit, None)
        for key in [key for key in unit.__dict__ if str(key).startswith("__composable_api")]:
            del unit.__dict__[key]
        unit.__class__ = type(unit).__bases__[1]  # fully_shard put (FSDPModule, the class) under a new name
    return model


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor as it is."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


class _InOrder:
    """A reduce-scatter that sends pieces, and adds this rank's own in the order of ranks."""

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> Any:
        received = torch.empty_like(input_tensor)
        dist.all_to_all_single(received, input_tensor, group=group)
        pieces = received.view(dist.get_world_size(group), -1)
        total = output_tensor.view(-1).copy_(pieces[0])
        for piece in pieces[1:]:
            total.add_(piece)
        return None


def _units(model: nn.Module) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]
