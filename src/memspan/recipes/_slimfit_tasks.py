"""What the recipe ``slimfit`` fine-tunes: MiniLM on movie reviews, else a small ViT on images."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memspan import data
from memspan.base.rng import rng
from memspan.recipes.engine import Task
from memspan.recipes.engine.trained import trained_once

__all__ = ["TextClassifier", "Tuning", "VisionTransformer", "image_tuning", "text_tuning"]

Batch = tuple[tuple[Tensor, ...], Tensor]


class Tuning(NamedTuple):
    """A pretrained model and what it is to learn."""

    name: str
    build: Callable[[int], nn.Module]  # seed of the new head
    train: Callable[[int, int, int], Batch]  # (seed, step, examples) -> inputs and labels
    test: Batch


class TextClassifier(nn.Module):
    """A pretrained encoder, the mean over its tokens, and a new head. ids, mask: (B, T) -> (B, classes)."""

    def __init__(self, encoder: nn.Module, width: int, classes: int = 2) -> None:
        super().__init__()
        self.encoder, self.classifier = encoder, nn.Linear(width, classes)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits."""
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        wide = mask.unsqueeze(-1).to(hidden.dtype)
        logits: Tensor = self.classifier((hidden * wide).sum(1) / wide.sum(1).clamp_min(1))
        return logits


class VisionTransformer(nn.Module):
    """Patches, positions, pre-norm blocks, mean, head. x: (B, C, S, S) -> (B, classes)."""

    def __init__(
        self, side: int, channels: int, patch: int, width: int, depth: int, classes: int = 10
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (side // patch) ** 2, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, max(1, width // 32), 4 * width, 0.1, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x).mean(dim=1))
        return logits


def text_tuning(task: Task[Any], tokens: int, reviews: int, learned: int = 0) -> Tuning:
    """MiniLM on movie reviews: above or below the middle of the ratings.

    ``reviews`` are held out; ``learned`` others are trained on (0: all others).

    Raises:
        DataNotFound: the reviews or the weights are not here.
        ImportError: transformers is not.
    """
    table = task.use(data.load("four-domain-sentiment", data.TableSet))
    known = task.use(data.backbone("minilm"))
    domain, rating = table.columns["domain"], table.columns["mean_rating"].astype(float)
    rows = np.flatnonzero(domain == _movie(domain))
    rows = rng("slimfit", "reviews").permutation(rows)
    labels = (rating[rows] > np.median(rating[rows])).astype(np.int64)
    texts = [str(table.columns["text"][row]) for row in rows]
    coded = known.tokenizer(
        texts, padding="max_length", truncation=True, max_length=tokens, return_tensors="pt"
    )
    ids, mask, y = coded["input_ids"], coded["attention_mask"], torch.from_numpy(labels)
    held_out, rest = slice(0, reviews), slice(reviews, reviews + learned if learned else None)

    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return TextClassifier(copy.deepcopy(known.module), known.feature_dim)

    return Tuning(
        f"MiniLM-L6, {tokens} tokens",
        build,
        _batches((ids[rest], mask[rest]), y[rest]),
        ((ids[held_out], mask[held_out]), y[held_out]),
    )


def image_tuning(task: Task[Any], steps: int, images: int) -> Tuning:
    """A ViT trained here on nine classes, then to be tuned on all ten with images it has not seen."""
    known = task.use(data.load_first(("cifar10-jpeg", "digits"), data.ImageSet))
    x, y = _pixels(known.x_train), torch.from_numpy(known.y_train.astype(np.int64))
    side, channels = x.shape[2], x.shape[1]
    half = len(x) // 2
    nine = torch.nonzero(y[:half] != 9).flatten()
    pretraining = _batches((x[nine],), y[nine])

    def make() -> VisionTransformer:
        small = side <= 8
        return VisionTransformer(side, channels, 2 if small else 4, 32 if small else 128, 2 if small else 6)

    def train(model: nn.Module, _: object) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        for step in range(steps):
            inputs, labels = pretraining(0, step, 64)
            F.cross_entropy(model(*inputs), labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    pretrained = trained_once(
        "slimfit-vit", make, train, {"images": known.sha256, "steps": steps, "classes": 9}
    )

    def build(seed: int) -> nn.Module:
        model = copy.deepcopy(pretrained)
        torch.manual_seed(seed)
        model.head = nn.Linear(model.head.in_features, 10)
        return model

    test = _pixels(known.x_test[:images]), torch.from_numpy(known.y_test[:images].astype(np.int64))
    return Tuning(f"ViT on {known.name}", build, _batches((x[half:],), y[half:]), ((test[0],), test[1]))


def _batches(inputs: tuple[Tensor, ...], y: Tensor) -> Callable[[int, int, int], Batch]:
    def batch(seed: int, step: int, examples: int) -> Batch:
        rows = torch.from_numpy(rng("slimfit", "batch", seed, step).integers(0, len(y), examples))
        return tuple(x[rows] for x in inputs), y[rows]

    return batch


def _movie(domain: Any) -> str:
    names = sorted({str(name) for name in domain})
    return next((name for name in names if "movie" in name.lower()), names[0])


def _pixels(images: Any) -> Tensor:
    x = torch.from_numpy(np.ascontiguousarray(images)).float() / 255
    return x.permute(0, 3, 1, 2).contiguous() if x.dim() == 4 else x.unsqueeze(1)
