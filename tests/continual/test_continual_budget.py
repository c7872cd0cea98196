"""The byte table of the paper, exactly, from the sizes of our own networks."""

import pytest

from memspan.base import BadInput
from memspan.continual import nets
from memspan.continual.budget import aligned_budget, aligned_exemplars, image_bytes, model_bytes
from memspan.nn.surgery import split_at

CIFAR, IMAGENET = (32, 32, 3), (224, 224, 3)


def parts(name: str) -> tuple[int, int]:
    at = {"convnet2": "stage2", "resnet18": "stage4"}.get(name, "stage3")
    g, s = (sum(p.numel() for p in part.parameters()) for part in split_at(nets.build(name), at))
    return g, s


@pytest.mark.parametrize(
    ("name", "shape", "tasks", "memo", "single", "mib"),
    [
        ("resnet32", CIFAR, 10, (3312, 3626896), (7431, 463504), 23.54),
        ("resnet32", CIFAR, 11, (3458, 3978384), (8035, 463504), 25.31),
        ("resnet18", IMAGENET, 10, (2665, 86720064), (4672, 11176512), 713.4),
        ("resnet18", IMAGENET, 11, (2739, 95113792), (4969, 11176512), 756.0),
    ],
)
def test_the_four_settings_hold_the_papers_exemplars_parameters_and_bytes(
    name, shape, tasks, memo, single, mib
):
    g, s = parts(name)
    budget = aligned_budget(tasks * (g + s), 2000, shape)
    assert (g + tasks * s, g + s) == (memo[1], single[1])
    assert aligned_exemplars(budget, g + tasks * s, shape) == memo[0]
    assert aligned_exemplars(budget, g + s, shape) == single[0]
    assert budget.bytes / 2**20 == pytest.approx(mib, rel=3e-4)


@pytest.mark.parametrize(
    ("name", "expandable", "memo", "single", "mib"),
    [
        ("convnet2", 2096, 2118, 2000, 7.6),
        ("resnet14", 2000, 2495, 3634, 12.4),
        ("resnet20", 2000, 2768, 4900, 16.1),
        ("resnet26", 2000, 3040, 6165, 19.8),
        ("resnet32", 2000, 3312, 7431, 23.5),
    ],
)
def test_the_five_points_of_the_sweep_hold_the_papers_exemplars(name, expandable, memo, single, mib):
    g, s = parts(name)
    backbone = sum(parts("resnet32"))  # of the one-backbone methods at every point
    budget = aligned_budget(backbone if name == "convnet2" else 10 * (g + s), 2000, CIFAR)
    held = (10 * (g + s), g + 10 * s, backbone)
    assert [aligned_exemplars(budget, p, CIFAR) for p in held] == [expandable, memo, single]
    assert round(budget.bytes / 2**20, 1) == mib


def test_a_model_is_603_exemplars():
    assert model_bytes(463504) // image_bytes(CIFAR) == 603
    assert round(model_bytes(11176512) / image_bytes(IMAGENET)) == 297


def test_a_model_beyond_the_budget_and_a_shape_without_pixels_are_refused():
    with pytest.raises(BadInput, match="budget="):
        aligned_exemplars("1MiB", 463504, CIFAR)
    with pytest.raises(BadInput, match="shape="):
        image_bytes((0, 4))
