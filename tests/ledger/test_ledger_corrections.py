"""Each correction of torch is still needed, and right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from memspan.ledger.corrections import CORRECTIONS, Correction, corrected


def _storages(found: Any) -> list[tuple[torch.dtype, tuple[int, ...], int]]:
    return [
        (item.dtype, item.stride(), item.untyped_storage().nbytes())
        for item in tree_leaves(found)
        if isinstance(item, Tensor)
    ]


def _faked(one: Correction) -> tuple[list[Any], list[Any]]:
    operator, args = one.sample()
    with FakeTensorMode() as mode:
        fake = tree_map(lambda item: mode.from_tensor(item) if isinstance(item, Tensor) else item, args)
        try:
            plain = _storages(operator(*fake))
        except RuntimeError:
            plain = []
        with corrected("cpu", "cpu"):
            return plain, _storages(operator(*fake))


@pytest.mark.parametrize("one", CORRECTIONS, ids=lambda one: str(one.operators[0]))
def test_a_correction_is_right_and_cannot_go_yet(one: Correction) -> None:
    operator, args = one.sample()
    real = _storages(operator(*args))
    plain, mended = _faked(one)
    assert mended == real
    assert plain != real, f"torch {torch.__version__} has mended this: take {operator} out of the table"


def test_fake_parameters_still_refuse_to_be_swapped() -> None:
    with FakeTensorMode():
        model = nn.Linear(3, 3)
        with pytest.raises(RuntimeError, match="swap"):
            model.half()
        with corrected("cpu", "cpu"):
            assert nn.Linear(3, 3).half().weight.dtype is torch.float16


def test_only_a_running_optimizer_is_given_numbers() -> None:
    with FakeTensorMode(), corrected("cpu", "cpu") as facts:
        x = torch.zeros(3).sum()
        facts.enter_step()
        assert x.item() == 1.0
        facts.leave_step()
        with pytest.raises(RuntimeError):
            x.item()
