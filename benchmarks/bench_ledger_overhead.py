"""What the ledger costs in time: ratios to the untracked step and to torch's own memory tracker.

A transformer train step (4 blocks, d=256, B=8, T=128, AdamW; on a GPU 12 blocks, d=1024, B=16, T=512, so
that the step is not Python's alone) is run in turn untracked, under
``Ledger(level="peak")``, under ``Ledger(level="timeline")`` and under torch's private ``MemTracker``.
All variants run in each round, in changing order; a ratio is the median over rounds of (variant / untracked
of the same round). Figures go to ``benchmarks/results/ledger_overhead.json``; ``--quick`` runs fewer rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as functional
from rounds import clock, hardware, options, reason, show
from torch import nn

from memspan.base.files import atomic_write
from memspan.ledger import Ledger

RESULT = Path(__file__).parent / "results" / "ledger_overhead.json"


class Size(NamedTuple):
    """Of the network and its batch."""

    d: int
    heads: int
    layers: int
    batch: int
    length: int
    words: int


SIZES = {"cpu": Size(256, 4, 4, 8, 128, 1000), "cuda": Size(1024, 16, 12, 16, 512, 16_000)}


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, d) to (B, T, d)."""
        batch, length, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, d))
        return x + self.mlp(self.norm2(x))


def build(device: str) -> tuple[nn.Module, torch.optim.Optimizer, Callable[[], None]]:
    """A model, its optimizer, and one train step."""
    size = SIZES[device]
    blocks = (Block(size.d, size.heads) for _ in range(size.layers))
    model = nn.Sequential(nn.Embedding(size.words, size.d), *blocks, nn.Linear(size.d, size.words)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(0, size.words, (size.batch, size.length), device=device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()

    return model, optimizer, step


@contextlib.contextmanager
def torch_tracker(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Torch's private memory tracker, as its documentation uses it."""
    from torch.distributed._tools.mem_tracker import MemTracker

    tracker = MemTracker()
    tracker.track_external(model, optimizer)
    with tracker:
        yield


def measure(rounds: int, device: str) -> dict[str, object]:
    """Seconds of the step and of step plus entry, per variant and round; ratios and their quartiles."""
    model, optimizer, step = build(device)
    variants: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
        "untracked": contextlib.nullcontext,
        "ledger_peak": lambda: Ledger(model, optimizer),
        "ledger_timeline": lambda: Ledger(model, optimizer, level="timeline"),
        "torch_mem_tracker": lambda: torch_tracker(model, optimizer),
    }
    absent: dict[str, str] = {}
    for name, variant in variants.items():
        try:
            with variant():
                step()
        except Exception as error:  # one that fails is a row that says so
            absent[name] = reason(error)
    now = clock(device)
    inner: dict[str, list[float]] = {name: [] for name in variants}
    whole: dict[str, list[float]] = {name: [] for name in variants}
    order = [name for name in variants if name not in absent]
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            begin = now()
            with variants[name]():
                middle = now()
                step()
                inner[name].append(now() - middle)
            whole[name].append(now() - begin)
    figures: dict[str, object] = {}
    for label, seconds in (("step", inner), ("step_with_entry", whole)):
        for name in list(variants)[1:]:
            if name in absent:
                figures[f"{label}.{name}_over_untracked"] = {"error": absent[name]}
                continue
            ratios = [a / b for a, b in zip(seconds[name], seconds["untracked"], strict=True)]
            low, middle_ratio, high = statistics.quantiles(ratios, n=4)
            figures[f"{label}.{name}_over_untracked"] = {
                "median": round(middle_ratio, 4),
                "quartiles": [round(low, 4), round(high, 4)],
            }
        if absent.keys() & {"ledger_peak", "torch_mem_tracker"}:
            continue
        against = [a / b for a, b in zip(seconds["ledger_peak"], seconds["torch_mem_tracker"], strict=True)]
        figures[f"{label}.ledger_peak_over_torch_mem_tracker"] = {
            "median": round(statistics.median(against), 4)
        }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="7 rounds in place of 31")
    asked = options(parser, RESULT)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rounds = 7 if asked.quick else 31
    result = {
        "benchmark": "ledger_overhead",
        "claim": "level='peak' costs at most 15 % of a transformer train step, the timeline at most 3 times",
        "mode": "quick" if asked.quick else "full",
        "rounds": rounds,
        "setting": SIZES[asked.device]._asdict(),
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "threads": 1,
            **hardware(asked.device),
        },
        "figures": measure(rounds, asked.device),
    }
    atomic_write(asked.out, json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["figures"], indent=2))
    show(result["figures"])


if __name__ == "__main__":
    main()
