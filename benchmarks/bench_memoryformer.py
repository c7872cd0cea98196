"""Speed of a memory layer, as ratios to named peers measured in the same rounds.

Decoding: one layer of width d on 1 to 64 tokens against ``nn.Linear`` (the crossover curve) and against
torch's own operators (hash by signs, then ``embedding_bag``), in float32; "cold" walks through 4 layers, as a
model does, so that rows come from memory. Training: the backward pass of the sum against ``embedding_bag``'s
on the same codes. A ratio is the median over rounds of (rival / ours) in the same round: above 1 ours is
faster.

    python benchmarks/bench_memoryformer.py            # about 2 min on two cores
    python benchmarks/bench_memoryformer.py --quick    # fewer rounds; writes nothing

On a GPU (``--device cuda``, under 40 s) the crossover curve runs to 8192 tokens, with Triton's kernel, in
float16 and float32: eager calls, and replays of a CUDA graph, which leave launches out.

Figures go to ``benchmarks/results/bench_memoryformer.json``, a GPU's to ``bench_memoryformer_cuda.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rounds import Way, environment, interleaved, options, ratio, reason, replayed, tried
from torch import nn

from memspan.base.files import atomic_write
from memspan.models import MemoryLinear
from memspan.nn.lookup import available, hash_codes, hash_codes_reference, lookup_sum

RESULT = Path(__file__).parent / "results" / "bench_memoryformer.json"
BITS = 8
WIDTHS, TOKENS = (512, 1024, 4096), (1, 4, 16, 64, 256, 1024, 2048, 8192)  # on a GPU
OURS, DENSE = "fused", "nn.Linear"
LIMIT = 0.5  # seconds of rounds of one comparison on a GPU, after which no further round begins


def rounds(
    calls: Mapping[str, Sequence[Callable[[], object]]], count: int, inner: int
) -> dict[str, list[float]]:
    """Milliseconds of one sequence of calls, in interleaved rounds of ``inner`` after two that warm up.

    With one thread this is the thread's own processor time, into which other programs' turns do not enter.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(count + 2):
        for name, call in calls.items():
            start = clock()
            for one in call * inner:
                one()
            if turn >= 2:
                times[name].append(1e3 * (clock() - start) / inner)
    return times


def told(times: Mapping[str, list[float]], ours: str) -> dict[str, Any]:
    """Median milliseconds of each, and quartiles of rival / ours over rounds."""
    found: dict[str, Any] = {
        "ms": {name: round(statistics.median(values), 4) for name, values in times.items()}
    }
    for name, values in times.items():
        if name != ours and ours in times:
            found[f"{name} / {ours}"] = ratio(values, times[ours])
    return found


@torch.no_grad()
def decoding(d: int, count: int) -> dict[str, Any]:
    """Passes of 1 to 64 tokens through one layer, and of one token through four layers in turn."""
    tables = [MemoryLinear(d, d, BITS) for _ in range(4)]
    linears = [nn.Linear(d, d) for _ in range(4)]
    flat, offsets = [layer.tables.view(-1, d) for layer in tables], 2**BITS * torch.arange(d // BITS)

    def measured(x: torch.Tensor, layers: int) -> dict[str, Any]:
        calls = {
            "fused": [partial(layer, x) for layer in tables[:layers]],
            "nn.Linear": [partial(layer, x) for layer in linears[:layers]],
            "torch hash + embedding_bag": [partial(by_torch, x, rows, offsets) for rows in flat[:layers]],
        }
        return told(rounds(calls, count, inner=max(2, 64 // len(x) // layers)), "fused")

    found = {f"decode d={d} batch=1 cold, 4 layers": measured(torch.randn(1, d), 4)}
    for batch in (1, 2, 4, 8, 16, 32, 64):
        found[f"decode d={d} batch={batch}"] = measured(torch.randn(batch, d), 1)
    return found


def by_torch(x: torch.Tensor, flat: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """The same layer in torch's operators."""
    code, weight = hash_codes_reference(x, BITS)
    return F.embedding_bag(code + offsets, flat, mode="sum", per_sample_weights=weight.to(flat.dtype))


def backward(d: int, tokens: int, count: int) -> dict[str, Any]:
    """Gradients of tables and weights for given codes, and those of a linear layer."""
    code, weight = hash_codes(torch.randn(tokens, d), BITS)
    tables, dy = torch.randn(d // BITS, 2**BITS, d), torch.randn(tokens, d)
    index = code.long() + 2**BITS * torch.arange(d // BITS)
    linear, x = nn.Linear(d, d), torch.randn(tokens, d, requires_grad=True)

    def step(forward: Callable[[Any, Any], Any]) -> Callable[[], object]:
        t, w = tables.clone().requires_grad_(), weight.clone().requires_grad_()
        y = forward(t, w)
        return lambda: torch.autograd.grad(y, (t, w), dy, retain_graph=True)

    y = linear(x)
    calls = {
        "ours": [step(lambda t, w: lookup_sum(code, w, t))],
        "embedding_bag": [
            step(lambda t, w: F.embedding_bag(index, t.view(-1, d), mode="sum", per_sample_weights=w))
        ],
        "nn.Linear": [lambda: torch.autograd.grad(y, (x, linear.weight), dy, retain_graph=True)],
    }
    return told(rounds(calls, count, inner=1), "ours")


# -- on a GPU ----------------------------------------------------------------------------------------------


def timed_on_gpu(makers: Mapping[str, Callable[[], Way]], count: int, graphs: bool) -> dict[str, Any]:
    """Eager calls and, with ``graphs``, replays of captured ones; a way that fails is a row that says why."""
    found: dict[str, Any] = {}
    ways, absent = tried(makers, "cuda")
    times = interleaved(ways, count, 2, "cuda", LIMIT)
    milliseconds = {name: [1e3 * one for one in values] for name, values in times.items()}
    found["eager"] = told(milliseconds, OURS) | failures(absent)
    if graphs:
        replays, calls = {}, {}
        for name, way in ways.items():
            try:
                replays[name], calls[name] = replayed(way)
            except Exception as error:  # an operator that waits for the device cannot be captured
                absent[name] = reason(error)
        times = interleaved(replays, count, 2, "cuda", LIMIT)
        milliseconds = {name: [1e3 * one / calls[name] for one in values] for name, values in times.items()}
        found["graph"] = told(milliseconds, OURS) | failures(absent)
    return found


def failures(absent: Mapping[str, str]) -> dict[str, Any]:
    return {name: {"error": why} for name, why in absent.items()}


def on_triton(layer: MemoryLinear) -> MemoryLinear:
    """The layer, which takes another way without a word where Triton is absent: here that is an error."""
    if why := available()["triton"]:
        raise RuntimeError(why)
    return layer


@torch.no_grad()
def curve(d: int, dtype: torch.dtype, count: int) -> dict[str, Any]:
    """Forward passes of one layer by number of tokens; "alone": the sum on codes that are there already."""
    layer = MemoryLinear(d, d, BITS, dtype=dtype, device="cuda", max_bytes=4 * 2**30)
    linear = nn.Linear(d, d, dtype=dtype, device="cuda")
    flat, offsets = layer.tables.view(-1, d), 2**BITS * torch.arange(d // BITS, device="cuda")
    found: dict[str, Any] = {}
    for tokens in TOKENS:
        x = torch.randn(tokens, d, dtype=dtype, device="cuda")
        code, weight = hash_codes(x, BITS)
        bag = partial(F.embedding_bag, code + offsets, flat, mode="sum", per_sample_weights=weight.to(dtype))
        ways: dict[str, Way] = {
            DENSE: partial(linear, x),
            "torch hash + embedding_bag": partial(by_torch, x, flat, offsets),
            "fused, codes given": partial(lookup_sum, code, weight, layer.tables, backend="triton"),
            "embedding_bag, codes given": bag,
        }
        makers = {OURS: lambda x=x: partial(on_triton(layer), x)}
        makers |= {name: lambda way=way: way for name, way in ways.items()}
        found[f"forward tokens={tokens}"] = timed_on_gpu(makers, count, graphs=True)
    found["tokens at which nn.Linear is faster"] = {
        mode: [tokens for tokens in TOKENS if dense_wins(found[f"forward tokens={tokens}"][mode])]
        for mode in ("eager", "graph")
    }
    return found


def dense_wins(one: Mapping[str, Any]) -> bool:
    return bool(one["ms"].get(DENSE, float("inf")) < one["ms"].get(OURS, 0.0))


def both_ways(d: int, dtype: torch.dtype, count: int, tokens: int = 2048) -> dict[str, Any]:
    """Forward and backward, with the gradients of the input and of all parameters."""
    x = torch.randn(tokens, d, dtype=dtype, device="cuda", requires_grad=True)
    dy = torch.randn(tokens, d, dtype=dtype, device="cuda")
    layer = MemoryLinear(d, d, BITS, dtype=dtype, device="cuda", max_bytes=4 * 2**30)
    linear = nn.Linear(d, d, dtype=dtype, device="cuda")
    offsets = 2**BITS * torch.arange(d // BITS, device="cuda")

    def step(forward: Callable[[torch.Tensor], torch.Tensor], parameters: Sequence[torch.Tensor]) -> Way:
        return lambda: torch.autograd.grad(forward(x), (x, *parameters), dy)

    def bag(x: torch.Tensor) -> torch.Tensor:
        return by_torch(x, layer.tables.view(-1, d), offsets)

    makers: dict[str, Callable[[], Way]] = {
        OURS: lambda: step(on_triton(layer), list(layer.parameters())),
        DENSE: lambda: step(linear, list(linear.parameters())),
        "torch hash + embedding_bag": lambda: step(bag, [layer.tables]),
    }
    return timed_on_gpu(makers, count, graphs=False)


def on_gpu(out: Path, quick: bool) -> None:
    """The crossover curves of all widths and dtypes, and a table of them."""
    count, settings = 5 if quick else 15, []
    for dtype in (torch.float16, torch.float32):
        for d in WIDTHS:
            setting: dict[str, Any] = {"d": d, "dtype": str(dtype).removeprefix("torch.")}
            settings.append(setting)
            try:
                setting |= curve(d, dtype, count)
                setting["forward and backward tokens=2048"] = both_ways(d, dtype, count)
            except Exception as error:
                setting["error"] = reason(error)
            torch.cuda.empty_cache()
            if not quick:
                write(out, "cuda", settings)
    print("milliseconds (eager, graph) of MemoryLinear and nn.Linear; * where nn.Linear is faster")
    for setting in settings:
        print(f"d={setting['d']} {setting['dtype']} {setting.get('error', '')}")
        for name, modes in setting.items():
            if not name.startswith("forward"):
                continue
            pairs = [f"{mode} {one['ms'].get(OURS)} {one['ms'].get(DENSE)}" + " *" * dense_wins(one)
                     for mode, one in modes.items()]  # fmt: skip
            print(f"  {name:34}", "   ".join(pairs))


def main() -> None:
    """Measure every setting and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="5 rounds; writes nothing")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2], help="torch threads")
    quick = (arguments := options(parser, RESULT)).quick
    if arguments.device == "cuda":
        torch.manual_seed(0)
        on_gpu(arguments.out, quick)
        return
    if available()["cpu"]:
        parser.error(f"the kernel cannot be had: {available()['cpu']}")
    torch.manual_seed(0)
    settings: list[dict[str, Any]] = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        found: dict[str, Any] = {"threads": threads, "clock": "processor" if threads == 1 else "wall"}
        settings.append(found)
        for d, tokens in ((512, 2048), (1024, 1024)):
            for part in (
                decoding(d, 5 if quick else 31),
                {f"backward d={d} tokens={tokens}": backward(d, tokens, 5 if quick else 9)},
            ):
                found.update(part)
                for name, one in part.items():
                    ratios = {pair: told["median"] for pair, told in one.items() if pair != "ms"}
                    print(threads, name, ratios, one["ms"], flush=True)
                if not quick:
                    write(
                        arguments.out, "cpu", settings
                    )  # after each part, so that a run that is cut short leaves what it found


def write(out: Path, device: str, settings: list[dict[str, Any]]) -> None:
    """Write the settings measured so far, with the machine they were measured on."""
    dtype = "float32, " if device == "cpu" else ""
    result = {
        "what": f"median over rounds of rival / our time of a call, {dtype}bits = 8; above 1 ours is faster",
        "environment": environment(device),
        "settings": settings,
    }
    atomic_write(out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
