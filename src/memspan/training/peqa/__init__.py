"""PEQA: fine-tune a model in the 2, 3 or 4 bits it will be deployed in, by its quantization scales alone.

The problem: LoRA on a quantized base leaves a 16-bit adapter beside low-bit weights; merged, it loses the
adaptation or the quantization. The idea: quantize once, freeze the integers, train only the scales. The tuned
model has the same integers and format, and a task is one small vector of scales a layer, swapped in place.

Source: Kim et al., "Memory-Efficient Fine-Tuning of Compressed Large Language Models via sub-4-bit Integer
Quantization", NeurIPS 2023, section 3. Differences: the weight is never built whole (:func:`quant_matmul`),
and ranges are searched at the start.

Example:
    >>> import torch
    >>> from torch import nn
    >>> from memspan.training import peqa
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    >>> model = peqa.quantize_(model, bits=3)
    >>> optimizer = torch.optim.AdamW(peqa.scales(model), lr=peqa.suggest_lr(model), weight_decay=0.0)
    >>> model(torch.randn(4, 64)).square().mean().backward()
    >>> optimizer.step()
    >>> task = peqa.get_task(model)          # 72 numbers; peqa.save_task writes them
    >>> peqa.set_task(model, task)
    >>> type(peqa.dequantize_(model)[0]).__name__
    'Linear'

When not to use it: the weights stay in 16 bits anyway (LoRA learns more for its bytes), the domain is far
away and the model small (a scale moves a whole row or group of weights, never one alone), or activations hold
most of the memory (they are those of full fine-tuning: checkpoint them).
"""

from memspan.training.peqa.convert import (
    LayerSummary,
    Summary,
    check,
    dequantize_,
    layers,
    predict_bytes,
    quantize_,
    scales,
    suggest_lr,
    summary,
)
from memspan.training.peqa.disk import load, save
from memspan.training.peqa.export import export
from memspan.training.peqa.grids import Grid, dequantize, minmax_grid, optq_, quantize, rtn_grid
from memspan.training.peqa.layers import (
    QuantConv2d,
    QuantEmbedding,
    Quantized,
    QuantLinear,
    quant_matmul,
    quant_matmul_naive,
)
from memspan.training.peqa.tasks import Task, get_task, load_task, save_task, set_task

__all__ = [
    "Grid",
    "LayerSummary",
    "QuantConv2d",
    "QuantEmbedding",
    "QuantLinear",
    "Quantized",
    "Summary",
    "Task",
    "check",
    "dequantize",
    "dequantize_",
    "export",
    "get_task",
    "layers",
    "load",
    "load_task",
    "minmax_grid",
    "optq_",
    "predict_bytes",
    "quant_matmul",
    "quant_matmul_naive",
    "quantize",
    "quantize_",
    "rtn_grid",
    "save",
    "save_task",
    "scales",
    "set_task",
    "suggest_lr",
    "summary",
]
