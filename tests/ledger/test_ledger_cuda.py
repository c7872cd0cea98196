"""Planner, ledger and CUDA's allocator on one step: three levels of truth on the device itself."""

from __future__ import annotations

import gc

import pytest
import torch

from memspan.base import BadInput
from memspan.ledger import AllocatorPeak, Ledger, fit, methods, verify
from memspan.ledger.planner import job
from memspan.ledger.workspaces import workspace_bytes
from memspan.recipes.ledger.models import GPT, classify, model_cases

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SIZES = {"MLP": 16384, "CNN": 512, "GPT": 64, "BERT": 256, "U-Net": 256, "EfficientNet-Lite0": 128}
CASES = {case.name: case for case in model_cases()}
DRAWN = ("slimfit",)  # which layers rest depends on how far weights moved, which a trace does not know


def batch_of(kind: str, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    count = torch.arange(size, device="cuda")
    images, labels = torch.rand(size, 3, 32, 32, device="cuda"), count % 4
    tokens = (torch.arange(size * 128, device="cuda") % 1000).view(size, 128)
    return {
        "flat": (torch.rand(size, 256, device="cuda"), labels),
        "image": (images, labels),
        "pixels": (images, labels.view(size, 1, 1).expand(size, 32, 32).contiguous()),
        "next": (tokens, tokens.clone()),
        "text": (tokens, labels),
    }[kind]


@pytest.fixture(autouse=True)
def clean() -> None:
    """Nothing of an earlier test's: its tensors are gone, and so are cuBLAS's workspaces."""
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()


@pytest.mark.parametrize("method", ["", *(name for name in methods() if name not in DRAWN)])
@pytest.mark.parametrize("name", CASES)
def test_a_plan_is_within_two_percent_of_the_allocator(name: str, method: str) -> None:
    """The promise is five; what is left is how the allocator cuts its blocks."""
    case, size = CASES[name], SIZES[name]
    before = torch.cuda.memory_allocated()
    one = job(
        case.build,
        batch_of(case.kind, size),
        method=[method] if method else [],
        loss=classify,
        device="cuda",
    )
    try:
        model, optimizer = one.ready()
    except BadInput as error:
        pytest.skip(f"{method} refuses {name}: {error}")
    model.train()
    batch = one.real_batch()
    one.step(model, optimizer, batch)
    with AllocatorPeak("cuda") as truth:
        one.step(model, optimizer, batch)
    del model, optimizer
    gc.collect()
    traced = one.trace(size)
    assert traced.exact, traced.note
    assert traced.total == pytest.approx(truth.peak - before, rel=0.02)


def test_the_ledger_of_a_real_step_is_the_trace_less_kernels() -> None:
    one = job(GPT, batch_of("next", 64), loss=classify, device="cuda")
    model, optimizer = one.ready()
    batch = one.real_batch()
    one.step(model, optimizer, batch)
    with Ledger(model, optimizer, inputs=batch) as led:
        one.step(model, optimizer, batch)
    real, traced = dict(led.peak.by_category), dict(one.trace(64).by_category)
    assert traced.pop("temporaries.kernel") > 0
    state = [found.pop("optimizer_state") for found in (real, traced)]
    assert state[0] == pytest.approx(state[1], rel=0.01)  # a fake step counter stands on the device
    assert real == pytest.approx(traced, rel=1e-4)


def test_the_batch_found_runs_within_the_budget_and_one_more_does_not() -> None:
    found = fit(GPT, batch_of("next", 2), "600MiB", methods=[], loss=classify, device="cuda")
    assert found.best is not None
    assert found.best.exact
    done = verify(found.best)
    assert 0.98 * found.budget.bytes < done.allocator <= found.budget.bytes
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    more = found.best.job
    assert more is not None
    assert more.trace(found.best.batch + 1).total > found.budget.bytes


def test_the_workspaces_are_what_the_allocator_keeps() -> None:
    x = torch.rand(64, 64, device="cuda", requires_grad=True)
    before = torch.cuda.memory_allocated()
    (x @ x).sum().backward()
    grown = torch.cuda.memory_allocated() - before
    expected = workspace_bytes({(False, False), (True, False)}, torch.cuda.get_device_capability())
    assert grown == pytest.approx(expected, abs=1 << 20)
