"""How a ledger watches a program: a dispatch mode, hooks on module calls and optimizer steps, four patches.

The tracker knows where the program is (phase and module) and writes what it sees in the book of records. In a
backward pass the module is found by the sequence numbers that autograd gives its nodes: no hook sits on the
graph. Recomputation (checkpointing) is what runs inside a backward pass with gradients enabled.
"""

from __future__ import annotations

import bisect
import functools
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from memspan.ledger.bytes import PacksWeights, storages
from memspan.ledger.graph import leaves, saved_tensors, tensors_in
from memspan.ledger.kernels import (
    HALVES,
    MIXED,
    ON_CUDA,
    SCRATCH,
    UNEVEN,
    UNKNOWN,
    invocation,
    kind_of,
    may_hold,
)
from memspan.ledger.records import BACKWARD, FORWARD, OPTIMIZER, RECOMPUTE, Book, Record

__all__ = ["Tracker", "WatchMode"]

_BOUNDARIES = 65_536
_RESIZES, _COMMUNICATES = 1, 2
_MAY_HOLD = SCRATCH | MIXED | ON_CUDA | HALVES | UNEVEN | UNKNOWN
_BUFFERED = ("c10d._allgather_base_", "c10d._reduce_scatter_base_")  # from and into one flat buffer

_graph_task: Callable[[], int] = torch._C._current_graph_task_id
_graph_node: Callable[[], Any] = torch._C._current_autograd_node
_sequence: Callable[[], int] = getattr(torch._C._autograd, "_get_sequence_nr", lambda: 0)
_flags: dict[int, int] = {}
_wraps: dict[type, bool] = {}


class Tracker:
    """The state behind the hooks of one ledger: where the program is, and what storages turned out to be."""

    def __init__(self, book: Book, poll: Callable[[], None]) -> None:
        self.book = book
        self.poll = weakref.WeakMethod(poll)  # type: ignore[arg-type]
        self.paused = 0
        self.fake: object = None
        self.kernels = True  # whether calls are kept whose kernels may hold scratch
        self.cuda = book.device is not None and book.device.type == "cuda"
        self.displaced: Record | None = None  # a gradient that autograd adds to in place, were nobody looking
        self.existing = 0  # bytes that were there before the first operator
        self.entries = 0
        self.running = False
        self.names: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
        self.parameters: dict[int, tuple[weakref.ref[Tensor], str]] = {}
        self.optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self.stack: list[tuple[nn.Module, str]] = []
        self.base_kind = FORWARD
        self.base_module = ""
        self.steps = 0
        self.roots = 0
        self.home = 0
        self.task = -1
        self.walked = -1
        self.graphs: list[bool] = []  # create_graph of the running backward calls
        self.backward_seen = False
        self.recomputing = False
        self.sharded = False
        self.last_sequence = -1
        self.at: list[int] = []
        self.who: list[str] = []
        self._removals: list[Callable[[], None]] = []
        self._hooked: set[int] = set()
        self._hooks_wanted = True

    # -- opening and closing ---------------------------------------------------------------------------------

    def open(self, *, hooks: bool) -> None:
        """Put the hooks and patches in place; ``hooks`` False leaves the parameters alone."""
        self.entries += 1
        self.home = threading.get_ident()
        self.fake = _active_fake_mode()
        self.stack.clear()
        self.graphs.clear()
        self.steps = 0
        self.task = -1
        self.base_kind, self.base_module = FORWARD, ""
        self._hooks_wanted = hooks
        removals = self._removals
        removals.append(register_module_forward_pre_hook(self._enter_module).remove)
        removals.append(register_module_forward_hook(self._leave_module, always_call=True).remove)
        removals.append(register_optimizer_step_pre_hook(self._enter_step).remove)
        removals.append(register_optimizer_step_post_hook(self._leave_step).remove)
        _patch(self)

    def close(self) -> None:
        """Take every hook and patch away again; storages are watched on."""
        _unpatch(self)
        self.settle_displaced()
        self.running = False
        while self._removals:
            self._removals.pop()()
        self._hooked.clear()
        self.stack.clear()
        self.graphs.clear()
        self.steps = 0
        self.base_kind, self.base_module = FORWARD, ""

    def pausing(self) -> _Pause:
        """A block whose operators are the ledger's own and are not written."""
        return _Pause(self)

    # -- what things are -------------------------------------------------------------------------------------

    def settle(self, tensor: Tensor, category: str, module: str | None = None, *, add: bool) -> None:
        """Say what a tensor's storages are; unknown ones enter the book if ``add``."""
        for storage in storages(tensor):
            record = self.book.live.get(storage._cdata)
            if record is not None:
                record.settle(category, module)
            elif add:
                self._enter_old(storage, tensor, self.book.kind, module or "", category)

    def _enter_old(
        self, storage: torch.UntypedStorage, tensor: Tensor, kind: int, module: str, category: str | None
    ) -> None:
        """Enter a storage that no operator was seen to make: there from the start, if that can still be."""
        early = self.entries <= 1 and self.roots <= 1 and not self.backward_seen
        record = self.book.enter(
            storage, storage._cdata, tensor, kind, module, None, category, before=early and self.running
        )
        if record is not None and self.running and early:
            self.existing += record.bytes

    def add_module(self, root: nn.Module, name: str) -> None:
        """Name a model's modules and enter its parameters, gradients and buffers."""
        for path, module in root.named_modules():
            if module not in self.names:
                self.names[module] = ".".join(part for part in (name, path) if part)
        for module in root.modules():
            home = self.names[module]
            for parameter in module._parameters.values():
                if parameter is not None:
                    self.add_parameter(parameter, home)
            packed = module.packed_weights() if isinstance(module, PacksWeights) else {}
            for key, buffer in module._buffers.items():
                if buffer is not None and not self._is_parameter(buffer):
                    kind = "parameters.packed" if key in packed else "buffers"
                    self.settle(buffer, kind, home, add=True)

    def add_parameter(self, parameter: Tensor, home: str) -> None:
        """Enter a parameter of module ``home``, its gradient if it has one, and watch for the next."""
        known = self.parameters.get(id(parameter))
        if known is not None and known[0]() is parameter:
            home = known[1]  # shared: it stands under the first name
        else:
            key = id(parameter)
            forget = functools.partial(_forget, weakref.ref(self), key)
            self.parameters[key] = (weakref.ref(parameter, forget), home)
        self.settle(parameter, _trained(parameter), home, add=True)
        gradient = parameter.grad
        if gradient is not None:
            self.settle(gradient, "gradients", home, add=True)
        wanted = self._hooks_wanted and parameter.requires_grad and parameter.is_leaf
        if self._removals and wanted and id(parameter) not in self._hooked:
            self._hooked.add(id(parameter))
            hook = functools.partial(_accumulated, weakref.ref(self), home)
            handle: Any = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
            self._removals.append(handle.remove)

    def add_optimizer(self, optimizer: Optimizer) -> None:
        """What is found in an optimizer's state is optimizer state."""
        self.optimizers.add(optimizer)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) not in self.parameters:
                    self.add_parameter(parameter, "")
            for key, value in group.items():
                if key != "params":
                    for tensor in tensors_in(value):
                        self.settle(tensor, "optimizer_state", add=True)
        for parameter, state in list(optimizer.state.items()):
            known = self.parameters.get(id(parameter))
            home = known[1] if known else ""
            for tensor in tensors_in(state):
                if not self._is_parameter(tensor):
                    self.settle(tensor, "optimizer_state", home, add=True)

    def add_saved(self, roots: Iterable[Tensor]) -> None:
        """What the graph behind these tensors keeps is a saved activation, unless it is known as other."""
        live = self.book.live
        roots = list(roots)
        for leaf in leaves(roots):
            for storage in storages(leaf):
                record = live.get(storage._cdata)
                if record is not None and record.category is None:
                    record.settle("inputs")
        for tensor in saved_tensors(roots):
            for storage in storages(tensor):
                record = live.get(storage._cdata)
                if record is None:
                    if self._counted(tensor):
                        self.book.enter(
                            storage,
                            storage._cdata,
                            tensor,
                            FORWARD,
                            "",
                            None,
                            "saved_activations",
                        )
                elif record.category is None:
                    record.settle("saved_activations")

    def learn(self) -> None:
        """Look at gradients, optimizer states and the graphs behind living tensors."""
        for reference, home in list(self.parameters.values()):
            parameter = reference()
            if parameter is None:
                continue
            self._retrain(parameter)
            gradient = parameter.grad
            if gradient is not None:
                self.settle(gradient, "gradients", home, add=True)
        for optimizer in self.optimizers:
            self.add_optimizer(optimizer)
        tips = []
        for record in list(self.book.live.values()):
            tensor = None if record.tensor is None or record.category is not None else record.tensor()
            if tensor is not None and tensor.grad_fn is not None:
                tips.append(tensor)
        if tips:
            self.add_saved(tips)

    def _retrain(self, parameter: Tensor) -> None:
        for storage in storages(parameter):
            record = self.book.live.get(storage._cdata)
            if record is not None and record.category in ("parameters.trained", "parameters.frozen"):
                record.settle(_trained(parameter))

    def _is_parameter(self, tensor: Tensor) -> bool:
        for storage in storages(tensor):
            record = self.book.live.get(storage._cdata)
            if record is not None and record.category in ("parameters.trained", "parameters.frozen"):
                return True
        return False

    def _counted(self, tensor: Tensor) -> bool:
        return getattr(tensor, "fake_mode", None) is self.fake

    # -- operators -------------------------------------------------------------------------------------------

    def place(self) -> None:
        """Where the program is now: written in the book as phase and module."""
        book = self.book
        task = _graph_task()
        if task < 0:
            if self.task >= 0:
                self.leave_backward()
            book.kind = self.base_kind
            book.module = self.base_module
            return
        if task != self.task:
            self.task = task
            self.backward_seen = True
            if (
                not self.graphs and task != self.walked
            ):  # a backward pass that did not come through torch.autograd
                self.walked = task
                self._walk_from_here()
        if torch.is_grad_enabled() and not (self.graphs and self.graphs[-1]):
            self.recomputing = True
            book.kind = RECOMPUTE
            book.module = self.base_module
            return
        if self.recomputing:
            self._settle_recomputed()
        book.kind = BACKWARD
        node = _graph_node()
        if node is None:
            return
        sequence = node._sequence_nr()
        if sequence == self.last_sequence or sequence >= 1 << 62:  # accumulators have no place of their own
            return
        self.last_sequence = sequence
        index = bisect.bisect_right(self.at, sequence) - 1
        book.module = self.who[index] if index >= 0 else ""

    def discover(self, tensor: Tensor) -> None:
        """An operator's argument was never seen: it was there before, or came from outside torch."""
        if not self._counted(tensor) or (self.sharded and _in_propagation()):
            return
        book = self.book
        category: str | None
        if isinstance(tensor, nn.Parameter):
            category = _trained(tensor)
        elif book.kind == FORWARD:
            category = "inputs"
        else:
            category = None
        for storage in storages(tensor):
            key = storage._cdata
            if key not in book.live:
                self._enter_old(storage, tensor, book.kind, book.module, category)

    def produced(self, func: Any, tensor: Tensor, flags: int) -> None:
        """The slow path for an operator's result: new storages, sparse tensors, resized ones."""
        if not self._counted(tensor) or (self.sharded and _in_propagation()):
            return
        book = self.book
        for storage in storages(tensor):
            key = storage._cdata
            if key in book.live:
                if flags & _RESIZES:
                    book.resize(key, storage.nbytes(), book.kind, book.module)
            else:
                category = "communication" if flags & _COMMUNICATES else None
                record = book.enter(storage, key, tensor, book.kind, book.module, func, category)
                if record is not None and book.kind == BACKWARD:
                    record.node = self.last_sequence

    def displace(self, args: tuple[Any, ...], begun: int) -> None:
        """Autograd adds two gradients of one tensor: into the first of them, except under a dispatch mode.

        So the sum takes the first one's place in the book. Should the first live on, it comes back at the
        next operator. Autograd adds for itself: no function of Python's is running, and another node made
        what it adds to.
        """
        book = self.book
        if book.kind != BACKWARD or len(args) != 2 or torch.is_grad_enabled():
            return
        one, other = args
        if not isinstance(other, Tensor) or one.shape != other.shape or not _called_by_autograd():
            return
        key = one.untyped_storage()._cdata
        record = book.live.get(key)
        if record is None or record.category is not None or record.node in (-1, self.last_sequence):
            return
        self.displaced = record
        if book.on_release is not None:
            book.on_release(record.bytes, begun)
        book.displace(key)

    def settle_displaced(self) -> None:
        """What was displaced has gone by now, or is held after all."""
        if self.displaced is not None:
            record, self.displaced = self.displaced, None
            self.book.restore(record)

    def made_outside(self, tensor: Tensor, maker: object) -> None:
        """A tensor that no operator made: the generator's state, which checkpointing keeps for each block."""
        if self.paused or not self._ours():
            return
        self.place()
        book = self.book
        for storage in storages(tensor):
            if storage._cdata not in book.live:
                book.enter(storage, storage._cdata, tensor, book.kind, book.module, maker)

    def gathered(self, storage: torch.UntypedStorage) -> None:
        """FSDP fills a parameter's whole storage again, which it emptied before the ledger was opened."""
        if self.paused or not self._ours():
            return
        self.place()
        book = self.book
        device = storage.device  # fake tensors stand on meta storages
        if device.type == "meta":
            device = book.device or torch.device("cpu")
        with self.pausing():
            stand_in = torch.empty(0, dtype=torch.uint8, device=device)
        key = storage._cdata
        record = book.enter(storage, key, stand_in, book.kind, book.module, "gather", "communication")
        if record is not None:
            record.shape, record.tensor = (record.bytes,), None

    # -- hooks -----------------------------------------------------------------------------------------------

    def _ours(self) -> bool:
        return threading.get_ident() == self.home or (self.task >= 0 and _graph_task() >= 0)

    def _enter_module(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.paused or not self._ours():
            return
        with self.pausing():
            name = self.names.get(module)
            if not self.stack and _graph_task() < 0:
                self.roots += 1
                if name is None:
                    self.add_module(module, type(module).__name__)
                    name = self.names[module]
                for tensor in tensors_in(args):
                    if tensor.grad_fn is None:
                        self._input(tensor)
                self._ask_stores()
            if name is None:
                name = f"{self.base_module}.{type(module).__name__}".lstrip(".")
                self.names[module] = name
            self.stack.append((module, name))
            self._stand(name)

    def _leave_module(self, module: nn.Module, args: object, output: object) -> None:
        if self.paused or not self.stack or not self._ours():
            return
        if not any(entry is module for entry, _ in self.stack):
            return
        while self.stack.pop()[0] is not module:
            pass
        self._stand(self.stack[-1][1] if self.stack else "")

    def _stand(self, name: str) -> None:
        self.base_module = name
        self.base_kind = OPTIMIZER if self.steps and not self.stack else FORWARD
        self.at.append(_sequence())
        self.who.append(name)
        if len(self.at) > _BOUNDARIES:
            del self.at[: _BOUNDARIES // 2]
            del self.who[: _BOUNDARIES // 2]

    def _input(self, tensor: Tensor) -> None:
        for storage in storages(tensor):
            record = self.book.live.get(storage._cdata)
            if record is None:
                self.place()
                self.discover(tensor)
            elif record.category is None and not record.module and record.kind == FORWARD:
                record.settle("inputs")

    def _enter_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        if not self._ours():
            return
        self.steps += 1
        self.base_kind, self.base_module = OPTIMIZER, ""
        if optimizer not in self.optimizers:
            with self.pausing():
                self.add_optimizer(optimizer)

    def _leave_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        if not self._ours():
            return
        with self.pausing():
            self.add_optimizer(optimizer)
            self.steps = max(0, self.steps - 1)
            self.base_kind = OPTIMIZER if self.steps else FORWARD
            self._ask_stores()
        self.book.kind, self.book.module = self.base_kind, self.base_module

    def accumulated(self, home: str, parameter: Tensor) -> None:
        """A parameter has its gradient now."""
        gradient = parameter.grad
        if gradient is not None:
            self.settle(gradient, "gradients", home, add=True)

    def _ask_stores(self) -> None:
        poll = self.poll()
        if poll is not None:
            poll()

    # -- backward --------------------------------------------------------------------------------------------

    def enter_backward(self, roots: list[Tensor], create_graph: bool) -> bool:
        """A backward pass starts: what its graph keeps is known now. False in threads not watched."""
        if self.paused or not self._ours():
            return False
        with self.pausing():
            self._retrain_all()
            self.add_saved(roots)
            if _graph_task() < 0:
                self._ask_stores()
        self.backward_seen = True
        self.graphs.append(create_graph)
        self.last_sequence = -1
        return True

    def exit_backward(self) -> None:
        """The pass that started last is over, well or not."""
        if self.graphs:
            self.graphs.pop()
        if _graph_task() < 0:
            self.leave_backward()
            self.book.kind, self.book.module = self.base_kind, self.base_module

    def leave_backward(self) -> None:
        """No pass is running any more: what is in ``.grad`` is a gradient."""
        self.task = -1
        self.last_sequence = -1
        with self.pausing():
            if self.recomputing:
                self._settle_recomputed()
            for reference, home in list(self.parameters.values()):
                parameter = reference()
                if parameter is not None and parameter.grad is not None:
                    self.settle(parameter.grad, "gradients", home, add=True)

    def _retrain_all(self) -> None:
        for reference, _ in list(self.parameters.values()):
            parameter = reference()
            if parameter is not None:
                self._retrain(parameter)

    def _settle_recomputed(self) -> None:
        """What a recomputation leaves behind, the backward pass reads: it was recomputed to be saved."""
        self.recomputing = False
        for record in self.book.live.values():
            if record.kind == RECOMPUTE and record.category is None:
                record.settle("saved_activations")

    def _walk_from_here(self) -> None:
        node = _graph_node()
        if node is not None:
            with self.pausing():
                self.add_saved([_Root(node)])  # type: ignore[list-item]


class _Root:
    """A node dressed as a tensor, for walking from it."""

    def __init__(self, node: Any) -> None:
        self.grad_fn = node


class _Pause:
    """While open, operators are not written in the book (the ledger's own questions)."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker

    def __enter__(self) -> None:
        self.tracker.paused += 1

    def __exit__(self, *_: object) -> None:
        self.tracker.paused -= 1


class WatchMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees each operator of this thread (and of autograd's threads working for it)."""

    supports_higher_order_operators = True

    def __init__(self, tracker: Tracker) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tracker = tracker
        self.book = tracker.book
        self.closed = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the wrapper this saves costs more than the whole ledger

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """A compiled function stays compiled."""
        return True

    def leave(self) -> None:
        """Take this mode off the stack, also when others were put on it and are still there."""
        self.closed = True
        above: list[Any] = []
        while (top := _top_mode()) is not None and top is not self:
            top.__exit__(None, None, None)
            above.append(top)
        if top is not None:
            TorchDispatchMode.__exit__(self, None, None, None)  # type: ignore[no-untyped-call]
        for mode in reversed(above):
            mode.__enter__()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        tracker = self.tracker
        for kind in types:
            wraps = _wraps.get(kind)
            if wraps is None:
                wraps = _wraps[kind] = _is_wrapper(kind)
            if wraps:  # let the subclass run first: what it does inside comes here with plain tensors
                tracker.sharded = tracker.sharded or kind.__name__ == "DTensor"
                return NotImplemented
        if tracker.paused or self.closed:
            return func(*args, **kwargs) if kwargs else func(*args)
        tracker.place()
        live = self.book.live
        if tracker.displaced is not None:
            tracker.settle_displaced()
        for value in args:
            if isinstance(value, Tensor):
                try:
                    if value.untyped_storage()._cdata not in live:
                        tracker.discover(value)
                except (NotImplementedError, RuntimeError):
                    tracker.discover(value)
            elif isinstance(value, list | tuple):
                for item in value:
                    if isinstance(item, Tensor):
                        tracker.discover(item)
        flags = _flags.get(id(func))
        if flags is None:
            flags = _flags[id(func)] = _flags_of(func)
        scratch = flags & _MAY_HOLD
        flags ^= scratch
        begun = time.time_ns() if func is _ADD and not kwargs else 0
        result = func(*args, **kwargs) if kwargs else func(*args)
        if begun:
            tracker.displace(args, begun)
        if isinstance(result, Tensor):
            if flags:
                tracker.produced(func, result, flags)
            else:
                try:
                    if result.untyped_storage()._cdata not in live:
                        tracker.produced(func, result, 0)
                except (NotImplementedError, RuntimeError):
                    tracker.produced(func, result, 0)
        elif isinstance(result, list | tuple):
            for item in result:
                if isinstance(item, Tensor):
                    tracker.produced(func, item, flags)
                elif isinstance(item, list | tuple):
                    for inner in tensors_in(item):
                        tracker.produced(func, inner, flags)
        if flags & _RESIZES:
            for tensor in tensors_in([*args, *(kwargs or {}).values()]):
                tracker.produced(func, tensor, flags)
        if flags & _COMMUNICATES and str(func).startswith(_BUFFERED):
            for tensor in tensors_in(args):
                for storage in storages(tensor):
                    record = live.get(storage._cdata)
                    if record is not None and record.category is None:
                        record.settle("communication")
        if scratch and tracker.kernels and may_hold(scratch, args, tracker.cuda):
            called = invocation(func, args, kwargs)
            if called is not None:
                self.book.called(called)
            else:
                self.book.unmeasured[str(func)] = None
        return result


def _top_mode() -> Any:
    return _get_current_dispatch_mode()


# -- what is patched while a ledger is open, and put back --------------------------------------------------

_open: list[Tracker] = []
_originals: dict[str, Any] = {}


def _patch(tracker: Tracker) -> None:
    _open.append(tracker)
    if len(_open) > 1:
        return
    resize = torch.UntypedStorage.resize_
    backward, grad = torch.autograd.backward, torch.autograd.grad

    @functools.wraps(resize)
    def resize_(storage: torch.UntypedStorage, size: int) -> Any:
        result = resize(storage, size)
        for item in _open:
            book = item.book
            if storage._cdata in book.live:
                item.place()
                book.resize(storage._cdata, storage.nbytes(), book.kind, book.module)
            elif storage.nbytes() and _in_file("_fsdp_param.py"):
                item.gathered(storage)
        return result

    state = torch.get_rng_state

    @functools.wraps(state)
    def get_rng_state() -> Tensor:
        found: Tensor = state()
        for item in _open:
            item.made_outside(found, "get_rng_state")
        return found

    _originals["get_rng_state"] = state
    torch.get_rng_state = get_rng_state
    _originals["own_resize"] = "resize_" in torch.UntypedStorage.__dict__
    _originals["resize_"], _originals["backward"], _originals["grad"] = resize, backward, grad
    torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]
    torch.autograd.backward = _watched(backward, 4)
    torch.autograd.grad = _watched(grad, 4)


def _unpatch(tracker: Tracker) -> None:
    if tracker in _open:
        _open.remove(tracker)
    if _open or not _originals:
        return
    if _originals["own_resize"]:
        torch.UntypedStorage.resize_ = _originals["resize_"]  # type: ignore[method-assign]
    else:
        del torch.UntypedStorage.resize_
    torch.autograd.backward = _originals["backward"]
    torch.autograd.grad = _originals["grad"]
    torch.get_rng_state = _originals["get_rng_state"]
    _originals.clear()


def _watched(original: Callable[..., Any], place: int) -> Callable[..., Any]:
    """``torch.autograd.backward`` or ``grad`` that tells the open ledgers where the pass starts."""

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        roots = args[0] if args else kwargs.get("tensors", kwargs.get("outputs", ()))
        found = [
            tensor
            for tensor in ([roots] if isinstance(roots, Tensor) else _listed(roots))
            if isinstance(tensor, Tensor)
        ]
        later = bool(args[place - 1] if len(args) >= place else kwargs.get("create_graph", False))
        told = [tracker for tracker in list(_open) if tracker.enter_backward(found, later)]
        try:
            return original(*args, **kwargs)
        finally:
            for tracker in told:
                tracker.exit_backward()

    return call


def _listed(roots: object) -> list[object]:
    return list(roots) if isinstance(roots, list | tuple) else []


def _after_fork() -> None:
    for tracker in _open:  # a data loader's worker is not the program that is counted
        tracker.paused += 1


os.register_at_fork(after_in_child=_after_fork)


def _trained(parameter: Tensor) -> str:
    return "parameters.trained" if parameter.requires_grad else "parameters.frozen"


def _flags_of(func: Any) -> int:
    name = str(func)
    if name.startswith(("c10d", "_c10d")):
        return _COMMUNICATES
    schema = getattr(func, "_schema", None)
    if (
        "resize" in name
        or ".set_" in name
        or (schema is not None and any(a.is_out for a in schema.arguments))
    ):
        return _RESIZES
    return 0 if schema is None else kind_of(func)


def _is_wrapper(kind: type) -> bool:
    """Whether operators on this tensor type run other operators on tensors inside."""
    if kind.__name__ in ("FakeTensor", "FunctionalTensor", "Parameter", "Buffer", "Tensor"):
        return False
    own = getattr(kind, "__torch_dispatch__", None)
    return hasattr(kind, "__tensor_flatten__") or own not in (None, torch._C._disabled_torch_dispatch_impl)


def _called_by_autograd() -> bool:
    """Whether an operator was called by autograd's engine, with no function of Python's between."""
    try:
        above = sys._getframe(3)  # past displace and the dispatch itself
    except ValueError:
        return True  # the engine's own thread
    return above.f_code.co_name == "_engine_run_backward"


_ADD = torch.ops.aten.add.Tensor


def _in_propagation() -> bool:
    """Whether DTensor is only working out shapes: the tensors it makes for that hold no bytes."""
    return _in_file("_sharding_prop.py")


def _in_file(name: str) -> bool:
    """Whether code of a file of this name is running, up to 60 calls above."""
    frame: Any = sys._getframe(1)
    for _ in range(60):
        if frame is None or frame.f_code.co_filename.endswith(name):
            return frame is not None
        frame = frame.f_back
    return False


def _active_fake_mode() -> object:
    from torch._guards import active_fake_mode

    return active_fake_mode()


def _accumulated(tracker: weakref.ref[Tracker], home: str, parameter: Tensor) -> None:
    alive = tracker()
    if alive is not None:
        with alive.pausing():
            alive.accumulated(home, parameter)


def _forget(tracker: weakref.ref[Tracker], key: int, _: object) -> None:
    alive = tracker()
    if alive is not None:
        alive.parameters.pop(key, None)
