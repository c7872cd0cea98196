"""What a quantized layer costs in time, as ratios to ``nn.Linear`` and to the peers, in one interleaved run.

A training step (forward and backward) of one layer at 2048 tokens, 768 inputs and outputs: plain, PEQA at 2
to 8 bits, PEQA by plain autograd, peft's LoRA, bitsandbytes' 4-bit layer under LoRA where it runs. Then
one token at a time, where the packed weight is unpacked for a single row, and torchao's compiled kernel from
the exported model. All variants run in each round, in changing order; a ratio is the median over rounds of
(variant / plain of the same round). Figures go to ``benchmarks/results/peqa_speed.json``; ``--quick``: none.

On a GPU (``--device cuda``, under 40 s) also 4096 inputs and outputs, in float16 and bfloat16; figures go to
``peqa_speed_cuda.json``.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rounds import environment, interleaved, options, peak_bytes, reason, show, torchvision_ready, tried
from torch import nn

from memspan.base.files import atomic_write
from memspan.training import lora_, peqa

RESULT = Path(__file__).parent / "results" / "peqa_speed.json"
TOKENS, WIDTH = 2048, 768
PROMISE = 2.0
LIMIT = 2.5  # seconds of rounds of one comparison on a GPU, after which no further round begins


@dataclass(frozen=True)
class Setting:
    """Inputs and outputs of the layer, dtype and device."""

    width: int = WIDTH
    dtype: str = "float32"
    device: str = "cpu"

    def random(self, tokens: int, *, gradient: bool = False) -> torch.Tensor:
        kind = getattr(torch, self.dtype)
        return torch.randn(tokens, self.width, device=self.device, dtype=kind, requires_grad=gradient)


Maker = Callable[[Setting], nn.Module]


def plain(at: Setting) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(at.width, at.width, device=at.device, dtype=getattr(torch, at.dtype)))


def quantized(bits: int, group: int | None = None) -> Maker:
    return lambda at: peqa.quantize_(plain(at), bits, group, init="minmax")


def naive(at: Setting) -> nn.Module:
    class Naive(peqa.QuantLinear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return peqa.quant_matmul_naive(
                x, self.qweight, self.scales, self.zeros, self.bits, self.in_features, self.bias
            )

    model = quantized(4)(at)
    model[0].__class__ = Naive
    return model


def peft_lora(at: Setting) -> nn.Module:
    torchvision_ready()
    import peft

    return peft.get_peft_model(plain(at), peft.LoraConfig(r=4, target_modules=["0"]))


def bitsandbytes_lora(at: Setting) -> nn.Module:
    """QLoRA as its users run it: peft's LoRA over bitsandbytes' 4-bit layer."""
    torchvision_ready()
    import bitsandbytes
    import peft

    kind = getattr(torch, at.dtype)
    layer = bitsandbytes.nn.Linear4bit(at.width, at.width, compute_dtype=kind, quant_type="nf4")
    layer.load_state_dict(plain(at)[0].state_dict())
    model = nn.Sequential(layer.to(at.device))
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0"]))


TRAINING: dict[str, Maker] = {
    "nn.Linear": plain,
    "PEQA 4 bits": quantized(4),
    "PEQA 3 bits": quantized(3),
    "PEQA 2 bits": quantized(2, 64),
    "PEQA 4 bits, g = 64": quantized(4, 64),
    "PEQA 8 bits": quantized(8),
    "PEQA 4 bits by plain autograd": naive,
    "LoRA r = 4 (memspan)": lambda at: lora_(plain(at), 4, layers=["0"], head=""),
    "LoRA r = 4 (peft)": peft_lora,
    "LoRA over nf4 (peft, bitsandbytes)": bitsandbytes_lora,
}
DECODING: dict[str, Maker] = {
    "nn.Linear": plain,
    "PEQA 4 bits": TRAINING["PEQA 4 bits"],
    "PEQA 3 bits": TRAINING["PEQA 3 bits"],
    "exported to torchao (int4 kernel)": lambda at: peqa.export(TRAINING["PEQA 4 bits"](at)),
}


def step(model: nn.Module, at: Setting) -> Callable[[], None]:
    x, dy = at.random(TOKENS, gradient=True), at.random(TOKENS)

    def work() -> None:
        x.grad = None
        model.zero_grad(set_to_none=True)
        model(x).backward(dy)

    return work


def decode(model: nn.Module, at: Setting) -> Callable[[], None]:
    x = at.random(1)

    @torch.no_grad()
    def work() -> None:
        for _ in range(20):
            model(x)

    return work


def compared(
    kinds: dict[str, Maker],
    wrap: Callable[[nn.Module, Setting], Callable[[], None]],
    rounds: int,
    at: Setting,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Ratios to ``nn.Linear`` by name, and why others are absent: a peer may not run here."""
    works, absent = tried(
        {name: lambda make=make: wrap(make(at), at) for name, make in kinds.items()}, at.device
    )
    random.seed(0)
    gpu = at.device == "cuda"
    times = interleaved(works, rounds, 2 if gpu else 0, at.device, LIMIT if gpu else None)
    found = {}
    for name, spent in times.items():
        ratios = [a / b for a, b in zip(spent, times["nn.Linear"], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        found[name] = {
            "ratio": round(statistics.median(ratios), 3),
            "quartiles": [round(low, 3), round(high, 3)],
            "milliseconds": round(1000 * statistics.median(spent), 3),
        }
        if gpu and wrap is step:
            found[name]["peak_bytes_of_step"] = peak_bytes(works[name], at.device)
    return found, absent


def measured(at: Setting, rounds: int) -> dict[str, Any]:
    """A training step and single tokens in one setting."""
    training, absent = compared(TRAINING, step, rounds, at)
    decoding, more = compared(DECODING, decode, rounds if at.device == "cuda" else 2 * rounds, at)
    return {"training_step": training, "one_token": decoding, "absent": absent | more}


def on_gpu(out: Path, rounds: int, quick: bool) -> None:
    """Every setting, and a table."""
    settings: list[dict[str, Any]] = []
    for width, dtype in ((WIDTH, "float32"), (4096, "float16"), (4096, "bfloat16")):
        at = Setting(width, dtype, "cuda")
        try:
            settings.append(asdict(at) | measured(at, rounds))
        except Exception as error:
            settings.append(asdict(at) | {"error": reason(error)})
        torch.cuda.empty_cache()
        document = {
            "what": f"median over rounds of variant / nn.Linear, {TOKENS} tokens; below 1 it is faster",
            "rounds": rounds,
            "environment": environment("cuda"),
            "settings": settings,
        }
        if not quick:
            atomic_write(out, json.dumps(document, indent=1) + "\n")
    for setting in settings:
        print(f"{setting['width']} inputs and outputs, {setting['dtype']}: time / nn.Linear's (quartiles)")
        show({name: setting[name] for name in ("training_step", "one_token") if name in setting})
        for name, why in setting.get("absent", {"all": setting.get("error")}).items():
            print(f"  absent: {name}: {why}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="7 rounds, nothing written")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    asked = options(parser, RESULT)
    torch.set_num_threads(asked.threads)
    rounds = 7 if asked.quick else asked.rounds
    if asked.device == "cuda":
        on_gpu(asked.out, rounds, asked.quick)
        return
    found = measured(Setting(), rounds)
    ours = found["training_step"]["PEQA 4 bits"]["ratio"]
    document = {
        "claim": f"forward and backward of a 4-bit layer take at most {PROMISE:g} x nn.Linear's at "
        f"({TOKENS} tokens, {WIDTH}, {WIDTH})",
        **found,
        "rounds": rounds,
        "holds": ours <= PROMISE,
        "environment": environment(threads=asked.threads),
    }
    if not asked.quick:
        atomic_write(asked.out, json.dumps(document, indent=1) + "\n")
    print(json.dumps(document, indent=1))
    sys.exit(0 if document["holds"] else 1)


if __name__ == "__main__":
    main()
