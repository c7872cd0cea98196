"""The learners and the bench: bytes paid, refusals that lose nothing, resume, oracles of the method."""

import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from memspan.base import BadInput
from memspan.base.files import load_state, save_state
from memspan.continual import nets
from memspan.continual.memo import (
    WA,
    BiC,
    ExpandableRepresentation,
    Finetune,
    ICaRL,
    Joint,
    MEMOClassifier,
    NeverUpdate,
    Replay,
    SimpleNCM,
    TaskLearner,
    apm,
    area,
    budget_sweep,
    run_stream,
)
from memspan.data import ClassTask, ImageSet, class_tasks, load

FEW: dict[str, Any] = {"steps": 6, "batch_size": 16}
LEARNERS: list[type[TaskLearner]] = [
    Finetune,
    Replay,
    ICaRL,
    WA,
    BiC,
    ExpandableRepresentation,
    MEMOClassifier,
]


@pytest.fixture(autouse=True)
def _no_byte_warnings() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*more than half of the budget")
        yield


def _network() -> nn.Module:
    torch.manual_seed(3)
    return nets.SmallResNet(1, 1, (2, 4, 8), 1)


def _stream(per_class: int = 20) -> list[ClassTask]:
    return class_tasks(load("digits", ImageSet).subset(per_class, 10, seed=0), per_task=2, seed=0)


def _same(a: TaskLearner, b: TaskLearner) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("kind", LEARNERS)
def test_bytes_told_are_bytes_on_disk_and_within_the_budget_after_every_task(
    kind: type[TaskLearner], tmp_path: Path
) -> None:
    learner = kind(_network(), 40_000, align="always", **FEW)
    for b, task in enumerate(_stream()):
        learner.partial_fit_task(task.x_train, task.y_train)
        held = sum(learner.memory_bytes().values())
        assert held <= 40_000
        state = learner.state_dict()
        headers = sum(value.nbytes for name, value in state.items() if name.endswith("header"))
        names = learner.memory_bytes()["labels"]  # class names lie in the header
        assert sum(value.nbytes for value in state.values()) - headers == held - names
        save_state(tmp_path / f"{b}", state)
        assert (tmp_path / f"{b}").stat().st_size <= held + headers + 1000 + 200 * len(state)


@pytest.mark.parametrize("kind", [*LEARNERS, SimpleNCM])
def test_a_learner_resumed_from_disk_ends_where_the_straight_run_ends(
    kind: type[TaskLearner], tmp_path: Path
) -> None:
    stream = _stream()[:3]
    straight = kind(_network(), 60_000, **FEW)
    for task in stream[:2]:
        straight.partial_fit_task(task.x_train, task.y_train)
    save_state(tmp_path / "state", straight.state_dict())
    resumed = kind(_network(), 60_000, **FEW).load_state_dict(load_state(tmp_path / "state")[0])
    for learner in (straight, resumed):
        learner.partial_fit_task(stream[2].x_train, stream[2].y_train)
    assert _same(straight, resumed)
    assert np.array_equal(straight.predict(stream[0].x_test), resumed.predict(stream[0].x_test))


def test_in_the_first_task_all_methods_are_plain_training_bit_for_bit() -> None:
    task = _stream()[0]
    fitted = [
        kind(_network(), **FEW).partial_fit_task(task.x_train, task.y_train)
        for kind in (Finetune, ExpandableRepresentation, MEMOClassifier)
    ]
    scores = [learner.decision_function(task.x_test) for learner in fitted]
    assert np.array_equal(scores[0], scores[1])
    assert np.array_equal(scores[0], scores[2])


def test_splitting_at_the_input_gives_the_expandable_network() -> None:
    learners = [
        ExpandableRepresentation(_network(), **FEW),
        MEMOClassifier((nn.Identity(), _network()), **FEW),
    ]
    for learner in learners:
        run_stream(learner, _stream()[:2])
    a, b = (learner.decision_function(_stream()[0].x_test) for learner in learners)
    assert np.array_equal(a, b)


def test_splitting_at_the_output_gives_one_network_with_a_wider_head() -> None:
    learner = MEMOClassifier((_network(), nn.Identity()), 40_000, **FEW)
    run_stream(learner, _stream()[:3])
    held, whole = learner.memory_bytes(), sum(p.numel() for p in _network().parameters())
    assert held["parameters.backbone"] == 4 * whole
    assert held.get("parameters.specialised", 0) == 0
    net = learner.net_.eval()
    x = torch.randn(4, 1, 8, 8)
    once, features = net.g(x), net(x)["features"]
    assert torch.equal(features, once.repeat(1, 3))  # three blocks of columns read the same features
    narrow = net.head.weight.view(6, 3, 8).sum(dim=1)  # so a head of one network's width says the same
    assert torch.allclose(net(x)["logits"], once @ narrow.T + net.head.bias, atol=1e-5)


def test_finetuning_forgets_and_never_updating_knows_the_first_task_alone() -> None:
    stream = _stream(60)
    finetune = run_stream(Finetune(_network(), steps=40, batch_size=32), stream)
    control = run_stream(NeverUpdate(_network(), steps=40, batch_size=32), stream)
    assert finetune.per_task[-1][0] < 0.05
    assert finetune.per_task[-1][-1] > 0.5
    assert control.per_task[-1][1:] == (0, 0, 0, 0)


def test_a_learner_that_hides_data_exceeds_its_budget() -> None:
    class Hoarder(Replay):
        def partial_fit_task(self, X: Any, y: Any = None) -> Any:
            self.aside = [*getattr(self, "aside", []), np.repeat(X, 20, axis=0)]
            return super().partial_fit_task(X, y)

    with pytest.raises(BadInput, match="pay for all"):
        run_stream(Hoarder(_network(), 20_000, **FEW), _stream(), budget=20_000)


def test_a_budget_below_the_model_and_one_image_a_class_is_refused_with_the_least_budget() -> None:
    stream = _stream()
    with pytest.raises(BadInput, match=r"need (\d+) bytes") as caught:
        MEMOClassifier(_network(), 9_000, horizon=(5, 10), **FEW).afford(stream[0].x_train)
    least = int(str(caught.value).split("need ")[1].split()[0])
    MEMOClassifier(_network(), least, horizon=(5, 10), **FEW).afford(stream[0].x_train)
    with pytest.raises(BadInput):
        MEMOClassifier(_network(), least - 1, horizon=(5, 10), **FEW).afford(stream[0].x_train)


def test_labels_may_be_strings_tasks_uneven_and_of_one_class() -> None:
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8), dtype=np.uint8)
    for kind in (MEMOClassifier, ICaRL, BiC, WA):
        learner = kind(_network(), 40_000, **FEW)
        learner.partial_fit_task(images[:7], ["one"] * 7)
        learner.partial_fit_task(images[7:24], np.array(["b", "c"])[np.arange(17) % 2])
        learner.partial_fit_task(images[24:25], ["last"])  # a single image
        assert learner.classes_ == ["one", "b", "c", "last"]
        assert set(learner.predict(images)) <= set(learner.classes_)


def test_a_class_seen_again_is_more_data_or_refused_and_a_dataset_is_accepted() -> None:
    task = _stream()[0]
    dataset = TensorDataset(torch.as_tensor(task.x_train), torch.as_tensor(task.y_train))
    learner = MEMOClassifier(_network(), 40_000, **FEW).partial_fit_task(dataset)
    learner.partial_fit_task(task.x_train, task.y_train)
    assert len(learner.classes_) == 2
    assert len(learner.net_.blocks) == 1
    strict = Replay(_network(), known_classes="refuse", **FEW).partial_fit_task(task.x_train, task.y_train)
    with pytest.raises(BadInput, match="earlier task"):
        strict.partial_fit_task(task.x_train, task.y_train)


def test_a_refused_task_leaves_the_learner_as_it_was() -> None:
    stream = _stream()
    learner = Replay(_network(), 40_000, horizon=(2, 3), **FEW)
    learner.partial_fit_task(stream[0].x_train, stream[0].y_train)
    twin = Replay(_network(), 40_000, **FEW).load_state_dict(learner.state_dict())
    with pytest.raises(BadInput, match="at least one image"):
        learner.partial_fit_task(stream[1].x_train[:0], [])
    with pytest.raises(BadInput, match=r"y=\[.*\]: horizon=\(2, 3\) announced 3 classes, and 2 are known"):
        learner.partial_fit_task(stream[1].x_train, stream[1].y_train)
    learner.horizon = None
    with pytest.raises(BadInput, match="shape"):
        learner.partial_fit_task(np.zeros((3, 9, 9), np.uint8), [7, 7, 7])
    with pytest.raises(BadInput, match="NaN"):
        learner.partial_fit_task(np.full((3, 8, 8), np.nan), [7, 7, 7])
    learner.lr = 1e30
    with pytest.raises(BadInput, match="finite"):
        learner.partial_fit_task(stream[1].x_train, stream[1].y_train)
    assert _same(learner, twin)


def test_weights_above_half_of_the_budget_are_told() -> None:
    task = _stream()[0]
    with pytest.warns(UserWarning, match="more than half"):
        Replay(_network(), 9_000, **FEW).partial_fit_task(task.x_train, task.y_train)


def test_the_frozen_old_network_is_told_for_training_and_not_kept() -> None:
    learner = WA(_network(), 40_000, **FEW)
    run_stream(learner, _stream()[:2])
    assert learner.training_bytes_["parameters.teacher"] > 0
    assert "parameters.teacher" not in learner.memory_bytes()


def test_the_papers_byte_rule_counts_weights_and_pixels_alone() -> None:
    task = _stream()[0]
    learner = Replay(_network(), 4_920 + 30 * 64, byte_rule="paper", **FEW)
    learner.partial_fit_task(task.x_train, task.y_train)
    weights = sum(p.numel() for p in _network().parameters()) * 4
    assert learner.memory_bytes()["replay.exemplars"] == (4_920 + 30 * 64 - weights) // 64 // 2 * 2 * 64


def test_joint_training_takes_no_budget_and_final_alignment_needs_a_horizon() -> None:
    with pytest.raises(BadInput, match="joint"):
        Joint(_network(), 1_000)
    with pytest.raises(BadInput, match="horizon"):
        Replay(_network(), 1_000, align="final")


def test_area_is_exact_on_lines_and_ignores_order() -> None:
    points = [(2**20, 0.5), (3 * 2**20, 0.7), (2 * 2**20, 0.6)]
    assert area(points) == pytest.approx(1.2)
    assert area(points, normalize=True) == pytest.approx(0.6)
    assert apm(points) == pytest.approx(0.5)
    with pytest.raises(BadInput):
        area(points[:1])


def test_a_sweep_leaves_out_what_does_not_fit() -> None:
    sweep = budget_sweep(
        [Replay, ExpandableRepresentation], _stream()[:2], [9_000, 60_000], backbone=_network(), **FEW
    )
    assert len(sweep.points()["Replay"]) == 2
    assert len(sweep.points()["ExpandableRepresentation"]) == 1
    assert set(sweep.area()) == {"Replay"}


@pytest.mark.slow
def test_a_sweep_in_two_processes_finds_what_one_finds() -> None:
    pytest.importorskip("joblib")
    methods = [Replay, ExpandableRepresentation]
    one, two = (
        budget_sweep(methods, _stream()[:2], [9_000, 60_000], backbone=_network(), jobs=jobs, **FEW)
        for jobs in (1, 2)
    )
    assert one == two


def test_one_seed_repeats_and_two_differ() -> None:
    task = _stream()[0]
    fits = [Replay("resnet8", seed=s, **FEW).partial_fit_task(task.x_train, task.y_train) for s in (0, 0, 1)]
    scores = [learner.decision_function(task.x_test) for learner in fits]
    assert np.array_equal(scores[0], scores[1])
    assert not np.array_equal(scores[0], scores[2])


@pytest.mark.parametrize("kind", [MEMOClassifier, Replay, ExpandableRepresentation])
def test_a_fitted_learner_pickles_and_goes_on_learning(kind: type[TaskLearner]) -> None:
    x = np.random.default_rng(0).integers(0, 255, (40, 8, 8), dtype=np.uint8)
    y = np.arange(40) % 2
    learner = kind("resnet8", "2MiB", steps=2, batch_size=8, horizon=(2, 4)).partial_fit_task(x, y)
    again = pickle.loads(pickle.dumps(learner))
    for one in (learner, again):
        one.partial_fit_task(x, y + 2)
    assert (again.predict(x) == learner.predict(x)).all()
