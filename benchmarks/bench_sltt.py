"""SLTT and our BPTT against SpikingJelly's and snnTorch's: seconds of a gradient, and saved bytes.

All ways take the gradient of one batch with the same network (conv16-BN-LIF-pool-conv32-BN-LIF-pool-linear on
28 x 28 images, direct coded; and two fully connected layers on event frames), one call each in every round,
in changing order. Time is the CPU time of one thread, which other work on the machine disturbs least. A
ratio is the median over rounds of (ours / rival) in the same round: below 1 ours is faster.

    python benchmarks/bench_sltt.py            # about 4 min on one core
    python benchmarks/bench_sltt.py --quick    # fewer rounds; writes nothing

Figures go to ``benchmarks/results/bench_sltt.json``. Needs the extra ``memspan[peers]`` and SpikingJelly.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rounds import environment, options, ratios, show, tried
from torch import nn

from memspan.base.files import atomic_write
from memspan.ledger import saved_bytes
from memspan.nn.spiking import LIF, reset_
from memspan.training import sltt

RESULT = Path(__file__).parent / "results" / "bench_sltt.json"
Neuron = Callable[[], nn.Module]


class Block(nn.Sequential):
    """Convolution, norm, neuron: what SpikingJelly's memory optimizer takes as a target."""


def conv(neuron: Neuron) -> nn.Module:
    """The convolutional network of one step."""
    return nn.Sequential(
        Block(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), neuron()),
        nn.AvgPool2d(2),
        Block(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), neuron()),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 49, 10),
    )


def dense(width: int, inputs: int) -> Callable[[Neuron], nn.Module]:
    """The fully connected network of one step."""

    def make(neuron: Neuron) -> nn.Module:
        return nn.Sequential(
            nn.Linear(inputs, width), nn.BatchNorm1d(width), neuron(),
            nn.Linear(width, width), nn.BatchNorm1d(width), neuron(), nn.Linear(width, 10),
        )  # fmt: skip

    return make


def jelly(kind: str) -> Neuron:
    """SpikingJelly's neuron with our arguments."""
    from spikingjelly.activation_based import neuron, surrogate

    return lambda: getattr(neuron, kind)(
        tau=1.1, decay_input=False, v_threshold=1.0, v_reset=None,
        surrogate_function=surrogate.PiecewiseQuadratic(), detach_reset=False,
    )  # fmt: skip


def snn() -> Neuron:
    """SnnTorch's neuron with the same leak; its own default surrogate is the arctangent."""
    import snntorch

    return lambda: snntorch.Leaky(
        beta=1 - 1 / 1.1, init_hidden=True, reset_mechanism="subtract", reset_delay=False
    )


def loss(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The reference's loss: cross-entropy, and a twentieth of a squared distance to 1."""
    return 0.95 * nn.functional.cross_entropy(out, y) + 0.05 * (out - 1).square().mean()


def by_hand(net: nn.Module, reset: Callable[[nn.Module], object], x: torch.Tensor, y: torch.Tensor) -> None:
    """A plain loop over time, as users of other libraries write it."""
    net.zero_grad(set_to_none=True)
    reset(net)
    torch.stack([loss(net(now), y) for now in x]).mean().backward()
    reset(net)


def online_by_hand(net: nn.Module, reset: Callable[[nn.Module], object], x: Any, y: torch.Tensor) -> None:
    """The loop that SpikingJelly's SLTT neurons ask for."""
    net.zero_grad(set_to_none=True)
    reset(net)
    for now in x:
        (loss(net(now), y) / len(x)).backward()
    reset(net)


def ours(net: nn.Module, step: Any, x: torch.Tensor, y: torch.Tensor) -> None:
    """One of our steps."""
    net.zero_grad(set_to_none=True)
    step(x, y)


def makers(make: Callable[[Neuron], nn.Module], x: torch.Tensor, y: torch.Tensor) -> dict[str, Any]:
    """Every way to take the gradient, each with a network of its own."""

    def mine(kind: Any, convert: bool = False, **more: Any) -> Any:
        def build() -> Any:
            torch.manual_seed(0)
            net = make(lambda: LIF(1.1))
            step = kind(sltt.convert_(net) if convert else net, loss, **more)
            return lambda: ours(net, step, x, y)

        return build

    def theirs(
        neuron: Callable[[], Neuron], reset: Callable[[nn.Module], object], loop: Any, **more: Any
    ) -> Any:
        def build() -> Any:
            torch.manual_seed(0)
            net = make(neuron())
            if more:
                net = optimized(net, x)
            return lambda: loop(net, reset, x, y)

        return build

    def multi() -> Any:
        from spikingjelly.activation_based import functional

        torch.manual_seed(0)
        net = make(jelly("LIFNode"))
        functional.set_step_mode(net, "m")
        wrapped = nn.Sequential(*(functional_layer(part) for part in net))

        def run() -> None:
            wrapped.zero_grad(set_to_none=True)
            functional.reset_net(wrapped)
            out = wrapped(x)
            torch.stack([loss(now, y) for now in out]).mean().backward()
            functional.reset_net(wrapped)

        return run

    def jelly_reset(net: nn.Module) -> None:
        from spikingjelly.activation_based import functional

        functional.reset_net(net)

    return {
        "BPTT": mine(sltt.BPTTStep),
        "SLTT": mine(sltt.OnlineStep, True),
        "SLTT-1": mine(sltt.OnlineStep, True, k=1),
        "SLTT-T/4": mine(sltt.OnlineStep, True, k=max(1, len(x) // 4)),
        "truncated, window 4": mine(sltt.TBPTTStep, window=4),
        "checkpointed": mine(sltt.CheckpointedStep),
        "SpikingJelly BPTT": theirs(lambda: jelly("LIFNode"), jelly_reset, by_hand),
        "SpikingJelly BPTT, multi-step": multi,
        "SpikingJelly SLTT": theirs(lambda: jelly("SLTTLIFNode"), jelly_reset, online_by_hand),
        "SpikingJelly memopt 1": theirs(lambda: jelly("LIFNode"), jelly_reset, by_hand, level=1),
        "snnTorch BPTT": theirs(snn, reset_, by_hand),
    }


def optimized(net: nn.Module, x: torch.Tensor) -> nn.Module:
    """A network under SpikingJelly's memory optimizer at level 1, its exact rival to SLTT."""
    from spikingjelly.activation_based import functional, memopt

    def forward(model: nn.Module) -> torch.Tensor:
        functional.reset_net(model)
        out = torch.stack([model(now) for now in x])
        functional.reset_net(model)
        return out

    found = memopt.optimize_memory(net, (Block,), forward, level=1)
    net = found[0] if isinstance(found, tuple) else found
    functional.reset_net(net)
    return net


def functional_layer(part: nn.Module) -> nn.Module:
    """A layer over (T, B, ...): SpikingJelly flattens time into the batch for what has no state."""
    from spikingjelly.activation_based import layer

    if isinstance(part, Block):
        return nn.Sequential(layer.SeqToANNContainer(part[0], part[1]), part[2])
    return part if hasattr(part, "step_mode") else layer.SeqToANNContainer(part)


def measured(
    make: Callable[[Neuron], nn.Module], x: torch.Tensor, y: torch.Tensor, rounds: int
) -> dict[str, Any]:
    """Ratios of one network."""
    ways, absent = tried(makers(make, x, y))
    times: dict[str, list[float]] = {name: [] for name in ways}
    order = list(ways)
    for turn in range(rounds + 1):
        random.shuffle(order)
        for name in order:
            begun = time.process_time()
            ways[name]()
            if turn:
                times[name].append(time.process_time() - begun)
    pairs = {f"{name} / BPTT": (name, "BPTT") for name in list(ways) + list(absent) if name != "BPTT"}
    pairs |= {
        "BPTT / SpikingJelly BPTT": ("BPTT", "SpikingJelly BPTT"),
        "BPTT / snnTorch BPTT": ("BPTT", "snnTorch BPTT"),
        "SLTT / SpikingJelly SLTT": ("SLTT", "SpikingJelly SLTT"),
    }
    medians = {name: round(1e3 * statistics.median(found), 2) for name, found in times.items()}
    return {"ratios": ratios(times, absent, pairs), "CPU milliseconds": medians} | (
        {"absent": absent} if absent else {}
    )


def kept(make: Callable[[Neuron], nn.Module], x: torch.Tensor, y: torch.Tensor) -> dict[str, int]:
    """Saved bytes of each library's graph before its backward pass."""

    def graph(neuron: Neuron, steps: torch.Tensor, optimize: bool = False) -> int:
        torch.manual_seed(0)
        net = make(neuron)
        if optimize:
            net = optimized(net, x)
        return saved_bytes(torch.stack([loss(net(now), y) for now in steps]).mean(), exclude=[x, y])

    found = {"SLTT": graph(lambda: LIF(1.1), x[:1]), "BPTT": graph(lambda: LIF(1.1), x)}
    for name, neuron, more in (
        ("SpikingJelly BPTT", lambda: jelly("LIFNode")(), {}),
        ("SpikingJelly memopt 1", lambda: jelly("LIFNode")(), {"optimize": True}),
        ("snnTorch BPTT", lambda: snn()(), {}),
    ):
        with contextlib.suppress(ImportError):
            found[name] = graph(neuron, x, **more)
    return found


def main() -> None:
    """Measure both networks and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="3 rounds; writes nothing")
    parser.add_argument("--rounds", type=int, default=11)
    arguments = options(parser, RESULT)
    rounds = 3 if arguments.quick else arguments.rounds
    torch.set_num_threads(1)
    random.seed(0)
    torch.manual_seed(0)
    y = torch.arange(64) % 10
    images = torch.rand(64, 1, 28, 28)
    found: dict[str, Any] = {}
    for T in (16,) if arguments.quick else (16, 4):
        x = images.expand(T, *images.shape)
        found[f"convolutional, T = {T}, batch 64"] = measured(conv, x, y, rounds)
        found[f"convolutional, T = {T}, batch 64"]["saved bytes"] = kept(conv, x, y)
    for width, inputs, T, size in ((128, 256, 10, 64), (96, 64, 50, 64), (512, 256, 10, 256)):
        x = (torch.rand(T, size, inputs) < 0.12).float()
        name = f"fully connected {inputs}-{width}-{width}, T = {T}, batch {size}"
        found[name] = measured(dense(width, inputs), x, torch.arange(size) % 10, rounds)
    print(json.dumps(found, indent=1))
    show(found)
    if arguments.quick:
        return
    result = {
        "what": "seconds of one batch's gradient, interleaved; below 1 the first of the pair is faster",
        "threads": 1,
        "rounds": rounds,
        "environment": environment(),
        "found": found,
    }
    atomic_write(arguments.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
