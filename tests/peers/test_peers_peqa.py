"""Peers: torchao serves what was tuned, peft's adapters stand on our base, and LoRA over it is peft's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from memspan.base import BadInput
from memspan.training import peqa, qlora_

pytestmark = pytest.mark.peers


@pytest.fixture(scope="module")
def peft(torchvision):
    pytest.importorskip("transformers")
    return pytest.importorskip("peft")


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(192, 64), nn.GELU(), nn.Linear(64, 48))


def tuned(group_size):
    model = peqa.quantize_(net(), 4, group_size)
    for layer in peqa.layers(model).values():
        layer.scales.data *= torch.rand_like(layer.scales) + 0.5
    return model


@pytest.mark.parametrize("group_size", [None, 32, 64])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_torchao_serves_the_same_integers_with_the_same_answers(group_size, dtype, close):
    pytest.importorskip("torchao")
    model = tuned(group_size)
    served = peqa.export(model, dtype=dtype).to(dtype)
    assert type(served[0].weight).__module__.startswith("torchao")
    x = torch.randn(5, 192)
    expected = model(x)
    assert (served(x.to(dtype)).float() - expected).norm() <= close * expected.norm()
    assert list(peqa.layers(model)) == ["0", "2"]


def test_layers_that_torchao_cannot_serve_are_named():
    pytest.importorskip("torchao")
    with pytest.raises(BadInput, match=r"0 \(3 bits\), 2 \(3 bits\)"):
        peqa.export(peqa.quantize_(net(), 3))
    with pytest.raises(BadInput, match="groups of 16"):
        peqa.export(peqa.quantize_(net(), 4, 16))
    with pytest.raises(BadInput, match="to="):
        peqa.export(tuned(None), to="else")


def test_base_layers_inside_pefts_adapters_are_quantized_and_the_adapters_train_on(peft):
    model = peft.get_peft_model(net(), peft.LoraConfig(r=2, target_modules=["0", "2"]))
    x = torch.randn(5, 192)
    before = model(x)
    peqa.quantize_(model, 8, skip=(), also_train=("*lora_*",))
    assert [name.rsplit(".", 1)[-1] for name in peqa.layers(model)] == ["base_layer", "base_layer"]
    assert (model(x) - before).norm() < 0.02 * before.norm()
    model(x).square().sum().backward()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sum("lora_" in name for name in trained) == 4
    assert sum(name.endswith("scales") for name in trained) == 2
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_lora_over_integers_is_pefts_lora_over_the_dequantized_layers(peft):
    ours = qlora_(net(), rank=2, alpha=6.0, bits=4)
    plain = peqa.dequantize_(peqa.quantize_(net(), 4))
    theirs = peft.get_peft_model(plain, peft.LoraConfig(r=2, lora_alpha=6.0, target_modules=["0", "2"]))
    for name in ("0", "2"):
        layer = theirs.base_model.model.get_submodule(name)
        a, b = (
            torch.randn_like(ours.get_submodule(name).lora_a),
            torch.randn_like(ours.get_submodule(name).lora_b),
        )
        for module, one, other in ((ours, "lora_a", a), (ours, "lora_b", b)):
            getattr(module.get_submodule(name), one).data.copy_(other)
        layer.lora_A["default"].weight.data.copy_(a)
        layer.lora_B["default"].weight.data.copy_(b)
    x = torch.randn(5, 192)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    grads = []
    for model in (ours, theirs):
        model(x).square().sum().backward()
        grads.append([p.grad for n, p in model.named_parameters() if "lora_" in n])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


def test_bitsandbytes_and_ours_lose_about_as_much_at_four_bits():
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(0)
    weight = torch.randn(64, 256)
    try:
        packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        theirs = functional.dequantize_4bit(packed, state)
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        pytest.skip(f"bitsandbytes does not run here: {error}")
    grid = peqa.rtn_grid(weight, 4, 64)
    ours = peqa.dequantize(peqa.quantize(weight, *grid, 4), *grid)
    lost = [float((weight - w.reshape(weight.shape)).norm() / weight.norm()) for w in (ours, theirs)]
    assert lost[0] < 1.15 * lost[1]
