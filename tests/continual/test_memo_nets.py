"""The growing network and head: what stays, what is new, what learns."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from memspan.base import BadInput
from memspan.continual import nets
from memspan.continual.memo import ExpandableNet, align_weights_, aux_targets, grow_linear_, split_backbone


def _net(train_base: bool = True) -> ExpandableNet:
    g = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())
    tail = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return ExpandableNet(g, lambda: copy.deepcopy(nn.Sequential(*tail)), 4, train_base=train_base)


def _randomise(module: nn.Module) -> None:
    for value in (*module.parameters(), *module.buffers()):
        if value.is_floating_point():
            value.data.uniform_(0.2, 1.0)


def _step(net: ExpandableNet, classes: int) -> None:
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    out = net.train()(torch.randn(8, 1, 6, 6))
    loss = F.cross_entropy(out["logits"], torch.arange(8) % classes)
    if "aux_logits" in out:
        loss = loss + F.cross_entropy(out["aux_logits"], torch.zeros(8, dtype=torch.long))
    loss.backward()
    optimizer.step()


def test_growing_leaves_old_logits_where_the_new_columns_are_zero() -> None:
    net = _net().add_task(3).eval()
    _randomise(net)
    x = torch.randn(5, 1, 6, 6)
    before = net(x)["logits"]
    net.add_task(2).eval()
    net.head.weight.data[:, 4:] = 0
    after = net(x)["logits"]
    assert after.shape == (5, 5)
    assert net.head.weight.shape == (5, 8)
    assert torch.allclose(after[:, :3], before, atol=1e-6)


def test_new_head_entries_follow_the_seed_and_new_biases_are_zero() -> None:
    heads = [grow_linear_(nn.Linear(2, 1), 5, 4, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(heads[0].weight[1:], heads[1].weight[1:])
    assert not torch.equal(heads[0].weight[1:], heads[2].weight[1:])
    assert heads[0].bias[1:].tolist() == [0, 0, 0]
    assert heads[0].weight.is_leaf
    assert heads[0].weight.requires_grad


def test_a_head_never_shrinks() -> None:
    with pytest.raises(BadInput, match="only grows"):
        grow_linear_(nn.Linear(3, 2), 2, 2)


def test_auxiliary_targets_put_all_old_classes_under_zero() -> None:
    assert aux_targets(torch.arange(7), n_old=4).tolist() == [0, 0, 0, 0, 1, 2, 3]


def test_alignment_equals_mean_norms_twice_is_once_and_orders_within_groups_stay() -> None:
    head = nn.Linear(6, 7)
    head.bias.data.zero_()
    head.weight.data[4:] *= 5
    x = torch.randn(50, 6)
    before = head(x)
    align_weights_(head, 3)
    norms = head.weight.norm(dim=1)
    assert torch.allclose(norms[:4].mean(), norms[4:].mean(), atol=1e-6)
    once = head.weight.detach().clone()
    assert align_weights_(head, 3) == pytest.approx(1, abs=1e-6)
    assert torch.allclose(head.weight, once, atol=1e-6)
    after = head(x)
    assert torch.equal(before[:, :4].argmax(1), after[:, :4].argmax(1))
    assert torch.equal(before[:, 4:].argmax(1), after[:, 4:].argmax(1))


def test_alignment_of_zero_rows_is_skipped_with_a_warning() -> None:
    head = nn.Linear(2, 3)
    head.weight.data[2] = 0
    before = head.weight.detach().clone()
    with pytest.warns(UserWarning, match="alignment skipped"):
        assert align_weights_(head, 1) == 1.0
    assert torch.equal(head.weight, before)


@pytest.mark.parametrize("train_base", [True, False])
def test_old_blocks_keep_every_bit_and_the_newest_block_changes(train_base: bool) -> None:
    net = _net(train_base).add_task(2)
    _randomise(net)
    _step(net, 2)
    net.add_task(2)
    _randomise(net.blocks[1])
    frozen = {name: value.clone() for name, value in net.blocks[0].state_dict().items()}
    base = {name: value.clone() for name, value in net.g.state_dict().items()}
    newest = {name: value.clone() for name, value in net.blocks[1].state_dict().items()}
    for _ in range(3):
        _step(net, 4)
    assert all(torch.equal(value, frozen[name]) for name, value in net.blocks[0].state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in net.blocks[0].parameters())
    assert not net.blocks[0].training
    # Batch norm takes a convolution's bias away, so that it has no gradient and may stay.
    moved = {n for n, value in net.g.state_dict().items() if not torch.equal(value, base[n])} - {"0.bias"}
    assert moved == (set(base) - {"0.bias"} if train_base else set())
    assert {n for n, v in net.blocks[1].state_dict().items() if torch.equal(v, newest[n])} <= {"0.bias"}


def test_gradients_reach_a_trained_base_through_frozen_blocks() -> None:
    net = _net().add_task(2).add_task(2)
    _randomise(net)
    net.head.weight.data[:, 4:] = 0
    net.train()(torch.randn(8, 1, 6, 6))["logits"].square().sum().backward()
    assert net.g[0].weight.grad.abs().sum() > 0


def test_a_new_block_starts_as_a_copy_of_the_last_or_fresh() -> None:
    net = _net().add_task(1)
    _randomise(net)
    assert torch.equal(net.add_task(1).blocks[1][0].weight, net.blocks[0][0].weight)
    assert not torch.equal(net.add_task(1, init="fresh").blocks[2][0].weight, net.blocks[0][0].weight)
    with pytest.raises(BadInput, match="copy"):
        net.add_task(1, init="zero")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="no new class"):
        net.add_task(0)


def test_a_working_copy_shares_frozen_parts_only() -> None:
    net = _net().add_task(1).add_task(1)
    twin = net.working_copy()
    assert twin.blocks[0] is net.blocks[0]
    assert twin.blocks[1] is not net.blocks[1]
    assert twin.head.weight is not net.head.weight


def test_a_split_backbone_computes_what_the_whole_did() -> None:
    whole = nets.build("resnet8", in_channels=1).eval()
    _randomise(whole)
    g, s = split_backbone(whole, "stage3")
    x = torch.randn(3, 1, 12, 12)
    assert torch.allclose(s(g(x)), whole(x), rtol=1e-6)
    count = [sum(p.numel() for p in part.parameters()) for part in (g, s, whole)]
    assert count[0] + count[1] == count[2] == 74_352
