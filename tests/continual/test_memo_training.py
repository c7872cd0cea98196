"""What each learner minimises, how long and at what rate: against formulas written out once more."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from memspan.continual.memo import (
    WA,
    BiC,
    ExpandableRepresentation,
    ICaRL,
    MEMOClassifier,
    Replay,
    TaskLearner,
    linear_cka,
)
from memspan.continual.memo.inputs import crop_flip

OLD, NEW = 4, 3
IMAGES = np.random.default_rng(5).integers(0, 256, (24, 6, 6), dtype=np.uint8)
CENTRED = np.arange(24) % OLD
FEW: dict[str, Any] = {"steps": 3, "batch_size": 8}


@pytest.fixture(autouse=True)
def _no_notices() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 10), nn.ReLU(), nn.Linear(10, 5), nn.Tanh())


def _learner(kind: type[TaskLearner], **options: Any) -> TaskLearner:
    if kind is MEMOClassifier:
        options["split_at"] = "3"
    return kind(_network(), **(FEW | options)).partial_fit_task(IMAGES, CENTRED)


def _log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max(axis=1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def _cross_entropy(z: np.ndarray, target: np.ndarray) -> float:
    return float(-_log_softmax(z)[np.arange(len(z)), target].mean())


def _distilled(z: np.ndarray, old: np.ndarray) -> float:
    return float(-(np.exp(_log_softmax(old / 2)) * _log_softmax(z / 2)).sum(axis=1).mean())


@pytest.mark.parametrize("kind", [Replay, ICaRL, WA, BiC, ExpandableRepresentation, MEMOClassifier])
def test_a_later_task_minimises_the_loss_of_its_paper(kind: type[TaskLearner]) -> None:
    learner = _learner(kind)
    before = copy.deepcopy(learner.net_)
    net = learner._grown(NEW).train()
    with torch.no_grad():  # far from equal, so that each term weighs
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter))
    learner._teacher = before if learner.has_teacher else None
    x, target = torch.randn(9, 1, 6, 6), torch.arange(9) % (OLD + NEW)
    out = net(x)
    loss = float(learner._loss(out, target, x, OLD))
    z, y = out["logits"].detach().double().numpy(), target.numpy()
    with torch.no_grad():
        old = before(x)["logits"].double().numpy()
    plain, kept = _cross_entropy(z, y), _distilled(z[:, :OLD], old)
    if kind in (ExpandableRepresentation, MEMOClassifier):
        aux = out["aux_logits"].detach().double().numpy()
        assert aux.shape == (9, NEW + 1)
        expected = plain + _cross_entropy(aux, np.where(y < OLD, 0, y - OLD + 1))
    else:
        share = OLD / (OLD + NEW)
        weighted = (1 - share) * plain + share * kept
        expected = {Replay: plain, ICaRL: plain + kept, WA: weighted, BiC: weighted}[kind]
    assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", [WA, ExpandableRepresentation, MEMOClassifier])
def test_new_rows_of_the_head_are_aligned_after_every_task_but_the_first(kind: type[TaskLearner]) -> None:
    gaps = {}
    for alignment in (None, False):
        learner = _learner(kind, alignment=alignment)
        assert learner.gamma_ == 1
        learner.partial_fit_task(IMAGES, CENTRED + 10)
        norms = learner.net_.head.weight.detach().norm(dim=1)
        gaps[alignment] = abs(float(norms[:OLD].mean() - norms[OLD:].mean()))
        assert (learner.gamma_ == 1) == (alignment is False)
    assert gaps[None] < 1e-6 < 1e-3 < gaps[False]


def test_the_rate_falls_at_the_shares_of_a_task_and_decay_is_that_of_the_task(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[float, float, float]] = []
    real = torch.optim.SGD.step

    def step(self: Any, closure: Any = None) -> Any:
        group = self.param_groups[0]
        seen.append((round(group["lr"], 6), group["weight_decay"], group["momentum"]))
        return real(self, closure)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    rows = IMAGES[:4]  # one batch an epoch: steps are epochs
    learner = Replay(_network(), batch_size=8).partial_fit_task(rows, [0, 0, 1, 1])
    first, seen[:] = list(seen), []
    learner.partial_fit_task(rows, [2, 2, 3, 3])
    for got, lengths, decay in ((first, (60, 60, 50, 30), 5e-4), (seen, (80, 40, 30, 20), 2e-4)):
        rates = [rate for rate, length in zip((0.1, 0.01, 0.001, 0.0001), lengths, strict=True)
                 for _ in range(length)]  # fmt: skip
        assert got == [(rate, decay, 0.9) for rate in rates]


def test_a_trained_base_moves_what_old_blocks_see_and_a_frozen_one_does_not() -> None:
    drifts = {}
    for trained in (True, False):
        learner = _learner(MEMOClassifier, train_base=trained, alignment=False)
        assert learner.drift_ == {}
        learner.partial_fit_task(IMAGES, CENTRED + 10)
        drifts[trained] = learner.drift_
    assert drifts[False]["features"] == 0 < drifts[True]["features"]
    assert all(drift["logits"] > 0 for drift in drifts.values())  # the head itself has learned on


def test_the_drift_told_is_that_of_the_kept_images() -> None:
    learner = _learner(MEMOClassifier)
    images, old = learner._past()[0], copy.deepcopy(learner.net_)
    learner.partial_fit_task(IMAGES, CENTRED + 10)
    before, after = (learner._outputs(net, images) for net in (old, learner.net_))
    for name, width in (("features", 5), ("logits", OLD)):
        change = (after[name][:, :width] - before[name]).norm() / before[name].norm()
        assert learner.drift_[name] == pytest.approx(float(change), rel=1e-5)
    assert linear_cka(before["features"], after["features"][:, :5]) < 1


def test_a_task_without_a_new_class_adds_no_network_and_pays_for_none() -> None:
    learner = _learner(ExpandableRepresentation, budget="4kB")
    for _ in range(3):
        learner.partial_fit_task(IMAGES, CENTRED)
    held = learner.memory_bytes()
    model = {name: size for name, size in held.items() if not name.startswith("replay")}
    predicted = learner.predict_bytes(1, OLD)
    assert {name: model[name] for name in predicted} == predicted
    left = 4000 - sum(model.values())
    row = 36 + 8
    assert held["replay.exemplars"] + held["replay.labels"] == left // row * row


def test_the_published_augmentation_is_a_crop_a_flip_and_a_factor_of_brightness() -> None:
    x = torch.rand(64, 1, 7, 5) * 2 - 1
    out = crop_flip(x, np.random.default_rng(0))
    again = np.random.default_rng(0)
    offsets, flips = again.integers(0, 9, size=(64, 2)), again.random(64) < 0.5
    gains = again.uniform(1 - 63 / 255, 1 + 63 / 255, size=64)
    assert 0 < flips.sum() < 64
    for i in range(64):
        image = np.full((7 + 8, 5 + 8), -1.0)
        image[4:-4, 4:-4] = x[i, 0].numpy()
        top, left = offsets[i]
        crop = image[top : top + 7, left : left + 5]
        crop = crop[:, ::-1] if flips[i] else crop
        expected = np.clip((crop + 1) * gains[i] - 1, -1, 1)
        assert np.allclose(out[i, 0].numpy(), expected, atol=1e-6)


def test_a_correction_is_fitted_on_images_that_the_network_did_not_train_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows: list[int] = []
    real = TaskLearner._train

    def train(self: Any, net: Any, images: np.ndarray, index: np.ndarray, n_old: int) -> None:
        rows.append(len(images))
        real(self, net, images, index, n_old)

    monkeypatch.setattr(TaskLearner, "_train", train)
    images = np.random.default_rng(1).integers(0, 256, (80, 6, 6), dtype=np.uint8)
    learner = BiC(_network(), **FEW).partial_fit_task(images, np.arange(80) % 4)
    learner.partial_fit_task(images, 10 + np.arange(80) % 4)
    assert rows == [80, 160 - 8 * 2]  # a tenth of 20 kept images a class, and as many new ones
    first, second = learner._correction[:4], learner._correction[4:]
    assert first.tolist() == [[1, 0]] * 4
    assert (second == second[0]).all()
    scores = learner.decision_function(images)
    plain = learner._outputs(learner.net_, images)["logits"].numpy()
    scale, shift = second[0].tolist()
    assert np.allclose(scores[:, :4], plain[:, :4])
    assert np.allclose(scores[:, 4:], scale * plain[:, 4:] + shift, atol=1e-5)
