"""The recipe's own parts: equal arithmetic, equal batches, and a text that is always there."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from memspan import data
from memspan.ledger import macs
from memspan.models import MemoryFormerLM, memory_cost
from memspan.recipes import _memoryformer_models as models
from memspan.recipes.engine import execute
from memspan.recipes.memoryformer import CONTROL, DENSE, NARROW, RECIPE, Options, tables


def test_the_narrow_twin_does_about_the_arithmetic_of_the_largest_tables() -> None:
    for o in (Options(), RECIPE.full):
        with torch.device("meta"):
            ours = models.build(tables(o.bits[-1]), o)
        assert isinstance(ours, MemoryFormerLM)
        wanted = memory_cost(ours, o.length).lookup_macs
        d = models.narrowed(o)
        got = 12 * d * d * o.layers * o.length
        assert 0.7 < got / wanted < 1.4
        narrow = models.build(NARROW, o)
        assert macs(narrow, torch.zeros(1, o.length, dtype=torch.long)) > got


def test_every_method_is_counted_and_decides_claims(tmp_path: Path) -> None:
    finished = execute(RECIPE, RECIPE.tiny, seeds=2, out=tmp_path / "run")
    found = finished.result.measurements
    methods = {one.method for one in found}
    assert {CONTROL, DENSE, NARROW, tables(4), tables(6)} <= methods
    ours = next(one for one in found if one.method == tables(6))
    dense = next(one for one in found if one.method == DENSE)
    assert ours.bytes["parameters.tables"] > dense.bytes["parameters"]
    assert 0 < (ours.flops or 0) < (dense.flops or 0)
    claims = {one.text.split(" ")[0]: one for one in finished.result.claims}
    assert claims["Arithmetic"].measured is not None
    assert all(one.measured is not None for one in finished.result.claims if "decoded" not in one.text)


def test_without_any_data_folder_the_language_reference_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEMSPAN_DATA", raising=False)
    monkeypatch.setattr(data, "load_first", _absent)
    text = models.some_text()
    first, rest = models.split(text)
    assert text.name == "python-topics"
    assert len(first) > 8 * len(rest) > 100_000


def _absent(*_: object, **__: object) -> object:
    raise data.DataNotFound("nothing here")


def test_decoding_is_timed_for_both(tmp_path: Path) -> None:
    tiny = dataclasses.replace(RECIPE.tiny or Options(), rounds=2, decode_width=64, bits=(4, 8))
    finished = execute(RECIPE, tiny, seeds=1, out=tmp_path / "run")
    speed = [one for one in finished.result.claims if "decoded" in one.text]
    assert speed[0].measured is not None
    assert speed[0].measured > 0
