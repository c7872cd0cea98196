"""UniPT on whole models: the backbone is neither kept nor changed, features may be cached, state travels."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from memspan import training
from memspan.base import BadInput
from memspan.base.files import load_state, save_state
from memspan.data.sets import content_sha256
from memspan.ledger import Ledger, memory_bytes, methods, plan, saved_bytes, training_step
from memspan.ledger.planner import job
from memspan.nn import FeatureTap
from memspan.recipes.ledger.models import BERT, GPT, UNet, classify
from memspan.training import unipt
from training.test_unipt_parts import drawn

TOKENS = (torch.arange(4 * 16) * 7 % 50).view(4, 16)
LABELS = torch.tensor([0, 1, 2, 3])
WIDE = (torch.arange(8 * 64) * 7 % 50).view(8, 64)


class Encoder(nn.Module):
    """Tokens to hidden states; blocks give a tuple where ``tuples`` says so; a prompt may stand in front."""

    class Block(nn.Module):
        def __init__(self, h: int, ffn: int, tuples: bool) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(h, h) for _ in range(4))
            self.up, self.down, self.tuples = nn.Linear(h, ffn), nn.Linear(ffn, h), tuples
            self.norm1, self.norm2, self.drop = nn.LayerNorm(h), nn.LayerNorm(h), nn.Dropout(0.2)

        def forward(self, x):
            scores = (self.q(x) @ self.k(x).mT / x.shape[-1] ** 0.5).softmax(-1)
            x = self.norm1(x + self.drop(self.o(scores @ self.v(x))))
            x = self.norm2(x + self.down(nn.functional.gelu(self.up(x))))
            return (x, scores) if self.tuples else x

    def __init__(self, h: int = 16, layers: int = 3, ffn: int = 0, tuples: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, h)
        self.layer = nn.ModuleList(self.Block(h, ffn or 4 * h, tuples) for _ in range(layers))

    def forward(self, tokens, prompt=None):
        x = self.embed(tokens)
        x = x if prompt is None else x + prompt
        for block in self.layer:
            x = block(x)
            x = x[0] if isinstance(x, tuple) else x
        return x


TAPS = ["embed", "layer.*"]


def side(kind: str = "unipt", **options):
    torch.manual_seed(0)
    backbone = drawn(Encoder(**options)).eval()
    if kind == "unipt":
        return unipt.UniPT(backbone, TAPS, out_dim=12)
    return unipt.LadderSideNetwork(backbone, TAPS, reduction=4)


class Pooled(nn.Module):
    def __init__(self, body, width):
        super().__init__()
        self.body, self.top = body, nn.Linear(width, 4)

    def forward(self, tokens):
        return self.top(self.body(tokens).mean(1))


@pytest.mark.parametrize("kind", ["unipt", "lst"])
def test_no_gradient_enters_the_backbone_and_it_keeps_nothing(kind):
    model = side(kind)
    backbone = model.backbone
    assert all(not h.requires_grad and h.grad_fn is None for h in model.hidden(TOKENS))
    out = model(TOKENS)
    hidden = FeatureTap(backbone, TAPS).run(TOKENS)
    assert saved_bytes(out) <= saved_bytes(model.head([h.clone() for h in hidden]))
    with Ledger(model) as led:
        training_step(model, None, TOKENS, lambda y, _: y.square().sum())
    kept = [
        b for b in led.peak.holdings if b.category == "saved_activations" and b.module.startswith("backbone")
    ]
    assert sum(b.bytes for b in kept) <= sum(h.nbytes for h in hidden)  # what the head reads, and no more
    assert all(p.grad is None for p in backbone.parameters())
    assert any(p.grad is not None for p in model.head.parameters())


def test_a_trainable_prompt_in_front_is_detached_with_a_warning_and_one_inside_is_refused():
    model, prompt = side(), torch.zeros(16, requires_grad=True)
    with pytest.warns(UserWarning, match="prompt"):
        out = model(TOKENS, prompt)
    out.sum().backward()
    assert prompt.grad is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(TOKENS, prompt)  # told once
    model.backbone.embed.weight.requires_grad_(True)
    with pytest.raises(BadInput, match=r"backbone\.embed\.weight"):
        model(TOKENS)


def test_the_backbone_stays_in_eval_mode_and_a_training_one_is_told():
    with pytest.warns(UserWarning, match="train mode"):
        model = unipt.UniPT(Encoder(), TAPS)
    model.train()
    assert model.head.training
    assert not any(part.training for part in model.backbone.modules())
    assert torch.equal(model(TOKENS), model(TOKENS))  # no dropout


def test_training_leaves_the_backbone_as_it_was_and_the_head_travels_alone(tmp_path):
    model = side()
    before = content_sha256({n: t.numpy() for n, t in model.backbone.state_dict().items()})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(3):
        training_step(model, optimizer, TOKENS, lambda y, _: y.square().mean())
    assert content_sha256({n: t.numpy() for n, t in model.backbone.state_dict().items()}) == before
    save_state(tmp_path / "head.safetensors", model.state_dict(only="head"))
    fresh = side()
    fresh.head.load_state_dict(load_state(tmp_path / "head.safetensors")[0])
    assert torch.equal(fresh(TOKENS), model(TOKENS))
    assert torch.equal(copy.deepcopy(model)(TOKENS), model(TOKENS))
    assert {id(p) for p in model.trainable_parameters()} == {id(p) for p in model.head.parameters()}
    assert sum(memory_bytes(model).values()) == sum(t.nbytes for t in model.state_dict().values())
    with pytest.raises(BadInput, match="only"):
        model.state_dict(only="tail")


def test_training_on_cached_features_is_bit_equal_to_the_live_backbone(tmp_path, monkeypatch):
    monkeypatch.setenv("MEMSPAN_CACHE", str(tmp_path))
    batches = [TOKENS, TOKENS.flip(0), TOKENS.flip(1)]
    live, cached = side(), side()
    cache = unipt.cache_hidden(cached, batches, {"data": "toy"}, dtype=None)
    for model in (live, cached):
        optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=0.01)
        for _ in range(2):
            for place, batch in enumerate(batches):
                hidden = cache[slice(4 * place, 4 * place + 4)] if model is cached else None
                out = model(batch) if hidden is None else model.head(hidden)
                optimizer.zero_grad()
                out.square().mean().backward()
                optimizer.step()
    for a, b in zip(live.head.parameters(), cached.head.parameters(), strict=True):
        assert torch.equal(a, b)
    again = unipt.cache_hidden(side(), batches, {"data": "toy"}, dtype=None)  # read from the file
    assert torch.equal(again.flat, cache.flat)
    assert len(cache) == 12
    for change in ("weights", "taps", "data"):  # the file of other features is not taken
        other = side()
        if change == "weights":
            other.backbone.layer[2].down.bias.data.add_(1)
        if change == "taps":
            other = unipt.UniPT(other.backbone, ["layer.*"], out_dim=12)
        told = {"data": "other"} if change == "data" else {"data": "toy"}
        flat = unipt.cache_hidden(other, [b.flip(1) for b in batches], told, dtype=None).flat
        assert not torch.equal(flat, cache.flat), change
    half = unipt.cache_hidden(side(), batches, {"data": "toy"})
    assert half.memory_bytes()["store.hidden_states"] * 2 == cache.memory_bytes()["store.hidden_states"]
    assert cached.head(half[torch.tensor([3, 1])]).dtype == torch.float32
    with pytest.raises(BadInput, match="pad to one length"):
        unipt.cache_hidden(side(), [TOKENS, TOKENS[:, :9]], {"data": "uneven"})
    with pytest.raises(BadInput, match="no batch"):
        unipt.cache_hidden(side(), [], {"data": "none"})


def peak(tokens: torch.Tensor, model: nn.Module) -> int:
    batch = (tokens, torch.zeros(len(tokens), dtype=torch.long))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    training_step(model.train(), optimizer, batch, classify)
    with Ledger(model, optimizer) as led:
        training_step(model, optimizer, batch, classify)
    return led.peak.total


def test_the_peak_does_not_feel_the_width_inside_the_backbones_blocks_but_for_weights_and_one_block():
    def model(ffn):
        return Pooled(side(h=32, layers=8, ffn=ffn), 12)

    narrow, wide = model(128), model(512)
    weights = sum(p.nbytes for p in wide.parameters()) - sum(p.nbytes for p in narrow.parameters())
    transient = 2 * WIDE.numel() * (512 - 128) * 4  # one block's hidden layer before and after its activation
    grown = peak(WIDE, wide) - peak(WIDE, narrow)
    assert weights <= grown <= weights + transient
    full = [Pooled(Encoder(h=32, layers=8, ffn=ffn), 32) for ffn in (128, 512)]
    # What training the backbone itself would add:
    assert peak(WIDE, full[1]) - peak(WIDE, full[0]) > weights + 3 * transient


def rivals(width, layers):
    """Makers of LoRA, UniPT, UniPT that recomputes, and the ladder, on one encoder."""

    def lora():
        model = Pooled(Encoder(h=width, layers=layers), width)
        names = [n for n, _ in model.named_modules() if n.endswith((".q", ".v"))]
        return training.lora_(model, rank=8, layers=names)

    def beside(kind, **options):
        return lambda: Pooled(kind(Encoder(h=width, layers=layers).eval(), TAPS, **options), width)

    return lora, beside(unipt.UniPT), beside(unipt.UniPT, save="recompute"), beside(unipt.LadderSideNetwork)


def test_peak_beside_low_rank_adapters_is_half_and_near_the_ladders():
    low_rank, ours, lean, ladder = (peak(WIDE.repeat(4, 1), make()) for make in rivals(128, 4))
    assert ours <= 0.5 * low_rank
    assert lean < ours
    assert lean <= 1.15 * ladder  # what UniPT itself keeps weighs more than its rival at this width


@pytest.mark.slow
def test_peak_at_the_published_comparisons_size_is_within_the_ladders_and_half_of_low_rank_adapters():
    batch = (torch.zeros(32, 64, dtype=torch.long), torch.zeros(32, dtype=torch.long))
    lora, ours, _, ladder = rivals(384, 6)  # MiniLM's shape, traced
    totals = [plan(make, batch, loss=classify, kernels=None).total for make in (lora, ours, ladder)]
    assert totals[1] <= 0.5 * totals[0]
    assert totals[1] <= 1.15 * totals[2]


def test_taps_that_match_nothing_offer_near_names_and_models_without_features_are_refused():
    backbone = Encoder().eval()
    with pytest.raises(BadInput, match="did you mean layer"):
        unipt.UniPT(backbone, "layers.*")
    for word in ("hidden_states", "forward_intermediates"):
        with pytest.raises(BadInput, match="name modules instead"):
            unipt.UniPT(backbone, word)
    with pytest.raises(BadInput, match="pick=0"):
        unipt.UniPT(Encoder(tuples=True).eval(), TAPS)(TOKENS)
    picked = unipt.UniPT(Encoder(tuples=True).eval(), "layer.*", pick=0)
    assert picked(TOKENS).shape == (4, 16, 16)
    with pytest.raises(BadInput, match="SpatialUniPT"):
        unipt.UniPT(backbone, TAPS, preset="map")
    with pytest.raises(BadInput, match="embedding"):
        unipt.UniPT(backbone, TAPS, preset="embedding")
    with pytest.raises(BadInput, match="give inputs for one pass"):
        unipt.UniPT(nn.Sequential(nn.ReLU(), nn.ReLU()).eval(), "*")


def test_a_module_that_runs_twice_or_is_changed_in_place_is_refused():
    shared = nn.Linear(4, 4)
    with pytest.raises(BadInput, match="run 2 times"):
        FeatureTap(nn.Sequential(shared, nn.Tanh(), shared), ["0"]).run(torch.ones(1, 4))
    with pytest.raises(BadInput, match="changed in place"):
        FeatureTap(nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)), ["0"]).run(torch.ones(1, 4))
    with pytest.raises(BadInput, match="run 0 times"):
        FeatureTap(_Skips(), ["unused"]).run(torch.ones(1, 4))


class _Skips(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unused, self.used = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.used(x)


def test_an_embedding_model_adds_to_its_own_embedding():
    backbone = Encoder().eval()
    model = unipt.UniPT(backbone, TAPS, 16, 1, "embedding", embedding=lambda out: out[:, 0])
    e = backbone(TOKENS)[:, 0].detach()
    with torch.no_grad():
        model.head.up[1].weight.zero_()
        model.head.up[1].bias.zero_()
    torch.testing.assert_close(model(TOKENS, position=torch.zeros(4, dtype=torch.long)), e)


def test_a_cnn_of_stages_is_read_at_its_last_size():
    stages = [nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b)) for a, b in ((3, 4), (4, 6), (6, 8))]
    cnn = drawn(nn.Sequential(*stages)).eval()
    model = unipt.SpatialUniPT(cnn, ["0", "1", "2"], out_dim=10)
    assert model.head.hidden_sizes == (4, 6, 8)
    assert unipt.SpatialUniPT(cnn, "*", out_dim=10, example=torch.zeros(1, 3, 16, 16)).head.hidden_sizes == (
        4,
        6,
        8,
    )
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.head.parameters() if p.requires_grad)
    with pytest.raises(BadInput, match="whole multiple"):
        model(torch.randn(2, 3, 20, 20))


def test_a_sliced_ladder_takes_every_nth_row_and_column():
    backbone = drawn(Encoder(h=16, layers=2)).eval()
    ladder = unipt.LadderSideNetwork(backbone, TAPS, reduction=4, init="sliced").head
    for rung, block in zip(ladder.rungs, backbone.layer, strict=True):
        assert torch.equal(rung.v.weight, block.v.weight[::4, ::4])
        assert torch.equal(rung.down.weight, block.down.weight[::4, ::4])
        assert torch.equal(rung.norm2.bias, block.norm2.bias[::4])
    with pytest.raises(BadInput, match="no plain encoder block"):
        unipt.LadderSideNetwork(Encoder(ffn=24).eval(), TAPS, reduction=4, init="sliced")
    with pytest.raises(BadInput, match="init"):
        unipt.LadderSideNetwork(backbone, TAPS, init="copied")


def test_the_head_trains_under_ddp_and_the_backbone_may_be_sharded(tmp_path):
    model = side()
    expected, tokens = model(TOKENS), TOKENS
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        head = model.head
        model.head = nn.parallel.DistributedDataParallel(head)
        for _ in range(2):  # the second pass tells whether every trained tensor was reduced
            model(tokens).square().mean().backward()
        assert all(p.grad is not None for p in head.parameters() if p.requires_grad)
        model.head, mesh = head, init_device_mesh("cpu", (1,))
        for block in (*model.backbone.layer, model.backbone):
            fully_shard(block, mesh=mesh)
        assert torch.equal(model(tokens), expected)
        model(tokens).square().mean().backward()
        assert all(p.grad is None for p in model.backbone.parameters())
    finally:
        dist.destroy_process_group()


def bert():
    torch.manual_seed(0)
    return BERT(vocabulary=50, h=32, depth=3, length=16, dropout=0.3)


def gpt():
    torch.manual_seed(0)
    return GPT(vocabulary=50, d=32, depth=3, heads=2)


@pytest.mark.parametrize("name", ["unipt", "lst", "adapter"])
@pytest.mark.parametrize(("build", "target"), [(bert, LABELS), (gpt, TOKENS)])
def test_registered_methods_start_at_the_model_learn_and_are_undone(name, build, target):
    model = build().eval()
    expected, state = model(TOKENS), copy.deepcopy(model.state_dict())
    chosen = methods()[name]
    assert chosen.convert_(model) is model
    assert torch.equal(model(TOKENS), expected)
    with pytest.raises(BadInput, match="already"):
        chosen.convert_(model)
    with pytest.raises(BadInput, match="froze"):
        training.bitfit_(model)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model.train()
    for _ in range(3):
        training_step(model, optimizer, (TOKENS, target), classify)
    without = [n for n, p in model.named_parameters() if p.requires_grad and not p.grad.abs().sum() > 0]
    assert [n for n in without if not n.endswith("k.bias")] == []
    assert all(torch.equal(dict(model.named_parameters())[n], p) for n, p in frozen.items())
    if name != "adapter":
        blocks = [p for n, p in model.named_modules() if n and not n.startswith(("side", "head"))]
        assert not any(part.training for part in blocks)
    undo = training.unadapter_ if name == "adapter" else training.unside_
    assert undo(model) is model
    assert model.state_dict().keys() == state.keys()
    assert all(p.requires_grad for p in model.parameters())
    model.load_state_dict(state)
    assert torch.equal(model.eval()(TOKENS), expected)
    with pytest.raises(BadInput):
        undo(model)


def test_a_trainable_input_of_a_side_tuned_model_gets_no_gradient():
    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2)))
    model = training.side_tune_(nn.Sequential(blocks, nn.Linear(4, 2)))
    drawn(model.side)
    prompt = torch.randn(3, 5, 4, requires_grad=True)
    model(prompt).square().sum().backward()
    assert prompt.grad is None
    assert model[1].weight.grad.abs().sum() > 0


def test_side_tuning_plans_exactly_and_below_the_adapters():
    totals = {}
    for name in ("unipt", "lst", "adapter", "lora"):
        one = job(bert, (TOKENS, LABELS), torch.optim.AdamW, name, classify)
        totals[name] = one.measure(4).total
    assert job(bert, (TOKENS, LABELS), torch.optim.AdamW, "unipt", classify).trace(4).total == totals["unipt"]
    assert max(totals["unipt"], totals["lst"]) < min(totals["adapter"], totals["lora"])


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: training.side_tune_(bert(), "ladder"), "side"),
        (lambda: training.side_tune_(UNet()), "blocks"),
        (lambda: training.side_tune_(bert(), blocks=["blocks.0"]), "two blocks"),
        (lambda: training.side_tune_(bert(), head="blocks.2.down"), "behind the blocks"),
        (lambda: training.side_tune_(bert(), "lst", save="half"), "save"),
        (lambda: training.side_tune_(bert(), reduction=5), "divisor"),
        (lambda: training.adapter_(UNet()), "blocks"),
        (lambda: training.adapter_(bert(), 0), "bottleneck"),
        (lambda: training.unside_(bert()), "was not applied"),
    ],
)
def test_bad_conversions_are_refused_and_change_nothing(call, told):
    with pytest.raises(BadInput, match=told):
        call()


def test_a_copy_of_a_side_tuned_model_stands_alone_and_a_mask_by_name_is_used():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = bert().eval()

        def forward(self, tokens, attention_mask=None):
            return self.net(tokens)

    model = training.side_tune_(Masked().eval(), head="net.head")
    drawn(model.side)
    twin = copy.deepcopy(model)
    mask = torch.ones(4, 16)
    mask[:, 8:] = 0
    assert not torch.equal(model(TOKENS, attention_mask=mask), model(TOKENS))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert twin(TOKENS).abs().sum() > 0
    assert twin.side is not model.side


@pytest.mark.peers
def test_transformers_and_timm_models_are_read_unchanged(transformers, timm):
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96
    )
    network = transformers.BertModel(config).eval()
    model = unipt.UniPT(network, "hidden_states", out_dim=12)
    mask = torch.ones(4, 16, dtype=torch.long)
    mask[1, 5:] = 0
    out = model(TOKENS, attention_mask=mask)
    assert out.shape == (4, 16, 12)
    by_name = unipt.UniPT(network, ["embeddings", "encoder.layer.*"], out_dim=12)
    by_name.head.load_state_dict(model.head.state_dict())
    torch.testing.assert_close(by_name(TOKENS, attention_mask=mask), out)
    ladder = unipt.LadderSideNetwork(network, "hidden_states", reduction=4, init="sliced")
    assert torch.equal(
        ladder.head.rungs[0].q.weight, network.encoder.layer[0].attention.self.query.weight[::4, ::4]
    )
    whole = transformers.BertForSequenceClassification(config).eval()
    before = whole(TOKENS, attention_mask=mask).logits
    training.side_tune_(whole)
    assert torch.equal(whole(TOKENS, attention_mask=mask).logits, before)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2).eval()
    spatial = unipt.SpatialUniPT(vit, "forward_intermediates", 16, example=torch.zeros(1, 3, 32, 32))
    assert spatial(torch.randn(2, 3, 32, 32)).shape == (2, 4, 16)
    net = timm.create_model("resnet18").eval()
    maps = unipt.SpatialUniPT(net, ["layer1", "layer2", "layer3", "layer4"], out_dim=16)
    assert maps.head.hidden_sizes == (64, 128, 256, 512)
    assert maps(torch.randn(2, 3, 64, 64)).shape == (2, 4, 16)


@pytest.mark.peers
def test_low_rank_adapters_hold_what_pefts_hold(transformers):
    peft = pytest.importorskip("peft")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96
    )
    torch.manual_seed(0)
    network = transformers.BertModel(config)
    theirs = peft.get_peft_model(
        copy.deepcopy(network), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"])
    )
    names = [n for n, _ in network.named_modules() if n.endswith(("query", "value"))]
    ours = training.lora_(network, 4, 8.0, names, head="")
    given = [p for p in theirs.parameters() if p.requires_grad]
    own = [p for p in ours.parameters() if p.requires_grad]
    assert sum(p.numel() for p in own) == sum(p.numel() for p in given)
    with torch.no_grad():
        for mine, other in zip(own, given, strict=True):
            mine.copy_(other.normal_(0, 0.1))
    mine, other = (m.eval()(TOKENS).last_hidden_state for m in (ours, theirs))
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["UniPT", "LadderSideNetwork", "SpatialUniPT"])
def test_a_wrapper_leaves_what_it_was_given_as_it_was(kind):
    if kind == "SpatialUniPT":
        backbone = nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 2, 2), nn.BatchNorm2d(3)) for _ in range(2)))
        more, x = {"out_dim": 4}, torch.randn(2, 3, 16, 16)
    else:
        backbone = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)) for _ in range(3)))
        more, x = {"out_dim": 4} if kind == "UniPT" else {"reduction": 2}, torch.randn(2, 5, 8)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    with pytest.warns(UserWarning, match="train mode"):
        model = getattr(unipt, kind)(backbone, "?", **more)
    model.train()
    model(x).sum().backward()
    assert all(part.training for part in backbone.modules())
    assert all(parameter.requires_grad for parameter in backbone.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())
    shared = zip(backbone.parameters(), model.backbone.parameters(), strict=True)
    assert all(one.data_ptr() == other.data_ptr() for one, other in shared)  # no byte is copied
    backbone(x).sum().backward()  # the caller's own trains on
    assert all(parameter.grad is not None for parameter in backbone.parameters())
