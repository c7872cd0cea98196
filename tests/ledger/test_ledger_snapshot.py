"""Snapshots are plain data: they sum, subtract, rank, and travel as JSON; arithmetic is counted."""

import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from memspan.base import BadInput
from memspan.ledger import CATEGORIES, Holding, Ledger, Snapshot, flops, macs

HOLDINGS = st.lists(
    st.builds(
        Holding,
        bytes=st.integers(1, 10**12),
        category=st.sampled_from([name for name in CATEGORIES if name != "unattributed"]),
        module=st.sampled_from(["", "a", "a.b", "a.b.c", "d.e"]),
        phase=st.sampled_from(["", "forward:a"]),
        shape=st.lists(st.integers(0, 9), max_size=3).map(tuple),
    ),
    max_size=8,
)


@given(HOLDINGS, st.none() | st.integers(0, 10**12))
def test_sums_agree_and_json_gives_the_same_snapshot_back(blocks, allocator) -> None:
    now = Snapshot.of(blocks, phase="forward:a", device="cpu", allocator=allocator)
    assert sum(now.by_category.values()) == now.total
    assert now.total == (sum(block.bytes for block in blocks) if allocator is None else allocator)
    for depth in (None, 1, 2):
        assert sum(now.by_module(depth).values()) == now.total
    back = Snapshot.from_json(now.to_json())
    assert (back.total, back.by_category, back.allocator) == (now.total, now.by_category, now.allocator)
    assert sorted(back.holdings, key=repr) == sorted(now.holdings, key=repr)


@given(HOLDINGS, HOLDINGS)
def test_a_difference_is_zero_exactly_between_equals(first, second) -> None:
    a, b = Snapshot.of(first), Snapshot.of(second)
    assert (a - a).by_category == {}
    assert (a - a).holdings == ()
    assert (a - b).total == a.total - b.total == sum((a - b).by_category.values())


def test_the_largest_holdings_come_first() -> None:
    model = nn.Sequential(nn.Linear(4, 100), nn.Linear(100, 3))
    with Ledger(model) as led:
        pass
    assert [(block.module, block.shape) for block in led.peak.top(2)] == [("0", (100, 4)), ("1", (3, 100))]
    assert led.peak.by_module(1) == {"0": 2000, "1": 1212}
    assert "parameters.trained" in str(led.peak)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 99}', '{"schema": 1, "total": "many"}'])
def test_a_damaged_snapshot_is_refused(text: str) -> None:
    with pytest.raises(BadInput):
        Snapshot.from_json(text)


def test_equal_holdings_are_written_once() -> None:
    now = Snapshot.of([Holding(8, "replay")] * 1000)
    assert len(json.loads(now.to_json())["holdings"]) == 1
    assert Snapshot.from_json(now.to_json()) == now


def test_depth_zero_is_refused() -> None:
    with pytest.raises(BadInput, match="depth"):
        Snapshot(0, {}).by_module(0)


def test_operations_are_two_per_multiply_add_forward_and_backward() -> None:
    layer, x = nn.Linear(8, 4), torch.randn(2, 8)
    assert flops(layer, x) == 2 * macs(layer, x) == 2 * 2 * 8 * 4
    assert flops(lambda: layer(x).sum().backward()) == 2 * (2 * 2 * 8 * 4)  # the input needs no gradient
    conv = nn.Conv2d(3, 5, 3, padding=1)
    assert macs(conv, torch.randn(1, 3, 7, 7)) == 7 * 7 * 5 * 3 * 9
    q = torch.randn(1, 2, 6, 4)
    assert macs(F.scaled_dot_product_attention, q, q, q) == 2 * (2 * 6 * 6 * 4)
    q.requires_grad_()
    assert macs(lambda: F.scaled_dot_product_attention(q, q, q).sum().backward()) == (2 + 5) * (2 * 6 * 6 * 4)
    with pytest.raises(BadInput, match="function"):
        flops(3)
