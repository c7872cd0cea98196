"""Hashing by angle: collisions as computed, probes that never hurt, an index that equals exact search."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from memspan.base import BadInput
from memspan.base.rng import rng
from memspan.recall.tim import AngularLSH, collision_probability, plan_lsh, probe_probability

TABLE = {
    0.9: (0.7335, 0.6599, 0.5996, 0.5478),
    0.7: (0.5577, 0.4460, 0.3649, 0.3015),
    0.5: (0.4444, 0.3167, 0.2325, 0.1730),
    0.3: (0.3564, 0.2239, 0.1446, 0.0948),
    0.0: (0.25, 0.125, 0.0625, 0.03125),
}


def pairs(cos: float, n: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    draw = rng("pairs", cos)
    x, y = draw.standard_normal((2, n, dim))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    y -= (x * y).sum(1, keepdims=True) * x
    y /= np.linalg.norm(y, axis=1, keepdims=True)
    return x, cos * x + np.sqrt(1 - cos * cos) * y


@pytest.mark.parametrize(
    ("cos", "wanted"), [(0.9, 0.8564), (0.7, 0.7468), (0.5, 0.6667), (0.3, 0.5970), (0.0, 0.5)]
)
def test_two_buckets_collide_as_the_angle_says(cos: float, wanted: float) -> None:
    assert abs(collision_probability(cos, 2) - wanted) < 1e-4
    x, y = pairs(cos, 2000, 16)
    tables = AngularLSH(16, 2, tables=100)
    assert abs((tables.hash(x) == tables.hash(y)).mean() - wanted) < 0.011  # 100 directions for all pairs
    draw = rng("fresh", cos)  # a fresh direction for each of 2e5 pairs
    u, v = draw.standard_normal((2, 200_000))
    assert abs((u * (cos * u + np.sqrt(1 - cos * cos) * v) > 0).mean() - wanted) < 0.004


@pytest.mark.parametrize("cos", TABLE)
def test_collisions_of_more_buckets_are_those_tabled(cos: float) -> None:
    for buckets, wanted in zip((4, 8, 16, 32), TABLE[cos], strict=True):
        assert abs(collision_probability(cos, buckets) - wanted) < 1e-3
        draw = rng("many", cos, buckets)
        z = draw.standard_normal((100_000, buckets // 2))
        w = cos * z + np.sqrt(1 - cos * cos) * draw.standard_normal(z.shape)
        codes = [np.concatenate([m, -m], axis=1).argmax(axis=1) for m in (z, w)]
        assert abs((codes[0] == codes[1]).mean() - wanted) < 0.005


def test_scale_does_not_move_a_vector_and_its_opposite_lies_opposite() -> None:
    x = rng("x").standard_normal((200, 24))
    for orthogonal in (False, True):
        index = AngularLSH(24, 16, tables=3, orthogonal=orthogonal)
        codes = index.hash(x)
        assert (index.hash(7.5 * x) == codes).all()
        assert (index.hash(-x) == (codes + 8) % 16).all()
        assert (np.concatenate([index.hash(row[None]) for row in x]) == codes).all()
        margins = np.sort(index._margins(x.astype(np.float64)), axis=2)
        clear = (margins[..., -1] - margins[..., -2]) > 1e-5
        assert (index.hash(x.astype(np.float32)) == codes)[clear].all()
        assert (index.hash(torch.tensor(x)) == codes).all()


def test_isotropic_vectors_fill_buckets_evenly() -> None:
    x = rng("even").standard_normal((100_000, 16))
    for seed in range(3):
        index = AngularLSH(16, 32, seed=seed, orthogonal=True)
        counts = np.bincount(index.hash(x)[:, 0], minlength=32)
        chi2 = float(((counts - 3125) ** 2 / 3125).sum())
        assert chi2 < 61.1  # p > .001 at 31 degrees of freedom


def test_buckets_follow_the_convention_of_reformer() -> None:
    x = rng("reformer").standard_normal((50, 12))
    index = AngularLSH(12, 8)
    rotated = torch.einsum("nd,dm->nm", torch.tensor(x), torch.tensor(index.R[0], dtype=torch.float64))
    theirs = torch.argmax(torch.cat([rotated, -rotated], dim=-1), dim=-1)
    assert (index.hash(x)[:, 0] == theirs.numpy()).all()


@pytest.mark.peers
@pytest.mark.slow
def test_buckets_equal_those_of_transformers_reformer(torchvision: object) -> None:
    reformer = pytest.importorskip("transformers.models.reformer.modeling_reformer")
    x = torch.randn(1, 2, 40, 12)
    config = reformer.ReformerConfig(
        attention_head_size=12, num_attention_heads=2, hidden_size=24, num_buckets=8, hash_seed=3,
        num_hashes=1, lsh_attn_chunk_length=8, axial_pos_embds=False,
    )  # fmt: skip
    attention = reformer.LSHSelfAttention(config)
    theirs = attention._hash_vectors(x, 1, None)
    torch.manual_seed(3)
    R = torch.randn(2, 12, 1, 4)
    for head in range(2):
        index = AngularLSH(12, 8)
        index.R = R[head, :, 0][None].numpy()
        assert (index.hash(x[0, head])[:, 0] == theirs[0, head].numpy()).all()


def exact(x: np.ndarray, q: np.ndarray, k: int) -> tuple[list[int], np.ndarray]:
    rows = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    unit = (q / np.linalg.norm(q)).astype(np.float32)
    scores = rows @ unit
    order = np.argsort(-scores, kind="stable")[:k]
    return order.tolist(), scores[order]


@pytest.mark.parametrize("tables", [1, 3])
def test_probing_all_buckets_is_exact_search(tables: int) -> None:
    x = rng("exact").standard_normal((300, 20))
    index = AngularLSH(20, 8, tables, probes=8, exact_below=0)
    index.add(range(300), x)
    for q in rng("queries").standard_normal((20, 20)):
        ids, scores, scanned = index.query(q, 10)
        wanted, cosines = exact(x, q, 10)
        assert ids == wanted
        assert np.abs(np.array(scores) - cosines).max() < 1e-6
        assert scanned == 300


def test_more_probes_or_tables_never_find_less() -> None:
    x = rng("nested").standard_normal((500, 16))
    queries = rng("nested", "q").standard_normal((30, 16))

    def recall(tables: int, probes: int) -> list[float]:
        index = AngularLSH(16, 16, tables, probes, exact_below=0)
        index.add(range(500), x)
        found = index.query(queries, 10, batch=True)
        return [
            len(set(ids) & set(exact(x, q, 10)[0])) for (ids, _, _), q in zip(found, queries, strict=True)
        ]

    for less, more in (((1, 1), (1, 2)), ((1, 2), (1, 8)), ((1, 1), (3, 1)), ((3, 1), (3, 4))):
        assert all(b >= a for a, b in zip(recall(*less), recall(*more), strict=True))


class Interleaved(RuleBasedStateMachine):
    """Adding, removing and asking in any order gives what a plain dictionary gives."""

    @initialize()
    def start(self) -> None:
        self.index = AngularLSH(6, 4, tables=2, probes=4, exact_below=0)
        self.known: dict[int, np.ndarray] = {}
        self.next = 0

    @rule(count=st.integers(1, 5))
    def add(self, count: int) -> None:
        rows = rng("rows", self.next).standard_normal((count, 6))
        ids = list(range(self.next, self.next + count))
        self.index.add(ids, rows)
        self.known.update(zip(ids, rows, strict=True))
        self.next += count
        with pytest.raises(BadInput):
            self.index.add([ids[0]], rows[:1])

    @rule(place=st.integers(0, 1000))
    def remove(self, place: int) -> None:
        if self.known:
            gone = sorted(self.known)[place % len(self.known)]
            self.index.remove([gone])
            del self.known[gone]
            with pytest.raises(BadInput):
                self.index.remove([gone])

    @rule(seed=st.integers(0, 50), k=st.integers(1, 6))
    def ask(self, seed: int, k: int) -> None:
        q = rng("ask", seed).standard_normal(6)
        ids, _, _ = self.index.query(q, k)
        if self.known:
            names = sorted(self.known)
            places, _ = exact(np.stack([self.known[i] for i in names]), q, k)
            assert ids == [names[i] for i in places]
        else:
            assert ids == []

    @invariant()
    def sizes(self) -> None:
        if hasattr(self, "known"):
            assert len(self.index) == len(self.known)


Interleaved.TestCase.settings = settings(max_examples=25, stateful_step_count=15, deadline=None)
TestInterleaved = Interleaved.TestCase


def test_rehashing_keeps_the_ids_and_a_saved_index_gives_the_same_buckets(tmp_path: Path) -> None:
    x = rng("save").standard_normal((80, 10))
    index = AngularLSH(10, 8, tables=2, probes=2, center=x.mean(axis=0))
    index.add([f"id{i}" for i in range(80)], x)
    index.save(tmp_path / "index.safetensors")
    again = AngularLSH.load(tmp_path / "index.safetensors")
    assert (again.hash(x) == index.hash(x)).all()
    assert again.query(x[3], 5) == index.query(x[3], 5)
    again.R = again.R[:, :, ::-1].copy()  # what counts is the saved R, not the seed
    again.save(tmp_path / "turned.safetensors")
    assert (AngularLSH.load(tmp_path / "turned.safetensors").hash(x) == again.hash(x)).all()
    index.rehash(16)
    assert all(f"id{i}" in index for i in range(80))
    assert index.hash(x).max() >= 8
    assert index.query(x[3], 1)[0] == ["id3"]


def test_a_plan_meets_its_target_and_is_kept_by_the_index() -> None:
    plan = plan_lsh(100_000, 0.8, 0.9)
    assert plan.expected_recall >= 0.9
    assert abs(probe_probability(0.5, 16, 1) - collision_probability(0.5, 16)) < 0.01
    hits = []
    x, y = pairs(0.8, 300, 32)
    index = AngularLSH(32, plan.buckets, plan.tables, plan.probes, exact_below=0)
    index.add(range(300), x)
    for i, q in enumerate(y):
        hits.append(i in index.query(q, 300)[0])
    assert np.mean(hits) > 0.85
    with pytest.warns(UserWarning, match="one neighbour in five"):
        plan_lsh(1000, 0.8, 0.5)


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: AngularLSH(8, 3), "buckets"),
        (lambda: AngularLSH(8, 0), "buckets"),
        (lambda: AngularLSH(8, 4, probes=5), "probes"),
        (lambda: AngularLSH(8, 4, tables=0), "tables"),
        (lambda: AngularLSH(8, 4).hash(np.zeros((1, 8))), "X"),
        (lambda: AngularLSH(8, 4).hash(np.full((1, 8), np.nan)), "X"),
        (lambda: AngularLSH(8, 4).hash(np.ones((1, 7))), "X"),
        (lambda: AngularLSH(8, 4).query(np.ones(8), 0), "k"),
        (lambda: AngularLSH(8, 4).add([1, 1], np.ones((2, 8))), "ids"),
        (lambda: collision_probability(1.5, 4), "cos"),
        (lambda: plan_lsh(0, 0.5, 0.9), "n, target_recall"),
    ],
)
def test_what_has_no_bucket_is_refused(call: object, argument: str) -> None:
    with pytest.raises(BadInput) as error:
        call()  # type: ignore[operator]
    assert error.value.argument == argument
