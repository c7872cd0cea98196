"""Runs single operators in a process of its own, and tells what their kernels held.

Some kernels end the process when they are run on made-up arguments (a recurrent layer reads lengths and
workspaces as it finds them). What dies here dies alone: the answer is then "not known". Requests and answers
are lines of JSON; nothing that comes in is run but operators of torch and of memspan, on zeros.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import _disable_current_modes

from memspan.ledger.allocator import AllocatorPeak
from memspan.ledger.invocation import Invocation, decoded, encoded, thawed

__all__ = ["Held", "ask", "measure"]

_PATIENCE = 60.0  # seconds for one operator; its arguments are small


class Held(NamedTuple):
    """What one call held.

    Attributes:
        scratch: bytes at most beyond what it was given and what it returned.
        results: bytes of each tensor that it returned, in order.
    """

    scratch: int
    results: tuple[int, ...]


def ask(one: Invocation) -> Held | None:
    """The answer of a child process that is started at the first question and kept.

    Returns:
        None where the operator cannot be run on zeros, or ends the process.
    """
    with _lock:
        child = _child()
        if child is None or child.stdin is None or child.stdout is None:
            return None
        settings = {"threads": torch.get_num_threads(), "mkldnn": torch.backends.mkldnn.enabled}
        late = threading.Timer(_PATIENCE, child.kill)
        late.daemon = True
        late.start()
        try:
            child.stdin.write(json.dumps({"call": encoded(one), **settings}) + "\n")
            child.stdin.flush()
            answer = child.stdout.readline()
        except (OSError, ValueError):
            answer = ""
        finally:
            late.cancel()
        if not answer.endswith("\n"):
            _close()
            return None
        found = json.loads(answer)
        return None if found is None else Held(found[0], tuple(found[1]))


def measure(one: Invocation) -> Held | None:
    """Run the call in this process, twice, on zeros: what its kernel took the second time.

    Example:
        >>> from memspan.ledger.invocation import invocation
        >>> measure(invocation(torch.ops.aten.add.Tensor, (torch.zeros(8), torch.zeros(8)), None))
        Held(scratch=0, results=(32,))
    """
    with _apart(one.device):
        try:
            for _ in range(2):  # the first run also fills the libraries' caches
                args, kwargs = thawed(one.args), dict(thawed(one.kwargs))
                with AllocatorPeak(one.device) as seen:
                    result = one.operator(*args, **kwargs)
                several = result if isinstance(result, list | tuple) else [result]
                sizes = tuple(t.untyped_storage().nbytes() for t in several if isinstance(t, torch.Tensor))
                del result, several, args, kwargs
        except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError):
            return None
    return Held(max(0, seen.rise - max(0, seen.growth)), sizes)


@contextmanager
def _apart(device: str) -> Iterator[None]:
    """Outside the counted program: no modes, no autocast, and the random streams are put back."""
    devices = [torch.cuda.current_device()] if device == "cuda" else []
    with ExitStack() as stack:
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(torch.enable_grad())  # a recurrent layer keeps its workspace only so
        for kind in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


_lock = threading.Lock()
_running: list[subprocess.Popen[str]] = []


def _child() -> subprocess.Popen[str] | None:
    if _running and _running[0].poll() is None:
        return _running[0]
    _running.clear()
    paths = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
    try:
        child = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "", "KINETO_LOG_LEVEL": "99"},
            start_new_session=True,  # Ctrl-C is the caller's
        )
    except OSError:
        return None
    _running.append(child)
    return child


def _close() -> None:
    while _running:
        child = _running.pop()
        with contextlib.suppress(OSError):
            child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


atexit.register(_close)
os.register_at_fork(after_in_child=_running.clear)  # the child belongs to the process that started it


def _serve() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    for line in sys.stdin:
        request = json.loads(line)
        torch.set_num_threads(request["threads"])
        torch.backends.mkldnn.set_flags(request["mkldnn"])  # type: ignore[no-untyped-call]
        module = request["call"].get("module", "")
        if module.startswith("memspan."):
            importlib.import_module(module)
        one = decoded(request["call"])
        held = None if one is None else measure(one)
        answers.write(json.dumps(held) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve()
