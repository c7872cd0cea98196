"""The second track of the recipe ``peqa``: a pretrained encoder and four domains, a task for each."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memspan import data
from memspan.base.rng import rng
from memspan.ledger import Ledger, memory_bytes, training_step
from memspan.nn.pool import masked_mean
from memspan.recipes.engine import Cell, Measurements, Outcome, Task
from memspan.recipes.tracks.sentiment import Reviews, reviews
from memspan.report import claim
from memspan.report.schema import Claim
from memspan.report.stats import Interval, mean_interval
from memspan.training import linear_probe_, lora_, peqa

__all__ = ["sentiment", "sentiment_claims"]

_TOKENS, _BATCH, _TEST = 48, 32, 500
_RATES = {"full fine-tuning": 3e-5, "frozen encoder": 1e-3, "LoRA": 1e-3}
_SOURCE = "four-domain sentiment, not in the paper"


class Reader(nn.Module):
    """A sentence encoder with a one-number head. (ids, mask), both (B, T), to (B,)."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(width, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Log odds of a positive rating."""
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        answer: Tensor = self.head(masked_mean(states, mask)).squeeze(-1)
        return answer


def sentiment(task: Task[Any], widths: Sequence[int], steps: int) -> None:
    """Every method on every domain; PEQA's domains share one integer model."""
    rated = reviews()
    task.use(rated.table)
    known = data.backbone("minilm")
    domains = sorted(set(rated.domain.tolist()))
    makers: dict[tuple[str, int], Callable[[nn.Module], nn.Module]] = {
        ("full fine-tuning", 32): lambda model: model,
        ("frozen encoder", 32): lambda model: linear_probe_(model, "head"),
        ("LoRA", 32): lambda model: lora_(model, 4, 8.0, _query_value(model), head="head"),
    }
    for bits in widths:
        makers["PEQA", bits] = functools.partial(
            peqa.quantize_, bits=bits, group_size=64, also_train=("head",)
        )
    for seed in task.seeds:
        for domain in domains:
            rows = np.flatnonzero(rated.domain == domain)
            rows = rng("peqa.split", domain, seed).permutation(rows)
            for (name, bits), make in makers.items():
                work = functools.partial(
                    _tune, known=known, rated=rated, rows=rows, make=make, steps=max(2, steps // 4)
                )
                setting = {"track": "sentiment", "domain": domain, "bits": bits}
                task.measure(method=name, seed=seed, setting=setting, work=work)


def _tune(
    cell: Cell,
    known: data.Backbone,
    rated: Reviews,
    rows: Any,
    make: Callable[..., nn.Module],
    steps: int,
) -> Outcome:
    model = make(Reader(copy.deepcopy(known.module), known.feature_dim).to(cell.device))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if peqa.layers(model):
        own = {id(layer.scales) for layer in peqa.layers(model).values()}
        rate = 20 * peqa.suggest_lr(model)
        groups = [
            {"params": [p for p in trained if id(p) in own], "lr": rate},
            {"params": [p for p in trained if id(p) not in own], "lr": 1e-3},
        ]
    else:
        rate = _RATES[cell.method]
        groups = [{"params": trained, "lr": rate}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    held_out = min(_TEST, len(rows) // 2)
    train, test = rows[held_out:], rows[:held_out]
    held: dict[str, int] = {}
    model.train()
    with cell.timed("tune"):
        for step in range(steps):
            chosen = rng("peqa.sentiment", cell.seed, step).choice(
                train, min(_BATCH, len(train)), replace=False
            )
            batch = _batch(known, rated, chosen, cell.device)
            if step == 1:
                with Ledger(model, optimizer) as led:
                    training_step(model, optimizer, batch, F.binary_cross_entropy_with_logits)
                held = dict(led.peak.by_category)
            else:
                training_step(model, optimizer, batch, F.binary_cross_entropy_with_logits)
            cell.step(step + 1, steps)
    model.eval()
    right = 0.0
    with torch.no_grad(), cell.timed("evaluate"):
        for start in range(0, len(test), 64):
            ids, mask, wanted = _batch(known, rated, test[start : start + 64], cell.device)
            right += float(((model(ids, mask) > 0) == (wanted > 0.5)).sum())
    own_bytes = sum(memory_bytes(model).values())
    found = {"accuracy": right / len(test), "model": float(own_bytes), "task": float(own_bytes)}
    if peqa.layers(model):
        found["task"] = float(sum(peqa.get_task(model).memory_bytes().values()))
    return Outcome(found, held, trained=sum(p.numel() for p in trained))


def _batch(
    known: data.Backbone, rated: Reviews, rows: Any, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    texts = [str(text) for text in rated.texts[rows]]
    read = known.tokenizer(texts, padding=True, truncation=True, max_length=_TOKENS, return_tensors="pt")
    wanted = torch.from_numpy(rated.liked[rows].astype(np.float32))
    return read["input_ids"].to(device), read["attention_mask"].to(device), wanted.to(device)


def _query_value(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules() if name.endswith((".query", ".value"))]


def sentiment_claims(found: Measurements) -> list[Claim]:
    """Accuracy paired over seeds (domains inside a seed are averaged); bytes of four deployed tasks."""
    own = found.where(track="sentiment")
    widths = [int(bits) for bits in own.where(method="PEQA").settings("bits")]

    def mean(method: str, seed: int, bits: int) -> float:
        return 100 * float(np.mean(own.where(method=method, seed=seed, bits=bits).values("accuracy")))

    claims = []
    for bits in widths:
        gain = [mean("PEQA", seed, bits) - mean("frozen encoder", seed, 32) for seed in own.seeds]
        text = f"scales at {bits} bits (g = 64) learn four domains better than a head on the frozen encoder"
        claims.append(claim(text, _SOURCE, mean_interval(gain), "> 0", "points"))
        rows = own.where(method="PEQA", seed=own.seeds[0], bits=bits)
        four = rows[0].quality["model"] + sum(rows.values("task"))
        whole = sum(own.where(method="full fine-tuning", seed=own.seeds[0]).values("model"))
        share = Interval(four / whole, four / whole, four / whole, 1)
        text = f"one {bits}-bit model and a file a task take under half of as many fine-tuned models"
        claims.append(claim(text, _SOURCE, share, "< 0.5", "x", exact=True))
    return claims
