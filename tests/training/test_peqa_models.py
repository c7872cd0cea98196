"""A model converted in place: what is quantized, trained, kept, switched, taken back and refused."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from memspan.base import BadInput
from memspan.base.files import load_state, save_state
from memspan.ledger import Ledger, memory_bytes, methods, plan, training_step
from memspan.models.lm import CausalLM, next_token_loss
from memspan.training import lora_, peqa, qlora_, unqlora_
from memspan.training.baselines import checkpoint_
from memspan.training.peqa.layers import TILE_BYTES
from memspan.training.peqa.qlora import predict_qlora_bytes

IDS = torch.randint(0, 61, (4, 24), generator=torch.Generator().manual_seed(1))
TARGETS = IDS.clone()


def lm(seed=0, **options):
    torch.manual_seed(seed)
    return CausalLM(61, d_model=32, n_layers=2, n_heads=2, max_len=24, **options)


def loss_of(logits, ids):
    return next_token_loss(logits, ids)


def tune(model, steps=3, lr=None, seed=0):
    optimizer = torch.optim.AdamW(peqa.scales(model), lr=lr or peqa.suggest_lr(model), weight_decay=0.0)
    draws = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        training_step(model, optimizer, (torch.randint(0, 61, (2, 24), generator=draws),) * 2, loss_of)
    return optimizer


def decoder(width, inner, depth, heads, vocabulary=32_000):
    """The shapes of LLaMA's layers; nothing of it is run."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
                nn.Linear(width, width, bias=False) for _ in range(4)
            )
            self.gate_proj, self.up_proj = (nn.Linear(width, inner, bias=False) for _ in range(2))
            self.down_proj = nn.Linear(inner, width, bias=False)
            self.norm = nn.RMSNorm(width)

    model = nn.Module()
    model.embed_tokens = nn.Embedding(vocabulary, width)
    model.layers = nn.ModuleList(Block() for _ in range(depth))
    model.lm_head = nn.Linear(width, vocabulary, bias=False)
    return model


# ---- quality and what changes -----------------------------------------------------------------------------


def test_eight_bits_untuned_keep_the_logits_within_one_percent():
    model = lm()
    before = model(IDS)
    after = peqa.quantize_(model, 8)(IDS)
    assert (after - before).norm() <= 0.01 * before.norm()


@pytest.mark.parametrize("group_size", [None, 16])
def test_tuning_changes_the_scales_alone_and_adam_keeps_two_numbers_for_each(group_size):
    model = peqa.quantize_(lm(), 4, group_size)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = tune(model, steps=16)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) != name.endswith(".scales"), name
    state = [t for slots in optimizer.state.values() for t in slots.values()]
    scalars = sum(
        layer.out_features * (layer.in_features // (group_size or layer.in_features))
        for layer in peqa.layers(model).values()
    )
    counters = 4 * len(peqa.layers(model))
    assert sum(t.nbytes for t in state) == 8 * scalars + counters


def test_everything_else_is_frozen_and_more_is_trained_when_asked():
    model = peqa.quantize_(lm(), 4, also_train=("norm", "head"))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"norm.weight", "blocks.0.ffn_norm.bias", "head.weight", "blocks.1.ffn.up.scales"} <= trained
    assert "blocks.0.ffn.up.bias" not in trained
    assert isinstance(model.head, nn.Linear)
    model = peqa.quantize_(lm(), 4, also_train=("bias",))
    assert all(layer.bias.requires_grad for layer in peqa.layers(model).values())


def test_bits_and_groups_buy_a_smaller_error_and_take_the_bytes_of_the_formula():
    weight = torch.randn(32, 96)
    errors = {}
    for bits in (2, 3, 4, 8):
        for group_size in (None, 16):
            model = nn.Sequential(nn.Linear(96, 32))
            model[0].weight.data.copy_(weight)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                peqa.quantize_(model, bits, group_size)
            row = peqa.summary(model).layers[0]
            errors[bits, group_size] = row.error
            assert row.bytes == 32 * (96 * bits // 8) + 32 * (96 // (group_size or 96)) * 5
            off = (weight - model[0].dequantized().detach()).norm() / weight.norm()
            assert row.error == pytest.approx(float(off), rel=1e-4)
    assert errors[2, None] > errors[3, None] > errors[4, None] > errors[8, None]
    assert all(errors[bits, 16] < errors[bits, None] for bits in (2, 3, 4, 8))


def test_optq_on_real_inputs_changes_the_outputs_less_than_rounding():
    lost = []
    batches = [torch.randint(0, 61, (8, 24)) for _ in range(4)]
    for init in ("rtn", "optq"):
        model = lm()
        for parameter in model.parameters():
            parameter.data.mul_(3)
        before = model(IDS).detach()
        peqa.quantize_(model, 3, init=init, calibration=batches if init == "optq" else None)
        lost.append((model(IDS) - before).norm().item())
    assert lost[1] < lost[0]


def test_optq_sees_the_inputs_that_the_quantized_layers_before_give():
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    weight, x = model[1].weight.detach().clone(), torch.randn(64, 12) @ torch.randn(12, 12)
    peqa.quantize_(model, 2, 6, init="optq", calibration=[x])
    given = model[0](x).detach()
    peqa.optq_(weight, given.T @ given, 2, 6)
    torch.testing.assert_close(model[1].dequantized().detach(), weight)


def test_the_suggested_rate_is_two_thousandths_of_the_median_scale():
    model = peqa.quantize_(nn.Sequential(nn.Linear(8, 3), nn.Linear(3, 2)), 8)
    with torch.no_grad():
        model[0].scales.copy_(torch.tensor([[1.0], [2.0], [-3.0]]))  # a turned scale counts by its size
        model[1].scales.copy_(torch.tensor([[4.0], [5.0]]))
    assert peqa.suggest_lr(model) == pytest.approx(6e-3)


@pytest.mark.parametrize("act_order", [False, True])
def test_a_column_order_is_kept_with_the_layer(act_order):
    model = nn.Sequential(nn.Linear(24, 8), nn.Tanh(), nn.Linear(8, 4))
    batches = [(torch.randn(32, 24) @ torch.randn(24, 24),) for _ in range(3)]
    peqa.quantize_(model, 3, 4, init="optq", calibration=batches, act_order=act_order)
    x = torch.randn(5, 24)
    y = model(x)
    assert (model[0].perm is not None) == act_order
    back = peqa.dequantize_(copy.deepcopy(model))
    torch.testing.assert_close(back(x), y)


def test_two_bits_per_channel_warn_with_the_measured_error():
    with pytest.warns(UserWarning, match=r"off by \d+ %.*group_size=64"):
        peqa.quantize_(lm(), 2)


# ---- kinds of layers, ties, adapters ----------------------------------------------------------------------


def test_pointwise_convolutions_and_embeddings_are_quantized_when_asked_for():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(20, 8, padding_idx=0),
        nn.Unflatten(1, (3, 4)),
        nn.Conv2d(3, 6, 1, stride=2),
        nn.Conv2d(6, 2, (2, 1)),
    )
    ids = torch.randint(0, 20, (5, 12))
    before = model(ids)
    peqa.quantize_(model, 8, skip=(), kinds=("conv2d", "embedding"))
    assert [type(part).__name__ for part in model] == ["QuantEmbedding", "Unflatten", "QuantConv2d", "Conv2d"]
    after = model(ids)
    assert (after - before).norm() < 0.02 * before.norm()
    after.square().sum().backward()
    assert all(layer.scales.grad.abs().sum() > 0 for layer in peqa.layers(model).values())
    assert model[0].scales.grad[0].abs().sum() == 0
    torch.testing.assert_close(peqa.dequantize_(model)(ids), after)
    assert [type(part) for part in model] == [nn.Embedding, nn.Unflatten, nn.Conv2d, nn.Conv2d]


def test_a_head_tied_to_its_embedding_is_skipped_with_a_warning_or_quantized_with_it():
    model = lm(tied=True)
    with pytest.warns(UserWarning, match="head shares its weight with embed.tokens"):
        peqa.quantize_(model, 4, skip=())
    assert model.head.weight is model.embed.tokens.weight
    model = lm(tied=True)
    peqa.quantize_(model, 4, skip=(), kinds=("linear", "embedding"))
    assert model.head.scales is model.embed.tokens.scales
    assert model.head.qweight is model.embed.tokens.qweight
    model(IDS).sum().backward()
    peqa.dequantize_(model)
    assert model.head.weight is model.embed.tokens.weight


def test_a_layer_at_two_places_stays_one_layer():
    shared = nn.Linear(8, 8)
    model = peqa.quantize_(nn.Sequential(shared, nn.Tanh(), shared), 4)
    assert model[0] is model[2]
    assert peqa.dequantize_(model)[0] is model[2]


def test_base_layers_inside_adapters_are_found_and_the_adapters_own_matrices_left_alone():
    class Adapter(nn.Module):  # the layout of peft's tuners
        def __init__(self):
            super().__init__()
            self.base_layer = nn.Linear(16, 16)
            self.lora_A = nn.ModuleDict({"default": nn.Linear(16, 2, bias=False)})
            self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 16, bias=False)})

    model = nn.Sequential(Adapter(), nn.Linear(16, 4))
    peqa.quantize_(model, 4)
    assert list(peqa.layers(model)) == ["0.base_layer", "1"]


# ---- back, copies, states ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantizing_gives_plain_layers_with_the_same_answers(dtype):
    model = lm().to(dtype)
    model.embed.tokens.weight.requires_grad_(False)
    plain = {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}
    peqa.quantize_(model, 4, 16)
    tune(model)
    before = model(IDS)
    assert peqa.dequantize_(model) is model
    assert {name: (t.shape, t.dtype) for name, t in model.state_dict().items()} == plain
    close = 1e-4 if dtype == torch.float32 else 0.1
    assert (model(IDS) - before).norm() <= close * before.norm()
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["embed.tokens.weight"]


def test_states_go_through_safetensors_and_copies_stand_alone(tmp_path):
    model = peqa.quantize_(lm(), 3)
    tune(model)
    save_state(tmp_path / "model.safetensors", model.state_dict())
    other = peqa.quantize_(lm(seed=1), 3)
    other.load_state_dict(load_state(tmp_path / "model.safetensors")[0])
    assert torch.equal(other(IDS), model(IDS))
    copied = copy.deepcopy(model)
    tune(copied, lr=1e-3)
    assert torch.equal(other(IDS), model(IDS))
    assert not torch.equal(copied(IDS), model(IDS))


def test_a_dtype_change_keeps_the_integers():
    model = peqa.quantize_(lm(), 4)
    before = {n: t.clone() for n, t in model.state_dict().items() if t.dtype == torch.uint8}
    exact = model(IDS)
    model.to(torch.bfloat16)
    after = model.state_dict()
    assert before
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert (model(IDS).float() - exact).norm() < 0.05 * exact.norm()


def test_compiled_forward_agrees():
    model = peqa.quantize_(nn.Sequential(nn.Linear(24, 16), nn.GELU(), nn.Linear(16, 8)), 3)
    x = torch.randn(4, 24)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    y = compiled(x)
    torch.testing.assert_close(y, model(x))
    y.square().sum().backward()
    found = [layer.scales.grad.clone() for layer in peqa.layers(model).values()]
    model.zero_grad()
    model(x).square().sum().backward()
    for layer, gradient in zip(peqa.layers(model).values(), found, strict=True):
        torch.testing.assert_close(layer.scales.grad, gradient)


def test_autocast_and_checkpointing_go_with_it():
    model = peqa.quantize_(lm(), 4)
    training_step(model, None, (IDS, IDS), loss_of)
    plain = [scale.grad.clone() for scale in peqa.scales(model)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        training_step(model, None, (IDS, IDS), loss_of)
    for scale, gradient in zip(peqa.scales(model), plain, strict=True):
        assert (scale.grad - gradient).norm() < 0.1 * gradient.norm()
    checkpoint_(model)
    training_step(model, None, (IDS, IDS), loss_of)
    assert all(torch.equal(s.grad, g) for s, g in zip(peqa.scales(model), plain, strict=True))


# ---- tasks ------------------------------------------------------------------------------------------------


def test_tasks_are_kilobytes_and_switching_back_gives_the_same_bits(tmp_path):
    model = peqa.quantize_(lm(), 4, also_train=("norm",))
    tune(model, lr=1e-3, seed=1)
    one, answer = peqa.get_task(model), model(IDS)
    tune(model, lr=1e-3, seed=2)
    two, other = peqa.get_task(model), model(IDS)
    assert not torch.equal(answer, other)
    assert one.memory_bytes()["parameters.task"] < 8192
    for task, expected in ((one, answer), (two, other), (one, answer)):
        peqa.set_task(model, task)
        assert torch.equal(model(IDS), expected)
    peqa.save_task(tmp_path / "law.safetensors", one)
    peqa.set_task(model, two)
    peqa.set_task(model, peqa.load_task(tmp_path / "law.safetensors"))
    assert torch.equal(model(IDS), answer)
    peqa.save_task(tmp_path / "small.safetensors", one, torch.bfloat16)
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("law", "small")]
    assert sizes[1] < 0.75 * sizes[0]
    peqa.set_task(model, peqa.load_task(tmp_path / "small.safetensors"))


def test_a_task_of_other_integers_or_shapes_is_refused_and_changes_nothing(tmp_path):
    model, other = peqa.quantize_(lm(), 4), peqa.quantize_(lm(seed=1), 4)
    task, before = peqa.get_task(other), peqa.get_task(model)
    with pytest.raises(BadInput, match="another integer model"):
        peqa.set_task(model, task)
    good = dict(before.tensors)
    name = next(iter(good))
    with pytest.raises(BadInput, match="NaN"):
        peqa.Task({name: good[name] * float("nan")}, before.integers)
    for bad in ({name: good[name][:-1]}, {"none.scales": good[name]}):
        with pytest.raises(BadInput, match="task="):
            peqa.set_task(model, peqa.Task({**good, **bad}, before.integers))
    lacking = peqa.Task({k: v * 2 for k, v in good.items() if k != name}, before.integers)
    with pytest.raises(BadInput, match="lacks"):
        peqa.set_task(model, lacking)
    assert all(torch.equal(v, before.tensors[k]) for k, v in peqa.get_task(model).tensors.items())
    other.load_state_dict(model.state_dict())  # the checksum follows the integers
    peqa.set_task(other, before)
    with pytest.raises(BadInput, match="vanish or overflow"):
        peqa.save_task(tmp_path / "x", peqa.Task({name: good[name] * 1e-9}, ""), torch.float16)
    save_state(tmp_path / "else.safetensors", {}, {"kind": "other"})
    with pytest.raises(BadInput, match="kind"):
        peqa.load_task(tmp_path / "else.safetensors")


# ---- planner and ledger -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "inner", "depth", "heads", "scalars"),
    [(4096, 11_008, 32, 32, 1_359_872), (8192, 22_016, 80, 64, 6_799_360)],
)
def test_seven_and_sixty_five_billion_parameters_have_the_papers_counts(width, inner, depth, heads, scalars):
    with torch.device("meta"):
        model = decoder(width, inner, depth, heads)
    assert peqa.predict_bytes(model)["parameters.trained"] == 4 * scalars
    assert scalars == depth * (4 * width + 2 * inner + width)
    with FakeTensorMode():
        fake = peqa.quantize_(decoder(width, inner, depth, heads))
    assert sum(p.numel() for p in peqa.scales(fake)) == scalars
    gigabytes = sum(layer.qweight.nbytes for layer in peqa.layers(fake).values()) / 1e9
    assert gigabytes == pytest.approx(depth * (4 * width**2 + 3 * width * inner) / 2e9)
    with pytest.raises(BadInput, match="meta"):
        peqa.quantize_(model)


@pytest.mark.parametrize(
    ("name", "options"), [("peqa", {}), ("peqa", {"bits": 3, "group_size": 16}), ("qlora", {"rank": 2})]
)
def test_the_plan_the_closed_form_and_the_ledger_agree(name, options):
    model = lm()
    closed = {"peqa": peqa.predict_bytes, "qlora": predict_qlora_bytes}[name](model, **options)
    planned = plan(lm, (IDS, TARGETS), method=(name, options), loss=loss_of)
    methods()[name].convert_(model, **options)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    training_step(model, optimizer, (IDS, TARGETS), loss_of)
    with Ledger(model, optimizer) as led:
        training_step(model, optimizer, (IDS, TARGETS), loss_of)
    assert planned.exact
    assert planned.total == led.peak.total
    assert planned.by_category == led.peak.by_category
    states = {key: led.current.by_category.get(key, 0) for key in closed}
    assert states == closed


def test_the_peak_is_under_half_of_full_fine_tunings_at_256_tokens_and_nears_it_with_more():
    def peak(sequences, quantized):
        model = CausalLM(2000, d_model=192, n_layers=4, n_heads=4, max_len=256)
        if quantized:
            peqa.quantize_(model, 4, init="minmax")
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        ids = torch.zeros(sequences, 256, dtype=torch.long)
        training_step(model, optimizer, (ids, ids), loss_of)
        with Ledger(model, optimizer) as led:
            training_step(model, optimizer, (ids, ids), loss_of)
        return led.peak.total

    few, more = (peak(sequences, True) / peak(sequences, False) for sequences in (1, 2))
    assert few <= 0.5 < more < 0.6  # activations are those of full fine-tuning


@pytest.mark.parametrize("options", [{}, {"group_size": 8}])
def test_a_plan_that_traces_one_tile_tells_the_bytes_and_the_arithmetic_of_all(options):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(768, 3000), nn.ReLU(), nn.Linear(3000, 32))

    batch = (torch.randn(8, 768), torch.zeros(8, 32))
    loss = torch.nn.functional.mse_loss
    assert 2 * (TILE_BYTES // (4 * 768)) < 3000  # three tiles
    options = {"init": "minmax", **options}
    planned = plan(build, batch, method=("peqa", options), loss=loss, flops=True)
    model = peqa.quantize_(build(), **options)
    optimizer = torch.optim.AdamW(peqa.scales(model))
    training_step(model, optimizer, batch, loss)
    with Ledger(model, optimizer) as led:
        training_step(model, optimizer, batch, loss)
    assert planned.total == led.peak.total
    with FlopCounterMode(display=False) as counter:
        training_step(model, optimizer, batch, loss)
    assert planned.flops == counter.get_total_flops()


def test_peqa_does_not_combine_with_its_rivals_and_goes_with_checkpointing():
    with pytest.raises(BadInput, match="do not combine"):
        plan(lm, (IDS, IDS), method=["peqa", "lora"], loss=loss_of)
    both = plan(lm, (IDS, IDS), method=["peqa", "checkpoint"], loss=loss_of)
    assert both.total < plan(lm, (IDS, IDS), method="peqa", loss=loss_of).total


def test_bytes_claimed_by_a_layer_are_its_tensors():
    layer = peqa.QuantLinear(24, 8, bits=3)
    assert memory_bytes(layer) == {"parameters": 4 * 8 + 4 * 8, "parameters.packed": 8 * 9 + 8}


# ---- qlora ------------------------------------------------------------------------------------------------


def test_lora_over_integers_starts_at_the_quantized_model_and_merging_is_left_to_floats():
    plain = peqa.quantize_(lm(), 4)(IDS)
    model = qlora_(lm(), rank=2, bits=4)
    assert torch.equal(model(IDS), plain)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all(name.endswith(("lora_a", "lora_b")) for name in trained)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            parameter.data.normal_(std=0.05)
    with pytest.raises(BadInput, match="integers cannot"):
        from memspan.training import unlora_

        unlora_(model, merge=True)
    learned = model(IDS)
    merged = unqlora_(copy.deepcopy(model), merge=True)
    torch.testing.assert_close(merged(IDS), learned, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(unqlora_(model)(IDS), plain, rtol=1e-4, atol=1e-5)
    assert all(p.requires_grad for p in model.parameters())
    again = peqa.quantize_(merged, 4)(IDS)
    assert (again - learned).norm() > 0.05 * learned.norm()


def test_a_refused_qlora_gives_the_model_back_unquantized():
    model = lm()
    with pytest.raises(BadInput, match="rank"):
        qlora_(model, rank=0)
    with pytest.raises(BadInput, match=r"nothing"):
        qlora_(model, rank=2, names=["nothing"])
    assert not peqa.layers(model)


# ---- bad input --------------------------------------------------------------------------------------------


def test_bad_options_are_refused_before_anything_changes():
    model = lm()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calls = [
        ("bits=5", {"bits": 5}),
        (r"layer blocks.0.*one of 1, 2, 4, 8, 16, 32", {"group_size": 24}),
        ("needs batches", {"init": "optq"}),
        ("empty", {"init": "optq", "calibration": []}),
        ("'rtn'", {"init": "best"}),
        ("blocks.0.attention.query", {"skip": ("*",)}),
        ("give a sequence", {"skip": "head"}),
        ("kinds=", {"kinds": ("conv3d",)}),
        ("scale_dtype", {"scale_dtype": torch.int8}),
        ("also_train='nothing'", {"also_train": ("nothing",)}),
        ("act_order", {"act_order": True}),
        ("none", {"kinds": ("conv2d",)}),
    ]
    for match, options in calls:
        with pytest.raises(BadInput, match=match):
            peqa.quantize_(model, **options)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_calibration_that_is_not_finite_or_misses_a_layer_is_refused_before_anything_changes():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    bad = torch.randn(4, 8)
    bad[2, 3] = float("nan")
    with pytest.raises(BadInput, match="calibration='0': NaN"):
        peqa.quantize_(model, 4, init="optq", calibration=[torch.randn(4, 8), bad])
    model.side = nn.Linear(8, 8)
    model.forward = lambda x: model[1](model[0](x))
    with pytest.raises(BadInput, match="calibration='side': no batch reaches"):
        peqa.quantize_(model, 4, init="optq", calibration=[torch.randn(4, 8)])
    assert not peqa.layers(model)
    assert model.training


def test_models_that_cannot_be_quantized_are_refused():
    with pytest.raises(BadInput, match="quantized already"):
        peqa.quantize_(peqa.quantize_(lm(), 4), 4)
    with pytest.raises(BadInput, match="single layer"):
        peqa.quantize_(nn.Linear(4, 4))
    broken = nn.Sequential(nn.Linear(4, 4))
    broken[0].weight.data[0, 0] = float("inf")
    with pytest.raises(BadInput, match="not finite"):
        peqa.quantize_(broken)
    whole = nn.Sequential(nn.Linear(4, 4))
    whole[0].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(BadInput, match="int8"):
        peqa.quantize_(whole)
    for call in (
        peqa.dequantize_,
        peqa.scales,
        peqa.suggest_lr,
        peqa.summary,
        peqa.get_task,
        peqa.export,
        unqlora_,
    ):
        with pytest.raises(BadInput, match="model="):
            call(nn.Sequential(nn.Linear(4, 4)))


def test_an_optimizer_made_too_early_is_told():
    model = lm()
    early = torch.optim.AdamW(model.parameters())
    peqa.quantize_(model, 4)
    with pytest.raises(BadInput, match="after quantize_"):
        peqa.check(model, early)
    both = torch.optim.SGD([*peqa.scales(model), nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(BadInput, match="not in the model"):
        peqa.check(model, both)
    with pytest.warns(UserWarning, match="weight decay"):
        peqa.check(model, torch.optim.AdamW(peqa.scales(model)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peqa.check(model, torch.optim.AdamW(peqa.scales(model), weight_decay=0.0))
    model.to(torch.bfloat16)
    with pytest.warns(UserWarning, match="16 bits lose small steps"):
        peqa.check(model, torch.optim.AdamW(peqa.scales(model), weight_decay=0.0))
    for scale in peqa.scales(model):
        scale.requires_grad_(False)
    with pytest.raises(BadInput, match="everything in it is frozen"):
        peqa.scales(model)


def test_scales_that_vanish_in_their_dtype_are_refused_and_turned_ones_are_counted():
    tiny = nn.Sequential(nn.Linear(8, 4, bias=False))
    tiny[0].weight.data.mul_(1e-7)
    with pytest.raises(BadInput, match="scale_dtype"):
        peqa.quantize_(tiny, 8, scale_dtype=torch.float16)
    model = peqa.quantize_(lm(), 4)
    assert peqa.summary(model).flipped == 0
    next(iter(peqa.layers(model).values())).scales.data[:3].neg_()
    assert peqa.summary(model).flipped == 3
    assert "blocks.1.ffn.down" in str(peqa.summary(model))


def test_lora_takes_quantized_layers_and_no_others_but_linear_ones():
    model = peqa.quantize_(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 2)), 4, skip=("2",))
    with pytest.raises(BadInput, match="layers="):
        lora_(copy.deepcopy(model), layers=["1"])
    lora_(model, rank=2, layers=["0"])
    assert [n for n, p in model.named_parameters() if p.requires_grad][:2] == ["0.lora_a", "0.lora_b"]
