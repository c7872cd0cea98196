"""What fake tensors get wrong, put right: one table, each line with the torch in which it was last seen.

A trace is as good as torch's fake kernels. Where they promise other storages than the real kernels give, the
line here says so and mends it; a test runs each line's sample for real, and fails when the line may go.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from memspan.ledger.kernels import held_by, invocation

__all__ = ["CORRECTIONS", "Correction", "Facts", "corrected", "one_sequence_a_row"]

_LIMIT = 1 << 30  # bytes of arguments with which a recurrent layer is run to see its workspace
_aten = torch.ops.aten


class Correction(NamedTuple):
    """One thing that fake kernels say wrongly about the CPU's.

    Attributes:
        operators: whose fake kernels.
        torch: the version in which it was last seen.
        why: what the real kernel does.
        apply: ``apply(args, found)`` gives the results as they really are.
        sample: a call that shows it: operator and arguments.
        instead: the fake kernel refuses the call; ``apply`` is asked in its place, with ``found`` None.
    """

    operators: tuple[Any, ...]
    torch: str
    why: str
    apply: Callable[[tuple[Any, ...], Any], Any]
    sample: Callable[[], tuple[Any, tuple[Any, ...]]]
    instead: bool = False


def _wide_statistics(args: tuple[Any, ...], found: Any) -> Any:
    weight = next((item for item in args[1:4] if isinstance(item, Tensor)), None)
    if args[0].dtype.itemsize != 2 or weight is None or weight.dtype is not torch.float32:
        return found
    return (found[0], *(part.float() for part in found[1:]))


def _narrow_gradient(args: tuple[Any, ...], found: Any) -> Any:
    return (found[0].to(args[1].dtype), *found[1:]) if isinstance(found[0], Tensor) else found


def _laid_out_plainly(args: tuple[Any, ...], found: Any) -> Any:
    if not isinstance(found[0], Tensor) or found[0].is_contiguous():
        return found
    return (found[0].new_empty(found[0].shape), *found[1:])


def _weight_gradient(args: tuple[Any, ...], found: Any) -> Any:
    if found[1] is not None or not _by_onednn(args):
        return found
    return (found[0], torch.empty_like(args[2]), found[2])


def _unshrunk(args: tuple[Any, ...], found: Any) -> Any:
    if found.dim() or max(args[0].numel(), args[1].numel()) <= 1:
        return found
    shape = torch.broadcast_shapes(args[0].shape, args[1].shape)  # type: ignore[no-untyped-call]
    return torch.empty(shape, dtype=found.dtype, device=found.device).as_strided((), ())


def _grouped(args: tuple[Any, ...], found: Any) -> Any:
    one, other = args[0], args[1]
    groups = () if one.dim() + other.dim() == 5 else (len(args[2] if len(args) > 2 else one),)
    return one.new_empty((*groups, one.shape[-2], other.shape[-1]))


def _workspace(args: tuple[Any, ...], found: Any) -> Any:
    one = invocation(_aten.mkldnn_rnn_layer.default, args, None)
    held = None if one is None else held_by(one, _LIMIT)
    if held is None:
        raise _NotMeasured("the workspace of aten.mkldnn_rnn_layer")
    return (*found[:3], found[3].new_empty(held.results[3]))


class _NotMeasured(Exception):
    pass


def _halves(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


def _layer_norm() -> tuple[Any, tuple[Any, ...]]:
    return _aten.native_layer_norm.default, (_halves(4, 8), [8], torch.ones(8), torch.zeros(8), 1e-5)


def _layer_norm_backward() -> tuple[Any, tuple[Any, ...]]:
    x, row = torch.zeros(2, 6, 8), torch.zeros(2, 6, 1)
    given = torch.zeros(2, 8, 6).mT
    return _aten.native_layer_norm_backward.default, (
        *(given, x, [8], row, row),
        *(torch.ones(8), torch.zeros(8), [True, True, True]),
    )


def _group_norm_backward() -> tuple[Any, tuple[Any, ...]]:
    x, row = _halves(2, 4, 3), torch.zeros(2, 2)
    return _aten.native_group_norm_backward.default, (
        *(x, x, row, row, torch.ones(4)),
        *(2, 4, 3, 2, [True, True, True]),
    )


def _convolution_backward() -> tuple[Any, tuple[Any, ...]]:
    x, w = torch.zeros(2, 3, 8, 8), torch.zeros(4, 3, 3, 3)
    return _aten.convolution_backward.default, (
        *(torch.zeros(2, 4, 6, 6), x, w, [4], [1, 1], [0, 0], [1, 1]),
        *(False, [0, 0], 1, [True, False, True]),
    )


def _experts() -> tuple[Any, tuple[Any, ...]]:
    ends = torch.tensor([4, 8], dtype=torch.int32)
    return _aten._grouped_mm.default, (torch.zeros(8, 16), torch.zeros(2, 16, 24), ends)


def _recurrent() -> tuple[Any, tuple[Any, ...]]:
    x, w, h, b, s = (torch.zeros(shape) for shape in ((5, 3, 6), (32, 6), (32, 8), (32,), (3, 8)))
    return _aten.mkldnn_rnn_layer.default, (
        *(x, w, h, b, b, s, s),
        *(False, [], 2, 8, 1, True, False, False, True),
    )


CORRECTIONS = (
    Correction(
        (
            _aten.native_layer_norm.default,
            _aten.native_group_norm.default,
            _aten.native_batch_norm.default,
        ),
        "2.13",
        "row statistics of 16-bit inputs beside float32 weights are float32",
        _wide_statistics,
        _layer_norm,
    ),
    Correction(
        (_aten.native_group_norm_backward.default,),
        "2.13",
        "the input's gradient is 16-bit as the input is",
        _narrow_gradient,
        _group_norm_backward,
    ),
    Correction(
        (_aten.native_layer_norm_backward.default,),
        "2.13",
        "the input's gradient is contiguous, however the output's lies; the next layer copies nothing",
        _laid_out_plainly,
        _layer_norm_backward,
    ),
    Correction(
        (_aten.convolution_backward.default,),
        "2.13",
        "oneDNN works out the weight's gradient whenever the bias's is wanted",
        _weight_gradient,
        _convolution_backward,
    ),
    Correction(
        (
            _aten.mse_loss.default,
            _aten.smooth_l1_loss.default,
            _aten.soft_margin_loss.default,
            _aten.binary_cross_entropy.default,
        ),
        "2.13",
        "the losses of all elements are shrunk to one number, whose storage still holds all",
        _unshrunk,
        lambda: (_aten.mse_loss.default, (torch.zeros(8, 8), torch.zeros(8, 8))),
    ),
    Correction(
        (_aten.mkldnn_rnn_layer.default,),
        "2.13",
        "oneDNN returns the workspace that the backward pass reads; its size is oneDNN's own",
        _workspace,
        _recurrent,
    ),
    Correction(
        (_aten._grouped_mm.default,),
        "2.13",
        "products of groups take every floating dtype; the fake kernel refuses all but bfloat16",
        _grouped,
        _experts,
        instead=True,
    ),
)
_BY_OPERATOR = {operator: one for one in CORRECTIONS for operator in one.operators}


class Facts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Puts the table's corrections into a trace; the ledger stands above it and sees corrected tensors alone.

    Attributes:
        missed: what could not be put right, in words.
        stepping: optimizers whose step is running. A number that one of them reads from a tensor scales an
            update and decides no shape: it is taken as 1 (Adafactor reads norms).
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.missed: dict[str, None] = {}
        self.stepping = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        one = _BY_OPERATOR.get(func)
        if one is not None and one.instead and args[0].dtype is not torch.bfloat16:
            return one.apply((*args, *(kwargs or {}).values()), None)
        try:
            found = func(*args, **(kwargs or {}))
        except DataDependentOutputException:
            if not self.stepping or func is not _aten._local_scalar_dense.default:
                raise
            return True if args[0].dtype is torch.bool else 1.0 if args[0].is_floating_point() else 1
        if one is None:
            return found
        try:
            return one.apply(args, found)
        except _NotMeasured as error:
            self.missed[str(error)] = None
            return found

    def enter_step(self, *_: object) -> None:
        """An optimizer's step begins."""
        self.stepping += 1

    def leave_step(self, *_: object) -> None:
        """An optimizer's step has ended."""
        self.stepping -= 1


@contextmanager
def corrected(device: str, home: str) -> Iterator[Facts]:
    """A trace in which this device's facts hold. Enter it inside the fake mode.

    Args:
        device: what is planned for.
        home: where the fake tensors stand.
    """
    facts = Facts()
    with ExitStack() as stack:
        stack.enter_context(_swaps_by_data())
        before = register_optimizer_step_pre_hook(facts.enter_step)
        after = register_optimizer_step_post_hook(facts.leave_step)
        stack.callback(before.remove)
        stack.callback(after.remove)
        if home == "cpu":
            stack.enter_context(facts)  # type: ignore[no-untyped-call]
        if device == "cuda" and home == "cpu":
            stack.enter_context(_MasksOfOneByte())
        yield facts


@contextmanager
def _swaps_by_data() -> Iterator[None]:
    """``.to``, ``.half`` and the like swap a fake parameter, and fail because the fake mode watches it.

    Setting ``.data`` leaves the same parameter with the new dtype, as on real tensors.
    """
    swap = torch.utils.swap_tensors

    def swap_tensors(old: Tensor, new: Tensor) -> None:
        if isinstance(old, FakeTensor):
            old.data = new.data
        else:
            swap(old, new)  # type: ignore[no-untyped-call]

    torch.utils.swap_tensors = swap_tensors
    try:
        yield
    finally:
        torch.utils.swap_tensors = swap


@contextmanager
def one_sequence_a_row(batch: Any) -> Iterator[None]:
    """Transformers looks at positions for several sequences in one row, and on fake tensors assumes them.

    Unless the batch gives positions itself, a row is one sequence. Enter it when the model is there: building
    one may be what imports transformers.
    """
    masks: Any = sys.modules.get("transformers.masking_utils")
    name = "find_packed_sequence_indices"
    given = isinstance(batch, Mapping) and "position_ids" in batch
    if masks is None or given or not hasattr(masks, name):
        yield
        return
    kept = getattr(masks, name)
    setattr(masks, name, lambda *_, **__: None)
    try:
        yield
    finally:
        setattr(masks, name, kept)


class _MasksOfOneByte(TorchFunctionMode):
    """Dropout as CUDA does it: the mask is kept as bool, where the CPU keeps it in the input's dtype."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.dropout:
            asked = inspect.signature(nn.functional.dropout).bind(*args, **kwargs)
            asked.apply_defaults()
            tensor, p, training, inplace = asked.arguments.values()
            if training and p > 0 and not inplace:
                return torch.native_dropout(tensor, p, True)[0]
        return func(*args, **kwargs)


def _by_onednn(args: tuple[Any, ...]) -> bool:
    _, inputs, weight, bias_sizes, stride, padding, dilation, transposed, more, groups, wanted = args
    if not wanted[2]:
        return False
    bias = None if bias_sizes is None else weight.new_empty(bias_sizes)
    chosen = torch._C._select_conv_backend(
        inputs, weight, bias, stride, padding, dilation, transposed, more, groups
    )
    return str(chosen.name).startswith("Mkldnn")
