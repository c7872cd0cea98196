"""Prediction before running: a training step traced on tensors that hold no bytes.

:func:`plan` builds the model under torch's fake tensors (nothing is allocated, whatever its size), converts
it with the registered methods, runs two whole steps and reads the peak of the second through the same
:class:`~memspan.ledger.Ledger` that counts real runs. What users know as a calculator's estimate is here the
program itself: every operator, every temporary, every optimizer state. When not to use it: a program whose
shapes depend on values has to be run (``real=``), on small batches whose straight line is extended
(``exact=False``); memory that no operator allocates (CUDA context, libraries' workspaces) is not in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from memspan.base import refuse
from memspan.ledger.bytes import Budget
from memspan.ledger.job import Existing, Job, MakesOptimizer
from memspan.ledger.methods import Method, method
from memspan.ledger.prediction import Plan
from memspan.ledger.step import Loss, batch_size
from memspan.ledger.tracker import KERNELS

__all__ = ["Chosen", "chosen_methods", "conflict", "job", "plan"]

Chosen = str | tuple[str, Mapping[str, Any]]


def plan(
    build_model: Callable[[], nn.Module] | nn.Module,
    batch: Any,
    optimizer: MakesOptimizer | None = torch.optim.AdamW,
    method: Chosen | Sequence[Chosen] = (),
    loss: Loss | None = None,
    world: int = 1,
    device: str = "cpu",
    *,
    accumulate: int = 1,
    flops: bool = False,
    kernels: str | int | Budget | None = "auto",
    real: str | int | Budget | None = None,
) -> Plan:
    """Peak memory of a training step, without running it and without allocating its bytes.

    Args:
        build_model: makes the model, e.g. the class; called under fake tensors. A module that exists already
            is taken as it is, and is not changed.
        batch: example inputs; only shapes and dtypes matter. A tensor, or a tuple ``(*inputs, target)``, or a
            mapping of the names that ``forward`` takes; the batch is the first dimension.
        optimizer: makes the optimizer from the trained parameters (a class, or a ``functools.partial`` with a
            learning rate); None plans forward and backward alone.
        method: names of registered methods, or (name, options) pairs, applied in this order.
        loss: ``loss(output, target)``; None when the model returns its loss.
        world: ranks, each with this batch. More than one traces rank 0 of them with FSDP2 (each block of the
            model's lists is a unit), or with the method that shards by itself (``Method.ranks``).
        device: ``"cpu"`` or ``"cuda"``. Without CUDA in this build, CUDA figures are the CPU trace with known
            differences applied, and ``exact`` is False.
        accumulate: micro-batches of this size whose gradients add up before the step.
        flops: count the arithmetic of the step as well.
        kernels: what kernels take and give back before they return is measured on single operators whose
            arguments take at most this; larger ones make ``exact`` False. None: leave it out.
            ``"auto"``: 256 MiB on the CPU, 4 GiB on a CUDA device.
        real: bytes that small steps may take where the step cannot be traced (its shapes depend on values)
            and has to be run; None refuses such a model.

    Raises:
        BadInput: no example inputs, unknown or conflicting methods, no loss to be found, an unknown device.

    Example:
        >>> import functools
        >>> from torch.nn.functional import cross_entropy
        >>> batch = (torch.zeros(64, 100), torch.zeros(64, dtype=torch.long))
        >>> p = plan(functools.partial(nn.Linear, 100, 10), batch, torch.optim.SGD, loss=cross_entropy)
        >>> p.exact, p.by_category["parameters.trained"], p.by_category["inputs"]
        (True, 4040, 26112)
        >>> wide = functools.partial(nn.Linear, 2**18, 2**18)
        >>> huge = plan(wide, torch.zeros(1, 2**18), loss=lambda y, _: y.sum())
        >>> huge.parameters > 68e9      # 256 GiB of weights, nothing was allocated
        True
    """
    one = job(build_model, batch, optimizer, method, loss, device, accumulate, kernels, world, real)
    return one.predict(batch_size(batch), flops=flops)


def job(
    build_model: Callable[[], nn.Module] | nn.Module,
    batch: Any,
    optimizer: MakesOptimizer | None = torch.optim.AdamW,
    method: Chosen | Sequence[Chosen] = (),
    loss: Loss | None = None,
    device: str = "cpu",
    accumulate: int = 1,
    kernels: str | int | Budget | None = "auto",
    world: int = 1,
    real: str | int | Budget | None = None,
) -> Job:
    """The arguments of :func:`plan`, checked."""
    if isinstance(build_model, nn.Module):
        build_model = Existing(build_model)
    if not callable(build_model):
        refuse("build_model", build_model, "give a function that returns the model, or the model's class")
    if batch is None:
        refuse("batch", batch, "a plan needs example inputs: a tensor, or a tuple or mapping of tensors")
    batch_size(batch)
    if optimizer is not None and not callable(optimizer):
        refuse("optimizer", optimizer, "give an optimizer class or a function of the parameters, or None")
    if device not in ("cpu", "cuda"):
        refuse("device", device, "plan for 'cpu' or 'cuda'")
    for name, number in (("accumulate", accumulate), ("world", world)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            what = "micro-batches" if name == "accumulate" else "ranks"
            refuse(name, number, f"give the number of {what}, 1 or more")
    if kernels == "auto":
        kernels = "4GiB" if device == "cuda" else KERNELS
    limit = None if kernels is None else Budget.parse(kernels)
    return Job(
        build_model,
        batch,
        optimizer,
        chosen_methods(method),
        loss,
        device,
        accumulate,
        limit,
        world,
        real=None if real is None else Budget.parse(real),
    )


def chosen_methods(choice: Chosen | Sequence[Chosen]) -> tuple[tuple[Method, Mapping[str, Any]], ...]:
    """Registered methods by name, with options; conflicts are refused.

    Raises:
        BadInput: an unknown name, a name twice, or two methods that do not combine.
    """
    if isinstance(choice, str) or (len(choice) == 2 and isinstance(choice[1], Mapping)):
        choice = [choice]  # type: ignore[list-item]
    found: list[tuple[Method, Mapping[str, Any]]] = []
    for item in choice:
        pair: tuple[str, Mapping[str, Any]] = (item, {}) if isinstance(item, str) else cast(Any, item)
        name, options = pair
        new = method(name)
        for earlier, _ in found:
            if earlier.name == new.name:
                refuse("method", name, "name each method once")
            if conflict(earlier, new):
                refuse("method", (earlier.name, new.name), "these two do not combine; choose one of them")
        found.append((new, options))
    return tuple(found)


def conflict(one: Method, other: Method) -> bool:
    """Whether two do not combine: either says so, or both run the step, or shard, in their own way."""
    if (one.step and other.step) or (one.ranks and other.ranks):
        return True
    return other.name in one.conflicts or one.name in other.conflicts
