"""Every registered method is planned as it runs, on an encoder, a decoder and a network of convolutions."""

import functools
import inspect
from dataclasses import replace

import pytest
import torch
from torch import nn

from memspan.base import BadInput
from memspan.ledger import Ledger, Method, methods, planner
from memspan.ledger.planner import job
from memspan.ledger.step import loss_of
from memspan.recipes.ledger.models import CNN, classify
from memspan.training import peqa, slimfit
from memspan.training.peqa.qlora import predict_qlora_bytes
from memspan.training.unipt import predict_side_bytes

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


#: The closed forms beside the methods, which nothing but people reads: each is held against the ledger.
FORMULAS = {
    "peqa": peqa.predict_bytes,
    "qlora": predict_qlora_bytes,
    "slimfit": slimfit.predict_bytes,
    "unipt": predict_side_bytes,
}
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
@pytest.mark.parametrize("method", FORMULAS)
def test_a_formula_is_within_five_percent_of_the_ledger(kind, method, transformers):
    one = job_of(kind, method, transformers)
    formula = FORMULAS[method]
    if method == "unipt" and kind == "decoder":
        pytest.skip("beside a causal model the trace tells, no closed form")
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


def in_two_turns(model, batch, loss, scale, *, turns):
    """A micro-batch in parts, each with its own forward and backward pass."""
    x, y = batch
    total = torch.zeros(())
    for part, target in zip(x.chunk(turns), y.chunk(turns), strict=True):
        value = loss_of(model, (part, target), loss)
        (value * scale * len(part) / len(x)).backward()
        total += value.detach() * len(part) / len(x)
    return total


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_method_with_its_own_step_is_planned_and_run_by_it(accumulate, monkeypatch):
    """In two turns half of the activations are alive, and the gradients are those of one."""
    turns = Method("turns", lambda model, turns: model, step=in_two_turns)
    monkeypatch.setattr(planner, "method", {"turns": turns}.get)
    batch = (torch.rand(512, 20), torch.arange(512) % 10)
    build = lambda: nn.Sequential(nn.Linear(20, 200), nn.GELU(), nn.Linear(200, 10))  # noqa: E731
    gradients, planned = [], []
    for way in ((), ("turns", {"turns": 2})):
        one = job(build, batch, torch.optim.SGD, way, classify, accumulate=accumulate)
        torch.manual_seed(0)
        model, optimizer = one.ready()
        one.step(model, None, batch)
        gradients.append([p.grad for p in model.parameters()])
        one.step(model, optimizer, batch)
        with Ledger(model, optimizer) as led:
            one.step(model, optimizer, batch)
        planned.append(one.trace(512))
        assert planned[-1].total == led.peak.total
    assert planned[1].by_category["saved_activations"] < 0.6 * planned[0].by_category["saved_activations"]
    for mine, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, plain)


def test_a_method_for_ranks_shards_the_model_itself():
    """It gets the mesh, and nothing shards the model a second time; on one rank the mesh is None."""
    seen = []

    def convert_(model, *, mesh):
        seen.append(mesh)
        return model

    ranks = Method("ranks", convert_, ranks=True)
    batch = (torch.rand(4, 8), torch.arange(4))
    for world in (1, 2):
        plain = job(lambda: nn.Linear(8, 4), batch, loss=classify, world=world)
        one = replace(plain, method=((ranks, {}),))
        assert one.trace(4).trained == 36
    assert seen[0] is None
    assert seen[1].size() == 2
    assert planner.conflict(ranks, Method("others", convert_, ranks=True))


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
