"""Reversible chains against RevTorch, MemCNN and RevLib, the 3-D U-Net's loss against MONAI's."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from memspan.models.unet3d import soft_dice_loss
from memspan.nn.reversible import ReversibleBlock, ReversibleSequential

pytestmark = pytest.mark.peers
COUNT = 5


@pytest.fixture
def memcnn() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("memcnn")


def part() -> nn.Module:
    layers = nn.Sequential(nn.GroupNorm(2, 4), nn.LeakyReLU(0.01), nn.Conv2d(4, 4, 3, padding=1))
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return layers


def pairs(make: Callable[[], nn.Module] = part) -> list[tuple[nn.Module, nn.Module]]:
    return [(make(), make()) for _ in range(COUNT)]


def ours(parts: list[tuple[nn.Module, nn.Module]]) -> nn.Module:
    return ReversibleSequential(*(ReversibleBlock(f, g) for f, g in parts))


def revtorchs(parts: list[tuple[nn.Module, nn.Module]]) -> nn.Module:
    revtorch = pytest.importorskip("revtorch")
    blocks = nn.ModuleList(revtorch.ReversibleBlock(f, g) for f, g in parts)
    return revtorch.ReversibleSequence(blocks)  # type: ignore[no-any-return]


def memcnns(parts: list[tuple[nn.Module, nn.Module]]) -> nn.Module:
    import memcnn

    wrapped = (memcnn.InvertibleModuleWrapper(memcnn.AdditiveCoupling(f, g)) for f, g in parts)
    return nn.Sequential(*wrapped)


def revlibs(parts: list[tuple[nn.Module, nn.Module]]) -> nn.Module:
    revlib = pytest.importorskip("revlib")
    return revlib.ReversibleSequential(*(one for pair in parts for one in pair))  # type: ignore[no-any-return]


def gradients(
    build: Callable[[list[tuple[nn.Module, nn.Module]]], nn.Module],
    parts: list[tuple[nn.Module, nn.Module]],
    x: Tensor,
) -> tuple[Tensor, list[Tensor | None]]:
    parts = copy.deepcopy(parts)
    chain, x = build(parts), x.clone()
    x.requires_grad_()
    y = chain(x * 1.0)  # MemCNN frees its input's storage
    y.square().sum().backward()
    return y.detach().clone(), [x.grad, *(p.grad for pair in parts for one in pair for p in one.parameters())]


@pytest.mark.parametrize("theirs", [revtorchs, memcnns, revlibs])
def test_outputs_are_equal_bit_for_bit_and_gradients_to_a_millionth(
    theirs: object, memcnn: ModuleType
) -> None:
    parts, x = pairs(), torch.randn(2, 8, 7, 7)
    (y, one), (z, two) = gradients(ours, parts, x), gradients(theirs, parts, x)  # type: ignore[arg-type]
    assert torch.equal(y, z)
    for a, b in zip(one, two, strict=True):
        assert a is not None
        assert b is not None
        assert float((a - b).norm()) <= 1e-6 * float(b.norm())


def test_statistics_move_once_where_the_peers_move_them_again(memcnn: ModuleType) -> None:
    parts = pairs(lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)))
    moved = {}
    for build in (ours, revtorchs, memcnns):
        mine = copy.deepcopy(parts)
        build(mine)(torch.randn(2, 8, 5, 5, requires_grad=True) * 1.0).sum().backward()
        moved[build.__name__] = {int(f[0].num_batches_tracked) for pair in mine for f in pair}  # type: ignore[index, arg-type]
    assert moved == {"ours": {1}, "revtorchs": {2}, "memcnns": {3}}


def test_parameters_train_and_grad_stays_clean_where_revtorch_fails() -> None:
    x = torch.randn(2, 8, 5, 5)
    assert ours(pairs())(x).requires_grad
    assert not revtorchs(pairs())(x).requires_grad
    filled = {}
    for build in (ours, revtorchs):
        parts, x = pairs(), torch.randn(2, 8, 5, 5, requires_grad=True)
        torch.autograd.grad(build(parts)(x).sum(), x)
        filled[build.__name__] = any(
            p.grad is not None for f, g in parts for p in (*f.parameters(), *g.parameters())
        )
    assert filled == {"ours": False, "revtorchs": True}


def test_dropout_gradients_are_those_of_the_forward_pass_where_revtorch_draws_anew() -> None:
    parts, x = pairs(lambda: nn.Sequential(part(), nn.Dropout(0.5))), torch.randn(2, 8, 7, 7)
    found = {}
    for name, build in (("ours", ours), ("revtorch", revtorchs)):
        torch.manual_seed(4)
        found[name] = gradients(build, parts, x)[1][0]

    def stored(parts: list[tuple[nn.Module, nn.Module]]) -> nn.Module:
        chain = ours(parts)
        chain.memory = "store"  # type: ignore[assignment]
        return chain

    torch.manual_seed(4)
    plain = gradients(stored, parts, x)[1][0]
    assert plain is not None
    errors = {name: float((g - plain).norm() / plain.norm()) for name, g in found.items() if g is not None}
    assert errors["ours"] <= 1e-5
    assert errors["revtorch"] > 0.1


def test_soft_dice_is_monai_s() -> None:
    losses = pytest.importorskip("monai.losses")
    theirs = losses.DiceLoss(sigmoid=True, smooth_nr=1.0, smooth_dr=1.0)
    logits, target = torch.randn(3, 2, 5, 6, 7), (torch.rand(3, 2, 5, 6, 7) > 0.8).float()
    assert torch.allclose(soft_dice_loss(logits, target), theirs(logits, target), atol=1e-6)
