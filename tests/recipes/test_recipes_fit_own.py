"""``memspan fit --data``: plain training is a row, quality as measured ranks, tables of words train."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from memspan import data
from memspan.commands._fit_recipe import examples_for, fit_recipe
from memspan.commands.fit import _classes
from memspan.ledger import fit, load_model
from memspan.recipes.engine import execute


def _pixels(tmp_path: Path) -> Any:
    rng = np.random.default_rng(0)
    y = np.arange(80) % 2
    np.savez(tmp_path / "mine.npz", x=(rng.normal(size=(80, 6)) + y[:, None]).astype(np.float32), y=y)
    return data.read(tmp_path / "mine.npz")


def test_plain_training_is_a_row_also_where_another_beats_it(tmp_path: Path) -> None:
    own = _pixels(tmp_path)
    build = functools.partial(nn.Sequential, nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 2))
    batch = (torch.zeros(8, 6), torch.zeros(8, dtype=torch.long))
    found = fit(lambda: build(), batch, "1MiB", methods=["linear_probe", "bitfit"], loss=cross_entropy)
    from dataclasses import replace

    beaten = replace(found, front=tuple(item for item in found.front if item.methods), best=found.front[0])
    recipe = fit_recipe("mine", beaten, examples_for(batch, own), own, steps=8)
    done = execute(recipe, out=tmp_path / "run").result
    methods = [one.method for one in done.measurements]
    assert methods[:2] == ["untrained", "plain"]
    assert len(methods) == len(set(methods))
    (told,) = [note for note in done.notes if note.startswith("ranked by")]
    scores = {one.method: one.quality["accuracy"] for one in done.measurements}
    ranked = [name.strip() for name in told.partition(": ")[2].split(",")]
    assert set(ranked) == set(methods) - {"untrained"}
    assert [scores[name] for name in ranked] == sorted((scores[name] for name in ranked), reverse=True)


def test_where_plain_training_does_not_fit_its_bytes_are_told(tmp_path: Path) -> None:
    own = _pixels(tmp_path)
    batch = (torch.zeros(8, 6), torch.zeros(8, dtype=torch.long))

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 4000), nn.ReLU(), nn.Linear(4000, 2))

    found = fit(build, batch, "480KiB", methods=["linear_probe"], loss=cross_entropy)
    done = execute(fit_recipe("mine", found, examples_for(batch, own), own, 2), out=tmp_path / "run").result
    assert any(note.startswith("plain training does not fit 480 KiB") for note in done.notes)
    assert "plain" not in {one.method for one in done.measurements}


def test_a_table_of_words_trains_a_model_of_text(tmp_path: Path, transformers: Any) -> None:
    kinds = ("cold", "warm", "hot")
    rows = "\n".join(f'"{kinds[i % 3]} day, number",{i},{kinds[i % 3]}' for i in range(60))
    (tmp_path / "mine.csv").write_text(f"words,number,kind\n{rows}\n")
    own = data.read(tmp_path / "mine.csv", target="kind")
    assert _classes(own) == 3
    config = {"model_type": "bert", "vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    made = load_model(str(tmp_path / "config.json"), batch=4, tokens=24, classes=_classes(own))
    examples = examples_for(made.batch, own, classes=3)
    row = bytes(int(i) for i in examples.train["input_ids"][0] if i).decode()
    assert row.split(" ")[0] in kinds
    assert "number" in row
    found = fit(made.build_model, made.batch, "8MiB", methods=["bitfit"])
    done = execute(fit_recipe("bert", found, examples, own, steps=3), out=tmp_path / "run").result
    assert {one.method for one in done.measurements} == {"untrained", "plain", "bitfit"}
    trained = {one.method: one.trained or 0 for one in done.measurements}
    assert trained["untrained"] == 0 < trained["bitfit"] < trained["plain"]
