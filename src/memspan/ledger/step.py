"""One training step on anybody's model: what planner, ledger runs and recipes run alike.

A batch is a tensor, a tuple or a mapping; a model returns its loss or something a ``loss`` function turns
into one. Both the trace and the real run go through :func:`training_step`, so that they are the same program.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from memspan.base import refuse

__all__ = [
    "Loss",
    "MicroStep",
    "batch_size",
    "loss_of",
    "resized",
    "sequence_length",
    "stretched",
    "training_step",
]

Loss = Callable[[Any, Any], Tensor]
MicroStep = Callable[[nn.Module, Any, Loss | None, float], Tensor]


def training_step(
    model: nn.Module,
    optimizer: Optimizer | None,
    batch: Any,
    loss: Loss | None = None,
    *,
    accumulate: int = 1,
    step: MicroStep | None = None,
) -> None:
    """Gradients to None, forward, backward, optimizer step; the way a lean training loop is written.

    The model's output is not kept past the loss. Without a trainable parameter this is a forward pass
    without a graph.

    Args:
        model: any module.
        optimizer: steps at the end; None stops after the backward pass.
        batch: see :func:`loss_of`.
        loss: see :func:`loss_of`.
        accumulate: passes over ``batch`` (a micro-batch) whose gradients add up before the step.
        step: runs a micro-batch's passes and gives its loss, detached; see :class:`~memspan.ledger.Method`.
            None: one forward and one backward pass.

    Example:
        >>> model = nn.Linear(3, 1)
        >>> x = torch.ones(2, 3)
        >>> training_step(model, None, (x, x), lambda output, _: output.mean())
        >>> model.bias.grad.tolist()
        [1.0]
    """
    for parameter in model.parameters():
        parameter.grad = None
    if not any(parameter.requires_grad for parameter in model.parameters()):
        with torch.no_grad():
            loss_of(model, batch, loss)
        return
    value: Tensor | None = None  # alive during the optimizer's step, as in a loop that prints it
    for _ in range(accumulate):
        del value
        if step is not None:
            value = step(model, batch, loss, 1 / accumulate)
            continue
        value = loss_of(model, batch, loss)
        (value if accumulate == 1 else value / accumulate).backward()  # type: ignore[no-untyped-call]
    if optimizer is not None:
        optimizer.step()


def loss_of(model: nn.Module, batch: Any, loss: Loss | None = None) -> Tensor:
    """The loss of a model on a batch.

    Args:
        model: any module.
        batch: a mapping is given by name (names that ``forward`` does not take go to the loss alone); a tuple
            by place, with its last entry kept for ``loss`` where there is one; a tensor as it is.
        loss: ``loss(output, target)``; the target is a tuple's last entry, else the whole batch. None: the
            model returns it, as a scalar, as ``output.loss``, ``output["loss"]`` or ``output[0]``.

    Raises:
        BadInput: the loss is not a scalar, or there is none in the output.

    Example:
        >>> loss_of(nn.Linear(3, 1), torch.zeros(2, 3))
        Traceback (most recent call last):
        memspan.base.refusal.BadInput: loss=None: the model returned Tensor of shape (2, 1), which holds no
        loss; give loss=function(output, target)
    """
    if isinstance(batch, Mapping):
        taken = _names_taken(model)
        output = model(**{name: value for name, value in batch.items() if taken is None or name in taken})
        target: Any = batch
    elif isinstance(batch, tuple | list):
        inputs = batch if loss is None or len(batch) == 1 else batch[:-1]
        if loss is None and not _takes(model, inputs):
            remedy = (
                f"forward does not take the batch's {len(inputs)} entries; give loss=function(output, target)"
            )
            refuse("loss", loss, f"{remedy}, where target is the last entry")
        output, target = model(*inputs), batch[-1]
    else:
        output, target = model(batch), batch
    value = _loss_inside(output) if loss is None else loss(output, target)
    if not isinstance(value, Tensor) or value.numel() != 1:
        told = "the model returned" if loss is None else "loss(output, target) returned"
        refuse(
            "loss",
            loss,
            f"{told} {_shown(output if loss is None else value)}, which holds no loss; "
            "give loss=function(output, target)" + ("" if loss is None else " that returns one number"),
        )
    return value


def batch_size(batch: Any) -> int:
    """The size of a batch: the first dimension of its first tensor that has one.

    Raises:
        BadInput: there is no such tensor, or it is empty.

    Example:
        >>> batch_size({"x": torch.zeros(5, 2), "scale": 2.0})
        5
    """
    for tensor in _tensors(batch):
        if tensor.dim():
            if tensor.shape[0] == 0:
                refuse(
                    "batch",
                    f"a tensor of shape {tuple(tensor.shape)}",
                    "give a batch with at least one example",
                )
            return int(tensor.shape[0])
    refuse("batch", batch, "give example inputs: a tensor, or a tuple or mapping of tensors, batch first")


def resized(batch: Any, size: int) -> Any:
    """The batch with ``size`` examples: cut, or repeated from the start.

    Tensors whose first dimension is the batch size follow; everything else stays.

    Example:
        >>> resized((torch.tensor([1, 2, 3]), "name"), 5)
        (tensor([1, 2, 3, 1, 2]), 'name')
    """
    old = batch_size(batch)
    if size == old:
        return batch

    def change(tensor: Tensor) -> Tensor:
        if not tensor.dim() or tensor.shape[0] != old:
            return tensor
        if tensor.is_meta or type(tensor) is not Tensor:
            return tensor.new_empty((size, *tensor.shape[1:]))
        return tensor[torch.arange(size, device=tensor.device) % old]

    return mapped(batch, change)


def sequence_length(batch: Any) -> int:
    """The length of a batch's sequences: the second dimension of its first tensor of two or more.

    Raises:
        BadInput: there is none.

    Example:
        >>> sequence_length({"input_ids": torch.zeros(5, 7), "labels": torch.zeros(5)})
        7
    """
    for tensor in _tensors(batch):
        if tensor.dim() > 1 and tensor.shape[1]:
            return int(tensor.shape[1])
    refuse("batch", batch, "it has no sequences: give a tensor of shape (batch, length, ...)")


def stretched(batch: Any, length: int) -> Any:
    """The batch with sequences of ``length``: cut, or repeated from the start.

    Tensors whose second dimension is the sequences' length follow; everything else stays.

    Example:
        >>> stretched((torch.tensor([[1, 2, 3]]), torch.tensor([4])), 5)
        (tensor([[1, 2, 3, 1, 2]]), tensor([4]))
    """
    old = sequence_length(batch)
    if length == old:
        return batch

    def change(tensor: Tensor) -> Tensor:
        if tensor.dim() < 2 or tensor.shape[1] != old:
            return tensor
        if tensor.is_meta or type(tensor) is not Tensor:
            return tensor.new_empty((tensor.shape[0], length, *tensor.shape[2:]))
        return tensor[:, torch.arange(length, device=tensor.device) % old]

    return mapped(batch, change)


def mapped(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The batch with ``change`` applied to each tensor."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {name: mapped(value, change) for name, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(mapped(value, change) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(mapped(value, change) for value in batch)
    return batch


def _tensors(batch: Any) -> list[Tensor]:
    found: list[Tensor] = []
    mapped(batch, lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return found


def _names_taken(model: nn.Module) -> set[str] | None:
    parameters = inspect.signature(model.forward).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return {parameter.name for parameter in parameters}


def _takes(model: nn.Module, inputs: Any) -> bool:
    try:
        inspect.signature(model.forward).bind(*inputs)
    except TypeError:
        return False
    return True


def _loss_inside(output: Any) -> Any:
    if isinstance(output, Mapping):
        return output.get("loss")
    named = getattr(output, "loss", None)
    if named is not None:
        return named
    if isinstance(output, tuple | list) and output:
        return output[0]
    return output


def _shown(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"Tensor of shape {tuple(output.shape)}"
    return type(output).__name__
