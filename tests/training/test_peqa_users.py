"""Models that users bring: transformers' decoders, GPT-2's transposed layers, data-parallel training."""

from __future__ import annotations

import contextlib
import importlib
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
from torch import nn

from memspan.base import BadInput
from memspan.base.files import CorruptFile
from memspan.ledger import Ledger, training_step
from memspan.training import peqa
from torchvision_schemas import import_torchvision

IDS = torch.randint(0, 90, (2, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def transformers() -> ModuleType:
    pytest.importorskip("transformers")
    with contextlib.suppress(ImportError):  # beside CPU torch transformers is not imported without this
        import_torchvision()
    return importlib.import_module("transformers")


def llama(transformers, **sizes):
    config = transformers.LlamaConfig(
        **{
            "vocab_size": 90, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, **sizes,
        }
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def test_a_llama_of_transformers_is_tuned_saved_and_switched(transformers, tmp_path):
    model = llama(transformers)
    before = model(IDS).logits
    peqa.quantize_(model, 4)
    assert len(peqa.layers(model)) == 2 * 7
    assert (model(IDS).logits - before).norm() < 0.2 * before.norm()
    start = peqa.get_task(model)
    optimizer = torch.optim.AdamW(peqa.scales(model), lr=peqa.suggest_lr(model) * 10, weight_decay=0.0)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    tuned = model(IDS).logits
    peqa.save_task(tmp_path / "task.safetensors", peqa.get_task(model))
    peqa.set_task(model, start)
    assert not torch.equal(model(IDS).logits, tuned)
    peqa.set_task(model, peqa.load_task(tmp_path / "task.safetensors"))
    assert torch.equal(model(IDS).logits, tuned)
    generated = model.generate(IDS[:, :4], max_new_tokens=3, do_sample=False)
    assert generated.shape == (2, 7)
    plain = peqa.dequantize_(model)
    torch.testing.assert_close(plain(IDS).logits, tuned, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_transformers_own_trainer_tunes_the_scales(transformers, tmp_path):
    pytest.importorskip("accelerate")
    model = peqa.quantize_(llama(transformers), 3)
    before = peqa.get_task(model)
    setting = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, learning_rate=1e-3, weight_decay=0.0, report_to=[], save_strategy="no",
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    transformers.Trainer(model, setting, train_dataset=rows).train()
    after = peqa.get_task(model)
    assert after.integers == before.integers
    assert all(not torch.equal(after.tensors[name], tensor) for name, tensor in before.tensors.items())


def test_a_llama_of_seven_billion_is_counted_before_it_is_loaded(transformers):
    config = transformers.LlamaConfig()  # the defaults are the 7B's
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    assert peqa.predict_bytes(model)["parameters.trained"] == 4 * 1_359_872


def test_transposed_layers_of_gpt2_are_quantized_and_come_back_transposed(transformers):
    config = transformers.GPT2Config(vocab_size=90, n_positions=16, n_embd=32, n_layer=2, n_head=4)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    before = model(IDS).logits
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    peqa.quantize_(model, 8)
    assert len(peqa.layers(model)) == 2 * 4
    after = model(IDS).logits
    assert (after - before).norm() < 0.02 * before.norm()
    peqa.dequantize_(model)
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes
    torch.testing.assert_close(model(IDS).logits, after, rtol=1e-3, atol=1e-4)


def test_model_states_are_under_a_sixth_of_full_fine_tuning(transformers):
    held = []
    for quantized in (False, True):
        model = llama(transformers, hidden_size=128, intermediate_size=344, num_key_value_heads=4)
        if quantized:
            peqa.quantize_(model, 4)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, weight_decay=0.0)
        batch = {"input_ids": IDS, "labels": IDS.clone()}
        training_step(model, optimizer, batch)
        with Ledger(model, optimizer) as led:
            training_step(model, optimizer, batch)
        states = ("parameters", "buffers", "gradients", "optimizer_state")
        held.append(sum(size for name, size in led.current.by_category.items() if name.startswith(states)))
    assert held[1] <= 0.15 * held[0]


def _replica(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = peqa.quantize_(nn.Sequential(nn.Linear(24, 16), nn.GELU(), nn.Linear(16, 8)), 3)
    replicated = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    sent = []

    def count(_, bucket):
        sent.append(bucket.buffer().numel())
        done = dist.all_reduce(bucket.buffer() / 2, async_op=True).get_future()
        return done.then(lambda reduced: reduced.value()[0])

    replicated.register_comm_hook(None, count)
    x = torch.randn(8, 24, generator=torch.Generator().manual_seed(3))
    replicated(x.chunk(2)[rank]).square().mean().backward()
    torch.save([torch.tensor(sent), *(scale.grad for scale in peqa.scales(model))], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_average_the_gradients_of_the_scales_alone(tmp_path):
    """Forked, so that neither process loads torch anew."""
    torch.multiprocessing.start_processes(_replica, (str(tmp_path),), nprocs=2, start_method="fork")
    torch.manual_seed(0)
    model = peqa.quantize_(nn.Sequential(nn.Linear(24, 16), nn.GELU(), nn.Linear(16, 8)), 3)
    x = torch.randn(8, 24, generator=torch.Generator().manual_seed(3))
    model(x).square().mean().backward()
    for rank in (0, 1):
        sent, *found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert int(sent.sum()) == 16 + 8  # one number an output goes over the network, nothing else
        for scale, gradient in zip(peqa.scales(model), found, strict=True):
            torch.testing.assert_close(gradient, scale.grad)


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("behind", [nn.ReLU(inplace=True), nn.Hardswish(inplace=True), lambda y: y.add_(1)])
def test_what_works_in_place_behind_a_quantized_layer_works(behind, wide):
    layer = peqa.quantize_(nn.Sequential(nn.Linear(12, 8 if wide else 16)), 4)
    x = torch.randn(2, 3, 12, requires_grad=True)
    behind(layer(x)).sum().backward()
    found = [layer[0].scales.grad.clone(), x.grad.clone()]
    layer[0].scales.grad = x.grad = None
    behind(layer(x).clone()).sum().backward()
    for one, other in zip(found, (layer[0].scales.grad, x.grad), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_adapter_of_peft_trains_on_over_integers_and_is_not_lost_in_a_merge(kind, transformers):
    peft = pytest.importorskip("peft")
    if kind == "llama":
        base, targets = llama(transformers), ["q_proj", "down_proj"]
    else:
        sizes = {"vocab_size": 90, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4}
        base, targets = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)), ["c_attn"]
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    model.eval()
    before = {name for name, p in model.named_parameters() if p.requires_grad}
    peqa.quantize_(model, 8)
    assert before <= {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(peqa.layers(model))
    with_adapter = model(input_ids=IDS).logits
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(BadInput, match=r"peqa.dequantize_\(model\) first"):
            merge()
    torch.testing.assert_close(model(input_ids=IDS).logits, with_adapter)  # nothing was lost
    with model.disable_adapter():
        assert not torch.allclose(model(input_ids=IDS).logits, with_adapter, atol=1e-3)
    merged = peqa.dequantize_(model).merge_and_unload()
    torch.testing.assert_close(merged(input_ids=IDS).logits, with_adapter, rtol=1e-3, atol=1e-4)


def test_a_fresh_head_stays_whole_and_trains(transformers):
    sizes = {"vocab_size": 90, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = transformers.BertConfig(**sizes, num_attention_heads=4)
    for kind, head in (("SequenceClassification", "classifier"), ("QuestionAnswering", "qa_outputs")):
        model = peqa.quantize_(getattr(transformers, f"BertFor{kind}")(config), 4)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert {f"{head}.weight", f"{head}.bias"} == {name for name in trained if not name.endswith("scales")}
        assert f"{head}.weight" in peqa.get_task(model).tensors


def test_a_swap_of_tasks_takes_back_what_the_last_one_changed_beside_the_scales():
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2))

    both = peqa.quantize_(build(), 4, also_train=("norm",))
    start = peqa.get_task(both)
    alone = peqa.quantize_(build(), 4)
    scales_only = peqa.get_task(alone)
    x = torch.randn(3, 8)
    expected = alone(x)
    with torch.no_grad():
        for parameter in peqa.scales(both):
            parameter.mul_(1.5)
    norms = peqa.get_task(both)
    for first, second in ((norms, scales_only), (start, scales_only)):
        peqa.set_task(both, first)
        peqa.set_task(both, second)
        torch.testing.assert_close(both(x), expected, rtol=0, atol=0)
    peqa.set_task(alone, norms)  # a model whose norms are frozen takes them, and gives them back
    assert torch.equal(alone[1].weight, norms.tensors["1.weight"])
    peqa.set_task(alone, scales_only)
    torch.testing.assert_close(alone(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "tied"])
def test_a_saved_model_comes_back_over_a_skeleton_without_values(kind, transformers, tmp_path):
    def build():
        torch.manual_seed(1)
        if kind == "llama":
            return llama(transformers)
        if kind == "gpt2":
            sizes = {"vocab_size": 90, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4}
            return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
        one = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
        one[2].weight = one[0].weight
        return one

    base = build().eval()
    before = {name: (tensor.clone(), tensor.requires_grad) for name, tensor in base.named_parameters()}
    model = peqa.quantize_(build().eval(), 3, also_train=("norm",))
    start = peqa.get_task(model)
    with torch.no_grad():
        for parameter in peqa.scales(model):
            parameter.mul_(1.1)
    peqa.save(model, tmp_path)
    with torch.device("meta"):
        skeleton = build().eval()

    def answer(of):
        return of(torch.ones(2, 8)) if kind == "tied" else of(input_ids=IDS).logits

    for given in (base, skeleton):
        found = peqa.load(tmp_path, given)
        assert torch.equal(answer(found), answer(model))
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        assert trained == [name for name, p in found.named_parameters() if p.requires_grad]
        assert [one.error for one in peqa.layers(found).values()] == [
            one.error for one in peqa.layers(model).values()
        ]
        assert (found[2].scales is found[0].scales) if kind == "tied" else True
        answer(found).sum().backward()  # it trains on
        peqa.set_task(found, start)  # and takes tasks made before it was saved
        whole = peqa.dequantize_(found)
        assert all(p.requires_grad for p in whole.parameters())
        assert {type(part) for part in whole.modules()} == {type(part) for part in base.modules()}
    for name, tensor in base.named_parameters():  # what was given is as it was
        assert torch.equal(tensor, before[name][0])
        assert tensor.requires_grad == before[name][1]


def test_a_saved_model_is_refused_over_another_network(tmp_path):
    peqa.save(peqa.quantize_(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), 4), tmp_path)
    for other in (
        nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4)),
        nn.Sequential(nn.Linear(8, 8)),
        nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)),
        nn.Sequential(nn.Linear(8, 8, bias=False), nn.LayerNorm(8)),
        nn.Sequential(nn.ReLU(), nn.LayerNorm(8)),
        peqa.quantize_(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), 4),
    ):
        with pytest.raises(BadInput, match="base"):
            peqa.load(tmp_path, other)
    (tmp_path / "peqa.safetensors").write_bytes(b"cut")
    with pytest.raises(CorruptFile):
        peqa.load(tmp_path, nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)))
    with pytest.raises(BadInput, match="quantize_ first"):
        peqa.save(nn.Sequential(nn.Linear(8, 8)), tmp_path)
