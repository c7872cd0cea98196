"""What a GPU holds beside the tensors: cuBLAS's workspaces, and the ends of the allocator's blocks.

cuBLAS keeps a workspace for each thread that multiplies, from its first product on. No operator allocates it
and nothing gives it back, so that no dispatch ledger sees it; beside a small model it is most of what the
allocator tells. A training step multiplies in two threads: the program's own, and the one in which autograd
runs the backward pass. The caching allocator takes large blocks in steps of 2 MiB, and gives an end of up to
1 MiB away with the tensor.
"""

from __future__ import annotations

import os
import re
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Products", "end_of_block", "workspace_bytes"]

_KIB, _MIB = 1 << 10, 1 << 20
_PLAIN = ("mm", "bmm", "baddbmm", "addmm", "mv", "addmv", "dot")


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes where matrix products run: inside the backward pass or not, and whether with a bias.

    Attributes:
        seen: pairs (in the backward pass, with a bias).
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[tuple[bool, bool]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::").rstrip("_") if hasattr(func, "_schema") else ""
        if name in _PLAIN:
            backward = torch._C._current_graph_task_id() != -1
            self.seen.add((backward, name == "addmm" and args[0].dim() == 1))
        return func(*args, **(kwargs or {}))


def workspace_bytes(seen: set[tuple[bool, bool]], capability: tuple[int, int]) -> int:
    """Bytes of the workspaces that these products leave behind.

    Args:
        seen: as :class:`Products` noted them.
        capability: the device's compute capability.

    Example:
        >>> workspace_bytes({(False, True), (False, False), (True, False)}, (9, 0)) >> 20  # 2 x 32, and 1
        65
        >>> workspace_bytes(set(), (9, 0))
        0
    """
    threads = len({backward for backward, _ in seen})
    biased = len({backward for backward, bias in seen if bias})
    return threads * _cublas(capability) + biased * _cublaslt()


def end_of_block(size: int) -> int:
    """Bytes of a fresh block that belong to no tensor and are counted as allocated with it.

    Source: torch's caching allocator, ``kMinLargeAlloc``, ``kRoundLarge`` and ``should_split``.

    Example:
        >>> end_of_block(32_768_000), end_of_block(32_400_000), end_of_block(5_000_000)
        (786432, 0, 0)
    """
    rest = -size % (2 * _MIB)
    return rest if size >= 10 * _MIB and rest <= _MIB else 0


def _cublas(capability: tuple[int, int]) -> int:
    """Torch's default, or what the environment asks for in cuBLAS's own words (":KiB:count", repeated)."""
    asked = re.findall(r":(\d+):(\d+)", os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""))
    if asked:
        return sum(int(size) * int(count) * _KIB for size, count in asked)
    return (4096 * 8 if capability[0] == 9 else 4096 * 2 + 16 * 8) * _KIB


def _cublaslt() -> int:
    return int(os.environ.get("CUBLASLT_WORKSPACE_SIZE", "1024")) * _KIB
