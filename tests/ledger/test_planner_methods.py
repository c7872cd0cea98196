"""Every registered method is planned as it runs, on an encoder, a decoder and a network of convolutions."""

import functools
import inspect

import pytest
import torch

from memspan.base import BadInput
from memspan.ledger import Ledger, methods
from memspan.ledger.planner import job
from memspan.recipes._ledger_models import CNN, classify

SIZE, TOKENS = 4, 32
IDS = torch.arange(SIZE * TOKENS).view(SIZE, TOKENS) % 90
STATES = ("parameters", "buffers", "gradients", "optimizer_state")


def encoder(transformers):
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    return lambda: transformers.BertForSequenceClassification(config), {
        "input_ids": IDS,
        "labels": torch.arange(SIZE) % 2,
    }


def decoder(transformers):
    config = transformers.LlamaConfig(
        vocab_size=100,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=64,
        use_cache=False,
    )
    return lambda: transformers.LlamaForCausalLM(config), {"input_ids": IDS, "labels": IDS.clone()}


def convolutions(_):
    return functools.partial(CNN, width=16), (torch.rand(SIZE, 3, 16, 16), torch.arange(SIZE))


KINDS = {"encoder": encoder, "decoder": decoder, "convolutions": convolutions}


def job_of(kind, method, transformers):
    build, batch = KINDS[kind](transformers)
    one = job(build, batch, method=method, loss=classify if isinstance(batch, tuple) else None)
    try:
        one.ready()
    except BadInput as error:
        pytest.skip(f"{method or 'plain'} refuses this architecture: {error}")
    return one


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [(), *methods()])
def test_a_traced_plan_is_within_one_percent_of_the_ledger_and_of_the_allocator(kind, method, transformers):
    one = job_of(kind, method, transformers)
    traced = one.trace(SIZE)
    model, optimizer = one.ready()
    model.train()
    one.step(model, optimizer, one.batch)
    with Ledger(model, optimizer, inputs=one.batch, allocator=True) as led:
        one.step(model, optimizer, one.batch)
    assert traced.total == pytest.approx(led.peak.attributed, rel=0.01)
    assert traced.total == pytest.approx(led.peak.total, rel=0.01)
    assert traced.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [name for name, one in methods().items() if one.predict_bytes])
def test_a_formula_is_within_five_percent_of_the_ledger(kind, method, transformers):
    one = job_of(kind, method, transformers)
    formula = methods()[method].predict_bytes
    known = {"model": one.build_model(), "batch": SIZE, "length": TOKENS}
    asked = [
        name
        for name, parameter in inspect.signature(formula).parameters.items()
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
    ]
    predicted = formula(**{name: known[name] for name in asked})
    model, optimizer = one.ready()
    model.train()
    one.step(model, optimizer, one.batch)
    with Ledger(model, optimizer, inputs=one.batch, level="timeline") as led:
        one.step(model, optimizer, one.batch)
    points = led.timeline()
    for head in (*STATES, "saved_activations"):
        said = [size for name, size in predicted.items() if name.split(".")[0] == head]
        held = [sum(n for c, n in point.by_category.items() if c.split(".")[0] == head) for point in points]
        if said:
            assert sum(said) == pytest.approx(max(held), rel=0.05), head
    assert {name.split(".")[0] for name in predicted} >= set(STATES)


@pytest.mark.slow
def test_llama_7b_is_planned_with_the_scalars_that_peqa_trains(transformers):
    if "peqa" not in methods():
        pytest.skip("no room registers peqa")
    config = transformers.LlamaConfig(use_cache=False)
    ids = torch.zeros(1, 64, dtype=torch.long)
    p = job(
        lambda: transformers.LlamaForCausalLM(config), {"input_ids": ids, "labels": ids}, method="peqa"
    ).trace(1)
    assert p.trained == 1_359_872
