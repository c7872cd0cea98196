"""The recipe of UniPT: its methods train what they say, and its claims are read from the right rows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from memspan.recipes import _unipt_tracks as tracks
from memspan.recipes import unipt as recipe
from memspan.recipes.engine import Measurements
from memspan.report.schema import Measurement
from memspan.training import unipt

OPTIONS = recipe.Options()


def case() -> tracks.Case:
    torch.manual_seed(0)
    x, mask, y = torch.rand(8, 16, 16), torch.ones(8, 16), torch.arange(8)
    return tracks.Case(
        "vit", False, tracks.PatchNet(), ["embed", "blocks.*"], (48,) * 4, 10, (".q", ".v"),
        {"train": (x, mask, y)}, {},
    )  # fmt: skip


@pytest.mark.parametrize("name", list(tracks.LIVE))
def test_every_method_trains_a_part_and_leaves_the_shared_encoder_alone(name):
    given = case()
    before = [p.clone() for p in given.encoder.parameters()]
    model = tracks.LIVE[name](given)
    x, mask, y = given.parts["train"]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    torch.nn.functional.cross_entropy(model(x, mask), y).backward()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, given.encoder.parameters(), strict=True))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == sum(p.numel() for p in model.parameters()) if name == "full" else trained < 12_000


@pytest.mark.parametrize("name", recipe.FROZEN)
def test_methods_on_hidden_states_are_those_beside_the_live_encoder(name):
    given = case()
    x, mask, _ = given.parts["train"]
    hidden = unipt.UniPT(given.fresh().eval(), given.taps).hidden(x)
    model = tracks.on_states(given, name)
    if name in tracks.LIVE:
        live = tracks.LIVE[name](given).eval()
        part = live.body.head if hasattr(live.body, "head") else None
        if part is not None:
            part.load_state_dict(model.body.state_dict())
        live.top.load_state_dict(model.top.state_dict())
        torch.testing.assert_close(live(x, mask), model(hidden, mask), rtol=1e-5, atol=1e-5)
    else:
        assert model(hidden, mask).shape == (8, 10)
        assert model.body.interaction == ("no interaction" not in name)
        assert (model.body.aggregate is None) == ("uniform" in name)


def test_recalls_count_pairs_that_rank_first():
    one = torch.eye(12)
    assert tracks.recalls(one, one) == {"R@1": 100.0, "R@5": 100.0, "Rsum": 600.0}
    shifted = tracks.recalls(one, one.roll(1, 0) + 0.1 * one)
    assert shifted["R@1"] == 0.0
    assert shifted["R@5"] == 100.0


class Words(nn.Module):
    """Two blocks over embedded tokens, with layers that low-rank adapters are put on."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"query": nn.Linear(8, 8), "norm": nn.LayerNorm(8)}) for _ in range(2)
        )
        self.last = nn.Identity()

    def forward(self, ids, attention_mask=None):
        h = self.embed(ids)
        for layer in self.layers:
            h = layer["norm"](h + layer["query"](h).relu())
        return self.last(h)


@pytest.mark.parametrize("method", [*recipe.RETRIEVAL[1:], "LoRA", "full"])
def test_two_towers_train_what_their_method_says_and_nothing_else(method):
    torch.manual_seed(0)
    stages = nn.Sequential(nn.Conv2d(3, 4, 2, 2), nn.Conv2d(4, 8, 2, 2), nn.Flatten(), nn.Linear(32, 2))
    words, pixels, ids, mask = (
        Words(),
        torch.rand(6, 3, 8, 8),
        torch.arange(24).view(6, 4) % 20,
        torch.ones(6, 4),
    )
    with torch.no_grad():
        maps = [stages[0](pixels), stages[:2](pixels)]
        states = [words.embed(ids), words(ids)]
    caches = [
        unipt.HiddenCache(torch.cat([one.flatten(1) for one in kept], 1), [one.shape[1:] for one in kept])
        for kept in (maps, states)
    ]
    before = [p.clone() for end in (stages, words) for p in end.parameters()]
    pairs = tracks.Pairs(
        *caches, mask, torch.arange(4), torch.arange(4, 6), pixels, ids, (stages, "1"), (words, "last")
    )
    towers = pairs.towers(method, out=16)
    one, other = pairs.embed(towers, pairs.train)
    assert one.shape == other.shape == (4, 16)
    unipt.HingeRetrievalLoss(0.2)(one, other).backward()
    found = {name: p.grad is not None for name, p in towers.named_parameters() if p.requires_grad}
    live = {name for name in found if "backbone" in name}
    if method == "full":
        assert {name.split(".")[0] for name in live} == {"0", "1"}
    else:
        assert all("lora_" in name for name in live)
        assert bool(live) == (method == "LoRA")
    silent = ("backbone.3.",)  # the CNN's own classifier is behind its last stage
    assert all(has for name, has in found.items() if not any(part in name for part in silent))
    after = [p for end in (stages, words) for p in end.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    if method in ("LoRA", "full"):  # a live tower with its backbone untouched is the probe on cached states
        probe = pairs.towers("linear probe", out=16)
        for mine, theirs in zip(towers, probe, strict=True):
            theirs.load_state_dict(mine.tower.state_dict())
        for mine, theirs in zip((one, other), pairs.embed(probe, pairs.train), strict=True):
            torch.testing.assert_close(mine, theirs)


def row(method: str, part: str, seed: int = 0, seconds=None, quality=None, **setting) -> Measurement:
    return Measurement(
        method=method, seed=seed, setting={"part": part, **setting}, quality=quality or {},
        bytes={"parameters": 1}, seconds=seconds or {},
    )  # fmt: skip


def rows(width: int) -> Measurements:
    found = []
    for batch in OPTIONS.memory_batches:
        for name, peak in (("UniPT", 40.0), ("LoRA", 100.0 if batch == 32 else 60.0), ("LST", 38.0)):
            found.append(row(name, "memory", quality={"peak": peak}, batch=batch, out_dim=width))
    found.append(row("UniPT", "memory", quality={"peak": 62.0}, batch=32, out_dim=2 * width))
    found.append(row("UniPT, recomputed", "memory", quality={"peak": 33.0}, batch=32, out_dim=width))
    for seed in range(3):
        base = 0.6 + 0.05 * seed
        scores = {"linear probe": -0.04, "LST": -0.01, "UniPT": 0.0, "LoRA": 0.03, recipe.CACHED: 0.02,
                  "UniPT, no interaction": -0.02, "UniPT, uniform confidence": -0.01}  # fmt: skip
        for place, (name, more) in enumerate(scores.items()):
            apart = 0.0 if name == "UniPT" else 0.001 * (seed - 1) * (place - 2)  # equal units decide nothing
            found.append(row(name, "text", seed, quality={"accuracy": base + more + apart}))
        for name, total in (("UniPT", 60.0), ("linear probe", 30.0), ("LST", 55.0)):
            apart = 0.0 if name == "UniPT" else 0.1 * (seed - 1)
            found.append(row(name, "retrieval", seed, quality={"Rsum": total + seed + apart}))
        seconds = {"live": (5.99 + 0.01 * seed) * (1 + seed), "cached": 1.0 + seed}
        found.append(row("UniPT", "speed", seed, seconds=seconds))
    return Measurements(found)


def test_claims_are_read_from_peaks_and_from_differences_inside_seeds():
    told = {c.text: (c.measured, c.holds, c.expected) for c in recipe.judge(rows(384), OPTIONS)}
    assert told["peak is half of LoRA's or less at 32 texts"] == (pytest.approx(0.4), True, True)
    assert told["half of LoRA's with twice the output width"] == (pytest.approx(0.62), False, False)
    assert told["half of LoRA's at 8 texts"] == (pytest.approx(2 / 3), False, False)
    assert told["peak is at most 1.15 x LST's at 32 texts"][1] is True
    assert told["UniPT is as good as LST or better"] == (pytest.approx(1.0), True, True)
    assert told["UniPT is within 2 points of LoRA"] == (pytest.approx(-3.0), False, True)
    assert told["interaction helps more than confidence"] == (pytest.approx(1.0), True, True)
    assert told["an epoch on cached features is 5 x faster or more"] == (pytest.approx(6.0), True, True)
    assert told["UniPT finds images by name better than a linear probe"] == (pytest.approx(30.0), True, True)
    assert told["UniPT finds images by name as well as LST or better"] == (pytest.approx(5.0), True, True)


def test_without_the_pretrained_encoder_nothing_is_decided():
    assert all(c.holds is None for c in recipe.judge(rows(48), OPTIONS))
