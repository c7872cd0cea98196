"""What is left when model states are cut (the paper's section 6): saved inputs, and the heap between them.

In tensor parallelism every rank holds the same input of a block. A checkpoint of it needs one copy in all,
not one a rank: each keeps its slice, and the slices are gathered before the block is recomputed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from memspan.base import refuse
from memspan.training.zero.buckets import all_gather_flat, world_of

__all__ = ["ContiguousBuffer", "partitioned_checkpoint"]


class ContiguousBuffer:
    """One block of memory for tensors that live long, so that the short-lived ones around them cut no heap.

    Args:
        nbytes: size of the block.
        dtype: of what is put in.
        device: where it lies.

    Attributes:
        used: bytes taken since the last reset.

    Example:
        >>> buffer = ContiguousBuffer(64, torch.float32)
        >>> kept = buffer.put(torch.ones(2, 3))
        >>> kept.shape, buffer.used, kept.untyped_storage().nbytes()
        (torch.Size([2, 3]), 24, 64)
        >>> buffer.put(torch.ones(11))
        Traceback (most recent call last):
        memspan.base.refusal.BadInput: tensor='44 bytes': the buffer has 40 of 64 bytes left: make it larger,
        or reset() it each step
    """

    def __init__(
        self, nbytes: int, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> None:
        if isinstance(nbytes, bool) or not isinstance(nbytes, int) or nbytes < 1:
            refuse("nbytes", nbytes, "give a whole number of bytes, 1 or more")
        self._block = torch.empty(nbytes // dtype.itemsize, dtype=dtype, device=device)
        self._next = 0

    @property
    def used(self) -> int:
        """Bytes taken since the last reset."""
        return self._next * self._block.element_size()

    def put(self, tensor: Tensor) -> Tensor:
        """Copy a tensor in; gives the view that holds it.

        Raises:
            BadInput: another dtype, or no room left.
        """
        if tensor.dtype != self._block.dtype:
            refuse("tensor", tensor.dtype, f"this buffer holds {self._block.dtype}")
        left = self._block.numel() - self._next
        if tensor.numel() > left:
            width = tensor.element_size()
            refuse(
                "tensor",
                f"{tensor.numel() * width} bytes",
                f"the buffer has {left * width} of {self._block.numel() * width} bytes left: make it larger, "
                "or reset() it each step",
            )
        place = self._block[self._next : self._next + tensor.numel()].view(tensor.shape)
        self._next += tensor.numel()
        return place.copy_(tensor.detach())

    def reset(self) -> None:
        """Give all its room free; what was put in before is overwritten from now on."""
        self._next = 0

    def memory_bytes(self) -> dict[str, int]:
        """The whole block, by ledger category."""
        return {"saved_activations": self._block.numel() * self._block.element_size()}


def partitioned_checkpoint(
    fn: Callable[..., Any],
    *args: Any,
    group: Any,
    offload: bool = False,
    buffer: ContiguousBuffer | None = None,
    preserve_rng: bool = True,
    **kwargs: Any,
) -> Any:
    """Recompute ``fn`` in the backward pass, and keep only this rank's slice of its inputs until then.

    Gradients are those of ``torch.utils.checkpoint``, bit for bit. One all-gather of the inputs is added.

    Args:
        fn: computes the same on every rank of the group from the same inputs.
        args: of ``fn``; tensors are cut, everything else is kept.
        group: the tensor-parallel group, of two ranks or more.
        offload: keep the slice in host memory.
        buffer: keep the slice in this buffer; reset it each step.
        preserve_rng: repeat random draws (dropout).
        kwargs: of ``fn``; tensors in them are cut too.

    Returns:
        What ``fn`` returns.

    Raises:
        BadInput: a group of one rank, which has nothing to share: use ``torch.utils.checkpoint``.
    """
    world, rank = world_of(group)
    if world == 1:
        refuse(
            "group",
            "one rank",
            "nothing can be partitioned: give the tensor-parallel group, or use checkpoint",
        )
    leaves, spec = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    others = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]
    del leaves, args, kwargs  # or their tensors would live as long as the closure below

    def call(*given: Tensor) -> Any:
        rest = iter(given)
        own, named = tree_unflatten([next(rest) if one is None else one[0] for one in others], spec)
        return fn(*own, **named)

    def keep(tensor: Tensor) -> _Slice:
        share = -(-tensor.numel() // world)
        flat = tensor.detach().reshape(-1)[rank * share : (rank + 1) * share]
        mine = flat.new_zeros(share)
        mine[: flat.numel()] = flat
        if buffer is not None and mine.dtype == buffer._block.dtype:
            mine = buffer.put(mine)
        if offload:
            host = torch.empty(share, dtype=mine.dtype, pin_memory=mine.is_cuda)
            mine = host.copy_(mine)
        return _Slice(mine, tuple(tensor.shape), tensor.device, tensor.requires_grad)

    def bring(kept: _Slice) -> Tensor:
        mine = kept.mine.to(kept.device)
        whole = mine.new_empty(world * mine.numel())
        all_gather_flat(whole, mine, group)
        tensor = whole[: math.prod(kept.shape)].view(kept.shape)
        return tensor.requires_grad_(kept.requires_grad) if kept.requires_grad else tensor

    with saved_tensors_hooks(keep, bring):  # they see the inputs alone: inside, checkpoint's own are in force
        return checkpoint(call, *tensors, use_reentrant=False, preserve_rng_state=preserve_rng)


class _Slice(NamedTuple):
    mine: Tensor
    shape: tuple[int, ...]
    device: torch.device
    requires_grad: bool
