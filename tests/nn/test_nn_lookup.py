"""The weighted sum of table rows: every backend against gather and against torch's embedding_bag."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memspan.base import BadInput
from memspan.models import MemoryLinear
from memspan.nn import _lookup_cpu, lookup_sum, slot_usage
from memspan.nn.lookup import (
    Backend,
    available,
    hash_codes,
    hash_codes_reference,
    hashed_lookup_sum,
    lookup_sum_reference,
)

HERE = [name for name in ("embedding_bag", "cpu", "triton") if not available()[name]]
needs_kernel = pytest.mark.skipif("cpu" not in HERE, reason=available()["cpu"])


def draw(n: int, count: int, rows: int, out: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    return (
        torch.randint(rows, (n, count), dtype=torch.int32), torch.rand(n, count, dtype=dtype),
        torch.randn(count, rows, out, dtype=dtype),
    )  # fmt: skip


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("n", [1, 7, 63, 64, 65, 2048])
def test_all_backends_agree_forward_and_backward(backend: Backend, n: int) -> None:
    for bits in (2, 4, 8, 10):
        for out in (1, 37, 512):
            if n * out > 1 << 19 and bits != 8:
                continue  # one large case is enough
            x = torch.randn(n, 2 * bits)
            x[::3, ::5] = 0.0
            code, weight = hash_codes(x, bits)
            tables, dy = torch.randn(2, 2**bits, out), torch.randn(n, out)
            found = []
            for name in ("reference", backend):
                w, t = weight.clone().requires_grad_(), tables.clone().requires_grad_()
                y = lookup_sum(code, w, t, backend=name)
                y.backward(dy)
                found.append((y.detach(), w.grad, t.grad))
            for got, wanted in zip(found[1], found[0], strict=True):
                torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-5)


def test_it_equals_torchs_embedding_bag_forward_and_backward() -> None:
    code, weight, tables = draw(65, 5, 16, 37)
    index, dy = code.long() + 16 * torch.arange(5), torch.randn(65, 37, dtype=torch.float64)
    w, t = weight.clone().requires_grad_(), tables.clone().requires_grad_()
    peer = F.embedding_bag(index, t.view(80, 37), mode="sum", per_sample_weights=w)
    peer.backward(dy)
    ours_w, ours_t = weight.clone().requires_grad_(), tables.clone().requires_grad_()
    ours = lookup_sum(code, ours_w, ours_t)
    ours.backward(dy)
    torch.testing.assert_close(ours, peer)
    torch.testing.assert_close(ours_w.grad, w.grad)
    torch.testing.assert_close(ours_t.grad, t.grad)


@pytest.mark.parametrize("backend", ["reference", *HERE])
def test_gradcheck_and_only_visited_rows_receive_a_gradient(backend: Backend) -> None:
    if backend == "triton":
        pytest.skip("sums in float32, too coarse for gradcheck")
    code, weight, tables = draw(6, 3, 8, 4)
    weight.requires_grad_()
    tables.requires_grad_()
    assert torch.autograd.gradcheck(lambda w, t: lookup_sum(code, w, t, backend=backend), (weight, tables))
    lookup_sum(code, weight, tables, backend=backend).sum().backward()
    assert tables.grad is not None
    visited = tables.grad.abs().sum(-1) > 0
    for k in range(3):
        assert visited[k].nonzero().flatten().tolist() == code[:, k].unique().tolist()
    scattered = torch.zeros(24, 4, dtype=torch.float64)
    index = (code.long() + 8 * torch.arange(3)).flatten()
    scattered.index_add_(0, index, weight.detach().flatten()[:, None].expand(-1, 4))
    torch.testing.assert_close(tables.grad.view(24, 4), scattered)


@pytest.mark.parametrize("backend", HERE)
def test_a_sparse_gradient_holds_visited_rows_and_equals_the_dense_one(backend: Backend) -> None:
    code, weight, tables = draw(9, 4, 64, 6, torch.float32)
    grads = []
    for sparse in (False, True):
        t = tables.clone().requires_grad_()
        lookup_sum(code, weight, t, backend=backend, sparse=sparse).square().sum().backward()
        grads.append(t.grad)
    assert grads[1].is_sparse
    assert grads[1].sparse_dim() == 2
    assert grads[1]._values().shape[0] == sum(len(code[:, k].unique()) for k in range(4))
    torch.testing.assert_close(grads[1].to_dense(), grads[0])


def test_a_sparse_gradient_reaches_the_tables_through_both_portable_and_compiled_code() -> None:
    code, weight, tables = draw(5, 2, 8, 3, torch.float32)
    for backend in HERE:
        t = tables.clone().requires_grad_()
        optimizer = torch.optim.SparseAdam([t], lr=0.1)
        lookup_sum(code, weight, t, backend=backend, sparse=True).sum().backward()
        optimizer.step()
        moved = (t.detach() != tables).any(-1)
        assert moved.sum() == sum(len(code[:, k].unique()) for k in range(2))


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight", ["prob", "scaled"])
def test_compiled_hashing_and_the_whole_layer_equal_torchs_operators(dtype: torch.dtype, weight: Any) -> None:
    for bits in (1, 3, 8):
        for n in (1, 5, 70):
            x = torch.randn(n, 6 * bits, dtype=dtype)
            x[::2, ::4] = 0.0
            x[0, 0] = -0.0
            code, share = hash_codes(x, bits, weight=weight, temperature=0.7)
            wanted, wanted_share = hash_codes_reference(x, bits, 2 / 0.7, weight == "scaled")
            assert torch.equal(code, wanted)
            tight = 1e-12 if dtype == torch.float64 else 2e-6
            torch.testing.assert_close(share, wanted_share, rtol=tight, atol=0)
            tables, bias = torch.randn(6, 2**bits, 19).to(dtype), torch.randn(19).to(dtype)
            with torch.no_grad():
                y = hashed_lookup_sum(x, tables, bias, temperature=0.7, weight=weight)
            sums = lookup_sum_reference(code, share, tables)
            assert y.dtype == dtype
            torch.testing.assert_close(y, (sums + bias), **TOLERANCE[dtype])


TOLERANCE: dict[torch.dtype, dict[str, float]] = {
    torch.float32: {"atol": 1e-5, "rtol": 1e-5}, torch.float64: {"atol": 1e-12, "rtol": 1e-12},
    torch.bfloat16: {"atol": 0.1, "rtol": 2e-2}, torch.float16: {"atol": 1e-2, "rtol": 2e-3},
}  # fmt: skip


def test_the_layer_takes_any_layout_and_a_bias_of_another_kind() -> None:
    x, tables = torch.randn(3, 4, 12).transpose(0, 1), torch.randn(3, 5, 16).transpose(1, 2)
    bias = torch.randn(10, dtype=torch.float64)[::2]
    with torch.no_grad():
        y = hashed_lookup_sum(x, tables, bias)
    torch.testing.assert_close(y, lookup_sum_reference(*hash_codes_reference(x, 4), tables) + bias)
    assert hashed_lookup_sum(x[:0], tables).shape == (0, 3, 5)


@needs_kernel
@pytest.mark.parametrize("weight", ["prob", "scaled"])
def test_the_gradient_of_compiled_hashing_is_right_away_from_zero(weight: Any) -> None:
    x = torch.randn(4, 6, dtype=torch.float64)
    x = (x + x.sign() * 0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: hash_codes(v, 3, weight=weight, temperature=0.7)[1], (x,))
    zero = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    hash_codes(zero, 3, weight=weight)[1].sum().backward()
    assert zero.grad is not None
    assert not zero.grad.any()


@given(
    n=st.integers(0, 40), count=st.integers(1, 20), rows=st.integers(1, 40), out=st.integers(1, 40),
    seed=st.integers(0, 10**6),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_any_sizes_give_the_reference_sum(n: int, count: int, rows: int, out: int, seed: int) -> None:
    torch.manual_seed(seed)
    code, weight, tables = draw(n, count, rows, out)
    tables = tables[:, torch.randperm(rows)].transpose(0, 1).contiguous().transpose(0, 1)  # not contiguous
    torch.testing.assert_close(lookup_sum(code, weight, tables), lookup_sum_reference(code, weight, tables))


@needs_kernel
def test_threads_change_no_bit() -> None:
    torch.manual_seed(1)
    code, weight, tables = draw(700, 16, 32, 130, torch.float32)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        w, t = weight.clone().requires_grad_(), tables.clone().requires_grad_()
        y = lookup_sum(code, w, t, backend="cpu")
        y.square().sum().backward()
        found.append((y, w.grad, t.grad))
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_it_is_compiled_without_a_graph_break_and_follows_fake_tensors_and_vmap() -> None:
    from torch._subclasses import FakeTensorMode

    code, weight, tables = draw(5, 3, 8, 4, torch.float32)
    wanted = lookup_sum(code, weight, tables)
    traced = torch.compile(lookup_sum, backend="eager", fullgraph=True)
    torch.testing.assert_close(traced(code, weight, tables), wanted)
    many = torch.vmap(lambda c, w: lookup_sum(c, w, tables, backend="reference"))(
        code[:, None], weight[:, None]
    )
    torch.testing.assert_close(many[:, 0], wanted)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in (code, weight, tables)]
        assert lookup_sum(*fakes).shape == (5, 4)


def test_nan_comes_out_as_nan_and_is_refused_while_anomalies_are_looked_for() -> None:
    x = torch.randn(2, 8)
    x[1, 3] = torch.nan
    with torch.no_grad():
        y = hashed_lookup_sum(x, torch.randn(2, 16, 5))
    assert not y[0].isnan().any()
    assert y[1].isnan().all()
    with torch.autograd.set_detect_anomaly(True), pytest.raises(BadInput, match="NaN"):
        hash_codes(x, 4)


def test_usage_tells_shares_perplexity_and_dead_rows() -> None:
    code = torch.tensor([[0, 3], [1, 3], [2, 3], [3, 3]])
    usage = slot_usage(code, 4)
    assert usage.perplexity.tolist() == pytest.approx([4.0, 1.0])
    assert usage.entropy_bits.tolist() == pytest.approx([2.0, 0.0], abs=1e-6)
    assert usage.dead.tolist() == [0, 3]
    soft = slot_usage(F.one_hot(code, 4).float())
    assert torch.equal(soft.shares, usage.shares)
    torch.testing.assert_close(usage.shares.sum(-1), torch.ones(2))


@pytest.mark.parametrize(
    "call",
    [
        lambda c, w, t: lookup_sum(c + 7, w, t),
        lambda c, w, t: lookup_sum(c - 8, w, t),
        lambda c, w, t: lookup_sum(c + 7, w, t, backend="reference"),
        lambda c, w, t: lookup_sum(c + 7, w, t, backend="embedding_bag"),
        lambda c, w, t: lookup_sum(c.float(), w, t),
        lambda c, w, t: lookup_sum(c[:, :1], w, t),
        lambda c, w, t: lookup_sum(c, w[:1], t),
        lambda c, w, t: lookup_sum(c, w, t[0]),
        lambda c, w, t: lookup_sum(c, w, t.long()),
        lambda c, w, t: lookup_sum(c, w, t, backend="abacus"),
        lambda c, w, t: lookup_sum(c, w, torch.empty(1, 2**31 + 1, 1, device="meta")),
        lambda c, w, t: hash_codes(torch.zeros(2, 7), 2),
        lambda c, w, t: hash_codes(torch.zeros(2, 8, dtype=torch.long), 2),
        lambda c, w, t: hash_codes(torch.zeros(2, 34), 17),
        lambda c, w, t: hash_codes(torch.zeros(2, 8), 0),
        lambda c, w, t: hash_codes(torch.zeros(2, 8), 2, temperature=0.0),
        lambda c, w, t: hash_codes(torch.zeros(2, 8), 2, weight="other"),
        lambda c, w, t: hashed_lookup_sum(torch.zeros(2, 8), t),
        lambda c, w, t: hashed_lookup_sum(torch.zeros(2, 9), t[:, :7]),
        lambda c, w, t: slot_usage(c),
        lambda c, w, t: slot_usage(c, 2),
        lambda c, w, t: slot_usage(c[:0], 8),
        lambda c, w, t: slot_usage(torch.full((2, 3), -1.0)),
    ],
)
def test_bad_input_is_refused(call: Any) -> None:
    torch.manual_seed(0)
    code, weight, tables = draw(9, 3, 8, 4, torch.float32)
    code[0] = 1  # so that 7 more, or 8 less, leaves the table
    code[1] = 2
    with pytest.raises(BadInput):
        call(code, weight, tables)


def run_apart(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **environment},
    )
    return done.stdout


def test_importing_compiles_nothing_and_without_a_compiler_torch_does_the_work(tmp_path: Path) -> None:
    code = (
        "import torch, warnings\n"
        "import memspan.nn.lookup as lookup, pathlib, os\n"
        "print(list(pathlib.Path(os.environ['MEMSPAN_CACHE']).iterdir()))\n"
        "warnings.simplefilter('error')\n"
        "args = torch.zeros(2, 3, dtype=torch.int32), torch.ones(2, 3), torch.ones(3, 4, 5)\n"
        "try: lookup.lookup_sum(*args)\n"
        "except RuntimeWarning as told: print('no C++ compiler' in str(told))\n"
        "warnings.simplefilter('ignore')\n"
        "print(lookup.lookup_sum(*args).unique().tolist())\n"
        "print(lookup.hash_codes(torch.ones(1, 4), 2)[0].tolist())\n"
        "print('no C++ compiler' in lookup.available()['cpu'])\n"
    )
    told = run_apart(code, MEMSPAN_CACHE=str(tmp_path), CXX="no-such-compiler").split("\n")
    assert told[:5] == ["[]", "True", "[3.0]", "[[3, 3]]", "True"]


@needs_kernel
@pytest.mark.slow
def test_a_kernel_is_compiled_once_and_then_found(tmp_path: Path) -> None:
    """Three processes look for it, forked from one that has loaded torch and no kernel yet."""
    code = (
        "import os, pathlib\n"
        "from memspan.nn.lookup import available\n"
        "folder = pathlib.Path(os.environ['MEMSPAN_CACHE']) / 'kernels'\n"
        "def found():\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        print(repr(available()['cpu']), flush=True)\n"
        "        os._exit(0)\n"
        "    assert os.waitpid(child, 0)[1] == 0\n"
        "assert not folder.exists()\n"
        "found()\n"
        "(kept,) = folder.iterdir()\n"
        "first = kept.stat().st_mtime_ns\n"
        "found()\n"
        "assert kept.stat().st_mtime_ns == first\n"
        "kept.write_bytes(b'not a library')\n"
        "found()\n"
    )
    compiled, again, broken = run_apart(code, MEMSPAN_CACHE=str(tmp_path)).splitlines()
    assert compiled == again == "''"
    assert "''" not in broken


@needs_kernel
def test_without_pythons_headers_the_whole_layer_is_called_through_ctypes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, tables, bias = torch.randn(1, 12), torch.randn(3, 16, 5), torch.randn(5)
    ready = _lookup_cpu.Ready.of(tables, bias, 1.0, "prob")
    assert ready is not None
    with pytest.raises(TypeError):
        ready._run[1](0)
    with pytest.raises(TypeError):
        ready._run[1]("x", "y", 1, 0)

    def missing(path: str) -> None:
        raise ImportError(path)

    monkeypatch.setattr(_lookup_cpu, "_extension", missing)
    by_ctypes = _lookup_cpu._whole_of.__wrapped__(torch.float32)
    assert isinstance(by_ctypes[1], ctypes._CFuncPtr)  # type: ignore[attr-defined]
    first = ready(x, tables, bias)
    ready._run = by_ctypes
    second = ready(x, tables, bias)
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)


def test_a_compiler_that_fails_says_so(tmp_path: Path) -> None:
    failing = tmp_path / "compiler"
    failing.write_text("#!/bin/sh\ncase $1 in --version) echo 1;; *) echo no such flag >&2; exit 1;; esac\n")
    failing.chmod(0o755)
    code = "from memspan.nn.lookup import available; print(available()['cpu'])"
    assert "no such flag" in run_apart(code, MEMSPAN_CACHE=str(tmp_path / "cache"), CXX=str(failing))


TRITON = """
import torch
from memspan.nn.lookup import hashed_lookup_sum, lookup_sum
torch.manual_seed(0)
for n, K, R, out in ((1, 3, 4, 5), (19, 2, 16, 130)):
    code, g = torch.randint(R, (n, K)), torch.randn(n, out)
    tables, weight, found = torch.randn(K, R, out), torch.rand(n, K), []
    for backend, sparse in (("reference", False), ("triton", False), ("triton", True)):
        t, w = tables.clone().requires_grad_(), weight.clone().requires_grad_()
        y = lookup_sum(code, w, t, backend=backend, sparse=sparse)
        y.backward(g)
        found.append((y.detach(), w.grad, t.grad.to_dense()))
    for other in found[1:]:
        for a, b in zip(found[0], other):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
code[0] = 99
assert lookup_sum(code, weight, tables, backend="triton")[0].isnan().all()
for n, K, bits, out, dtype in (
    (1, 70, 3, 70, torch.float32), (3, 5, 4, 33, torch.float16),
    (2, 1, 1, 1, torch.float32), (0, 2, 2, 2, torch.float32),
):
    x, bias = torch.randn(n, K * bits).to(dtype), torch.randn(out).to(dtype)
    x[:1, :2], tables = 0.0, torch.randn(K, 2**bits, out).to(dtype)
    for weight in ("prob", "scaled"):
        for added in (bias, None):
            given = dict(temperature=0.7, weight=weight)
            with torch.no_grad():
                fast = hashed_lookup_sum(x, tables, added, backend="triton", **given)
            slow = hashed_lookup_sum(x, tables, added, backend="reference", **given)
            near = 1e-5 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(fast, slow, atol=near, rtol=near)
print("agree")
"""


@pytest.mark.slow
def test_the_triton_kernels_agree_under_their_interpreter() -> None:
    pytest.importorskip("triton")
    assert run_apart(TRITON, TRITON_INTERPRET="1").strip() == "agree"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "count", "out"), [(1, 512, 4096), (3, 64, 512), (200, 7, 130)])
def test_one_kernel_hashes_and_sums_on_a_device(n: int, count: int, out: int, dtype: torch.dtype) -> None:
    layer = MemoryLinear(8 * count, out, device="cuda", dtype=dtype)
    x = torch.randn(n, 8 * count, device="cuda", dtype=dtype)
    with torch.no_grad():
        fast = layer(x)
        slow = hashed_lookup_sum(x, layer.tables, layer.bias, backend="reference")
    assert fast.dtype == dtype
    assert float((fast - slow).float().norm() / slow.float().norm()) < (
        1e-5 if dtype == torch.float32 else 1e-2
    )


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_triton_kernels_agree_on_a_device(dtype: torch.dtype) -> None:
    code, weight, tables = draw(65, 5, 16, 130, torch.float32)
    tables = tables.to(dtype)
    dy, found = torch.randn(65, 130).to(dtype), []
    for device, backend in (("cpu", "reference"), ("cuda", "triton")):
        w = weight.detach().clone().to(device).requires_grad_()
        t = tables.detach().clone().to(device).requires_grad_()
        y = lookup_sum(code.to(device), w, t, backend=backend)
        y.backward(dy.to(device))
        found.append([one.detach().cpu().float() for one in (y, w.grad, t.grad)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4 if dtype == torch.float32 else 0.1, rtol=2e-2)
