"""SLTT: train a spiking network one time step at a time, in memory that does not grow with time.

Backpropagation through time keeps the activations of all T steps. SLTT drops every backward path that
crosses a step, so that one step is differentiated and freed before the next: what is kept no longer depends
on T, and SLTT-K differentiates K of the T steps alone. The forward pass is the same. What is lost are
gradient paths of weight ``decay ** d`` over d steps: little where neurons leak fast (the reference's tau is
1.1, a decay of 0.09), much where they remember. Source: Meng et al., "Towards Memory- and Time-Efficient
Backpropagation for Training Spiking Neural Networks", ICCV 2023.

Example:
    >>> import torch
    >>> from torch import nn
    >>> from memspan.nn.spiking import LIF
    >>> from memspan.training import sltt
    >>> net = sltt.convert_(nn.Sequential(nn.Linear(6, 16), LIF(tau=1.1), nn.Linear(16, 3)))
    >>> step = sltt.OnlineStep(net, nn.functional.cross_entropy)
    >>> loss, out = step(torch.randn(8, 4, 6), torch.tensor([0, 1, 2, 0]))  # T = 8 steps, 4 examples
    >>> out.shape, net[0].weight.grad.shape
    (torch.Size([4, 3]), torch.Size([16, 6]))
"""

from memspan.training.sltt.agreement import Agreement, gradient_agreement
from memspan.training.sltt.convert import convert_, restore_
from memspan.training.sltt.planned import (
    planned_convert_,
    planned_step,
    planned_tbptt_,
    planned_tbptt_step,
    predict_bytes,
)
from memspan.training.sltt.steps import BPTTStep, CheckpointedStep, OnlineStep, TBPTTStep, TimeDropout

__all__ = [
    "Agreement",
    "BPTTStep",
    "CheckpointedStep",
    "OnlineStep",
    "TBPTTStep",
    "TimeDropout",
    "convert_",
    "gradient_agreement",
    "planned_convert_",
    "planned_step",
    "planned_tbptt_",
    "planned_tbptt_step",
    "predict_bytes",
    "restore_",
]
