"""One training step on a sequence: SLTT, and the ways it is compared with, under one signature.

Each takes a network of one time step and a loss of one step's output, goes through ``x_seq``, leaves
gradients (added to those that are there) and gives the detached mean loss and the sum of outputs. The caller
steps the optimizer. States are reset before and after; an exception leaves gradients as they were.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from memspan.base import refuse
from memspan.base.rng import rng
from memspan.nn.reversible import restored_statistics
from memspan.nn.spiking import Stateful, detach_, holders, reset_, set_states_, states
from memspan.training.sltt.convert import is_online

__all__ = ["BPTTStep", "CheckpointedStep", "OnlineStep", "TBPTTStep", "TimeDropout", "chosen_steps"]

LossFn = Callable[[Tensor, Any], Tensor]
Scale = Literal["reference", "unbiased"]
At = Literal["all", "last"]


class TimeDropout(Stateful):
    """Dropout with one mask for all steps of a sequence: a mask drawn anew each step is another method.

    Args:
        p: share of values that are dropped, 0 to below 1.

    Example:
        >>> drop = TimeDropout(0.5)
        >>> first, second = drop(torch.ones(1, 8)), drop(torch.ones(1, 8))
        >>> bool((first == second).all())
        True
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        if not 0 <= p < 1:
            refuse("p", p, "give a share of 0 or more and below 1")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Dropped and scaled in training, as it is otherwise."""
        if not self.training or self.p == 0:
            return x
        mask = self._state.get("mask")
        if mask is None:
            mask = torch.empty_like(x, requires_grad=False).bernoulli_(1 - self.p).div_(1 - self.p)
            self._state = {"mask": mask}
        elif mask.shape != x.shape:
            told = f"the mask is of shape {tuple(mask.shape)}, from an earlier batch"
            refuse("x", tuple(x.shape), f"{told}; begin each sequence with memspan.nn.spiking.reset_(net)")
        return x * mask

    def extra_repr(self) -> str:
        """Told beside the class in a printed model."""
        return f"p={self.p}"


class _Step:
    """What all ways to step share: arguments, checks, and the frame around a sequence."""

    def __init__(
        self,
        net: nn.Module,
        loss_fn: LossFn,
        *,
        loss_at: At = "all",
        time_dim: int = 0,
        amp: torch.dtype | None = None,
    ) -> None:
        if not holders(net):
            refuse("net", type(net).__name__, "it has no neurons that hold a state")
        if loss_at not in ("all", "last"):
            refuse("loss_at", loss_at, 'use "all" or "last"')
        if amp not in (None, torch.bfloat16, torch.float16):
            refuse("amp", amp, "use torch.bfloat16, torch.float16 or None; a gradient scaler goes in loss_fn")
        self.net, self.loss_fn, self.loss_at, self.time_dim, self.amp = net, loss_fn, loss_at, time_dim, amp

    def __call__(self, x_seq: Tensor, y: Any) -> tuple[Tensor, Tensor]:
        """Gradients of one batch of sequences.

        Args:
            x_seq: inputs, time in dimension ``time_dim``: (T, B, ...). A still image is given as
                ``x.expand(T, *x.shape)``, which holds no further bytes.
            y: what ``loss_fn(output, y)`` takes.

        Returns:
            The detached mean loss over steps, and the detached sum of outputs in float32.

        Raises:
            BadInput: no time steps, values that are not finite, a loss that is not one number.
        """
        if x_seq.dim() < 2 or x_seq.dim() <= self.time_dim or not x_seq.shape[self.time_dim]:
            told = f"give a sequence with its time steps in dimension {self.time_dim}: (T, B, ...)"
            refuse("x_seq", tuple(x_seq.shape), told)
        with self._framed():
            return self._run(x_seq.unbind(self.time_dim), y)

    def _run(self, xs: tuple[Tensor, ...], y: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    @contextlib.contextmanager
    def _framed(self) -> Iterator[None]:
        """States begin and end empty; gradients are whole ones or those from before."""
        trained = [parameter for parameter in self.net.parameters() if parameter.requires_grad]
        before = [parameter.grad for parameter in trained]
        for parameter in trained:
            parameter.grad = None
        reset_(self.net)
        try:
            yield
        except BaseException:
            for parameter, old in zip(trained, before, strict=True):
                parameter.grad = old
            raise
        finally:
            reset_(self.net)
        for parameter, old in zip(trained, before, strict=True):
            if old is not None:
                parameter.grad = old if parameter.grad is None else old.add_(parameter.grad)

    def _cast(self, x: Tensor) -> AbstractContextManager[Any]:
        return nullcontext() if self.amp is None else torch.autocast(x.device.type, dtype=self.amp)

    def _forward(self, x: Tensor, y: Any, last: bool) -> tuple[Tensor | None, Tensor]:
        """Loss (where there is one) and output of one step."""
        if x.is_floating_point() and not bool(torch.isfinite(x).all()):
            refuse("x_seq", "values", "it holds NaN or infinity: mend the data first")
        with self._cast(x):
            out = self.net(x)
            if not isinstance(out, Tensor):
                refuse("net", type(out).__name__, "a network of one step gives one tensor")
            loss = self.loss_fn(out, y) if last or self.loss_at == "all" else None
        if loss is not None and (not isinstance(loss, Tensor) or loss.numel() != 1):
            shown = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            refuse("loss_fn", shown, "it must give one number for the output of one step")
        return loss, out


class OnlineStep(_Step):
    """SLTT, or SLTT-K: each step is differentiated and freed before the next.

    Args:
        net: a network of one time step that :func:`convert_` cut from its past.
        loss_fn: ``loss_fn(output of one step, y)`` gives one number.
        k: steps that are differentiated, drawn anew each call; None is all of them.
        loss_scale: ``"reference"`` divides the loss of a drawn step by T, as published: the expected gradient
            is then K / T of SLTT's. ``"unbiased"`` divides by K.
        loss_at: ``"all"`` steps, or the ``"last"`` alone. Then inputs of earlier steps get no gradient at
            all: SLTT cannot learn what must be remembered.
        time_dim: where time stands in ``x_seq``.
        seed: of the drawn steps; all ranks draw the same.
        amp: dtype of autocast; potentials stay in float32.

    Under ``DistributedDataParallel`` gradients are exchanged once a sequence.

    Raises:
        BadInput: the network was not converted; K outside 1 to T; see also calling it.

    Example:
        >>> from memspan.nn.spiking import LIF
        >>> from memspan.training import sltt
        >>> net = sltt.convert_(nn.Sequential(nn.Linear(4, 8), LIF(), nn.Linear(8, 2)))
        >>> one_of_six = OnlineStep(net, nn.functional.cross_entropy, k=1, loss_scale="unbiased")
        >>> loss, out = one_of_six(torch.ones(6, 3, 4), torch.tensor([0, 1, 1]))
        >>> loss.requires_grad, out.dtype
        (False, torch.float32)
    """

    def __init__(
        self,
        net: nn.Module,
        loss_fn: LossFn,
        k: int | None = None,
        loss_scale: Scale = "reference",
        loss_at: At = "all",
        time_dim: int = 0,
        seed: int = 0,
        amp: torch.dtype | None = None,
    ) -> None:
        super().__init__(net, loss_fn, loss_at=loss_at, time_dim=time_dim, amp=amp)
        if not is_online(net):
            refuse("net", type(net).__name__, "cut it from its past first: sltt.convert_(net)")
        if loss_scale not in ("reference", "unbiased"):
            refuse("loss_scale", loss_scale, 'use "reference" or "unbiased"')
        if loss_at == "last" and k is not None:
            refuse("k", k, "with the loss at the last step there is one step to differentiate; leave k out")
        self.k, self.loss_scale, self.seed = k, loss_scale, seed
        #: Calls so far; with the seed it decides which steps are drawn. Set it when a run goes on.
        self.iteration = 0

    def _run(self, xs: tuple[Tensor, ...], y: Any) -> tuple[Tensor, Tensor]:
        T = len(xs)
        drawn = {T - 1} if self.loss_at == "last" else chosen_steps(T, self.k, self.seed, self.iteration)
        self.iteration += 1
        share = 1 / len(drawn) if self.loss_scale == "unbiased" or self.loss_at == "last" else 1 / T
        total, summed, losses = None, None, 0
        for t, x in enumerate(xs):
            with ExitStack() as around:
                if t not in drawn:
                    around.enter_context(torch.no_grad())
                if isinstance(self.net, DistributedDataParallel) and t != max(drawn):
                    around.enter_context(self.net.no_sync())
                loss, out = self._forward(x, y, t == T - 1)
                if t in drawn:
                    assert loss is not None
                    self._backward(loss * share, t)
            if loss is not None:
                total = loss.detach() if total is None else total + loss.detach()
                losses += 1
            now = out.detach().float()
            summed = now if summed is None else summed + now
            del loss, out  # the graph of this step ends here
        assert total is not None
        assert summed is not None
        return total / losses, summed

    def _backward(self, loss: Tensor, t: int) -> None:
        try:
            loss.backward()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            if "second time" in str(error):
                remedy = "a module carries a value over time that convert_ does not know: give it read_state"
                refuse("net", f"step {t}", f"{remedy} and write_state (memspan.nn.spiking.HoldsState)")
            raise


class BPTTStep(_Step):
    """Backpropagation through time: exact, with the activations of all steps kept.

    Args:
        net: a network of one time step, not converted.
        loss_fn: as for :class:`OnlineStep`, as are ``loss_at``, ``time_dim`` and ``amp``.
    """

    def __init__(self, net: nn.Module, loss_fn: LossFn, **options: Any) -> None:
        super().__init__(net, loss_fn, **options)
        _refuse_online(net)

    def graph(self, xs: tuple[Tensor, ...], y: Any) -> tuple[Tensor, Tensor]:
        """The mean loss with its graph, and the sum of outputs; the state goes on from where it is."""
        losses, summed = [], None
        for t, x in enumerate(xs):
            loss, out = self._forward(x, y, t == len(xs) - 1)
            if loss is not None:
                losses.append(loss)
            now = out.detach().float()
            summed = now if summed is None else summed + now
            del out
        assert summed is not None
        return torch.stack(losses).mean() if len(losses) > 1 else losses[0], summed

    def _run(self, xs: tuple[Tensor, ...], y: Any) -> tuple[Tensor, Tensor]:
        loss, summed = self.graph(xs, y)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach(), summed


class TBPTTStep(_Step):
    """Truncated backpropagation: exact inside windows of time, cut between them.

    Args:
        net: a network of one time step, not converted.
        loss_fn: as for :class:`OnlineStep`, as are ``loss_at``, ``time_dim`` and ``amp``.
        window: steps that are kept at once; from T on it is :class:`BPTTStep`.
    """

    def __init__(self, net: nn.Module, loss_fn: LossFn, window: int = 4, **options: Any) -> None:
        super().__init__(net, loss_fn, **options)
        _refuse_online(net)
        if window < 1:
            refuse("window", window, "give the number of steps between cuts, 1 or more")
        self.window = window

    def _run(self, xs: tuple[Tensor, ...], y: Any) -> tuple[Tensor, Tensor]:
        T = len(xs)
        count = 1 if self.loss_at == "last" else T
        total: Any = 0.0
        summed: Any = 0.0
        for begin in range(0, T, self.window):
            losses = []
            for t in range(begin, min(begin + self.window, T)):
                loss, out = self._forward(xs[t], y, t == T - 1)
                if loss is not None:
                    losses.append(loss)
                summed = summed + out.detach().float()
                del loss, out
            if losses:
                part = torch.stack(losses).sum() / count
                part.backward()  # type: ignore[no-untyped-call]
                total = total + part.detach()
                del part
            del losses
            detach_(self.net)
        return total, summed


class CheckpointedStep(_Step):
    """Backpropagation through time that keeps states between segments and computes their inside again.

    Exact, for about one more forward pass; running statistics of norms move once. Recomputing layers that
    keep their own state (``checkpoint_``) would be wrong, since the second pass starts from the state that
    the first one left: here states enter and leave a segment as tensors.

    Args:
        net: a network of one time step, not converted.
        loss_fn: as for :class:`OnlineStep`, as are ``loss_at``, ``time_dim`` and ``amp``.
        segments: parts of time; None takes the square root of T.
    """

    def __init__(self, net: nn.Module, loss_fn: LossFn, segments: int | None = None, **options: Any) -> None:
        super().__init__(net, loss_fn, **options)
        _refuse_online(net)
        if segments is not None and segments < 1:
            refuse("segments", segments, "give a number of segments, 1 or more, or None")
        self.segments = segments

    def _run(self, xs: tuple[Tensor, ...], y: Any) -> tuple[Tensor, Tensor]:
        T = len(xs)
        size = -(-T // (self.segments or max(1, round(math.sqrt(T)))))
        count = 1 if self.loss_at == "last" else T
        total, summed, kept = xs[0].new_zeros((), dtype=torch.float32), None, states(self.net)
        for begin in range(0, T, size):
            part = xs[begin : begin + size]

            def segment(
                kept: dict[str, dict[str, Tensor]], part: Any = part, last: bool = begin + size >= T
            ) -> Any:
                set_states_(self.net, kept)
                loss, out = None, None
                for t, x in enumerate(part):
                    one, now = self._forward(x, y, last and t == len(part) - 1)
                    if one is not None:
                        loss = one if loss is None else loss + one
                    out = now.detach().float() if out is None else out + now.detach().float()
                return loss, out, states(self.net)

            again = (nullcontext(), restored_statistics(self.net))  # norms move once, not twice
            loss, out, kept = checkpoint(
                segment, kept, use_reentrant=False, context_fn=partial(_both, *again)
            )
            summed = out if summed is None else summed + out
            if loss is not None:
                total = total + loss / count
        reset_(self.net)
        total.backward()  # type: ignore[no-untyped-call]
        assert summed is not None
        return total.detach(), summed


def chosen_steps(T: int, k: int | None, seed: int, iteration: int) -> set[int]:
    """The steps that SLTT-K differentiates: the same in any process.

    Raises:
        BadInput: K outside 1 to T.

    Example:
        >>> chosen_steps(4, None, 0, 0), len(chosen_steps(10, 3, 0, 0))
        ({0, 1, 2, 3}, 3)
    """
    if k is None:
        return set(range(T))
    if not 1 <= k <= T:
        refuse("k", k, f"this sequence has {T} steps: differentiate 1 to {T} of them, or None for all")
    return {int(t) for t in rng("sltt", seed, iteration).choice(T, k, replace=False)}


def _both(one: Any, other: Any) -> tuple[Any, Any]:
    return one, other


def _refuse_online(net: nn.Module) -> None:
    if is_online(net):
        refuse("net", type(net).__name__, "it was cut from its past: sltt.restore_(net) first")
