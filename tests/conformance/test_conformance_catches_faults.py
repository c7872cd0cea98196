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
    check_a_scorer_scores_every_row,
    check_an_adapter_adapts_and_goes_back,
    check_bad_input_is_refused,
    check_bytes,
    check_every_parameter_learns,
    check_everything_follows_to,
    check_everything_kept_is_in_the_state,
    check_scorer_seeds,
    check_seeds,
    check_state_is_not_shared,
    check_state_round_trip,
    check_trained,
    run_check,
)
from memspan.base import refuse
from memspan.report.schema import Measurement


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


class SoundAdapter:
    """Follows the mean of what it sees, beside a network it never changes: keeps every contract."""

    def __init__(self, seed: int = 0) -> None:
        self.weight = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
        self.shift = torch.zeros(4)

    def adapt(self, x: Tensor) -> Tensor:
        answer = self.predict(x)
        self.shift = 0.5 * self.shift + 0.5 * x.mean(0)
        return answer

    def predict(self, x: Tensor) -> Tensor:
        if x.shape[-1] != 4:
            refuse("x", tuple(x.shape), "give rows of 4 numbers")
        return (x - self.shift) @ self.weight

    def reset(self) -> None:
        self.shift = torch.zeros(4)

    def state_dict(self, only: str = "all") -> dict[str, Tensor]:
        return {"shift": self.shift} | ({"weight": self.weight} if only == "all" else {})

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.shift, self.weight = state["shift"].clone(), state["weight"].clone()

    def memory_bytes(self) -> dict[str, int]:
        return {"parameters": self.weight.nbytes, "buffers": self.shift.nbytes}


class LearningPredictor(SoundAdapter):
    """Learns from what it is only asked to predict."""

    def predict(self, x: Tensor) -> Tensor:
        answer = super().predict(x)
        self.shift = 0.9 * self.shift + 0.1 * x.mean(0)
        return answer


class NoReset(SoundAdapter):
    """Keeps what it learnt."""

    def reset(self) -> None:
        pass


class Deaf(SoundAdapter):
    """Adapts nothing."""

    def adapt(self, x: Tensor) -> Tensor:
        return self.predict(x)


class SoundScorer:
    """Mean distance to rows of random subsets: keeps every contract of a scorer."""

    def __init__(self, trials: int = 20, seed: int = 0) -> None:
        self.trials, self.seed = trials, seed

    def get_params(self) -> dict[str, int]:
        return {"trials": self.trials, "seed": self.seed}

    def fit(self, X: np.ndarray, y: np.ndarray) -> SoundScorer:
        if len(X) != len(y):
            refuse("y", len(y), "give one label a row")
        draws = np.random.default_rng(self.seed)
        near = [np.abs(X - X[draws.permutation(len(X))]).sum(1) for _ in range(self.trials)]
        self.scores_ = np.mean(near, axis=0)
        return self


class Scrambling(SoundScorer):
    """Sorts the caller's data."""

    def fit(self, X: np.ndarray, y: np.ndarray) -> SoundScorer:
        X.sort(axis=0)
        return super().fit(X, y)


class Overall(SoundScorer):
    """One number for all rows."""

    def fit(self, X: np.ndarray, y: np.ndarray) -> SoundScorer:
        super().fit(X, y)
        self.scores_ = self.scores_.mean(keepdims=True)
        return self


class OneDraw(SoundScorer):
    """Draws the same whatever the seed."""

    def fit(self, X: np.ndarray, y: np.ndarray) -> SoundScorer:
        kept, self.seed = self.seed, 0
        super().fit(X, y)
        self.seed = kept
        return self


def toy(build: Callable[[int], Any]) -> System:
    if issubclass(build, SoundAdapter):  # type: ignore[arg-type]
        return System(
            "toy", "adapter", build=build, example=lambda: (torch.randn(6, 4), torch.randn(6, 4) + 1),
            refused=(lambda adapter: adapter.adapt(torch.zeros(2, 7)),),
        )  # fmt: skip
    if issubclass(build, SoundScorer):  # type: ignore[arg-type]
        return System(
            "toy", "scorer", build=lambda seed: build(seed=seed),  # type: ignore[call-arg]
            example=lambda: (torch.randn(9, 3).numpy(), np.arange(9) % 2),
            refused=(lambda scorer: scorer.fit(np.zeros((3, 3)), np.zeros(2)),),
        )  # fmt: skip
    if issubclass(build, SoundLearner):  # type: ignore[arg-type]
        return System("toy", "learner", build=build)
    return System(
        "toy", "module", build=build, example=lambda: (torch.linspace(-1, 1, 24).view(6, 4),),
        refused=(lambda module: module(torch.zeros(2, 7)),),
    )  # fmt: skip


@pytest.mark.parametrize("build", [Sound, SoundLearner, SoundAdapter, SoundScorer])
def test_a_sound_system_passes_every_contract(build: Any, tmp_path: Path) -> None:
    system = toy(build)
    for check in CHECKS[system.kind]:
        run_check(check, system, tmp_path)


def test_rows_that_train_other_than_they_say_are_caught() -> None:
    def rows(**trained: int) -> list[Measurement]:
        return [
            Measurement(
                method=name.replace("_", " "), seed=0, quality={}, bytes={}, seconds={}, trained=count
            )
            for name, count in trained.items()
        ]

    check_trained(rows(full_fine_tuning=900, LoRA=30, linear_probe=7, UniPT=90, never=0), "never")
    check_trained(rows(ours=3), "never")
    for wrong in (
        rows(full_fine_tuning=770, LoRA=30_000),
        rows(full_fine_tuning=770, linear_probe=770),
        rows(linear_probe=0),
        rows(never=7),
    ):
        with pytest.raises(AssertionError):
            check_trained(wrong, "never")


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
        (LearningPredictor, check_an_adapter_adapts_and_goes_back, "predict learns: shift"),
        (NoReset, check_an_adapter_adapts_and_goes_back, "is not as it was"),
        (Deaf, check_an_adapter_adapts_and_goes_back, "adapting changes no number"),
        (Scrambling, check_a_scorer_scores_every_row, "changes the data"),
        (Overall, check_a_scorer_scores_every_row, "one number for each of the 9 rows"),
        (OneDraw, check_scorer_seeds, "two seeds give the same scores"),
        (LosingLearner, check_bad_input_is_refused, "a refused call changed total"),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_a_fault_is_caught(build: Any, check: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception), match=message):
        run_check(check, toy(build), tmp_path)
