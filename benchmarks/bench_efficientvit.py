"""Throughput of EfficientViT, as ratios to named networks on the same images in the same rounds.

First, the same arithmetic: memspan's networks against timm's ``efficientvit_m0`` to ``m5`` with equal
weights, as trained and with fused norms, and a training step of M0. Second, other architectures, each at
its best here: norms folded, re-parametrised branches merged. All networks run in each round, in changing
order; a ratio is the median over rounds of (rival / ours) in the same round, so above 1 ours is faster.
Weights are random, which changes no time.

    python benchmarks/bench_efficientvit.py            # about 4 min on two cores
    python benchmarks/bench_efficientvit.py --quick    # fewer rounds, M0 and M5 alone; writes nothing

Figures go to ``benchmarks/results/bench_efficientvit.json``. Needs the extra ``memspan[peers]``.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import random
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rounds import environment, interleaved, ratio
from torch import nn

from memspan.base.files import atomic_write
from memspan.ledger import macs, nbytes
from memspan.models import efficientvit
from memspan.recipes._efficientvit_networks import RIVALS, deit_tiny, fuse_parts

RESULT = Path(__file__).parent / "results" / "bench_efficientvit.json"
NEWER = ("MobileNetV3-Large (timm)", "MobileNetV4-conv-S (timm)", "RepViT-M0.9 (timm)", "plain ViT (DeiT-Ti)")
AGAINST = {"m5": NEWER, "m2": ("MobileViT-XXS (timm)",)}


def peers() -> Callable[..., nn.Module]:
    """Give timm's factory; beside CPU torch its import needs what the tests declare for torchvision."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from torchvision_schemas import import_torchvision

    import_torchvision()
    import timm

    return timm.create_model


@torch.inference_mode()
def passes(networks: Mapping[str, nn.Module], batch: int, count: int) -> dict[str, list[float]]:
    """Seconds of one forward pass of each network, in ``count`` interleaved rounds after two that warm up."""
    x = torch.randn(batch, 3, 224, 224)
    return interleaved({name: functools.partial(one, x) for name, one in networks.items()}, count, warm=2)


def same_arithmetic(
    create: Callable[..., nn.Module], names: list[str], batch: int, count: int
) -> dict[str, Any]:
    """Ours against timm's, equal weights."""
    found = {}
    for name in names:
        ours = getattr(efficientvit, f"efficientvit_{name}")().eval()
        theirs = create(f"efficientvit_{name}").eval()
        theirs.load_state_dict(ours.state_dict())
        networks = {"ours": ours, "ours fused": efficientvit.fuse_(copy.deepcopy(ours)),
                    "timm": theirs, "timm fused": fuse_parts(copy.deepcopy(theirs))}  # fmt: skip
        times = passes(networks, batch, count)
        found[name] = {
            "fused / timm not fused": ratio(times["timm"], times["ours fused"]),
            "fused / timm fused": ratio(times["timm fused"], times["ours fused"]),
            "not fused / timm not fused": ratio(times["timm"], times["ours"]),
        }
        print(
            f"batch {batch:2} {name}",
            {pair: told["median"] for pair, told in found[name].items()},
            flush=True,
        )
    return found


def training_step(create: Callable[..., nn.Module], count: int) -> dict[str, float]:
    """Forward and backward of M0 with 16 images, ours against timm's."""
    networks = {"ours": efficientvit.efficientvit_m0().train(), "timm": create("efficientvit_m0").train()}
    x = torch.randn(16, 3, 224, 224)

    def step(network: nn.Module) -> None:
        network(x).square().mean().backward()

    times = interleaved({name: functools.partial(step, one) for name, one in networks.items()}, count)
    found = ratio(times["timm"], times["ours"])
    print("training step", found["median"], flush=True)
    return found


def architectures(create: Callable[..., nn.Module], batch: int, count: int) -> dict[str, Any]:
    """M5 and M2 against the networks that the paper names, and newer ones."""
    networks = {label: fuse_parts(create(name).eval()) for label, name in RIVALS.items()}
    networks["plain ViT (DeiT-Ti)"] = deit_tiny().eval()
    for name in AGAINST:
        networks[name] = efficientvit.fuse_(getattr(efficientvit, f"efficientvit_{name}")().eval())
    x = torch.zeros(1, 3, 224, 224)
    sizes = {label: {"million_macs": round(macs(network, x) / 1e6, 1), "weight_bytes": nbytes(network)}
             for label, network in networks.items()}  # fmt: skip
    times = passes(networks, batch, count)
    ratios = {
        f"{ours} / {rival}": ratio(times[rival], times[ours])
        for ours, rivals in AGAINST.items()
        for rival in rivals
    }
    print(f"batch {batch:2}", {pair: told["median"] for pair, told in ratios.items()}, flush=True)
    return {"ratios": ratios, "networks": sizes}


def main() -> None:
    """Measure every setting and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="5 rounds, M0 and M5 alone; writes nothing")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2], help="torch threads")
    parser.add_argument("--rounds", type=int, nargs=2, default=[21, 9], help="at 1 and at 16 images")
    arguments = parser.parse_args()
    quick = arguments.quick
    create = peers()
    random.seed(0)
    names = ["m0", "m5"] if quick else [f"m{i}" for i in range(6)]
    settings: list[dict[str, Any]] = []
    for thread in arguments.threads:
        torch.set_num_threads(thread)
        for batch in (1, 16):
            count = 5 if quick else arguments.rounds[batch > 1]
            setting = {"threads": thread, "batch": batch, "rounds": count}
            settings.append(setting)
            setting["same arithmetic"] = same_arithmetic(create, names, batch, count)
            setting["other architectures"] = architectures(create, batch, count)
            if batch > 1:
                setting["training step of m0, timm / ours"] = training_step(create, count)
            if not quick:
                write(settings)  # after each setting, so that a run that is cut short leaves what it found


def write(settings: list[dict[str, Any]]) -> None:
    """Write the settings measured so far, with the machine they were measured on."""
    result = {
        "what": "median over rounds of rival / our seconds of a pass at 224 pixels; above 1 ours is faster",
        "complete": len(settings) == 2 * len({setting["threads"] for setting in settings}),
        "environment": environment(timm=__import__("timm").__version__),
        "settings": settings,
    }
    atomic_write(RESULT, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
