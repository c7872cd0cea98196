"""One training step to be planned: built and traced on fake tensors, or, where asked for, run for real."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NoReturn

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
from torch.utils.flop_counter import FlopCounterMode

from memspan.base import refuse
from memspan.ledger.bytes import Budget, PacksWeights
from memspan.ledger.corrections import corrected, one_sequence_a_row
from memspan.ledger.methods import Method
from memspan.ledger.prediction import Plan, extended
from memspan.ledger.snapshot import Holding, Snapshot
from memspan.ledger.step import Loss, mapped, resized, stretched, training_step
from memspan.ledger.tracker import KERNELS, Ledger, is_compiled
from memspan.ledger.workspaces import Products, end_of_block, workspace_bytes
from memspan.ledger.world import fake_ranks, shard_

__all__ = ["CANNOT_TRACE", "Existing", "Grow", "Job", "MakesOptimizer"]

Grow = Literal["batch", "length"]
MakesOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]

CANNOT_TRACE = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    GuardOnDataDependentSymNode,
)
_CUDA_BLOCK = 512
_SMALL = 2  # batch of the smaller of two real steps; 1 is refused by BatchNorm on single pixels


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
    real: Budget | None = None

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
            facts = stack.enter_context(corrected(self.device, home))
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            try:
                model = self.build_model()
            except CANNOT_TRACE:
                model = _built_for_real(self, mode)
                how.append("weights were built for real")
            stack.enter_context(one_sequence_a_row(self.batch))
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
            compiled = any(map(is_compiled, model.modules()))
        peak, phases = led.peak, led.phase_peaks()
        if home == "cuda":
            kept = workspace_bytes(products.seen, torch.cuda.get_device_capability())
            peak = _beside(peak, kept)
            phases = {name: top + kept for name, top in phases.items()}
        if missed := led.unknown_kernels:
            limit = "" if kernels is None else f" (kernels={str(kernels)!r} is their limit)"
            how.append(
                f"scratch inside the kernels of {', '.join(missed)} may add to it: not measured{limit}"
            )
        if facts.missed:
            how.append(f"{', '.join(facts.missed)} could not be measured and is left out")
        if compiled:
            how.append("traced as it runs uncompiled; compiled code holds other temporaries")
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
            exact=not (missed or facts.missed or compiled or (self.device == "cuda" and home == "cpu")),
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
        """A trace where possible; else, where ``real`` allows it, small real steps and a straight line.

        Raises:
            BadInput: a model that can only be run for real, and no bytes for that, too few, or many ranks.
        """
        try:
            return self.trace(size, flops=flops)
        except CANNOT_TRACE as error:
            reason = f"shapes depend on values ({type(error).__name__})"
        if self.world > 1:
            refuse("world", self.world, f"{reason}, and such a step is run for real, on one rank alone")
        if self.real is None:
            remedy = (
                "so the step cannot be traced; to have small steps of it run for real within so many bytes"
            )
            refuse("real", None, f"{reason}, {remedy}, give real='2GiB' (--real 2GiB)")
        if (least := self._least()) > self.real.bytes:
            self._too_much(f"weights, gradients and two moments alone take {Budget(least)}")
        large = self.measure(min(_SMALL, size))
        while large.batch < size:
            following = min(2 * large.batch, size)
            if 2 * large.total > self.real.bytes:
                self._too_much(f"{large.batch} examples take {Budget(large.total)}, and more are needed")
            small, large = large, self.measure(following)
            found = extended(small, large, size, reason) if large.batch < size else None
            if found is not None:
                return found
        return replace(large, note=f"{reason}: {large.note}")

    def _least(self) -> int:
        """Bytes that a real step takes at least, where the model can be built on fake tensors; else 0."""
        try:
            with FakeTensorMode(allow_non_fake_inputs=True) as mode, corrected("cpu", "cpu"):
                model, _ = replace(self, optimizer=None).converted(self.build_model())
        except CANNOT_TRACE:
            return 0
        del mode
        return sum(p.nbytes * (4 if p.requires_grad else 1) for p in model.parameters())

    def _too_much(self, why: str) -> NoReturn:
        refuse("real", str(self.real), f"{why}; allow more bytes, or plan a smaller model")


_CUDA_NOTE = (
    "traced on the CPU with CUDA's block size, dropout masks and multi-tensor optimizer; cuBLAS workspaces, "
    "other attention kernels and the CUDA context are not in it"
)


class Existing:
    """A module that exists, given out as a copy of its own storages; fake ones under fake tensors."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self) -> nn.Module:
        """The copy."""
        mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
        if isinstance(mode, FakeTensorMode):
            return _fake_copy(self.model, mode)
        return copy.deepcopy(self.model)


def _built_for_real(job: Job, mode: FakeTensorMode) -> nn.Module:
    """The model built outside the fake mode (its constructor looks at values), then made fake."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily(), torch.device("cpu"), torch.random.fork_rng([]):  # its shapes are wanted
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
def _seeds_kept() -> Iterator[None]:
    """A plan draws no random numbers from the caller's stream."""
    state = torch.default_generator.get_state() if not torch._C._len_torch_dispatch_stack() else None
    yield
    if state is not None:
        torch.default_generator.set_state(state)


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


def _numbers(model: nn.Module) -> tuple[int, int]:
    """How many numbers the model has, packed ones among them, and how many of them are trained."""
    parameters = list(model.parameters())
    packed = [m.packed_weights() for m in model.modules() if isinstance(m, PacksWeights)]
    numbers = sum(p.numel() for p in parameters) + sum(sum(held.values()) for held in packed)
    return numbers, sum(p.numel() for p in parameters if p.requires_grad)
