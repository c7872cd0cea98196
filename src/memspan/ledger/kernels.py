"""Bytes that an operator's kernel takes and gives back before it returns: unfolded images, reordered weights.

Between operators nothing of them is left, so no dispatch ledger and no trace sees them; a convolution on the
CPU can hold more than its inputs and outputs together. How much depends on shapes, strides, dtypes, threads
and the libraries that torch was built with. So it is measured: the same operator runs again, alone, on zeros
of the same layout, under the allocator's own account, and the answer is kept. This happens after the counted
program and outside its modes: its random numbers, gradients and tensors are not touched. On CUDA, where
cuDNN takes its workspaces so, it resets the device's peak statistics, and so only plans do it there.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from memspan.ledger.allocator import AllocatorPeak

__all__ = [
    "HALVES",
    "MIXED",
    "ON_CUDA",
    "SCRATCH",
    "Invocation",
    "invocation",
    "kind_of",
    "may_hold",
    "scratch_bytes",
]

SCRATCH, MIXED, ON_CUDA, HALVES = 4, 8, 16, 32
"""Flags of an operator: its kernel may hold scratch; it may where its inputs differ in dtype; it may on CUDA
(a sum over many rows does); it may with 16-bit inputs (processors with tile registers lay them out anew)."""

# fmt: off
_PRODUCTS = frozenset(("mm", "addmm", "bmm", "baddbmm", "dot", "mv", "addmv"))
_HOLD_NONE = frozenset((
    "copy_", "clone", "_to_copy", "embedding", "native_dropout", "cat", "stack", "fill_", "zero_",
    "bernoulli_", "uniform_", "normal_", "random_", "select_backward", "slice_backward", "lift_fresh",
    "_local_scalar_dense", "is_pinned", "set_", "resize_", "arange", "item", "equal", "detach_",
    "_unsafe_view", "_reshape_copy",
))
_NONE_ON_CPU = frozenset((
    "native_layer_norm", "_softmax", "_log_softmax", "_softmax_backward_data", "embedding_dense_backward",
    "_log_softmax_backward_data", "nll_loss_forward", "nll_loss_backward", "sum",
))
# fmt: on
_CUDNN = 256 << 20  # a workspace that cuDNN may take for a small convolution too
_DIM_TAGS = frozenset(
    tag
    for name in ("dynamic_output_shape", "data_dependent_output", "inplace_view")
    if (tag := getattr(torch.Tag, name, None)) is not None
)


class _Spec(NamedTuple):
    """A tensor argument without its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: str


class Invocation(NamedTuple):
    """One call of an operator, as far as its kernel's scratch can depend on it."""

    operator: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]

    @property
    def tensors(self) -> list[_Spec]:
        """What the tensor arguments look like."""
        return [*_specs((self.args, self.kwargs))]

    @property
    def device(self) -> str:
        """Kind of device that it runs on: CUDA's where any argument lies there."""
        return max((one.device for one in self.tensors), default="cpu")

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor arguments."""
        return sum(map(_span, self.tensors))

    @property
    def most(self) -> int:
        """A size that the scratch does not exceed: copies of every argument, and unfolded images."""
        copies = 4 * sum(math.prod(one.shape) * max(one.dtype.itemsize, 4) for one in self.tensors)
        if "conv" not in str(self.operator):
            return copies
        kernels = [math.prod(one.shape[2:]) for one in self.tensors if len(one.shape) > 2]
        unfolded = copies * (1 + (min(kernels) if kernels else 1))
        return unfolded + _CUDNN if self.device == "cuda" else unfolded


def kind_of(operator: Any) -> int:
    """What an operator's kernel may hold: a flag, or 0 for those that hold nothing worth the name.

    Example:
        >>> kind_of(torch.ops.aten.convolution.default) == SCRATCH, kind_of(torch.ops.aten.cat.default)
        (True, 0)
    """
    if getattr(operator, "namespace", "") != "aten" or operator.is_view:
        return 0
    name = operator._schema.name.removeprefix("aten::")
    if name in _HOLD_NONE or name.startswith(
        ("_foreach", "_fused", "empty", "new_", "ones", "zeros", "full")
    ):
        return 0
    if _DIM_TAGS.intersection(operator.tags):
        return 0
    if name in _PRODUCTS:
        return HALVES
    if name in _NONE_ON_CPU:
        return ON_CUDA
    return MIXED if torch.Tag.pointwise in operator.tags else SCRATCH


def may_hold(kind: int, args: tuple[Any, ...], cuda: bool) -> bool:
    """Whether a call of an operator of this kind may hold scratch.

    Example:
        >>> may_hold(ON_CUDA, (torch.zeros(2),), cuda=False)
        False
    """
    if kind & SCRATCH:
        return True
    if kind & ON_CUDA:
        return cuda
    if kind & HALVES:
        return (
            not cuda and _tiles() and any(isinstance(one, Tensor) and one.dtype.itemsize == 2 for one in args)
        )
    if len(args) < 2 or not isinstance(args[0], Tensor) or not isinstance(args[1], Tensor):
        return False
    one, other = args[0].dtype, args[1].dtype  # the kernel casts a copy where they differ
    return one is not other and other is not torch.bool and args[1].dim() > 0


@functools.cache
def _tiles() -> bool:
    """Whether this processor multiplies 16-bit tiles (AMX)."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(supported and supported())


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


def scratch_bytes(one: Invocation, max_bytes: int) -> int | None:
    """Bytes that the kernel holds at most beyond what it was given and what it returns.

    Args:
        one: the call.
        max_bytes: do not run it where its arguments alone take more.

    Returns:
        None where it was not run (too large, or a profiler is running), or could not be.

    Example:
        >>> x, w = torch.zeros(2, 8, 9, 9), torch.zeros(4, 8, 3, 3)
        >>> call = (x, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
        >>> scratch_bytes(invocation(torch.ops.aten.convolution.default, call, None), 10) is None
        True
    """
    setting: tuple[Any, ...] = (torch.get_num_threads(), torch.backends.mkldnn.enabled)
    if one.device == "cuda":
        if not torch.cuda.is_available():
            return None
        chosen = torch.backends.cudnn
        setting = (chosen.enabled, chosen.benchmark, chosen.deterministic, chosen.allow_tf32)
    key = (one, setting)
    if key in _measured:
        return _measured[key]
    if one.nbytes > max_bytes or torch._C._autograd._profiler_enabled():
        return None
    _measured[key] = _measure(one)
    return _measured[key]


_measured: dict[Any, int | None] = {}


def _measure(one: Invocation) -> int | None:
    with _apart(one.device):
        try:
            for _ in range(2):  # the first run also fills the libraries' caches
                args, kwargs = _thawed(one.args), dict(_thawed(one.kwargs))
                with AllocatorPeak(one.device) as seen:
                    result = one.operator(*args, **kwargs)
                del result, args, kwargs
        except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError):
            return None
    return max(0, seen.rise - max(0, seen.growth))


@contextmanager
def _apart(device: str) -> Iterator[None]:
    """Outside the counted program: no modes, no graph, no autocast, and the random streams are put back."""
    devices = [torch.cuda.current_device()] if device == "cuda" else []
    with ExitStack() as stack:
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(torch.no_grad())
        for kind in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


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


def _thawed(value: Any) -> Any:
    if isinstance(value, _Spec):
        count = _span(value) // value.dtype.itemsize
        storage = torch.zeros(count, dtype=value.dtype, device=value.device)
        return storage.as_strided(value.shape, value.stride)
    if isinstance(value, tuple):
        return [_thawed(item) for item in value]
    return value


def _specs(value: Any) -> Iterator[_Spec]:
    if isinstance(value, _Spec):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _specs(item)


def _span(spec: _Spec) -> int:
    """Bytes from a tensor's first number to its last."""
    if not all(spec.shape):
        return 0
    last = sum((size - 1) * step for size, step in zip(spec.shape, spec.stride, strict=True))
    return (last + 1) * spec.dtype.itemsize
