"""What carries a value from one time step to the next, found and handled alike whoever wrote it.

Ours derive from :class:`Stateful`; SpikingJelly's and snnTorch's neurons are known; any other module takes
part by the two methods of :class:`HoldsState`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from memspan.base import nearest, refuse

__all__ = ["HoldsState", "Stateful", "detach_", "holders", "reset_", "set_states_", "states"]

State = Mapping[str, Tensor]


@runtime_checkable
class HoldsState(Protocol):
    """A module with a state, by what is asked of it."""

    def read_state(self) -> dict[str, Tensor]:
        """The state by name; empty before the first step of a sequence."""

    def write_state(self, state: State) -> None:
        """Take over a state that was read; an empty one starts a sequence."""


class Stateful(nn.Module):
    """A module whose state lives from step to step, and nowhere else.

    It follows ``.to()``, and is neither in ``state_dict`` nor in a copy: a sequence belongs to one module.
    """

    def __init__(self) -> None:
        super().__init__()
        self._state: dict[str, Tensor] = {}

    def read_state(self) -> dict[str, Tensor]:
        """See :class:`HoldsState`."""
        return dict(self._state)

    def write_state(self, state: State) -> None:
        """See :class:`HoldsState`."""
        self._state = dict(state)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._state = {name: fn(tensor) for name, tensor in self._state.items()}
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_state": {}}


def holders(module: nn.Module) -> dict[str, HoldsState]:
    """The parts of a module that carry a state, by name.

    Raises:
        BadInput: an snnTorch neuron whose state the caller carries (``init_hidden=False``).

    Example:
        >>> from memspan.nn.spiking import LIF
        >>> list(holders(nn.Sequential(nn.Linear(2, 3), LIF())))
        ['1']
    """
    found: dict[str, HoldsState] = {}
    for name, part in module.named_modules():
        if isinstance(part, HoldsState):
            found[name] = part
        elif _is(part, "spikingjelly.activation_based.base", "MemoryModule"):
            found[name] = _SpikingJelly(part)
        elif _is(part, "snntorch", "SpikingNeuron"):
            if not part.init_hidden:
                remedy = "it hands its state to the caller: make it with init_hidden=True"
                refuse("module", f"{name or 'itself'}: {type(part).__name__}", remedy)
            found[name] = _SnnTorch(part)
    return found


def reset_(module: nn.Module) -> nn.Module:
    """Begin a new sequence: every state inside is forgotten.

    Example:
        >>> from memspan.nn.spiking import LIF
        >>> neuron = LIF()
        >>> _ = neuron(torch.ones(1, 2))
        >>> list(states(neuron)[""]), states(reset_(neuron))[""]
        (['v'], {})
    """
    for holder in holders(module).values():
        holder.write_state({})
    return module


def detach_(module: nn.Module) -> nn.Module:
    """Cut every state inside from the graph that made it; the numbers stay."""
    for holder in holders(module).values():
        state = holder.read_state()
        if any(tensor.requires_grad for tensor in state.values()):
            holder.write_state({name: tensor.detach() for name, tensor in state.items()})
    return module


def states(module: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Every state inside by the name of its module: what goes on where :func:`set_states_` puts it back."""
    return {name: holder.read_state() for name, holder in holders(module).items()}


def set_states_(module: nn.Module, vs: Mapping[str, State]) -> nn.Module:
    """Put states back that :func:`states` read, of this module or one like it.

    Raises:
        BadInput: names of modules differ; nothing is changed then.

    Example:
        >>> from memspan.nn.spiking import LIF
        >>> neuron = LIF()
        >>> spikes = neuron(torch.full((1, 1), 0.75))
        >>> set_states_(neuron, {"0": {}})
        Traceback (most recent call last):
        memspan.base.refusal.BadInput: vs=['0']: give one state for each of ['']
    """
    found = holders(module)
    if set(found) != set(vs):
        refuse("vs", sorted(vs), f"give one state for each of {sorted(found)}")
    for name, holder in found.items():
        holder.write_state(vs[name])
    return module


class _SpikingJelly:
    """State of a ``MemoryModule`` (neurons, synapses, recurrent containers): tensors among its memories."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def read_state(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.module._memories.items() if isinstance(value, Tensor)}

    def write_state(self, state: State) -> None:
        if not state:
            self.module.reset()
        for name, tensor in state.items():
            if name not in self.module._memories:
                refuse("state", name, nearest(name, self.module._memories))
            self.module._memories[name] = tensor


class _SnnTorch:
    """State of a ``SpikingNeuron``: its buffers that are not saved, empty before the first step."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def read_state(self) -> dict[str, Tensor]:
        names = sorted(self.module._non_persistent_buffers_set)
        held = {name: self.module._buffers[name] for name in names}
        return {name: tensor for name, tensor in held.items() if tensor.numel()}

    def write_state(self, state: State) -> None:
        for name in self.module._non_persistent_buffers_set:
            empty = torch.zeros(0, device=self.module.threshold.device)
            self.module._buffers[name] = state.get(name, empty)


def _is(part: Any, library: str, kind: str) -> bool:
    """Whether a module is of a class of a library, which is not imported for the question."""
    known = sys.modules.get(library)
    return known is not None and isinstance(part, getattr(known, kind))
