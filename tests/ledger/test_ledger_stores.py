"""Stores that hold bytes outside the graph: counted by closed forms, and never twice."""

import sqlite3
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from memspan.base import BadInput
from memspan.ledger import HoldsBytes, Ledger, header_bytes, memory_bytes, nbytes


@dataclass
class Buffer:
    items: list[torch.Tensor] = field(default_factory=list)
    labels: np.ndarray = field(default_factory=lambda: np.zeros(5, dtype=np.int64))

    def memory_bytes(self) -> dict[str, int]:
        return {"replay.exemplars": nbytes(self.items), "replay.labels": nbytes(self.labels)}


def test_arrays_files_and_lists_of_tensors_count_their_closed_form(tmp_path: Path) -> None:
    file = tmp_path / "store.db"
    with sqlite3.connect(file) as base:
        base.execute("create table t (x blob)")
        base.execute("insert into t values (?)", (bytes(5000),))
    base.close()
    stores = {
        "numpy": np.zeros((100, 3), dtype=np.float32),
        "sqlite": file,
        "memory_bank": [torch.zeros(4) for _ in range(10_000)],
        "replay": Buffer(),
    }
    with Ledger(stores=stores) as led:
        pass
    assert led.current.by_category == {
        "replay.labels": 40,
        "memory_bank": 160_000,
        "memory_bank.headers": header_bytes(stores["memory_bank"]),
        "store.numpy": 1200,
        "store.sqlite": file.stat().st_size,
    }
    assert led.peak.total == led.current.total


def test_ten_thousand_small_tensors_count_their_headers_apart() -> None:
    many = list(tuple(torch.zeros(4) for _ in range(10_000)))  # noqa: C414 - a list without slots to spare
    one = sys.getsizeof(many[0])
    closed = 10_000 * (one + 8) + sys.getsizeof([])
    assert header_bytes(many) == closed > 3 * 160_000
    with Ledger(stores={"cache": many}) as led:
        pass
    assert led.current.by_category == {"store.cache": 160_000, "store.cache.headers": closed}
    with Ledger(stores={"cache": torch.zeros(10_000, 4)}) as led:
        pass
    assert led.current.by_category == {"store.cache": 160_000}
    assert header_bytes([many[0]] * 10_000) == 10_000 * 8 + sys.getsizeof([]) + one
    assert header_bytes({"a": np.zeros(50), "b": "text", "c": 7}) == (
        sys.getsizeof({"a": 1, "b": 2, "c": 3}) + 3 * sys.getsizeof("a")
        + sys.getsizeof(np.zeros(0)) + sys.getsizeof("text") - 4 + sys.getsizeof(7) - 8
    )  # fmt: skip


def test_a_store_that_grows_is_asked_again_and_its_tensors_are_not_counted_twice() -> None:
    buffer, model = Buffer(), nn.Linear(4, 4)
    with Ledger(model, stores={"replay": buffer}, level="timeline") as led:
        for _ in range(3):
            x = torch.randn(8, 4)
            model(x).sum().backward()
            buffer.items.append(x)
        del x
        now = led.current
    assert now.category("replay") == 3 * 128 + 40
    assert now.total == 80 + 80 + 3 * 128 + 40
    for point in led.timeline():
        assert sum(point.by_category.values()) == point.total
    buffer.items.clear()
    assert led.current.category("replay") == 40


def test_a_store_inside_the_model_stays_with_the_model() -> None:
    class Bank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slots = nn.Parameter(torch.zeros(6, 2))

        def memory_bytes(self) -> dict[str, int]:
            return {"memory_bank.slots": self.slots.nbytes}

    bank = Bank()
    assert isinstance(bank, HoldsBytes)
    with Ledger(bank, stores={"memory_bank": bank}) as led:
        pass
    assert led.current.by_category == {"parameters.trained": 48}


def test_tracked_things_take_the_category_they_are_given() -> None:
    with Ledger() as led:
        bank, plain = torch.zeros(10), torch.zeros(5)
        led.track(bank, "memory_bank")
        led.track({"a": [plain]}, "replay.exemplars")
    assert led.current.by_category == {"replay.exemplars": 20, "memory_bank": 40}


def test_bytes_of_anything_countable() -> None:
    x = torch.zeros(4, 4)
    assert nbytes([x, x[1], x.t()]) == 64
    assert nbytes(torch.eye(5).to_sparse()) == 5 * 4 + 2 * 5 * 8
    assert memory_bytes(np.zeros(3)) == {"data": 24}
    with pytest.raises(BadInput, match="memory_bytes"):
        nbytes(object())
