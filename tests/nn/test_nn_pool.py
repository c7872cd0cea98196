"""Pools: masks and class means."""

import pytest
import torch
from torch.nn import functional as F

from memspan.base import BadInput
from memspan.nn.pool import class_means, masked_mean


def test_masked_mean_is_the_mean_of_kept_rows_and_zero_without_any():
    x, mask = torch.randn(3, 5, 2), torch.tensor([[1, 1, 0, 0, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    out = masked_mean(x, mask)
    torch.testing.assert_close(out[0], x[0, [0, 1, 4]].mean(0))
    torch.testing.assert_close(out[1], x[1].mean(0))
    assert out[2].eq(0).all()


def test_class_means_are_unit_means_of_unit_rows():
    x, y = torch.randn(30, 4) * torch.rand(30, 1) * 9, torch.arange(30) % 3
    means = class_means(x, y, 4)
    for label in range(3):
        expected = F.normalize(F.normalize(x[y == label], dim=1).mean(0), dim=0)
        torch.testing.assert_close(means[label], expected)
    assert means[3].eq(0).all()


def test_bad_labels_and_features_are_refused():
    with pytest.raises(BadInput, match="features="):
        class_means(torch.full((1, 2), float("inf")), torch.zeros(1, dtype=torch.long))
    with pytest.raises(BadInput, match="labels="):
        class_means(torch.randn(2, 2), torch.tensor([0, 5]), 3)
    with pytest.raises(BadInput, match="mask="):
        masked_mean(torch.randn(2, 3, 4), torch.ones(2, 2))
