"""Whether an optimizer may be cut anywhere: does each element step as if it were alone?"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.optim import Optimizer

__all__ = ["whole_tensor"]

_KNOWN = (
    "SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Adadelta", "NAdam", "RAdam", "Adamax", "ASGD", "Rprop",
)  # fmt: skip
_ROWS, _COLUMNS, _CUT = 128, 80, 3333  # more than a block of the block-wise 8-bit optimizers


def whole_tensor(make: Callable[..., Optimizer], options: Mapping[str, Any]) -> str:
    """Why an optimizer must not be cut inside a tensor; empty where it may.

    torch's own are known; another is tried: three steps of a matrix against three steps of its two parts.
    """
    made = make.func if isinstance(make, functools.partial) else make
    if made in {getattr(torch.optim, name) for name in _KNOWN}:
        return ""
    with unset_fake_temporarily(), torch.device("cpu"), torch.enable_grad():
        values = torch.sin(torch.arange(_ROWS * _COLUMNS, dtype=torch.float32))
        whole = nn.Parameter(values.view(_ROWS, _COLUMNS).clone())
        parts = [nn.Parameter(values[:_CUT].clone()), nn.Parameter(values[_CUT:].clone())]
        try:
            one, two = make([{"params": [whole]}], **options), make([{"params": parts}], **options)
            for step in range(3):
                gradient = torch.cos(values * (step + 2)) * (1 + values.abs())
                whole.grad = gradient.view_as(whole).clone()
                parts[0].grad, parts[1].grad = gradient[:_CUT].clone(), gradient[_CUT:].clone()
                one.step()
                two.step()
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
            return f"it does not step parts of a matrix ({error})"
        if torch.allclose(whole.detach().view(-1), torch.cat([p.detach() for p in parts]), 1e-5, 1e-7):
            return ""
    return "parts of a matrix step otherwise than the whole"
