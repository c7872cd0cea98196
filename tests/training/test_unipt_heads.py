"""UniPT's heads: counts, invariances, identities, and the ways to keep fewer bytes."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

from memspan.base import BadInput
from memspan.ledger import saved_bytes
from memspan.training import unipt
from training.test_unipt_parts import drawn, states


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_presets_have_the_official_numbers_of_parameters():
    assert count(unipt.UniPTHead([768] * 13, 1024, 2)) == 5_921_281
    assert count(unipt.UniPTHead([768] * 13, 512, 1, "embedding")) == 5_644_289
    assert count(unipt.UniPTHead([512] * 13, 512, 1, "embedding")) == 3_940_353


def naive(head: unipt.UniPTHead, hidden, mask):
    """The formulas of preset token, one layer, one sample, one query at a time."""
    out = []
    for b in range(len(hidden[0])):
        keep = mask[b].double()
        f = [down(h[b]) for down, h in zip(head.down, hidden, strict=True)]
        anchor, layers = f[-1], f[:-1]
        mean = [(one * keep[:, None]).sum(0) / max(keep.sum().item(), 1) for one in f]
        alpha = torch.stack([head.aggregate.gate(mean[-1] * m) for m in mean[:-1]]).softmax(0)
        merged = torch.zeros_like(anchor)
        for a, layer in zip(alpha, layers, strict=True):
            for q in range(len(anchor)):
                scores = (layer @ anchor[q] * keep).clamp_min(0)
                merged[q] += a.item() * (scores / max(scores.sum().item(), 1e-6) @ layer + layer[q])
        out.append(head.up(anchor + head.project(merged)))
    return torch.stack(out)


MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 0, 1, 1, 0, 1]])


@pytest.mark.parametrize("preset", ["token", "joint"])
def test_a_head_equals_its_formulas_computed_one_query_at_a_time(preset):
    head, hidden = drawn(unipt.UniPTHead([12] * 4, 8, 2, preset).double()), [h.double() for h in states()]
    with torch.no_grad():
        torch.testing.assert_close(head(hidden, MASK), naive(head, hidden, MASK), rtol=1e-6, atol=1e-8)


def test_an_embeddings_head_asks_with_the_embedding_and_adds_the_chosen_place():
    head, hidden = (
        drawn(unipt.UniPTHead([12] * 4, 8, 1, "embedding").double()),
        [h.double() for h in states()],
    )
    e, position = torch.randn(3, 8, dtype=torch.float64), torch.tensor([0, 2, 5])
    out = []
    for b in range(3):
        keep, query = MASK[b].double(), head.query(e[b])
        layers = [down(h[b]) for down, h in zip(head.down, hidden, strict=True)]  # no anchor among them
        means = [(f * keep[:, None]).sum(0) / keep.sum() for f in layers]
        alpha = torch.stack([head.aggregate.gate(query * mean) for mean in means]).softmax(0)
        merged = 0.0
        for a, f in zip(alpha, layers, strict=True):
            scores = (f @ query * keep).clamp_min(0)
            merged = merged + a * (scores / scores.sum().clamp_min(1e-6) @ f + f[position[b]])
        out.append(e[b] + head.up(merged))
    found = head(hidden, MASK, embedding=e, position=position)
    torch.testing.assert_close(found, torch.stack(out), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("preset", ["token", "joint", "embedding"])
def test_outputs_do_not_depend_on_batch_mates_or_on_padding(preset):
    head, hidden, more = drawn(unipt.UniPTHead([12] * 4, 8, 2, preset)), states(), {}
    if preset == "embedding":
        more = {"embedding": torch.randn(3, 8), "position": torch.tensor([0, 2, 5])}
    whole = head(hidden, MASK, **more)
    alone = []
    for i in range(3):
        own = {name: value[i : i + 1] for name, value in more.items()}
        alone.append(head([h[i : i + 1] for h in hidden], MASK[i : i + 1], **own))
    torch.testing.assert_close(torch.cat(alone), whole, rtol=1e-5, atol=1e-6)
    longer = [torch.cat([h, 100 * torch.randn(3, 7, 12)], dim=1) for h in hidden]
    padded = head(longer, torch.cat([MASK, torch.zeros(3, 7, dtype=torch.long)], dim=1), **more)
    if preset != "embedding":
        padded, whole = padded[:, :6][MASK.bool()], whole[MASK.bool()]
    torch.testing.assert_close(padded, whole, rtol=1e-5, atol=1e-6)


def test_one_position_and_rows_without_any_are_finite():
    head = drawn(unipt.UniPTHead([12] * 3, 8))
    assert head(states(3, places=1)).isfinite().all()
    hidden = states(3)
    out = head(hidden, torch.zeros(3, 6))
    out.sum().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in head.parameters() if p.requires_grad)


def test_equal_layers_are_trusted_alike_and_one_layer_alone_trains_no_gate():
    head = drawn(unipt.UniPTHead([12] * 4, 8))
    for down in head.down[1:]:
        down.load_state_dict(head.down[0].state_dict())
    one = torch.randn(3, 6, 12)
    torch.testing.assert_close(head.confidence([one] * 4, MASK), torch.full((3, 3), 1 / 3))
    torch.testing.assert_close(head.confidence(states(), MASK).sum(1), torch.ones(3), rtol=1e-6, atol=1e-6)
    pair = drawn(unipt.UniPTHead([12] * 2, 8))
    pair(states(2)).square().sum().backward()
    assert torch.equal(pair.confidence(states(2)), torch.ones(3, 1))
    assert pair.aggregate.gate.weight.grad.abs().max() == 0


def test_equal_layers_make_confidence_irrelevant_and_a_silent_projection_leaves_the_anchor():
    head, one = drawn(unipt.UniPTHead([12] * 4, 8)), torch.randn(3, 6, 12)
    for down in head.down[1:]:
        down.load_state_dict(head.down[0].state_dict())
    uniform = drawn(unipt.UniPTHead([12] * 4, 8, confidence=False))
    uniform.load_state_dict(head.state_dict(), strict=False)
    torch.testing.assert_close(uniform([one] * 4, MASK), head([one] * 4, MASK))
    hidden = states()
    with torch.no_grad():
        head.project[-1].weight.zero_()
        head.project[-1].bias.zero_()
    torch.testing.assert_close(head(hidden, MASK), head.up(head.down[-1](hidden[-1])))


def test_maps_of_one_size_are_the_token_variant_on_flattened_maps():
    maps = drawn(unipt.UniPTHead([4, 4, 4], 8, 2, "map")).eval()
    tokens = drawn(unipt.UniPTHead([4, 4, 4], 8, 2))

    class Folded(nn.Module):  # a 1 x 1 convolution and its norm's running statistics, as one affine map
        def __init__(self, conv, norm):
            super().__init__()
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            self.register_buffer("w", conv.weight[:, :, 0, 0] * scale[:, None])
            self.register_buffer("b", (conv.bias - norm.running_mean) * scale + norm.bias)

        def forward(self, x):
            return x @ self.w.T + self.b

    class Same(nn.Module):  # without alignment
        def forward(self, given):
            return given[:-1]

    with torch.no_grad():
        tokens.down = nn.ModuleList(Folded(*pair) for pair in maps.down)
        tokens.project = Folded(*maps.project)
        tokens.up[1].weight.copy_(maps.up[1].weight[:, :, 0, 0])
        tokens.up[1].bias.copy_(maps.up[1].bias)
        tokens.aggregate.load_state_dict(maps.aggregate.state_dict())
    maps.align = Same()
    given = [torch.randn(2, 4, 3, 5) for _ in range(3)]
    type(tokens)._dtype = property(lambda self: next(self.up.parameters()).dtype)
    try:
        expected = tokens([one.flatten(2).mT for one in given])
    finally:
        type(tokens)._dtype = property(lambda self: next(self.down.parameters()).dtype)
    torch.testing.assert_close(maps(given), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("preset", ["token", "joint", "embedding"])
def test_recomputing_gives_the_same_outputs_and_gradients_from_fewer_bytes(preset):
    hidden = states(places=32, width=64)
    more = {"embedding": torch.randn(3, 64)} if preset == "embedding" else {}
    plain = drawn(unipt.UniPTHead([64] * 4, 64, 2, preset))
    held, found = [], []
    for save in ("all", "recompute", "half"):
        head = unipt.UniPTHead([64] * 4, 64, 2, preset, save=save)
        head.load_state_dict(plain.state_dict())
        out = head(hidden, **more)
        held.append(saved_bytes(out))
        out.square().sum().backward()
        found.append([out.detach(), *(p.grad for p in head.parameters() if p.requires_grad)])
    assert held[2] < held[1] < held[0]
    for a, b in zip(found[0], found[1], strict=True):
        assert (a - b).abs().max() <= 1e-4 * a.abs().max() + 1e-4 * found[0][0].abs().max()
    assert (found[2][0] - found[0][0]).abs().max() < 0.1 * found[0][0].abs().max()  # 8 bits of mantissa


def test_long_sequences_are_read_layer_by_layer_with_the_same_result(monkeypatch):
    from memspan.training.unipt import head as module

    for head, hidden in (
        (drawn(unipt.UniPTHead([12] * 4, 8)), states()),
        (drawn(unipt.UniPTHead([4, 5, 6], 8, 2, "map")),
         [torch.randn(2, 4, 8, 8), torch.randn(2, 5, 4, 4), torch.randn(2, 6, 2, 2)]),
    ):  # fmt: skip
        expected = head(hidden)
        monkeypatch.setattr(module, "_LONG", 3)
        again = head(hidden)
        monkeypatch.undo()
        torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-5)
        assert saved_bytes(again) < saved_bytes(expected)


def test_predicted_bytes_are_those_the_graph_keeps():
    hidden = [torch.randn(4, 48, 96) for _ in range(5)]
    for save in ("all", "recompute", "half"):
        head = unipt.UniPTHead([96] * 5, 64, 2, save=save)
        told = unipt.predict_bytes(4, 48, [96] * 5, 64, 2, save)
        kept = saved_bytes(head([h.to(torch.bfloat16) for h in hidden] if save == "half" else hidden))
        assert told["saved_activations"] == pytest.approx(kept, rel=0.02), save
        assert told["parameters.trained"] == 4 * count(head) == told["optimizer_state"] // 2


def test_kept_bytes_grow_with_layers_and_width_by_the_hidden_states():
    def kept(layers: int, width: int) -> int:
        hidden = [torch.randn(2, 16, width) for _ in range(layers)]
        return saved_bytes(unipt.UniPTHead([width] * layers, 16, 2, save="recompute")(hidden))

    assert kept(6, 256) - kept(6, 128) == 6 * 2 * 16 * 128 * 4
    assert kept(12, 256) - kept(6, 256) == pytest.approx(6 * 2 * 16 * (256 + 8) * 4, rel=0.02)


def test_the_decoder_head_asks_the_memory_and_gives_every_layer():
    encoder = drawn(unipt.UniPTHead([12] * 4, 8, preset="joint", up=False))
    decoder = drawn(unipt.UniPTDecoderHead([12] * 4, 8))
    memory = encoder(states(), MASK)
    assert memory.shape == (3, 6, 4)
    hidden = states(places=5)
    out = decoder(hidden, memory, MASK)
    assert out.shape == (4, 3, 5, 8)
    side, ask = decoder.side, unipt.ParallelInteraction(None)
    anchor, layers = side.down[-1](hidden[-1]), []
    for down, cross, given in zip(side.down, decoder.cross, hidden[:-1], strict=False):
        target = down(given)
        layers.append(target + cross(ask(target, memory, MASK)[0]))
    parts = torch.stack([unipt.ParallelInteraction()(anchor, layer)[0] for layer in layers], dim=1)
    pooled = torch.stack([layer.mean(1) for layer in layers], dim=1)
    whole = anchor + side.project(side.aggregate(anchor.mean(1), pooled, parts)[0])
    torch.testing.assert_close(out, decoder.up(torch.stack([*layers, whole])), rtol=1e-5, atol=1e-5)
    other = torch.where(MASK[..., None] == 0, torch.randn_like(memory), memory)
    torch.testing.assert_close(decoder(hidden, other, MASK), out)
    out.square().sum().backward()
    trained = [p for part in (encoder, decoder) for p in part.parameters() if p.requires_grad]
    assert all(p.grad.abs().sum() > 0 for p in trained)
    with pytest.raises(BadInput, match="memory"):
        decoder(hidden, memory[..., :2])


@pytest.mark.parametrize("preset", ["token", "map", "embedding", "joint"])
def test_every_parameter_gets_a_gradient_and_copies_stand_alone(preset):
    head, more = drawn(unipt.UniPTHead([4, 4, 4], 8, 2, preset)), {}
    hidden = states(3, width=4)
    if preset == "map":
        hidden = [torch.randn(2, 4, s, s) for s in (8, 4, 2)]
    if preset == "embedding":
        more = {"embedding": torch.randn(3, 8)}
    twin = copy.deepcopy(head)
    before = twin(hidden, **more).detach()
    head(hidden, **more).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in head.parameters() if p.requires_grad)
    torch.optim.SGD(head.parameters(), lr=0.1).step()
    if preset != "map":  # norms with running statistics move in train mode
        assert torch.equal(twin(hidden, **more), before)
    assert not torch.equal(head(hidden, **more), before)


def test_sixteen_bits_and_compilation():
    head, hidden = drawn(unipt.UniPTHead([12] * 4, 8)), states()
    expected = head(hidden, MASK.bool())
    half = copy.deepcopy(head).to(torch.bfloat16)(hidden, MASK.bool())
    assert half.dtype == torch.bfloat16
    assert (half - expected).abs().max() < 0.1 * expected.abs().max()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (head(hidden, MASK.bool()).float() - expected).abs().max() < 0.1 * expected.abs().max()
    compiled = torch.compile(head, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(hidden, MASK.bool()), expected, rtol=1e-4, atol=1e-5)


def test_official_names_map_onto_a_head_of_the_same_sizes():
    head = unipt.UniPTHead([12] * 3, 8)
    back = {"down": "downsample_layers", "project": "projection_layer", "up": "upsample_layer"}
    official = {}
    for name, tensor in head.state_dict().items():
        first, _, rest = name.partition(".")
        official["enc." + (f"gate_layer.{rest[5:]}" if first == "aggregate" else f"{back[first]}.{rest}")] = (
            tensor
        )
    fresh = unipt.UniPTHead([12] * 3, 8)
    fresh.load_state_dict(unipt.from_official({**official, "other": torch.ones(1)}, "enc."))
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), head.parameters(), strict=True))
    apart = {f"side_downsamples_l.{i}.0.weight": torch.full((1,), 2.0 + i) for i in range(2)}
    joint = unipt.from_official({"side_first_downsample_l.0.weight": torch.ones(1), **apart})
    assert {name: int(tensor) for name, tensor in joint.items()} == {
        f"down.{i}.0.weight": i + 1 for i in range(3)
    }
    with pytest.raises(BadInput, match="not a name"):
        unipt.from_official({"enc.lstm.weight": torch.ones(1)}, "enc.")
    with pytest.raises(BadInput, match="prefix"):
        unipt.from_official(official, "dec.")


E = torch.ones(3, 8)
HEAD = partial(unipt.UniPTHead, [12] * 3, 8)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: unipt.UniPTHead([12] * 3, 9, 2), "reduction=2: choose a divisor of out_dim=9"),
        (lambda: HEAD(preset="tokens"), "did you mean token"),
        (lambda: HEAD(save="some"), "save"),
        (lambda: HEAD(preset="map", save="half"), "must not see a batch twice"),
        (lambda: unipt.UniPTHead([12], 8), "two layers or more"),
        (lambda: HEAD()(states(2)), "reads 3 layers"),
        (lambda: HEAD()(states(3, width=11)), "D = 12"),
        (lambda: HEAD()([*states(2), torch.randn(2, 6, 12)]), "one batch size"),
        (lambda: HEAD()([*states(2), torch.randn(3, 5, 12)]), "use SpatialUniPT"),
        (lambda: HEAD()([torch.randn(3, 12, 2, 2)] * 3), "SpatialUniPT"),
        (lambda: HEAD()(states(3), torch.ones(3, 5)), r"mask=\(3, 5\)"),
        (lambda: HEAD()(states(3), torch.full((3, 6), float("-inf"))), "additive"),
        (lambda: HEAD()(states(3), embedding=torch.ones(3, 8)), "embedding"),
        (lambda: HEAD(preset="embedding")(states(3)), "embedding"),
        (lambda: HEAD(preset="embedding")(states(3), embedding=torch.ones(3, 7)), "embedding"),
        (lambda: HEAD(preset="embedding")(states(3), embedding=E, position=torch.ones(3)), "position"),
        (lambda: HEAD(confidence=False).confidence(states(3)), "weighs all layers alike"),
        (lambda: unipt.LadderHead([12] * 3, 8, 5), "divisor"),
        (lambda: unipt.LadderHead([12] * 3, 8, 2, heads=4), "heads"),
        (lambda: unipt.LadderHead([12], 8), "two layers"),
        (lambda: unipt.LadderHead([12] * 2, 8, 2, 0.0), "gate_temperature"),
        (lambda: unipt.LadderHead([12] * 3, 8, 2)(states(2)), "reads 3 layers"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_with_its_remedy(call, told):
    with pytest.raises(BadInput, match=told):
        call()


def test_the_ladder_starts_half_and_half_and_ignores_padding():
    ladder, hidden = drawn(unipt.LadderHead([12] * 4, 8, 3)), states()
    out = ladder(hidden, MASK)
    longer = [torch.cat([h, torch.randn(3, 7, 12)], dim=1) for h in hidden]
    padded = ladder(longer, torch.cat([MASK, torch.zeros(3, 7)], dim=1))[:, :6]
    torch.testing.assert_close(padded[MASK.bool()], out[MASK.bool()], rtol=1e-5, atol=1e-6)
    assert ladder(hidden, torch.zeros(3, 6)).isfinite().all()
    out.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for n, p in ladder.named_parameters() if not n.endswith("k.bias"))
    assert torch.equal(unipt.LadderHead([12] * 4, 8, 3).gates, torch.zeros(3))


def test_a_rung_takes_the_share_of_its_gate_over_the_temperature_from_its_layer():
    ladder, hidden = drawn(unipt.LadderHead([12] * 3, 8, 3, gate_temperature=0.25)), states(3)
    h = ladder.down[0](hidden[0])
    for gate, down, rung, given in zip(ladder.gates, ladder.down[1:], ladder.rungs, hidden[1:], strict=True):
        share = 1 / (1 + torch.exp(-gate / 0.25))
        h = rung(share * down(given) + (1 - share) * h, None)
    torch.testing.assert_close(ladder(hidden), ladder.up(h), rtol=1e-5, atol=1e-5)
