"""Herding against Avalanche's, on unit features (Avalanche does not normalise)."""

import pytest
import torch
from torch.nn import functional as F

from memspan.continual.buffers import herding

pytestmark = pytest.mark.peers


@pytest.mark.parametrize("seed", range(4))
def test_herding_orders_unit_features_as_avalanche_does(avalanche, seed):
    from avalanche.training.storage_policy import HerdingSelectionStrategy

    features = F.normalize(torch.randn(60, 8, generator=torch.Generator().manual_seed(seed)).double(), dim=1)
    strategy = HerdingSelectionStrategy.__new__(HerdingSelectionStrategy)
    expected = strategy.make_sorted_indices_from_features(features)
    assert herding(features, 58).tolist() == expected[:58]
