"""The built-in shapes: the network that transformers has, and the bytes that it takes."""

from __future__ import annotations

import functools

import pytest
import torch

from memspan.base import BadInput
from memspan.ledger import load_model, plan
from memspan.ledger.shapes import SHAPES, Llama, LlamaShape

SMALL = LlamaShape(vocabulary=200, width=64, layers=3, heads=4, inner=160, longest=64)
NAMES = {
    "embed": "model.embed_tokens", "norm.": "model.norm.", "head": "lm_head", "layers": "model.layers",
    ".attention_norm": ".input_layernorm", ".norm": ".post_attention_layernorm",
    ".query": ".self_attn.q_proj", ".key": ".self_attn.k_proj", ".value": ".self_attn.v_proj",
    ".out": ".self_attn.o_proj", ".gate": ".mlp.gate_proj", ".up": ".mlp.up_proj", ".down": ".mlp.down_proj",
}  # fmt: skip


def _theirs(transformers):
    config = transformers.LlamaConfig(
        vocab_size=200, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=160,
        max_position_embeddings=64, rms_norm_eps=1e-6, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def _name(own: str) -> str:
    first, dot, rest = own.partition(".")
    if first != "layers":
        return f"{NAMES.get(first, NAMES.get(first + dot, first)).rstrip('.')}.{rest}"
    index, _, rest = rest.partition(".")
    part, _, last = rest.partition(".")
    return f"model.layers.{index}{NAMES['.' + part]}.{last}"


def test_a_llama_computes_what_transformers_computes(transformers) -> None:
    theirs, ours = _theirs(transformers).eval(), Llama(SMALL)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    state = theirs.state_dict()
    ours.load_state_dict({name: state[_name(name)] for name in ours.state_dict()})
    ids = torch.randint(200, (3, 20))
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)
        expected = theirs(ids, labels=ids).loss
        torch.testing.assert_close(ours(ids, ids), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("methods", [(), ("peqa",), ("peqa", "checkpoint")])
def test_its_step_holds_what_transformers_step_holds(transformers, methods: tuple[str, ...]) -> None:
    batch = {
        "input_ids": torch.zeros(2, 64, dtype=torch.long),
        "labels": torch.zeros(2, 64, dtype=torch.long),
    }
    ours = plan(functools.partial(Llama, SMALL), batch, method=methods)
    theirs = plan(functools.partial(_theirs, transformers), batch, method=methods)
    assert (ours.parameters, ours.trained) == (theirs.parameters, theirs.trained)
    assert abs(ours.total / theirs.total - 1) < 0.001


def test_the_names_are_of_the_published_sizes_and_allocate_nothing() -> None:
    numbers = {}
    for name, shape in SHAPES.items():
        with torch.device("meta"):
            numbers[name] = sum(p.numel() for p in Llama(shape).parameters())
    assert numbers == {"llama-7b": 6_738_415_616, "llama-13b": 13_015_864_320}


def test_a_built_in_name_gives_a_batch_and_refuses_what_is_too_long() -> None:
    made = load_model("llama-7b", batch=3, tokens=16)
    assert made.batch["input_ids"].shape == (3, 16)
    assert made.longest == 2048
    with pytest.raises(BadInput, match="at most 2048"):
        load_model("llama-7b", tokens=4096)


def test_packed_weights_are_weights_and_are_counted_as_numbers() -> None:
    batch = {
        "input_ids": torch.zeros(2, 64, dtype=torch.long),
        "labels": torch.zeros(2, 64, dtype=torch.long),
    }
    plain = plan(functools.partial(Llama, SMALL), batch)
    packed = plan(functools.partial(Llama, SMALL), batch, method=["peqa"])
    assert packed.parameters == plain.parameters + packed.trained, "the weights, and the scales beside them"
    assert packed.by_category["parameters.packed"] > 0
    assert packed.by_category.get("buffers", 0) == 0
