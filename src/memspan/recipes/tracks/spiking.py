"""Spiking networks on digits: data as spikes, the networks, the loss, and the other libraries' neurons.

A network is made from a function that gives a layer of neurons, so that all libraries run the same one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memspan import data
from memspan.base.rng import rng
from memspan.data.features import cache_features
from memspan.data.spikes import audio_to_spikes, image_to_events
from memspan.nn.spiking import reset_

__all__ = [
    "Block", "Case", "by_hand", "conv", "dense", "events", "images", "jelly", "jelly_there", "loss",
    "mixed", "optimized", "ottt", "snntorch", "sounds", "wave",
]  # fmt: skip

Neuron: TypeAlias = Callable[[], nn.Module]
Make: TypeAlias = Callable[[Neuron], nn.Module]


class Case(NamedTuple):
    """Data of one part: inputs (N, T, ...), labels, and the network of one step."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    make: Make
    epochs: int


def images(digits: data.ImageSet, train: int, test: int, steps: int, width: int, epochs: int) -> Case:
    """Pixels fed unchanged at every step; the sequence holds no bytes beyond the image."""
    x, x_test = (
        torch.from_numpy(part).float().div(255)[:, None, None].expand(-1, steps, 1, *part.shape[1:])
        for part in (digits.x_train[:train], digits.x_test[:test])
    )
    y, y_test = (torch.from_numpy(part) for part in (digits.y_train[:train], digits.y_test[:test]))
    return Case(x, y, x_test, y_test, partial(conv, width=width), epochs)


def events(digits: data.ImageSet, train: int, test: int, epochs: int) -> Case:
    """ON events of the middle 16 x 16 pixels, 50 steps counted in 10."""

    def encode(pictures: Any) -> Tensor:
        found = image_to_events(pictures)[:, :, 6:22, 6:22, 0]
        return torch.from_numpy(found.reshape(len(found), 10, 5, 256).sum(2, dtype=np.uint8))

    # a package's test part is small: more test digits are then training digits that are not trained on
    x = np.concatenate([digits.x_train[:train], digits.x_test, digits.x_train[train:]])[: train + test]
    y = np.concatenate([digits.y_train[:train], digits.y_test, digits.y_train[train:]])[: train + test]
    key = {"events": digits.sha256, "train": train, "test": test, "labels": y[:64].tolist()}
    found = cache_features(encode, (x[i : i + 500] for i in range(0, len(x), 500)), key).float()
    labels = torch.from_numpy(y)
    return Case(found[:train], labels[:train], found[train:], labels[train:], dense, epochs)


def mixed(digits: data.ImageSet) -> data.ImageSet:
    """The set, in an order drawn once where a package keeps it sorted by class: the first rows are used."""
    if (np.diff(digits.y_train) < 0).any():
        return digits
    order, other = (
        rng("spiking", "digits", len(y)).permutation(len(y)) for y in (digits.y_train, digits.y_test)
    )
    return replace(
        digits, x_train=digits.x_train[order], y_train=digits.y_train[order],
        x_test=digits.x_test[other], y_test=digits.y_test[other],
    )  # fmt: skip


def sounds(clips: data.ArraySet, train: int, epochs: int) -> Case:
    """Spoken digits as spikes of 64 bands in 50 steps; the set's own split, training clips drawn once."""

    def encode(rows: Any) -> Tensor:
        return torch.stack([torch.from_numpy(audio_to_spikes(wave(clips, i), 8000, steps=50)) for i in rows])

    order = rng("spiking", "clips").permutation(np.flatnonzero(~clips["test"]))[:train]
    rows = np.concatenate([order, np.flatnonzero(clips["test"])])
    key = {"sounds": clips.sha256, "steps": 50, "rows": rows.tolist()}
    x = cache_features(encode, (rows[i : i + 100] for i in range(0, len(rows), 100)), key).float()
    y, n = torch.from_numpy(clips["label"][rows]), len(order)
    return Case(x[:n], y[:n], x[n:], y[n:], partial(dense, inputs=64, width=96), epochs)


def loss(out: Tensor, y: Tensor) -> Tensor:
    """The reference's: cross-entropy, and a twentieth of a squared distance to 1."""
    return 0.95 * F.cross_entropy(out, y) + 0.05 * (out - 1).square().mean()


def conv(neuron: Callable[[], nn.Module], width: int = 16) -> nn.Module:
    """Two convolutions with norms and neurons, on 28 x 28 pixels."""
    return nn.Sequential(
        Block(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), neuron()), nn.AvgPool2d(2),
        Block(nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), neuron()),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(2 * width * 49, 10),
    )  # fmt: skip


def dense(neuron: Callable[[], nn.Module], inputs: int = 256, width: int = 128) -> nn.Module:
    """Two fully connected layers with norms and neurons."""
    return nn.Sequential(
        nn.Linear(inputs, width), nn.BatchNorm1d(width), neuron(),
        nn.Linear(width, width), nn.BatchNorm1d(width), neuron(), nn.Linear(width, 10),
    )  # fmt: skip


class Block(nn.Sequential):
    """Convolution, norm, neuron: what SpikingJelly's memory optimizer recomputes."""


def wave(clips: data.ArraySet, row: int) -> np.ndarray[Any, Any]:
    """Samples of a clip, -1 to 1, out of their mu-law code."""
    begin, end = clips["offset"][row : row + 2]
    code = clips["mulaw"][begin:end] * (2 / 255) - 1
    return np.asarray(np.sign(code) * (256 ** np.abs(code) - 1) / 255)


def by_hand(net: nn.Module, x: Tensor, y: Tensor, online: bool) -> None:
    """The loops that users of other libraries write."""
    reset_(net)
    if online:
        for now in x.unbind(1):
            (loss(net(now), y) / x.shape[1]).backward()  # type: ignore[no-untyped-call]
    else:
        torch.stack([loss(net(now), y) for now in x.unbind(1)]).mean().backward()  # type: ignore[no-untyped-call]
    reset_(net)


def jelly(kind: str, tau: float = 1.1) -> Callable[[], nn.Module]:
    """SpikingJelly's neuron with our arguments."""
    from spikingjelly.activation_based import neuron, surrogate

    return lambda: getattr(neuron, kind)(
        tau=tau, decay_input=False, v_threshold=1.0, v_reset=None,
        surrogate_function=surrogate.PiecewiseQuadratic(), detach_reset=False,
    )  # fmt: skip


def snntorch() -> Callable[[], nn.Module]:
    """SnnTorch's neuron with the same leak and its own surrogate."""
    import snntorch as library

    return lambda: library.Leaky(beta=1 - 1 / 1.1, init_hidden=True, reset_delay=False)


def optimized(net: nn.Module, x: Tensor, T: int) -> nn.Module:
    """A network under SpikingJelly's memory optimizer at level 1: exact gradients, its answer to memory."""
    from spikingjelly.activation_based import memopt

    def forward(model: nn.Module) -> None:
        for _ in range(T):
            model(x)
        reset_(model)

    found = memopt.optimize_memory(net, (Block,), forward, level=1)
    return reset_(found[0] if isinstance(found, tuple) else found)


def jelly_there(note: Callable[[str], None]) -> bool:
    """Whether SpikingJelly and snnTorch can be imported; told once where not."""
    try:
        import snntorch  # noqa: F401
        import spikingjelly.activation_based.neuron  # noqa: F401
    except ImportError as error:
        note(f"rows of SpikingJelly and snnTorch are left out: {error}")
        return False
    return True


def ottt(make: Make, tau: float) -> tuple[nn.Module, Callable[[Tensor, Tensor], None]]:
    """Online training through time by SpikingJelly: traces of the input instead of a graph."""
    from spikingjelly.activation_based import layer

    net = layer.OTTTSequential(*make(jelly("OTTTLIFNode", tau)).children())

    def step(x: Tensor, y: Tensor) -> None:
        by_hand(net.train(), x, y, online=True)

    return net, step
