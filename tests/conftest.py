"""Settings for every test: one thread, so that sums come out the same on any machine."""

import gc
import os

import pytest
import torch

# Fixtures `torchvision` and `timm`; nothing is imported until a test asks for one.
pytest_plugins = ("torchvision_schemas",)


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


@pytest.fixture(scope="module", autouse=True)
def _settled() -> None:
    """What is loaded by now stays: a collection in a test need not look through all of torch again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
