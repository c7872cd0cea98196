"""A user's own transformer under SlimFit: same outputs and names, counted bytes, and everything undone."""

import copy
import warnings
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from memspan import training
from memspan.base import BadInput
from memspan.ledger import Ledger, fit, plan, saved_bytes, training_step, verify
from memspan.recipes._slimfit_tasks import VisionTransformer
from memspan.recipes.ledger.models import BERT, GPT
from memspan.training import slimfit

B, T, H, A = 4, 32, 64, 4
N, SCORES, ROWS = B * T * H, B * A * T * T, B * T
EXACT = slimfit.CompressionPolicy.none()


class Block(nn.Module):
    """A post-norm block of BERT's, with eager attention behind torch's own name for it."""

    def __init__(self, p=0.1):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(H, H) for _ in range(4))
        self.norm1, self.norm2 = nn.LayerNorm(H), nn.LayerNorm(H)
        self.up, self.act, self.down = nn.Linear(H, 4 * H), nn.GELU(), nn.Linear(4 * H, H)
        self.dropout1, self.dropout2, self.p, self.eager = nn.Dropout(p), nn.Dropout(p), p, False

    def forward(self, x):
        q, k, v = (
            part(x).view(*x.shape[:2], A, -1).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        if self.eager:
            scores = q @ k.transpose(-1, -2) / (H // A) ** 0.5
            y = F.dropout(scores.softmax(-1), self.p) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.p if self.training else 0.0)
        x = self.norm1(x + self.dropout1(self.out(y.transpose(1, 2).reshape(x.shape))))
        return self.norm2(x + self.dropout2(self.down(self.act(self.up(x)))))


def entry():
    return torch.randn(B, T, H, requires_grad=True)


def saved(block, x):
    return saved_bytes(block(x), exclude=[block, x])


def units(model):
    return [n for n, p in model.named_parameters() if p.dim() > 1 or ("norm" in n and n.endswith("weight"))]


# ---- bytes of one block ------------------------------------------------------------------------------------


def test_a_plain_block_keeps_what_the_closed_form_says_and_freezing_alone_buys_little():
    block, x = Block(), entry()
    block.eager = True
    inputs = torch.nn.functional.pad(x, (0, 0)) + 0.0  # counted as an activation, not as an input
    whole = saved_bytes(block(inputs), exclude=[block])
    assert whole == 72 * N + 12 * SCORES + 16 * ROWS == 788_480
    for name in units(block):
        block.get_parameter(name).requires_grad_(False)
    frozen = saved_bytes(block(x + 0.0), exclude=[block])
    assert frozen == 44 * N + 12 * SCORES + 16 * ROWS == 559_104


def all_frozen(block):
    for name in units(block):
        block.get_parameter(name).requires_grad_(False)
    return block


def test_a_compressed_frozen_block_keeps_the_closed_form_exactly():
    block = all_frozen(slimfit.compress_(Block()))
    found = saved_bytes(block(entry() + 0.0), exclude=[block])
    assert found == 96_048
    closed = slimfit.predict_bytes({"hidden_size": H, "num_hidden_layers": 1, "num_attention_heads": A}, B, T)
    assert found == closed["saved_activations.static"]


def test_whatever_units_are_active_a_block_stays_within_static_plus_4n_each():
    block = slimfit.compress_(Block())
    names, static = units(block), 96_048
    torch.manual_seed(5)
    seen = {}
    for _ in range(50):
        active = [names[i] for i in torch.randperm(len(names))[:2]]
        for name in names:
            block.get_parameter(name).requires_grad_(name in active)
        kept = saved_bytes(block(entry() + 0.0), exclude=[block])
        assert kept <= static + 4 * N * len(active)
        linear = [n for n in active if "norm" not in n]
        if len(linear) == 2:
            shared = len({"query.weight", "key.weight", "value.weight"} & set(linear)) == 2
            seen.setdefault(shared, set()).add(kept)
    assert seen[False] == {static + 8 * N}  # no spread at all
    assert seen[True] == {static + 4 * N}  # two of q, k, v share one input


def test_the_sdpa_kernel_keeps_no_square_of_the_length():
    eager = all_frozen(slimfit.compress_(Block()))
    fused = all_frozen(slimfit.compress_(Block(), slimfit.CompressionPolicy.paper(attention="sdpa")))
    x = entry() + 0.0
    assert saved_bytes(eager(x), exclude=[eager]) - saved_bytes(fused(x), exclude=[fused]) == SCORES


def test_bert_base_blocks_cost_what_the_paper_counts():
    bert = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
    found = slimfit.predict_bytes(bert, 32, 128, 0.9)
    assert found["saved_activations.static"] / 12 == pytest.approx(36.5e6, rel=2e-3)
    assert found["saved_activations.dynamic"] == 4 * 32 * 128 * 768 * 10
    for wrong in ({}, {"hidden_size": 0, "num_hidden_layers": 1, "num_attention_heads": 1}):
        with pytest.raises(BadInput):
            slimfit.predict_bytes(wrong, 2, 8)
    with pytest.raises(BadInput, match="freeze_rate"):
        slimfit.predict_bytes(bert, 2, 8, 1.0)


# ---- whole models ------------------------------------------------------------------------------------------


def vit():
    torch.manual_seed(0)
    return VisionTransformer(8, 1, 2, 32, 2)


def gpt():
    torch.manual_seed(0)
    return GPT(vocabulary=50, d=32, depth=2, heads=2)


def torchs():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 2, 128, activation="gelu", batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


TOKENS = (torch.arange(2 * 16) % 50).view(2, 16)
CASES = [
    (vit, torch.randn(3, 1, 8, 8)),
    (gpt, TOKENS),
    (Block, torch.randn(B, T, H)),
    (torchs, torch.randn(3, 6, 32)),
]


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize(("build", "x"), CASES)
def test_outputs_are_exact_gradients_near_and_undone_is_as_before(build, x, kernel):
    model = build().eval()
    kinds, names = [type(part) for part in model.modules()], list(model.state_dict())
    y = model(x)
    y.square().mean().backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    slimfit.compress_(model, slimfit.CompressionPolicy.paper(attention=kernel))
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)
    model(x).square().mean().backward()
    a = torch.cat([p.grad.flatten() for p in model.parameters()])
    b = torch.cat([g.flatten() for g in plain.values()])
    assert float(F.cosine_similarity(a, b, dim=0)) > 0.97
    with pytest.raises(BadInput, match="already"):
        slimfit.compress_(model)
    copied = copy.deepcopy(model)
    slimfit.decompress_(copied)
    assert [type(part) for part in copied.modules()] == kinds
    assert [type(part) for part in model.modules()] != kinds
    slimfit.decompress_(model)
    assert [type(part) for part in model.modules()] == kinds
    with pytest.raises(BadInput):
        slimfit.decompress_(model)


@pytest.mark.parametrize(("build", "x"), CASES)
def test_with_compression_none_gradients_are_the_plain_ones(build, x):
    model = build().eval()
    twin = slimfit.compress_(copy.deepcopy(model), EXACT)
    for one in (model, twin):
        one(x).square().mean().backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention_follows_torch_with_masks_and_other_keys(batch_first):
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(8, 2, batch_first=batch_first, kdim=6, vdim=5)
    own = nn.MultiheadAttention(8, 2, batch_first=batch_first)
    shape = (3, 4) if batch_first else (4, 3)
    q = torch.randn(*shape, 8)
    k, v = torch.randn(*shape, 6), torch.randn(*shape, 5)
    padding = torch.tensor([[False] * 4, [False, False, True, True], [False] * 3 + [True]])
    later = torch.ones(4, 4, dtype=torch.bool).triu(1)
    for layer, inputs in ((plain, (q, k, v)), (own, (q, q, q)), (own, (q, q + 1, q))):
        twin = slimfit.compress_(copy.deepcopy(layer))
        for masks in ({}, {"key_padding_mask": padding}, {"key_padding_mask": padding, "attn_mask": later}):
            expected = layer(*inputs, need_weights=False, **masks)[0]
            torch.testing.assert_close(twin(*inputs, need_weights=False, **masks)[0], expected)
        assert twin(*inputs)[1].shape == (3, 4, 4)  # weights asked for: torch's own way


def test_what_is_known_is_counted_and_what_is_not_is_named():
    with pytest.warns(UserWarning, match="keeps its scores: blocks.0"):
        model = slimfit.compress_(BERT(vocabulary=50, h=32))
    found = slimfit.summary(model)
    assert found["CompressedLayerNorm"] == 5
    assert found["CompressedLinear"] == 2
    with pytest.raises(BadInput, match="no GELU"):
        slimfit.compress_(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))


def test_the_first_batch_is_measured_and_outliers_propose_the_dynamic_scale():
    for factor, text in ((40.0, "use compress_"), (8.0, "are clipped")):
        block = slimfit.compress_(Block(p=0.0))
        with torch.no_grad():
            block.query.weight.mul_(factor)
        with pytest.warns(UserWarning, match=text):
            block(2 * entry())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            block(2 * entry())  # told once
    calm = slimfit.compress_(Block(p=0.0), slimfit.CompressionPolicy.paper(scale="dynamic"))
    with torch.no_grad():
        calm.query.weight.mul_(40.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calm(2 * entry()).sum().backward()


def test_in_place_modules_may_follow_and_precede_a_compressed_one():
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Linear(8, 8), nn.GELU(), nn.ReLU(inplace=True), nn.LayerNorm(8), nn.ReLU(inplace=True)
    )
    model = slimfit.compress_(
        copy.deepcopy(plain), slimfit.CompressionPolicy.paper(gelu=8, layernorm_keep=1.0)
    )
    for one in (plain, model):
        one[3].weight.requires_grad_(False)
    x = torch.randn(5, 8)
    grads = []
    for one in (plain, model):
        one(x).sum().backward()
        grads.append(one[0].weight.grad)
    assert float(F.cosine_similarity(grads[0].flatten(), grads[1].flatten(), dim=0)) > 0.999


def test_a_whole_training_saves_four_times_less_and_reaches_the_same_loss():
    def trained(compressed):
        torch.manual_seed(0)
        model = nn.Sequential(*(Block() for _ in range(2)), nn.Flatten(), nn.Linear(T * H, 3))
        opt = torch.optim.AdamW(model.parameters(), 1e-3)
        sched = None
        if compressed:
            slimfit.compress_(model)
            sched = slimfit.FreezingScheduler(model, 0.8, optimizer=opt)
        x, y = torch.randn(24, T, H, generator=torch.Generator().manual_seed(1)), torch.arange(24) % 3
        kept = []
        for _ in range(25):
            if sched:
                sched.before_forward()
            loss = F.cross_entropy(model(x), y)
            kept.append(saved_bytes(loss, exclude=[model, x]))
            loss.backward()
            opt.step()
            opt.zero_grad(set_to_none=True)
            if sched:
                sched.after_step()
        return sum(kept) / len(kept), float(loss.detach())

    plain, slim = trained(False), trained(True)
    assert plain[0] / slim[0] > 4
    assert slim[1] < 0.3


def test_the_planner_knows_slimfit_and_its_trace_is_the_step():
    x = torch.randn(4, 1, 8, 8)
    batch = (x, torch.tensor([0, 1, 2, 3]))
    planned = plan(vit, batch, loss=F.cross_entropy, method=["slimfit"])
    model = slimfit.convert_(vit())
    opt = slimfit.optimizer_for(model, torch.optim.AdamW)
    for _ in range(2):
        with Ledger(model, opt) as led:
            training_step(model, opt, batch, F.cross_entropy)
    assert planned.total == led.peak.total
    # Moments of all units are in the plan, not those of the present step alone.
    assert planned.by_category["optimizer_state"] == sum(8 * p.numel() + 4 for p in model.parameters())
    alone = plan(vit, batch, loss=F.cross_entropy, method=[("slimfit", {"optimizer_state": "drop"})])
    assert alone.by_category["optimizer_state"] < planned.by_category["optimizer_state"] / 3
    halved = plan(vit, batch, loss=F.cross_entropy, method="slimfit", world=2, kernels=None).by_category
    assert halved["optimizer_state"] < 0.6 * planned.by_category["optimizer_state"]
    with pytest.raises(BadInput, match="converted already"):
        slimfit.convert_(model)
    slimfit.unconvert_(model)
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(BadInput, match="not converted"):
        slimfit.unconvert_(model)


def test_any_training_loop_trains_the_whole_model_through_the_optimizer_that_convert_wants():
    torch.manual_seed(3)
    model = slimfit.convert_(vit(), 0.9)
    start = copy.deepcopy(model.state_dict())
    opt = slimfit.optimizer_for(model, lambda parameters: torch.optim.AdamW(parameters, 3e-3))
    assert all(torch.equal(value, start[name]) for name, value in model.state_dict().items())
    x, y = torch.randn(8, 1, 8, 8), torch.arange(8) % 4
    with torch.no_grad():
        first = float(F.cross_entropy(model.eval()(x), y))
    largest = max(slimfit.FreezingScheduler(vit(), 0.9).units, key=lambda n: model.get_parameter(n).numel())
    turns = Counter()
    for step in range(40):
        if step == 1:
            assert model.get_parameter(largest).requires_grad
        turns.update(n for n, p in model.named_parameters() if p.requires_grad)
        training_step(model.train(), opt, (x, y), F.cross_entropy)
        assert sum(p.requires_grad for p in model.parameters() if p.dim() > 1) < 0.3 * len(start)
    assert all(not torch.equal(value, start[name]) for name, value in model.state_dict().items())
    units = slimfit.FreezingScheduler(vit(), 0.9).units
    round_ = -(-len(units) // (len(units) - int(0.9 * len(units))))
    # Nobody waits for more than two rounds, at a rate that never falls.
    assert min(turns[unit] for unit in units) >= 40 // (2 * round_ + 2)
    with torch.no_grad():
        assert float(F.cross_entropy(model.eval()(x), y)) < 0.8 * first
    with pytest.raises(BadInput, match="not converted"):
        slimfit.optimizer_for(vit(), torch.optim.AdamW)
    with pytest.raises(BadInput, match="optimizer_state"):
        slimfit.convert_(vit(), optimizer_state="cpu")


def test_fit_offers_slimfit_and_a_real_step_holds_what_was_planned():
    batch = (torch.randn(4, 1, 8, 8), torch.arange(4))
    found = fit(vit, batch, "1GiB", methods=["slimfit"], loss=F.cross_entropy, largest=2)
    (mine,) = (one for one in found.candidates if one.methods == ("slimfit",))
    assert mine.batch == 2
    done = verify(mine)
    assert done.planned == done.measured
    assert (
        done.error > -0.01
    )  # its third step, by the allocator, trains smaller layers than the planned second


def test_filled_moments_take_the_first_step_that_an_empty_optimizer_takes():
    from memspan.training.slimfit.convert import _fill

    for make in (
        lambda ps: torch.optim.AdamW(ps, 1e-2),
        lambda ps: torch.optim.SGD(ps, 1e-2, 0.9, weight_decay=0.1),
    ):
        found = []
        for filled in (False, True):
            torch.manual_seed(4)
            model = nn.Linear(5, 3)
            opt = make(model.parameters())
            if filled:
                _fill(opt, list(model.parameters()))
            for step in range(3):
                training_step(model, opt, torch.full((2, 5), 1.0 + step), lambda y, _: y.square().mean())
            found.append(model.weight.detach().clone())
        torch.testing.assert_close(*found, rtol=1e-6, atol=1e-7)


def test_lisa_trains_few_blocks_others_every_interval_and_everything_else_always():
    model = gpt()
    chosen = [tuple(training.lisa_(model, step, layers=1, interval=2)) for step in range(40)]
    assert chosen[0::2] == chosen[1::2]
    assert set(chosen) == {("blocks.0",), ("blocks.1",)}
    assert model.embedding.weight.requires_grad
    assert sum(p.requires_grad for p in model.blocks[0].parameters()) in (0, 10)
    for wrong in ({"layers": 3}, {"layers": 0}, {"interval": 0}):
        with pytest.raises(BadInput):
            training.lisa_(model, 0, **wrong)


# ---- transformers and timm ---------------------------------------------------------------------------------


def _transformers(torchvision):
    return pytest.importorskip("transformers")


@pytest.mark.peers
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["Bert", "ViT", "Roberta"])
def test_transformers_own_models_are_compressed_without_surgery(torchvision, kind, implementation):
    transformers = _transformers(torchvision)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    extra = {"image_size": 16, "patch_size": 4} if kind == "ViT" else {"vocab_size": 50}
    config = getattr(transformers, f"{kind}Config")(**sizes, **extra, attn_implementation=implementation)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    if kind == "ViT":
        inputs = {"pixel_values": torch.randn(2, 3, 16, 16)}
    else:
        mask = torch.ones(2, 12, dtype=torch.long)
        mask[1, 7:] = 0
        inputs = {"input_ids": torch.arange(4, 28).view(2, 12), "attention_mask": mask}
    y = model(**inputs).last_hidden_state
    before = saved_bytes(y, exclude=[model])
    found = slimfit.summary(slimfit.compress_(model))
    assert sum(count for name, count in found.items() if "Attention" in name) == 2
    assert found["CompressedGELU"] == found["CompressedLinear"] == 2
    all_frozen(model)
    again = model(**inputs).last_hidden_state
    torch.testing.assert_close(again, y, rtol=1e-4, atol=1e-5)
    assert before / saved_bytes(again, exclude=[model]) > 3
    slimfit.decompress_(model)
    torch.testing.assert_close(model(**inputs).last_hidden_state, y)


SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 4, "head_dim": 8,
}  # fmt: skip
DECODERS = {  # and how many of their attentions are compressed
    "GPT2LMHeadModel": ({"vocab_size": 50, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4}, 2),
    "LlamaForCausalLM": ({**SIZES, "num_key_value_heads": 2}, 2),  # groups of queries share a key
    "Gemma2ForCausalLM": ({**SIZES, "num_key_value_heads": 4, "attn_logit_softcapping": 0.5}, 0),
    "T5ForConditionalGeneration": (
        {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 80, "num_layers": 1, "num_heads": 4}, 0
    ),
}  # fmt: skip


@pytest.mark.peers
@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("name", DECODERS)
def test_transformers_decoders_keep_their_outputs_whatever_their_attention_adds(torchvision, name, kernel):
    kind = getattr(_transformers(torchvision), name)
    sizes, compressed = DECODERS[name]
    torch.manual_seed(0)
    implementation = "eager" if compressed == 0 else "sdpa"
    model = kind(kind.config_class(**sizes, use_cache=False, attn_implementation=implementation)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so that a cap or a bias of scores shows
    ids, mask = torch.arange(24).view(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1, 9:] = 0
    inputs = [{"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}]
    if name.startswith("T5"):
        inputs = [one | {"decoder_input_ids": ids} for one in inputs]
    before = [model(**one).logits for one in inputs]
    policy = slimfit.CompressionPolicy.paper(attention=kernel, scale="dynamic")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = slimfit.summary(slimfit.compress_(model, policy))
    assert sum(count for part, count in found.items() if "Attention" in part) == compressed
    assert any("attention that is not known" in str(one.message) for one in told) == (compressed == 0)
    slimfit.decompress_(model)
    model.config._attn_implementation_internal = "flash_attention_2"  # its masks are not ours
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = slimfit.summary(slimfit.compress_(copy.deepcopy(model), policy))
        model.config._attn_implementation_internal = implementation
        slimfit.compress_(model, policy)
    assert not any("Attention" in part for part in other)
    for one, expected in zip(inputs, before, strict=True):
        seen = one.get("attention_mask", torch.ones_like(mask)).bool()
        torch.testing.assert_close(model(**one).logits[seen], expected[seen], rtol=1e-4, atol=1e-4)


@pytest.mark.peers
@pytest.mark.parametrize("fused", [True, False])
def test_timms_vit_is_compressed_without_surgery(timm, fused):
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=3
    ).eval()
    for block in model.blocks:
        block.attn.fused_attn = fused
    x = torch.randn(2, 3, 32, 32)
    y = model(x)
    before = saved_bytes(y, exclude=[model, x])
    found = slimfit.summary(slimfit.compress_(model))
    assert found["CompressedAttention"] == found["CompressedGELU"] == 2
    all_frozen(model)
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)
    assert before / saved_bytes(model(x), exclude=[model, x]) > 3
    slimfit.decompress_(model)
    assert model.blocks[0].attn.fused_attn == fused
