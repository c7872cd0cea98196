"""Beside a causal language model a side network is causal: in training, and in generation with a cache."""

from __future__ import annotations

import contextlib
import importlib
import inspect
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from memspan.base import BadInput
from memspan.models.lm import CausalLM
from memspan.training.unipt import LadderHead, UniPT, UniPTHead, is_causal, side_tune_, unside_
from torchvision_schemas import import_torchvision

IDS = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(1))
SIDES = ("unipt", "lst")


@pytest.fixture(scope="module")
def transformers() -> ModuleType:
    pytest.importorskip("transformers")
    with contextlib.suppress(ImportError):
        import_torchvision()
    return importlib.import_module("transformers")


def decoder(transformers: Any, kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "llama":
        config = transformers.LlamaConfig(
            vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, pad_token_id=0,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config).eval()
    config = transformers.GPT2Config(vocab_size=60, n_positions=64, n_embd=32, n_layer=3, n_head=4)
    return transformers.GPT2LMHeadModel(config).eval()


def cache_name(model: nn.Module) -> str:
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def tuned(model: nn.Module, side: str) -> nn.Module:
    """With a side network that has learned something."""
    side_tune_(model, side)
    with torch.no_grad():
        for parameter in model.side.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("side", SIDES)
def test_a_later_token_changes_no_earlier_answer(transformers: Any, kind: str, side: str) -> None:
    model = tuned(decoder(transformers, kind), side)
    assert model.side.causal
    other = IDS.clone()
    other[:, 7] = 1
    one, two = model(input_ids=IDS).logits, model(input_ids=other).logits
    assert torch.equal(one[:, :7], two[:, :7])
    assert not torch.allclose(one[:, 7:], two[:, 7:])
    model.train()
    torch.testing.assert_close(model(input_ids=IDS).logits, one)


@pytest.mark.parametrize("side", SIDES)
def test_a_causal_model_of_ours_is_known_as_one(side: str) -> None:
    model = tuned(CausalLM(40, 16, 2, 2, max_len=16), side)
    ids = IDS[:, :8] % 40
    other = ids.clone()
    other[:, -1] += 1
    assert torch.equal(model(ids)[:, :-1], model(other)[:, :-1])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("search", [{}, {"num_beams": 3}])
def test_generation_with_a_cache_is_generation_without(
    transformers: Any, kind: str, side: str, search: dict[str, int]
) -> None:
    model = tuned(decoder(transformers, kind), side)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **search}
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0  # padded on the left
    given = {"input_ids": IDS, "attention_mask": mask}
    torch.testing.assert_close(
        model.generate(**given, **options, use_cache=True),
        model.generate(**given, **options, use_cache=False),
    )


@pytest.mark.parametrize("side", SIDES)
def test_a_text_read_in_parts_gives_the_answers_of_one_pass(transformers: Any, side: str) -> None:
    model = tuned(decoder(transformers, "llama"), side)
    name = cache_name(model)
    whole = model(input_ids=IDS).logits
    cache = transformers.DynamicCache()
    parts = [model(input_ids=part, **{name: cache}).logits for part in IDS.split((5, 4, 3), dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-5)


def test_a_cache_without_the_side_networks_part_is_refused(transformers: Any) -> None:
    model = decoder(transformers, "llama")
    name = cache_name(model)
    cache = transformers.DynamicCache()
    model(input_ids=IDS[:, :5], **{name: cache})
    tuned(model, "unipt")
    with pytest.raises(BadInput, match=r"cache='5 tokens'.*empty DynamicCache"):
        model(input_ids=IDS[:, 5:], **{name: cache})
    static = transformers.StaticCache(model.config, max_cache_len=32)
    with pytest.raises(BadInput, match=r"StaticCache.*use_cache=False"):
        model(input_ids=IDS, **{name: static})
    unside_(model)
    assert model(input_ids=IDS[:, 5:], **{name: cache}).logits.shape[1] == 7


def test_an_encoder_keeps_looking_both_ways(transformers: Any) -> None:
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    model = transformers.BertForMaskedLM(config).eval()
    assert not is_causal(model)
    tuned(model, "unipt")
    assert not model.side.causal


def test_a_causal_head_is_the_plain_head_on_each_beginning() -> None:
    torch.manual_seed(0)
    hidden = [torch.randn(2, 6, 8) for _ in range(4)]
    mask = torch.ones(2, 6)
    mask[0, :2] = 0
    causal, plain = (UniPTHead([8] * 4, 8, causal=c) for c in (True, False))
    causal.load_state_dict(plain.state_dict())
    found = causal(hidden, mask)
    for end in range(3, 7):
        alone = plain([one[:, :end] for one in hidden], mask[:, :end])
        torch.testing.assert_close(found[:, end - 1], alone[:, -1])
    torch.testing.assert_close(causal(hidden, mask, last=2), found[:, -2:])
    ladder = LadderHead([8] * 4, 8, 2, causal=True)
    torch.testing.assert_close(ladder(hidden, last=3), ladder(hidden)[:, -3:])


def test_what_has_no_order_takes_no_causal_head_and_a_whole_view_can_be_asked_for(transformers: Any) -> None:
    with pytest.raises(BadInput, match="causal=True"):
        UniPTHead([8] * 3, 8, 2, "map", causal=True)
    body = decoder(transformers, "llama").model
    seen = [UniPT(body, "hidden_states", causal=causal).head.causal for causal in (None, False)]
    assert seen == [True, False]
