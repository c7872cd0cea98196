"""Spiking neurons: the leaky integrate-and-fire step, its surrogate derivatives, and the state they carry.

A neuron leaks, adds its input, fires at a threshold and is reset. The step is written once
(:func:`lif_step`, one autograd function that keeps one tensor), and everything that carries a potential from
step to step, of ours or of SpikingJelly and snnTorch, is reset, read and put back through the same four
functions. Sources: Neftci, Mostafa, Zenke 2019 (surrogate gradients); Meng et al., ICCV 2023, equations 1-3.
"""

from memspan.nn.spiking import surrogate
from memspan.nn.spiking.neuron import LIF, Unrolled, lif_step
from memspan.nn.spiking.state import HoldsState, Stateful, detach_, holders, reset_, set_states_, states

__all__ = [
    "LIF",
    "HoldsState",
    "Stateful",
    "Unrolled",
    "detach_",
    "holders",
    "lif_step",
    "reset_",
    "set_states_",
    "states",
    "surrogate",
]
