"""A small language model for the recipe ``peqa``: trained once on one domain, tuned to another."""

from __future__ import annotations

import copy
import inspect
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from memspan import data
from memspan.base.files import load_state, save_state
from memspan.base.rng import rng
from memspan.ledger import Ledger, training_step
from memspan.models.lm import CausalLM, next_token_loss
from memspan.recipes.engine import trained_once
from memspan.report.metrics import bits_per_byte
from memspan.training import lora_, peqa, qlora_, unlora_, unqlora_
from memspan.training.peqa.layers import QuantLinear

__all__ = ["Bench", "Models", "Shape", "make_bench", "with_lora", "with_naive_peqa", "with_qlora"]

# Chosen on the end of the training text, never on the held-out part. PEQA's is times ``suggest_lr``: far
# above 1, because a run has tens of steps here, not thousands.
RATES = {"full": 2e-3, "lora": 3e-2, "peqa": 100.0}


@dataclass(frozen=True)
class Shape:
    """The network and its training.

    Attributes:
        width: of the residual stream.
        depth: blocks.
        length: tokens of a sequence.
        pretrain: steps of 4 sequences on Wikipedia.
        steps: of ``batch`` sequences on Shakespeare, equal for all methods.
        batch: sequences a tuning step.
        test: bytes of held-out Shakespeare.
        vocabulary: byte pairs, learned on Wikipedia.
    """

    width: int
    depth: int
    length: int
    pretrain: int
    steps: int
    batch: int
    test: int
    vocabulary: int


@dataclass(frozen=True)
class Tuned:
    """A model after tuning, what one step of it held at its peak, and how many numbers it trained."""

    model: nn.Module
    held: dict[str, int]
    trained: int


@dataclass(frozen=True)
class Bench:
    """A trained model, text of another domain, and what is done with them.

    Attributes:
        model: trained on Wikipedia; copied before it is changed.
        train: tokens (N,) to tune on.
        test: tokens (M,) to be measured on, never trained on.
        shape: sizes.
        test_bytes: bytes of the text to be measured on, its first token left out, which nothing predicts.
    """

    model: CausalLM
    train: Tensor
    test: Tensor
    shape: Shape
    test_bytes: int

    def fresh(self) -> CausalLM:
        """A copy of the trained model."""
        return copy.deepcopy(self.model)

    def batch(self, seed: int, step: int, sequences: int | None = None) -> tuple[Tensor, Tensor]:
        """The same sequences for every method at a seed and step."""
        count, length = sequences or self.shape.batch, self.shape.length
        starts = rng("peqa.batch", seed, step).integers(0, len(self.train) - length, count)
        ids = torch.stack([self.train[start : start + length] for start in starts.tolist()])
        return ids, ids.clone()

    def tune(
        self, model: nn.Module, lr: float, seed: int, on: Callable[[int], object] = lambda _: None
    ) -> Tuned:
        """AdamW without weight decay and linear decay of the rate; the second step is counted."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
        held: dict[str, int] = {}
        model.train()
        for step in range(self.shape.steps):
            optimizer.param_groups[0]["lr"] = lr * (1 - step / self.shape.steps)
            batch = self.batch(seed, step)
            if step == min(1, self.shape.steps - 1):
                with Ledger(model, optimizer) as led:
                    training_step(model, optimizer, batch, next_token_loss)
                held = dict(led.peak.by_category)
            else:
                training_step(model, optimizer, batch, next_token_loss)
        return Tuned(model.eval(), held, sum(p.numel() for p in trained))

    @torch.no_grad()
    def bits_per_byte(self, model: nn.Module) -> float:
        """Cost of the held-out text; windows overlap by one token, so that every token is predicted once."""
        model.eval()
        length, nats = self.shape.length, 0.0
        starts = range(0, len(self.test) - 1, length - 1)
        whole = [self.test[start : start + length] for start in starts if start + length <= len(self.test)]
        rest = self.test[len(whole) * (length - 1) :]
        groups = [torch.stack(whole[i : i + 16]) for i in range(0, len(whole), 16)]
        groups += [rest.unsqueeze(0)] if len(rest) > 1 else []
        for ids in groups:
            nats += float(next_token_loss(model(ids), ids)) * ids[:, 1:].numel()
        return bits_per_byte(nats, self.test_bytes)

    def peak(self, model: nn.Module, tokens: int) -> tuple[dict[str, int], int]:
        """Who holds the peak of a second step of this many tokens, and the model states after it."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-6, weight_decay=0.0)
        batch = self.batch(0, 0, max(1, tokens // self.shape.length))
        model.train()
        training_step(model, optimizer, batch, next_token_loss)
        with Ledger(model, optimizer) as led:
            training_step(model, optimizer, batch, next_token_loss)
        states = ("parameters", "buffers", "gradients", "optimizer_state")
        own = sum(size for name, size in led.current.by_category.items() if name.startswith(states))
        return dict(led.peak.by_category), own

    def switching(self, bits: int) -> dict[str, float]:
        """Seconds (medians) to swap a task's scales, and to load another tuned model from its file."""
        model = peqa.quantize_(self.fresh(), bits)
        tasks = [peqa.get_task(model), peqa.get_task(model)]
        peqa.set_task(model, tasks[0])
        plain = self.fresh()
        with tempfile.TemporaryDirectory() as folder:
            save_state(Path(folder) / "model.safetensors", plain.state_dict())

            def reload() -> None:
                other = _network(self.shape).to(self.train.device)
                other.load_state_dict(load_state(Path(folder) / "model.safetensors")[0])

            swaps = [_seconds(lambda: peqa.set_task(model, tasks[i % 2])) for i in range(40)]  # noqa: B023
            loads = [_seconds(reload) for _ in range(10)]
        return {"swap": float(np.median(swaps)), "reload": float(np.median(loads))}


class Models:
    """The models of one seed. Each is tuned once, although several cells ask for it.

    Args:
        bench: model and texts.
        seed: of the order of the sequences and of LoRA's draws.

    Attributes:
        held: what a tuning step held at its peak, by model.
        trained: how many numbers were trained, likewise.
    """

    def __init__(self, bench: Bench, seed: int) -> None:
        self.bench, self.seed = bench, seed
        self.held: dict[str, dict[str, int]] = {}
        self.trained: dict[str, int] = {}
        self._tuned: dict[str, nn.Module] = {}

    def full(self) -> nn.Module:
        """Tuned whole."""
        return self._once("full", self.bench.fresh, RATES["full"])

    def lora(self) -> nn.Module:
        """Tuned by LoRA in float32 and merged; a copy."""
        model = self._once("lora", lambda: with_lora(self.bench, self.seed), RATES["lora"])
        return unlora_(copy.deepcopy(model), merge=True)

    def qlora(self, bits: int) -> nn.Module:
        """Tuned by LoRA over frozen integers; the adapter stays beside them."""
        return self._once(f"qlora {bits}", lambda: with_qlora(self.bench, bits, self.seed), RATES["lora"])

    def merged(self, bits: int) -> nn.Module:
        """The same with the adapter added to the weights, which are then quantized again."""
        return self.quantized(bits, model=unqlora_(copy.deepcopy(self.qlora(bits)), merge=True))

    def peqa(self, bits: int, groups: str = "channel", init: str = "rtn") -> nn.Module:
        """Tuned by its scales."""
        model = self.quantized(bits, groups, init)
        rate = RATES["peqa"] * peqa.suggest_lr(model)
        return self._once(f"peqa {bits} {groups} {init}", lambda: model, rate)

    def quantized(
        self, bits: int, groups: str = "channel", init: Any = "rtn", model: nn.Module | None = None
    ) -> nn.Module:
        """A model (None: the untuned one) quantized; OPTQ sees 32 sequences of the text to tune on."""
        batches = [self.bench.batch(self.seed, -1 - step, 8)[0] for step in range(4)]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="2 bits per channel")  # the point of the comparison
            return peqa.quantize_(
                self.bench.fresh() if model is None else model,
                bits,
                None if groups == "channel" else int(groups),
                init,
                batches if init == "optq" else None,
            )

    def _once(self, key: str, build: Callable[[], nn.Module], rate: float) -> nn.Module:
        if key not in self._tuned:
            done = self.bench.tune(build(), rate, self.seed)
            self._tuned[key], self.held[key], self.trained[key] = done.model, done.held, done.trained
        return self._tuned[key]


def with_lora(bench: Bench, seed: int = 0) -> nn.Module:
    """LoRA of rank 4 on queries and values, the paper's choice."""
    return lora_(bench.fresh(), 4, 8.0, _query_value(bench), head="", seed=seed)


def with_qlora(bench: Bench, bits: int, seed: int = 0, init: Any = "rtn") -> nn.Module:
    """The same over frozen integers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="2 bits per channel")
        return qlora_(bench.fresh(), 4, 8.0, _query_value(bench), bits=bits, seed=seed, init=init)


def with_naive_peqa(bench: Bench) -> nn.Module:
    """PEQA whose layers run by plain autograd: what the idea costs without the kernel."""
    model = peqa.quantize_(bench.fresh(), 4, init="minmax")
    for layer in peqa.layers(model).values():
        layer.__class__ = _Naive
    return model


class _Naive(QuantLinear):
    def forward(self, x: Tensor) -> Tensor:
        return peqa.quant_matmul_naive(
            x, self.qweight, self.scales, self.zeros, self.bits, self.in_features, self.bias
        )


def _query_value(bench: Bench) -> list[str]:
    return [n for n, _ in bench.model.named_modules() if n.endswith(("attention.query", "attention.value"))]


def make_bench(shape: Shape, use: Callable[[Any], Any], device: torch.device) -> Bench:
    """Texts and the trained model (from the cache where it was trained before), on a device."""
    pages = _whole(use(data.load_first(("wikitext2", "wikipedia-pages"), data.TextSet)), "valid")[:_PAGES]
    learnt, kept = _two_parts(use(data.load_first(("tiny-shakespeare", "lee-news"), data.TextSet)))
    tokens = data.train_bpe(pages, shape.vocabulary)
    model = trained_once(
        "peqa-lm",
        lambda: _network(shape),
        lambda module, ids: _pretrain(module, ids, shape),
        tokens.encode(pages),
        shape=[shape.width, shape.depth, shape.length, shape.pretrain, shape.vocabulary],
        source=[inspect.getsource(_network), inspect.getsource(_pretrain)],
    )
    train = torch.from_numpy(tokens.encode(learnt)).to(device)
    held = kept.encode()[: shape.test].decode(errors="ignore")
    test = torch.from_numpy(tokens.encode(held)).to(device)
    first = tokens.decode(test[:1].tolist())
    return Bench(model.to(device), train, test, shape, len(held.encode()) - len(first.encode()))


_PAGES = 1_200_000  # characters: WikiText-2's validation part is as long


def _whole(text: data.TextSet, part: str) -> str:
    return text.text(part if part in text.parts else next(iter(text.parts)))


def _two_parts(text: data.TextSet) -> tuple[str, str]:
    """To learn from and held out: the set's own parts, else nine tenths and the rest."""
    if "valid" in text.parts:
        return text.text("train"), text.text("valid")
    whole = _whole(text, "")
    cut = len(whole) * 9 // 10
    return whole[:cut], whole[cut:]


def _network(shape: Shape) -> CausalLM:
    heads = max(1, shape.width // 32)
    return CausalLM(shape.vocabulary, shape.width, shape.depth, heads, shape.length)


def _pretrain(model: CausalLM, tokens: Any, shape: Shape) -> None:
    ids = torch.from_numpy(tokens)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.05, fused=True
    )
    model.train()
    for step in range(shape.pretrain):
        done = step / shape.pretrain
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1.0, (step + 1) / 50) * max(0.05, 1 - done)
        starts = rng("peqa.pretrain", step).integers(0, len(ids) - shape.length, 4)
        batch = torch.stack([ids[start : start + shape.length] for start in starts.tolist()])
        training_step(model, optimizer, (batch, batch.clone()), next_token_loss)


def _seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun
