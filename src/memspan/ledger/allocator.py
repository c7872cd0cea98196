"""What the allocator itself says the peak was: the truth that the ledger is held against.

On the CPU the profiler's allocation events carry signed bytes; their running sum, added to what was alive
before, is the real peak of torch's CPU allocator. On CUDA the caching allocator keeps its own peak. Neither
sees what libraries take for themselves (BLAS threads), Python objects or mapped files.
"""

from __future__ import annotations

import os
import time
from types import TracebackType
from typing import Any

import torch
from torch._C._profiler import _EventType

from memspan.base import refuse

__all__ = ["AllocatorPeak"]


class AllocatorPeak:
    """Measure the allocator's peak over a block, in bytes.

    Args:
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:N"``; None means CUDA's current device when there is one
            in use, else the CPU.
        before: bytes alive at the start (CPU only: the profiler sees changes, not levels).

    Attributes:
        peak: bytes at the highest point, ``before`` included; known after the block.
        growth: bytes held at the end beyond the start.
        rise: bytes at the highest point beyond the start.
        reserved: bytes that the caching allocator holds from the driver at its peak (CUDA; else None).
        requested: bytes asked for at the peak, before rounding (CUDA; else None).

    Note:
        On CUDA the device's peak statistics are reset at the start of the block.

    Raises:
        BadInput: a device other than CPU and CUDA, or CUDA where there is none.

    Example:
        >>> with AllocatorPeak("cpu") as truth:
        ...     x = torch.zeros(256); y = x * x; del x
        >>> truth.peak, truth.growth
        (2048, 1024)
    """

    def __init__(self, device: str | torch.device | None = None, *, before: int = 0) -> None:
        if device is None:
            in_use = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
            device = "cuda" if in_use else "cpu"
        self.device = torch.device(device)
        if self.device.type not in ("cpu", "cuda"):
            refuse("device", str(device), 'use "cpu" or "cuda"')
        if self.device.type == "cuda" and not torch.cuda.is_available():
            refuse("device", str(device), 'no CUDA device is available here; use "cpu"')
        self.before = before
        self.peak = before
        self.growth = self.rise = 0
        self.reserved: int | None = None
        self.requested: int | None = None
        self._profile: Any = None
        self._released: list[tuple[int, int, int]] = []
        self._start = 0

    def __enter__(self) -> AllocatorPeak:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start = torch.cuda.memory_allocated(self.device)
        else:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it writes a line at each start and stop
            self._profile = torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
            )
            self._profile.__enter__()
        return self

    def released(self, size: int, at: int | None = None) -> None:
        """Say that ``size`` bytes are freed of which the profiler does not see it: a ledger calls this.

        Those were alive before the block, or live for the ledger's sake alone (then they come back with a
        negative size when they have really gone). On CUDA it does nothing.

        Args:
            size: bytes.
            at: nanoseconds since the epoch; None: now.
        """
        self._released.append((time.time_ns() if at is None else at, 0, -size))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            stats = torch.cuda.memory_stats(self.device)
            self.peak = int(stats["allocated_bytes.all.peak"])
            self.requested = int(stats.get("requested_bytes.all.peak", self.peak))
            self.reserved = int(stats["reserved_bytes.all.peak"])
            self.growth = torch.cuda.memory_allocated(self.device) - self._start
            self.rise = self.peak - self._start
            return
        profile, self._profile = self._profile, None
        profile.__exit__(kind, error, trace)
        highest = now = 0
        for _, _, change in sorted([*_changes(profile), *self._released]):
            now += change
            highest = max(highest, now)
        self.peak = self.before + highest
        self.growth, self.rise = now, highest


def _changes(profile: Any) -> list[tuple[int, int, int]]:
    """The CPU allocator's events: time in nanoseconds since the epoch, place, signed bytes.

    A release counts only with its allocation in the same block: the profiler's table of sizes outlives a
    block, and would give an older size to an address that was used again meanwhile.
    """
    found = []
    pending = list(profile.profiler.kineto_results.experimental_event_tree())
    while pending:
        event = pending.pop()
        pending.extend(event.children)
        if event.tag != _EventType.Allocation:  # most are operators; their fields cost a copy each
            continue
        _, fields = event.typed
        if fields.device.type == "cpu":
            found.append((event.start_time_ns, event.id, fields.alloc_size, fields.ptr))
    found.sort()
    sizes: dict[int, int] = {}
    changes = []
    for place, (time_ns, _, size, address) in enumerate(found):
        if size > 0:
            sizes[address] = size
            changes.append((time_ns, place, size))
        elif address in sizes:
            changes.append((time_ns, place, -sizes.pop(address)))
    return changes
