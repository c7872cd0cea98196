"""Throughput of EfficientViT, as ratios to named networks on the same images in the same rounds.

First, the same arithmetic: memspan's networks against timm's ``efficientvit_m0`` to ``m5`` with equal
weights, as trained and with fused norms, and a training step of M0. Second, other architectures, each at
its best here: norms folded, re-parametrised branches merged. All networks run in each round, in changing
order; a ratio is the median over rounds of (rival / ours) in the same round, so above 1 ours is faster.
Weights are random, which changes no time.

    python benchmarks/bench_efficientvit.py            # about 4 min on two cores
    python benchmarks/bench_efficientvit.py --quick    # fewer rounds, M0 and M5 alone; writes nothing

On a GPU (``--device cuda``, under 40 s) all networks see 256 images, in float32 and in float16.

Figures go to ``benchmarks/results/bench_efficientvit.json``, a GPU's to ``bench_efficientvit_cuda.json``.
Needs the extra ``memspan[peers]``.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import random
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rounds import Way, environment, interleaved, options, ratios, reason, show, torchvision_ready, tried
from torch import nn

from memspan.base.files import atomic_write
from memspan.ledger import macs, nbytes
from memspan.models import efficientvit
from memspan.recipes._efficientvit_networks import RIVALS, deit_tiny, fuse_parts

RESULT = Path(__file__).parent / "results" / "bench_efficientvit.json"
NEWER = ("MobileNetV3-Large (timm)", "MobileNetV4-conv-S (timm)", "RepViT-M0.9 (timm)", "plain ViT (DeiT-Ti)")
LIMIT = 3.0  # seconds of rounds of one comparison on a GPU, after which no further round begins
AGAINST = {"m5": NEWER, "m2": ("MobileViT-XXS (timm)",)}


def peers() -> Callable[..., nn.Module]:
    """Give timm's factory."""
    torchvision_ready()
    import timm

    return timm.create_model


@dataclass(frozen=True)
class Place:
    """Where networks run, and on what: device, dtype, images, rounds."""

    device: str
    dtype: torch.dtype
    batch: int
    count: int

    def put(self, network: nn.Module) -> nn.Module:
        return network.to(self.device, self.dtype)

    @property
    def images(self) -> torch.Tensor:
        return torch.randn(self.batch, 3, 224, 224, device=self.device, dtype=self.dtype)


@torch.inference_mode()
def passes(
    networks: Mapping[str, Callable[[], nn.Module]], place: Place
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of one forward pass of each network, in interleaved rounds after two that warm up.

    Also which networks do not run here, and why.
    """
    x = place.images

    def of(make: Callable[[], nn.Module]) -> Way:
        with torch.inference_mode(mode=False):  # where arithmetic can be counted
            network = place.put(make())
        return functools.partial(network, x)

    ways, absent = tried({name: functools.partial(of, one) for name, one in networks.items()}, place.device)
    limit = None if place.device == "cpu" else LIMIT
    return interleaved(ways, place.count, 2, place.device, limit), absent


def same_arithmetic(create: Callable[..., nn.Module], names: list[str], place: Place) -> dict[str, Any]:
    """Ours against timm's, equal weights."""
    found = {}
    for name in names:
        ours = getattr(efficientvit, f"efficientvit_{name}")().eval()
        theirs = create(f"efficientvit_{name}").eval()
        theirs.load_state_dict(ours.state_dict())
        networks: dict[str, nn.Module] = {
            "ours": ours,
            "ours fused": efficientvit.fuse_(copy.deepcopy(ours)),
            "timm": theirs,
            "timm fused": fuse_parts(copy.deepcopy(theirs)),
        }
        times, absent = passes({label: lambda one=one: one for label, one in networks.items()}, place)
        pairs = {
            "fused / timm not fused": ("timm", "ours fused"),
            "fused / timm fused": ("timm fused", "ours fused"),
            "not fused / timm not fused": ("timm", "ours"),
        }
        found[name] = ratios(times, absent, pairs)
        print(f"batch {place.batch:2} {name}", medians(found[name]), flush=True)
    return found


def medians(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {pair: told.get("median", told.get("error")) for pair, told in found.items()}


def training_step(create: Callable[..., nn.Module], place: Place) -> dict[str, Any]:
    """Forward and backward of M0, ours against timm's."""
    x = place.images

    def step(network: nn.Module) -> None:
        network(x).square().mean().backward()

    makers = {"ours": efficientvit.efficientvit_m0, "timm": functools.partial(create, "efficientvit_m0")}
    ways, absent = tried(
        {
            name: lambda make=make: functools.partial(step, place.put(make().train()))
            for name, make in makers.items()
        },
        place.device,
    )
    times = interleaved(ways, place.count, device=place.device)
    found = ratios(times, absent, {"timm / ours": ("timm", "ours")})["timm / ours"]
    print("training step", found.get("median", found.get("error")), flush=True)
    return found


def architectures(create: Callable[..., nn.Module], place: Place) -> dict[str, Any]:
    """M5 and M2 against the networks that the paper names, and newer ones."""
    x = torch.zeros(1, 3, 224, 224)
    sizes: dict[str, dict[str, Any]] = {}

    def sized(label: str, make: Callable[[], nn.Module]) -> nn.Module:
        network = make().eval()
        sizes[label] = {
            "million_macs": round(macs(network, x) / 1e6, 1),
            "weight_bytes": nbytes(network),
        }
        return network

    makers: dict[str, Callable[[], nn.Module]] = {
        label: lambda name=name: fuse_parts(create(name).eval())  # type: ignore[misc]
        for label, name in RIVALS.items()
    }
    makers["plain ViT (DeiT-Ti)"] = deit_tiny
    for name in AGAINST:
        build = getattr(efficientvit, f"efficientvit_{name}")
        makers[name] = lambda build=build: efficientvit.fuse_(build().eval())  # type: ignore[misc]
    networks = {label: functools.partial(sized, label, make) for label, make in makers.items()}
    times, absent = passes(networks, place)
    pairs = {f"{ours} / {rival}": (rival, ours) for ours, rivals in AGAINST.items() for rival in rivals}
    found = ratios(times, absent, pairs)
    print(f"batch {place.batch:2}", medians(found), flush=True)
    rates = {label: round(place.batch / statistics.median(spent), 1) for label, spent in times.items()}
    more = {} if place.device == "cpu" else {"images_per_second": rates}
    return {"ratios": found, "networks": sizes, **more}


def main() -> None:
    """Measure every setting and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="5 rounds, M0 and M5 alone; writes nothing")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2], help="torch threads")
    parser.add_argument("--rounds", type=int, nargs=2, default=[21, 9], help="at 1 and at 16 images")
    arguments = options(parser, RESULT)
    quick = arguments.quick
    create = peers()
    random.seed(0)
    names = ["m0", "m5"] if quick else [f"m{i}" for i in range(6)]
    settings: list[dict[str, Any]] = []
    if arguments.device == "cuda":
        on_gpu(create, names, arguments.out, quick)
        return
    for thread in arguments.threads:
        torch.set_num_threads(thread)
        for batch in (1, 16):
            count = 5 if quick else arguments.rounds[batch > 1]
            setting = {"threads": thread, "batch": batch, "rounds": count}
            settings.append(setting)
            place = Place("cpu", torch.float32, batch, count)
            setting["same arithmetic"] = same_arithmetic(create, names, place)
            setting["other architectures"] = architectures(create, place)
            if batch > 1:
                setting["training step of m0, timm / ours"] = training_step(create, place)
            if not quick:
                complete = len(settings) == 2 * len({setting["threads"] for setting in settings})
                write(
                    arguments.out, "cpu", settings, complete
                )  # after each setting, so that a run that is cut short leaves what it found


def on_gpu(create: Callable[..., nn.Module], names: list[str], out: Path, quick: bool) -> None:
    """Both dtypes at 256 images, and a table."""
    settings: list[dict[str, Any]] = []
    dtypes = (torch.float32, torch.float16)
    for dtype in dtypes:
        place = Place("cuda", dtype, 256, 5 if quick else 15)
        setting: dict[str, Any] = {
            "dtype": str(dtype).removeprefix("torch."),
            "batch": place.batch,
            "rounds": place.count,
            "memory format": "channels first",
        }
        settings.append(setting)
        parts: dict[str, Callable[[], Any]] = {
            "other architectures": functools.partial(architectures, create, place),
            "same arithmetic": functools.partial(same_arithmetic, create, names, place),
            "training step of m0, timm / ours": functools.partial(training_step, create, place),
        }
        for label, part in parts.items():
            try:
                setting[label] = part()
            except Exception as error:
                setting[label] = {"error": reason(error)}
            torch.cuda.empty_cache()
            if not quick:
                write(out, "cuda", settings, len(settings) == len(dtypes) and len(setting) == 4 + len(parts))
    print("rival / our seconds, above 1 ours is faster: median (quartiles)")
    show(settings)


def write(out: Path, device: str, settings: list[dict[str, Any]], complete: bool) -> None:
    """Write the settings measured so far, with the machine they were measured on."""
    result = {
        "what": "median over rounds of rival / our seconds of a pass at 224 pixels; above 1 ours is faster",
        "complete": complete,
        "environment": environment(device, timm=__import__("timm").__version__),
        "settings": settings,
    }
    atomic_write(out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
