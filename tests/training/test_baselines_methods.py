"""The baselines: same numbers where they must be, in place, undone exactly, refused twice."""

import copy

import pytest
import torch
from torch import nn

from memspan import training
from memspan.base import BadInput
from memspan.ledger import Ledger, methods, training_step
from memspan.recipes.ledger.models import BERT, CNN, GPT, MLP, UNet, classify

TOKENS = (torch.arange(2 * 16) % 50).view(2, 16)


def gpt():
    torch.manual_seed(0)
    return GPT(vocabulary=50, d=32, depth=2, heads=2)


def gradients(model, batch=(TOKENS, TOKENS)):
    training_step(model, None, batch, classify)
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_the_room_registers_its_baselines_once_each():
    names = [item.name for item in training.METHODS]
    assert len(set(names)) == len(names)
    assert {"checkpoint", "autocast", "bitfit", "linear_probe", "lora"} <= set(methods())


def test_checkpointing_gives_the_same_gradients_bit_for_bit():
    plain = gradients(gpt())
    again = gradients(training.checkpoint_(gpt()))
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_checkpointing_repeats_dropout():
    model = BERT(vocabulary=50, h=32, depth=2, dropout=0.3)
    batch = (TOKENS, torch.tensor([1, 2]))
    torch.manual_seed(5)
    plain = gradients(copy.deepcopy(model), batch)
    torch.manual_seed(5)
    again = gradients(training.checkpoint_(model), batch)
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_checkpointing_keeps_fewer_activations():
    held = []
    for model in (gpt(), training.checkpoint_(gpt())):
        with Ledger(model) as led:
            training_step(model, None, (TOKENS, TOKENS), classify)
        held.append(led.peak.category("saved_activations"))
    assert held[1] < 0.7 * held[0]


def test_checkpointed_blocks_may_be_named():
    model = training.checkpoint_(MLP(), ["1"])
    assert type(model[1]).__name__ == "CheckpointedGELU"
    with pytest.raises(BadInput, match=r"blocks='9': .*Known"):
        training.checkpoint_(MLP(), ["9"])
    with pytest.raises(BadInput, match="no repeated blocks"):
        training.checkpoint_(MLP())


@pytest.mark.parametrize(
    ("build", "x"), [(CNN, torch.zeros(2, 3, 16, 16)), (UNet, torch.zeros(2, 3, 16, 16)), (gpt, TOKENS)]
)
def test_repeated_blocks_are_found_and_restored(build, x):
    model = build()
    kinds = [type(part) for part in model.modules()]
    training.checkpoint_(model)
    assert [type(part) for part in model.modules()] != kinds
    model(x)
    training.uncheckpoint_(model)
    assert [type(part) for part in model.modules()] == kinds


def test_autocast_computes_in_16_bits_and_answers_in_32():
    plain, model = gpt(), training.autocast_(gpt())
    a, b = plain(TOKENS), model(TOKENS)
    assert b.dtype == torch.float32
    assert not torch.equal(a, b)
    assert torch.allclose(a, b, atol=0.05)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    with pytest.raises(BadInput, match="dtype='int8'"):
        training.autocast_(gpt(), "int8")


def test_bitfit_trains_biases_and_head_alone():
    model = training.bitfit_(gpt())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if name.endswith("bias")} | {
        "head.weight"
    }
    grads = gradients(model)
    assert {name for name, grad in grads.items() if grad is not None} == trained
    with pytest.raises(BadInput, match="no biases"):
        training.bitfit_(nn.Sequential(nn.Linear(2, 2, bias=False)))


def test_linear_probe_trains_the_head_and_saves_no_activations_below_it():
    model = training.linear_probe_(gpt())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"head.weight"}
    unet = training.linear_probe_(UNet())
    assert {n for n, p in unet.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}
    with pytest.raises(BadInput, match="no Linear or convolution"):
        training.linear_probe_(nn.Sequential(nn.LayerNorm(3)))


def test_unfreezing_gives_back_what_was_trained_before():
    model = gpt()
    model.embedding.weight.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    training.unfreeze_(training.bitfit_(model))
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def test_lora_starts_at_the_model_and_learns():
    model, x = gpt(), TOKENS
    before = model(x)
    training.lora_(model, rank=4)
    assert torch.equal(model(x), before)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    for _ in range(2):
        training_step(model, optimizer, (x, x), classify)
    assert not torch.equal(model(x), before)
    assert all(torch.equal(dict(model.named_parameters())[n], p) for n, p in frozen.items())
    assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "lora_" in n)


def test_lora_merges_to_the_same_function():
    model = training.lora_(gpt(), rank=4)
    for name, parameter in model.named_parameters():
        if "lora_b" in name:
            nn.init.normal_(parameter, std=0.1)
    expected = model(TOKENS)
    names = set(gpt().state_dict())
    training.unlora_(model, merge=True)
    assert torch.allclose(model(TOKENS), expected, atol=1e-4)
    assert set(model.state_dict()) == names


def test_lora_state_round_trips_and_one_seed_repeats():
    one, other = training.lora_(gpt(), seed=3), training.lora_(gpt(), seed=4)
    again = training.lora_(gpt(), seed=3)
    key = "blocks.0.qkv.lora_a"
    assert torch.equal(one.state_dict()[key], again.state_dict()[key])
    assert not torch.equal(one.state_dict()[key], other.state_dict()[key])
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(TOKENS), other(TOKENS))


@pytest.mark.parametrize(
    ("do", "undo"),
    [
        (training.checkpoint_, training.uncheckpoint_),
        (training.autocast_, training.unautocast_),
        (training.bitfit_, training.unfreeze_),
        (training.linear_probe_, training.unfreeze_),
        (training.lora_, training.unlora_),
    ],
)
def test_each_is_in_place_refused_twice_and_undone_exactly(do, undo):
    model = gpt()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model(TOKENS)
    assert do(model) is model
    with pytest.raises(BadInput, match="already"):
        do(model)
    assert undo(model) is model
    assert torch.equal(model(TOKENS), expected)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert type(model) is GPT
    with pytest.raises(BadInput):
        undo(model)
    do(model)


def test_a_copy_of_a_converted_model_stands_alone():
    model = training.lora_(training.autocast_(training.checkpoint_(gpt())))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert twin(TOKENS).abs().sum() > 0
    training.unlora_(training.unautocast_(training.uncheckpoint_(twin)))
    assert type(twin) is GPT


def test_methods_on_one_module_are_undone_in_reverse_order():
    model = nn.Sequential(nn.Linear(3, 3))
    training.autocast_(model)
    model[0] = training.autocast_(nn.Linear(3, 3))
    training.checkpoint_(model, ["0"])
    with pytest.raises(BadInput, match="reverse order"):
        training.unautocast_(model)


def test_freezing_methods_do_not_stack():
    with pytest.raises(BadInput, match="bitfit_ froze parts of it already"):
        training.lora_(training.bitfit_(gpt()))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rank": 0}, "rank=0"), ({"layers": ["norm"]}, "layers="), ({"head": "none"}, "none")],
)
def test_lora_refuses_bad_options_and_leaves_the_model_alone(options, message):
    model = gpt()
    with pytest.raises(BadInput, match=message):
        training.lora_(model, **options)
    assert all(parameter.requires_grad for parameter in model.parameters())
