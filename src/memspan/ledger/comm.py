"""Bytes that cross between processes, and ledgers of many ranks brought together.

Payload is what a collective is about; ring bytes are what each rank sends when it runs as a ring over n
ranks: 2(n-1)/n of the payload for an all-reduce, (n-1)/n for all-gather, reduce-scatter and all-to-all, the
whole for broadcast and point-to-point. (Chan, Heimlich, Purkayastha, van de Geijn: Collective communication,
2007.)
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from memspan.ledger.graph import tensors_in
from memspan.ledger.snapshot import Snapshot
from memspan.ledger.tracker import Ledger

__all__ = ["CommLedger", "Gathered", "Traffic", "gather_ledgers", "ring_bytes"]

# Operator name without namespace and trailing parts -> the collective's name.
_COLLECTIVES = {
    "allreduce": "all_reduce",
    "all_reduce": "all_reduce",
    "allgather": "all_gather",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all",
    "all_to_all": "all_to_all",
    "broadcast": "broadcast",
    "reduce": "reduce",
    "gather": "gather",
    "scatter": "scatter",
    "send": "send",
    "recv": "recv",
}
_LONGEST_FIRST = sorted(_COLLECTIVES, key=len, reverse=True)
_RESULTS_FIRST = frozenset({"all_gather"})  # the payload is the whole result, not the shard given
_SHARED = frozenset({"all_gather", "reduce_scatter", "all_to_all", "gather", "scatter"})


@dataclass(frozen=True)
class Traffic:
    """Calls of one collective and their bytes: payload in all, and sent by this rank on a ring.

    Example:
        >>> Traffic(1, 8, 6) + Traffic(1, 8, 6)
        Traffic(calls=2, payload=16, ring=12)
    """

    calls: int = 0
    payload: int = 0
    ring: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.calls + other.calls, self.payload + other.payload, self.ring + other.ring)


class CommLedger:
    """Count what this rank communicates inside a block, by collective.

    Attributes:
        by_collective: name (``"all_reduce"``) to :class:`Traffic`.

    Example:
        >>> with CommLedger() as comm:
        ...     _ = torch.zeros(4) + 1            # no collective, no traffic
        >>> comm.payload, comm.ring, comm.by_collective
        (0, 0, {})
        >>> ring_bytes("all_reduce", 1000, ranks=4)
        1500
    """

    def __init__(self) -> None:
        self.by_collective: dict[str, Traffic] = {}
        self._modes: list[Any] = []

    @property
    def payload(self) -> int:
        """Bytes that the collectives were about."""
        return sum(traffic.payload for traffic in self.by_collective.values())

    @property
    def ring(self) -> int:
        """Bytes that this rank sends when each collective runs as a ring."""
        return sum(traffic.ring for traffic in self.by_collective.values())

    def __enter__(self) -> CommLedger:
        mode: Any = _CommMode(self)
        self._modes.append(mode)
        mode.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._modes.pop().__exit__(kind, error, trace)


def ring_bytes(collective: str, payload: int, *, ranks: int) -> int:
    """Bytes each rank sends for one collective on a ring, rounded up.

    Args:
        collective: such as ``"all_reduce"``.
        payload: bytes the collective is about (for gathers and scatters: of all ranks together).
        ranks: size of the group.
    """
    if ranks <= 1:
        return 0
    if collective == "all_reduce":
        return -(-2 * (ranks - 1) * payload // ranks)
    if collective in _SHARED:
        return -(-(ranks - 1) * payload // ranks)
    return payload


class _CommMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, ledger: CommLedger) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ledger = ledger

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented
        result = func(*args, **kwargs) if kwargs else func(*args)
        name = _collective(func)
        if name is not None:
            functional = func.namespace.startswith("_")
            ranks = _ranks(args, kwargs or {}, functional)
            payload = _payload(name, args, result, functional, ranks)
            seen = self.ledger.by_collective.get(name, Traffic())
            self.ledger.by_collective[name] = seen + Traffic(
                1, payload, ring_bytes(name, payload, ranks=ranks)
            )
        return result


def _collective(func: Any) -> str | None:
    if getattr(func, "namespace", "") not in ("c10d", "_c10d_functional", "c10d_functional"):
        return None
    operator = str(func).split("::")[-1].split(".")[1] if "." in str(func) else str(func)
    operator = operator.strip("_")
    for start in _LONGEST_FIRST:
        if operator.startswith(start):
            return _COLLECTIVES[start]
    return None


def _payload(name: str, args: tuple[Any, ...], result: Any, functional: bool, ranks: int) -> int:
    if functional:
        given = sum(_size(tensor) for tensor in tensors_in(args[0]))
        return given * ranks if name in _RESULTS_FIRST else given
    sizes = [sum(_size(tensor) for tensor in tensors_in(item)) for item in args if _holds_tensors(item)]
    return max(sizes, default=0)  # the whole is the larger side of gathers and scatters


def _holds_tensors(item: object) -> bool:
    return next(tensors_in(item), None) is not None


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _ranks(args: tuple[Any, ...], kwargs: dict[str, Any], functional: bool) -> int:
    for item in (*args, *kwargs.values()):
        if isinstance(item, torch.ScriptObject):
            try:
                return int(dist.ProcessGroup.unbox(item).size())  # type: ignore[attr-defined]
            except (RuntimeError, TypeError):
                continue
    if functional:
        from torch.distributed import distributed_c10d

        resolve: Any = vars(distributed_c10d)["_resolve_process_group"]

        for item in reversed((*args, *kwargs.values())):
            if isinstance(item, str):
                try:
                    return int(resolve(item).size())
                except (RuntimeError, ValueError, LookupError):
                    continue
    return dist.get_world_size() if dist.is_initialized() else 1


@dataclass(frozen=True)
class Gathered:
    """Peaks of all ranks, by rank.

    Attributes:
        snapshots: one peak per rank.
    """

    snapshots: tuple[Snapshot, ...]

    @property
    def worst(self) -> int:
        """The rank with the highest peak (the first of equals)."""
        totals = [snapshot.total for snapshot in self.snapshots]
        return totals.index(max(totals))

    @property
    def maximum(self) -> int:
        """Bytes of the highest peak: what every rank's device must offer."""
        return max(snapshot.total for snapshot in self.snapshots)

    @property
    def minimum(self) -> int:
        """Bytes of the lowest peak."""
        return min(snapshot.total for snapshot in self.snapshots)

    @property
    def imbalance(self) -> float:
        """Highest peak over the mean, 1.0 when all ranks hold the same."""
        totals = [snapshot.total for snapshot in self.snapshots]
        mean = sum(totals) / len(totals)
        return self.maximum / mean if mean else 1.0


def gather_ledgers(ledger: Ledger | Snapshot, *, to: int = 0, holdings: bool = False) -> Gathered | None:
    """Collect each rank's peak on one rank; every rank of the default group must call it.

    Args:
        ledger: this rank's ledger, or any snapshot.
        to: the rank that receives.
        holdings: send every holding too, not only the sums.

    Returns:
        All peaks on rank ``to``, None elsewhere. Without a process group: this process alone.

    Example:
        >>> gathered = gather_ledgers(Snapshot(8, {"inputs": 8}))
        >>> gathered.worst, gathered.maximum, gathered.imbalance
        (0, 8, 1.0)
    """
    snapshot = ledger if isinstance(ledger, Snapshot) else ledger.peak
    if not (dist.is_available() and dist.is_initialized()):
        return Gathered((snapshot,))
    data = snapshot.to_dict()
    if not holdings:
        data["holdings"] = []
    text = bytearray(json.dumps(data).encode())  # JSON, so that nothing received is ever executed
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    ranks = dist.get_world_size()
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(ranks)]
    dist.all_gather(sizes, torch.tensor([len(text)], dtype=torch.int64, device=device))
    longest = max(int(size) for size in sizes)
    mine = torch.zeros(longest, dtype=torch.uint8, device=device)
    mine[: len(text)] = torch.frombuffer(text, dtype=torch.uint8).to(device)
    received = [torch.zeros(longest, dtype=torch.uint8, device=device) for _ in range(ranks)]
    dist.all_gather(received, mine)
    if dist.get_rank() != to:
        return None
    return Gathered(
        tuple(
            Snapshot.from_dict(json.loads(bytes(block[: int(size)].tolist()).decode()))
            for block, size in zip(received, sizes, strict=True)
        )
    )
