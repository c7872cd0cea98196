"""The usual ways to train in fewer bytes: what every method of this room is compared with.

Gradient checkpointing (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost"), autocast to 16
bits, and four that train little: BitFit (Ben Zaken et al. 2022), LoRA (Hu et al. 2022), bottleneck adapters
(Houlsby et al. 2019) and the linear probe. Each changes the user's model in place, keeps the names in its
state_dict (LoRA adds two tensors per layer), is undone by its partner, and is refused a second time.

The first two change nothing in what is learned; the last four train fewer parameters, which is a different
model in the end: compare quality, not bytes alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from memspan.base import nearest, refuse
from memspan.base.rng import rng
from memspan.nn.spiking import holders
from memspan.nn.surgery import find_blocks
from memspan.training.peqa.layers import Quantized, QuantLinear

__all__ = [
    "BottleneckAdapter",
    "adapter_",
    "autocast_",
    "bitfit_",
    "checkpoint_",
    "linear_probe_",
    "lisa_",
    "lora_",
    "unadapter_",
    "unautocast_",
    "uncheckpoint_",
    "unfreeze_",
    "unlora_",
]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LINEAR = (nn.Linear, QuantLinear)
_FROZEN_BY = "_memspan_frozen_by"
_TRAINED_BEFORE = "_memspan_trained_before"


def checkpoint_(model: nn.Module, blocks: Sequence[str] | None = None) -> nn.Module:
    """Keep only each block's input for the backward pass, and compute the inside again there.

    Costs about one more forward pass of the blocks. Gradients are the same numbers; random draws inside a
    block (dropout) are repeated from the saved generator state.

    Args:
        model: changed in place; only its training mode is affected.
        blocks: dotted names of the modules to recompute; None takes the repeated blocks of the model.

    Returns:
        The model.

    Raises:
        BadInput: no repeated blocks, an unknown name, checkpointed already, or neurons that hold a state
            over time inside a block.

    Example:
        >>> model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)))
        >>> x = torch.ones(2, 4)
        >>> before = model(x)
        >>> checkpoint_(model)[0]
        CheckpointedSequential(
          (0): Linear(in_features=4, out_features=4, bias=True)
          (1): Tanh()
        )
        >>> bool((model(x) == before).all())
        True
        >>> uncheckpoint_(model)[0]
        Sequential(
          (0): Linear(in_features=4, out_features=4, bias=True)
          (1): Tanh()
        )
    """
    if _having(model, "Checkpointed"):
        refuse("model", type(model).__name__, "it is checkpointed already; call uncheckpoint_ first")
    chosen = _named(model, blocks) if blocks is not None else _blocks(model)
    for block in chosen:
        for name in holders(block):
            told = f"{type(block).__name__}.{name}" if name else type(block).__name__
            remedy = "recomputing it would start from the state it left: use training.sltt.CheckpointedStep"
            refuse("model", told, f"it holds a state over time; {remedy}")
    for block in chosen:
        _become(block, "Checkpointed", _checkpointed)
    return model


def uncheckpoint_(model: nn.Module) -> nn.Module:
    """Undo :func:`checkpoint_`.

    Raises:
        BadInput: the model is not checkpointed.
    """
    return _unbecome(model, "Checkpointed", "checkpoint_")


def autocast_(model: nn.Module, dtype: torch.dtype | str = "bfloat16") -> nn.Module:
    """Run the model's forward pass under autocast; its floating outputs come back as float32.

    Weights, gradients and optimizer state stay float32; autocast keeps a 16-bit copy of each weight until the
    forward pass ends, and the backward pass keeps it longer. Where activations are few, this costs bytes.

    Args:
        model: changed in place.
        dtype: ``"bfloat16"``, or ``"float16"`` (which needs a gradient scaler of your own).

    Returns:
        The model.

    Raises:
        BadInput: another dtype, or under autocast already.

    Example:
        >>> model = autocast_(nn.Linear(4, 4))
        >>> y = model(torch.ones(1, 4))
        >>> y.dtype, bool((y == y.bfloat16()).all())
        (torch.float32, True)
        >>> autocast_(model)
        Traceback (most recent call last):
        memspan.base.refusal.BadInput: model='AutocastLinear': it runs under autocast already; call
        unautocast_ first
        >>> type(unautocast_(model)).__name__
        'Linear'
    """
    chosen = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(str(dtype).removeprefix("torch."))
    if chosen is None:
        refuse("dtype", dtype, "use 'bfloat16' or 'float16'")
    if _having(model, "Autocast"):
        refuse("model", type(model).__name__, "it runs under autocast already; call unautocast_ first")
    _become(model, "Autocast", functools.partial(_autocast, dtype=chosen))
    return model


def unautocast_(model: nn.Module) -> nn.Module:
    """Undo :func:`autocast_`.

    Raises:
        BadInput: the model does not run under autocast.
    """
    return _unbecome(model, "Autocast", "autocast_")


def bitfit_(model: nn.Module, head: str | None = None) -> nn.Module:
    """Train the biases and the head, freeze the rest (Ben Zaken et al. 2022, "BitFit").

    Args:
        model: changed in place (``requires_grad`` alone).
        head: dotted name of the head; None takes the last Linear layer, else the last convolution; ``""``
            trains no head.

    Returns:
        The model.

    Raises:
        BadInput: there are no biases, an unknown head, or the model is frozen by such a method already.

    Example:
        >>> model = bitfit_(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)))
        >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        ['0.bias', '2.weight', '2.bias']
        >>> all(parameter.requires_grad for parameter in unfreeze_(model).parameters())
        True
    """
    names = {name for name, _ in model.named_parameters() if name.rpartition(".")[2].endswith("bias")}
    if not names:
        refuse("model", type(model).__name__, "it has no biases to train; use lora_ or linear_probe_")
    if head != "":
        names |= _head(model, head)
    return _train_only(model, names, "bitfit_")


def linear_probe_(model: nn.Module, head: str | None = None) -> nn.Module:
    """Train the head alone, freeze the rest.

    Args:
        model: changed in place (``requires_grad`` alone).
        head: dotted name of the head; None takes the last Linear layer, else the last convolution.

    Returns:
        The model.

    Raises:
        BadInput: no layer to take, an unknown head, or the model is frozen by one of these methods already.

    Example:
        >>> model = linear_probe_(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)))
        >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        ['2.weight', '2.bias']
    """
    return _train_only(model, _head(model, head), "linear_probe_")


def lisa_(model: nn.Module, step: int, *, layers: int = 2, interval: int = 20, seed: int = 0) -> list[str]:
    """Freeze all repeated blocks but a few drawn at random, others every interval (Pan et al. 2024, "LISA").

    Call it before each forward pass. Everything outside the blocks (embeddings, head) trains in every step.
    Build the optimizer over all parameters first: frozen ones have no gradient and are skipped by it.

    Args:
        model: changed in place (``requires_grad`` and gradients of its blocks).
        step: number of the step, from 0.
        layers: blocks that train at once.
        interval: steps that a draw lasts.
        seed: of the draws; they depend on seed and interval alone.

    Returns:
        Names of the blocks that train.

    Raises:
        BadInput: fewer blocks than ``layers``, or a number below 1.

    Example:
        >>> model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(6)))
        >>> len(lisa_(model, step=0)), lisa_(model, step=0) == lisa_(model, step=19)
        (2, True)
    """
    blocks = find_blocks(model)
    inner = {name for name in blocks for other in blocks if name.startswith(f"{other}.")}
    blocks = {name: block for name, block in blocks.items() if name not in inner}
    if interval < 1 or step < 0:
        refuse("interval, step", (interval, step), "give an interval of 1 or more and a step of 0 or more")
    if not 1 <= layers <= len(blocks):
        refuse("layers", layers, f"the model has {len(blocks)} repeated blocks; give 1 to that many")
    drawn = rng("lisa", seed, step // interval).choice(len(blocks), size=layers, replace=False)
    chosen = [name for place, name in enumerate(blocks) if place in set(drawn.tolist())]
    for name, block in blocks.items():
        block.requires_grad_(name in chosen)
        if name not in chosen:
            for parameter in block.parameters():
                parameter.grad = None
    return chosen


def unfreeze_(model: nn.Module) -> nn.Module:
    """Undo :func:`bitfit_` or :func:`linear_probe_`: what was trained before is trained again.

    Raises:
        BadInput: neither was applied.
    """
    if _FROZEN_BY not in model.__dict__:
        refuse("model", type(model).__name__, "it was not frozen by bitfit_ or linear_probe_")
    before = set(model.__dict__.pop(_TRAINED_BEFORE))
    del model.__dict__[_FROZEN_BY]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in before)
    return model


def lora_(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 16.0,
    layers: Sequence[str] | None = None,
    *,
    head: str | None = None,
    seed: int = 0,
) -> nn.Module:
    """Add a trained product of two thin matrices to Linear layers, freeze the rest but the head.

    ``y = x Wᵀ + b + (alpha / rank) · (x Aᵀ) Bᵀ`` with A (rank, in) drawn, B (out, rank) zero: the outputs do
    not change at first (Hu et al. 2022, "LoRA", section 4.1).

    Args:
        model: changed in place; each chosen layer gains ``lora_a`` and ``lora_b``.
        rank: inner width, 1 or more.
        alpha: scale, divided by the rank.
        layers: dotted names of Linear layers (or quantized ones); None takes all but the head.
        head: dotted name of the layer that is trained whole; None takes the last Linear, else the
            last convolution; ``""`` trains none.
        seed: of the draw of A.

    Returns:
        The model.

    Raises:
        BadInput: rank below 1, no layers, a name that is no Linear layer, or LoRA is there already.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> x = torch.ones(1, 8)
        >>> before = model(x)
        >>> bool((lora_(model, rank=2)(x) == before).all())
        True
        >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        ['0.lora_a', '0.lora_b', '2.weight', '2.bias']
        >>> sorted(unlora_(model).state_dict())
        ['0.bias', '0.weight', '2.bias', '2.weight']
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        refuse("rank", rank, "give a whole number, 1 or more")
    if _having(model, "LoRA"):
        refuse("model", type(model).__name__, "it has LoRA already; call unlora_ first")
    whole = set() if head == "" else _head(model, head)
    heads = {name.rpartition(".")[0] for name in whole}
    if layers is None:
        layers = [name for name, part in model.named_modules() if type(part) in _LINEAR and name not in heads]
    chosen = _named(model, layers)
    wrong = [name for name, part in zip(layers, chosen, strict=True) if type(part) not in _LINEAR]
    if wrong or not chosen:
        refuse("layers", wrong or layers, "name nn.Linear layers that are not the head")
    _train_only(model, whole, "lora_")
    generator = torch.Generator().manual_seed(seed)
    for layer in chosen:
        assert isinstance(layer, nn.Linear | Quantized)
        weight, bound = next(layer.parameters()), 1 / math.sqrt(layer.in_features)
        a = torch.empty(rank, layer.in_features, dtype=weight.dtype).uniform_(
            -bound, bound, generator=generator
        )
        layer.register_parameter("lora_a", nn.Parameter(a.to(weight.device)))
        layer.register_parameter("lora_b", nn.Parameter(weight.new_zeros(layer.out_features, rank)))
        _become(layer, "LoRA", functools.partial(_lora, scale=alpha / rank), {"_lora_scale": alpha / rank})
    return model


def unlora_(model: nn.Module, *, merge: bool = False) -> nn.Module:
    """Undo :func:`lora_`.

    Args:
        model: a model with LoRA.
        merge: add what was learned to the weights; False takes the layers back to what they were.

    Raises:
        BadInput: the model has no LoRA, or is to be merged into integers, which cannot take it in.
    """
    layers = _having(model, "LoRA")
    if not layers:
        refuse("model", type(model).__name__, "lora_ was not applied to it")
    if merge and any(isinstance(layer, Quantized) for layer in layers):
        refuse(
            "merge", merge, "integers cannot take the product in: unqlora_(model, merge=True) gives floats"
        )
    for layer in layers:
        a, b = layer.lora_a, layer.lora_b
        assert isinstance(a, Tensor)
        assert isinstance(b, Tensor)
        assert isinstance(layer.weight, Tensor)
        if merge:
            with torch.no_grad():
                layer.weight += getattr(type(layer), "_lora_scale") * (b @ a)  # noqa: B009
        del layer.lora_a, layer.lora_b
    _unbecome(model, "LoRA", "lora_")
    return unfreeze_(model)


class BottleneckAdapter(nn.Module):
    """``x + Up(ReLU(Down(x)))`` through a thin layer; Up starts at 0, so that it starts as the identity.

    Source: Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", section 2.1.

    Args:
        width: of x (..., width).
        bottleneck: of the thin layer.

    Raises:
        BadInput: a width below 1.

    Example:
        >>> x = torch.randn(2, 8)
        >>> bool((BottleneckAdapter(8, 2)(x) == x).all())
        True
    """

    def __init__(self, width: int, bottleneck: int = 64) -> None:
        super().__init__()
        for name, value in (("width", width), ("bottleneck", bottleneck)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                refuse(name, value, "give a whole number, 1 or more")
        self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Adapt x (..., width)."""
        y: Tensor = x + self.up(F.relu(self.down(x)))
        return y


def adapter_(
    model: nn.Module, bottleneck: int = 64, blocks: Sequence[str] | None = None, *, head: str | None = None
) -> nn.Module:
    """Put a :class:`BottleneckAdapter` behind each block, freeze the rest but the head.

    Source: Pfeiffer et al. 2021, "AdapterFusion". Gradients still pass through the whole network: bytes of
    optimizer state fall, those of activations hardly.

    Args:
        model: changed in place; each chosen block gains ``adapter``.
        bottleneck: width of the thin layer.
        blocks: dotted names of blocks of tokens, whose output is (..., width) or a tuple that begins so; None
            takes the repeated blocks of the model.
        head: see :func:`lora_`.

    Returns:
        The model.

    Raises:
        BadInput: no blocks, blocks of convolutions or without a layer that tells their width, or adapters are
            there already.

    Example:
        >>> block = lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        >>> model = nn.Sequential(nn.Sequential(block(), block()), nn.Linear(4, 2))
        >>> x = torch.ones(2, 4)
        >>> before = model(x)
        >>> bool((adapter_(model, 2)(x) == before).all())
        True
        >>> [name for name, p in model.named_parameters() if p.requires_grad][:2]
        ['0.0.adapter.down.weight', '0.0.adapter.down.bias']
        >>> sorted(unadapter_(model).state_dict())[:2]
        ['0.0.0.bias', '0.0.0.weight']
    """
    if _having(model, "Adapted"):
        refuse("model", type(model).__name__, "it has adapters already; call unadapter_ first")
    chosen = _named(model, blocks) if blocks is not None else _blocks(model)
    adapters = [BottleneckAdapter(block_width(block), bottleneck) for block in chosen]
    _train_only(model, set() if head == "" else _head(model, head), "adapter_")
    for block, adapter in zip(chosen, adapters, strict=True):
        block.add_module("adapter", placed(adapter, next(block.parameters())))
        _become(block, "Adapted", _adapted, apart(block, "adapter"))
    return model


def unadapter_(model: nn.Module) -> nn.Module:
    """Undo :func:`adapter_`; what was learned is dropped.

    Raises:
        BadInput: the model has no adapters.
    """
    blocks = _having(model, "Adapted")
    _unbecome(model, "Adapted", "adapter_")
    for block in blocks:
        del block.adapter
    return unfreeze_(model)


def placed(module: nn.Module, like: Tensor) -> nn.Module:
    """A new module on the device and, where that is floating, in the dtype of a parameter."""
    own = next(module.parameters())
    dtype = like.dtype if like.is_floating_point() else own.dtype
    return module if (own.device, own.dtype) == (like.device, dtype) else module.to(like.device, dtype)


def apart(module: nn.Module, child: str) -> dict[str, Any]:
    """Members that keep a new child out of what a ``Sequential`` runs one after the other."""
    if not isinstance(module, nn.Sequential):
        return {}

    def __iter__(self: nn.Module) -> Iterator[nn.Module]:
        return (part for name, part in self._modules.items() if name != child and part is not None)

    return {"__iter__": __iter__}


def block_width(block: nn.Module) -> int:
    """Features per token of a block's output, read from its last LayerNorm, else its last Linear layer.

    Raises:
        BadInput: it has neither, or holds convolutions, whose outputs are maps.
    """
    parts = list(block.modules())
    if any(isinstance(part, _CONVOLUTIONS) for part in parts):
        refuse("blocks", type(block).__name__, "blocks of convolutions give maps; name blocks of tokens")
    for part in reversed(parts):
        if isinstance(part, nn.LayerNorm):
            return int(part.normalized_shape[-1])
    for part in reversed(parts):
        if isinstance(part, nn.Linear):
            return part.out_features
    refuse("blocks", type(block).__name__, "it has no LayerNorm or Linear layer that tells its width")


def _checkpointed(self: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not (self.training and torch.is_grad_enabled()):
        return forward(self, *args, **kwargs)
    return checkpoint(functools.partial(forward, self), *args, use_reentrant=False, **kwargs)


def _autocast(
    self: nn.Module, forward: Callable[..., Any], *args: Any, dtype: torch.dtype, **kwargs: Any
) -> Any:
    kind = next((parameter.device.type for parameter in self.parameters()), "cpu")
    with torch.autocast(kind, dtype=dtype):
        output = forward(self, *args, **kwargs)
    return tree_map_only(Tensor, lambda t: t.float() if t.dtype == dtype else t, output)


def _lora(self: Any, forward: Callable[..., Any], x: Tensor, *, scale: float) -> Any:
    return forward(self, x) + scale * F.linear(F.linear(x, self.lora_a), self.lora_b)


def _adapted(self: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    output = forward(self, *args, **kwargs)
    if isinstance(output, tuple):
        return (self.adapter(output[0]), *output[1:])
    return self.adapter(output)


def _become(
    module: nn.Module, prefix: str, around: Callable[..., Any], members: dict[str, Any] | None = None
) -> None:
    """Give a module a subclass of its own class whose forward goes through ``around``.

    A subclass rather than a replaced ``forward`` attribute: copies of the module keep working, since nothing
    holds on to the original.
    """
    base = type(module)
    plain = base.forward

    @functools.wraps(plain)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return around(self, plain, *args, **kwargs)

    name = f"{prefix}{base.__name__}"
    module.__class__ = type(
        name, (base,), {"forward": forward, "_memspan_was": (prefix, base), **(members or {})}
    )


def _having(model: nn.Module, prefix: str) -> list[nn.Module]:
    return [part for part in model.modules() if any(prefix == was for was, _ in _layers_of(type(part)))]


def _layers_of(kind: type) -> list[tuple[str, type]]:
    return [vars(base)["_memspan_was"] for base in kind.__mro__ if "_memspan_was" in vars(base)]


def _unbecome(model: nn.Module, prefix: str, done_by: str) -> nn.Module:
    found = _having(model, prefix)
    if not found:
        refuse("model", type(model).__name__, f"{done_by} was not applied to it")
    for part in found:
        if _layers_of(type(part))[0][0] != prefix:
            refuse("model", type(part).__name__, "undo the methods in the reverse order of their application")
    for part in found:
        part.__class__ = _layers_of(type(part))[0][1]
    return model


def _named(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    known = dict(model.named_modules())
    for name in names:
        if name not in known or not name:
            refuse("blocks", name, nearest(name, (key for key in known if key)))
    return [known[name] for name in names]


def _blocks(model: nn.Module) -> list[nn.Module]:
    found = find_blocks(model)
    if not found:
        refuse(
            "model",
            type(model).__name__,
            "it has no repeated blocks; name the modules to recompute: blocks=[...]",
        )
    inner = {name for name in found for other in found if name.startswith(f"{other}.")}
    return [block for name, block in found.items() if name not in inner]


def _head(model: nn.Module, head: str | None) -> set[str]:
    if head is None:
        named = [(name, part) for name, part in model.named_modules() if name]
        layers = [name for name, part in named if isinstance(part, nn.Linear)] or [
            name for name, part in named if isinstance(part, _CONVOLUTIONS)
        ]
        if not layers:
            refuse("head", head, "it has no Linear or convolution to take as its head; name the module")
        head = layers[-1]
    part = _named(model, [head])[0]
    return {f"{head}.{name}" for name, _ in part.named_parameters()}


def _train_only(model: nn.Module, names: set[str], by: str) -> nn.Module:
    if _FROZEN_BY in model.__dict__:
        earlier = model.__dict__[_FROZEN_BY]
        refuse("model", type(model).__name__, f"{earlier} froze parts of it already; undo that first")
    before = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    model.__dict__[_FROZEN_BY], model.__dict__[_TRAINED_BEFORE] = by, before
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    return model
