"""The one call that the planner makes: compress a model, and let each optimizer step move the schedule on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from memspan.base import refuse
from memspan.training.slimfit.codes import CompressionPolicy
from memspan.training.slimfit.modules import compress_, decompress_
from memspan.training.slimfit.schedule import FreezingScheduler

__all__ = ["convert_", "optimizer_for", "unconvert_"]

_KEPT = "_memspan_slimfit"


def convert_(
    model: nn.Module,
    freeze_rate: float = 0.9,
    attention: str = "eager",
    layernorm_keep: float = 0.1,
    optimizer_state: Literal["keep", "drop"] = "keep",
    seed: int = 0,
) -> nn.Module:
    """Compress a model and freeze what the first step freezes; :func:`unconvert_` undoes it.

    Give it the optimizer of :func:`optimizer_for`, which moves the schedule on by itself: any training loop
    will do. The largest units train in the second step, so that a plan, which reads that step, tells the
    worst. A unit frozen for two rounds trains again whatever the others do, since the learning rate of an
    unknown loop may never fall.

    Args:
        model: changed in place.
        freeze_rate: share of the layers that is frozen.
        attention: ``"eager"`` or ``"sdpa"``.
        layernorm_keep: share of a frozen norm's normalised input that is kept.
        optimizer_state: ``"keep"`` the moments of all units, or ``"drop"`` those of frozen ones.
        seed: of the first visits.

    Returns:
        The model.

    Raises:
        BadInput: as ``compress_`` and ``FreezingScheduler``.
    """
    if _KEPT in vars(model):
        refuse("model", type(model).__name__, "it is converted already; unconvert_ first")
    if optimizer_state not in ("keep", "drop"):
        refuse("optimizer_state", optimizer_state, "use 'keep' or 'drop'")
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    FreezingScheduler(model, freeze_rate, seed=seed)  # refuses what it cannot schedule, changes nothing
    changes: dict[str, Any] = {"attention": attention, "layernorm_keep": layernorm_keep}
    compress_(model, CompressionPolicy.paper(**changes))
    vars(model)[_KEPT] = {"trained": trained, "rate": freeze_rate, "state": optimizer_state, "seed": seed}
    _scheduler(model, None).before_forward()
    return model


def optimizer_for(model: nn.Module, make: Callable[[Iterable[nn.Parameter]], Optimizer]) -> Optimizer:
    """An optimizer over all that trains in some step of a converted model; its steps move the schedule on.

    Where moments are kept, those of every unit are there from the start, as they are after a round.

    Args:
        model: as :func:`convert_` left it.
        make: makes the optimizer from parameters, such as ``torch.optim.AdamW``.

    Raises:
        BadInput: the model was not converted.

    Example:
        >>> block = lambda: nn.Sequential(nn.Linear(2, 2), nn.GELU())
        >>> model = convert_(nn.Sequential(*(block() for _ in range(4))), 0.7)
        >>> optimizer = optimizer_for(model, torch.optim.AdamW)
        >>> seen = set()
        >>> for _ in range(2):
        ...     seen |= {name for name, p in model.named_parameters() if p.requires_grad and p.dim() > 1}
        ...     model(torch.ones(1, 2)).sum().backward()
        ...     optimizer.step()
        >>> len(seen)
        4
    """
    if _KEPT not in vars(model):
        refuse("model", type(model).__name__, "it was not converted; call convert_ first")
    known = vars(model)[_KEPT]
    named = dict(model.named_parameters())
    trained = [named[name] for name in known["trained"]]
    optimizer = make(trained)
    if known["state"] == "keep":
        _fill(optimizer, trained)
    for parameter in trained:
        parameter.requires_grad_(True)
    schedule = _scheduler(model, optimizer)
    schedule.before_forward()

    def go_on(*_: object) -> None:
        schedule.after_step()
        schedule.before_forward()

    optimizer.register_step_post_hook(go_on)
    return optimizer


def unconvert_(model: nn.Module) -> nn.Module:
    """Undo :func:`convert_`.

    Raises:
        BadInput: the model was not converted.
    """
    if _KEPT not in vars(model):
        refuse("model", type(model).__name__, "it was not converted")
    trained = set(vars(model).pop(_KEPT)["trained"])
    decompress_(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return model


def _scheduler(model: nn.Module, optimizer: Optimizer | None) -> FreezingScheduler:
    known = vars(model)[_KEPT]
    rate, seed = known["rate"], known["seed"]
    keep = optimizer is None or known["state"] == "keep"
    drawn = FreezingScheduler(model, rate, seed=seed)
    units = sorted(drawn.units, key=lambda unit: -drawn.distances[unit])
    n, k = len(units), len(units) - int(rate * len(units))
    visits = units
    if n >= 2 * k:
        sizes = dict(model.named_parameters())
        large = sorted(drawn.units, key=lambda unit: -sizes[unit].nbytes)[:k]
        rest = [unit for unit in units if unit not in large]
        visits = [*rest[:k], *large]
    return FreezingScheduler(
        model, rate, max_age=2 * -(-n // k), optimizer=optimizer, optimizer_state="keep" if keep else "drop",
        visits=visits, seed=seed,
    )  # fmt: skip


def _fill(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """State for every parameter as before a first step: steps of rate 0 on gradients of 0, one by one."""
    held = {"lr": 0.0, "weight_decay": 0.0}
    kept = [{name: group[name] for name in held if name in group} for group in optimizer.param_groups]
    for group, own in zip(optimizer.param_groups, kept, strict=True):
        group.update({name: held[name] for name in own})
    for parameter in parameters:
        frozen = not parameter.requires_grad
        parameter.requires_grad_(True)
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        parameter.grad = None
        parameter.requires_grad_(not frozen)
    for group, own in zip(optimizer.param_groups, kept, strict=True):
        group.update(own)
    for state in optimizer.state.values():
        if isinstance(steps := state.get("step"), Tensor):
            steps.zero_()
        elif steps is not None:
            state["step"] = 0
