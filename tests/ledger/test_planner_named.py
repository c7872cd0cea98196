"""A model may be named: transformers' configurations and timm's models, without weights or network."""

import contextlib
import json
import os
import subprocess
import sys

import pytest
import torch

from memspan.base import BadInput
from memspan.ledger import fit, load_model, plan
from memspan.ledger.step import sequence_length, stretched

TINY = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 48,
}


@pytest.fixture
def config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    return tmp_path / "config.json"


def test_a_configuration_file_or_its_folder_names_a_decoder(config, transformers):
    for where in (config, config.parent):
        made = load_model(str(where), batch=2, tokens=8)
        assert made.batch["input_ids"].shape == made.batch["labels"].shape == (2, 8)
        assert made.longest == 48
        assert type(made.build_model()).__name__ == "LlamaForCausalLM"
        assert plan(made.build_model, made.batch).exact


def test_the_architecture_that_a_configuration_names_is_built(config, transformers):
    config.write_text(
        json.dumps({**TINY, "architectures": ["LlamaForSequenceClassification"], "pad_token_id": 0})
    )
    made = load_model(str(config), batch=3, classes=5)
    assert made.batch["labels"].shape == (3,)
    assert made.build_model().score.out_features == 5


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("bert", "BertForSequenceClassification"),
        ("BertConfig", "BertForSequenceClassification"),
        ("BertForMaskedLM", "BertForMaskedLM"),
        ("vit", "ViTForImageClassification"),
        ("gpt2", "GPT2LMHeadModel"),
        ("t5", "T5ForConditionalGeneration"),
    ],
)
def test_names_of_transformers_are_models_with_a_batch(name, kind, transformers):
    made = load_model(name, batch=1)
    with torch.device("meta"):
        assert type(made.build_model()).__name__ == kind
    assert set(made.batch) in ({"input_ids", "labels"}, {"pixel_values", "labels"})


@pytest.mark.peers
def test_names_of_timm_are_models_with_their_own_image_size(timm):
    made = load_model("resnet18", batch=2, classes=7)
    assert made.batch[0].shape == (2, 3, 224, 224)
    p = plan(made.build_model, made.batch, loss=made.loss, kernels=None)
    assert p.parameters == 11_180_103
    with pytest.raises(BadInput, match="resnet18"):
        load_model("resnet-18")


@pytest.mark.slow
def test_the_longest_sequence_is_found_and_not_looked_for_beyond_what_the_model_takes(config, transformers):
    config.write_text(json.dumps(TINY | {"num_hidden_layers": 1}))  # every length is a trace
    made = load_model(str(config), batch=2, tokens=8)
    small = fit(made.build_model, made.batch, "120KiB", [], grow="length", largest=made.longest)
    assert 1 <= small.best.batch < 48
    grown = small.best.job
    assert grown.trace(small.best.batch).total <= small.budget.bytes < grown.trace(small.best.batch + 1).total
    large = fit(made.build_model, made.batch, "1GiB", [], grow="length", largest=made.longest)
    assert [item.batch for item in large.candidates] == [48]
    assert large.table()[0]["length"] == 48
    assert "length 48" in str(large)


def test_sequences_follow_a_length_and_nothing_else_does():
    batch = {"ids": torch.arange(6).view(2, 3), "mask": torch.ones(2, 3, 4), "labels": torch.zeros(2), "n": 3}
    longer = stretched(batch, 5)
    assert longer["ids"].tolist() == [[0, 1, 2, 0, 1], [3, 4, 5, 3, 4]]
    assert longer["mask"].shape == (2, 5, 4)
    assert longer["labels"] is batch["labels"]
    assert sequence_length(longer) == 5
    assert stretched(batch, 3) is batch
    with pytest.raises(BadInput, match="it has no sequences"):
        sequence_length(torch.zeros(4))


@pytest.mark.parametrize(
    ("where", "options", "message"),
    [
        (
            "nothing-like-this",
            {},
            r"model='nothing-like-this': give path/to/file.py:function; .*a config.json",
        ),
        ("{folder}", {}, "this folder holds no config.json"),
        ("{folder}/absent.json", {}, "no configuration can be read"),
        ("bert", {"tokens": 513}, "tokens=513: bert takes at most 512"),
        ("bert", {"batch": 0}, "batch=0: give a whole number"),
        ("sam", {}, "neither label nor continue"),
    ],
)
def test_bad_names_and_sizes_are_refused(where, options, message, tmp_path, transformers):
    with pytest.raises(BadInput, match=message):
        load_model(where.format(folder=tmp_path), **options)


def test_a_name_of_timm_tells_why_timm_is_not_there(monkeypatch, transformers):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(BadInput, match=r"model='resnet18': .*timm is needed here .*memspan\[peers\]"):
        load_model("resnet18")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model_type": "lama"}'])
def test_files_that_are_no_configuration_are_refused(content, tmp_path, transformers):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(BadInput):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"), [({"grow": "width"}, "grow='width'"), ({"largest": 0}, "largest=0")]
)
def test_what_grows_is_checked(change, message):
    with pytest.raises(BadInput, match=message):
        fit(torch.nn.Linear, torch.zeros(2, 2), "1MiB", [], **change)


@pytest.mark.slow
def test_a_torchvision_built_for_another_torch_keeps_no_text_model_from_its_plan(tmp_path, transformers):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('no operator nms')")
    code = (
        "from memspan.ledger import load_model, plan\n"
        "made = load_model('bert', batch=1, tokens=4)\n"
        "print(plan(made.build_model, made.batch, None, kernels=None).parameters)\n"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 100_000_000


@pytest.mark.parametrize(("key", "dtype"), [("dtype", "bfloat16"), ("torch_dtype", "float16")])
def test_a_configuration_is_planned_in_the_dtype_that_it_names(key, dtype, config, transformers):
    plain = load_model(str(config), batch=2, tokens=8)
    config.write_text(json.dumps({**TINY, key: dtype}))
    made = load_model(str(config), batch=2, tokens=8)
    assert {p.dtype for p in made.build_model().parameters()} == {getattr(torch, dtype)}
    assert torch.get_default_dtype() is torch.float32
    halves, floats = (plan(m.build_model, m.batch).by_category["parameters.trained"] for m in (made, plain))
    assert 2 * halves == floats


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "fp8"])
def test_weights_that_another_library_packs_are_not_planned_as_floats(method, config, transformers):
    config.write_text(json.dumps({**TINY, "quantization_config": {"quant_method": method, "bits": 4}}))
    with pytest.raises(BadInput, match=rf"quantization_config='{method}'.*peqa"):
        load_model(str(config))


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("bert-base-uncased", "bert"),
        ("google-bert/bert-base-cased", "bert"),
        ("meta-llama/Llama-2-7b-hf", "llama"),
        ("google/vit-base-patch16-224", "vit"),
        ("openai-community/gpt2", "gpt2"),
        ("Qwen/Qwen2.5-0.5B", "qwen2"),
        ("mistralai/Mixtral-8x7B-v0.1", "mixtral"),
        ("FacebookAI/roberta-base", "roberta"),
        ("distilbert/distilbert-base-uncased", "distilbert"),
    ],
)
def test_a_name_on_the_hub_leads_to_the_nearest_that_works_without_it(name, nearest, transformers):
    with pytest.raises(BadInput, match=f"or plan {nearest}, which"):
        load_model(name)


@pytest.mark.peers
@pytest.mark.parametrize(
    "name", ["timm/resnet18.a1_in1k", "hf-hub:timm/resnet18.a1_in1k", "resnet18.a1_in1k"]
)
def test_names_of_timms_weights_are_its_models(name, timm):
    made = load_model(name, batch=2, classes=7)
    with torch.device("meta"):
        assert sum(p.numel() for p in made.build_model().parameters()) == 11_180_103


def test_a_torchvision_of_another_torch_is_told_as_what_it_is(transformers, monkeypatch):
    from memspan.ledger import named

    told = "torchvision 0.1 was built for another torch than 2: install the build that fits it"
    hidden = contextlib.nullcontext(told)
    monkeypatch.setattr(named, "broken_torchvision_hidden", lambda _: hidden)
    monkeypatch.setattr(named, "_timm", lambda: (None, "no module named torchvision.ops"))
    with pytest.raises(BadInput, match="built for another torch"):
        load_model("timm/resnet18.a1_in1k")


@pytest.mark.slow
def test_the_first_plan_of_a_process_is_as_the_second(config, transformers):
    """The builder may be what imports transformers, whose fake-tensor slip is to be mended all the same."""
    config.write_text(json.dumps(TINY | {"num_key_value_heads": 1}))
    code = (
        "from torchvision_schemas import import_torchvision\n"
        "import_torchvision()\n"
        "from memspan.ledger import load_model, plan\n"
        f"made = [load_model({str(config)!r}, batch=2, tokens=32) for _ in range(2)]\n"
        "print(*(plan(one.build_model, one.batch).total for one in made))"
    )
    paths = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    first, second = done.stdout.split()
    assert first == second
