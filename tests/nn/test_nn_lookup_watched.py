"""Whoever watches a memory layer gets the layer and not what one input read."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from memspan.models import MemoryLinear
from memspan.nn.lookup import hash_codes_reference, hashed_lookup_sum, lookup_sum, lookup_sum_reference


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(MemoryLinear(12, 10, bits=4), nn.LayerNorm(10), MemoryLinear(10, 6, bits=5)).eval()


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_traced_network_serves_other_inputs_than_the_one_it_was_traced_with(
    net: nn.Module, grad: bool
) -> None:
    with torch.set_grad_enabled(grad):
        net(draw(1, 3, 12))  # a warm layer calls its kernel past the dispatcher: not while it is traced
        traced = torch.jit.trace(net, draw(1, 3, 12), check_trace=False)
        for seed, tokens in ((2, 3), (3, 7)):
            torch.testing.assert_close(traced(draw(seed, tokens, 12)), net(draw(seed, tokens, 12)))


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_network_serves_any_number_of_tokens(net: nn.Module, strict: bool) -> None:
    tokens = torch.export.Dim("tokens", min=2, max=64)
    program = torch.export.export(net, (draw(1, 3, 12),), dynamic_shapes=({0: tokens},), strict=strict)
    names = {str(node.target) for node in program.graph.nodes}
    assert {"memspan.hash_signs.default", "memspan.lookup_sum.default"} <= names
    for seed, n in ((2, 3), (3, 9)):
        torch.testing.assert_close(program.module()(draw(seed, n, 12)), net(draw(seed, n, 12)))


@pytest.mark.parametrize("grad", [False, True])
def test_it_compiles_whole_forward_and_backward(net: nn.Module, grad: bool) -> None:
    compiled = torch.compile(copy.deepcopy(net), fullgraph=True, backend="aot_eager")
    for seed in (1, 2):
        with torch.set_grad_enabled(grad):
            x = draw(seed, 3, 12).requires_grad_(grad)
            same = x.detach().clone().requires_grad_(grad)
            y, wanted = compiled(x), net(same)
            torch.testing.assert_close(y, wanted)
            if grad:
                y.square().sum().backward()
                wanted.square().sum().backward()
                torch.testing.assert_close(x.grad, same.grad)
    if grad:
        for a, b in zip(compiled.parameters(), net.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)


def test_per_sample_gradients_of_torch_func_equal_a_loop(net: nn.Module) -> None:
    x = draw(5, 4, 2, 12)
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(given: dict[str, Tensor], one: Tensor) -> Tensor:
        return torch.func.functional_call(net, given, (one,)).square().sum()

    many = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i, one in enumerate(x):
        net.zero_grad()
        net(one).square().sum().backward()
        for name, p in net.named_parameters():
            torch.testing.assert_close(many[name][i], p.grad)


def test_vmap_maps_tokens_and_tables_alike() -> None:
    x, tables = draw(1, 5, 3, 8), draw(2, 5, 2, 16, 7)
    own = torch.vmap(hashed_lookup_sum)(x, tables)
    shared = torch.vmap(lambda one: hashed_lookup_sum(one, tables[0]))(x)
    across = torch.vmap(lambda one: hashed_lookup_sum(one, tables[0]), in_dims=1)(x)
    for i in range(5):
        torch.testing.assert_close(own[i], lookup_sum_reference(*hash_codes_reference(x[i], 4), tables[i]))
        torch.testing.assert_close(shared[i], hashed_lookup_sum(x[i], tables[0]))
    for i in range(3):
        torch.testing.assert_close(across[i], hashed_lookup_sum(x[:, i], tables[0]))


def test_a_call_with_other_parameters_reads_these_parameters(net: nn.Module) -> None:
    x = draw(1, 3, 12)
    with torch.no_grad():
        net(x)
        other = {name: p + 1 for name, p in net.named_parameters()}
        got = torch.func.functional_call(net, other, (x,))
        again = copy.deepcopy(net)
        again.load_state_dict(other, strict=False)
        torch.testing.assert_close(got, again(x))


@pytest.mark.parametrize("grad", [False, True])
def test_each_row_read_counts_a_multiplication_and_an_addition(grad: bool) -> None:
    layer = MemoryLinear(12, 10, bits=4)
    with torch.set_grad_enabled(grad), FlopCounterMode(display=False) as counted:
        y = layer(draw(1, 3, 12).requires_grad_(grad))
    assert counted.get_total_flops() == 2 * 3 * 3 * 10
    if grad:
        with FlopCounterMode(display=False) as counted:
            y.sum().backward()
        assert counted.get_total_flops() == 2 * 2 * 3 * 3 * 10


def test_torchs_own_check_of_custom_operators_passes() -> None:
    x, tables = draw(1, 3, 8).requires_grad_(), draw(2, 2, 16, 5).requires_grad_()
    code, weight = hash_codes_reference(x.detach(), 4)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")  # the fourth adds up codes
    torch.library.opcheck(torch.ops.memspan.hash_signs.default, (x, 4, 2.0, False), test_utils=checks)
    torch.library.opcheck(
        torch.ops.memspan.lookup_sum.default, (code, weight.requires_grad_(), tables, False, "auto")
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("scaled", [False, True])
def test_without_a_kernel_torchs_operators_give_the_same_gradients(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, scaled: bool
) -> None:
    from memspan.nn import _lookup_ops

    monkeypatch.setattr(_lookup_ops, "kernels", frozenset)
    found = []
    for backend in ("reference", "auto"):
        x, tables = draw(1, 6, 8).to(dtype).requires_grad_(), draw(2, 2, 16, 5).to(dtype).requires_grad_()
        y = hashed_lookup_sum(x, tables, weight="scaled" if scaled else "prob", backend=backend)
        y.backward(draw(3, 6, 5).to(dtype))
        found.append((y.detach(), x.grad, tables.grad))
    for a, b in zip(*found, strict=True):
        close = {} if dtype == torch.float64 else {"atol": 0.05, "rtol": 0.02}
        torch.testing.assert_close(a, b, **close)


def test_a_second_derivative_is_refused_not_zero() -> None:
    x, tables = draw(1, 3, 8).requires_grad_(), draw(2, 2, 16, 5).requires_grad_()
    (first,) = torch.autograd.grad(hashed_lookup_sum(x, tables).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(first.sum(), x)
    code, weight = hash_codes_reference(x.detach(), 4)
    weight.requires_grad_()
    (first,) = torch.autograd.grad(lookup_sum(code, weight, tables).square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(first.sum(), tables)


@pytest.mark.filterwarnings("ignore")
def test_onnx_takes_it_as_gather_and_sum(net: nn.Module, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = tmp_path / "net.onnx"
    with torch.no_grad():
        program = torch.onnx.export(
            net, (draw(1, 3, 12),), dynamo=True, verbose=False, dynamic_shapes=({0: torch.export.Dim("n")},)
        )
    assert program is not None
    program.save(str(path))
    session = runtime.InferenceSession(str(path))
    (name,) = (one.name for one in session.get_inputs())
    for seed, n in ((2, 3), (3, 9)):
        (got,) = session.run(None, {name: draw(seed, n, 12).numpy()})
        torch.testing.assert_close(
            torch.from_numpy(got), net(draw(seed, n, 12)).detach(), atol=1e-5, rtol=1e-5
        )
