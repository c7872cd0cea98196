"""Checks that run in several processes: torch is loaded once, ranks are forked, each check has its own group.

``answers(module)`` gives ``{world: {check: "" or what went wrong}}``. A check is a function
``check_NAME(rank, world)`` with an attribute ``worlds``; :func:`on` sets it.
"""

from __future__ import annotations

import datetime
import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS = 20  # a rank that failed leaves the others waiting


def on(*worlds: int) -> Callable[[Any], Any]:
    def mark(check: Any) -> Any:
        check.worlds = worlds
        return check

    return mark


def checks_of(module: Any) -> list[tuple[str, int]]:
    return [
        (name, world)
        for name, check in vars(module).items()
        if name.startswith("check_")
        for world in check.worlds
    ]


@functools.cache
def answers(path: str) -> dict[int, dict[str, str]]:
    done = subprocess.run(
        [sys.executable, __file__, path, *os.environ.get("ZERO_CHECKS", "").split()],
        capture_output=True,
        text=True,
        timeout=500,
        cwd=tempfile.mkdtemp(),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {int(world): found for world, found in json.loads(done.stdout.splitlines()[-1]).items()}


def _rank(module: Any, names: list[str], rank: int, world: int, folder: Path) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    found = {}
    for name in names:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/{name}",
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(seconds=SECONDS),
        )
        try:
            getattr(module, name)(rank, world)
            found[name] = ""
        except BaseException:
            found[name] = f"rank {rank} of {world}:\n{traceback.format_exc()}"
        dist.destroy_process_group()
    (folder / f"answer{rank}").write_text(json.dumps(found))


def main() -> None:
    path, *only = sys.argv[1:]
    sys.path.insert(0, str(Path(__file__).parent.parent))
    spec = importlib.util.spec_from_file_location("checks", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["checks"] = module
    spec.loader.exec_module(module)
    result: dict[int, dict[str, str]] = {}
    every = [(name, world) for name, world in checks_of(module) if not only or name in only]
    for world in sorted({world for _, world in every}, reverse=True):
        names = [name for name, own in every if own == world]
        folder = Path(tempfile.mkdtemp())
        children = []
        for rank in range(world):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    _rank(module, names, rank, world, folder)
                    code = 0
                finally:
                    os._exit(code)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)
        result[world] = dict.fromkeys(names, "")
        for rank in range(world):
            file = folder / f"answer{rank}"
            told = (
                json.loads(file.read_text()) if file.exists() else dict.fromkeys(names, f"rank {rank} died")
            )
            for name, text in told.items():
                result[world][name] += text
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
