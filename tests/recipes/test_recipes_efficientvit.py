"""The recipe of EfficientViT: what it measures, and that its claims are read from the right rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from memspan.models import EfficientViT
from memspan.recipes import _efficientvit_networks as nets
from memspan.recipes import efficientvit as recipe
from memspan.recipes.engine import Measurements, execute
from memspan.report.schema import Measurement


def test_compared_kinds_of_attention_have_parameters_within_three_percent() -> None:
    options = recipe.Options()
    counts = {
        kind: sum(p.numel() for p in EfficientViT(options.size, 3, 10, options.widths, **extra).parameters())
        for kind, extra in recipe.KINDS.items()
    }
    for kind in (recipe.GROUP, recipe.MHSA):
        assert abs(counts[kind] / counts[recipe.CGA] - 1) < 0.03
    assert counts[recipe.NONE] < counts[recipe.CGA]


def timed(method: str, turn: int, batch: int, memory: float, compute: float) -> Measurement:
    return Measurement(
        method=method,
        seed=turn,
        setting={"part": "speed", "batch": batch},
        quality={},
        bytes={"parameters": 1},
        seconds={"memory-bound": memory, "compute-bound": compute},
        flops=2 * 521_583_104 * batch,
    )


def trained(method: str, seed: int, accuracy: float, similarity: float) -> Measurement:
    return Measurement(
        method=method,
        seed=seed,
        setting={"part": "training"},
        quality={"accuracy": accuracy, "head_similarity": similarity},
        bytes={"parameters": 1},
        seconds={},
    )


def test_claims_are_decided_by_ratios_inside_rounds_and_differences_inside_seeds() -> None:
    rows = []
    for turn in range(5):  # fewer equal ratios decide nothing
        load = 1 + turn  # another load in each round; ratios do not feel it
        for batch in (1, 8):
            slow = 0.5 if batch == 1 else 2.0
            rows += [
                timed(nets.M5, turn, batch, 0.1 * load, 0.9 * load),
                timed(nets.MOBILENET_V3, turn, batch, 0.0, slow * load),
                timed(nets.TIMM_FUSED, turn, batch, 0.0, 0.9 * load),
                timed(nets.DEIT, turn, batch, 0.4 * load, 0.6 * load),
            ]
    for seed in range(5):
        base = 40.0 + 5 * seed
        rows += [trained(recipe.CGA, seed, base, 0.5), trained(recipe.MHSA, seed, base + 1, 0.9)]
    claims = {claim.text: claim for claim in recipe.judge(Measurements(rows), recipe.Options())}

    def told(start: str) -> tuple[float | None, bool | None]:
        (found,) = [claim for text, claim in claims.items() if text.startswith(start)]
        return found.measured, found.holds

    assert told("M5 outruns MobileNetV3-Large at 8 images") == (pytest.approx(2), True)
    assert told("M5 outruns MobileNetV3-Large at one image") == (pytest.approx(0.5), False)
    assert told("M5 fused keeps up with timm's M5 fused") == (pytest.approx(0.9), False)
    assert told("M2 outruns MobileViT") == (None, None)
    assert told("M5 waits for memory a smaller share") == (pytest.approx(-30), True)
    assert told("M5 needs 522 million multiply-adds") == (pytest.approx(521.583104), True)
    assert told("Cascaded groups beat multi-head attention") == (pytest.approx(-1), False)
    assert told("Heads are less alike") == (pytest.approx(-0.4), True)


@pytest.mark.slow
def test_a_run_measures_both_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nets, "timm_models", lambda: (None, "Networks of other libraries are absent."))
    small = {nets.M5: nn.Sequential(nn.Conv2d(3, 8, 16, 16), nn.ReLU()), nets.DEIT: nn.Conv2d(3, 8, 16, 16)}
    monkeypatch.setattr(nets, "contestants", lambda timm: small)
    assert recipe.RECIPE.tiny is not None
    options = replace(recipe.RECIPE.tiny, rounds=2, batches=(1, 2))
    finished = execute(recipe.RECIPE, options, seeds=1, out=tmp_path / "run")
    found = Measurements(finished.result.measurements)
    assert set(found.where(part="training").methods) == set(recipe.KINDS)
    assert len(found.where(part="speed")) == 2 * 2 * 2
    assert all(one.bytes["saved_activations"] > 0 for one in found.where(part="training"))
    assert all(one.flops for one in found)
    assert finished.result.notes == ["Networks of other libraries are absent."]
    assert finished.report is not None
    assert "Time of one image" in finished.report.read_text()


@pytest.mark.peers
@pytest.mark.parametrize("name", ["mobilenetv4_conv_small", "mobilevit_xxs"])
def test_folding_a_rivals_norms_keeps_its_outputs(timm: ModuleType, name: str) -> None:
    network = timm.create_model(name)
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    x = torch.randn(4, 3, 128, 128)
    with torch.no_grad():
        for norm in norms:
            norm.momentum = 1.0
        network.train()(x)
        before = network.eval()(x)
        after = nets.fuse_parts(network)(x)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in network.modules())
    assert (after - before).abs().max() <= 1e-4 * before.abs().max()


def test_the_plain_transformer_has_the_published_size() -> None:
    assert abs(sum(p.numel() for p in nets.deit_tiny().parameters()) / 5.68e6 - 1) < 0.01
