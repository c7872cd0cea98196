"""What a quantized layer costs in time, as ratios to ``nn.Linear`` and to the peers, in one interleaved run.

A training step (forward and backward) of one layer at 2048 tokens, 768 inputs and outputs: plain, PEQA at 2
to 8 bits, PEQA by plain autograd, peft's LoRA, bitsandbytes' 4-bit layer under LoRA where it runs. Then
one token at a time, where the packed weight is unpacked for a single row, and torchao's compiled kernel from
the exported model. All variants run in each round, in changing order; a ratio is the median over rounds of
(variant / plain of the same round). Figures go to ``benchmarks/results/peqa_speed.json``; ``--quick``: none.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rounds import environment, interleaved
from torch import nn

from memspan.base.files import atomic_write
from memspan.training import lora_, peqa

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

RESULT = Path(__file__).parent / "results" / "peqa_speed.json"
TOKENS, INPUTS, OUTPUTS = 2048, 768, 768
PROMISE = 2.0


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(INPUTS, OUTPUTS))


def naive() -> nn.Module:
    class Naive(peqa.QuantLinear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return peqa.quant_matmul_naive(
                x, self.qweight, self.scales, self.zeros, self.bits, self.in_features, self.bias
            )

    model = peqa.quantize_(plain(), 4, init="minmax")
    model[0].__class__ = Naive
    return model


def peft_lora() -> nn.Module:
    from torchvision_schemas import import_torchvision

    import_torchvision()
    import peft

    return peft.get_peft_model(plain(), peft.LoraConfig(r=4, target_modules=["0"]))


def bitsandbytes_lora() -> nn.Module:
    """QLoRA as its users run it: peft's LoRA over bitsandbytes' 4-bit layer."""
    from torchvision_schemas import import_torchvision

    import_torchvision()
    import bitsandbytes
    import peft

    layer = bitsandbytes.nn.Linear4bit(INPUTS, OUTPUTS, compute_dtype=torch.float32, quant_type="nf4")
    layer.load_state_dict(plain()[0].state_dict())
    model = nn.Sequential(layer.to("cpu"))
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0"]))


TRAINING: dict[str, Callable[[], nn.Module]] = {
    "nn.Linear": plain,
    "PEQA 4 bits": lambda: peqa.quantize_(plain(), 4, init="minmax"),
    "PEQA 3 bits": lambda: peqa.quantize_(plain(), 3, init="minmax"),
    "PEQA 2 bits": lambda: peqa.quantize_(plain(), 2, 64, init="minmax"),
    "PEQA 4 bits, g = 64": lambda: peqa.quantize_(plain(), 4, 64, init="minmax"),
    "PEQA 8 bits": lambda: peqa.quantize_(plain(), 8, init="minmax"),
    "PEQA 4 bits by plain autograd": naive,
    "LoRA r = 4 (memspan)": lambda: lora_(plain(), 4, layers=["0"], head=""),
    "LoRA r = 4 (peft)": peft_lora,
    "LoRA over nf4 (peft, bitsandbytes)": bitsandbytes_lora,
}
DECODING: dict[str, Callable[[], nn.Module]] = {
    "nn.Linear": plain,
    "PEQA 4 bits": TRAINING["PEQA 4 bits"],
    "PEQA 3 bits": TRAINING["PEQA 3 bits"],
    "exported to torchao (int4 kernel)": lambda: peqa.export(TRAINING["PEQA 4 bits"]()),
}


def step(model: nn.Module) -> Callable[[], None]:
    x = torch.randn(TOKENS, INPUTS, requires_grad=True)
    dy = torch.randn(TOKENS, OUTPUTS)

    def work() -> None:
        x.grad = None
        model.zero_grad(set_to_none=True)
        model(x).backward(dy)

    return work


def decode(model: nn.Module) -> Callable[[], None]:
    x = torch.randn(1, INPUTS)

    @torch.no_grad()
    def work() -> None:
        for _ in range(20):
            model(x)

    return work


def compared(
    kinds: dict[str, Callable[[], nn.Module]], wrap: Callable[[nn.Module], Callable[[], None]], rounds: int
) -> tuple[dict[str, Any], dict[str, str]]:
    """Ratios to ``nn.Linear`` by name, and why others are absent."""
    works: dict[str, Callable[[], None]] = {}
    absent: dict[str, str] = {}
    for name, make in kinds.items():
        try:
            works[name] = wrap(make())
            works[name]()
        except Exception as error:  # a peer that does not run here is a row that says so
            works.pop(name, None)
            absent[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"
    random.seed(0)
    times = interleaved(works, rounds, warm=0)
    found = {}
    for name, spent in times.items():
        ratios = [a / b for a, b in zip(spent, times["nn.Linear"], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        found[name] = {
            "ratio": round(statistics.median(ratios), 3),
            "quartiles": [round(low, 3), round(high, 3)],
            "milliseconds": round(1000 * statistics.median(spent), 3),
        }
    return found, absent


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="7 rounds, nothing written")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    rounds = 7 if asked.quick else asked.rounds
    training, absent = compared(TRAINING, step, rounds)
    decoding, more = compared(DECODING, decode, 2 * rounds)
    ours = training["PEQA 4 bits"]["ratio"]
    document = {
        "claim": f"forward and backward of a 4-bit layer take at most {PROMISE:g} x nn.Linear's at "
        f"({TOKENS} tokens, {INPUTS}, {OUTPUTS})",
        "training_step": training,
        "one_token": decoding,
        "absent": absent | more,
        "rounds": rounds,
        "holds": ours <= PROMISE,
        "environment": environment(threads=asked.threads),
    }
    if not asked.quick:
        atomic_write(RESULT, json.dumps(document, indent=1) + "\n")
    print(json.dumps(document, indent=1))
    sys.exit(0 if document["holds"] else 1)


if __name__ == "__main__":
    main()
