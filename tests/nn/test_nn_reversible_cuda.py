"""Reversible chains on a GPU: the device's draws repeat, half precision keeps float32 streams."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from memspan.ledger import AllocatorPeak
from memspan.nn.reversible import MEMORY, ReversibleBlock, ReversibleSequential

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def chain_of(count: int, dropout: float = 0.0) -> ReversibleSequential:
    def part() -> nn.Module:
        layers = (nn.GroupNorm(2, 8), nn.LeakyReLU(0.01), nn.Conv2d(8, 8, 3, padding=1), nn.Dropout(dropout))
        return nn.Sequential(*layers)

    return ReversibleSequential(*(ReversibleBlock(part(), part()) for _ in range(count))).cuda()


def gradients(chain: ReversibleSequential, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    chain.zero_grad()
    torch.manual_seed(0)
    with torch.autocast("cuda", dtype or torch.float16, enabled=dtype is not None):
        y = chain(x)
    assert y.dtype == x.dtype
    y.square().mean().mul(100).backward()
    return torch.cat([p.grad.double().flatten() for p in chain.parameters() if p.grad is not None])


def test_dropout_repeats_its_masks_and_leaves_the_device_s_generator_alone() -> None:
    chain, x = chain_of(4, 0.5).double(), torch.randn(2, 16, 9, 9, dtype=torch.double, device="cuda")
    found, states = [], []
    for chain.memory in MEMORY:
        found.append(gradients(chain, x))
        states.append(torch.cuda.get_rng_state())
    for one, state in zip(found[1:], states[1:], strict=True):
        assert torch.allclose(found[0], one, rtol=1e-9, atol=1e-12)
        assert torch.equal(states[0], state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_gradients_follow_those_of_the_stored_network(dtype: torch.dtype) -> None:
    chain, x = chain_of(8), torch.randn(2, 16, 16, 16, device="cuda")
    found = []
    for chain.memory in ("store", "reversible"):
        found.append(gradients(chain, x, dtype))
    assert float(nn.functional.cosine_similarity(found[0], found[1], 0)) >= 0.999


def test_the_allocator_s_peak_is_flat_in_depth() -> None:
    x, peaks = torch.randn(4, 16, 128, 128, device="cuda"), []
    for count in (2, 8):
        chain = chain_of(count)
        gradients(chain, x)  # warms up
        chain.zero_grad()
        with AllocatorPeak("cuda") as truth:
            chain(x).square().mean().backward()
        peaks.append(truth.peak)
    assert peaks[1] < 1.05 * peaks[0]
