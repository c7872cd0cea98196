"""Surgery: names, taps, splits, swaps."""

import pytest
import torch
from torch import nn

from memspan.base import BadInput
from memspan.nn.surgery import FeatureTap, find_blocks, restore_, select, split_at, swap_


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x):
        return x + self.second(torch.relu(self.norm(self.first(x))))


def net():
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(Residual(), Residual()), nn.Linear(4, 2)).eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0.2, 1.2)
    return model


@pytest.mark.parametrize("at", ["0", "1", "1.0", "1.1", "2"])
def test_head_then_tail_is_the_model_with_its_own_parameters(at):
    model, x = net(), torch.randn(6, 3)
    head, tail = split_at(model, at)
    torch.testing.assert_close(tail(head(x)), model(x), rtol=0, atol=0)
    ids = [{id(p) for p in part.parameters()} for part in (head, tail)]
    assert not ids[0] & ids[1]
    assert ids[0] | ids[1] == {id(p) for p in model.parameters()}


def test_a_split_inside_a_residual_is_refused():
    with pytest.raises(BadInput, match=r"at='1\.0\.second'"):
        split_at(net(), "1.0.second")


def test_unknown_names_are_refused_with_near_ones():
    model = nn.Sequential()
    model.add_module("stage1", nn.Linear(2, 2))
    for call in (lambda: split_at(model, "stage2"), lambda: select(model, "stag")):
        with pytest.raises(BadInput, match="stage1"):
            call()


def test_swapped_modules_are_put_back_and_a_refusal_changes_nothing():
    model, x = net(), torch.randn(2, 3)
    before, keys = model(x), list(model.state_dict())
    with pytest.raises(BadInput, match="replacements='7'"):
        swap_(model, {"2": nn.Identity(), "7": nn.Identity()})
    assert swap_(model, {"2": nn.Identity(), "1.0": nn.Identity()})(x).shape == (2, 4)
    with pytest.raises(BadInput, match="swapped already"):
        swap_(model, {"2": nn.Identity()})
    torch.testing.assert_close(restore_(model)(x), before, rtol=0, atol=0)
    assert list(model.state_dict()) == keys
    with pytest.raises(BadInput, match="nothing was swapped"):
        restore_(model)


def test_blocks_are_the_repeated_modules():
    assert list(find_blocks(net())) == ["1.0", "1.1"]
    assert find_blocks(nn.Linear(2, 2)) == {}


def test_a_tap_takes_what_modules_give_and_leaves_no_hook():
    model, x = net(), torch.randn(2, 3)
    with FeatureTap(model, "1.*") as tap:
        model(x)
    torch.testing.assert_close(tap["1.0"], model[1][0](model[0](x)))
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(BadInput, match="name='9'"):
        tap["9"]
