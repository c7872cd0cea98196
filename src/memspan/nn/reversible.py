"""Residual networks whose inputs come back from their outputs, so that a chain keeps its last output alone.

Each layer of an ordinary network keeps its input for the backward pass: activation memory grows with depth.
Couple two streams instead, ``y1 = x1 + F(x2)``, ``y2 = x2 + G(y1)``, and the input is known from the output,
``x2 = y2 - G(y1)``, ``x1 = y1 - F(x2)``, whatever F and G are. :class:`ReversibleSequential` walks back so,
block by block, and each evaluation of F or G serves inversion and gradient at once: one forward pass more,
as in checkpointing, at a memory that does not depend on depth.

What F and G do stays right when they are run again: random draws are repeated, running statistics move once,
autocast is the same. Parameters are inputs of one autograd function, so that ``torch.autograd.grad``, hooks,
DDP and gradient accumulation see what they see in any network.

Sources: Dinh et al. 2015 (additive coupling, arXiv 1410.8516); Gomez et al. 2017 (the backward pass, arXiv
1707.04585); Sander et al. 2021 (momentum networks, arXiv 2102.07870).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import checkpoint

from memspan.base import refuse

__all__ = [
    "MEMORY",
    "Memory",
    "ReversibleBlock",
    "ReversibleSequential",
    "StackedReversible",
    "frozen_statistics",
    "reconstruction_error",
    "restored_statistics",
]

Memory = Literal["reversible", "store", "checkpoint"]
MEMORY: tuple[Memory, ...] = ("reversible", "store", "checkpoint")

_Streams = tuple[Tensor, Tensor]
_Modes = Sequence[tuple[nn.Module, bool]]


class Step(NamedTuple):
    """Half of a coupling: ``target <- decay * target + scale * part(source)``, the source being the other."""

    name: str
    part: nn.Module | None  # None: the source itself
    target: int
    decay: float = 1.0
    scale: float = 1.0


class _Coupling(nn.Module):
    """What is common to couplings: a list of steps, run forwards or backwards."""

    split_dim: int

    def steps(self) -> tuple[Step, ...]:
        """The steps in order."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Couple the two halves of ``x`` with ordinary autograd; the result has the shape of ``x``."""
        streams = _halves(x, self.split_dim)
        for step in self.steps():
            streams = _after(step, streams, step.name)
        return torch.cat(streams, self.split_dim)

    def inverse(self, y: Tensor) -> Tensor:
        """The ``x`` that ``forward`` maps to ``y``, up to rounding, where F and G draw nothing at random."""
        streams = _halves(y, self.split_dim)
        for step in reversed(self.steps()):
            streams = _before(step, streams, _changed_by(step, streams[1 - step.target], step.name))
        return torch.cat(streams, self.split_dim)


class ReversibleBlock(_Coupling):
    """One additive coupling: ``y1 = x1 + f(x2)``, ``y2 = x2 + g(y1)``.

    Alone it is an ordinary module that stores what autograd stores; in a :class:`ReversibleSequential` it
    stores nothing.

    Args:
        f: any module that maps half of the channels to the same shape, dtype and device.
        g: likewise.
        split_dim: the dimension that is split in two halves, which must be even.

    Raises:
        BadInput: (in the forward pass) an odd dimension; a part whose output differs from its input in shape,
            dtype or device; a part that changes its input in place.

    Example:
        >>> block = ReversibleBlock(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> x = torch.randn(3, 4)
        >>> torch.allclose(block.inverse(block(x)), x, atol=1e-6)
        True
    """

    def __init__(self, f: nn.Module, g: nn.Module, split_dim: int = 1) -> None:
        super().__init__()
        for name, part in (("f", f), ("g", g)):
            if not isinstance(part, nn.Module):
                refuse(name, part, "give an nn.Module")
        self.f, self.g, self.split_dim = f, g, split_dim

    def steps(self) -> tuple[Step, ...]:
        """F into the first stream, G into the second."""
        return Step("f", self.f, 0), Step("g", self.g, 1)


class StackedReversible(_Coupling):
    """One step of a momentum network: ``v <- decay * v + (1 - decay) * f(x)``, ``x <- x + v``.

    The first half of the input is x, the second v. Any residual network ``x + f(x)`` becomes reversible so
    without a second function; inversion divides by ``decay``, which multiplies rounding errors: with 0.9 a
    chain of 16 loses a factor 5, with 0.5 a factor 65,000.

    Args:
        f: as in :class:`ReversibleBlock`.
        decay: of the momentum, above 0 and below 1.
        split_dim: the dimension that holds x and v.

    Raises:
        BadInput: a decay outside (0, 1); in the forward pass as :class:`ReversibleBlock`.

    Example:
        >>> block = StackedReversible(nn.Linear(2, 2), decay=0.8)
        >>> x = torch.randn(3, 4)
        >>> torch.allclose(block.inverse(block(x)), x, atol=1e-5)
        True
    """

    def __init__(self, f: nn.Module, decay: float = 0.9, split_dim: int = 1) -> None:
        super().__init__()
        if not isinstance(f, nn.Module):
            refuse("f", f, "give an nn.Module")
        if not 0 < decay < 1:
            refuse("decay", decay, "choose above 0 and below 1; at 0 the past cannot be recovered")
        self.f, self.decay, self.split_dim = f, decay, split_dim

    def steps(self) -> tuple[Step, ...]:
        """F into the momentum, the momentum into the state."""
        return Step("f", self.f, 1, self.decay, 1 - self.decay), Step("v", None, 0)


class ReversibleSequential(nn.Module):
    """A chain of couplings whose activation memory does not depend on its length.

    The same weights give the same outputs, bit for bit, whatever ``memory`` is, and gradients that differ by
    rounding. The error of the inversion grows with the gain of F and G (normalise inside them) and with
    low-precision streams: keep the input float32, also under autocast. :func:`reconstruction_error` measures
    it, ``check_every`` guards it.

    Args:
        blocks: :class:`ReversibleBlock` or :class:`StackedReversible`, in order.
        split_dim: the dimension that is split; that of all blocks.
        memory: ``"reversible"`` keeps the chain's output; ``"checkpoint"`` the input of each block;
            ``"store"`` everything, with ordinary autograd (needed for second derivatives). May be set later.
        preserve_rng_state: repeat random draws (dropout) when a part is run again. Parts that draw nothing
            cost nothing; one that draws keeps its generator's state (5 KB on CPU).
        check_every: every so many training passes, keep the chain's input too and compare what comes back
            with it; 0 never does.

    Raises:
        BadInput: no blocks, another kind of block, a block that splits another dimension; in the forward pass
            as :class:`ReversibleBlock`, with the block's name; in a backward pass with ``create_graph``.
        RuntimeError: (in the backward pass) parameters changed in place, or a part switched between training
            and evaluation, since the forward pass.
        ArithmeticError: (in a checked backward pass) the input that came back is off by more than the square
            root of the precision; the first bad block is named.

    Example:
        >>> parts = lambda: nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU())
        >>> blocks = [ReversibleBlock(parts(), parts(), split_dim=-1) for _ in range(6)]
        >>> chain = ReversibleSequential(*blocks, split_dim=-1)
        >>> x = torch.randn(2, 5, 16)  # (batch, tokens, channels)
        >>> chain(x).square().mean().backward()
        >>> all(p.grad is not None for p in chain.parameters())
        True
    """

    def __init__(
        self,
        *blocks: ReversibleBlock | StackedReversible,
        split_dim: int = 1,
        memory: Memory = "reversible",
        preserve_rng_state: bool = True,
        check_every: int = 0,
    ) -> None:
        super().__init__()
        if not blocks:
            refuse("blocks", blocks, "give one block or more")
        for place, block in enumerate(blocks):
            if not isinstance(block, _Coupling):
                remedy = (
                    f"blocks[{place}]: pair two modules in ReversibleBlock(f, g), or use StackedReversible"
                )
                refuse("blocks", type(block).__name__, remedy)
            if block.split_dim != split_dim:
                refuse("split_dim", split_dim, f"blocks[{place}] splits {block.split_dim}; give all the same")
        if check_every < 0:
            refuse("check_every", check_every, "use 0 (never) or more")
        self.blocks = nn.ModuleList(blocks)
        self.split_dim, self.preserve_rng_state, self.check_every = split_dim, preserve_rng_state, check_every
        self.memory = memory
        self._passes = 0
        self._warned = False

    @property
    def memory(self) -> Memory:
        """What is kept for the backward pass."""
        return self._memory

    @memory.setter
    def memory(self, value: Memory) -> None:
        if value not in MEMORY:
            refuse("memory", value, f"use one of {', '.join(map(repr, MEMORY))}")
        self._memory = value

    def extra_repr(self) -> str:
        """The chain's way to spend memory, in its printed form."""
        return f"memory={self.memory!r}"

    def forward(self, x: Tensor) -> Tensor:
        """Run the chain; ``x`` is floating, of any shape with an even ``split_dim``."""
        streams = _halves(x, self.split_dim)
        if self._memory == "store" or not torch.is_grad_enabled() or _exporting():
            return torch.cat(self._plain(streams), self.split_dim)
        if self._memory == "checkpoint":
            return torch.cat(self._checkpointed(streams), self.split_dim)
        run = _Run(self, x)
        if not (x.requires_grad or any(p.requires_grad for p in run.parameters)):
            return torch.cat(self._plain(streams), self.split_dim)
        self._passes += 1
        run.check = bool(self.check_every) and self._passes % self.check_every == 0
        return _Chain.apply(run, x, *run.parameters)  # type: ignore[no-untyped-call, no-any-return]

    def inverse(self, y: Tensor) -> Tensor:
        """The input that the chain maps to ``y``, where nothing is drawn at random."""
        for block in reversed(self.blocks):
            y = block.inverse(y)  # type: ignore[operator]
        return y

    def named_steps(self) -> Iterator[tuple[str, Step]]:
        """Every step of every block with the name of its part."""
        for place, block in enumerate(self.blocks):
            for step in block.steps():  # type: ignore[operator]
                yield f"blocks.{place}.{step.name}", step

    def _plain(self, streams: _Streams) -> _Streams:
        for where, step in self.named_steps():
            streams = _after(step, streams, where)
        return streams

    def _checkpointed(self, streams: _Streams) -> _Streams:
        for place, block in enumerate(self.blocks):

            def couple(first: Tensor, second: Tensor, place: int = place, block: Any = block) -> _Streams:
                pair = (first, second)
                for step in block.steps():
                    pair = _after(step, pair, f"blocks.{place}.{step.name}")
                return pair

            modes = _modes(block)

            def contexts(block: nn.Module = block, modes: _Modes = modes) -> tuple[Any, Any]:
                return nullcontext(), restored_statistics(block, modes)

            streams = checkpoint(
                couple,
                *streams,
                use_reentrant=False,
                preserve_rng_state=self.preserve_rng_state,
                context_fn=contexts,
            )
        return streams


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """A block in which batch and instance norms leave their running statistics alone.

    For running a part a second time on the same data: in training norms use the batch's statistics as ever,
    in evaluation the running ones.

    Args:
        module: its norms are found at the start of the block, and are as before at its end.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> with frozen_statistics(norm):
        ...     y = norm(torch.tensor([[0.0, 1.0], [2.0, 3.0]]))
        >>> int(norm.num_batches_tracked), y.tolist()
        (0, [[-0.99..., -0.99...], [0.99..., 0.99...]])
    """
    moving = [m for m in module.modules() if isinstance(m, _NormBase) and m.training]
    moving = [norm for norm in moving if norm.track_running_stats]
    for norm in moving:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in moving:
            norm.track_running_stats = True


@contextmanager
def restored_statistics(module: nn.Module, modes: _Modes = ()) -> Iterator[None]:
    """Like :func:`frozen_statistics`, for a checkpoint, which wants the same tensors saved as at first."""
    _refuse_switched(modes)
    norms = [m for m in module.modules() if isinstance(m, _NormBase) and m.training and m.track_running_stats]
    known = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in known:
                buffer.copy_(before)


@torch.no_grad()
def reconstruction_error(chain: ReversibleSequential, x: Tensor) -> list[float]:
    """How far each block's input, walked back from the chain's output, is from what it was.

    Random draws are repeated and the global generators, running statistics and gradients left as they were.

    Args:
        chain: in training or evaluation mode.
        x: an input of the chain.

    Returns:
        For each block max|x' - x| / max|x| of its input; errors add up from the last block to the first.

    Example:
        >>> blocks = [ReversibleBlock(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(3)]
        >>> chain = ReversibleSequential(*blocks)
        >>> [error < 1e-5 for error in reconstruction_error(chain, torch.randn(5, 8))]
        [True, True, True]
    """
    run = _Run(chain, x)
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=run.devices))
        stack.enter_context(frozen_statistics(chain))
        streams, before = _halves(x, chain.split_dim), []
        for record in run.records:
            before.append(streams)
            streams = run.forward(record, streams)
        errors = []
        for record, known in zip(reversed(run.records), reversed(before), strict=True):
            with run.replaying(record.states):
                change = _changed_by(record.step, streams[1 - record.step.target], record.where)
            streams = _before(record.step, streams, change)
            errors.append(_distance(streams, known))
    last = {record.block: error for record, error in zip(reversed(run.records), errors, strict=True)}
    return [last[place] for place in range(len(chain.blocks))]


# ---- one pass of a chain ----------------------------------------------------------------------------------


@dataclass
class _Record:
    """One step of a pass: which parameters it uses, and the generators' states if it drew from them."""

    where: str
    block: int
    step: Step
    names: tuple[str, ...]  # of the part's parameters
    places: tuple[int, ...]  # of these in the chain's list
    states: tuple[Tensor, ...] = ()
    drew: bool = False


class _Run:
    """What a backward pass needs to know of its forward pass; holds no activation."""

    def __init__(self, chain: ReversibleSequential, x: Tensor) -> None:
        self.chain, self.split_dim, self.check = chain, chain.split_dim, False
        self.parameters: list[Tensor] = []
        self.records: list[_Record] = []
        self.devices = [x.device] if x.device.type == "cuda" else []
        self.autocast = _autocast_state(x.device.type)
        places: dict[int, int] = {}
        for place, block in enumerate(chain.blocks):
            for step in block.steps():  # type: ignore[operator]
                named = dict(step.part.named_parameters()) if step.part is not None else {}
                for parameter in named.values():
                    if id(parameter) not in places:
                        places[id(parameter)] = len(self.parameters)
                        self.parameters.append(parameter)
                at = tuple(places[id(parameter)] for parameter in named.values())
                self.records.append(_Record(f"blocks.{place}.{step.name}", place, step, tuple(named), at))
        self.versions = [_version(parameter) for parameter in self.parameters]
        self.modes = _modes(chain)
        self._now: tuple[Tensor, ...] = ()

    def forward(self, record: _Record, streams: _Streams) -> _Streams:
        """One step, with a note of the generators' states if they moved."""
        part = record.step.part
        if part is None or not self.chain.preserve_rng_state:
            return _after(record.step, streams, record.where)
        before = self._now or self._states()
        streams = _after(record.step, streams, record.where)
        self._now = self._states()
        moved = any(_differ(a, b) for a, b in zip(before, self._now, strict=True))
        record.drew = moved or (isinstance(streams[0], FakeTensor) and _drops(part))
        record.states = before if record.drew else ()
        return streams

    @contextmanager
    def replaying(self, states: Sequence[Tensor]) -> Iterator[None]:
        """A block whose random draws start from ``states``, and disturb nobody's."""
        if not states:
            yield
            return
        with torch.random.fork_rng(devices=self.devices):
            torch.set_rng_state(states[0])
            for device, state in zip(self.devices, states[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
            yield

    def again(self, record: _Record, x: Tensor) -> Tensor:
        """The part's output once more, with the parameters of the forward pass."""
        part, used = record.step.part, [self.parameters[place] for place in record.places]
        assert part is not None
        if all(a is b for a, b in zip(part.parameters(), used, strict=True)):
            return part(x)  # type: ignore[no-any-return]
        # The caller ran the forward pass with other parameters (torch.func.functional_call).
        given = dict(zip(record.names, used, strict=True))
        return torch.func.functional_call(part, given, (x,))  # type: ignore[no-any-return]

    def refuse_changed(self) -> None:
        """Like any graph, refuse parameters that were changed in place since the forward pass."""
        for parameter, version in zip(self.parameters, self.versions, strict=True):
            if _version(parameter) != version:
                raise RuntimeError(
                    f"a parameter of shape {tuple(parameter.shape)} was modified by an inplace operation "
                    "(an optimizer step?) between the forward and the backward pass of a reversible chain"
                )
        _refuse_switched(self.modes)

    def _states(self) -> tuple[Tensor, ...]:
        return torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self.devices)


class _Chain(torch.autograd.Function):
    """The whole chain as one node of the graph: keeps its output, and what repeats random draws."""

    @staticmethod
    def forward(ctx: Any, run: _Run, x: Tensor, *parameters: Tensor) -> Tensor:
        streams = _halves(x, run.split_dim)
        buffers = _buffer_versions(run.chain)
        with _autocasting(run.autocast):
            for record in run.records:
                streams = run.forward(record, streams)
        _warn_of_moving_state(run.chain, buffers)
        y = torch.cat(streams, run.split_dim)
        states = [state for record in run.records for state in record.states]
        for record in run.records:  # only what goes through save_for_backward is seen by hooks and ledgers
            record.states = ()
        run._now = ()
        ctx.save_for_backward(y, *([x] if run.check else []), *states)
        ctx.run = run
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            remedy = 'a reversible chain has no second derivatives; set memory="store" on it'
            refuse("create_graph", True, remedy)
        run: _Run = ctx.run
        run.refuse_changed()
        y, *kept = ctx.saved_tensors
        x = kept.pop(0) if run.check else None
        needed = ctx.needs_input_grad[2:]
        gradients: list[Tensor | None] = [None] * len(run.parameters)
        streams, deltas = _halves(y, run.split_dim), _halves(dy, run.split_dim)
        del y, dy
        with ExitStack() as stack:
            stack.enter_context(_autocasting(run.autocast))
            stack.enter_context(frozen_statistics(run.chain))
            stack.enter_context(_silent(run.parameters))
            for record in reversed(run.records):
                step, states = record.step, []
                if record.drew:
                    cut = len(kept) - 1 - len(run.devices)
                    kept, states = kept[:cut], kept[cut:]
                source = streams[1 - step.target]
                gradient: Tensor | None
                if step.part is None:
                    change, gradient = source, deltas[step.target] * step.scale
                else:
                    wanted = [place for place in record.places if needed[place]]
                    change, gradient, found = _step_back(
                        run, record, source, deltas[step.target], wanted, states
                    )
                    for place, one in zip(wanted, found, strict=True):
                        known = gradients[place]
                        if one is not None:
                            gradients[place] = one if known is None else known + one
                streams = _before(step, streams, change)
                deltas = _passed(step, deltas, gradient)
                del source, change, gradient
        if x is not None:
            _refuse_drift(run.chain, streams, x)
        dx = torch.cat(deltas, run.split_dim) if ctx.needs_input_grad[1] else None
        return None, dx, *gradients


def _step_back(
    run: _Run, record: _Record, source: Tensor, delta: Tensor, wanted: list[int], states: list[Tensor]
) -> tuple[Tensor, Tensor | None, Sequence[Tensor | None]]:
    """One evaluation of a part that gives its output, and the gradients of its input and parameters."""
    with torch.enable_grad():
        leaf = source.detach().requires_grad_()
        with run.replaying(states):
            output = run.again(record, leaf)
        if not output.requires_grad:
            return output, None, [None] * len(wanted)
        scale = record.step.scale
        weight = (delta if scale == 1 else delta * scale).to(output.dtype)
        inputs = [leaf, *(run.parameters[place] for place in wanted)]
    gradient, *found = torch.autograd.grad(output, inputs, weight, allow_unused=True)
    return output.detach(), gradient, found


# ---- steps ------------------------------------------------------------------------------------------------


def _after(step: Step, streams: _Streams, where: str) -> _Streams:
    change = _changed_by(step, streams[1 - step.target], where)
    target = streams[step.target]
    if step.decay != 1:
        target = target * step.decay
    return _replaced(streams, step.target, target + (change if step.scale == 1 else change * step.scale))


def _before(step: Step, streams: _Streams, change: Tensor) -> _Streams:
    target = streams[step.target] - (change if step.scale == 1 else change * step.scale)
    return _replaced(streams, step.target, target if step.decay == 1 else target / step.decay)


def _passed(step: Step, deltas: _Streams, gradient: Tensor | None) -> _Streams:
    """Gradients of the streams before a step, from those after it."""
    source = deltas[1 - step.target]
    streams = _replaced(deltas, 1 - step.target, source if gradient is None else source + gradient)
    return streams if step.decay == 1 else _replaced(streams, step.target, streams[step.target] * step.decay)


def _replaced(streams: _Streams, place: int, value: Tensor) -> _Streams:
    return (value, streams[1]) if place == 0 else (streams[0], value)


def _changed_by(step: Step, source: Tensor, where: str) -> Tensor:
    """The part's output, refused where it is not what a coupling can add and take away again."""
    if step.part is None:
        return source
    version = _version(source)
    change = step.part(source)
    if _version(source) != version:
        refuse(
            where,
            type(step.part).__name__,
            "it changes its input in place; use inplace=False in its first layer",
        )
    if not isinstance(change, Tensor):
        refuse(where, type(change).__name__, "it must give one tensor")
    if change.shape != source.shape or change.device != source.device:
        seen = f"{tuple(source.shape)} on {source.device} gives {tuple(change.shape)} on {change.device}"
        refuse(where, seen, "it must keep the shape and device of its input")
    lower = torch.promote_types(change.dtype, source.dtype) == source.dtype
    if change.dtype != source.dtype and not (lower and torch.is_autocast_enabled(source.device.type)):
        refuse(where, f"{source.dtype} gives {change.dtype}", "it must keep the dtype of its input")
    return change


def _halves(x: Tensor, dim: int) -> _Streams:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        refuse("x", getattr(x, "dtype", type(x).__name__), "give a floating tensor")
    if not -x.dim() <= dim < x.dim():
        refuse("split_dim", dim, f"the input has {x.dim()} dimensions")
    size = x.shape[dim]
    if size % 2 or not size:
        refuse("x", tuple(x.shape), f"dimension {dim} has {size} entries; an even number is split in two")
    return x.narrow(dim, 0, size // 2), x.narrow(dim, size // 2, size // 2)


# ---- the world around a part ------------------------------------------------------------------------------


def _autocast_state(device: str) -> list[tuple[str, bool, torch.dtype]]:
    kinds = dict.fromkeys(("cpu", device))
    return [
        (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        for kind in kinds
        if torch.amp.autocast_mode.is_autocast_available(kind)
    ]


@contextmanager
def _autocasting(state: list[tuple[str, bool, torch.dtype]]) -> Iterator[None]:
    """The autocast of the forward pass, without its cache of cast weights.

    A cast that is cached without a graph would be found later by code that needs one.
    """
    with ExitStack() as stack:
        for kind, enabled, dtype in state:
            if enabled or torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=False))
        yield


def _modes(module: nn.Module) -> _Modes:
    return [(part, part.training) for part in module.modules()]


def _refuse_switched(modes: _Modes) -> None:
    """Dropout and norms run again in another mode would rebuild other inputs, and other gradients."""
    for part, training in modes:
        if part.training != training:
            raise RuntimeError(
                f"a {type(part).__name__} of a reversible chain was switched to "
                f"{'train' if part.training else 'eval'} mode between the forward and the backward pass: "
                "switch back before backward(), or set memory='store' on the chain"
            )


@contextmanager
def _silent(parameters: Sequence[Tensor]) -> Iterator[None]:
    """A block in which the parameters' hooks do not fire: they will, once, on the summed gradient."""
    hooked = [(parameter, parameter._backward_hooks) for parameter in parameters if parameter._backward_hooks]
    for parameter, _ in hooked:
        parameter._backward_hooks = None
    try:
        yield
    finally:
        for parameter, hooks in hooked:
            parameter._backward_hooks = hooks


def _buffer_versions(chain: ReversibleSequential) -> dict[str, tuple[int, int]]:
    if chain._warned or not chain.training:
        return {}
    return {
        f"{name}.{key}".lstrip("."): (id(buffer), _version(buffer))
        for name, module in chain.named_modules()
        if not isinstance(module, _NormBase)
        for key, buffer in module._buffers.items()
        if buffer is not None
    }


def _warn_of_moving_state(chain: ReversibleSequential, before: dict[str, tuple[int, int]]) -> None:
    if not before:
        return
    now = _buffer_versions(chain)
    moved = [name for name, seen in before.items() if now.get(name) != seen]
    if moved:
        chain._warned = True
        warnings.warn(
            f"{', '.join(moved)} changed in the forward pass of a reversible chain: running the part again "
            "changes it again and may give another value; gradients are then not those of the forward pass",
            stacklevel=4,
        )


def _refuse_drift(chain: ReversibleSequential, streams: _Streams, x: Tensor) -> None:
    allowed = math.sqrt(torch.finfo(x.dtype).eps)
    found = _distance(streams, _halves(x, chain.split_dim))
    if found <= allowed:
        return
    errors = reconstruction_error(chain, x)
    bad = [place for place, error in enumerate(errors) if not error <= allowed]
    name = f"blocks.{bad[-1]}" if bad else "none alone"
    raise ArithmeticError(
        f"the chain's input came back with relative error {found:.2g}, allowed {allowed:.2g}; walking back, "
        f"the first bad block is {name}: normalise inside F and G, keep the streams in float32, or shorten "
        "the chain"
    )


def _distance(found: _Streams, known: _Streams) -> float:
    """max|found - known| / max|known|; infinite where something is not a number."""
    error = max(float((a - b).abs().max()) for a, b in zip(found, known, strict=True))
    size = max(float(one.abs().max()) for one in known)
    if not (math.isfinite(error) and math.isfinite(size)):
        return math.inf
    return error / size if size else error


def _differ(a: Tensor, b: Tensor) -> bool:
    # A generator's state is real even while a model is traced with fake tensors; a mode would read a fake.
    with _disable_current_modes():
        return not torch.equal(a, b)


def _drops(part: nn.Module) -> bool:
    """Whether a part has dropout at work: a trace on fake tensors moves no generator that would tell."""
    return any(isinstance(one, _DropoutNd) and one.training and one.p > 0 for one in part.modules())


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _exporting() -> bool:
    return bool(getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)())
