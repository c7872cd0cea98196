"""Every system under the contracts: one line each. A line is all that a new system adds to this folder."""

from __future__ import annotations

import functools

import torch
from torch import nn

from conformance.contracts import System
from memspan.continual.memo import MEMOClassifier
from memspan.ledger import plan

_MEMO = functools.partial(MEMOClassifier, "resnet8", "2MiB", steps=2, batch_size=8, horizon=(2, 4))

SYSTEMS = [
    System("ledger", "tool", refused=(lambda _: plan(nn.Linear(2, 2), torch.zeros(1, 2), device="abacus"),)),
    System("memo", "learner", build=lambda seed: _MEMO(seed=seed)),
]
