"""PRES: a node's memory predicted from its own drift, blended with the computed one, and kept smooth.

Events of one batch do not see each other, so that a large batch computes memories from stale inputs. PRES
tracks the mean rate at which each node's memory moves, predicts where it would be by now, writes the blend
of prediction and computation, and adds a loss that keeps the memory's direction from one update to the next.

Source: PRES: Toward Scalable Memory-Based Dynamic Graph Neural Networks, ICLR 2024, sections 4 and 5. The
official code does not implement it (its loss is detached, its counts stay 0); this follows the paper. Ours:
the clip of the predicted step, and the rates ``"drift"`` and ``"step"``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memspan.banks.temporal.memory import _Kept
from memspan.base import refuse

__all__ = ["PRES", "CorrectedUpdater", "RateTracker", "coherence"]

Rate = Literal["mean", "drift", "step", "none"]


def coherence(new: Tensor, old: Tensor) -> Tensor:
    """``1 - cos`` between two stacks of memory rows, each read as one long vector: in [0, 2].

    Args:
        new: (n, D) rows after an update; the gradient goes here.
        old: (n, D) rows before; detached. Rows that are zero (never updated) are left out of both.

    Source:
        PRES, equation of the memory coherence smoothing.

    Example:
        >>> coherence(torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0]])).item()
        0.0
    """
    old = old.detach()
    keep = (old != 0).any(1, keepdim=True)
    cosine = F.cosine_similarity((new * keep).reshape(1, -1), (old * keep).reshape(1, -1))[0]
    return torch.where(keep.any(), 1 - cosine, new.sum() * 0).clamp(0, 2)


class RateTracker(nn.Module):
    """Running mean (and variance) of a vector of each node, for each kind of event: a Gaussian mixture.

    Args:
        num_nodes: N.
        dim: D.
        components: kinds of event, C.
        forget: factor on the count before each observation; 1 is the plain mean.
        second_moment: keep the variance too, at twice the bytes; :meth:`variance` and :meth:`sample` need it.

    Attributes:
        n: (N, C) observations, forgotten ones aside.
        average: (N, C, D).

    Raises:
        BadInput: sizes below 1, a factor outside (0, 1].

    Example:
        >>> tracker = RateTracker(3, 1, second_moment=True)
        >>> for value in (1.0, 3.0):
        ...     tracker.update_(torch.tensor([2]), torch.tensor([[value]]))
        >>> tracker.mean(torch.tensor([2])).item(), tracker.variance(torch.tensor([2])).item()
        (2.0, 1.0)
    """

    n: Tensor
    average: Tensor
    squares: Tensor

    def __init__(
        self, num_nodes: int, dim: int, components: int = 1, forget: float = 1.0, second_moment: bool = False
    ) -> None:
        super().__init__()
        if min(num_nodes, dim, components) < 1:
            refuse("num_nodes, dim, components", (num_nodes, dim, components), "give 1 or more of each")
        if not 0 < forget <= 1:
            refuse("forget", forget, "give a factor in (0, 1]; 1 forgets nothing")
        self.forget, self.second_moment = forget, second_moment
        self.register_buffer("n", torch.zeros(num_nodes, components))
        self.register_buffer("average", torch.zeros(num_nodes, components, dim))
        if second_moment:
            self.register_buffer("squares", torch.zeros(num_nodes, components, dim))

    @torch.no_grad()
    def update_(self, nodes: Tensor, value: Tensor, component: Tensor | None = None) -> None:
        """Observe one vector of each of some distinct nodes (Welford's update, which does not cancel).

        Args:
            nodes: (n,) int64, distinct.
            value: (n, D).
            component: (n,) int64; None is 0 for all.

        Raises:
            BadInput: a node twice, or a component that was not announced.
        """
        if torch.unique(nodes).numel() != nodes.numel():
            refuse("nodes", nodes.tolist(), "give each node once a call")
        components = self.n.shape[1]
        kind = torch.zeros_like(nodes) if component is None else component
        if bool(((kind < 0) | (kind >= components)).any()):
            refuse("component", kind.tolist(), f"kinds of event run from 0 to {components - 1}")
        place = nodes * components + kind
        flat = self.average.view(-1, self.average.shape[-1])
        count = self.n.view(-1)[place] * self.forget + 1
        before = flat[place]
        gap = value.to(flat.dtype) - before
        after = before + gap / count.unsqueeze(1)
        if self.second_moment:
            spread = self.squares.view_as(flat)
            spread[place] = spread[place] * self.forget + gap * (value.to(flat.dtype) - after)
        flat[place] = after
        self.n.view(-1)[place] = count

    def weights(self, nodes: Tensor) -> Tensor:
        """Share of each kind among a node's observations: (n, C); equal shares where there are none."""
        n = self.n[nodes]
        total = n.sum(1, keepdim=True)
        return torch.where(total > 0, n / total.clamp_min(1e-30), torch.full_like(n, 1 / n.shape[1]))

    def mean(self, nodes: Tensor, component: Tensor | None = None) -> Tensor:
        """Mean of the mixture, or of one kind: (n, D); 0 where nothing was observed."""
        if component is not None:
            return self.average[nodes, component]
        if self.average.shape[1] == 1:
            return self.average[nodes, 0]
        return (self.weights(nodes).unsqueeze(-1) * self.average[nodes]).sum(1)

    def variance(self, nodes: Tensor) -> Tensor:
        """Variance of each kind (division by the count): (n, C, D), never below 0.

        Raises:
            BadInput: no second moment is kept.
        """
        if not self.second_moment:
            refuse("second_moment", False, "make the tracker with second_moment=True")
        return (self.squares[nodes] / self.n[nodes].clamp_min(1e-30).unsqueeze(-1)).clamp_min(0)

    def sample(self, nodes: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One draw from each node's mixture: (n, D)."""
        variance = self.variance(nodes)
        kind = torch.multinomial(self.weights(nodes), 1, generator=generator).view(-1)
        row = torch.arange(len(nodes), device=nodes.device)
        noise = torch.randn(variance[:, 0].shape, generator=generator, dtype=variance.dtype).to(
            variance.device
        )
        return self.average[nodes, kind] + variance[row, kind].sqrt() * noise

    def grow_(self, num_nodes: int) -> None:
        """Room for more nodes, with nothing observed."""
        _Kept._grown_(
            self,  # type: ignore[arg-type]
            num_nodes,
            ("n", "average", *(("squares",) if self.second_moment else ())),
        )

    def memory_bytes(self) -> dict[str, int]:
        """Bytes of the counts and means: (1 + D) 4 C N, or (1 + 2 D) 4 C N with the second moment."""
        held = self.n.nbytes + self.average.nbytes
        return {"tracker": held + (self.squares.nbytes if self.second_moment else 0)}


class HoldsMemory(Protocol):
    """What :meth:`PRES.attach_` takes: PyG's ``TGNMemory`` and what is built like it."""

    memory: Tensor
    last_update: Tensor
    training: bool
    _get_updated_memory: Callable[[Tensor], tuple[Tensor, Tensor]]
    _update_memory: Callable[[Tensor], None]


class PRES(nn.Module):
    """Prediction, correction and coherence, for the models here or for any updater of node memories.

    Args:
        beta: weight of the coherence loss.
        gamma: share of the computed memory in the blend at the start; learned from there. 1 leaves the
            correction out altogether: the coherence loss alone, without tracker and parameter.
        rate: what is tracked. ``"mean"`` (the paper): the mean of step / time; ``"drift"``: the sum of steps
            over the sum of times; ``"step"``: the mean step, whatever the time; ``"none"``: predicts no
            change, which damps alone (a control).
        clip: hold the predicted step to the longest step written so far. Without it the mean of rates, which
            short gaps rule, is multiplied by long ones and the memory explodes.
        time_scale: unit of time, such as the mean gap between events; None takes the model's.
        components: kinds of event that are tracked apart.
        forget: see :class:`RateTracker`.

    Attributes:
        raw_gamma: the learned share before its sigmoid, or None.
        tracker: made when the sizes are known, by the model or by :meth:`attach_`; None before.

    Raises:
        BadInput: a negative beta, a share outside (0, 1], another rate.

    Example:
        >>> pres = PRES(beta=0.1, time_scale=1.0).size_(4, 2)
        >>> one, zero = torch.ones(1, 2), torch.zeros(1, 2)
        >>> t = torch.zeros(1).double()
        >>> pres.correct(torch.tensor([3]), zero, one, t, t + 1, observe=True).tolist()
        [[0.8999999761581421, 0.8999999761581421]]
    """

    largest: Tensor

    def __init__(
        self,
        beta: float = 0.1,
        gamma: float = 0.9,
        rate: Rate = "mean",
        clip: bool = True,
        time_scale: float | None = None,
        components: int = 1,
        forget: float = 1.0,
    ) -> None:
        super().__init__()
        if not 0 <= beta < math.inf:
            refuse("beta", beta, "give a weight of 0 or more")
        if not 0 < gamma <= 1:
            refuse("gamma", gamma, "give a share in (0, 1]; 1 leaves the correction out")
        if rate not in ("mean", "drift", "step", "none"):
            refuse("rate", rate, 'use "mean", "drift", "step" or "none"')
        if time_scale is not None and not 0 < time_scale < math.inf:
            refuse("time_scale", time_scale, "give a time above 0, such as data.mean_gap")
        self.beta, self.rate, self.clip, self.time_scale = beta, rate, clip, time_scale
        self.components, self.forget = components, forget
        self.raw_gamma = None if gamma == 1 else nn.Parameter(torch.tensor(math.log(gamma / (1 - gamma))))
        self.register_buffer("largest", torch.zeros(()))
        self.tracker: RateTracker | None = None
        self._scored: tuple[Tensor, Tensor] | None = None

    def size_(self, num_nodes: int, dim: int) -> PRES:
        """Make the tracker for N nodes of width D; the models here and :meth:`attach_` call it."""
        if self.raw_gamma is not None and self.rate != "none":
            width = dim + (self.rate == "drift")
            self.tracker = RateTracker(num_nodes, width, self.components, self.forget)
            self.tracker.to(self.raw_gamma.device)
        return self

    @property
    def gamma(self) -> Tensor:
        """The share of the computed memory."""
        return torch.ones(()) if self.raw_gamma is None else torch.sigmoid(self.raw_gamma)

    def correct(
        self,
        nodes: Tensor,
        before: Tensor,
        after: Tensor,
        t_before: Tensor,
        t_after: Tensor,
        *,
        observe: bool,
        component: Tensor | None = None,
    ) -> Tensor:
        """The memory to write and to use: ``(1 - g) prediction + g after``.

        Args:
            nodes: (n,) int64, distinct.
            before: (n, D) memory at the previous update.
            after: (n, D) memory as the updater computed it.
            t_before: (n,) float64 or int64 time of the previous update.
            t_after: (n,) time of this one. Where it is not later, ``after`` is given back as it is.
            observe: track the step; once for each update that is written, never in evaluation.
            component: (n,) int64 kind of event.

        Raises:
            BadInput: no sizes yet, or no unit of time.
        """
        if self.raw_gamma is None:
            return after
        gap = self._gap(t_before, t_after)
        with torch.no_grad():
            step = self._predicted(nodes, gap.clamp_min(0), component).to(after.dtype)
        blend = (1 - self.gamma) * (before + step) + self.gamma * after
        corrected = torch.where((gap > 0).unsqueeze(1), blend.to(after.dtype), after)
        if observe:
            self.observe_(nodes, before, corrected, t_before, t_after, component)
        return corrected

    @torch.no_grad()
    def observe_(
        self,
        nodes: Tensor,
        before: Tensor,
        written: Tensor,
        t_before: Tensor,
        t_after: Tensor,
        component: Tensor | None = None,
    ) -> None:
        """Track the steps that were written; arguments as :meth:`correct`."""
        if self.raw_gamma is None:
            return
        gap = self._gap(t_before, t_after)
        moved = gap > 0
        step, gap = (written - before)[moved], gap[moved].unsqueeze(1)
        if not len(step):
            return
        self.largest = torch.maximum(self.largest, step.norm(dim=1).max().to(self.largest.dtype))
        if self.tracker is not None:
            seen = {"mean": step / gap, "step": step, "drift": torch.cat([step, gap.to(step.dtype)], 1)}
            kind = None if component is None or self.components == 1 else component[moved]
            self.tracker.update_(nodes[moved], seen[self.rate], kind)

    def _gap(self, t_before: Tensor, t_after: Tensor) -> Tensor:
        if self.time_scale is None:
            refuse("time_scale", None, "give PRES the unit of time, such as data.mean_gap")
        return (t_after - t_before).double() / self.time_scale

    def _predicted(self, nodes: Tensor, gap: Tensor, component: Tensor | None) -> Tensor:
        if self.rate == "none":
            return gap.new_zeros(len(nodes), 1)
        if self.tracker is None:
            refuse("tracker", None, "call size_(num_nodes, dim), or attach_ to a memory, first")
        known = self.tracker.mean(nodes)
        gap = gap.unsqueeze(1).to(known.dtype)
        if self.rate == "mean":
            known = known * gap
        elif self.rate == "drift":
            known = known[:, :-1] * gap / known[:, -1:].clamp_min(1e-12)
        if self.clip:
            length = known.norm(dim=1, keepdim=True)
            known = known * (self.largest / length.clamp_min(1e-12)).clamp_max(1)
        return known

    # -- other people's memories --

    def wrap(self, updater: nn.Module) -> CorrectedUpdater:
        """The updater (GRU or RNN cell, or anything called with messages and memory) with the correction."""
        return CorrectedUpdater(updater, self)

    def attach_(self, memory: Any) -> PRES:
        """Put the correction into a memory like PyG's ``TGNMemory``; the training loop stays as it is.

        Add :meth:`coherence_loss` to the loss, and ``pres.parameters()`` to the optimizer. ``reset_state()``
        of the memory leaves the tracker; evaluation corrects and tracks nothing.

        Args:
            memory: has ``memory`` (N, D), ``last_update`` (N,), ``_get_updated_memory`` and
                ``_update_memory``.

        Raises:
            BadInput: it has not, or carries a PRES already.
        """
        for name in ("memory", "last_update", "_get_updated_memory", "_update_memory"):
            if not hasattr(memory, name):
                refuse(
                    "memory", type(memory).__name__, f"it has no {name}; give a memory like PyG's TGNMemory"
                )
        if isinstance(getattr(memory, "_get_updated_memory", None), _Corrected):
            refuse("memory", type(memory).__name__, "it carries a PRES; take that off with remove_ first")
        self._gap(memory.last_update[:0], memory.last_update[:0])
        self.to(memory.memory.device)
        self.size_(*memory.memory.shape)
        corrected = _Corrected(self, memory)
        # set on the object, under nn.Module's own bookkeeping: the class's methods stay for remove_
        memory.__dict__["_get_updated_memory"] = corrected
        memory.__dict__["_update_memory"] = corrected.write
        return self

    def remove_(self, memory: Any) -> PRES:
        """Take the correction off again.

        Raises:
            BadInput: this PRES is not attached to it.
        """
        there = memory.__dict__.get("_get_updated_memory")
        if not isinstance(there, _Corrected) or there.pres is not self:
            refuse("memory", type(memory).__name__, "this PRES is not attached to it")
        del memory.__dict__["_get_updated_memory"], memory.__dict__["_update_memory"]
        self._scored = None
        return self

    def coherence_loss(self) -> Tensor:
        """``beta (1 - cos)`` of the attached memory's last scoring call, with its gradient; once."""
        if self._scored is None:
            return self.largest.new_zeros(())
        (after, before), self._scored = self._scored, None
        return self.beta * coherence(after, before)

    def grow_(self, num_nodes: int) -> None:
        """Room for more nodes."""
        if self.tracker is not None:
            self.tracker.grow_(num_nodes)

    def memory_bytes(self) -> dict[str, int]:
        """The tracker's bytes, the parameter's, and the clip's."""
        tracker = {} if self.tracker is None else self.tracker.memory_bytes()
        share = 0 if self.raw_gamma is None else self.raw_gamma.nbytes
        return {**tracker, "parameters": share, "buffers": self.largest.nbytes}


class CorrectedUpdater(nn.Module):
    """An updater and a PRES as one module; made by :meth:`PRES.wrap`."""

    def __init__(self, updater: nn.Module, pres: PRES) -> None:
        super().__init__()
        self.updater, self.pres = updater, pres

    def forward(
        self, messages: Tensor, before: Tensor, nodes: Tensor, t_before: Tensor, t_after: Tensor,
        component: Tensor | None = None, *, observe: bool | None = None,
    ) -> Tensor:  # fmt: skip
        """Corrected memory (n, D); tracks in training unless ``observe`` says otherwise."""
        after = self.updater(messages, before)
        track = self.training if observe is None else observe
        return self.pres.correct(nodes, before, after, t_before, t_after, observe=track, component=component)


class _Corrected:
    """In the place of ``_get_updated_memory``: it runs twice a step, for scoring and for writing."""

    def __init__(self, pres: PRES, memory: Any) -> None:
        self.pres, self.memory = pres, memory
        self.update, self.flush = memory._get_updated_memory, memory._update_memory
        self.writing = False

    def __call__(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        after, t_after = self.update(nodes)
        before, t_before = self.memory.memory[nodes].detach(), self.memory.last_update[nodes]
        track = self.writing and self.memory.training
        corrected = self.pres.correct(nodes, before, after, t_before, t_after, observe=track)
        if not self.writing and corrected.requires_grad:
            moved = t_after > t_before
            self.pres._scored = (corrected[moved], before[moved])
        return corrected, t_after

    def write(self, nodes: Tensor) -> None:
        """In the place of ``_update_memory``."""
        self.writing = True
        try:
            self.flush(nodes)
        finally:
            self.writing = False
