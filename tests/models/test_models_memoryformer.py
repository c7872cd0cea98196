"""MemoryFormer's layers and model against sums written out, its closed forms, and its published sizes."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from conformance.contracts import System, check_optimizer
from memspan.base import BadInput
from memspan.ledger import Ledger, nbytes
from memspan.models import CausalLM, MemoryFormerConfig, MemoryFormerLM, MemoryLinear, RowAdam, memory_cost
from memspan.models.memoryformer import (
    MemoryBlock,
    MultiMemoryLinear,
    bucket_usage,
    convert_,
    flip_bit_order,
    from_linear,
    hash_codes,
)
from memspan.nn import restore_
from memspan.nn.lookup import hash_codes_reference, lookup_sum_reference


def randomised(module: Any) -> Any:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return module


def small(**options: Any) -> MemoryFormerLM:
    sizes: dict[str, Any] = {"d_model": 24, "n_layers": 2, "n_heads": 4, "bits": 4, "max_len": 24, **options}
    return randomised(MemoryFormerLM(MemoryFormerConfig(40, **sizes)).double().eval())


# ---- hashing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6])
def test_the_weight_is_the_softmax_over_all_corners_at_the_chosen_one(bits: int, temperature: float) -> None:
    z = torch.randn(50, bits, dtype=torch.float64)
    corners = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=bits)), dtype=torch.float64)
    shares = (z @ corners.T / temperature).softmax(-1)
    torch.testing.assert_close(shares.sum(-1), torch.ones(50, dtype=torch.float64), atol=1e-12, rtol=0)
    code, weight = hash_codes(z, bits, temperature=temperature)
    low_first = ((corners > 0) * 2 ** torch.arange(bits)).sum(-1)
    chosen = (code == low_first[None, :]).double()
    torch.testing.assert_close(weight[:, 0], (shares * chosen).sum(-1), atol=1e-12, rtol=0)
    assert torch.equal(shares.argmax(-1), chosen.argmax(-1))
    scaled = hash_codes(z, bits, temperature=temperature, weight="scaled")[1]
    torch.testing.assert_close(scaled[:, 0], weight[:, 0] * z.abs().sum(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_runs_from_even_odds_to_certainty_without_overflow(dtype: torch.dtype) -> None:
    z = torch.tensor([[0.0] * 8, [1e4] * 8, [-1e4] * 8, [20.0] * 8], dtype=dtype)
    code, weight = hash_codes(z, 8)
    assert weight[:, 0].tolist() == pytest.approx([2.0**-8, 1.0, 1.0, 1.0])
    assert code[:, 0].tolist() == [255, 255, 0, 255]
    z = torch.randn(30, 8)
    torch.testing.assert_close(hash_codes(z, 8)[1], torch.sigmoid(2 * z.abs()).prod(-1, keepdim=True))


def test_the_first_entry_is_the_lowest_bit_and_zero_of_either_sign_counts_as_positive() -> None:
    assert hash_codes(torch.tensor([0.7, -0.1]), 2)[0].tolist() == [1]  # the paper's figure, highest first: 2
    assert hash_codes(torch.tensor([0.0, -0.0, -1e-9]), 3)[0].tolist() == [3]


def test_a_positive_factor_leaves_the_code_and_a_flipped_sign_moves_one_by_its_power() -> None:
    x = torch.randn(20, 12)
    code, _ = hash_codes(x, 4)
    assert torch.equal(hash_codes(x * torch.rand(20, 12).add(0.1), 4)[0], code)
    for place in range(12):
        flipped = x.clone()
        flipped[:, place] *= -1
        moved = (hash_codes(flipped, 4)[0] - code).abs()
        assert (moved[:, place // 4] == 2 ** (place % 4)).all()
        assert moved.sum() == moved[:, place // 4].sum()


def test_codes_of_the_published_order_are_relabelled_not_changed() -> None:
    tables, x = torch.randn(2, 8, 5), torch.randn(7, 6)
    layer = MemoryLinear(6, 5, 3, bias=False)
    with torch.no_grad():
        layer.tables.copy_(flip_bit_order(tables))
    code, weight = hash_codes(x, 3)
    high_first = torch.tensor([int(f"{value:03b}"[::-1], 2) for value in range(8)])[code.long()]
    wanted = sum(weight[:, k, None] * tables[k, high_first[:, k]] for k in range(2))
    torch.testing.assert_close(layer(x), wanted)
    assert torch.equal(flip_bit_order(flip_bit_order(tables)), tables)


# ---- the layer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("weight", ["prob", "scaled"])
def test_the_layer_is_the_sum_written_out(bits: int, weight: Any) -> None:
    layer = randomised(MemoryLinear(24, 5, bits, weight=weight).double())
    x = torch.randn(3, 24, dtype=torch.float64)
    x[0, ::5] = 0.0
    tables, wanted = layer.tables.detach().numpy(), np.tile(layer.bias.detach().numpy(), (3, 1))
    for row in range(3):
        for k in range(24 // bits):
            z = x[row, k * bits : (k + 1) * bits].tolist()
            code = sum(2**i for i, v in enumerate(z) if v >= 0)
            p = math.prod(1 / (1 + math.exp(-2 * abs(v))) for v in z)
            p *= sum(map(abs, z)) if weight == "scaled" else 1
            for j in range(5):
                wanted[row, j] += p * tables[k, code, j]
    np.testing.assert_allclose(layer(x).detach().numpy(), wanted, atol=1e-6)
    with torch.no_grad():
        np.testing.assert_allclose(layer(x).numpy(), wanted, atol=1e-6)
    np.testing.assert_allclose(layer(x.view(3, 1, 24))[:, 0].detach().numpy(), wanted, atol=1e-6)


def test_gradcheck_in_the_tables_and_away_from_zero_in_the_input() -> None:
    layer = MemoryLinear(6, 3, 2, temperature=0.8).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    x = (x + 0.1 * x.sign()).requires_grad_()

    def call(x: Tensor, tables: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"tables": tables, "bias": bias}, (x,))

    tables = torch.randn(3, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        call, (x, tables, torch.randn(3, dtype=torch.float64, requires_grad=True))
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_one_bit_tables_of_opposite_rows_are_a_gated_linear_map(temperature: float) -> None:
    w = torch.randn(7, 5, dtype=torch.float64)
    for weight, factor in (("scaled", lambda z: z), ("prob", torch.sign)):
        layer = MemoryLinear(7, 5, 1, bias=False, weight=weight, temperature=temperature).double()  # type: ignore[arg-type]
        with torch.no_grad():
            layer.tables.copy_(torch.stack([-w, w], dim=1))
        z = torch.randn(9, 7, dtype=torch.float64)
        torch.testing.assert_close(layer(z), factor(z) * torch.sigmoid(2 * z.abs() / temperature) @ w)
        if weight == "scaled":
            torch.testing.assert_close(layer(100 * z), 100 * z @ w, rtol=1e-2, atol=1e-2)


def test_one_hash_shared_by_three_outputs_equals_three_layers() -> None:
    many = randomised(MultiMemoryLinear(16, (16, 8, 4), 4))
    x, start = torch.randn(5, 16), 0
    code, weight = many.hash(x)
    for part, width in zip(many(x), many.widths, strict=True):
        one = MemoryLinear(16, width, 4)
        with torch.no_grad():
            one.tables.copy_(many.tables[..., start : start + width])
            one.bias.copy_(many.bias[start : start + width])
        start += width
        torch.testing.assert_close(part, one(x))
        torch.testing.assert_close(part, one.forward_hashed(code, weight))


def test_on_corners_tables_of_a_matrix_reproduce_it_exactly() -> None:
    linear = nn.Linear(12, 5, bias=False).double()
    x = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=12)), dtype=torch.float64)[::7]
    layer = MemoryLinear(12, 5, 4, bias=False).double()
    corners = torch.tensor(
        [[2.0 * (c >> i & 1) - 1 for i in range(4)] for c in range(16)], dtype=torch.float64
    )
    with torch.no_grad():
        layer.tables.copy_(torch.einsum("ri,oki->kro", corners, linear.weight.view(5, 3, 4)))
    code, weight = layer.hash(x)
    torch.testing.assert_close(layer.forward_hashed(code, torch.ones_like(weight)), linear(x))
    torch.testing.assert_close(from_linear(linear, x, bits=4)(x), linear(x))  # p is the same on all corners


def test_fitted_tables_beat_the_mean_and_improve_with_bits() -> None:
    torch.manual_seed(3)
    linear, x = nn.Linear(24, 16).requires_grad_(False), torch.randn(20_000, 24)
    new = torch.randn(4_000, 24)
    errors = [
        float(
            (from_linear(linear, x, bits=bits)(new).detach() - linear(new)).square().mean()
            / linear(new).var()
        )
        for bits in (1, 2, 4)
    ]
    assert all(error < 0.7 for error in errors)
    layer = from_linear(linear, x[:8], bits=8)  # most buckets are empty: corners at typical sizes fill them
    assert float((layer(new).detach() - linear(new)).square().mean() / linear(new).var()) < 1.0


def test_least_squares_rows_cannot_be_bettered_by_one_factor() -> None:
    linear, x = nn.Linear(8, 4, bias=False), torch.randn(2_000, 8)
    layer = from_linear(linear, x, bits=2)
    code, weight = layer.hash(x)
    for k in range(4):  # residual of each chunk is orthogonal to its weight within each bucket
        target = x[:, 2 * k : 2 * k + 2] @ linear.weight[:, 2 * k : 2 * k + 2].T
        rest = target - weight[:, k, None] * layer.tables[k, code[:, k].long()]
        for bucket in range(4):
            here = code[:, k] == bucket
            assert float((weight[here, k, None] * rest[here]).sum(0).abs().max()) < 1e-2


def test_a_users_model_is_converted_in_place_and_taken_back() -> None:
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 4)).eval()
    inputs = [torch.randn(64, 16) for _ in range(4)]
    before = model(inputs[0])
    assert convert_(model, ["1", "3"], inputs, bits=4, max_rows=200) is model
    assert isinstance(model[1], MemoryLinear)
    assert isinstance(model[3], MemoryLinear)
    loss = model(inputs[0]).square().mean()
    loss.backward()
    assert model[1].tables.grad is not None
    restore_(model)
    torch.testing.assert_close(model(inputs[0]), before)


# ---- the model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"rotary": 0.0}, {"weight": "scaled", "expand_bits": 0}])
def test_a_token_changes_no_logits_before_it_and_the_cache_changes_none(options: dict[str, Any]) -> None:
    lm, ids = small(**options), torch.randint(40, (2, 12))
    other = ids.clone()
    other[:, 7] = (other[:, 7] + 1) % 40
    full, changed = lm(ids), lm(other)
    assert torch.equal(full[:, :7], changed[:, :7])
    assert (full[:, 7:] - changed[:, 7:]).abs().amax(dim=(0, 2)).min() > 1e-6
    cache = lm.new_cache(batch=2)
    with torch.no_grad():
        parts = torch.cat([lm(part, cache) for part in ids.split([5, 1, 1, 5], dim=1)], dim=1)
    torch.testing.assert_close(parts, full, atol=1e-5, rtol=0)
    assert lm.generate(ids[:, :4], 6).shape == (2, 10)


def test_a_saved_model_answers_alike_and_other_files_are_refused(tmp_path: Path) -> None:
    lm, ids = small(), torch.randint(40, (2, 6))
    lm = lm.float()
    lm.save(tmp_path / "lm.safetensors")
    again = MemoryFormerLM.load(tmp_path / "lm.safetensors").eval()
    assert torch.equal(again(ids), lm(ids))
    assert MemoryFormerConfig.from_dict(lm.config.to_dict()) == lm.config
    from memspan.base.files import save_state

    save_state(tmp_path / "other.safetensors", lm.state_dict())
    with pytest.raises(BadInput):
        MemoryFormerLM.load(tmp_path / "other.safetensors")
    with pytest.raises(BadInput, match="bits"):
        MemoryFormerConfig.from_dict({"bit": 3})


def test_published_sizes_and_costs_come_out() -> None:
    config = MemoryFormerConfig.tiny(vocab_size=64)
    with torch.device("meta"):
        lm = MemoryFormerLM(config).half()
    cost = memory_cost(lm, 2048)
    tau, count, d, s, layers = 8, 64, 512, 2048, 6
    assert cost.lookup_macs == layers * s * count * (4 * d + (tau + 2) * count)
    assert cost.attention_macs == layers * 2 * s * s * d
    assert cost.dense_macs == layers * 12 * s * d * d == layers * 6_442_450_944
    assert 6 * count * s * d == 402_653_184  # the paper's rounding of one block's lookups
    block = count * (3 * 2**tau * d + 2**tau * (tau + 2) * count + 2 ** (tau + 2) * d) * 2
    assert cost.table_bytes == layers * block
    assert round(block / 1e6, 1) == 138.4
    first = lm.layers[0]
    assert round(sum(p.tables.nbytes for p in (first.block.first, first.block.second)) / 1e6, 1) == 88.1
    assert round(first.qkv.tables.nbytes / 3 / 1e6, 1) == 16.8
    assert 2**4 * 128 * d * 2 == 2_097_152  # (tau, K) = (4, 128): 2.1 MB a layer
    assert cost.read_bytes == layers * count * (4 * d + (tau + 2) * count) * 2
    assert cost.moments_bytes == 8 * cost.table_bytes // 2
    assert "multiply-adds" in str(cost)
    assert cost.to_dict()["seq_len"] == 2048


def test_bytes_equal_the_ledgers_count() -> None:
    lm = small().float()
    with Ledger(lm) as ledger:
        lm(torch.randint(40, (1, 4)))
    others = sum(p.nbytes for name, p in lm.named_parameters() if "tables" not in name)
    assert ledger.peak.category("parameters") == nbytes(lm) == memory_cost(lm, 1).table_bytes + others
    assert memory_cost(lm, 1).memory_bytes() == {"parameters.tables": nbytes(lm) - others}


def test_the_dense_twin_counts_as_its_formula() -> None:
    from memspan.ledger import macs

    s, d, layers = 32, 24, 2
    dense = CausalLM(40, d, layers, 4, s)
    counted = macs(dense, torch.zeros(1, s, dtype=torch.long)) - s * d * 40
    lm = MemoryFormerLM(MemoryFormerConfig(40, d, layers, 4, bits=4, max_len=s))
    cost = memory_cost(lm, s)
    assert counted == cost.dense_macs + cost.attention_macs


def test_buckets_are_used_evenly_after_a_norm_and_collapse_after_a_relu() -> None:
    torch.manual_seed(0)
    layer = MemoryLinear(32, 4, bits=8)
    evenly = bucket_usage(nn.Sequential(nn.LayerNorm(32), layer), [torch.randn(16_384, 32)])["1"]
    assert float(evenly.entropy_bits.min()) > 0.99 * 8
    collapsed = bucket_usage(nn.Sequential(nn.ReLU(), layer), [torch.randn(8_192, 32)])["1"]
    assert float(collapsed.entropy_bits.max()) == 0.0  # every entry is 0 or more: one bucket
    assert int(collapsed.dead.min()) == 255


CHANGES: dict[str, Callable[[MemoryLinear], object]] = {
    "tables replaced": lambda layer: setattr(layer, "tables", nn.Parameter(torch.randn(4, 16, 5))),
    "tables moved": lambda layer: setattr(layer.tables, "data", torch.randn(4, 16, 5)),
    "tables written": lambda layer: layer.tables.data.mul_(2),
    "bias replaced": lambda layer: setattr(layer, "bias", nn.Parameter(torch.randn(5))),
    "bias dropped": lambda layer: setattr(layer, "bias", None),
    "another temperature": lambda layer: setattr(layer, "temperature", 0.5),
    "the other weight": lambda layer: setattr(layer, "weight", "scaled"),
    "doubles": lambda layer: layer.double(),
    "a parametrisation": lambda layer: parametrize.register_parametrization(layer, "tables", nn.Tanh()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
@torch.no_grad()
def test_what_was_prepared_for_decoding_is_never_out_of_date(
    change: Callable[[MemoryLinear], object],
) -> None:
    layer, x = MemoryLinear(16, 5, bits=4), torch.randn(3, 16)
    for one in (x, x[:1], x[None, :2]):
        layer(one)  # prepared now
    change(layer)
    x = x.to(layer.tables.dtype)
    expected = lookup_sum_reference(
        *hash_codes_reference(x, 4, 2 / layer.temperature, layer.weight == "scaled"), layer.tables
    )
    expected = expected if layer.bias is None else expected + layer.bias
    for _ in range(2):
        torch.testing.assert_close(layer(x), expected)


@torch.no_grad()
def test_another_bias_at_the_address_of_the_old_one_is_noticed() -> None:
    layer, x, memory = MemoryLinear(16, 5, bits=4), torch.randn(3, 16), torch.randn(10)
    layer.bias = nn.Parameter(memory[:5])
    y = layer(x) - memory[:5]
    layer.bias = nn.Parameter(memory.view(torch.float64))
    assert layer.bias.data_ptr() == memory.data_ptr()
    torch.testing.assert_close(layer(x), y + layer.bias, rtol=1e-5, atol=1e-5)


def test_a_prepared_layer_is_copied_pickled_and_let_go() -> None:
    layer, x = MemoryLinear(16, 5, bits=4), torch.randn(3, 16)
    with torch.no_grad():
        y = layer(x)
        twin = copy.deepcopy(layer)
        twin.tables.mul_(2)
        assert torch.equal(layer(x), y)
        assert not torch.equal(twin(x), y)
        assert torch.equal(pickle.loads(pickle.dumps(layer))(x), y)
        with torch.device("meta"):
            assert torch.equal(layer(x), y)
    held = weakref.ref(layer.tables)
    layer.tables = nn.Parameter(torch.zeros(4, 16, 5))
    assert held() is None


def test_it_is_compiled_without_a_graph_break() -> None:
    lm, ids = small(), torch.randint(40, (2, 6))
    torch.testing.assert_close(torch.compile(lm, backend="eager", fullgraph=True)(ids), lm(ids))


def test_tables_of_two_bytes_answer_near_those_of_four() -> None:
    block, x = randomised(MemoryBlock(32, 4)), torch.randn(6, 32)
    with torch.no_grad():
        wanted = block.first(x)
        for dtype in (torch.bfloat16, torch.float16):
            x16 = x.to(dtype)
            layer = MemoryLinear(32, block.first.out_features, 4, dtype=dtype)
            layer.load_state_dict(block.first.state_dict())
            torch.testing.assert_close(layer(x16).float(), wanted, atol=0.05, rtol=0.05)


# ---- the optimizer --------------------------------------------------------------------------------------


def steps(optimizer: Any, sparse: bool, decay: float = 0.0) -> Tensor:
    torch.manual_seed(4)
    layer = MemoryLinear(12, 6, 4, bias=False, sparse=sparse)
    made = optimizer([layer.tables])
    for _ in range(5):
        made.zero_grad()
        layer(torch.randn(3, 12)).square().sum().backward()
        made.step()
    return layer.tables.detach()


def test_rows_move_as_in_sparse_adam_and_dense_gradients_as_in_adamw() -> None:
    options: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.95)}
    ours = steps(lambda p: RowAdam(p, **options), sparse=True)
    torch.testing.assert_close(ours, steps(lambda p: torch.optim.SparseAdam(p, **options), sparse=True))
    dense = steps(lambda p: RowAdam(p, weight_decay=0.1, **options), sparse=False)
    torch.testing.assert_close(
        dense, steps(lambda p: torch.optim.AdamW(p, weight_decay=0.1, **options), sparse=False)
    )


def test_decay_and_moments_touch_visited_rows_alone() -> None:
    layer = MemoryLinear(12, 6, 4, bias=False, sparse=True)
    before = layer.tables.detach().clone()
    optimizer = RowAdam([layer.tables], lr=0.1, weight_decay=0.5)
    x = torch.randn(3, 12)
    layer(x).sum().backward()
    optimizer.step()
    code = layer.hash(x)[0]
    visited = torch.zeros(3, 16, dtype=torch.bool)
    visited[torch.arange(3), code.long()] = True
    assert torch.equal((layer.tables != before).any(-1), visited)
    assert torch.equal((optimizer.state[layer.tables]["exp_avg"] != 0).any(-1), visited)


def test_a_reloaded_optimizer_steps_as_the_first_would_have(tmp_path: Path) -> None:
    check_optimizer(
        System("memoryformer", "optimizer", build=lambda p: RowAdam(p, lr=0.01, weight_decay=0.1)), tmp_path
    )
    with pytest.raises(BadInput):
        RowAdam([torch.zeros(1)], lr=-1.0)


def test_it_learns_a_text_that_repeats_with_row_sparse_gradients() -> None:
    from memspan.models.lm import next_token_loss

    torch.manual_seed(0)
    lm = MemoryFormerLM(MemoryFormerConfig(8, 32, 2, 2, bits=4, max_len=16, sparse=True))
    ids = torch.arange(16)[None] % 5
    optimizer = RowAdam(lm.parameter_groups(5e-3))
    for _ in range(60):
        loss = next_token_loss(lm(ids), ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    assert lm.generate(ids[:, :5], 8)[0].tolist() == [i % 5 for i in range(13)]


# ---- refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: MemoryLinear(30, 5, 8), "near are 6 or 10"),
        (lambda: MemoryLinear(34, 5, 17), "131,072 rows"),
        (lambda: MemoryLinear(8, 5, 0), "bits"),
        (lambda: MemoryLinear(8, 0, 2), "1 or more"),
        (lambda: MemoryLinear(8, 8, 2, temperature=0.0), "temperature"),
        (lambda: MemoryLinear(8, 8, 2, weight="softmax"), "weight"),  # type: ignore[arg-type]
        (lambda: MemoryLinear(4096, 4096, 16), "max_bytes"),
        (lambda: MemoryLinear(16 * 2**16, 1, 16, max_bytes=2**62), "int32"),
        (lambda: MemoryLinear(8, 8, 2)(torch.zeros(2, 8, dtype=torch.long)), "floating"),
        (lambda: MemoryLinear(8, 8, 2)(torch.zeros(2, 9)), "log2 of their rows"),
        (lambda: MemoryLinear(4, 8, 2).forward_hashed(torch.full((1, 2), 4), torch.ones(1, 2)), "0 to 3"),
        (lambda: MultiMemoryLinear(8, (), 2), "one width"),
        (lambda: MemoryBlock(32, 16), "bits are the most"),
        (lambda: small(d_model=20, bits=8), "bits"),
        (lambda: small(n_heads=5), "n_heads"),
        (lambda: small(n_layers=0), "n_layers"),
        (lambda: memory_cost(nn.Linear(2, 2), 4), "no MemoryLinear"),
        (lambda: memory_cost(MemoryLinear(8, 8, 2), 0), "seq_len"),
        (lambda: bucket_usage(nn.Linear(2, 2), []), "no MemoryLinear"),
        (lambda: bucket_usage(MemoryLinear(8, 8, 2), [torch.full((2, 8), torch.nan)]), "NaN"),
        (lambda: bucket_usage(MemoryLinear(8, 8, 2), []), "all shares are 0"),
        (lambda: from_linear(nn.Linear(8, 2), torch.full((2, 8), torch.nan), 2), "finite"),
        (lambda: from_linear(nn.Conv1d(1, 1, 1), torch.zeros(2, 8), 2), "nn.Linear"),  # type: ignore[arg-type]
        (lambda: convert_(nn.Sequential(nn.ReLU()), "0", []), "no nn.Linear"),
        (lambda: convert_(nn.Sequential(nn.Linear(8, 2)), "0", [], bits=4), "no input reached"),
        (lambda: flip_bit_order(torch.zeros(1, 3, 2)), "2\\*\\*bits"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_with_its_remedy(call: Any, told: str) -> None:
    with pytest.raises(BadInput, match=told):
        call()


def test_nan_in_a_table_is_told_by_the_cost() -> None:
    layer = MemoryLinear(8, 8, 2)
    with torch.no_grad():
        layer.tables[1, 2, 3] = torch.nan
    with pytest.raises(BadInput, match="NaN"):
        memory_cost(layer, 1)


def test_the_printed_layer_tells_its_bytes() -> None:
    assert "tables=32,768 bytes" in repr(MemoryLinear(64, 32, 4))
