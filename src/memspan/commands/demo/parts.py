"""What the demo does, part by part; each gives plain values that the terminal and the page show alike."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy, pad
from torch.optim import AdamW, Optimizer

from memspan import data
from memspan.data import HashingEmbedder
from memspan.ledger import Ledger, load_model, plan, training_step
from memspan.ledger.shapes import Llama, LlamaShape
from memspan.recall import Hit, Memory
from memspan.training import linear_probe_, peqa

__all__ = [
    "BUDGET", "KINDS", "Held", "Learned", "Moment", "Step", "does_it_fit", "does_it_learn", "is_it_true",
    "remember", "sentence",
]  # fmt: skip

BUDGET = 24 * 2**30
#: Ledger categories as a newcomer names them.
KINDS = {
    "weights": ("parameters", "buffers"),
    "gradients": ("gradients",),
    "optimizer": ("optimizer_state", "temporaries.optimizer"),
    "activations": ("saved_activations", "temporaries", "inputs"),
}


class Held(NamedTuple):
    """One way to write a training step: what it holds at its peak, by kind."""

    name: str
    total: int
    kinds: dict[str, int]


class Step(NamedTuple):
    """Bytes at the peak of one step: planned before it, counted in it, and as the allocator tells."""

    numbers: int
    planned: int
    counted: int
    allocator: int


class Learned(NamedTuple):
    """A way to train: accuracy of each seed, bytes at the peak of a step, numbers that it trained."""

    name: str
    accuracy: tuple[float, ...]
    held: int
    trained: int

    @property
    def mean(self) -> float:
        """Mean accuracy over the seeds."""
        return sum(self.accuracy) / len(self.accuracy)


class Moment(NamedTuple):
    """Something that happens to a memory: what was said or asked, what came back, and why."""

    clock: str
    what: str
    text: str
    found: str = ""
    why: str = ""


def does_it_fit() -> list[Held]:
    """A 7-billion-parameter Llama, one example of 2,048 tokens, AdamW: three ways, none of them run."""
    made = load_model("llama-7b", batch=1, tokens=2048)
    one_by_one = functools.partial(AdamW, foreach=False)
    rows = []
    for name, methods in (
        ("as one would write it", []),
        ("PEQA, 4 bits", ["peqa"]),
        ("PEQA + checkpointing", ["peqa", "checkpoint"]),
    ):
        told = plan(made.build_model, made.batch, one_by_one, methods, device="cuda")
        kinds = dict.fromkeys(KINDS, 0)
        for category, size in told.by_category.items():
            kinds[_kind(category)] += size
        rows.append(Held(name, told.total, kinds))
    return rows


def sentence(plain: Held) -> str:
    """What the first bar says, in words.

    Example:
        >>> sentence(Held("", 101 * 2**30, {"weights": 25 * 2**30, "optimizer": 51 * 2**30}))
        "77 GiB too much; half of what it holds is the optimizer's"
    """
    share = plain.kinds["optimizer"] / plain.total
    part = "half" if 0.45 < share < 0.55 else f"{share:.0%}"
    return f"{(plain.total - BUDGET) / 2**30:.0f} GiB too much; {part} of what it holds is the optimizer's"


def is_it_true() -> Step:
    """The second step of a small Llama on the CPU, planned, counted and asked of the allocator."""
    shape = LlamaShape(vocabulary=512, width=128, layers=4, heads=4, inner=344, longest=64)
    torch.manual_seed(0)
    model = Llama(shape)
    ids = torch.randint(512, (8, 64))
    batch = {"input_ids": ids, "labels": ids.clone()}
    planned = plan(functools.partial(Llama, shape), batch, AdamW).total
    optimizer = AdamW(model.parameters())
    training_step(model, optimizer, batch)
    with Ledger(model, optimizer, inputs=batch, allocator=True) as led:
        training_step(model, optimizer, batch)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    return Step(numbers, planned, led.peak.total, led.peak.allocator or 0)


def does_it_learn(seeds: int = 3, tell: Callable[[str], None] = lambda _: None) -> list[Learned]:
    """A network that reads digits meets them lying on their side, and is trained on in several ways.

    The learning rates are those that did best on validation digits, out of three each.
    """
    images = data.load_first(("mnist-5k", "digits"), data.ImageSet)
    x, x_test = (_pixels(part) for part in (images.x_train, images.x_test))
    y, y_test = torch.from_numpy(images.y_train), torch.from_numpy(images.y_test)
    side = [part.view(-1, 16, 16).rot90(1, (1, 2)).flatten(1).contiguous() for part in (x, x_test)]
    found: dict[str, list[tuple[float, int, int]]] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # layers of this size are slower on two
    try:
        for seed in range(seeds):
            torch.manual_seed(seed)
            upright = _network()
            _train(upright, AdamW(upright.parameters(), lr=1e-3), x, y, seed)
            for name, way in _WAYS.items():
                tell(f"{name}, seed {seed}")
                model = _network()
                model.load_state_dict(upright.state_dict())
                optimizer = way(model)
                held = _train(model, optimizer, side[0], y, seed)
                trained = (
                    0 if optimizer is None else sum(p.numel() for p in model.parameters() if p.requires_grad)
                )
                with torch.no_grad():
                    right = (model(side[1]).argmax(dim=1) == y_test).float().mean()
                found.setdefault(name, []).append((float(right), held, trained))
    finally:
        torch.set_num_threads(threads)
    return [
        Learned(name, tuple(one[0] for one in runs), runs[0][1], runs[0][2]) for name, runs in found.items()
    ]


def remember() -> list[Moment]:
    """Three sentences are told; an hour later they are asked for, one is corrected, and one is forgotten."""
    nine = datetime(2026, 1, 5, 9, 0, tzinfo=UTC)
    ten = nine + timedelta(hours=1)
    told = [
        "My flight to Lisbon leaves on Friday at seven.",
        "I am allergic to peanuts.",
        "My daughter Mia starts school in September.",
    ]
    moments = []
    with (
        tempfile.TemporaryDirectory() as folder,
        Memory(Path(folder) / "memory.db", user="you", embedder=HashingEmbedder()) as memory,
    ):

        def ask(clock: str, question: str, at: datetime) -> None:
            hit = memory.recall(question, k=1, at=at)[0]
            # Without a word in common the best of what is left is still a guess, and is told as one.
            known = hit.parts.get("words", 0.0) > 0
            moments.append(
                Moment(clock, "asked", question, hit.record.text if known else "nothing", _why(hit, known))
            )

        ids = [memory.remember(text, at=nine) for text in told]
        moments += [Moment("09:00", "told", text) for text in told]
        ask("10:00", "When does my flight leave?", ten)
        ask("10:01", "Is there anything I am allergic to?", ten)
        corrected = memory.store.update(ids[0], text="My flight to Lisbon leaves on Saturday at nine.")
        moments.append(Moment("10:02", "corrected", corrected.text))
        ask("10:03", "When does my flight leave?", ten)
        memory.forget(ids[2], hard=True)
        moments.append(Moment("10:04", "forgotten", told[2]))
        ask("10:05", "When does Mia start school?", ten)
    return moments


def _kind(category: str) -> str:
    if category == "temporaries.optimizer":
        return "optimizer"
    return next(kind for kind, heads in KINDS.items() if category.split(".")[0] in heads or category in heads)


def _network() -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in ((256, 384), (384, 384), (384, 384), (384, 384)):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(384, 10))


def _plain(model: nn.Module) -> Optimizer:
    return AdamW(model.parameters(), lr=3e-3)


def _peqa(model: nn.Module) -> Optimizer:
    peqa.quantize_(model, bits=4, group_size=32)
    return AdamW(peqa.scales(model), lr=1e-3, weight_decay=0.0)


def _probe(model: nn.Module) -> Optimizer:
    linear_probe_(model)
    return AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


_WAYS: dict[str, Callable[[nn.Module], Optimizer | None]] = {
    "plain": _plain,
    "PEQA, 4 bits": _peqa,
    "last layer only": _probe,
    "never trained": lambda model: None,
}


def _train(model: nn.Module, optimizer: Optimizer | None, x: Tensor, y: Tensor, seed: int) -> int:
    """300 steps; bytes at the peak of the last one (of a forward pass, where nothing is trained)."""
    draw = torch.Generator().manual_seed(seed)
    if optimizer is None:
        first = x[:64].clone()
        with Ledger(model, inputs=first) as led, torch.no_grad():
            model(first)
        return led.peak.total
    for step in range(300):
        chosen = torch.randint(len(x), (64,), generator=draw)
        batch = (x[chosen], y[chosen])
        if step < 299:
            training_step(model, optimizer, batch, cross_entropy)
    with Ledger(model, optimizer, inputs=batch) as led:
        training_step(model, optimizer, batch, cross_entropy)
    return led.peak.total


def _pixels(images: object) -> Tensor:
    """Images (N, 28, 28) or (N, 8, 8) as (N, 256), from 0 to 1."""
    values = torch.as_tensor(images).float()[:, None]
    values = values / values.max()
    if values.shape[-1] == 28:
        return avg_pool2d(pad(values, (2, 2, 2, 2)), 2).flatten(1)
    return nn.functional.interpolate(values, size=(16, 16)).flatten(1)


def _why(hit: Hit, known: bool) -> str:
    if not known:
        return "no word in common with what is left"
    words, like, kept = (hit.parts[name] for name in ("words", "cosine", "retention"))
    return f"words {words:.2f} · likeness {like:.2f} · retention {kept:.0%}"
