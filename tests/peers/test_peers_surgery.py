"""split_at over timm's networks with random weights."""

import pytest
import torch

from memspan.nn.surgery import split_at

pytestmark = pytest.mark.peers


@pytest.mark.parametrize(
    ("name", "at", "size"),
    [
        ("resnet18", "layer4", 64),
        ("efficientnet_lite0", "blocks.5", 64),
        ("vit_tiny_patch16_224", "blocks.6", 224),
    ],
)
def test_split_networks_of_timm_give_the_same_logits(timm, name, at, size):
    model = timm.create_model(name, pretrained=False, num_classes=7).eval()
    with torch.no_grad():
        for key, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5) if "var" in key else tensor.add_(0.02 * torch.randn_like(tensor))
        head, tail = split_at(model, at)
        x = torch.randn(2, 3, size, size)
        torch.testing.assert_close(tail(head(x)), model(x), rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for part in (head, tail) for p in part.parameters()) == sum(
        p.numel() for p in model.parameters()
    )
