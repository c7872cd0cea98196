"""What the autograd graph keeps for the backward pass, read without touching it.

The graph is walked from ``grad_fn``; each node tells what it saved. Reading is pure observation: nothing is
unpacked, so that no version check fires, no user hook runs (a checkpoint's hook would recompute) and nothing
is copied. Hooks on saved tensors are not used: they switch off autograd's in-place check and can leak.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from memspan.base import refuse
from memspan.ledger.bytes import storages

__all__ = ["leaves", "saved_bytes", "saved_tensors", "tensors_in"]

_ATTRIBUTES: dict[type, tuple[str, ...]] = {}
_ABSENT = object()
_HALF_WIDTH = {
    torch.float64: torch.float32,
    torch.int64: torch.int32,
    torch.complex128: torch.complex64,
}


def saved_bytes(outputs: object, exclude: Iterable[object] = (), *, parameters: bool = False) -> int:
    """Bytes that the graph behind a loss or output keeps for the backward pass.

    A storage counts once, however many operators saved it and through however many views. Parameters, trained
    or frozen, and their views are not counted: they are held anyway. What was detached from a parameter looks
    like any other tensor; name the module in ``exclude``.

    Args:
        outputs: a tensor, or a container of tensors, with a graph.
        exclude: modules, tensors or containers of tensors whose storages are not counted (inputs, frozen
            weights: a module excludes its parameters and buffers).
        parameters: count ``nn.Parameter`` storages too.

    Returns:
        Bytes, not rounded. 0 without a graph.

    Raises:
        BadInput: there is no tensor in ``outputs``.

    Example:
        >>> layer, x = nn.Linear(8, 4), torch.zeros(2, 8)
        >>> saved_bytes(layer(x)), saved_bytes(layer(x), exclude=[x])
        (64, 0)
    """
    found = list(tensors_in(outputs))
    if not found:
        refuse("outputs", type(outputs).__name__, "give a loss, an output tensor, or a container of tensors")
    left_out = {
        storage._cdata for item in exclude for tensor in tensors_in(item) for storage in storages(tensor)
    }
    kept: dict[int, int] = {}
    for tensor in saved_tensors(found):
        parameter = isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
        for storage in storages(tensor):
            if parameter and not parameters:
                left_out.add(storage._cdata)
            kept[storage._cdata] = storage.nbytes()
    if not parameters:  # a view of a parameter (the transposed weight) is saved by its base's storage
        for leaf in leaves(found):
            if isinstance(leaf, nn.Parameter):
                left_out.update(storage._cdata for storage in storages(leaf))
    return sum(size for key, size in kept.items() if key not in left_out)


def saved_tensors(outputs: Iterable[Tensor]) -> list[Tensor]:
    """Tensors that the nodes behind ``outputs`` saved, as they are held: one entry per saved slot.

    Where a user's hooks packed a tensor, what they made of it is looked into instead. Saved Python numbers
    are skipped.
    """
    found: list[Tensor] = []
    opened: set[int] = set()
    for node in _nodes(outputs):
        found.extend(_saved_by(node, opened))
    return found


def tensors_in(thing: object) -> Iterator[Tensor]:
    """Tensors in nested containers, modules (parameters and buffers) and graph-free wrappers."""
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, nn.Module):
        yield from thing.parameters()
        yield from thing.buffers()
    elif isinstance(thing, Mapping):
        for value in thing.values():
            yield from tensors_in(value)
    elif isinstance(thing, list | tuple | set | frozenset):
        for value in thing:
            yield from tensors_in(value)
    elif hasattr(thing, "__dataclass_fields__") and not isinstance(thing, type):
        for name in thing.__dataclass_fields__:
            yield from tensors_in(getattr(thing, name, None))


def _nodes(outputs: Iterable[Tensor]) -> Iterator[Any]:
    stack: list[Any] = [tensor.grad_fn for tensor in outputs if tensor.grad_fn is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)


def leaves(outputs: Iterable[Tensor]) -> Iterator[Tensor]:
    """Leaves that the graph behind ``outputs`` ends in."""
    for node in _nodes(outputs):
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor):
            yield leaf


def _saved_by(node: Any, opened: set[int]) -> Iterator[Tensor]:
    kind = type(node)
    names = _ATTRIBUTES.get(kind)
    if names is None:
        names = tuple(name for name in dir(kind) if name.startswith("_raw_saved_"))
        _ATTRIBUTES[kind] = names
    for name in names:
        try:
            value = getattr(node, name)
        except RuntimeError:  # released by a backward pass
            continue
        yield from _open(value, node, name, opened)
    held = getattr(node, "__dict__", None)
    if held:  # custom functions also hang tensors on ctx
        yield from tensors_in(list(held.values()))


def _open(value: object, node: Any, name: str, opened: set[int]) -> Iterator[Tensor]:
    if value is None:
        return
    if isinstance(value, list | tuple):
        for item in value:
            yield from _open(item, node, name, opened)
        return
    data = getattr(value, "data", _ABSENT)
    if data is _ABSENT:  # older torch: unpacking is the only way
        try:
            data = getattr(
                node, "saved_tensors" if name == "_raw_saved_tensors" else name.replace("_raw", "")
            )
        except RuntimeError:
            return
    for tensor in tensors_in(data):
        if not _python_number(tensor):
            yield tensor
    hook = getattr(value, "unpack_hook", None)
    if hook is not None:
        yield from _behind(hook, opened)


def _behind(hook: object, opened: set[int]) -> Iterator[Tensor]:
    """Tensors that a user's unpack hook holds on to: what a checkpoint will recompute from."""
    for cell in getattr(hook, "__closure__", None) or ():
        try:
            content = cell.cell_contents
        except ValueError:  # not bound yet
            continue
        if id(content) in opened or isinstance(content, type | nn.Module):
            continue
        opened.add(id(content))
        held = [content, *getattr(content, "__dict__", {}).values()]
        for item in held:
            if isinstance(item, nn.Module):
                continue
            for tensor in (*tensors_in(item), *_tensors_saved_in(item)):
                yield tensor
                if tensor.grad_fn is not None and id(tensor.grad_fn) not in opened:
                    opened.add(id(tensor.grad_fn))
                    yield from _saved_by(tensor.grad_fn, opened)


def _tensors_saved_in(item: object) -> Iterator[Tensor]:
    """What autograd's own saved-tensor handles in a list hold (a checkpoint keeps its arguments so)."""
    for handle in item if isinstance(item, list | tuple) else (item,):
        if type(handle).__name__ == "SavedTensor":
            data = getattr(handle, "data", None)
            if isinstance(data, Tensor):
                yield data


def _python_number(tensor: Tensor) -> bool:
    """Whether a saved tensor is a Python number in disguise (the divisor of ``x / 4.0``).

    Such a tensor yields to any tensor's type in promotion; a real one of no dimensions does not.
    """
    narrow = _HALF_WIDTH.get(tensor.dtype)
    if narrow is None or tensor.dim() or tensor.requires_grad or tensor.device.type != "cpu":
        return False
    return torch.result_type(tensor, torch.empty((), dtype=narrow)) is narrow
