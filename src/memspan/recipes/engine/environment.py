"""What a run's numbers may depend on besides its options: versions, device, threads; never who or where."""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

import torch

from memspan import __version__
from memspan.base import refuse

__all__ = ["environment", "missing_extras", "packages_of", "the_device"]

# These show or carry results and change no number in them.
_NO_NUMBERS = ("commands", "report", "recipes", "server")


def the_device(name: str, kinds: Sequence[str] = ("cpu", "cuda")) -> torch.device:
    """The device of this name; ``"auto"`` is CUDA where there is one.

    Args:
        name: such as ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.
        kinds: those that will do.

    Raises:
        BadInput: no such device on this machine, or of another kind.

    Example:
        >>> the_device("cpu")
        device(type='cpu')
    """
    here = [kind for kind in kinds if kind != "cuda" or torch.cuda.is_available()]
    if name == "auto":
        name = "cuda" if "cuda" in here else "cpu"
    remedy = f"use {', '.join(here)} or auto"
    try:
        device = torch.device(name)
        if device.type not in kinds:
            refuse("device", name, remedy)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        refuse("device", name, f"this machine and this torch have no such device; {remedy}")
    return device


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and machine kind as JSON: no host name, no user name, no path.

    Example:
        >>> sorted(environment(torch.device("cpu")))[:3]
        ['cpu_count', 'device', 'device_name']
    """
    return {
        "memspan": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.system(),
        "machine": platform.machine(),
        "cpu_count": os.cpu_count() or 1,
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "packages": {name: found for name in sorted(_packages()) if (found := _installed(name))},
    }


def packages_of(extra: str) -> list[str]:
    """Distribution names that an extra of memspan brings, through other extras too."""
    found: list[str] = []
    for name, marked in _requirements():
        if marked == extra:
            inner = name.partition("[")[2].rstrip("]")
            found += [item for part in inner.split(",") for item in packages_of(part)] if inner else [name]
    return list(dict.fromkeys(found))


def missing_extras(extras: tuple[str, ...]) -> list[str]:
    """Those extras of which a package is not installed.

    Example:
        >>> missing_extras(())
        []
    """
    return [extra for extra in extras if any(_installed(name) is None for name in packages_of(extra))]


def _requirements() -> list[tuple[str, str]]:
    found = []
    for line in requires("memspan") or []:
        head, _, marker = line.partition(";")
        name = head.strip()
        for sign in "<>=!~ ":
            name = name.split(sign)[0]
        quoted = marker.replace('"', "'").split("extra == '")
        found.append((name.strip(), quoted[1].split("'")[0] if len(quoted) > 1 else ""))
    return found


def _packages() -> set[str]:
    try:
        named = {name for name, extra in _requirements() if extra not in ("dev", "docs")}
    except PackageNotFoundError:
        named = {"numpy", "safetensors", "pydantic"}
    return {name for name in named if not name.startswith("memspan")} - {"torch"}


@functools.cache
def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
