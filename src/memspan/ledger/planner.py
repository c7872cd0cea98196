"""Prediction before running: a training step traced on tensors that hold no bytes.

:func:`plan` builds the model under torch's fake tensors (nothing is allocated, whatever its size), converts
it with the registered methods, runs two whole steps and reads the peak of the second through the same
:class:`~memspan.ledger.Ledger` that counts real runs. What users know as a calculator's estimate is here the
program itself: every operator, every temporary, every optimizer state. When not to use it: a program whose
shapes depend on values is measured on a small real batch instead and extended as a straight line
(``exact=False``); memory that no operator allocates (CUDA context, libraries' workspaces) is not in it.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from memspan.base import refuse
from memspan.base.parallel import OWN_FILE
from memspan.ledger.bytes import Budget
from memspan.ledger.methods import Method, method
from memspan.ledger.snapshot import Holding, Snapshot
from memspan.ledger.step import Loss, batch_size, mapped, resized, stretched, training_step
from memspan.ledger.tracker import KERNELS, Ledger
from memspan.ledger.workspaces import Products, end_of_block, workspace_bytes
from memspan.ledger.world import fake_ranks, shard_

__all__ = ["Factory", "Job", "MakesOptimizer", "Plan", "load_factory", "plan"]

Grow = Literal["batch", "length"]
MakesOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
Chosen = str | tuple[str, Mapping[str, Any]]

_CANNOT_TRACE = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    GuardOnDataDependentSymNode,
)
_CUDA_BLOCK = 512


@dataclass(frozen=True)
class Plan:
    """The predicted peak of one training step.

    Attributes:
        total: bytes at the peak.
        by_category: bytes by ledger category; sums to ``total``.
        phase: what runs at the peak, such as ``"backward:blocks.3.mlp"``.
        exact: True when the step itself was traced for this device: the figure is then the dispatch ledger's
            of the real step, with the scratch of its kernels (see ``kernels``).
        phases: the highest total within each phase of the step (forward, backward, recompute, optimizer).
        note: how the figure was obtained, and what it leaves out.
        batch: examples in the batch (per pass, where gradients accumulate).
        device: the device planned for.
        methods: names of the methods applied.
        parameters: numbers in the model's parameters.
        trained: of these, the ones that receive gradients.
        flops: of the whole step's matrix products and convolutions, 2 per multiply-add; None when not traced.
        snapshot: the peak in full (by module, largest blocks), where traced.
    """

    total: int
    by_category: dict[str, int]
    phase: str
    exact: bool
    note: str
    batch: int
    device: str
    methods: tuple[str, ...]
    parameters: int
    trained: int
    phases: dict[str, int] = field(default_factory=dict)
    flops: int | None = None
    snapshot: Snapshot | None = field(default=None, repr=False, compare=False)

    def table(self) -> list[tuple[str, int, float]]:
        """Rows (category, bytes, share of the peak), largest first."""
        rows = sorted(self.by_category.items(), key=lambda item: -item[1])
        return [(name, size, size / self.total if self.total else 0.0) for name, size in rows]

    def fits(self, budget: str | int | Budget) -> bool:
        """Whether the peak is within the budget."""
        return self.total <= Budget.parse(budget).bytes

    @property
    def advice(self) -> str:
        """One sentence: what holds the peak, and what kind of change lowers it."""
        largest = max(self.by_category, key=lambda name: self.by_category[name], default="")
        for start, sentence in _ADVICE.items():
            if largest.startswith(start):
                return f"At the peak ({self.phase}) most bytes are {largest}: {sentence}"
        return f"At the peak ({self.phase}) most bytes are {largest}."


_ADVICE = {
    "saved_activations": "recompute blocks in the backward pass, use 16-bit floats, or a smaller batch.",
    "temporaries.optimizer": "step one tensor at a time (foreach=False), or a plainer optimizer.",
    "temporaries": "a smaller batch, or a loss that works through the batch or vocabulary in parts.",
    "optimizer_state": "train fewer parameters, keep smaller moments, or shard the state over ranks.",
    "gradients": "train fewer parameters, or shard gradients over ranks.",
    "parameters": "store frozen weights in fewer bits, or shard parameters over ranks.",
    "inputs": "load the batch in a smaller dtype, or in parts.",
}


@dataclass(frozen=True)
class Job:
    """Everything that says which step is meant; :func:`plan` and ``fit`` trace it at several batch sizes."""

    build_model: Callable[[], nn.Module]
    batch: Any
    optimizer: MakesOptimizer | None = torch.optim.AdamW
    method: tuple[tuple[Method, Mapping[str, Any]], ...] = ()
    loss: Loss | None = None
    device: str = "cpu"
    accumulate: int = 1
    kernels: str | int | Budget | None = KERNELS
    world: int = 1
    grow: Grow = "batch"

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the methods."""
        return tuple(chosen.name for chosen, _ in self.method)

    @property
    def home(self) -> str:
        """Where this job can run here: ``"cpu"`` where it is planned for CUDA and there is none."""
        return self.device if self.device == "cuda" and torch.cuda.is_available() else "cpu"

    def ready(self) -> tuple[nn.Module, Optimizer | None]:
        """Model built and converted for real, and its optimizer."""
        with torch.device(self.home):
            model = self.build_model()
        return self.converted(model.to(self.home))

    def converted(self, model: nn.Module, mesh: Any = None) -> tuple[nn.Module, Optimizer | None]:
        """A built model converted in place, and its optimizer over what is trained.

        Over a mesh the model is sharded, unless a method says that it does that itself.
        """
        for chosen, options in self.method:
            model = chosen.convert_(model, **options, **({"mesh": mesh} if chosen.ranks else {}))
        if mesh is not None and not any(chosen.ranks for chosen, _ in self.method):
            model = shard_(model, mesh)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        makers = [chosen.optimizer for chosen, _ in self.method if chosen.optimizer is not None]
        if self.optimizer is None or not trained:
            return model, None
        optimizer = makers[-1](model, self.optimizer) if makers else self.optimizer(trained)
        if self.device == "cuda":
            _step_as_on_cuda(optimizer)
        return model, optimizer

    def sized(self, batch: Any, size: int) -> Any:
        """The batch with ``size`` examples, or with sequences of ``size``."""
        return resized(batch, size) if self.grow == "batch" else stretched(batch, size)

    def step(self, model: nn.Module, optimizer: Optimizer | None, batch: Any) -> None:
        """One training step."""
        own = [partial(chosen.step, **options) for chosen, options in self.method if chosen.step is not None]
        step = own[0] if own else None
        training_step(model, optimizer, batch, self.loss, accumulate=self.accumulate, step=step)

    def trace(self, size: int, *, flops: bool = False) -> Plan:
        """The second step of this job at a batch size, on fake tensors.

        Raises:
            One of torch's fake-tensor errors when shapes depend on values.
        """
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        home = self.home
        how = []
        with ExitStack() as stack:
            stack.enter_context(_quiet())
            mesh = stack.enter_context(fake_ranks(self.world))  # outside fake tensors: it looks at values
            stack.enter_context(mode)
            stack.enter_context(torch.device(home))
            stack.enter_context(_seeds_kept())
            stack.enter_context(_rules_of(self.device, home))
            stack.enter_context(_one_sequence_a_row(self.batch))
            try:
                model = self.build_model()
            except _CANNOT_TRACE:
                model = _built_for_real(self, mode)
                how.append("weights were built for real")
            model, optimizer = self.converted(model, mesh)
            model.train()
            batch = self.sized(_fake(self.batch, mode, home), size)
            with Products() as products:
                self.step(model, optimizer, batch)
            kernels = self.kernels if self.device == home else None
            with Ledger(model, optimizer, kernels=kernels) as led:
                self.step(model, optimizer, batch)
            counted = None
            if flops:
                with FlopCounterMode(display=False) as counter:
                    self.step(model, optimizer, batch)
                counted = int(counter.get_total_flops())
            parameters, trained = _numbers(model)
        peak, phases = led.peak, led.phase_peaks()
        if home == "cuda":
            kept = workspace_bytes(products.seen, torch.cuda.get_device_capability())
            peak = _beside(peak, kept)
            phases = {name: top + kept for name, top in phases.items()}
        if missed := led.unknown_kernels:
            how.append(
                f"scratch inside the kernels of {', '.join(missed)} may add to it and was not measured"
            )
        if self.device == "cuda" and home == "cpu":
            peak = _rounded(peak)
            how.append(_CUDA_NOTE)
        if self.world > 1:
            how.append(
                f"rank 0 of {self.world}, this batch on each; buffers of the network library are not in it"
            )
        return Plan(
            total=peak.total,
            by_category=dict(peak.by_category),
            phase=peak.phase,
            exact=not (missed or (self.device == "cuda" and home == "cpu")),
            note="; ".join(["second step traced on fake tensors", *how]),
            batch=size,
            device=self.device,
            methods=self.names,
            parameters=parameters,
            trained=trained,
            phases=phases,
            flops=counted,
            snapshot=peak,
        )

    def measure(self, size: int) -> Plan:
        """The second step of this job at a batch size, run for real with values from the batch."""
        model, optimizer = self.ready()
        model.train()
        batch = self.sized(self.real_batch(), size)
        self.step(model, optimizer, batch)
        with Ledger(model, optimizer, kernels=self.kernels) as led:
            self.step(model, optimizer, batch)
        parameters, trained = _numbers(model)
        peak = led.peak
        return Plan(
            total=peak.total,
            by_category=dict(peak.by_category),
            phase=peak.phase,
            exact=False,
            note=f"measured on a real step of {size} examples",
            batch=size,
            device=self.device,
            methods=self.names,
            parameters=parameters,
            trained=trained,
            phases=led.phase_peaks(),
            snapshot=peak,
        )

    def real_batch(self) -> Any:
        """The example batch with its values, on the device it is planned for where that is here.

        Raises:
            BadInput: the example holds no values.
        """

        def change(tensor: Tensor) -> Tensor:
            if tensor.is_meta or type(tensor) is not Tensor:
                seen = f"{type(tensor).__name__} on {tensor.device}"
                refuse("batch", seen, "this step is run for real: give example inputs that hold values")
            return tensor.detach().to(self.home).requires_grad_(tensor.requires_grad)

        return mapped(self.batch, change)

    def predict(self, size: int, *, flops: bool = False) -> Plan:
        """A trace where possible; else two small real steps and the straight line through them.

        Raises:
            BadInput: a model that can only be run for real, planned for more than one rank.
        """
        try:
            return self.trace(size, flops=flops)
        except _CANNOT_TRACE as error:
            reason = f"shapes depend on values ({type(error).__name__})"
            if self.world > 1:
                refuse("world", self.world, f"{reason}, and such a step is run for real, on one rank alone")
        large = self.measure(min(_SMALL, size))
        while large.batch < size:
            small, large = large, self.measure(min(2 * large.batch, size))
            found = _extended(small, large, size, reason) if large.batch < size else None
            if found is not None:
                return found
        return replace(large, note=f"{reason}: {large.note}")


_SMALL = 2  # batch of the smaller of two real steps; 1 is refused by BatchNorm on single pixels
_CUDA_NOTE = (
    "traced on the CPU with CUDA's block size, dropout masks and multi-tensor optimizer; cuBLAS workspaces, "
    "other attention kernels and the CUDA context are not in it"
)


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
    one = job(build_model, batch, optimizer, method, loss, device, accumulate, kernels, world)
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
) -> Job:
    """The arguments of :func:`plan`, checked."""
    if isinstance(build_model, nn.Module):
        build_model = _Existing(build_model)
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
    return Job(build_model, batch, optimizer, chosen_methods(method), loss, device, accumulate, limit, world)


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


class Factory(NamedTuple):
    """What :func:`load_factory` gives: the arguments that :func:`plan` needs, and the longest sequence."""

    build_model: Callable[[], nn.Module]
    batch: Any
    loss: Loss | None = None
    longest: int | None = None


def load_factory(where: str) -> Factory:
    """Model builder and example batch from the user's own file.

    The file is run, as ``python FILE`` would.

    Args:
        where: ``"path/to/file.py:function"``; the function takes nothing and returns
            ``(build_model, example_batch)`` or ``(build_model, example_batch, loss)``.

    Raises:
        BadInput: no such file or function, or something else is returned.

    Example:
        >>> load_factory("model.py")
        Traceback (most recent call last):
        memspan.base.refusal.BadInput: model='model.py': write path/to/file.py:function, where function()
        returns (build_model, example_batch) or (build_model, example_batch, loss)
    """
    usage = "function() returns (build_model, example_batch) or (build_model, example_batch, loss)"
    name, colon, function = where.rpartition(":")
    path = Path(name)
    if not colon or not function.isidentifier() or path.suffix != ".py":
        refuse("model", where, f"write path/to/file.py:function, where {usage}")
    if not path.is_file():
        refuse("model", where, f"there is no file {path}; the part before the colon is a path")
    spec = importlib.util.spec_from_file_location(f"{OWN_FILE}{path.stem}", path)
    if spec is None or spec.loader is None:
        refuse("model", where, f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.resolve().parent))
    if not callable(getattr(module, function, None)):
        offered = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        refuse("model", where, f"{path} has no function {function}; it has: {', '.join(offered) or 'none'}")
    made = getattr(module, function)()
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not callable(made[0]):
        refuse("model", where, f"{usage}, but it returned {type(made).__name__}")
    return Factory(*made)


class _Existing:
    """A module that exists, given out as a copy of its own storages; fake ones under fake tensors."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self) -> nn.Module:
        mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
        if isinstance(mode, FakeTensorMode):
            return _fake_copy(self.model, mode)
        return copy.deepcopy(self.model)


def _built_for_real(job: Job, mode: FakeTensorMode) -> nn.Module:
    """The model built outside the fake mode (its constructor looks at values), then made fake."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily(), torch.device("cpu"):  # only its shapes are wanted
        model = job.build_model()
    return _fake_copy(model, mode)


def _fake_copy(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    known: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) in known:
            continue
        with mode:
            empty: Tensor = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
            if isinstance(tensor, nn.Parameter):
                empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
        known[id(tensor)] = empty
    return copy.deepcopy(model, known)


def _fake(batch: Any, mode: FakeTensorMode, home: str) -> Any:
    def change(tensor: Tensor) -> Tensor:
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=home)
        return empty.requires_grad_(tensor.requires_grad)

    with mode:
        return mapped(batch, change)


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fake.*")
        yield


@contextmanager
def _one_sequence_a_row(batch: Any) -> Iterator[None]:
    """Transformers looks at positions for several sequences in one row, and on fake tensors assumes them.

    Unless the batch gives positions itself, a row is one sequence.
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


@contextmanager
def _seeds_kept() -> Iterator[None]:
    """A plan draws no random numbers from the caller's stream."""
    state = torch.default_generator.get_state() if not torch._C._len_torch_dispatch_stack() else None
    yield
    if state is not None:
        torch.default_generator.set_state(state)


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


class _KernelFacts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What the CPU's kernels return where torch's fake kernels say another thing.

    With 16-bit inputs and float32 weights, the norms' row statistics are float32, and group norm's input
    gradient is 16-bit. oneDNN's convolution works out the weight's gradient whenever the bias's is wanted.
    A few losses compute element by element and then shrink that tensor to one number,
    without giving its storage back: one number that holds a whole tensor. The ledger stands above this mode
    and sees the corrected tensors alone.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func in _NORMS and args[0].dtype in _HALVES:
            weight = next((item for item in args[1:4] if isinstance(item, Tensor)), None)
            if weight is not None and weight.dtype is torch.float32:
                return (found[0], *(part.float() for part in found[1:]))
        if func is torch.ops.aten.native_group_norm_backward.default and isinstance(found[0], Tensor):
            return (found[0].to(args[1].dtype), *found[1:])
        if func is torch.ops.aten.convolution_backward.default and found[1] is None and _by_onednn(args):
            return (found[0], torch.empty_like(args[2]), found[2])
        if func in _SHRUNK and found.dim() == 0 and max(args[0].numel(), args[1].numel()) > 1:
            whole = torch.empty(
                torch.broadcast_shapes(args[0].shape, args[1].shape),  # type: ignore[no-untyped-call]
                dtype=found.dtype,
                device=found.device,
            )
            return whole.as_strided((), ())
        return found


def _by_onednn(args: tuple[Any, ...]) -> bool:
    _, inputs, weight, bias_sizes, stride, padding, dilation, transposed, more, groups, wanted = args
    if not wanted[2]:
        return False
    bias = None if bias_sizes is None else weight.new_empty(bias_sizes)
    chosen = torch._C._select_conv_backend(
        inputs, weight, bias, stride, padding, dilation, transposed, more, groups
    )
    return str(chosen.name).startswith("Mkldnn")


_SHRUNK = (
    torch.ops.aten.mse_loss.default,
    torch.ops.aten.smooth_l1_loss.default,
    torch.ops.aten.soft_margin_loss.default,
    torch.ops.aten.binary_cross_entropy.default,
)
_HALVES = (torch.bfloat16, torch.float16)
_NORMS = (
    torch.ops.aten.native_group_norm.default,
    torch.ops.aten.native_layer_norm.default,
    torch.ops.aten.native_batch_norm.default,
)


@contextmanager
def _rules_of(device: str, home: str) -> Iterator[None]:
    """What fake tensors get wrong about this device, put right."""
    with ExitStack() as stack:
        if home == "cpu":
            stack.enter_context(_KernelFacts())  # type: ignore[no-untyped-call]
        if device == "cuda" and home == "cpu":
            stack.enter_context(_MasksOfOneByte())
        yield


def _step_as_on_cuda(optimizer: Optimizer) -> None:
    """Optimizers take the multi-tensor path on CUDA unless told otherwise; take it here too."""
    for group in optimizer.param_groups:
        if "foreach" in group and group["foreach"] is None and not group.get("fused"):
            group["foreach"] = True


def _beside(peak: Snapshot, workspaces: int) -> Snapshot:
    """The peak with what the device holds beside the tensors."""
    sizes = {
        "cuBLAS workspaces": workspaces,
        "ends of blocks": sum(end_of_block(block.bytes) for block in peak.holdings),
    }
    more = [
        Holding(size, "temporaries.kernel", operator=name, device=peak.device)
        for name, size in sizes.items()
        if size
    ]
    return Snapshot.of([*peak.holdings, *more], phase=peak.phase, device=peak.device)


def _rounded(peak: Snapshot) -> Snapshot:
    blocks = [
        replace(block, bytes=-(-block.bytes // _CUDA_BLOCK) * _CUDA_BLOCK, device="cuda")
        for block in peak.holdings
    ]
    return Snapshot.of(blocks, phase=peak.phase, device="cuda")


def lines_at(small: Plan, large: Plan, size: int) -> dict[str, int]:
    """Each phase's own peak at a batch size, on the straight line through two plans."""
    if large.batch == small.batch:
        return dict(large.phases)
    steps = (size - large.batch) / (large.batch - small.batch)
    tops = {}
    for name, b in large.phases.items():
        a = small.phases.get(name, b)
        tops[name] = round(b + (b - a) * steps)
    return tops


def _extended(small: Plan, large: Plan, size: int, reason: str) -> Plan | None:
    """The straight line of the phase that holds the peak at ``size``; None if another held it before."""
    tops = lines_at(small, large, size)
    winner = max(tops, key=lambda name: tops[name])
    if {plan.phase.partition(":")[0] for plan in (small, large)} != {winner}:
        return None
    steps = (size - large.batch) / (large.batch - small.batch)
    sums = {}
    for name in dict.fromkeys((*small.by_category, *large.by_category)):
        a, b = small.by_category.get(name, 0), large.by_category.get(name, 0)
        sums[name] = max(0, round(b + (b - a) * steps))
    return replace(
        large,
        total=sum(sums.values()),
        by_category=sums,
        phases=tops,
        exact=False,
        batch=size,
        snapshot=None,
        note=f"{reason}: real steps of {small.batch} and {large.batch} examples, extended as a straight line",
    )


def _numbers(model: nn.Module) -> tuple[int, int]:
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
