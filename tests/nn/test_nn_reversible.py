"""Reversible chains: the gradients of a plain network, in the memory of one layer, without side effects."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import spectral_norm

from memspan.base import BadInput
from memspan.base.files import load_state, save_state
from memspan.ledger import Ledger, plan, saved_bytes
from memspan.nn.reversible import (
    MEMORY,
    ReversibleBlock,
    ReversibleSequential,
    StackedReversible,
    frozen_statistics,
    reconstruction_error,
)

Part = Callable[[], nn.Module]


def conv_part(channels: int = 4, *more: Part) -> nn.Module:
    convolution = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    return nn.Sequential(nn.GroupNorm(2, channels), nn.LeakyReLU(0.01), convolution, *(one() for one in more))


def chain_of(count: int, part: Part = conv_part, **options: object) -> ReversibleSequential:
    blocks = (ReversibleBlock(part(), part()) for _ in range(count))
    return randomised(ReversibleSequential(*blocks, **options))  # type: ignore[arg-type]


def randomised(chain: ReversibleSequential) -> ReversibleSequential:
    """Norms and biases drawn anew too, so that no part starts as the identity or at zero."""
    with torch.no_grad():
        for parameter in chain.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return chain


def step(
    chain: nn.Module, x: Tensor, seed: int = 3, times: int = 1
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Output and gradients of a loss that weighs every output differently."""
    chain.zero_grad()
    x = x.detach().requires_grad_(x.requires_grad)
    torch.manual_seed(seed)
    y = chain(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    loss = (weights * y).sum()
    for again in range(times):
        loss.backward(retain_graph=again + 1 < times)
    return y.detach(), x.grad, [p.grad for p in chain.parameters() if p.grad is not None]


def as_vector(x: Tensor | None, gradients: list[Tensor]) -> Tensor:
    return torch.cat([one.double().flatten() for one in ([] if x is None else [x]) + gradients])


def difference(chain: nn.Module, x: Tensor) -> float:
    """Largest relative difference of the reversible gradients from the stored ones."""
    found = {}
    for chain.memory in ("store", "reversible"):  # type: ignore[assignment]
        y, dx, gradients = step(chain, x)
        found[chain.memory] = (y, as_vector(dx, gradients))
    assert torch.equal(found["store"][0], found["reversible"][0])
    a, b = found["store"][1], found["reversible"][1]
    return float((a - b).norm() / a.norm())


def hooked_bytes(run: Callable[[], Tensor], known: list[Tensor]) -> int:
    """Bytes of distinct storages that saved-tensor hooks see, without those of ``known``."""
    seen: dict[int, int] = {}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    for tensor in known:
        seen.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(seen.values())


# ---- the same numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 4, 16, 64])
def test_gradients_equal_those_of_the_stored_network_in_float64(count: int) -> None:
    chain = chain_of(count).double()
    assert difference(chain, torch.randn(2, 8, 6, 6, dtype=torch.double, requires_grad=True)) <= 1e-11


@pytest.mark.parametrize("count", [4, 64])
def test_float32_gradients_stay_close_to_64_couplings(count: int) -> None:
    assert difference(chain_of(count), torch.randn(2, 8, 8, 8, requires_grad=True)) <= 1e-5


def test_inversion_gives_the_input_back_at_16_couplings() -> None:
    chain, x = chain_of(16).double(), torch.randn(2, 8, 6, 6, dtype=torch.double)
    with torch.no_grad():
        back = chain.inverse(chain(x))
    assert float((back - x).abs().max()) <= 1e-12 * float(x.abs().max())
    errors = reconstruction_error(chain, x)
    assert len(errors) == 16
    assert max(errors) <= 1e-12


def test_momentum_chains_invert_and_have_the_gradients_of_the_stored_network() -> None:
    chain = randomised(
        ReversibleSequential(*(StackedReversible(conv_part(), 0.8) for _ in range(6)))
    ).double()
    x = torch.randn(2, 8, 6, 6, dtype=torch.double, requires_grad=True)
    assert difference(chain, x) <= 1e-11
    state, momentum = x.detach().chunk(2, 1)
    part = chain.blocks[0]
    momentum = 0.8 * momentum + 0.2 * part.f(state)  # type: ignore[operator]
    assert torch.allclose(part(x), torch.cat((state + momentum, momentum), 1), rtol=1e-12)
    assert torch.allclose(chain.inverse(chain(x)), x, atol=1e-10)


def test_gradients_pass_gradcheck() -> None:
    chain = chain_of(2).double()
    x = torch.randn(1, 8, 3, 3, dtype=torch.double, requires_grad=True)
    parameters = tuple(chain.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: chain(x), (x, *parameters), fast_mode=True)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]  # type: ignore[no-any-return]


def test_tokens_images_and_recurrent_parts_are_coupled_along_any_dimension() -> None:
    tokens = lambda: nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 6), nn.GELU(), nn.Linear(6, 3))  # noqa: E731
    for part in (tokens, Recurrent):
        blocks = (ReversibleBlock(part(), part(), -1) for _ in range(3))
        chain = ReversibleSequential(*blocks, split_dim=-1).double()
        assert difference(chain, torch.randn(2, 5, 6, dtype=torch.double, requires_grad=True)) <= 1e-11


@settings(max_examples=25, deadline=None)
@given(
    widths=st.integers(1, 3), count=st.integers(1, 4), batch=st.integers(1, 3),
    frozen=st.lists(st.booleans(), min_size=4, max_size=4), wants=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_mix_of_frozen_and_trained_parts_has_the_gradients_of_the_stored_network(
    widths: int, count: int, batch: int, frozen: list[bool], wants: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    part = lambda: nn.Sequential(nn.Linear(widths, widths), nn.Tanh())  # noqa: E731
    chain = ReversibleSequential(*(ReversibleBlock(part(), part()) for _ in range(count))).double()
    for block, still in zip(chain.blocks, frozen, strict=False):
        block.f.requires_grad_(not still)  # type: ignore[union-attr, operator]
    x = torch.randn(batch, 2 * widths, dtype=torch.double, requires_grad=wants)
    assert difference(chain, x) <= 1e-11


# ---- what happens beside the gradients --------------------------------------------------------------------


def norms_of(chain: nn.Module) -> Iterator[nn.BatchNorm2d]:
    return (module for module in chain.modules() if isinstance(module, nn.BatchNorm2d))


@pytest.mark.parametrize("memory", ["reversible", "checkpoint"])
def test_batch_statistics_move_once_a_step_and_as_in_the_plain_run(memory: str) -> None:
    part = lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))  # noqa: E731
    plain = chain_of(3, part, memory="store")
    ours = copy.deepcopy(plain)
    ours.memory = memory  # type: ignore[assignment]
    x = torch.randn(4, 8, 5, 5)
    a, b = step(plain, x), step(ours, x)
    assert torch.allclose(as_vector(None, a[2]), as_vector(None, b[2]), rtol=1e-4, atol=1e-5)
    for one, two in zip(norms_of(plain), norms_of(ours), strict=True):
        assert int(two.num_batches_tracked) == 1
        assert torch.equal(one.running_mean, two.running_mean)  # type: ignore[arg-type]
        assert torch.equal(one.running_var, two.running_var)  # type: ignore[arg-type]
        assert two.track_running_stats
    before = {name: buffer.clone() for name, buffer in ours.eval().named_buffers()}
    step(ours, x)
    assert all(torch.equal(buffer, before[name]) for name, buffer in ours.named_buffers())


def test_frozen_statistics_end_with_the_block_also_after_an_error() -> None:
    norm = nn.BatchNorm1d(2)
    with pytest.raises(KeyError), frozen_statistics(norm):
        norm(torch.randn(4, 2))
        raise KeyError
    assert int(norm.num_batches_tracked) == 0
    norm(torch.randn(4, 2))
    assert int(norm.num_batches_tracked) == 1
    with frozen_statistics(norm.eval()):  # evaluation uses the running ones
        x = torch.randn(4, 2)
        assert torch.allclose(
            norm(x), (x - norm.running_mean) / (norm.running_var + norm.eps).sqrt(), atol=1e-6
        )


@pytest.mark.parametrize("memory", ["reversible", "checkpoint"])
def test_dropout_repeats_its_masks_and_disturbs_no_other_draw(memory: str) -> None:
    chain = chain_of(4, lambda: conv_part(4, lambda: nn.Dropout(0.5))).double()
    x = torch.randn(2, 8, 5, 5, dtype=torch.double, requires_grad=True)
    chain.memory = "store"
    y, dx, gradients = step(chain, x)
    state = torch.get_rng_state()
    chain.memory = memory  # type: ignore[assignment]
    z, dz, others = step(chain, x)
    assert torch.equal(y, z)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.allclose(as_vector(dx, gradients), as_vector(dz, others), rtol=1e-11, atol=1e-12)
    torch.manual_seed(0)
    assert not torch.equal(chain(x), chain(x))


def test_without_preserved_state_dropout_draws_other_masks_and_nothing_is_kept() -> None:
    chain = chain_of(2, lambda: conv_part(4, lambda: nn.Dropout(0.5)), preserve_rng_state=False)
    x = torch.randn(2, 8, 5, 5, requires_grad=True)
    y = chain(x)
    assert saved_bytes(y, exclude=[x]) == y.nbytes
    chain.preserve_rng_state = True
    assert saved_bytes(chain(x), exclude=[x]) > y.nbytes


def test_a_plan_counts_the_states_that_repeat_dropout() -> None:
    for dropout in (0.0, 0.5):
        chain = chain_of(3, lambda p=dropout: conv_part(4, lambda: nn.Dropout(p)))  # type: ignore[misc]
        x = torch.randn(2, 8, 5, 5)
        told = plan(chain, (x, torch.zeros_like(x)), loss=F.mse_loss, optimizer=None)
        chain.zero_grad(set_to_none=True)
        batch = x, torch.zeros_like(x)
        with Ledger(chain, inputs=batch) as ledger:
            F.mse_loss(chain(batch[0]), batch[1]).backward()
        assert told.total == ledger.peak.total


def test_what_is_kept_does_not_grow_with_depth_and_the_ledger_sees_it() -> None:
    x = torch.randn(2, 8, 16, 16, requires_grad=True)
    kept: dict[str, list[int]] = {memory: [] for memory in MEMORY}
    for count in (1, 2, 3, 4):
        chain = chain_of(count)
        for chain.memory in MEMORY:
            known = [x, *chain.parameters()]
            kept[chain.memory].append(hooked_bytes(lambda: chain(x), known))  # noqa: B023
            if chain.memory == "reversible":
                assert saved_bytes(chain(x), exclude=[x]) == x.nbytes
    assert kept["reversible"] == [x.nbytes] * 4
    assert [b - a for a, b in pairwise(kept["checkpoint"])] == [x.nbytes] * 3
    small = 2 * 2 * 2 * 2 * 4  # mean and spread of two groups, two examples, two norms, 4 bytes
    assert [b - a for a, b in pairwise(kept["store"])] == [3 * x.nbytes + small] * 3


def test_the_ledger_counts_the_kept_output_as_saved_at_the_end_of_the_forward_pass() -> None:
    chain, x = chain_of(4), torch.randn(2, 8, 16, 16)
    with Ledger(chain, inputs=[x]) as ledger:
        loss = chain(x).square().mean()
        loss.backward()
    assert ledger.peak.category("saved_activations") >= x.nbytes


# ---- a good citizen of autograd ---------------------------------------------------------------------------


def test_an_input_without_gradient_still_trains_the_parameters() -> None:
    chain = chain_of(3).double()
    _, dx, gradients = step(chain, torch.randn(2, 8, 5, 5, dtype=torch.double))
    assert dx is None
    assert len(gradients) == len(list(chain.parameters()))
    assert all(float(one.abs().sum()) > 0 for one in gradients)


def test_frozen_parameters_get_no_gradient_and_no_error() -> None:
    chain = chain_of(2)
    chain.blocks[0].f.requires_grad_(False)  # type: ignore[union-attr, operator]
    step(chain, torch.randn(2, 8, 5, 5))
    assert all(p.grad is None for p in chain.blocks[0].f.parameters())  # type: ignore[union-attr, operator]
    assert all(p.grad is not None for p in chain.blocks[0].g.parameters())  # type: ignore[union-attr, operator]
    chain.requires_grad_(False)
    assert chain(torch.randn(2, 8, 5, 5)).grad_fn is None
    x = torch.randn(2, 8, 5, 5, requires_grad=True)
    assert step(chain, x)[1] is not None


def test_a_part_used_twice_gets_the_sum_of_its_gradients() -> None:
    shared = conv_part()
    chain = ReversibleSequential(*(ReversibleBlock(shared, conv_part()) for _ in range(3))).double()
    assert difference(chain, torch.randn(2, 8, 5, 5, dtype=torch.double, requires_grad=True)) <= 1e-11


def test_asking_for_gradients_of_the_input_fills_no_grad() -> None:
    chain, x = chain_of(3), torch.randn(2, 8, 5, 5, requires_grad=True)
    (dx,) = torch.autograd.grad(chain(x).square().sum(), x)
    assert dx.shape == x.shape
    assert x.grad is None
    assert all(p.grad is None for p in chain.parameters())


def test_two_backward_passes_give_exactly_doubled_gradients() -> None:
    chain, x = chain_of(3, lambda: conv_part(4, lambda: nn.Dropout(0.5))), torch.randn(2, 8, 5, 5)
    once = step(chain, x)[2]
    once = [one.clone() for one in once]
    twice = step(chain, x, times=2)[2]
    assert all(torch.equal(2 * one, two) for one, two in zip(once, twice, strict=True))


def test_second_derivatives_are_refused_with_the_remedy() -> None:
    chain, x = chain_of(1), torch.randn(2, 8, 5, 5, requires_grad=True)
    with pytest.raises(BadInput, match=r'create_graph.*memory="store"'):
        torch.autograd.grad(chain(x).square().sum(), x, create_graph=True)
    chain.memory = "store"
    (dx,) = torch.autograd.grad(chain(x).square().sum(), x, create_graph=True)
    dx.square().sum().backward()


def test_hooks_of_parameters_fire_once_on_the_whole_gradient() -> None:
    shared = conv_part()
    chain = ReversibleSequential(ReversibleBlock(shared, conv_part()), ReversibleBlock(shared, conv_part()))
    parameter, seen, after = next(shared.parameters()), [], []
    parameter.register_hook(lambda gradient: seen.append(gradient.clone()))
    parameter.register_post_accumulate_grad_hook(lambda one: after.append(one.grad.clone()))
    step(chain, torch.randn(2, 8, 5, 5))
    step(chain, torch.randn(2, 8, 5, 5))
    assert len(seen) == len(after) == 2
    assert torch.equal(seen[1], after[1])


def test_parameters_given_from_outside_are_used_and_trained() -> None:
    chain = chain_of(2).double()
    x = torch.randn(2, 8, 5, 5, dtype=torch.double)
    given = {name: (1.1 * p.detach()).requires_grad_() for name, p in chain.named_parameters()}
    found = {}
    for chain.memory in ("store", "reversible"):
        y = functional_call(chain, given, (x,))
        found[chain.memory] = torch.autograd.grad(y.square().sum(), list(given.values()))
    assert all(p.grad is None for p in chain.parameters())
    for a, b in zip(found["store"], found["reversible"], strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_weights_or_output_changed_before_the_backward_pass_are_refused() -> None:
    chain, x = chain_of(2), torch.randn(2, 8, 5, 5)
    loss = chain(x).sum()
    with torch.no_grad():
        next(chain.parameters()).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    y = chain(x)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_the_kept_output_can_be_offloaded_by_saved_tensor_hooks() -> None:
    chain, x = chain_of(3).double(), torch.randn(2, 8, 5, 5, dtype=torch.double, requires_grad=True)
    expected = step(chain, x)
    with torch.autograd.graph.save_on_cpu():
        found = step(chain, x)
    assert torch.equal(as_vector(*expected[1:]), as_vector(*found[1:]))


# ---- precision --------------------------------------------------------------------------------------------


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a, b, 0))


def test_autocast_keeps_float32_streams_and_the_gradients_of_plain_autocast() -> None:
    chain, x = chain_of(8), torch.randn(2, 8, 12, 12, requires_grad=True)
    types: list[torch.dtype] = []
    chain.blocks[3].f[2].register_forward_hook(lambda _m, _i, out: types.append(out.dtype))  # type: ignore[union-attr, operator, index]
    found = {}
    for chain.memory in ("store", "reversible"):
        with torch.autocast("cpu", torch.bfloat16):
            chain.zero_grad()
            y = chain(x)
        assert y.dtype == torch.float32
        y.square().sum().backward()  # outside of autocast, as usual
        found[chain.memory] = as_vector(None, [p.grad.clone() for p in chain.parameters()])  # type: ignore[union-attr]
    assert set(types) == {torch.bfloat16}
    assert len(types) == 3  # the forward passes, and the one that is run again
    assert cosine(found["store"], found["reversible"]) >= 0.999


def test_streams_in_bfloat16_come_back_worse_by_orders_of_magnitude() -> None:
    chain, x = chain_of(8).bfloat16(), torch.randn(2, 8, 12, 12, dtype=torch.bfloat16)
    low = max(reconstruction_error(chain, x))
    assert low > 1e-3 > 1e-5 > max(reconstruction_error(chain.float(), x.float()))


def test_autocast_casts_are_not_left_for_code_that_needs_their_graph() -> None:
    chain, x = chain_of(1), torch.randn(2, 8, 5, 5)
    convolution = chain.blocks[0].f[2]  # type: ignore[union-attr, index]
    with torch.autocast("cpu", torch.bfloat16):
        unused = chain(x)
        convolution(x[:, :4]).float().sum().backward()  # the same weight once more, outside of the chain
    assert unused.requires_grad
    assert float(convolution.weight.grad.abs().sum()) > 0


def test_the_guard_names_the_first_bad_block_and_stays_quiet_on_good_chains() -> None:
    good = chain_of(4, check_every=2)
    for _ in range(4):
        step(good, torch.randn(2, 8, 5, 5))
    bad = chain_of(4, check_every=2)
    with torch.no_grad():  # so large that what was added drowns what was there
        bad.blocks[2].f[2].weight.mul_(1e9)  # type: ignore[union-attr, index]
    step(bad, torch.randn(2, 8, 5, 5))  # not checked: every second pass is
    with pytest.raises(ArithmeticError, match=r"first bad block is blocks\.2"):
        step(bad, torch.randn(2, 8, 5, 5))


# ---- stored, copied, exported -----------------------------------------------------------------------------


def test_copies_files_and_exports_give_the_same_outputs(tmp_path: Path) -> None:
    chain, x = chain_of(3), torch.randn(2, 8, 5, 5)
    expected = chain(x)
    assert torch.equal(copy.deepcopy(chain)(x), expected)
    save_state(tmp_path / "chain.safetensors", chain.state_dict())
    for memory in MEMORY:
        other = chain_of(3, memory=memory)
        assert list(other.state_dict()) == list(chain.state_dict())
        other.load_state_dict(load_state(tmp_path / "chain.safetensors")[0])
        assert torch.equal(other(x), expected)
    exported = torch.export.export(chain.eval(), (x,)).module()
    assert torch.allclose(exported(x), expected, atol=1e-6)
    with torch.inference_mode():
        assert torch.equal(chain(x), expected)


# ---- bad input --------------------------------------------------------------------------------------------


class Widens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[..., :1]


class Doubles(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.double()


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize(
    ("part", "told"),
    [
        (Widens(), "keep the shape"),
        (Doubles(), "keep the dtype"),
        (nn.ReLU(inplace=True), "in place"),
        (nn.Sequential(nn.LeakyReLU(inplace=True), nn.Conv2d(4, 4, 1)), "in place"),
    ],
)
def test_parts_that_cannot_be_undone_are_refused_by_name(memory: str, part: nn.Module, told: str) -> None:
    fine = ReversibleBlock(conv_part(), conv_part())
    chain = ReversibleSequential(fine, ReversibleBlock(conv_part(), part), memory=memory)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match=rf"blocks\.1\.g.*{told}"):
        chain(torch.randn(2, 8, 5, 5, requires_grad=True))


def test_odd_channels_whole_numbers_and_unknown_ways_are_refused() -> None:
    chain = chain_of(1)
    with pytest.raises(BadInput, match="7 entries; an even number"):
        chain(torch.randn(2, 7, 5, 5))
    with pytest.raises(BadInput, match="floating"):
        chain(torch.zeros(2, 8, 5, 5, dtype=torch.long))
    with pytest.raises(BadInput, match="memory='none'"):
        chain.memory = "none"  # type: ignore[assignment]
    with pytest.raises(BadInput, match="one block or more"):
        ReversibleSequential()
    with pytest.raises(BadInput, match=r"blocks\[0\]: pair two modules"):
        ReversibleSequential(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(BadInput, match=r"blocks\[0\] splits -1"):
        ReversibleSequential(ReversibleBlock(nn.Identity(), nn.Identity(), -1))
    with pytest.raises(BadInput, match="decay=1"):
        StackedReversible(nn.Identity(), 1.0)


def test_state_that_moves_when_a_part_runs_is_warned_of_once() -> None:
    part = lambda: spectral_norm(nn.Conv2d(4, 4, 1))  # noqa: E731
    chain = ReversibleSequential(ReversibleBlock(part(), part()))
    x = torch.randn(2, 8, 5, 5)
    with pytest.warns(UserWarning, match=r"blocks\.0\.f\.parametrizations.*changed in the forward pass"):
        step(chain, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(chain, x)
        step(chain_of(1, lambda: nn.BatchNorm2d(4)), x)


@pytest.mark.parametrize("memory", ["reversible", "checkpoint"])
@pytest.mark.parametrize("first", [True, False])
def test_a_mode_switched_between_the_passes_is_refused_and_switched_back_is_right(
    memory: Any, first: bool
) -> None:
    torch.manual_seed(0)
    blocks = [
        ReversibleBlock(
            nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
        )
        for _ in range(2)
    ]
    chain, x = ReversibleSequential(*blocks, memory=memory).train(first), torch.randn(6, 8)
    loss = chain(x).square().sum()
    chain.train(not first)
    with pytest.raises(RuntimeError, match="switched to"):
        loss.backward()
    torch.manual_seed(1)
    loss = chain(x).square().sum()
    chain.train(first)  # a look at other data between the passes
    chain.train(not first)
    loss.backward()
    found = [p.grad.clone() for p in chain.parameters() if p.grad is not None]
    chain.zero_grad()
    chain.memory = "store"
    torch.manual_seed(1)
    chain(x).square().sum().backward()
    for a, p in zip(found, chain.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, atol=1e-4, rtol=1e-4)
