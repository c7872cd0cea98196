"""The dense language model: causal, the same with and without its cache, and sized as its formulas say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from memspan.base import BadInput
from memspan.base.files import load_state, save_state
from memspan.ledger import kv_cache_bytes, macs, nbytes
from memspan.models import CausalLM
from memspan.models.lm import KVCache, attend, generate, next_token_loss, rotary_width
from memspan.nn import split_at


def small(**options: Any) -> CausalLM:
    lm = CausalLM(vocab_size=40, d_model=32, n_layers=3, n_heads=4, max_len=24, **options).double()
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return lm.eval()


KINDS: list[dict[str, Any]] = [
    {}, {"rotary": 0.0}, {"rotary": 1.0, "bias": False}, {"tied": True, "ffn_dim": 20},
]  # fmt: skip


@pytest.mark.parametrize("options", KINDS)
def test_a_token_changes_no_logits_before_it(options: dict[str, Any]) -> None:
    lm, ids = small(**options), torch.randint(40, (2, 12))
    other = ids.clone()
    other[:, 7] = (other[:, 7] + 1) % 40
    before, after = lm(ids), lm(other)
    assert torch.equal(before[:, :7], after[:, :7])
    assert (before[:, 7:] - after[:, 7:]).abs().amax(dim=(0, 2)).min() > 1e-6


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("cuts", [(12,), (1,) * 12, (5, 4, 1, 2)])
def test_decoding_with_the_cache_equals_the_full_pass(options: dict[str, Any], cuts: tuple[int, ...]) -> None:
    lm, ids = small(**options), torch.randint(40, (2, 12))
    cache = lm.new_cache(batch=2)
    parts = torch.cat([lm(part, cache) for part in ids.split(list(cuts), dim=1)], dim=1)
    torch.testing.assert_close(parts, lm(ids), atol=1e-10, rtol=0)
    assert cache.length == 12
    cache.crop_(6)
    torch.testing.assert_close(lm(ids[:, 6:9], cache), lm(ids)[:, 6:9], atol=1e-10, rtol=0)


def test_attention_equals_the_sum_written_out() -> None:
    q, k, v = (torch.randn(2, 5, 6, dtype=torch.float64) for _ in range(3))
    wanted = torch.zeros(2, 5, 6, dtype=torch.float64)
    for b in range(2):
        for h in (0, 1):
            cols = slice(3 * h, 3 * h + 3)
            for i in range(5):
                scores = torch.stack([q[b, i, cols] @ k[b, j, cols] / 3**0.5 for j in range(i + 1)])
                wanted[b, i, cols] = scores.softmax(0) @ v[b, : i + 1, cols]
    torch.testing.assert_close(attend(q, k, v, n_heads=2), wanted)


def test_rotary_scores_depend_on_distance_alone() -> None:
    q, k = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)

    def score(at: int, back: int) -> Tensor:
        def turned(x: Tensor, place: int) -> Tensor:
            from memspan.models.lm import _rotate, _rotation

            return _rotate(x.view(1, 1, 1, 8), *_rotation(place, 1, 6, x)).flatten()

        return turned(q, at) @ turned(k, at - back)

    torch.testing.assert_close(score(9, 4), score(31, 4))
    assert abs(score(9, 4) - score(9, 5)) > 1e-6


def test_multiply_adds_outside_the_head_are_12_s_d2_and_2_s2_d_a_layer() -> None:
    lm, s, d, layers = CausalLM(16, 64, 2, 4, 32), 32, 64, 2
    head = s * d * 16
    assert macs(lm, torch.zeros(1, s, dtype=torch.long)) - head == layers * (12 * s * d * d + 2 * s * s * d)


def test_the_cache_holds_what_the_formula_says() -> None:
    cache = CausalLM(16, 64, 2, 4, 32).new_cache(batch=3, max_len=20)
    assert nbytes(cache) == kv_cache_bytes(2, 4, 16, 20, batch=3, dtype_bytes=4)


def test_greedy_generation_takes_the_likeliest_token_of_a_full_pass_each_time() -> None:
    lm, ids = small(), torch.randint(40, (3, 4))
    wanted = ids
    for _ in range(8):
        wanted = torch.cat([wanted, lm(wanted)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(lm.generate(ids, 8), wanted)


def test_draws_repeat_with_a_seed_stay_among_the_top_and_end_at_stop() -> None:
    lm, ids = small(), torch.randint(40, (3, 4))

    def draw(seed: int, **options: Any) -> Tensor:
        return lm.generate(ids, 15, temperature=1.0, generator=torch.Generator().manual_seed(seed), **options)

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    assert torch.equal(draw(0, top_k=1), lm.generate(ids, 15))
    ended = lm.generate(ids, 15, stop=int(lm.generate(ids, 1)[0, -1]))
    assert (ended[0, 4:] == ended[0, 4]).all()


def test_tied_models_hold_one_matrix_and_round_trip(tmp_path: Path) -> None:
    tied, untied = small(tied=True), small()
    assert nbytes(untied) - nbytes(tied) == 40 * 32 * 8
    ids = torch.randint(40, (1, 6))
    for lm, fresh in ((tied, small(tied=True)), (untied, small())):
        save_state(tmp_path / "lm.safetensors", lm.state_dict())
        fresh.load_state_dict(load_state(tmp_path / "lm.safetensors")[0])
        assert torch.equal(fresh(ids), lm(ids))


def test_it_learns_a_text_that_repeats() -> None:
    lm = CausalLM(vocab_size=8, d_model=32, n_layers=2, n_heads=2, max_len=16)
    ids = torch.arange(16)[None] % 5
    optimizer = torch.optim.AdamW(lm.parameters(), 1e-2)
    for _ in range(60):
        loss = next_token_loss(lm(ids), ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    assert lm.generate(ids[:, :5], 8)[0].tolist() == [i % 5 for i in range(13)]


def test_it_splits_in_two_and_runs_in_bfloat16() -> None:
    lm, ids = small(), torch.randint(40, (2, 6))
    head, tail = split_at(lm, "blocks.1")
    torch.testing.assert_close(tail(head(ids)), lm(ids))
    assert lm.bfloat16()(ids).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "call",
    [
        lambda lm: lm(torch.zeros(2, 25, dtype=torch.long)),
        lambda lm: lm(torch.zeros(2, 3)),
        lambda lm: lm(torch.zeros(3, dtype=torch.long)),
        lambda lm: lm(torch.full((1, 2), 40)),
        lambda lm: lm(torch.zeros(2, 3, dtype=torch.long), lm.new_cache(batch=1)),
        lambda lm: lm.generate(torch.zeros(1, 4, dtype=torch.long), 21),
        lambda lm: lm.generate(torch.zeros(1, 4, dtype=torch.long), 2, temperature=-1.0),
        lambda lm: lm.new_cache().crop_(1),
        lambda lm: lm.new_cache(batch=0),
        lambda lm: CausalLM(10, d_model=30, n_heads=4),
        lambda lm: CausalLM(0),
        lambda lm: CausalLM(10, rotary=1.5),
        lambda lm: next_token_loss(torch.zeros(1, 3, 5), torch.zeros(1, 2, dtype=torch.long)),
    ],
)
def test_bad_input_is_refused(call: Any) -> None:
    with pytest.raises(BadInput):
        call(small())


def test_any_model_with_a_cache_can_generate_and_rotary_widths_are_even() -> None:
    lm, ids = small(), torch.zeros(1, 2, dtype=torch.long)
    assert torch.equal(generate(lm, ids, 3), lm.generate(ids, 3))
    assert generate(lm, ids, 0) is ids
    assert [rotary_width(12, 4, share) for share in (0.0, 0.25, 1.0)] == [0, 2, 2]
    assert len(KVCache(2, 1, 1, 4, 2)) == len(list(KVCache(2, 1, 1, 4, 2))) == 2
