"""The one call that the planner makes: compress a model and freeze the layers of one step."""

from __future__ import annotations

from typing import Any

from torch import nn

from memspan.base import refuse
from memspan.training.slimfit.codes import CompressionPolicy
from memspan.training.slimfit.modules import compress_, decompress_
from memspan.training.slimfit.schedule import FreezingScheduler

__all__ = ["convert_", "unconvert_"]

_TRAINED = "_memspan_slimfit_trained"


def convert_(
    model: nn.Module,
    freeze_rate: float = 0.9,
    attention: str = "eager",
    layernorm_keep: float = 0.1,
    seed: int = 0,
) -> nn.Module:
    """Compress a model and freeze what one step of the schedule freezes; :func:`unconvert_` undoes it.

    This is what a planner traces: the bytes of one step. Training needs the schedule itself
    (:class:`~memspan.training.slimfit.FreezingScheduler`), which changes the set in every step.

    Args:
        model: changed in place.
        freeze_rate: share of the layers that is frozen.
        attention: ``"eager"`` or ``"sdpa"``.
        layernorm_keep: share of a frozen norm's normalised input that is kept.
        seed: draws the set.

    Returns:
        The model.

    Raises:
        BadInput: as ``compress_`` and ``FreezingScheduler``.
    """
    if _TRAINED in vars(model):
        refuse("model", type(model).__name__, "it is converted already; unconvert_ first")
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    scheduler = FreezingScheduler(model, freeze_rate, metric="random", seed=seed)
    changes: dict[str, Any] = {"attention": attention, "layernorm_keep": layernorm_keep}
    compress_(model, CompressionPolicy.paper(**changes))
    scheduler.before_forward()
    vars(model)[_TRAINED] = trained
    return model


def unconvert_(model: nn.Module) -> nn.Module:
    """Undo :func:`convert_`.

    Raises:
        BadInput: the model was not converted.
    """
    if _TRAINED not in vars(model):
        refuse("model", type(model).__name__, "it was not converted")
    trained = set(vars(model).pop(_TRAINED))
    decompress_(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return model
