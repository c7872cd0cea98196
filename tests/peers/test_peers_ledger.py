"""The ledger's total against torch's own (private) tracker, and where that one files bytes otherwise."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from memspan.ledger import Ledger

pytestmark = pytest.mark.peers
SETTINGS = {"sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, foreach=False),
            "adam": lambda p: torch.optim.AdamW(p, foreach=False)}  # fmt: skip


def network():
    return nn.Sequential(
        nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256), nn.LayerNorm(256), nn.Linear(256, 10)
    )


@pytest.mark.parametrize("name", SETTINGS)
def test_the_peak_is_that_of_torchs_tracker_and_the_optimizers_temporaries_are_named_apart(name):
    mem_tracker = pytest.importorskip("torch.distributed._tools.mem_tracker")
    model, x, y = network(), torch.randn(64, 256), torch.randint(0, 10, (64,))
    optimizer = SETTINGS[name](model.parameters())

    def step():
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    step()
    optimizer.zero_grad(set_to_none=True)
    tracker = mem_tracker.MemTracker()
    tracker.track_external(model, optimizer, x, y)
    with tracker:
        step()
    snapshot = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    theirs = {getattr(key, "value", key): size for key, size in snapshot.items()}
    optimizer.zero_grad(set_to_none=True)
    with Ledger(model, optimizer, inputs=(x, y)) as led:
        step()
    ours = led.peak.by_category
    assert led.peak.total == theirs["Total"]
    assert ours["parameters.trained"] == theirs["Parameter"]
    filed = ours["optimizer_state"] + ours.get("temporaries.optimizer", 0)
    assert filed == theirs["Optstate"]
    if name == "adam":
        assert (theirs["Optstate"] // 1024, ours["optimizer_state"] // 1024) == (6182, 4130)
