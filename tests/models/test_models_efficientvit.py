"""EfficientViT against references written out here, its published sizes, and the traps of published code."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from memspan import models
from memspan.base import BadInput
from memspan.models.efficientvit import (
    VARIANTS,
    BNLinear,
    CascadedGroupAttention,
    ConvBN,
    EfficientViT,
    MultiHeadAttention,
    Residual,
    SandwichBlock,
    WindowAttention,
    efficientvit_m0,
    features_only,
    fuse_,
    head_similarity,
    load_official_,
    load_timm_,
    memory_bound_share,
    network,
    optimizer_and_schedule,
    parameter_groups,
    resize_bias_table,
)

# Parameters, parameters after fusing, and multiply-adds at 224, counted on the published models.
PUBLISHED = {
    "m0": (2_349_436, 2_334_916, 79.19),
    "m1": (2_980_560, 2_964_256, 167.05),
    "m2": (4_187_554, 4_168_338, 201.04),
    "m3": (6_900_722, 6_875_890, 262.66),
    "m4": (8_804_228, 8_776_340, 299.31),
    "m5": (12_473_772, 12_436_260, 521.58),
}


def randomise(module: nn.Module, example: Tensor) -> Any:
    """Random norms and biases, then running statistics from one pass over ``example``; evaluation mode."""
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.weight.uniform_(0.75, 1.25)
            norm.bias.normal_(0, 0.05)
            norm.momentum = 1.0
        for name, parameter in module.named_parameters():
            if name.endswith("attention_biases"):
                parameter.normal_(0, 0.5)
        module.train()(example)
    for norm in norms:
        norm.momentum = 0.1
    return module.eval()


def build(name: str, **options: Any) -> EfficientViT:
    return getattr(models, f"efficientvit_{name}")(**options)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def m0() -> EfficientViT:
    torch.manual_seed(3)
    return randomise(efficientvit_m0(num_classes=5), torch.randn(8, 3, 224, 224))  # type: ignore[no-any-return]


def small(**options: Any) -> EfficientViT:
    options = {"img_size": 112, "num_classes": 4, "embed_dim": (16, 32, 48), "depth": (1, 1, 1)} | options
    return EfficientViT(num_heads=(2, 2, 2), **options)


def reference_attention(mixer: CascadedGroupAttention, x: Tensor) -> Tensor:
    """Cascaded group attention, head by head and pair by pair, from the definition alone."""
    rows, columns = mixer.resolution
    width, previous, outputs = mixer.dim // mixer.num_heads, None, []
    for j in range(mixer.num_heads):
        u = x[:, j * width : (j + 1) * width]
        if mixer.cascade and previous is not None:
            u = u + previous
        q, k, v = mixer.qkvs[j](u).split([mixer.key_dim, mixer.key_dim, width], dim=1)
        q = mixer.dws[j](q)
        bias = x.new_zeros(rows, columns, rows, columns)
        for r1, c1, r2, c2 in torch.cartesian_prod(*map(torch.arange, (rows, columns) * 2)).tolist():
            bias[r1, c1, r2, c2] = mixer.attention_biases[j, abs(r1 - r2) * columns + abs(c1 - c2)]
        logits = torch.einsum("bdhw,bdyx->bhwyx", q, k) / math.sqrt(mixer.key_dim) + bias
        weights = logits.flatten(3).softmax(-1).view_as(logits)
        previous = torch.einsum("bhwyx,bdyx->bdhw", weights, v)
        outputs.append(previous)
    return mixer.proj(torch.cat(outputs, 1).clone())  # type: ignore[no-any-return]


class TestPublishedSizes:
    @pytest.mark.parametrize("name", list(PUBLISHED))
    def test_parameters_fused_parameters_and_multiply_adds_are_the_published_ones(self, name: str) -> None:
        parameters, fused, megamacs = PUBLISHED[name]
        model = build(name).eval()
        assert sum(p.numel() for p in model.parameters()) == parameters
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 3, 224, 224))
        assert round(counter.get_total_flops() / 2e6, 2) == megamacs
        assert sum(p.numel() for p in fuse_(model).parameters()) == fused

    def test_importing_the_room_loads_no_network(self) -> None:
        assert set(models.__all__) <= set(dir(models))
        assert models.EfficientViT is EfficientViT
        with pytest.raises(AttributeError, match="no attribute 'efficientvit_m6'"):
            models.efficientvit_m6  # noqa: B018

    def test_variants_have_equal_widths_for_the_values_and_the_slices(self) -> None:
        for variant in VARIANTS.values():
            for width, heads in zip(variant.embed_dim, variant.num_heads, strict=True):
                assert width % heads == 0


class TestAttention:
    @pytest.mark.parametrize(("heads", "cascade"), [(1, True), (3, True), (3, False)])
    def test_equals_the_definition(self, heads: int, cascade: bool) -> None:
        mixer = CascadedGroupAttention(24, heads, 4, (3, 5), (5, 3, 3), cascade).double()
        x = torch.randn(2, 24, 3, 5, dtype=torch.float64)
        randomise(mixer, torch.randn(16, 24, 3, 5, dtype=torch.float64))
        torch.testing.assert_close(mixer(x), reference_attention(mixer, x), rtol=0, atol=1e-12)

    def test_without_cascade_equals_independent_heads(self) -> None:
        joint = CascadedGroupAttention(12, 3, 4, (4, 4), (3, 5, 7), cascade=False).double()
        randomise(joint, torch.randn(16, 12, 4, 4, dtype=torch.float64))
        x = torch.randn(2, 12, 4, 4, dtype=torch.float64)
        alone = []
        for j in range(3):
            head = CascadedGroupAttention(4, 1, 4, (4, 4), ((3, 5, 7)[j],)).double().eval()
            head.qkvs[0], head.dws[0] = joint.qkvs[j], joint.dws[j]
            head.attention_biases.data = joint.attention_biases[j : j + 1].detach()
            head.proj = nn.Identity()  # type: ignore[assignment]
            alone.append(head(x[:, 4 * j : 4 * j + 4]))
        torch.testing.assert_close(joint(x), joint.proj(torch.cat(alone, 1)), rtol=0, atol=1e-12)

    def test_the_cascade_carries_a_change_of_the_first_slice_to_every_head(self) -> None:
        x = torch.randn(1, 12, 4, 4)
        other = x.clone()
        other[:, :4] += 1
        for cascade in (True, False):
            mixer = CascadedGroupAttention(12, 3, 4, (4, 4), (3, 3, 3), cascade)
            randomise(mixer, torch.randn(16, 12, 4, 4))
            changed = [
                not torch.equal(a, b)
                for a, b in zip(mixer.attention_maps(x)[0], mixer.attention_maps(other)[0], strict=True)
            ]
            assert changed == ([True, True, True] if cascade else [True, False, False])

    def test_one_head_without_positions_commutes_with_a_permutation_of_the_tokens(self) -> None:
        mixer = randomise(CascadedGroupAttention(8, 1, 4, (7, 7), (1,)), torch.randn(8, 8, 7, 7)).double()
        nn.init.zeros_(mixer.attention_biases)
        x, order = torch.randn(2, 8, 49, dtype=torch.float64), torch.randperm(49)
        moved = mixer(x[:, :, order].view(2, 8, 7, 7)).flatten(2)
        torch.testing.assert_close(moved, mixer(x.view(2, 8, 7, 7)).flatten(2)[:, :, order])

    def test_gradients_agree_with_finite_differences(self) -> None:
        """One image, planes contiguous, norms frozen: where torch's own gradient of a norm can go wrong."""
        mixer = CascadedGroupAttention(8, 2, 2, (3, 3), (3, 3)).double()
        randomise(mixer, torch.randn(16, 8, 3, 3, dtype=torch.float64))
        names = [name for name, _ in mixer.named_parameters()]
        values = [p.detach().clone().requires_grad_() for p in mixer.parameters()]
        x = torch.randn(1, 8, 3, 3, dtype=torch.float64, requires_grad=True)

        def run(x: Tensor, *values: Tensor) -> Tensor:
            state = dict(zip(names, values, strict=True))
            return torch.func.functional_call(mixer, state, (x,))

        assert torch.autograd.gradcheck(run, (x, *values))
        plain = randomise(MultiHeadAttention(8, 2, 2, (3, 3)).double(), torch.randn(16, 8, 3, 3).double())
        assert torch.autograd.gradcheck(plain, (x,))

    def test_plain_attention_equals_scaled_dot_product_attention(self) -> None:
        mixer = MultiHeadAttention(12, 3, 4, (3, 5)).double()
        randomise(mixer, torch.randn(16, 12, 3, 5, dtype=torch.float64))
        x = torch.randn(2, 12, 3, 5, dtype=torch.float64)
        q, k, v = (t.unflatten(1, (3, 4)).flatten(3).transpose(2, 3) for t in mixer.qkv(x).chunk(3, 1))
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mixer.bias())
        joined = heads.transpose(2, 3).reshape(2, 12, 3, 5)
        torch.testing.assert_close(mixer(x), mixer.proj(joined))
        weights = mixer.attention_maps(x)
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))

    def test_logits_stay_float32_under_autocast(self) -> None:
        """A bias of 300 beside 301 is one value in bfloat16; the softmax must still tell them apart."""
        mixer = CascadedGroupAttention(8, 2, 4, (2, 2), (3, 3)).eval()
        with torch.no_grad():
            mixer.attention_biases.copy_(torch.tensor([[300.0, 301.0, 299.0, 300.0]] * 2))
        x = torch.randn(1, 8, 2, 2) * 0.01
        with torch.autocast("cpu", torch.bfloat16):
            weights = mixer.attention_maps(x).float()
        torch.testing.assert_close(weights, mixer.attention_maps(x), rtol=0, atol=5e-3)


class TestBiasTable:
    @pytest.mark.parametrize(("side", "entries"), [(7, 49), (4, 16)])
    def test_is_indexed_by_absolute_offsets(self, side: int, entries: int) -> None:
        mixer = CascadedGroupAttention(8, 2, 4, (side, side), (3, 3))
        assert mixer.attention_biases.shape == (2, entries)
        assert mixer.bias_index[0].tolist() == list(range(entries))
        assert torch.equal(mixer.bias_index, mixer.bias_index.T)
        flipped = torch.arange(entries).view(side, side).flip(0).flatten()  # rows upside down: same offsets
        assert torch.equal(mixer.bias_index[flipped][:, flipped], mixer.bias_index)

    def test_resized_to_its_own_size_is_the_identity(self) -> None:
        table = torch.randn(3, 49)
        assert torch.equal(resize_bias_table(table, (7, 7), (7, 7)), table)
        through = F.interpolate(table.view(1, 3, 7, 7), size=(7, 7), mode="bicubic", antialias=True)
        torch.testing.assert_close(through.view(3, 49), table)

    def test_a_constant_table_stays_constant_at_any_size(self) -> None:
        resized = resize_bias_table(torch.full((2, 49), 1.5), (7, 7), (5, 4))
        torch.testing.assert_close(resized, torch.full((2, 20), 1.5))


class TestWindows:
    @pytest.fixture
    def window(self) -> WindowAttention:
        mixer = CascadedGroupAttention(8, 2, 4, (7, 7), (5, 3))
        randomise(mixer, torch.randn(16, 8, 7, 7))
        return WindowAttention(mixer).eval()

    def test_a_change_in_one_window_leaves_the_others_bit_identical(self, window: WindowAttention) -> None:
        x = torch.randn(2, 8, 14, 14)
        other = x.clone()
        other[:, :, 3, 9] += 1
        before, after = window(x), window(other)
        changed = (before != after).any(1).any(0)
        assert changed[:7, 7:].any()
        changed[:7, 7:] = False
        assert not changed.any()

    def test_each_window_equals_attention_on_that_window_alone(self, window: WindowAttention) -> None:
        x = torch.randn(2, 8, 14, 21)
        out = window(x)
        for row in (0, 7):
            for column in (0, 7, 14):
                here = (..., slice(row, row + 7), slice(column, column + 7))
                torch.testing.assert_close(out[here], window.attn(x[here].contiguous()))

    def test_padding_equals_zeros_put_below_and_right_by_hand(self, window: WindowAttention) -> None:
        x = torch.randn(1, 8, 10, 10)
        by_hand = torch.zeros(1, 8, 14, 14)
        by_hand[..., :10, :10] = x
        torch.testing.assert_close(window(x), window(by_hand)[..., :10, :10])

    def test_a_map_of_the_windows_size_is_attended_to_as_a_whole(self, window: WindowAttention) -> None:
        x = torch.randn(2, 8, 7, 7)
        assert torch.equal(window(x), window.attn(x))


class TestFusing:
    def test_keeps_the_outputs_and_leaves_no_norm(self, m0: EfficientViT) -> None:
        x = torch.randn(2, 3, 224, 224)
        with torch.no_grad():
            before = m0(x)
            fused = fuse_(copy.deepcopy(m0))
            assert (fused(x) - before).abs().max() <= 5e-5 * before.abs().max()
        assert not any(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in fused.modules())

    def test_is_exact_to_rounding_in_float64(self) -> None:
        model = randomise(small(), torch.randn(8, 3, 112, 112)).double()
        x = torch.randn(2, 3, 112, 112, dtype=torch.float64)
        before = model(x)
        assert (fuse_(model)(x) - before).abs().max() < 1e-10

    def test_the_fused_state_dict_round_trips(self, tmp_path: Path) -> None:
        first = fuse_(randomise(small(), torch.randn(8, 3, 112, 112)))
        second = fuse_(small().eval())
        x = torch.randn(2, 3, 112, 112)
        second(x)  # fills whatever might be kept too long
        save_file({k: v.contiguous() for k, v in first.state_dict().items()}, tmp_path / "w.safetensors")
        from safetensors.torch import load_file

        second.load_state_dict(load_file(tmp_path / "w.safetensors"))
        assert torch.equal(first(x), second(x))

    def test_a_single_layer_fuses_to_a_plain_torch_layer(self) -> None:
        layer = randomise(ConvBN(4, 6, 3, 2, 1, groups=2), torch.randn(16, 4, 9, 9))
        x = torch.randn(2, 4, 9, 9)
        fused = fuse_(layer)
        assert type(fused) is nn.Conv2d
        torch.testing.assert_close(fused(x), layer(x), rtol=1e-5, atol=1e-5)
        head = randomise(BNLinear(4, 3), torch.randn(16, 4))
        assert type(head.fuse()) is nn.Linear

    def test_a_depthwise_residual_becomes_one_convolution(self) -> None:
        model = nn.Sequential(Residual(ConvBN(4, 4, 3, 1, 1, groups=4)), nn.ReLU())
        x = torch.randn(2, 4, 5, 5)
        before = randomise(model, torch.randn(16, 4, 5, 5))(x)
        assert type(fuse_(model)[0]) is nn.Conv2d  # type: ignore[index]
        torch.testing.assert_close(model(x), before)

    def test_nothing_is_gathered_in_a_call_of_the_fused_form(self, m0: EfficientViT) -> None:
        fused = fuse_(copy.deepcopy(m0))
        x = torch.randn(1, 3, 224, 224)
        with torch.no_grad(), torch.profiler.profile() as profile:
            fused(x)
        names = {event.key for event in profile.key_averages()}
        assert "aten::bmm" in names
        assert not names & {"aten::index_select", "aten::index", "aten::gather", "aten::batch_norm"}

    def test_is_refused_in_training_mode_and_twice(self) -> None:
        model = small()
        with pytest.raises(BadInput, match=r"training mode.*model\.eval\(\)"):
            fuse_(model)
        fuse_(model.eval())
        with pytest.raises(BadInput, match="fused already"):
            fuse_(model)

    def test_a_refused_fusing_changes_nothing(self) -> None:
        model = small().eval()
        model.head.train()
        before = list(model.state_dict())
        with pytest.raises(BadInput):
            fuse_(model)
        assert list(model.state_dict()) == before


class TestNothingStale:
    """Published code caches the gathered bias: loading, moving or training a model then uses an old one."""

    @pytest.mark.parametrize("fused", [False, True])
    def test_loading_after_a_forward_equals_loading_into_a_fresh_model(self, fused: bool) -> None:
        prepare: Callable[[nn.Module], Any] = fuse_ if fused else nn.Module.eval
        source = prepare(randomise(small(), torch.randn(8, 3, 112, 112)))
        x = torch.randn(2, 3, 112, 112)
        used = prepare(small().eval())
        used(x)
        used.load_state_dict(source.state_dict())
        assert torch.equal(used(x), source(x))

    def test_a_biased_optimizer_step_shows_in_evaluation_mode(self) -> None:
        model = randomise(small(), torch.randn(8, 3, 112, 112))
        x = torch.randn(2, 3, 112, 112)
        before = model(x)
        biases = [p for n, p in model.named_parameters() if n.endswith("attention_biases")]
        before.sum().backward()
        torch.optim.SGD(biases, lr=1e4).step()
        assert not torch.equal(model(x), before)
        twin = small().eval()
        twin.load_state_dict(model.state_dict())
        assert torch.equal(twin(x), model(x))

    def test_writing_through_data_shows_too(self) -> None:
        model = randomise(small(), torch.randn(8, 3, 112, 112))
        x = torch.randn(1, 3, 112, 112)
        before = model(x)
        model.stages[0].blocks[0].mixer.m.attn.attention_biases.data.normal_()  # type: ignore[union-attr]
        assert not torch.equal(model(x), before)

    @pytest.mark.parametrize("fused", [False, True])
    def test_copies_and_casts_compute_the_same(self, fused: bool) -> None:
        model = randomise(small(), torch.randn(8, 3, 112, 112))
        x = torch.randn(2, 3, 112, 112)
        model(x)
        if fused:
            fuse_(model)
        assert torch.equal(copy.deepcopy(model)(x), model(x))
        wide = copy.deepcopy(model).to(torch.float64)
        assert wide(x.double()).dtype == torch.float64
        torch.testing.assert_close(wide(x.double()).float(), model(x), rtol=1e-4, atol=1e-5)

    def test_training_mode_chains(self) -> None:
        mixer = CascadedGroupAttention(8, 2, 4, (2, 2), (3, 3))
        assert mixer.train() is mixer
        assert mixer.eval() is mixer

    @pytest.mark.slow
    @pytest.mark.parametrize("fused", [False, True])
    def test_compiled_equals_eager_after_the_weights_changed(self, fused: bool) -> None:
        model = randomise(small(), torch.randn(8, 3, 112, 112))
        if fused:
            fuse_(model)
        x = torch.randn(2, 3, 112, 112)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
            state = {
                k: v + 0.1 * torch.rand_like(v) if v.is_floating_point() else v
                for k, v in model.state_dict().items()
            }
            model.load_state_dict(state)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


class TestTraining:
    def test_every_parameter_is_registered_gets_a_gradient_and_moves(self) -> None:
        # In training mode a norm's bias before another norm has no gradient but rounding.
        model = randomise(small(distillation=True), torch.randn(8, 3, 112, 112)).eval()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        model(torch.randn(4, 3, 112, 112)).square().sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
        assert not still
        assert all(p.grad is not None for p in model.parameters())

    def test_a_fresh_residual_branch_is_the_identity(self) -> None:
        block = SandwichBlock(16, 2).eval()
        x = torch.randn(1, 16, 14, 14)
        assert torch.equal(block(x), x)

    def test_one_seed_repeats_and_two_differ(self) -> None:
        def draw(seed: int) -> Tensor:
            torch.manual_seed(seed)
            return small().head.linear.weight  # type: ignore[union-attr,return-value]

        assert torch.equal(draw(0), draw(0))
        assert not torch.equal(draw(0), draw(1))

    def test_learns_to_tell_left_from_right(self) -> None:
        model = small(num_classes=2).train()
        optimizer, schedule = optimizer_and_schedule(model, lr=3e-3, steps=15)
        y = torch.arange(16) % 2
        x = torch.randn(16, 3, 112, 112) * 0.3
        x[y == 0, :, :, :56] += 1
        x[y == 1, :, :, 56:] += 1
        losses = []
        for _ in range(15):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < 0.2 * losses[0]

    def test_weight_decay_spares_norms_biases_and_attention_biases(self) -> None:
        model = small()
        decayed, spared = ({id(p) for p in group["params"]} for group in parameter_groups(model))  # type: ignore[union-attr,attr-defined]
        for name, parameter in model.named_parameters():
            spare = name.endswith(("attention_biases", "bias")) or ".bn." in name
            assert id(parameter) in (spared if spare else decayed), name
        assert len(decayed) + len(spared) == len(list(model.parameters()))

    def test_the_schedule_takes_the_absolute_rate(self) -> None:
        optimizer, _ = optimizer_and_schedule(nn.Linear(2, 2), lr=1e-3, steps=10)
        assert optimizer.param_groups[0]["lr"] == 1e-3
        with pytest.raises(BadInput, match="fewer than steps=10"):
            optimizer_and_schedule(nn.Linear(2, 2), lr=1e-3, steps=10, warmup_steps=10)

    def test_one_image_in_training_is_refused_before_the_step_with_the_remedy(self) -> None:
        model = small().train()
        with pytest.raises(BadInput, match=r"drop_last=True.*model\.head\.eval\(\)"):
            model(torch.randn(1, 3, 112, 112))
        model.head.eval()
        assert model(torch.randn(1, 3, 112, 112)).shape == (1, 4)

    def test_distillation_gives_the_pair_in_training_and_the_mean_after(self) -> None:
        model = small(distillation=True)
        pair = model(torch.randn(2, 3, 112, 112))
        assert [t.shape for t in pair] == [(2, 4), (2, 4)]
        model.eval()
        x = torch.randn(2, 3, 112, 112)
        pooled = model.forward_features(x).mean((2, 3))
        torch.testing.assert_close(model(x), (model.head(pooled) + model.head_dist(pooled)) / 2)  # type: ignore[misc]

    def test_attention_in_bfloat16_stays_near_float32(self) -> None:
        mixer = randomise(CascadedGroupAttention(64, 4), torch.randn(16, 64, 7, 7))
        x = torch.randn(4, 64, 7, 7)
        with torch.no_grad():
            exact = mixer(x)
            short = copy.deepcopy(mixer).bfloat16()(x.bfloat16()).float()
        assert (short - exact).norm() / exact.norm() < 3e-2


class TestSizes:
    @pytest.mark.filterwarnings("ignore:img_size")
    @pytest.mark.parametrize("size", [32, 64, 192, 256, 512, (224, 192), (100, 140)])
    def test_builds_and_runs_at(self, size: int | tuple[int, int]) -> None:
        model = efficientvit_m0(num_classes=2, img_size=size).eval()
        rows, columns = (size, size) if isinstance(size, int) else size
        with torch.no_grad():
            maps = model.forward_intermediates(torch.randn(1, 3, rows, columns))
        assert [tuple(m.shape[2:]) for m in maps] == model.map_sizes()
        assert [m.shape[1] for m in maps] == [info["channels"] for info in model.feature_info]

    def test_set_input_size_equals_building_at_that_size_and_loading(self, m0: EfficientViT) -> None:
        moved = copy.deepcopy(m0).set_input_size_(160)
        built = load_timm_(efficientvit_m0(num_classes=5, img_size=160).eval(), m0.state_dict())
        x = torch.randn(1, 3, 160, 160)
        with torch.no_grad():
            assert torch.equal(moved(x), built(x))
            fused = fuse_(copy.deepcopy(m0)).set_input_size_(160)  # type: ignore[operator]
            torch.testing.assert_close(fused(x), moved(x), rtol=1e-4, atol=1e-4)

    def test_small_images_draw_a_warning_that_names_the_maps(self) -> None:
        with pytest.warns(UserWarning, match="maps of 2x2, 1x1, 1x1"):
            efficientvit_m0(img_size=32)

    def test_a_pyramid_gives_the_three_maps_and_has_no_head(self, m0: EfficientViT) -> None:
        x = torch.randn(1, 3, 224, 224)
        pyramid = features_only(copy.deepcopy(m0))
        with torch.no_grad():
            for mine, own in zip(pyramid(x), m0.forward_intermediates(x), strict=True):
                assert torch.equal(mine, own)
        assert (pyramid.channels, pyramid.strides) == ([64, 128, 192], [16, 32, 64])
        assert not any("head" in name for name in pyramid.state_dict())

    def test_reset_classifier_changes_the_classes_or_drops_the_head(self) -> None:
        model = small(distillation=True).eval()
        x = torch.randn(2, 3, 112, 112)
        assert model.reset_classifier(9)(x).shape == (2, 9)
        assert model.reset_classifier(0)(x).shape == (2, 48)

    def test_gray_images_need_only_in_chans(self) -> None:
        assert small(in_chans=1).eval()(torch.randn(2, 1, 112, 112)).shape == (2, 4)


def to_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a state dict to the names of the official repository's modules, written down from its layout."""
    renamed = {}
    for name, tensor in state.items():
        parts = name.replace(".conv.", ".c.").split(".")
        if parts[0] == "patch_embed":  # Sequential with ReLUs between
            parts[1] = str(2 * (int(parts[1][4:]) - 1))
        elif parts[0] == "stages":
            stage = int(parts[1]) + 1
            if parts[2] == "downsample":
                parts = [
                    f"blocks{stage}",
                    {"res1": "0", "patchmerge": "1", "res2": "2"}[parts[3]],
                    *parts[4:],
                ]
            else:
                shift = 0 if stage == 1 else 3
                parts = [f"blocks{stage}", str(int(parts[3]) + shift), *parts[4:]]
        elif parts[1] == "linear":
            parts[1] = "l"
        renamed[".".join(parts)] = tensor
    return renamed


class TestCheckpoints:
    @pytest.mark.parametrize("name", list(PUBLISHED))
    def test_official_names_map_onto_every_variant_without_a_gap(self, name: str) -> None:
        with torch.device("meta"):
            own = build(name).state_dict()
        official = to_official(own)
        assert f"blocks3.{2 + VARIANTS[name].depth[2]}.mixer.m.attn.qkvs.0.c.weight" in official
        from memspan.models.efficientvit.weights import official_name

        assert [official_name(key) for key in official] == list(own)

    def test_an_official_checkpoint_gives_the_same_outputs(self, m0: EfficientViT) -> None:
        official = to_official(m0.state_dict())
        official["blocks1.0.mixer.m.attn.attention_bias_idxs"] = torch.zeros(49, 49, dtype=torch.long)
        matrix = "blocks1.0.ffn0.m.pw1.c.weight"
        official[matrix] = official[matrix][:, :, 0, 0]  # as old files keep 1x1 convolutions
        model = efficientvit_m0(num_classes=5).eval()
        x = torch.randn(1, 3, 224, 224)
        model(x)
        load_official_(model, {"model": official})  # type: ignore[dict-item]
        assert torch.equal(model(x), m0(x))

    @pytest.mark.parametrize("layout", ["official.pth", "timm.safetensors"])
    def test_entry_functions_read_files_of_either_layout(
        self, m0: EfficientViT, tmp_path: Path, layout: str
    ) -> None:
        path = tmp_path / layout
        if layout == "official.pth":
            torch.save({"model": to_official(m0.state_dict())}, path)
        else:
            save_file(m0.state_dict(), path)
        x = torch.randn(1, 3, 224, 224)
        assert torch.equal(efficientvit_m0(num_classes=5, weights=path).eval()(x), m0(x))
        other = efficientvit_m0(num_classes=2, weights=path).eval()
        assert torch.equal(other.forward_features(x), m0.forward_features(x))

    def test_a_table_for_another_window_is_interpolated(self, m0: EfficientViT) -> None:
        model = load_timm_(efficientvit_m0(num_classes=5, img_size=160), m0.state_dict())
        place = "stages.1.blocks.0.mixer.m.attn.attention_biases"
        expected = resize_bias_table(m0.state_dict()[place], (7, 7), (5, 5))
        assert torch.equal(model.state_dict()[place], expected)

    def test_unknown_missing_and_misshaped_keys_are_listed_and_nothing_is_loaded(self) -> None:
        model = small()
        good = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        cases = {
            r"1 unknown keys.*stages\.9": good | {"stages.9.weight": torch.zeros(1)},
            r"1 missing keys.*head\.bn\.bias": {n: t for n, t in good.items() if n != "head.bn.bias"},
            r"head\.linear\.weight=\(7, 48\).*reset_classifier": good
            | {"head.linear.weight": torch.zeros(7, 48)},
        }
        for pattern, state in cases.items():
            with pytest.raises(BadInput, match=pattern):
                load_timm_(model, {n: t + 1 if t.is_floating_point() else t for n, t in state.items()})
        assert all(torch.equal(tensor, good[name]) for name, tensor in model.state_dict().items())

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nowhere\.pth"):
            efficientvit_m0(weights=tmp_path / "nowhere.pth")


class TestExport:
    def test_torch_export_with_a_dynamic_batch_gives_the_same_outputs(self) -> None:
        model = fuse_(randomise(small(), torch.randn(8, 3, 112, 112)))
        shapes = {"x": {0: torch.export.Dim("batch")}}
        program = torch.export.export(model, (torch.randn(2, 3, 112, 112),), dynamic_shapes=shapes)
        saved = io.BytesIO()
        torch.export.save(program, saved)
        saved.seek(0)
        loaded = torch.export.load(saved).module()
        for batch in (1, 2, 5):
            x = torch.randn(batch, 3, 112, 112)
            torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-4)

    @pytest.mark.slow
    def test_onnx_runtime_gives_the_same_outputs_at_any_batch(self, tmp_path: Path) -> None:
        runtime = pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
        from memspan.models.efficientvit import export_onnx

        model = fuse_(randomise(small(), torch.randn(8, 3, 112, 112)))
        export_onnx(model, tmp_path / "model.onnx")
        assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
        session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
        for batch in (1, 2, 5):
            x = torch.randn(batch, 3, 112, 112)
            (logits,) = session.run(["logits"], {"images": x.numpy()})
            torch.testing.assert_close(torch.from_numpy(logits), model(x), rtol=1e-4, atol=1e-4)

    def test_export_is_refused_in_training_mode(self, tmp_path: Path) -> None:
        from memspan.models.efficientvit import export_onnx

        with pytest.raises(BadInput, match=r"model\.eval\(\)"):
            export_onnx(small().train(), tmp_path / "model.onnx")


COMPUTED = ("aten::linear", "aten::addmm", "aten::mm", "aten::matmul")


class TestAnalysis:
    def test_time_is_split_by_what_bounds_the_operator(self) -> None:
        """Which operators count as what; how long they take is the machine's business, and how busy it is."""
        products = memory_bound_share(nn.Sequential(nn.Linear(64, 64), nn.GELU()), torch.randn(64, 64))
        bound = {name: share for name, share in products.by_operator.items() if name in COMPUTED}
        assert "aten::addmm" in bound
        assert "aten::gelu" in products.by_operator
        assert math.isclose(products.compute_bound, sum(bound.values()))
        copies = memory_bound_share(nn.Sequential(nn.ReLU(), nn.Softmax(-1)), torch.randn(256, 256))
        assert copies.memory_bound == 1
        assert math.isclose(sum(copies.by_operator.values()), 1)

    def test_time_share_leaves_the_model_as_it_was(self, m0: EfficientViT) -> None:
        before = copy.deepcopy(m0.state_dict())
        share = memory_bound_share(m0, torch.randn(1, 3, 224, 224), repeats=1)
        assert 0 < share.memory_bound < 1
        assert {"aten::mkldnn_convolution", "aten::bmm", "aten::addmm"} & set(share.by_operator)
        assert all(torch.equal(v, before[k]) for k, v in m0.state_dict().items())

    def test_equal_heads_have_similarity_one_and_disjoint_heads_zero(self) -> None:
        mixer = CascadedGroupAttention(8, 2, 4, (3, 3), (1, 1), cascade=False).eval()
        x = torch.randn(2, 8, 3, 3)
        with torch.no_grad():
            for qkv in mixer.qkvs:
                qkv.conv.weight.zero_()  # type: ignore[union-attr,operator]
            assert head_similarity(mixer, x)[""] == pytest.approx(1)
            mixer.attention_biases.fill_(-1e3)
            mixer.attention_biases[0, 0] = 1e3  # head 1 looks at its own position
            mixer.attention_biases[1, 8] = 1e3  # head 2 at the opposite corner, else uniformly
        weights = mixer.attention_maps(x)[0].flatten(1)
        expected = float(F.cosine_similarity(weights[0], weights[1], dim=0).detach())
        assert head_similarity(mixer, x)[""] == pytest.approx(expected)
        assert expected < 0.2

    def test_every_attention_with_two_heads_is_measured_fused_or_not(self, m0: EfficientViT) -> None:
        x = torch.randn(2, 3, 224, 224)
        plain = head_similarity(m0, x)
        assert len(plain) == 6
        fused = head_similarity(fuse_(copy.deepcopy(m0)), x)
        assert fused == pytest.approx(plain, abs=1e-4)
        with pytest.raises(BadInput, match="two heads or more"):
            head_similarity(nn.Linear(2, 2), torch.randn(1, 2))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: CascadedGroupAttention(10, 4), r"dim=10: .*num_heads=4"),
        (lambda: CascadedGroupAttention(12, 3, kernels=(5, 5)), r"kernels=\(5, 5\): .*each of the 3 heads"),
        (lambda: CascadedGroupAttention(12, 3, kernels=(5, 4, 5)), r"kernels=\(5, 4, 5\): use odd sizes"),
        (lambda: MultiHeadAttention(10, 4), r"dim=10"),
        (lambda: SandwichBlock(12, 3, mixer="linear"), "use 'cga', 'group', 'mhsa' or None"),  # type: ignore[arg-type]
        (lambda: EfficientViT(embed_dim=(64, 128)), "three widths"),
        (lambda: EfficientViT(embed_dim=(36, 64, 96)), "must divide by 8"),
        (lambda: EfficientViT(img_size=0), "img_size=0"),
        (
            lambda: small()(torch.randn(2, 3, 96, 128)),
            r"img_size=\(112, 112\).*set_input_size_\(\(96, 128\)\)",
        ),
        (lambda: small()(torch.randn(2, 1, 112, 112)), r"give images as \(batch, 3, \(112, 112\)\)"),
        (lambda: CascadedGroupAttention(8, 2)(torch.randn(1, 8, 6, 7)), "reads maps of 7x7"),
    ],
)
def test_bad_input_is_refused_with_the_argument_and_the_remedy(
    build: Callable[[], Any], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        build()


def test_the_face_names_everything_public() -> None:
    from memspan.models import efficientvit

    for name in network.__all__:
        assert name in efficientvit.__all__, name


def test_fusing_refuses_what_a_fused_layer_would_lose_and_leaves_the_model_alone() -> None:
    from memspan.models.efficientvit.network import ConvBN, Residual

    def shared() -> nn.Module:
        layer = Residual(ConvBN(4, 4, 3, padding=1, groups=4))
        return nn.Sequential(layer, nn.ReLU(), layer)

    def hooked() -> nn.Module:
        net = nn.Sequential(ConvBN(4, 4))
        net[0].bn.register_forward_hook(lambda *_: None)
        return net

    def parametrized() -> nn.Module:
        net = nn.Sequential(ConvBN(4, 4))
        nn.utils.parametrizations.weight_norm(net[0].conv)
        return net

    for make, why in ((shared, "same layer"), (hooked, "hooks"), (parametrized, "parametrized")):
        net, x = make().eval(), torch.randn(2, 4, 5, 5)
        before = net(x)
        with pytest.raises(BadInput, match=why):
            fuse_(net)
        assert torch.equal(net(x), before)
