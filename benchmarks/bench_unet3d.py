"""Time and peak bytes of a training step of the reversible 3-D U-Net, as ratios to named rivals.

The same network with the same weights runs reversibly, plainly and with ``torch.utils.checkpoint`` around
each coupling; MONAI's U-Net of as many parameters runs as it is and checkpointed (its ``CheckpointUNet``
where the installed MONAI has it, else ``checkpoint`` around each of its residual units); RevTorch and MemCNN
run a chain of the same couplings. All run in each round, in changing order; a ratio is the median over
rounds of ours / rival in the same round, so below 1 ours is faster.

    python benchmarks/bench_unet3d.py            # about 3 min on two cores
    python benchmarks/bench_unet3d.py --quick    # 3 rounds; writes nothing

On a GPU (``--device cuda``, under 40 s) patches are larger; a comparison ends after some seconds, with the
rounds it has.

Figures go to ``benchmarks/results/bench_unet3d.json``, a GPU's to ``bench_unet3d_cuda.json``.
Needs the extra ``memspan[peers]``.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import random
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rounds import hardware, interleaved, options, peak_bytes, ratio, reason, show, tried
from torch import Tensor, nn

from memspan.base.files import atomic_write
from memspan.models.unet3d import MBConv3d, ReversibleUNet3d, soft_dice_loss
from memspan.nn.reversible import ReversibleBlock, ReversibleSequential
from memspan.recipes._unet3d_show import monai_networks

RESULT = Path(__file__).parent / "results" / "bench_unet3d.json"
CHANNELS = (16, 32, 64)
LIMIT = 7.0  # seconds of rounds of one comparison on a GPU, after which no further round begins


def step(network: nn.Module, x: Tensor, y: Tensor | None) -> None:
    """Forward and backward pass; gradients are new each time."""
    network.zero_grad(set_to_none=True)
    output = network(x * 1.0)  # MemCNN frees its input's storage
    loss = output.square().mean() if y is None else soft_dice_loss(output, y)
    loss.backward()  # type: ignore[no-untyped-call]


def compared(
    networks: Mapping[str, Callable[[], nn.Module]], x: Tensor, y: Tensor | None, count: int
) -> dict[str, Any]:
    """Ratios of time with quartiles, and of allocator peaks; ours is the first network."""
    device, ours = x.device.type, next(iter(networks))
    made: dict[str, nn.Module] = {}

    def of(name: str, make: Callable[[], nn.Module]) -> Callable[[], object]:
        made[name] = make().to(device)
        return partial(step, made[name], x, y)

    ways, absent = tried({name: partial(of, name, make) for name, make in networks.items()}, device)
    times = interleaved(ways, count, device=device, limit=LIMIT if device == "cuda" else None)
    peaks = {}
    for name, way in ways.items():
        made[name].zero_grad(set_to_none=True)
        peaks[name] = peak_bytes(way, device)
    found: dict[str, Any] = {}
    for name in list(networks)[1:]:
        if why := absent.get(ours) or absent.get(name):
            found[f"{ours} / {name}"] = {"error": why}
            continue
        told, bytes_ratio = ratio(times[ours], times[name]), round(peaks[ours] / peaks[name], 3)
        found[f"{ours} / {name}"] = {"time": told, "peak_bytes": bytes_ratio}
        print(f"{ours} / {name}: time {told['median']:.2f}, peak {bytes_ratio}", flush=True)
    more = {"rounds": len(next(iter(times.values()), []))} if device == "cuda" else {}
    return {"ratios": found, "peak_bytes": peaks, **more}


def whole_networks(depth: int, size: int, count: int, device: str = "cpu", batch: int = 1) -> dict[str, Any]:
    """The U-Net in its three ways, and MONAI's."""
    ours = ReversibleUNet3d(1, 3, CHANNELS, depth)
    networks: dict[str, nn.Module] = {"reversible": ours}
    for name, way in (("plain", "store"), ("torch.utils.checkpoint", "checkpoint")):
        networks[name] = copy.deepcopy(ours)
        networks[name].memory = way  # type: ignore[assignment]
    makers, why = monai_networks(CHANNELS, 1, 3)
    print(why or f"depth {depth}, {size}³ voxels")
    networks |= {name: make(depth) for name, make in makers.items()}
    x = torch.randn(batch, 1, size, size, size, device=device)
    y = (torch.rand(batch, 3, size, size, size, device=device) > 0.5).float()
    sizes = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    more = {} if device == "cpu" else {"batch": batch, "absent": why}
    found = compared({name: lambda one=one: one for name, one in networks.items()}, x, y, count)
    return {"depth": depth, "size": size, **more, "parameters": sizes, **found}


def revtorch_chain(parts: list[tuple[nn.Module, nn.Module]]) -> nn.Module:
    import revtorch

    return revtorch.ReversibleSequence(nn.ModuleList(revtorch.ReversibleBlock(f, g) for f, g in parts))


def memcnn_chain(parts: list[tuple[nn.Module, nn.Module]]) -> nn.Module:
    import memcnn

    return nn.Sequential(*(memcnn.InvertibleModuleWrapper(memcnn.AdditiveCoupling(f, g)) for f, g in parts))


def chains(length: int, size: int, count: int, device: str = "cpu") -> dict[str, Any]:
    """One chain of couplings against the libraries for reversible networks."""
    warnings.simplefilter("ignore")
    parts = [(MBConv3d(8), MBConv3d(8)) for _ in range(length)]
    build: dict[str, Callable[[list[tuple[nn.Module, nn.Module]]], nn.Module]] = {
        "reversible": lambda p: ReversibleSequential(*(ReversibleBlock(f, g) for f, g in p)),
        "RevTorch": revtorch_chain,
        "MemCNN": memcnn_chain,
    }
    networks = {name: lambda make=make: make(copy.deepcopy(parts)) for name, make in build.items()}
    print(f"chain of {length}")
    x = torch.randn(1, 16, size, size, size, device=device, requires_grad=True)
    return {"couplings": length, "size": size, **compared(networks, x, None, count)}


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="3 rounds; writes nothing")
    parser.add_argument("--rounds", type=int, help="timing rounds; default 9, on a GPU 15")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--size", type=int, help="voxels along a side of the first network's patch, on a GPU")
    arguments = options(parser, RESULT)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    random.seed(0)
    gpu = arguments.device == "cuda"
    count = 3 if arguments.quick else arguments.rounds or (15 if gpu else 9)
    before = os.getloadavg()
    parts = [
        partial(whole_networks, 1, 32, count),
        partial(whole_networks, 3, 24, count),
        partial(chains, 6, 24, count),
    ]
    if gpu:  # the last fills the GPU at one image
        parts = [
            partial(whole_networks, 1, arguments.size or 96, count, "cuda", 2),
            partial(whole_networks, 3, 64, count, "cuda", 2),
            partial(chains, 6, 96, count, "cuda"),
        ]
    settings: list[dict[str, Any]] = []
    for part in parts:
        try:
            settings.append(part())
        except Exception as error:
            if not gpu:
                raise
            settings.append({"setting": str(part.args), "error": reason(error)})
        if gpu:
            torch.cuda.empty_cache()
        if not arguments.quick:  # after each setting, so that a run that is cut short leaves what it found
            write(arguments, settings, len(parts), count, before)
    print("our / the rival's seconds, below 1 ours is faster: median (quartiles)")
    show(settings)


def write(
    asked: argparse.Namespace,
    settings: list[dict[str, Any]],
    parts: int,
    count: int,
    load: tuple[float, float, float],
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
            "threads": asked.threads,
            **hardware(asked.device),
            "rounds": count,
            "load_average_at_start": [round(one, 2) for one in load],
        },
        "settings": settings,
    }
    atomic_write(asked.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
