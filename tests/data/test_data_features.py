import threading
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from memspan import data
from memspan.base import BadInput
from memspan.data.backbones import Backbone
from memspan.data.features import cache_features, cached_features


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MEMSPAN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tiny():
    module = nn.Linear(4, 3)

    def pool(batch):
        return module(torch.tensor(batch).flatten(1).float())

    return Backbone("tiny", module, 3, "made", "0" * 64, "none", "flattened", None, None, pool)


def kept(tmp_path):
    return sorted((tmp_path / "cache" / "features").glob("*"))


def test_features_are_computed_once_and_equal_those_of_the_network(tiny, tmp_path):
    x = np.arange(40, dtype=np.uint8).reshape(10, 2, 2)
    first = cached_features(tiny, x, batch_size=3)
    assert torch.allclose(first, tiny.features(x))
    assert not first.requires_grad
    broken = Backbone(**{**vars(tiny), "pool": None})
    assert torch.equal(cached_features(broken, x, batch_size=7), first)
    assert len(kept(tmp_path)) == 1


def test_other_weights_data_recipe_or_dtype_are_other_features(tiny, tmp_path):
    x = np.arange(40, dtype=np.uint8).reshape(10, 2, 2)
    cached_features(tiny, x)
    cached_features(tiny, x[:9])
    cached_features(tiny, x, dtype=torch.float16)
    cached_features(Backbone(**{**vars(tiny), "recipe": "other"}), x)
    with torch.no_grad():
        tiny.module.bias += 1
    assert torch.allclose(cached_features(tiny, x), tiny.features(x))
    assert len(kept(tmp_path)) == 5


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty"])
def test_a_damaged_file_is_reported_and_computed_anew(tiny, tmp_path, damage):
    x = np.arange(40, dtype=np.uint8).reshape(10, 2, 2)
    first = cached_features(tiny, x)
    (path,) = kept(tmp_path)
    content = path.read_bytes()
    changed = {"truncate": content[:-5], "flip": content[:-1] + bytes([content[-1] ^ 1]), "empty": b""}
    path.write_bytes(changed[damage])
    with pytest.warns(UserWarning, match="computed anew"):
        assert torch.equal(cached_features(tiny, x), first)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(cached_features(tiny, x), first)


def test_a_full_disk_costs_the_file_and_not_the_features(tiny, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("memspan.data.features.save_state", full)
    with pytest.warns(UserWarning, match="not kept"):
        assert cached_features(tiny, np.ones((2, 2, 2), np.uint8)).shape == (2, 3)


def test_writers_that_race_leave_one_whole_file(tmp_path):
    barrier, found = threading.Barrier(4), []

    def work():
        barrier.wait()
        found.append(cache_features(lambda x: x * 2, [torch.ones(100, 50)] * 4, {"race": 1}))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(one, torch.full((400, 50), 2.0)) for one in found)
    assert len(found) == 4
    assert len(kept(tmp_path)) == 1


def test_nothing_to_compute_is_refused(tiny):
    with pytest.raises(BadInput, match="at least one batch"):
        cache_features(lambda x: x, [], {"a": 1})
    with pytest.raises(BadInput):
        cached_features(tiny, np.empty((0, 2, 2), np.uint8))


def test_hashed_embeddings_are_unit_rows_that_find_shared_words():
    embed = data.HashingEmbedder(256)
    assert isinstance(embed, data.Embedder)
    rows = embed(["my dog barks at night", "the dog barked", "quarterly revenue fell", "", "!?"])
    assert rows.dtype == np.float32
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    assert rows[0] @ rows[1] > rows[0] @ rows[2]
    assert np.array_equal(rows[1:2], data.HashingEmbedder(256)(["the dog barked"]))
    assert embed([]).shape == (0, 256)
    assert embed.id != data.HashingEmbedder(512).id
    with pytest.raises(BadInput):
        embed("one string")
