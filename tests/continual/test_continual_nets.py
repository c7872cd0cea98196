"""Networks of the class-incremental literature: sizes, splits, shortcuts."""

import pytest
import torch

from memspan.base import BadInput
from memspan.continual import nets
from memspan.nn.surgery import split_at


def randomised(net):
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5) if tensor.dim() == 1 else tensor.normal_(0, 0.1)
    return net.eval()


@pytest.mark.parametrize(
    ("name", "channels", "parameters"),
    [
        ("resnet8", 1, 74352),
        ("resnet14", 3, 171856),
        ("resnet20", 3, 269072),
        ("resnet26", 3, 366288),
        ("resnet32", 3, 463504),
        ("resnet18", 3, 11176512),
        ("convnet2", 3, 38976),
    ],
)
def test_networks_have_the_published_sizes_and_split_at_every_stage(name, channels, parameters):
    net = randomised(nets.build(name, in_channels=channels))
    assert sum(p.numel() for p in net.parameters()) == parameters
    x = torch.randn(2, channels, 32, 32)
    for at, _ in net.named_children():
        head, tail = split_at(net, at)
        sizes = [sum(p.numel() for p in part.parameters()) for part in (head, tail)]
        assert sum(sizes) == parameters
        with torch.no_grad():
            torch.testing.assert_close(tail(head(x)), net(x), rtol=1e-6, atol=1e-6)


def test_any_image_size_gives_features_of_one_width():
    net = nets.build("resnet8", in_channels=1, stem_stride=2).eval()
    assert net(torch.zeros(1, 1, 28, 28)).shape == net(torch.zeros(1, 1, 8, 8)).shape == (1, 64)


def test_new_channels_of_the_shortcut_are_zero_whatever_the_input():
    block = nets._PlainShortcutBlock(2, 4, 2).eval()
    torch.nn.init.zeros_(block.norm2.weight)
    x = torch.full((1, 2, 4, 4), float("inf"))
    block.conv1.weight.data.zero_()
    x[:, :] = 3.0
    assert block(x)[:, 2:].eq(0).all()
    assert block(x)[:, :2].eq(3).all()


def test_an_unknown_name_is_refused_with_near_ones():
    with pytest.raises(BadInput, match="resnet32"):
        nets.build("resnet33")
