"""One call of an operator without its values: what a kernel's scratch can depend on, hashable and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Invocation", "decoded", "encoded", "invocation", "thawed"]


class _Spec(NamedTuple):
    """A tensor argument without its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: str

    @property
    def span(self) -> int:
        """Bytes from the tensor's first number to its last."""
        if not all(self.shape):
            return 0
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return (last + 1) * self.dtype.itemsize


class Invocation(NamedTuple):
    """One call of an operator, as far as its kernel's scratch can depend on it."""

    operator: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]

    @property
    def device(self) -> str:
        """Kind of device that it runs on: CUDA's where any argument lies there."""
        return max((one.device for one in _specs((self.args, self.kwargs))), default="cpu")

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor arguments."""
        return sum(one.span for one in _specs((self.args, self.kwargs)))


def invocation(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Invocation | None:
    """A call without its values; None where it is not a call on CPU or CUDA tensors of the plain kind.

    Example:
        >>> x = torch.zeros(2, 3)
        >>> invocation(torch.ops.aten.mean.default, (x,), None).nbytes
        24
    """
    try:
        one = Invocation(operator, _frozen(args), () if not kwargs else _frozen(tuple(kwargs.items())))
        hash(one)
    except (TypeError, NotImplementedError, RuntimeError):
        return None
    return one


def thawed(value: Any) -> Any:
    """Arguments again, with zeros in place of the values."""
    if isinstance(value, _Spec):
        storage = torch.zeros(value.span // value.dtype.itemsize, dtype=value.dtype, device=value.device)
        return storage.as_strided(value.shape, value.stride)
    if isinstance(value, tuple):
        return [thawed(item) for item in value]
    return value


def encoded(one: Invocation) -> dict[str, Any]:
    """A call as JSON can hold it."""
    name = one.operator._schema.name
    found = {"operator": name, "overload": one.operator._overloadname, "module": ""}
    definition = torch._library.custom_ops.OPDEFS.get(name)
    if definition is not None:
        found["module"] = definition._init_fn.__module__
    return {**found, "args": _as_json(one.args), "kwargs": _as_json(one.kwargs)}


def decoded(document: dict[str, Any]) -> Invocation | None:
    """The call of a document that :func:`encoded` made; None where there is no such operator here.

    Example:
        >>> one = invocation(torch.ops.aten.sum.dim_IntList, (torch.zeros(2, 3), [0]), {"dtype": torch.int64})
        >>> decoded(encoded(one)) == one
        True
    """
    space, _, name = document["operator"].partition("::")
    try:
        operator = getattr(getattr(getattr(torch.ops, space), name), document["overload"] or "default")
    except AttributeError:
        return None
    return Invocation(operator, _from_json(document["args"]), _from_json(document["kwargs"]))


_NAMED: dict[str, dict[str, Any]] = {
    "dtype": {str(item): item for item in vars(torch).values() if isinstance(item, torch.dtype)},
    "layout": {str(item): item for item in vars(torch).values() if isinstance(item, torch.layout)},
    "memory_format": {
        str(item): item for item in vars(torch).values() if isinstance(item, torch.memory_format)
    },
}


def _as_json(value: Any) -> Any:
    if isinstance(value, _Spec):
        return {"tensor": [value.shape, value.stride, str(value.dtype), value.device]}
    if isinstance(value, tuple):
        return [_as_json(item) for item in value]
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for kind, names in _NAMED.items():
        if str(value) in names and not isinstance(value, str):
            return {kind: str(value)}
    return value


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_from_json, value))
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        shape, stride, dtype, device = content
        return _Spec(tuple(shape), tuple(stride), _NAMED["dtype"][dtype], device)
    if kind == "complex":
        return complex(*content)
    if kind == "device":
        return torch.device(content)
    return _NAMED[kind][content]


def _frozen(value: Any) -> Any:
    if isinstance(value, Tensor):
        kind = value.device.type
        if kind not in ("cpu", "cuda") or value.layout is not torch.strided or value.is_quantized:
            raise TypeError
        return _Spec(tuple(value.shape), value.stride(), value.dtype, kind)
    if isinstance(value, list | tuple):
        return tuple(map(_frozen, value))
    if isinstance(value, torch.Generator):
        return None
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device):
        return value
    if isinstance(value, torch.layout | torch.memory_format | complex):
        return value
    raise TypeError


def _specs(value: Any) -> Iterator[_Spec]:
    if isinstance(value, _Spec):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _specs(item)
