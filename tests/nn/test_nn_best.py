"""The best epoch is a copy, buffers of any length included."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from memspan.base import BadInput
from memspan.nn.best import BestState


def test_what_trains_on_does_not_change_the_best_state():
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    best = BestState(net)
    net(torch.randn(4, 2))
    best.update(0.3)
    kept = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with torch.no_grad():
        for tensor in net.state_dict().values():
            tensor.add_(1)
    assert not best.update(0.2)
    assert best.memory_bytes() == {"snapshot.best": sum(tensor.nbytes for tensor in kept.values())}
    best.restore_()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in net.state_dict().items())
    with torch.no_grad():
        net[0].weight.zero_()
    best.restore_()
    assert torch.equal(net[0].weight, kept["0.weight"])


def test_it_waits_as_long_as_it_was_told():
    best = BestState(nn.Linear(1, 1), patience=2)
    assert [best.update(score) for score in (0.1, 0.3, 0.3, 0.2)] == [False, False, False, True]
    assert (best.epoch, best.score) == (1, 0.3)


def test_scores_and_patience_that_mean_nothing_are_refused():
    with pytest.raises(BadInput, match="patience=0"):
        BestState(nn.Linear(1, 1), patience=0)
    best = BestState(nn.Linear(1, 1))
    with pytest.raises(BadInput, match="diverged"):
        best.update(math.nan)
    best.restore_()
