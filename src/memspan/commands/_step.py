"""What ``plan`` and ``fit`` ask alike: the model, its batch, the optimizer, the device, the ranks."""

from __future__ import annotations

from typing import Any

import click

__all__ = ["BATCH", "DEVICE", "MODEL_HELP", "OPTIMIZER", "TOKENS", "WORLD", "optimizer_of"]

MODEL_HELP = (
    "MODEL is path/to/file.py:function, where function() returns (build_model, batch) or "
    "(build_model, batch, loss); or a config.json of transformers or a folder with one; or a name: a model "
    "type or class of transformers (llama, BertForSequenceClassification), a cached name of the hub, a model "
    "of timm (resnet50). Weights are never fetched."
)
BATCH = click.option(
    "--batch", type=click.IntRange(min=1), default=8, show_default=True, help="Examples, for a MODEL by name."
)
TOKENS = click.option(
    "--tokens", type=click.IntRange(min=1), help="Length of sequences, for a MODEL of text by name. [512]"
)
WORLD = click.option(
    "--world",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Ranks over which FSDP2, or a method that shards, spreads the model; the batch is each rank's.",
)
OPTIMIZER = click.option(
    "--optimizer",
    type=click.Choice(["adamw", "adam", "sgd", "none"]),
    default="adamw",
    show_default=True,
    help="Optimizer of the step.",
)
DEVICE = click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")


def optimizer_of(name: str) -> Any:
    import torch

    return {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD, "none": None}[name]
