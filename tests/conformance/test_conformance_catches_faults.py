"""The suite itself is put to the test: systems broken in the ways of published code must be caught."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from conformance.contracts import (
    CHECKS,
    System,
    check_a_learner_changes_what_it_answers,
    check_bad_input_is_refused,
    check_bytes,
    check_every_parameter_learns,
    check_everything_follows_to,
    check_everything_kept_is_in_the_state,
    check_seeds,
    check_state_is_not_shared,
    check_state_round_trip,
    run_check,
)
from memspan.base import refuse


class Sound(nn.Module):
    """A linear layer beside a bank of rows: keeps every contract."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(4, 3, generator=draws))
        self.register_buffer("bank", torch.randn(5, 3, generator=draws))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != 4:
            refuse("x", tuple(x.shape), "give rows of 4 numbers")
        return x @ self.weight @ self.bank.T


class Unregistered(Sound):
    """A parameter that is a plain tensor: no optimizer finds it, no file holds it."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.scale = (torch.ones(3) * 2).requires_grad_()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale.sum()


class BankInDictionary(Sound):
    """A memory bank in a Python dictionary, which no checkpoint holds."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.domains = {"a": torch.randn(5, generator=torch.Generator().manual_seed(seed))}

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.domains["a"].to(x.dtype)


class Detached(Sound):
    """A loss that is cut from its parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


class PartDetached(Sound):
    """One of two parameters behind a detach."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.gate = nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gate.detach()


class WrongBytes(Sound):
    """Claims the parameters and leaves out the bank."""

    def memory_bytes(self) -> dict[str, int]:
        return {"parameters": self.weight.nbytes}


class LoadsByReference(Sound):
    """The "best" state kept by reference: it changes as training goes on."""

    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        return super().load_state_dict(state, strict, assign=True)


class Seedless(Sound):
    """Draws the same whatever the seed."""

    def __init__(self, seed: int) -> None:
        super().__init__(0)


class Accepting(Sound):
    """Takes input of any width without a word."""

    def forward(self, x: Tensor) -> Tensor:
        return x[..., :1] @ self.weight[:1] @ self.bank.T + x.sum() * self.weight.sum()


class SoundLearner:
    """Class means on pixels: keeps every contract of a learner."""

    def __init__(self, seed: int = 0) -> None:
        self.means: dict[int, Tensor] = {}
        self.noise = torch.randn(64, generator=torch.Generator().manual_seed(seed))
        self.total = torch.zeros(1)

    def partial_fit_task(self, X: np.ndarray, y: np.ndarray) -> SoundLearner:
        if len(X) != len(y) or not len(X):
            refuse("y", len(y), "give one label a row, and at least one row")
        self.total = self.total + len(X)
        for label in np.unique(y):
            self.means[int(label)] = torch.from_numpy(X[y == label].reshape(-1, 64).astype(np.float32)).mean(
                0
            )
        return self

    def decision_function(self, X: np.ndarray) -> np.ndarray:
        rows = torch.from_numpy(X.reshape(-1, 64).astype(np.float32))
        return torch.stack(
            [-(rows - self.means[k] - self.noise).square().sum(1) for k in sorted(self.means)], 1
        ).numpy()

    def state_dict(self) -> dict[str, Tensor]:
        means = {f"mean.{label}": mean for label, mean in self.means.items()}
        return {"noise": self.noise, "total": self.total, **means}

    def load_state_dict(self, state: dict[str, Tensor]) -> SoundLearner:
        self.noise, self.total = state["noise"].clone(), state["total"].clone()
        self.means = {int(k[5:]): v.clone() for k, v in state.items() if k.startswith("mean.")}
        return self

    def memory_bytes(self) -> dict[str, int]:
        return {"class_means": sum(tensor.nbytes for tensor in self.state_dict().values())}


class ForgetfulLearner(SoundLearner):
    """Its means never reach a checkpoint."""

    def state_dict(self) -> dict[str, Tensor]:
        return {"noise": self.noise, "total": self.total, "mean.0": self.means[0]}


class ReferenceLearner(SoundLearner):
    """Loads by reference and learns in place."""

    def load_state_dict(self, state: dict[str, Tensor]) -> SoundLearner:
        super().load_state_dict(state)
        self.total = state["total"]
        return self

    def partial_fit_task(self, X: np.ndarray, y: np.ndarray) -> SoundLearner:
        kept = self.total
        super().partial_fit_task(X, y)
        self.total = kept.add_(len(X))
        return self


class FrozenLearner(SoundLearner):
    """Takes tasks and learns nothing: its update is cut off."""

    def partial_fit_task(self, X: np.ndarray, y: np.ndarray) -> SoundLearner:
        if not self.means:
            return super().partial_fit_task(X, y)
        return self


class LosingLearner(SoundLearner):
    """Half takes what it then refuses."""

    def partial_fit_task(self, X: np.ndarray, y: np.ndarray) -> SoundLearner:
        self.total = self.total + 1
        return super().partial_fit_task(X, y)


def toy(build: Callable[[int], Any]) -> System:
    if issubclass(build, SoundLearner):  # type: ignore[arg-type]
        return System("toy", "learner", build=build)
    return System(
        "toy", "module", build=build, example=lambda: (torch.linspace(-1, 1, 24).view(6, 4),),
        refused=(lambda module: module(torch.zeros(2, 7)),),
    )  # fmt: skip


@pytest.mark.parametrize("build", [Sound, SoundLearner])
def test_a_sound_system_passes_every_contract(build: Any, tmp_path: Path) -> None:
    system = toy(build)
    for check in CHECKS[system.kind]:
        run_check(check, system, tmp_path)


@pytest.mark.parametrize(
    ("build", "check", "message"),
    [
        (Unregistered, check_everything_kept_is_in_the_state, "held outside the state: Unregistered.scale"),
        (Unregistered, check_everything_follows_to, "does not follow .to.*scale"),
        (BankInDictionary, check_everything_kept_is_in_the_state, "domains"),
        (BankInDictionary, check_state_round_trip, "answers otherwise"),
        (Detached, check_every_parameter_learns, "detached"),
        (PartDetached, check_every_parameter_learns, "no gradient reaches gate"),
        (WrongBytes, check_bytes, "48 bytes claimed, 108 on disk"),
        (LoadsByReference, check_state_is_not_shared, "kept by reference"),
        (Seedless, check_seeds, "two seeds give the same state"),
        (Accepting, check_bad_input_is_refused, "DID NOT RAISE"),
        (ForgetfulLearner, check_state_round_trip, "answers otherwise"),
        (ReferenceLearner, check_state_is_not_shared, "kept by reference: total"),
        (FrozenLearner, check_a_learner_changes_what_it_answers, "no number of the state changed"),
        (LosingLearner, check_bad_input_is_refused, "a refused call changed total"),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_a_fault_is_caught(build: Any, check: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception), match=message):
        run_check(check, toy(build), tmp_path)
