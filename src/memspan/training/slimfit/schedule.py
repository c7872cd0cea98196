"""Which few layers train in this step: those that moved most when they last trained."""

from __future__ import annotations

import fnmatch
import hashlib
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import Optimizer

from memspan.base import optional, refuse
from memspan.base.rng import rng, uniform
from memspan.nn.surgery import find_blocks

__all__ = ["HEADS", "FreezingScheduler", "weight_update_distance"]

#: Names of heads, which train in every step unless ``always`` says otherwise.
HEADS = ("classifier", "head", "score")
_FROZEN = "_memspan_frozen_by_schedule"


def weight_update_distance(old: Tensor, new: Tensor, eps: float = 1e-3) -> float:
    """Mean relative change of a weight: ``mean |new - old| / (|old| + eps · rms(old))`` (paper, equation 1).

    The paper divides by ``|old|`` alone, which is infinite where a weight is zero; the second term keeps
    every value finite and changes little elsewhere. Computed in float32, in double where the weights are.

    Args:
        old: weights before the step.
        new: weights after it, same shape.
        eps: share of the root mean square of ``old`` (of ``new`` where ``old`` is all zero).

    Returns:
        0 or more; NaN where a weight is NaN.

    Example:
        >>> round(weight_update_distance(torch.tensor([1.0, 2.0]), torch.tensor([1.1, 2.2]), eps=0.0), 4)
        0.1
        >>> weight_update_distance(torch.zeros(2), torch.zeros(2))
        0.0
    """
    if old.shape != new.shape:
        refuse("new", tuple(new.shape), f"give the shape of old, {tuple(old.shape)}")
    dtype = torch.promote_types(old.dtype, torch.float32)
    a, b = old.detach().to(dtype), new.detach().to(dtype)
    size = _number(a.square().mean().sqrt()) or _number(b.square().mean().sqrt())
    if size == 0.0:
        return 0.0
    base = a.abs().add_(eps * size)
    change = (b - a).abs_().div_(base) if eps else (b - a).abs_().div_(base).nan_to_num_(nan=0.0)
    return _number(change.mean(dtype=torch.float64))


def _number(value: Tensor) -> float:
    """The value; 1 where a trace holds shapes alone, so that first visits go on in their order."""
    held: Any = getattr(value, "_local_tensor", value)  # of a rank's part, where weights are sharded
    return 1.0 if isinstance(held, FakeTensor) else float(value)


class FreezingScheduler:
    """Freeze a share of a model's layers in each step, others every time (inter-layer scheduling).

    A unit is a tensor that costs an activation when it trains: every parameter of two or more dimensions and
    the weight of every norm. Biases cost nothing and always train. Of n units the ``int(freeze_rate · n)``
    whose last measured distance is smallest are frozen; distances start at distinct huge numbers, so that
    every unit is visited before a measured one counts. The rotation comes from a learning rate that decays
    to 0: give ``explore`` or ``max_age`` where it is constant.

    Build the optimizer over *all* parameters, before or after; frozen ones have no gradient and are skipped
    by it.

    Args:
        model: whose parameters now train; frozen ones are never touched.
        freeze_rate: F, in [0, 1).
        always: patterns of modules or parameters that train in every step. None: those of :data:`HEADS` that
            are there.
        never: patterns that never train.
        metric: ``"update_distance"`` (paper), ``"gradient_norm"``, or ``"random"`` (each step anew).
        explore: chance that the weakest active unit gives way to the one frozen longest.
        max_age: steps after which a frozen unit is made active.
        optimizer: to check that it holds every unit, and for ``optimizer_state``. With it the active units
            are copied right before the optimizer moves them, else before the forward pass.
        optimizer_state: moments of frozen units: ``"keep"`` (official), ``"drop"`` (freed; their step count
            starts again), ``"cpu"`` (moved to the host).
        granularity: ``"tensor"``, or ``"block"``: the repeated blocks as wholes, as FSDP2 wants them.
        visits: units in the order of their first visits; those left out come after. None: drawn by ``seed``.
        seed: of the first visits and all draws.

    Attributes:
        units: names of the units.
        distances: the latest distance of each.
        active: names of the units that train in the present step.

    Raises:
        BadInput: a rate outside [0, 1), no units, a pattern that matches nothing, a visit to no unit, an
            optimizer without a unit's parameter, a model of which an earlier scheduler has frozen a part.

    Example:
        >>> model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))
        >>> sched = FreezingScheduler(model, 0.75)
        >>> seen = []
        >>> for _ in range(4):
        ...     seen += sched.before_forward()
        ...     model(torch.ones(1, 2)).sum().backward()
        ...     sched.after_step()
        >>> sorted(seen)
        ['0.weight', '1.weight', '2.weight', '3.weight']
    """

    def __init__(
        self,
        model: nn.Module,
        freeze_rate: float,
        *,
        always: Sequence[str] | None = None,
        never: Sequence[str] = (),
        metric: Literal["update_distance", "random", "gradient_norm"] = "update_distance",
        explore: float = 0.0,
        max_age: int | None = None,
        optimizer: Optimizer | None = None,
        optimizer_state: Literal["keep", "drop", "cpu"] = "keep",
        granularity: Literal["tensor", "block"] = "tensor",
        visits: Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        _check(metric, explore, max_age, optimizer, optimizer_state, granularity)
        named = dict(model.named_parameters())
        # Names that a scheduler has frozen at present; plain data, so that the model copies and pickles.
        mark: list[str] = vars(model).setdefault(_FROZEN, [])
        if left := [name for name in mark if name in named and not named[name].requires_grad]:
            refuse(
                "model",
                f"{len(left)} of its tensors are frozen by an earlier FreezingScheduler, such as {left[0]}",
                "call that one's release() first, or model.requires_grad_(True) where it is gone",
            )
        self._mark, self._names = mark, {id(parameter): name for name, parameter in named.items()}
        on = set() if always is None else _matching(named, "always", always)
        if always is None:
            on = {name for name in named if any(_matches(name, head) for head in HEADS)}
        off = _matching(named, "never", never)
        groups = _units(model, granularity)
        self._units = {
            unit: tuple(named[name] for name in names)
            for unit, members in groups.items()
            if (names := [n for n in members if named[n].requires_grad and n not in on | off])
        }
        n = len(self._units)
        if not n:
            refuse(
                "model",
                type(model).__name__,
                "nothing is left to schedule: no trained weight of 2 dimensions",
            )
        share = isinstance(freeze_rate, int | float) and not isinstance(freeze_rate, bool)
        if not (share and 0 <= freeze_rate < 1 and int(freeze_rate * n) < n):
            refuse(
                "freeze_rate",
                freeze_rate,
                f"give a share of at least 0 and below 1; of {n} units one at least trains: at most "
                f"{(n - 1) / n:.4g}",
            )
        self._k = n - int(freeze_rate * n)
        self.freeze_rate, self.metric, self.seed = float(freeze_rate), metric, seed
        self._explore, self._max_age = explore, max_age
        self._optimizer, self._state = optimizer, optimizer_state
        _check_optimizer(optimizer, self._units)
        if optimizer is not None and metric == "update_distance":
            optimizer.register_step_pre_hook(lambda *_: self._copy_active())
        for name in off:
            named[name].requires_grad_(False)
            named[name].grad = None
        drawn = rng("slimfit", seed).permutation(n)
        order = sorted(zip(drawn, self._units, strict=True), reverse=True)
        first = _first([unit for _, unit in order], visits)
        self.distances: dict[str, float] = {unit: 1e10 * (n - first.index(unit)) / n for unit in self._units}
        self._age = dict.fromkeys(self._units, 0)
        self._chosen: list[str] = []
        self._open = False
        self._snapshot: dict[str, list[Tensor]] = {}
        self._rows: list[list[int]] = []
        if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
            warnings.warn(
                f"the model is compiled: each new set of {self._k} of {n} units compiles it again",
                stacklevel=2,
            )

    @property
    def units(self) -> list[str]:
        """Names of the units, in the order of the model."""
        return list(self._units)

    @property
    def active(self) -> list[str]:
        """Names of the units that train in the present step; empty before the first."""
        return list(self._chosen)

    @property
    def history(self) -> Tensor:
        """Which units trained when: bool, (steps, units)."""
        table = torch.zeros(len(self._rows), len(self._units), dtype=torch.bool)
        for step, row in enumerate(self._rows):
            table[step, row] = True
        return table

    def before_forward(self) -> list[str]:
        """Choose the active units and freeze the others: gradients off and None.

        Called again before :meth:`after_step` (micro-batches of one step), it changes nothing.

        Returns:
            Names of the active units.
        """
        if self._open:
            return self.active
        before = set(self._chosen) if self._rows else set(self._units)
        self._chosen = self._choose()
        chosen = set(self._chosen)
        for unit, parameters in self._units.items():
            for parameter in parameters:
                parameter.requires_grad_(unit in chosen)
                if unit not in chosen:
                    parameter.grad = None
            if self._optimizer is not None and self._state != "keep":
                self._move_state(parameters, unit in chosen, unit in before)
        resting = (ps for unit, ps in self._units.items() if unit not in chosen)
        self._mark[:] = [self._names[id(parameter)] for parameters in resting for parameter in parameters]
        self._open = True
        if self._optimizer is None and self.metric == "update_distance":
            self._copy_active()
        return self.active

    def after_step(self) -> None:
        """Measure how far the active units moved; call it after ``optimizer.step()``.

        With ``metric="gradient_norm"`` call it before the gradients are set to None.

        Raises:
            BadInput: no :meth:`before_forward` came before, or a unit's weights are NaN (it is named).
        """
        if not self._open:
            refuse("after_step", "called first", "call before_forward() before each forward pass")
        measured = {unit: self._measure(unit) for unit in self._chosen}
        for unit, distance in measured.items():
            if distance != distance:
                refuse("model", unit, "its weights became NaN in this step; lower the learning rate")
        self.distances.update(measured)
        places = {unit: place for place, unit in enumerate(self._units)}
        self._rows.append(sorted(places[unit] for unit in self._chosen))
        for unit in self._age:
            self._age[unit] = 0 if unit in measured else self._age[unit] + 1
        self._snapshot, self._open = {}, False
        if dist.is_available() and dist.is_initialized() and len(self._rows) % 100 == 0:
            self._compare_ranks()

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on with the same choices: plain lists and numbers, no tensors.

        Raises:
            BadInput: a step is open; save after :meth:`after_step`.
        """
        if self._open:
            refuse("state_dict", "inside a step", "save after after_step()")
        return {
            "units": self.units,
            "distances": [self.distances[unit] for unit in self._units],
            "age": [self._age[unit] for unit in self._units],
            "history": [list(row) for row in self._rows],
            "active": list(self._chosen),
            "seed": self.seed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises:
            BadInput: the state belongs to other units.
        """
        if list(state["units"]) != self.units:
            refuse(
                "state",
                f"{len(state['units'])} units",
                f"it was saved for others; here are {len(self._units)}",
            )
        self.distances = dict(zip(self._units, map(float, state["distances"]), strict=True))
        self._age = dict(zip(self._units, map(int, state["age"]), strict=True))
        self._rows = [list(row) for row in state["history"]]
        self._chosen, self.seed = list(state["active"]), int(state["seed"])
        self._open, self._snapshot = False, {}

    def average_gradients(self, model: nn.Module, group: Any = None) -> None:
        """Average gradients over ranks as each is made; call it once, in place of wrapping the model in DDP.

        DDP plans its buckets for the parameters that train when it is made, which a schedule changes. Here
        every parameter has a hook of its own, and one without a gradient costs no traffic.

        Args:
            model: the model given to the scheduler.
            group: process group; None is the default one.

        Raises:
            BadInput: ``torch.distributed`` is not initialised.
        """
        if not (dist.is_available() and dist.is_initialized()):
            refuse("group", group, "call torch.distributed.init_process_group first")
        ranks = dist.get_world_size(group)

        def average(parameter: Tensor) -> None:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad, group=group)
                parameter.grad /= ranks

        for parameter in model.parameters():
            was = parameter.requires_grad
            parameter.requires_grad_(True)
            parameter.register_post_accumulate_grad_hook(average)  # type: ignore[no-untyped-call]
            parameter.requires_grad_(was)

    def release(self) -> None:
        """Let every unit train again, as before the scheduler was made."""
        for parameters in self._units.values():
            for parameter in parameters:
                parameter.requires_grad_(True)
        self._mark.clear()
        self._open, self._snapshot = False, {}

    def memory_bytes(self) -> dict[str, int]:
        """Bytes held until :meth:`after_step`: a copy of the active units, from when it is made."""
        return {"snapshot": sum(t.nbytes for copies in self._snapshot.values() for t in copies)}

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw which units trained when; needs the extra ``memspan[recipes]``.

        Args:
            path: where to write the picture; None writes nothing.

        Returns:
            The matplotlib figure.
        """
        figures = optional("matplotlib.figure", extra="recipes")
        figure = figures.Figure(figsize=(8, 1.5 + 0.14 * len(self._units)), layout="constrained")
        axes = figure.subplots()
        axes.imshow(self.history.T.numpy(), aspect="auto", interpolation="none", cmap="Greys")
        axes.set_yticks(range(len(self._units)), self.units, fontsize=6)
        axes.set(xlabel="step", title="black: trained")
        if path is not None:
            figure.savefig(path)
        return figure

    def _copy_active(self) -> None:
        if self._open and not self._snapshot:
            self._snapshot = {
                unit: [parameter.detach().clone() for parameter in self._units[unit]] for unit in self._chosen
            }

    def _choose(self) -> list[str]:
        step, places = len(self._rows), {unit: place for place, unit in enumerate(self._units)}
        score = self.distances
        if self.metric == "random":
            order = rng("slimfit", self.seed, "step", step).permutation(len(self._units))
            score = {unit: float(rank) for unit, rank in zip(self._units, order, strict=True)}
        ranked = sorted(self._units, key=lambda unit: (score[unit], places[unit]))
        frozen, chosen = ranked[: -self._k], ranked[-self._k :]
        overdue = [u for u in frozen if self._max_age is not None and self._age[u] > self._max_age]
        if not overdue and frozen and uniform("slimfit", self.seed, "explore", step) < self._explore:
            overdue = frozen
        if overdue:
            oldest = sorted(overdue, key=lambda unit: (-self._age[unit], places[unit]))
            count = 1 if overdue is frozen else min(len(oldest), self._k)
            chosen = chosen[count:] + oldest[:count]
        return sorted(chosen, key=places.__getitem__)

    def _measure(self, unit: str) -> float:
        parameters = self._units[unit]
        if self.metric == "gradient_norm":
            found = [p.grad.float().norm() for p in parameters if p.grad is not None]
            return float(torch.stack(found).norm()) if found else self.distances[unit]
        if self.metric == "random":
            return float("nan") if any(p.isnan().any() for p in parameters) else self.distances[unit]
        if unit not in self._snapshot:  # the optimizer was not asked to step
            return self.distances[unit]
        pairs = list(zip(self._snapshot[unit], parameters, strict=True))
        total = sum(old.numel() for old, _ in pairs)
        return sum(weight_update_distance(old, new) * old.numel() / total for old, new in pairs)

    def _move_state(self, parameters: Iterable[Tensor], active: bool, was_active: bool) -> None:
        assert self._optimizer is not None
        if active == was_active:
            return
        for parameter in parameters:
            state = self._optimizer.state.get(parameter)
            if not state:
                continue
            if self._state == "drop":
                if not active:
                    del self._optimizer.state[parameter]
                continue
            home = parameter.device if active else torch.device("cpu")
            for key, value in state.items():
                if isinstance(value, Tensor) and value.dim():
                    state[key] = value.to(home)

    def _compare_ranks(self) -> None:
        """All ranks choose alike, since they see the same weights; one that does not is found here."""
        told = repr([(unit, f"{self.distances[unit]:.6e}") for unit in self._units])
        mine = int.from_bytes(hashlib.sha256(told.encode()).digest()[:7], "little")
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, mine)
        if len(set(found)) > 1:
            refuse(
                "distances",
                found,
                f"ranks disagree at step {len(self._rows)}: their weights are not the same",
            )


def _check(
    metric: str,
    explore: float,
    max_age: int | None,
    optimizer: Optimizer | None,
    optimizer_state: str,
    granularity: str,
) -> None:
    if metric not in ("update_distance", "random", "gradient_norm"):
        refuse("metric", metric, "use 'update_distance', 'random' or 'gradient_norm'")
    if not 0 <= explore <= 1:
        refuse("explore", explore, "give a chance from 0 to 1")
    if max_age is not None and max_age < 1:
        refuse("max_age", max_age, "give 1 step or more, or None")
    if optimizer_state not in ("keep", "drop", "cpu"):
        refuse("optimizer_state", optimizer_state, "use 'keep', 'drop' or 'cpu'")
    if optimizer_state != "keep" and optimizer is None:
        refuse("optimizer", optimizer, f"optimizer_state={optimizer_state!r} needs the optimizer")
    if granularity not in ("tensor", "block"):
        refuse("granularity", granularity, "use 'tensor' or 'block'")


def _units(model: nn.Module, granularity: str) -> dict[str, list[str]]:
    """Names of the parameters of each unit."""
    norms = {
        f"{name}.weight" if name else "weight"
        for name, part in model.named_modules()
        if "Norm" in type(part).__name__
    }
    tensors = [name for name, p in model.named_parameters() if p.dim() > 1 or name in norms]
    if granularity == "tensor":
        return {name: [name] for name in tensors}
    groups: dict[str, list[str]] = {}
    blocks = find_blocks(model)
    for name in tensors:
        block = next((b for b in blocks if name.startswith(f"{b}.")), name)
        groups.setdefault(block, []).append(name)
    return groups


def _first(drawn: list[str], visits: Sequence[str] | None) -> list[str]:
    """The units in the order of their first visits."""
    given = list(dict.fromkeys(visits or ()))
    if unknown := [unit for unit in given if unit not in drawn]:
        refuse(
            "visits", unknown[0], f"no unit has this name; the units are {', '.join(sorted(drawn)[:5])}, ..."
        )
    return given + [unit for unit in drawn if unit not in given]


def _matches(name: str, pattern: str) -> bool:
    """Whether a pattern names the parameter or a module that holds it."""
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[:depth]), pattern) for depth in range(1, len(parts) + 1))


def _matching(named: dict[str, nn.Parameter], argument: str, patterns: Sequence[str]) -> set[str]:
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        hits = {name for name in named if _matches(name, pattern)}
        if not hits:
            tops = ", ".join(sorted({name.split(".")[0] for name in named}))
            refuse(argument, pattern, f"no parameter or module has such a name; the model holds {tops}")
        found |= hits
    return found


def _check_optimizer(optimizer: Optimizer | None, units: dict[str, tuple[nn.Parameter, ...]]) -> None:
    if optimizer is None:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for unit, parameters in units.items():
        if any(id(p) not in held for p in parameters):
            refuse("optimizer", unit, "it does not hold this unit; build it over all parameters of the model")
