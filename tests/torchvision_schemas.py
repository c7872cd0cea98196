"""Lets torchvision, and timm which needs it, be imported beside the CPU build of torch.

The torchvision wheel of the package index holds operators compiled for CUDA; beside CPU torch they do not
load, and the import fails because it attaches shape functions to operators that nobody declared. Declaring
them is enough for everything that does not call them (models, transforms). Where the compiled operators do
load, nothing is declared. Users of memspan need none of this: only comparisons with other libraries do.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from types import ModuleType
from unittest.mock import MagicMock

import pytest
import torch

# The operators that torchvision attaches a shape function to without asking whether they exist.
SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: torch.library.Library | None = None


def import_torchvision() -> ModuleType:
    """Import torchvision, declaring the operators it misses.

    Raises:
        ImportError: torchvision is not installed.
    """
    global _library
    try:
        return importlib.import_module("torchvision")
    except (RuntimeError, AttributeError):
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
    if _library is None:
        _library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in SCHEMAS:
            _library.define(schema)
    return importlib.import_module("torchvision")


@pytest.fixture(scope="session")
def torchvision() -> ModuleType:
    """The torchvision module, importable beside CPU torch; the test is skipped where it is not installed."""
    pytest.importorskip("torch")
    try:
        return import_torchvision()
    except ImportError as error:
        pytest.skip(f"torchvision is not installed ({error}): pip install 'memspan[peers]'")


@pytest.fixture(scope="session")
def timm(torchvision: ModuleType) -> ModuleType:
    """The timm module, importable beside CPU torch; the test is skipped where it is not installed.

    Use it as an argument: ``def test_x(timm): model = timm.create_model("resnet18", pretrained=False)``.
    Mark such tests ``@pytest.mark.peers``. Weights are random: nothing is downloaded.
    """
    return pytest.importorskip("timm")


@pytest.fixture(scope="session")
def transformers() -> ModuleType:
    """The transformers module, which imports torchvision where it finds it; skipped where not installed.

    Ask for it in every test that loads a network through transformers, ``data.backbone("minilm")`` included.
    """
    with contextlib.suppress(ImportError):
        import_torchvision()
    return pytest.importorskip("transformers")


# Avalanche imports these for loggers, downloads and solvers that no comparison here uses.
_UNUSED = (
    "wandb",
    "gdown",
    "GPUtil",
    "qpsolvers",
    "tensorboard",
    "torch.utils.tensorboard",
    "torch.utils.tensorboard.writer",
)


@pytest.fixture(scope="session")
def avalanche(torchvision: ModuleType) -> ModuleType:
    """The avalanche module without its heavy dependencies; the test is skipped where it is not installed."""
    pytest.importorskip("torchmetrics")
    for name in _UNUSED:
        sys.modules.setdefault(name, MagicMock(name=name, __spec__=None, __path__=[]))
    return pytest.importorskip("avalanche")
