"""Independent pieces of work in several processes: a sweep over budgets, the candidates of a plan."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterable
from typing import TypeVar

from memspan.base.refusal import optional, refuse

__all__ = ["OWN_FILE", "spread"]

OWN_FILE = "_memspan_user_"  # modules made of the user's files, which no other process could import

T = TypeVar("T")
R = TypeVar("R")


def spread(work: Callable[[T], R], items: Iterable[T], jobs: int = 1) -> list[R]:
    """``work`` of every item, in the order of the items.

    With one job all happens here, one after another. With more, joblib spreads the items over processes; its
    backends apply, so that ``joblib.parallel_config("ray")`` takes them to a cluster. torch runs with as
    many threads there as here, so that sums come out the same.

    Args:
        work: of one item; what it is given and gives back travels between processes.
        items: independent of each other.
        jobs: processes; -1 is one for each core.

    Raises:
        BadInput: jobs is 0 or no whole number; also whatever ``work`` raises.
        ImportError: more than one job without joblib.

    Example:
        >>> spread(len, ["a", "bcd"])
        [1, 3]
    """
    if isinstance(jobs, bool) or not isinstance(jobs, int) or jobs == 0:
        refuse("jobs", jobs, "give the number of processes, or -1 for one a core")
    if jobs == 1:
        return [work(item) for item in items]
    joblib = optional("joblib", extra="recipes")
    for pickler in ("cloudpickle", "joblib.externals.cloudpickle"):  # joblib had its own copy once
        with contextlib.suppress(ImportError):
            by_value = importlib.import_module(pickler).register_pickle_by_value
            for name in [name for name in sys.modules if name.startswith(OWN_FILE)]:
                by_value(sys.modules[name])
    torch = sys.modules.get("torch")
    threads = None if torch is None else torch.get_num_threads()
    calls = (joblib.delayed(_there)(work, item, threads) for item in items)
    return list(joblib.Parallel(n_jobs=jobs)(calls))


def _there(work: Callable[[T], R], item: T, threads: int | None) -> R:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    return work(item)
