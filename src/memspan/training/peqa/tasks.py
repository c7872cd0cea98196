"""Tasks: one integer model, and for each task the few numbers that were trained."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memspan.base import refuse
from memspan.base.files import fingerprint, load_state, save_state
from memspan.training.peqa.convert import BASE, layers
from memspan.training.peqa.layers import Quantized

__all__ = ["Task", "get_task", "load_task", "save_task", "set_task"]

_DIGEST = "_memspan_digest"


@dataclass(frozen=True)
class Task:
    """What training changed, and the integers it belongs to.

    Attributes:
        tensors: values by parameter name: all scales, and whatever else was trained.
        integers: checksum of the packed integers and zero points of all layers.

    Raises:
        BadInput: NaN or infinity.
    """

    tensors: dict[str, Tensor]
    integers: str

    def __post_init__(self) -> None:
        for name, tensor in self.tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                refuse("tensors", name, "it holds NaN or infinity: training has diverged, try a smaller rate")

    def memory_bytes(self) -> dict[str, int]:
        """Bytes of the task."""
        return {"parameters.task": sum(tensor.nbytes for tensor in self.tensors.values())}


def get_task(model: nn.Module) -> Task:
    """A copy of all scales and of everything else that is trained.

    Raises:
        BadInput: nothing in it is quantized.

    Example:
        >>> from memspan.training import peqa
        >>> model = peqa.quantize_(nn.Sequential(nn.Linear(192, 64)), bits=4)
        >>> before = peqa.get_task(model)
        >>> _ = model[0].scales.data.mul_(2)
        >>> after = peqa.get_task(model)
        >>> x = torch.ones(1, 192)
        >>> y = model(x)
        >>> peqa.set_task(model, before); peqa.set_task(model, after)
        >>> bool(torch.equal(model(x), y)), before.memory_bytes()
        (True, {'parameters.task': 256})
    """
    found = {name: parameter.detach().clone() for name, parameter in _of_task(model).items()}
    return Task(found, _integers(model))


@torch.no_grad()
def set_task(model: nn.Module, task: Task) -> None:
    """Write a task's numbers into the model; all of it is checked before the first write.

    What another task changed and this one does not (norms, biases, a head) goes back to what it was when the
    model was quantized.

    Raises:
        BadInput: the task belongs to other integers, or names or shapes do not agree. Nothing is
            changed then.
    """
    here, own = _integers(model), dict(model.named_parameters())
    if task.integers != here:
        refuse(
            "task",
            task.integers[:12],
            f"its scales belong to another integer model than this one ({here[:12]}): quantize the same "
            "weights with the same options, or load that model's state",
        )
    # Layers that share a weight share their scales: a task names them once.
    missing = sorted({f"{name}.scales" for name in layers(model)} & set(own) - set(task.tensors))
    if missing:
        refuse("task", missing[:5], "it lacks these scales")
    for name, tensor in task.tensors.items():
        if name not in own or own[name].shape != tensor.shape:
            seen = tuple(own[name].shape) if name in own else "no such parameter"
            refuse("task", name, f"it holds {tuple(tensor.shape)}, the model {seen}")
    base: dict[str, Tensor] = vars(model).setdefault(BASE, {})
    scaled = {f"{name}.scales" for name in layers(model)}
    for name in task.tensors:
        if name not in base and name not in scaled:  # unfrozen by hand since: as it is before its first task
            base[name] = own[name].detach().clone()
    written = {name: base[name] for name in base if name in own and name not in scaled} | task.tensors
    torch._foreach_copy_([own[name] for name in written], list(written.values()))


def save_task(path: str | os.PathLike[str], task: Task, dtype: torch.dtype | None = None) -> None:
    """Write a task as safetensors, atomically.

    Args:
        path: the file.
        task: from :func:`get_task`.
        dtype: of the numbers on disk, such as ``torch.bfloat16``; None keeps theirs, and every bit.

    Raises:
        BadInput: numbers that vanish or overflow in that dtype (float16, with 8 bits and small weights).
    """
    tensors = task.tensors
    if dtype is not None:
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            lost = (tensor == 0) & (task.tensors[name] != 0)
            if bool(lost.any()) or not bool(torch.isfinite(tensor).all()):
                refuse(
                    "dtype", dtype, f"numbers of {name} vanish or overflow in it: use torch.bfloat16 or None"
                )
    save_state(path, tensors, {"kind": "peqa.task", "integers": task.integers})


def load_task(path: str | os.PathLike[str]) -> Task:
    """Read what :func:`save_task` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        CorruptFile: it is truncated or altered.
        BadInput: it is the file of something else.
    """
    tensors, header = load_state(path, expect={"kind": "peqa.task"})
    return Task(tensors, str(header.get("integers")))


def _of_task(model: nn.Module) -> dict[str, nn.Parameter]:
    scaled = {f"{name}.scales" for name in layers(model)}
    if not scaled:
        refuse("model", type(model).__name__, "nothing in it is quantized; call quantize_ first")
    return {name: p for name, p in model.named_parameters() if p.requires_grad or name in scaled}


def _integers(model: nn.Module) -> str:
    """Checksum over all layers; a layer's own is kept as long as its buffers are not written to."""
    found = layers(model)
    if not found:
        refuse("model", type(model).__name__, "nothing in it is quantized; call quantize_ first")
    return fingerprint({name: _digest(layer) for name, layer in found.items()})


def _digest(layer: Quantized) -> str:
    held = [layer.qweight, layer.zeros, *([] if layer.perm is None else [layer.perm])]
    stamp: Any = [(tensor.data_ptr(), tensor._version) for tensor in held]
    known = vars(layer).get(_DIGEST)
    if known is None or known[0] != stamp:
        each = [fingerprint(tensor.detach().cpu().numpy()) for tensor in held]
        known = (stamp, fingerprint([layer.bits, *each]))
        vars(layer)[_DIGEST] = known
    return str(known[1])
