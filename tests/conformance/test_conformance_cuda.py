"""Each component computes on a GPU what it computes on the CPU, and each recipe runs there and resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from conformance.contracts import System, _projection, calibrated, examples, made, randomised, reachable
from conformance.systems import SYSTEMS
from memspan.base.files import load_state, save_state
from memspan.recipes.engine import execute
from memspan.recipes.engine.registry import find

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NETWORKS = [system for system in SYSTEMS if system.kind in ("module", "inplace")]
LEARNERS = [system for system in SYSTEMS if system.kind == "learner"]
ON_CUDA = [name for name in sorted({system.story for system in SYSTEMS}) if "cuda" in find(name).devices]


@pytest.fixture(autouse=True)
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN rounds to 10 bits unless told otherwise: that is not what is compared here."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def given(system: System, device: str) -> Any:
    return tuple(part.to(device) for part in examples(system))


def step(system: System, module: nn.Module, device: str) -> dict[str, Tensor]:
    """What a module answers, and the gradient of every parameter."""
    module.zero_grad()
    answer = module.eval()(*given(system, device))
    found = {} if isinstance(answer, tuple) else {"answer": answer.detach()}
    (system.loss(answer) if system.loss is not None else _projection(_to_cpu(answer))).backward()
    found |= {name: one.grad for name, one in module.named_parameters() if one.grad is not None}
    return {name: one.detach().cpu().double() for name, one in found.items()}


def _to_cpu(answer: Any) -> Any:
    if isinstance(answer, Tensor):
        return answer.cpu()
    return type(answer)(_to_cpu(one) for one in answer)


def far(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm().clamp_min(1e-12))


@pytest.mark.parametrize("system", NETWORKS, ids=lambda system: system.name)
def test_a_component_computes_the_same_on_both_devices(system: System, tmp_path: Path) -> None:
    module = calibrated(system, randomised(made(system)))
    expected = step(system, module, "cpu")
    save_state(tmp_path / "cpu.safetensors", module.state_dict())
    module.zero_grad()
    module.to("cuda")
    left = [path for path, one in reachable(module) if isinstance(one, Tensor) and not one.is_cuda]
    assert not left
    found = step(system, module, "cuda")
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        assert far(found[name], one) < 1e-3, name
    save_state(tmp_path / "cuda.safetensors", module.state_dict())
    states = [load_state(tmp_path / f"{device}.safetensors")[0] for device in ("cpu", "cuda")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("system", NETWORKS, ids=lambda system: system.name)
def test_a_component_trains_in_half_precision(system: System) -> None:
    """Under autocast the gradients follow float32's."""
    if system.name == "memoryformer":
        pytest.skip("a sign that rounding turns reads another row: no close answer is promised")
    module = calibrated(system, randomised(made(system))).to("cuda")
    exact = step(system, module, "cuda")
    with torch.autocast("cuda", torch.float16):
        rough = step(system, module, "cuda")
    assert rough.keys() == exact.keys()
    whole = [torch.cat([one.flatten() for one in found.values()]) for found in (rough, exact)]
    assert torch.nn.functional.cosine_similarity(whole[0], whole[1], 0) > 0.97


@pytest.mark.parametrize("system", LEARNERS, ids=lambda system: system.name)
def test_a_learner_learns_there_and_its_state_comes_back(system: System) -> None:
    assert system.build is not None
    learner, other = system.build(0), system.build(0)
    learner.device = "cuda"
    for X, y in examples(system):
        learner.partial_fit_task(X, y)
    other.load_state_dict({name: one.cpu() for name, one in learner.state_dict().items()})
    X = np.concatenate([task[0] for task in examples(system)])
    one, two = (np.asarray(each.decision_function(X)) for each in (learner, other))
    assert np.abs(one - two).max() < 1e-2 * np.abs(two).max()


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_CUDA)
def test_a_recipe_runs_there(name: str, tmp_path: Path) -> None:
    """It says so in its result, and the device's memory was used."""
    recipe = find(name)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    done = execute(recipe, recipe.tiny or recipe.quick, seeds=1, device="cuda", out=tmp_path / "run")
    assert done.result.environment["device"] == "cuda"
    assert torch.cuda.max_memory_allocated() > before
    assert done.result.claims
    numbers = [value for one in done.result.measurements for value in one.quality.values()]
    assert np.isfinite(numbers).all()
