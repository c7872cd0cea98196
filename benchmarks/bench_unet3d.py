"""Time and peak bytes of a training step of the reversible 3-D U-Net, as ratios to named rivals.

The same network with the same weights runs reversibly, plainly and with ``torch.utils.checkpoint`` around
each coupling; MONAI's U-Net of as many parameters runs as it is and checkpointed (its ``CheckpointUNet``
where the installed MONAI has it, else ``checkpoint`` around each of its residual units); RevTorch and MemCNN
run a chain of the same couplings. All run in each round, in changing order; a ratio is the median over
rounds of ours / rival in the same round, so below 1 ours is faster.

    python benchmarks/bench_unet3d.py            # about 3 min on two cores
    python benchmarks/bench_unet3d.py --quick    # 3 rounds; writes nothing

Figures go to ``benchmarks/results/bench_unet3d.json``. Needs the extra ``memspan[peers]``.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import random
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memspan.base.files import atomic_write
from memspan.ledger import AllocatorPeak
from memspan.models.unet3d import MBConv3d, ReversibleUNet3d, soft_dice_loss
from memspan.nn.reversible import ReversibleBlock, ReversibleSequential
from memspan.recipes._unet3d_show import monai_networks

RESULT = Path(__file__).parent / "results" / "bench_unet3d.json"
CHANNELS = (16, 32, 64)


def step(network: nn.Module, x: Tensor, y: Tensor | None) -> None:
    """Forward and backward pass; gradients are new each time."""
    network.zero_grad(set_to_none=True)
    output = network(x * 1.0)  # MemCNN frees its input's storage
    loss = output.square().mean() if y is None else soft_dice_loss(output, y)
    loss.backward()  # type: ignore[no-untyped-call]


def rounds(
    networks: Mapping[str, nn.Module], x: Tensor, y: Tensor | None, count: int
) -> dict[str, list[float]]:
    """Seconds of one step of each network, in ``count`` interleaved rounds after one that warms up."""
    times: dict[str, list[float]] = {name: [] for name in networks}
    order = list(networks)
    for turn in range(count + 1):
        random.shuffle(order)
        for name in order:
            start = time.perf_counter()
            step(networks[name], x, y)
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


def compared(networks: Mapping[str, nn.Module], x: Tensor, y: Tensor | None, count: int) -> dict[str, Any]:
    """Ratios of time with quartiles, and of allocator peaks; ours is the first network."""
    times, ours = rounds(networks, x, y, count), next(iter(networks))
    peaks = {}
    for name, network in networks.items():
        network.zero_grad(set_to_none=True)
        with AllocatorPeak(x.device) as truth:
            step(network, x, y)
        peaks[name] = truth.peak
    found: dict[str, Any] = {}
    for name in list(networks)[1:]:
        ratios = [a / b for a, b in zip(times[ours], times[name], strict=True)]
        quartiles = ("lower_quartile", "median", "upper_quartile")
        told = dict(zip(quartiles, statistics.quantiles(ratios, n=4), strict=True))
        bytes_ratio = round(peaks[ours] / peaks[name], 3)
        found[f"{ours} / {name}"] = {
            "time": {key: round(value, 3) for key, value in told.items()},
            "peak_bytes": bytes_ratio,
        }
        print(f"{ours} / {name}: time {told['median']:.2f}, peak {bytes_ratio}", flush=True)
    return {"ratios": found, "peak_bytes": peaks}


def whole_networks(depth: int, size: int, count: int) -> dict[str, Any]:
    """The U-Net in its three ways, and MONAI's."""
    ours = ReversibleUNet3d(1, 3, CHANNELS, depth)
    networks: dict[str, nn.Module] = {"reversible": ours}
    for name, way in (("plain", "store"), ("torch.utils.checkpoint", "checkpoint")):
        networks[name] = copy.deepcopy(ours)
        networks[name].memory = way  # type: ignore[assignment]
    makers, why = monai_networks(CHANNELS)
    print(why or f"depth {depth}, {size}³ voxels")
    networks |= {name: make(depth) for name, make in makers.items()}
    x = torch.randn(1, 1, size, size, size)
    y = (torch.rand(1, 3, size, size, size) > 0.5).float()
    sizes = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    return {"depth": depth, "size": size, "parameters": sizes, **compared(networks, x, y, count)}


def chains(length: int, size: int, count: int) -> dict[str, Any]:
    """One chain of couplings against the libraries for reversible networks."""
    warnings.simplefilter("ignore")
    import memcnn
    import revtorch

    parts = [(MBConv3d(8), MBConv3d(8)) for _ in range(length)]
    build: dict[str, Callable[[list[tuple[nn.Module, nn.Module]]], nn.Module]] = {
        "reversible": lambda p: ReversibleSequential(*(ReversibleBlock(f, g) for f, g in p)),
        "RevTorch": lambda p: revtorch.ReversibleSequence(
            nn.ModuleList(revtorch.ReversibleBlock(f, g) for f, g in p)
        ),
        "MemCNN": lambda p: nn.Sequential(
            *(memcnn.InvertibleModuleWrapper(memcnn.AdditiveCoupling(f, g)) for f, g in p)
        ),
    }
    networks = {name: make(copy.deepcopy(parts)) for name, make in build.items()}
    print(f"chain of {length}")
    x = torch.randn(1, 16, size, size, size, requires_grad=True)
    return {"couplings": length, "size": size, **compared(networks, x, None, count)}


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="3 rounds; writes nothing")
    parser.add_argument("--rounds", type=int, default=9, help="timing rounds")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    random.seed(0)
    count = 3 if arguments.quick else arguments.rounds
    before = os.getloadavg()
    parts = (
        partial(whole_networks, 1, 32, count),
        partial(whole_networks, 3, 24, count),
        partial(chains, 6, 24, count),
    )
    settings: list[dict[str, Any]] = []
    for part in parts:
        settings.append(part())
        if not arguments.quick:  # after each setting, so that a run that is cut short leaves what it found
            write(settings, len(parts), arguments.threads, count, before)


def write(
    settings: list[dict[str, Any]], parts: int, threads: int, count: int, load: tuple[float, float, float]
) -> None:
    """Write the settings measured so far, with the machine they were measured on."""
    result = {
        "what": "median over rounds of our / the rival's seconds of a training step; below 1 ours is faster",
        "complete": len(settings) == parts,
        "environment": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "cpu_count": os.cpu_count(),
            "threads": threads,
            "device": "cpu",
            "rounds": count,
            "load_average_at_start": [round(one, 2) for one in load],
        },
        "settings": settings,
    }
    atomic_write(RESULT, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
