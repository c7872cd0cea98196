"""The leaky integrate-and-fire neuron, one step at a time or over a whole sequence."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from memspan.base import refuse
from memspan.nn.spiking import surrogate as surrogates
from memspan.nn.spiking.state import Stateful, reset_

__all__ = ["LIF", "Unrolled", "lif_step"]

Reset = Literal["subtract", "zero"]


def lif_step(
    current: Tensor,
    v: Tensor | None,
    decay: float | Tensor,
    v_threshold: float = 1.0,
    reset: Reset = "subtract",
    surrogate: str = "triangle",
    width: float = 1.0,
    detach_reset: bool = False,
) -> tuple[Tensor, Tensor]:
    """Leak, charge, fire, reset: one time step of any number of neurons.

    ``u = decay v + current``; a neuron fires where ``u >= v_threshold``; there ``v = u - v_threshold``
    (``"subtract"``) or ``v = 0`` (``"zero"``). The potential after the reset is the only state.
    One autograd function with a derivative in closed form: it keeps ``u`` for the backward pass and nothing
    else (and ``v`` where the decay is trained).

    Args:
        current: the input, any shape; it is not divided by the time constant. In 16 bits it is computed with
            in 32: a current that is rounded across the threshold flips a spike.
        v: potential after the last reset, of the shape of ``current``; None is 0.
        decay: share of the potential that stays, 0 to 1; or a tensor of one number that is trained.
        v_threshold: above 0.
        reset: ``"subtract"`` or ``"zero"``.
        surrogate: name of a derivative, see :mod:`memspan.nn.spiking.surrogate`.
        width: of the surrogate.
        detach_reset: no gradient through the reset.

    Returns:
        Spikes (0 or 1, in the dtype of ``current``) and the new potential (float32, or float64).

    Example:
        >>> spikes, v = lif_step(torch.tensor([0.5, 1.25]), None, decay=0.5)
        >>> spikes.tolist(), v.tolist()
        ([0.0, 1.0], [0.5, 0.25])
        >>> spikes, v = lif_step(torch.tensor([0.75, 0.0]), v, decay=0.5)
        >>> spikes.tolist(), v.tolist()
        ([1.0, 0.0], [0.0, 0.125])

    Source: Meng et al., ICCV 2023, equations 1 and 2, written with the potential after the reset.
    """
    rule = (v_threshold, reset == "zero", surrogate, width, detach_reset)
    wide = current.float() if current.dtype in (torch.float16, torch.bfloat16) else current
    if isinstance(decay, Tensor):
        held = torch.zeros_like(wide) if v is None else v
        spikes, after, _ = _Trained.apply(wide, held, decay, *rule)  # type: ignore[no-untyped-call]
    else:
        spikes, after, _ = _Step.apply(wide, v, decay, *rule)  # type: ignore[no-untyped-call]
    return spikes.to(current.dtype), after


class LIF(Stateful):
    """A layer of leaky integrate-and-fire neurons that keeps its own potential from call to call.

    Args:
        tau: time constant in steps, above 1: the decay is ``1 - 1 / tau``. ``math.inf`` does not leak.
        v_threshold: above 0.
        reset: ``"subtract"`` or ``"zero"``.
        surrogate: ``"triangle"``, ``"rectangle"``, ``"sigmoid"`` or ``"atan"``.
        width: of the surrogate.
        detach_reset: no gradient through the reset.
        learn_tau: train the decay, one number for the layer, through a sigmoid.
        multi_step: inputs are whole sequences (T, B, ...) instead of one step (B, ...).

    Shapes: ``(B, ...)`` to spikes of the same shape; with ``multi_step`` ``(T, B, ...)`` likewise.

    Raises:
        BadInput: tau at or below 1, a threshold at or below 0, unknown names; an input of another shape than
            the state's; a state whose sequence was differentiated already.

    Example:
        >>> neuron = LIF(tau=2.0)
        >>> [neuron(torch.full((1, 1), 0.75)).item() for _ in range(3)]
        [0.0, 1.0, 0.0]
        >>> _ = neuron(torch.zeros(5, 1))
        Traceback (most recent call last):
        memspan.base.refusal.BadInput: x=(5, 1): the state is of shape (1, 1), from an earlier batch; begin
        each sequence with memspan.nn.spiking.reset_(net)
    """

    def __init__(
        self,
        tau: float = 1.1,
        v_threshold: float = 1.0,
        reset: Reset = "subtract",
        surrogate: str = "triangle",
        width: float = 1.0,
        detach_reset: bool = False,
        learn_tau: bool = False,
        multi_step: bool = False,
    ) -> None:
        super().__init__()
        if not tau > 1:
            refuse("tau", tau, "the decay is 1 - 1 / tau: give a time constant above 1; math.inf never leaks")
        if not (v_threshold > 0 and math.isfinite(v_threshold)):
            refuse("v_threshold", v_threshold, "give a threshold above 0; 1 is usual")
        if reset not in ("subtract", "zero"):
            refuse("reset", reset, 'use "subtract" or "zero"; a reset to another value is not offered')
        surrogates.derivative(surrogate, torch.zeros(1), width)  # refuses what is unknown
        if learn_tau and math.isinf(tau):
            refuse("tau", tau, "a decay of 1 has no gradient: train from a finite time constant")
        self.v_threshold, self.reset, self.surrogate = float(v_threshold), reset, surrogate
        self.width, self.detach_reset, self.multi_step = float(width), detach_reset, multi_step
        #: Drop the backward path through time; set by ``training.sltt.convert_``.
        self.online = False
        share = 1 - 1 / tau
        self._decay = share
        self.decay_logit = nn.Parameter(torch.tensor(math.log(share / (1 - share)))) if learn_tau else None

    @property
    def decay(self) -> float | Tensor:
        """Share of the potential that stays; a tensor where it is trained."""
        return self._decay if self.decay_logit is None else torch.sigmoid(self.decay_logit)

    def step(self, x: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor]:
        """One step with a state that the caller carries: see :func:`lif_step`."""
        return lif_step(
            x, v, self.decay, self.v_threshold, self.reset, self.surrogate, self.width, self.detach_reset
        )

    def forward(self, x: Tensor) -> Tensor:
        """Spikes of one step, or of a whole sequence."""
        if not self.multi_step:
            return self._advance(x)
        return torch.stack([self._advance(now) for now in x])

    def _advance(self, x: Tensor) -> Tensor:
        v = self._state.get("v")
        if v is not None:
            if v.shape != x.shape:
                told = f"the state is of shape {tuple(v.shape)}, from an earlier batch"
                refuse("x", tuple(x.shape), f"{told}; {_BEGIN}")
            if self.online:
                v = v.detach()
            elif v.requires_grad and not torch.compiler.is_compiling() and _spent(v):
                told = "the state belongs to a sequence whose graph a backward pass has freed"
                refuse("x", tuple(x.shape), f"{told}; {_BEGIN}")
        spikes, after = self.step(x, v)
        self._state = {"v": after}
        return spikes

    def extra_repr(self) -> str:
        """Told beside the class in a printed model."""
        tau = 1 / (1 - self._decay) if self._decay < 1 else math.inf
        return f"tau={tau:g}, v_threshold={self.v_threshold:g}, reset={self.reset!r}, {self.surrogate}"


class Unrolled(nn.Module):
    """A network of one time step as an ordinary module of a sequence.

    It resets, steps, stacks and resets, so that plain training of it is backpropagation through time and
    ``Ledger``, ``plan`` and ``fit`` take it as it is.

    Args:
        net: takes one step (B, ...) and gives (B, C).
        time_dim: where time stands in the input and in the output.

    Shapes: ``(B, T, ...)`` to ``(B, T, C)`` with ``time_dim=1``.

    Example:
        >>> net = Unrolled(nn.Sequential(nn.Linear(3, 4), LIF(), nn.Linear(4, 2)))
        >>> net(torch.zeros(5, 7, 3)).shape
        torch.Size([5, 7, 2])
    """

    def __init__(self, net: nn.Module, time_dim: int = 1) -> None:
        super().__init__()
        self.net, self.time_dim = net, time_dim

    def forward(self, x: Tensor, *, keep: bool = False) -> Tensor:
        """Outputs of every step; ``keep`` goes on from the state and leaves it, for who feeds slices."""
        if x.dim() <= self.time_dim or not x.shape[self.time_dim]:
            refuse("x", tuple(x.shape), f"give a sequence with its time steps in dimension {self.time_dim}")
        if not keep:
            reset_(self.net)
        try:
            return torch.stack([self.net(now) for now in x.unbind(self.time_dim)], self.time_dim)
        finally:
            if not keep:
                reset_(self.net)


_BEGIN = "begin each sequence with memspan.nn.spiking.reset_(net)"


class _Rule(NamedTuple):
    """What of a step is no tensor."""

    v_threshold: float
    zero: bool
    surrogate: str
    width: float
    detach_reset: bool


class _Step(torch.autograd.Function):
    """One step with a fixed decay. ``u`` is an output because only inputs and outputs can be kept."""

    generate_vmap_rule = True

    @staticmethod
    def forward(current: Tensor, v: Tensor | None, decay: float, *rule: Any) -> tuple[Tensor, ...]:
        u = current.clone() if v is None else torch.add(current, v, alpha=decay)
        return (*_fire(u, _Rule(*rule)), u)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(output[2])
        ctx.carried, ctx.decay, ctx.rule = inputs[1] is not None, inputs[2], _Rule(*inputs[3:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        (u,) = ctx.saved_tensors
        found = _gradient(u, ctx.rule, grads[0], grads[1])
        carried = ctx.carried and ctx.needs_input_grad[1] and found is not None
        return found, found * ctx.decay if carried else None, *(None,) * 6  # type: ignore[operator]


class _Trained(torch.autograd.Function):
    """One step with a trained decay, which needs the potential before it as well."""

    generate_vmap_rule = True

    @staticmethod
    def forward(current: Tensor, v: Tensor, decay: Tensor, *rule: Any) -> tuple[Tensor, ...]:
        u = current + decay * v
        return (*_fire(u, _Rule(*rule)), u)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(output[2], inputs[1], inputs[2])
        ctx.rule = _Rule(*inputs[3:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        u, v, decay = ctx.saved_tensors
        found = _gradient(u, ctx.rule, grads[0], grads[1])
        if found is None:
            return (None,) * 8
        of_decay = (found * v).sum_to_size(decay.shape) if ctx.needs_input_grad[2] else None
        return found, found * decay if ctx.needs_input_grad[1] else None, of_decay, *(None,) * 5


def _fire(u: Tensor, rule: _Rule) -> tuple[Tensor, Tensor]:
    spikes = (u >= rule.v_threshold).to(u.dtype)
    after = u * (1 - spikes) if rule.zero else torch.sub(u, spikes, alpha=rule.v_threshold)
    return spikes, after


def _gradient(u: Tensor, rule: _Rule, of_spikes: Tensor | None, of_after: Tensor | None) -> Tensor | None:
    """Gradient of ``u``: straight to the potential after the reset, and through the spike."""
    if of_after is not None and not rule.detach_reset:  # the reset subtracts u or the threshold at a spike
        back = of_after * (u if rule.zero else rule.v_threshold)
        of_spikes = -back if of_spikes is None else of_spikes - back
    direct = of_after
    if of_after is not None and rule.zero:
        direct = of_after * (u < rule.v_threshold)
    if of_spikes is None:
        return direct
    slope = surrogates.derivative(rule.surrogate, u - rule.v_threshold, rule.width)
    return slope * of_spikes if direct is None else torch.addcmul(direct, slope, of_spikes)


def _spent(v: Tensor) -> bool:
    """Whether a backward pass freed what the graph behind a tensor kept."""
    node: Any = v.grad_fn
    try:
        node._raw_saved_tensors  # noqa: B018  raises where it was freed; unlike saved_tensors it unpacks nothing
    except RuntimeError:
        return True
    except AttributeError:  # a node of another kind, such as a compiled graph's
        return False
    return False
