"""How long, and in how much memory, the planner predicts a training step that this machine could not hold.

A 7-billion-parameter decoder (32 blocks of RMSNorm, rotary attention and gated MLP, width 4096), 2048 tokens,
AdamW: built and traced on fake tensors in this process. Writes ``benchmarks/results/plan_7b.json``.
"""

from __future__ import annotations

import json
import platform
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memspan.base.files import atomic_write
from memspan.ledger import plan

RESULT = Path(__file__).parent / "results" / "plan_7b.json"
VOCABULARY, WIDTH, HEADS, INNER, DEPTH, TOKENS = 32_000, 4096, 32, 11_008, 32, 2048


class Attention(nn.Module):
    """Causal attention with rotary positions. x: (B, T, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attended values."""
        b, t, _ = x.shape
        q, k, v = (f(x).view(b, t, HEADS, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(b, t, WIDTH))


class Block(nn.Module):
    """Pre-norm decoder block. x: (B, T, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.RMSNorm(WIDTH), Attention(), nn.RMSNorm(WIDTH)
        self.gate, self.up = nn.Linear(WIDTH, INNER, bias=False), nn.Linear(WIDTH, INNER, bias=False)
        self.down = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The stream after this block."""
        x = x + self.attention(self.norm1(x), cos, sin)
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """tokens: (B, T) int64 -> logits (B, T, vocabulary)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token."""
        width = WIDTH // HEADS
        rates = 10_000.0 ** (-torch.arange(0, width, 2) / width)
        angles = torch.outer(torch.arange(tokens.shape[1]), rates)
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, angles.cos(), angles.sin())
        return self.head(self.norm(x))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def next_token(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def highest_resident() -> int:
    """Bytes of this process's highest resident set so far (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    torch.set_num_threads(1)
    tokens = torch.zeros(1, TOKENS, dtype=torch.long)
    before = highest_resident()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        p = plan(Decoder, (tokens, tokens), loss=next_token)
        times.append(time.perf_counter() - start)
    highest = highest_resident() - before
    weights = 4 * p.parameters
    assert p.exact
    assert p.by_category["optimizer_state"] >= 2 * weights
    document = {
        "claim": "a 7B decoder with 2048 tokens is planned in under 20 s, growing by under 1 GiB",
        "parameters": p.parameters,
        "predicted_bytes": p.total,
        "by_category": p.by_category,
        "phase": p.phase,
        "seconds": {"median": round(statistics.median(times), 2), "all": [round(t, 2) for t in times]},
        "resident_growth_bytes": highest,
        "bytes_planned_per_byte_resident": round(p.total / highest, 1),
        "holds": statistics.median(times) < 20 and highest < 2**30,
        "environment": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "threads": 1,
        },
    }
    atomic_write(RESULT, json.dumps(document, indent=1) + "\n")
    print(json.dumps(document, indent=1))
    sys.exit(0 if document["holds"] else 1)


if __name__ == "__main__":
    main()
