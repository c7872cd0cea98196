"""Gradients on their way: hooks fill buckets in the backward pass, and each rank receives its slices, summed.

A bucket leaves as soon as the last of its gradients has come, in one order on all ranks (in the order of
arrival, ranks that use different layers would pair different buckets). One bucket fills, one travels, one
arrives: what communication holds does not grow with the model.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from memspan.base import refuse

__all__ = ["Bucket", "BucketReducer", "Slot", "all_gather_flat", "exchange", "world_of"]


@dataclass(eq=False)
class Slot:
    """A parameter's place in a bucket, and what this rank owns of it.

    Attributes:
        name: of the parameter in the model.
        parameter: its ``data`` is a view into the bucket.
        start: first element in the bucket.
        run: elements of the parameter that this rank owns, first and one past the last.
        first: whether this rank owns the first element (or is rank 0, where there is none).
        piece: what the inner optimizer steps; None where this rank owns nothing.
        got: a gradient has come since the last step.
    """

    name: str
    parameter: nn.Parameter
    start: int
    run: tuple[int, int]
    first: bool
    piece: nn.Parameter | None = None
    got: bool = False
    seen: bool = False  # in the pass that runs
    filled: bool = False  # the bucket's local gradients hold this one

    def __post_init__(self) -> None:
        self.shape, self.stride, self.size = _layout(self.parameter)

    def inside(self, flat: Tensor) -> Tensor:
        """The parameter's view into its bucket or one of the same layout."""
        return flat.as_strided(self.shape, self.stride, flat.storage_offset() + self.start)


@dataclass(eq=False)
class Bucket:
    """Parameters that travel together.

    Attributes:
        slots: in the order in which they lie.
        data: the flat parameters, padding at the end.
        share: elements of a rank's slice.
        trip: elements of each slice that travel at once; less than ``share`` for one large parameter alone.
        dtype: of the summed gradients.
        local: this rank's own gradients, whole, while they are here.
        total: this rank's slice of the sum.
    """

    slots: list[Slot]
    data: Tensor
    share: int
    trip: int
    dtype: torch.dtype
    local: Tensor | None = None
    total: Tensor | None = None
    left: int = 0
    launched: bool = False

    @property
    def alone(self) -> bool:
        """One parameter larger than a bucket: its gradient is sent in parts, and never copied whole."""
        return self.trip < self.share


@dataclass
class _Flight:
    bucket: Bucket
    work: Any
    received: Tensor
    start: int
    first: bool
    sent: Tensor = field(repr=False)  # alive until it has left


class BucketReducer:
    """Hooks, buckets and asynchronous collectives of stages 1 and 2.

    Args:
        group: process group of the ranks.
        stage: 1 keeps whole local gradients until they are consumed; 2 keeps this rank's slices.
        ordered: ranks exchange pieces and each adds its own in the order of ranks; else the backend's
            reduce-scatter.
    """

    def __init__(self, group: Any, stage: int, ordered: bool) -> None:
        self.group, self.stage, self.ordered = group, stage, ordered
        self.world, self.rank = world_of(group)
        self.buckets: list[Bucket] = []
        self.passes = 0  # backward passes since the last step
        self.open = False
        self.held_back = False  # inside no_sync
        self._unsent = False  # some local gradients have not left
        self._homes: dict[nn.Parameter, tuple[Bucket, Slot]] = {}
        self._hooks: list[Any] = []
        self._next = 0
        self._late = False  # a gradient came after its bucket had left
        self._flying: _Flight | None = None

    def add(self, bucket: Bucket) -> None:
        """Watch a bucket's parameters; it travels after those that were added before."""
        self.buckets.append(bucket)
        for slot in bucket.slots:
            self.watch(bucket, slot)

    def watch(self, bucket: Bucket, slot: Slot) -> None:
        """Take the gradients of a slot's parameter from now on."""
        self._homes[slot.parameter] = bucket, slot
        before = slot.parameter.requires_grad
        slot.parameter.requires_grad_(True)  # or no hook is taken, though it may be trained later
        hook: Any = slot.parameter.register_post_accumulate_grad_hook(self._arrived)  # type: ignore[no-untyped-call]
        slot.parameter.requires_grad_(before)
        self._hooks.append(hook)

    def remove(self) -> None:
        """Take the hooks away."""
        while self._hooks:
            self._hooks.pop().remove()

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes inside add up on this rank and send nothing."""
        before, self.held_back = self.held_back, True
        try:
            yield
        finally:
            self.held_back = before

    def reset(self) -> None:
        """Forget the gradients of this step."""
        self._land()
        self.open, self.passes, self._unsent = False, 0, False
        for bucket in self.buckets:
            bucket.local = bucket.total = None
            for slot in bucket.slots:
                slot.got = slot.filled = False
                slot.parameter.grad = None
                if slot.piece is not None:
                    slot.piece.grad = None

    def finish(self) -> None:
        """Send what is still here; this rank's slices are whole afterwards.

        Raises:
            RuntimeError: the last backward pass did not end.
        """
        if self.open:
            raise RuntimeError(
                "the last backward pass did not end (an exception inside it?): call zero_grad() on the "
                "optimizer on every rank, and run it again"
            )
        if not self.passes or self._unsent:  # without a pass this rank adds zeros: its data have ended
            for bucket in self.buckets:
                self._launch(bucket)
            self._land()
            self._unsent = False

    def take(self, parameter: nn.Parameter) -> None:
        """Take a gradient that came while no hook was there."""
        self._arrived(parameter, queue=False)

    def end_pass(self) -> None:
        """The backward pass is over: send the buckets that are still open, missing gradients as zeros."""
        if not self.open:
            return
        self.passes += 1
        self.open = False
        if self.held_back:
            self._unsent = True
            return
        for bucket in self.buckets[self._next :]:
            self._launch(bucket)
        self._land()
        self._unsent = self._late

    def _begin(self) -> None:
        self._next, self._late = 0, False
        for bucket in self.buckets:
            bucket.launched = False
            bucket.left = sum(1 for slot in bucket.slots if slot.size and slot.parameter.requires_grad)
            for slot in bucket.slots:
                slot.seen = False

    def _arrived(self, parameter: nn.Parameter, queue: bool = True) -> None:
        """A parameter has its gradient: into the bucket with it, and off with every bucket that is full."""
        bucket, slot = self._homes[parameter]
        gradient = parameter.grad
        assert gradient is not None
        if gradient.layout is not torch.strided:
            refuse(
                slot.name,
                f"a gradient of layout {gradient.layout}",
                "sparse gradients are not cut over ranks: use sparse=False in the embedding",
            )
        if not self.open:
            self.open = True
            self._begin()
            if queue:
                engine: Any = torch.autograd.Variable._execution_engine
                engine.queue_callback(self.end_pass)
        self._late = self._late or bucket.launched  # reentrant checkpoints come back to a tied parameter
        self._fill(bucket, slot, gradient)
        slot.got = True
        if not slot.seen:
            slot.seen = True
            bucket.left -= bool(slot.size)
        if self.held_back:
            return
        while self._next < len(self.buckets) and self.buckets[self._next].left <= 0:
            self._launch(self.buckets[self._next])
            self._next += 1

    def _fill(self, bucket: Bucket, slot: Slot, gradient: Tensor) -> None:
        if not slot.size:
            parameter = slot.parameter
            parameter.grad = gradient if self.held_back else None
            return
        if bucket.alone:
            flat = gradient
            if gradient.stride() != slot.stride:
                flat = torch.empty_strided(
                    slot.shape, slot.stride, dtype=gradient.dtype, device=gradient.device
                ).copy_(gradient)
            flat = flat.as_strided((slot.size,), (1,)).to(bucket.data.dtype)
            if (
                slot.filled
                and slot.seen
                and bucket.local is not None
                and not _same_storage(flat, bucket.local)
            ):
                bucket.local.add_(flat)
            else:
                if bucket.total is not None and bucket.local is not None:
                    bucket.total = bucket.total.clone()  # the slice of an earlier pass lies in it
                bucket.local = flat
            slot.filled = True
            if not self.held_back:
                slot.parameter.grad = None
            return
        if bucket.local is None or (bucket.total is not None and _same_storage(bucket.local, bucket.total)):
            if bucket.total is not None:
                bucket.total = bucket.total.clone()  # the slice of an earlier pass lies in the buffer
            bucket.local = torch.empty_like(bucket.data)
            for other in bucket.slots:
                other.filled = False
            used = sum(other.size for other in bucket.slots)
            bucket.local[used:].zero_()
            self._zero_gaps(bucket)
        view = slot.inside(bucket.local)
        if _same_storage(gradient, view):
            pass  # autograd has added to it in place
        elif slot.filled and slot.seen:
            view.add_(gradient)
        else:
            view.copy_(gradient)
        slot.filled = True
        slot.parameter.grad = view if self.held_back else None

    def _zero_gaps(self, bucket: Bucket) -> None:
        """Whole parameters leave gaps between ranks' loads; padding must be zero, or it would count."""
        end = 0
        assert bucket.local is not None
        for slot in sorted(bucket.slots, key=lambda slot: slot.start):
            if slot.start > end:
                bucket.local[end : slot.start].zero_()
            end = max(end, slot.start + slot.size)
        bucket.local[end:].zero_()

    def _launch(self, bucket: Bucket) -> None:
        bucket.launched = True
        if not bucket.share:
            return
        self._complete(bucket)
        local = bucket.local
        assert local is not None
        again = bucket.total is not None
        if bucket.total is None:
            low = self.rank * bucket.share
            if self.stage == 1 and bucket.dtype == local.dtype:
                bucket.total = local[low : low + bucket.share]  # in place: a separate slice would cost more
            else:
                bucket.total = torch.empty(bucket.share, dtype=bucket.dtype, device=local.device)
        for start in range(0, bucket.share, bucket.trip):
            self._land()  # before the next is made: one travels at a time
            width = min(bucket.trip, bucket.share - start)
            sent = local if not bucket.alone else self._packed(bucket, start, width)
            shape = (self.world, width) if self.ordered else (width,)
            received = torch.empty(shape, dtype=sent.dtype, device=sent.device)
            if self.ordered:
                work = dist.all_to_all_single(received.view(-1), sent, group=self.group, async_op=True)
            else:
                work = reduce_scatter_flat(received, sent, self.group, async_op=True)
            self._flying = _Flight(bucket, work, received, start, not again, sent)
        if self.stage == 2 or again or bucket.total.dtype != local.dtype:
            bucket.local = None
            for slot in bucket.slots:
                slot.filled = False

    def _complete(self, bucket: Bucket) -> None:
        """Zeros for what has not come, or was cleared by hand after ``no_sync``."""
        if bucket.local is None or (bucket.total is not None and _same_storage(bucket.local, bucket.total)):
            if bucket.total is not None:
                bucket.total = bucket.total.clone()
            size = sum(slot.size for slot in bucket.slots) if bucket.alone else bucket.data.numel()
            bucket.local = torch.zeros(size, dtype=bucket.data.dtype, device=bucket.data.device)
        else:
            for slot in bucket.slots:
                if slot.filled and (slot.seen or slot.parameter.grad is not None):
                    continue
                if bucket.alone and slot.size:
                    bucket.local.zero_()
                elif not bucket.alone:
                    slot.inside(bucket.local).zero_()
        for slot in bucket.slots:
            slot.parameter.grad = None

    def _packed(self, bucket: Bucket, start: int, width: int) -> Tensor:
        assert bucket.local is not None
        packed = torch.zeros(self.world, width, dtype=bucket.local.dtype, device=bucket.local.device)
        for rank in range(self.world):
            low = rank * bucket.share + start
            part = bucket.local[low : low + width]
            packed[rank, : part.numel()] = part
        return packed.view(-1)

    def _land(self) -> None:
        """Wait for the bucket that travels, and add up what came, in the order of ranks."""
        flight, self._flying = self._flying, None
        if flight is None:
            return
        flight.work.wait()
        bucket = flight.bucket
        assert bucket.total is not None
        part = bucket.total[flight.start : flight.start + flight.received.shape[-1]]
        pieces = flight.received if self.ordered else flight.received[None]
        for rank, piece in enumerate(pieces):
            piece = piece[: part.numel()]
            if rank == 0 and flight.first:
                part.copy_(piece)
            else:
                part.add_(piece)
        if flight.start + flight.received.shape[-1] == bucket.share:
            self._hand_over(bucket)

    def _hand_over(self, bucket: Bucket) -> None:
        low = self.rank * bucket.share
        assert bucket.total is not None
        for slot in bucket.slots:
            if slot.piece is not None:
                start = slot.start + slot.run[0] - low
                run = bucket.total[start : start + slot.run[1] - slot.run[0]]
                slot.piece.grad = run.view(slot.piece.shape)


def world_of(group: Any) -> tuple[int, int]:
    """Number of ranks of a group, and this rank in it."""
    return dist.get_world_size(group), dist.get_rank(group)


def exchange(item: Any, group: Any) -> list[Any]:
    """Every rank's item, by rank; it travels as JSON, so that nothing received is ever executed.

    Under the ``fake`` group there is nobody to ask: this rank's item alone.
    """
    world, _ = world_of(group)
    if world == 1 or dist.get_backend(group) == "fake":
        return [item]
    device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
    text = torch.frombuffer(bytearray(json.dumps(item).encode()), dtype=torch.uint8).to(device)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor([text.numel()], device=device), group=group)
    padded = torch.zeros(max(int(size) for size in sizes), dtype=torch.uint8, device=device)
    padded[: text.numel()] = text
    blocks = [torch.zeros_like(padded) for _ in range(world)]
    dist.all_gather(blocks, padded, group=group)
    return [
        json.loads(block[: int(size)].cpu().numpy().tobytes().decode())
        for block, size in zip(blocks, sizes, strict=True)
    ]


def all_gather_flat(output: Tensor, part: Tensor, group: Any, async_op: bool = False) -> Any:
    """All ranks' parts, one after another; torch 2.13 gave the collective a new name."""
    call = vars(dist).get("all_gather_single") or dist.all_gather_into_tensor
    return call(output, part, group=group, async_op=async_op)


def reduce_scatter_flat(output: Tensor, given: Tensor, group: Any, async_op: bool = False) -> Any:
    """This rank's part of the sum, by the backend's own order."""
    call = vars(dist).get("reduce_scatter_single") or dist.reduce_scatter_tensor
    return call(output, given, group=group, async_op=async_op)


def _layout(parameter: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Shape, strides and elements in the bucket: a dense layout (channels last) is kept as it is."""
    same = torch.empty_like(parameter, device="meta")  # keeps the strides where they are dense
    return tuple(parameter.shape), tuple(same.stride()), parameter.numel()


def _same_storage(a: Tensor, b: Tensor) -> bool:
    return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)
