"""What the benchmarks share: ways timed turn by turn, their ratios, and the machine they were timed on."""

from __future__ import annotations

import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch


def interleaved(
    ways: Mapping[str, Callable[[], object]], count: int, warm: int = 1
) -> dict[str, list[float]]:
    """Seconds of each way in ``count`` rounds after ``warm`` that do not count, in changing order."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    order = list(ways)
    for turn in range(count + warm):
        random.shuffle(order)
        for name in order:
            start = time.perf_counter()
            ways[name]()
            if turn >= warm:
                times[name].append(time.perf_counter() - start)
    return times


def ratio(over: Sequence[float], under: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of ``over / under``, taken in the same rounds."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(over, under, strict=True)], n=4)
    return {"median": round(middle, 3), "lower_quartile": round(low, 3), "upper_quartile": round(high, 3)}


def environment(**more: Any) -> dict[str, Any]:
    """The machine and the versions, with how busy it was."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "device": "cpu",
        **more,
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }
