"""Training recipe and export: the two ends of a model's life."""

from __future__ import annotations

import math
import os

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from memspan.base import optional, refuse
from memspan.base.files import atomic_path
from memspan.models.efficientvit.network import EfficientViT

__all__ = ["export_onnx", "optimizer_and_schedule", "parameter_groups"]


def parameter_groups(model: nn.Module, weight_decay: float = 0.025) -> list[dict[str, object]]:
    """Split the trained parameters: weights decay; norms, biases and attention biases do not.

    Args:
        model: the model.
        weight_decay: decay of the weights.

    Example:
        >>> from memspan.models.efficientvit import efficientvit_m0
        >>> [group["weight_decay"] for group in parameter_groups(efficientvit_m0(num_classes=2))]
        [0.025, 0.0]
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plain = [p for name, p in named if p.dim() > 1 and not name.endswith("attention_biases")]
    spared = [p for name, p in named if p.dim() <= 1 or name.endswith("attention_biases")]
    return [{"params": plain, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]


def optimizer_and_schedule(
    model: nn.Module, lr: float, steps: int, warmup_steps: int = 0, weight_decay: float = 0.025
) -> tuple[AdamW, LambdaLR]:
    """The published optimizer: AdamW, a linear warm-up from 1e-6 and a cosine to 1e-5.

    ``lr`` is the absolute peak rate. The official script multiplies what it is given by (batch size over all
    processes)/512: its published command, 1e-3 with 8 x 256 images, trains at 4e-3.

    Args:
        model: the model.
        lr: peak learning rate, absolute.
        steps: steps in all; step the schedule after each.
        warmup_steps: steps of the warm-up (5 of 300 epochs in the paper).
        weight_decay: decay of weights; see :func:`parameter_groups`.

    Raises:
        BadInput: not 0 <= warmup_steps < steps.

    Example:
        >>> optimizer, schedule = optimizer_and_schedule(nn.Linear(2, 2), lr=1e-3, steps=10, warmup_steps=2)
        >>> rates = []
        >>> for _ in range(10):
        ...     rates.append(optimizer.param_groups[0]["lr"]); optimizer.step(); schedule.step()
        >>> f"{rates[0]:.0e} {max(rates):.0e} {schedule.get_last_lr()[0]:.0e}"
        '1e-06 1e-03 1e-05'
    """
    if not 0 <= warmup_steps < steps:
        refuse("warmup_steps", warmup_steps, f"give 0 or more and fewer than steps={steps}")
    low, first = min(1e-5, lr), min(1e-6, lr)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (first + (lr - first) * step / warmup_steps) / lr
        through = (min(step, steps) - warmup_steps) / (steps - warmup_steps)
        return (low + (lr - low) * (1 + math.cos(math.pi * through)) / 2) / lr

    optimizer = AdamW(parameter_groups(model, weight_decay), lr=lr)
    return optimizer, LambdaLR(optimizer, factor)


def export_onnx(model: EfficientViT, path: str | os.PathLike[str]) -> None:
    """Write the model as ONNX with a dynamic batch, ready for ONNX Runtime; fuse it first for speed.

    The file's input is ``images`` ``(batch, in_chans, rows, columns)`` and its output ``logits``.

    Args:
        model: a model in evaluation mode.
        path: the file to write, whole or not at all.

    Raises:
        BadInput: training mode.
        ImportError: onnx or onnxscript is not installed; the message has the command.
    """
    if model.training:
        refuse("model", "in training mode", "call model.eval() first, and fuse_(model) for speed")
    for module in ("onnx", "onnxscript"):
        optional(module, extra="onnx")
    example = next(model.parameters()).new_zeros((2, model.in_chans, *model.img_size))
    program = torch.onnx.export(
        model,
        (example,),
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes={"x": {0: torch.export.Dim("batch")}},
        verbose=False,
    )
    assert program is not None
    with atomic_path(path) as temporary:
        program.save(str(temporary), external_data=False)
