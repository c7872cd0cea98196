"""Side tuning of a user's own classifier in place, so that planner and ``fit`` can weigh it against others.

The model keeps its class, inputs and outputs: only its head reads one more thing, what the side network makes
of the blocks' outputs. At first the side network adds 0, so the outputs are the model's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from memspan.base import refuse
from memspan.nn.surgery import FeatureTap, find_blocks
from memspan.training.baselines import (
    _become,
    _having,
    _head,
    _named,
    _train_only,
    _unbecome,
    apart,
    block_width,
    placed,
    unfreeze_,
)
from memspan.training.unipt.head import Save, UniPTHead
from memspan.training.unipt.ladder import LadderHead
from memspan.training.unipt.parts import mean_over
from memspan.training.unipt.wrap import is_causal

__all__ = ["predict_bytes", "predict_side_bytes", "side_tune_", "unside_"]


def side_tune_(
    model: nn.Module,
    side: Literal["unipt", "lst"] = "unipt",
    reduction: int | None = None,
    blocks: Sequence[str] | None = None,
    *,
    head: str | None = None,
    save: Save = "all",
    causal: bool | None = None,
) -> nn.Module:
    """Train a side network and the head of a model of tokens; no gradient enters its blocks.

    The head's input z becomes ``z + y`` (or ``z +`` the mean of y over the positions, where z has none), with
    y the side network's output from all blocks, and z itself detached. All but side network and head is
    frozen and kept in eval mode. An ``attention_mask`` given by name masks the positions. Beside a causal
    language model the side network is causal too; it generates with a ``DynamicCache``, which then holds the
    blocks' outputs as well.

    Args:
        model: changed in place; gains ``side``.
        side: :class:`UniPTHead` (``"unipt"``) or :class:`LadderHead` (``"lst"``).
        reduction: of the side network; None takes 2 for UniPT and 8 for the ladder, or 4, 2, 1 where that
            does not divide the width.
        blocks: dotted names of two blocks or more, shallow first; None takes the repeated blocks.
        head: dotted name of a Linear layer behind the blocks; None takes the last one of the model.
        save: see :class:`UniPTHead`; for ``"unipt"`` alone.
        causal: whether positions see earlier ones alone; None asks
            :func:`~memspan.training.unipt.is_causal`.

    Returns:
        The model.

    Raises:
        BadInput: no such blocks or head, blocks that give maps (use :class:`SpatialUniPT`), or side tuning,
            or another freezing method, is there already.

    Example:
        >>> block = lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        >>> model = nn.Sequential(nn.Sequential(block(), block()), nn.Linear(4, 2))
        >>> x = torch.ones(3, 5, 4)
        >>> before = model(x)
        >>> bool((side_tune_(model)(x) == before).all())
        True
        >>> sorted({name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad})
        ['1', 'side']
        >>> unside_(model)[1]
        Linear(in_features=4, out_features=2, bias=True)
    """
    if side not in ("unipt", "lst"):
        refuse("side", side, 'use "unipt" or "lst"')
    if _having(model, "SideTuned"):
        refuse("model", type(model).__name__, "it has a side network already; call unside_ first")
    names, widths, trained, layer = _places(model, blocks, head)
    top = next(iter(trained)).rpartition(".")[0]
    ordered = is_causal(model) if causal is None else causal
    network = _network(side, widths, layer.in_features, reduction, save, ordered)
    _train_only(model, trained, "side_tune_")
    model.add_module("side", placed(network, layer.weight))
    members = apart(model, "side") | {"_side_blocks": tuple(names), "_side_head": top}
    base = type(model)
    _become(model, "SideTuned", _side, {**members, "train": functools.partialmethod(_train, base)})
    return model.train(model.training)


def unside_(model: nn.Module) -> nn.Module:
    """Undo :func:`side_tune_`; what the side network learned is dropped, the head keeps what it learned.

    Raises:
        BadInput: the model has no side network.
    """
    _unbecome(model, "SideTuned", "side_tune_")
    del model.side
    return unfreeze_(model.train(model.training))


def predict_bytes(
    batch: int,
    tokens: int,
    hidden_sizes: Sequence[int],
    out_dim: int,
    reduction: int = 2,
    save: Save = "all",
    dtype_bytes: int = 4,
) -> dict[str, int]:
    """What a UniPT head of preset ``token`` holds in a step under Adam, beside the backbone's weights.

    Saved activations are the hidden states (the floor), projected features before and after their norm, and
    the two T² tables of each layer; or, recomputed, hidden states and merged features. Vectors without T are
    left out.

    Args:
        batch: B.
        tokens: T.
        hidden_sizes: D_i, the anchor last.
        out_dim: of the head.
        reduction: likewise.
        save: likewise.
        dtype_bytes: of hidden states and weights.

    Raises:
        BadInput: as :class:`UniPTHead`.

    Example:
        >>> modes = ("all", "recompute", "half")
        >>> held = [predict_bytes(32, 64, [384] * 7, 384, save=mode)["saved_activations"] for mode in modes]
        >>> [round(one / 2**20) for one in held]
        [53, 36, 26]
    """
    with torch.device("meta"):
        head = UniPTHead(hidden_sizes, out_dim, reduction, save=save)
    layers, width, places = len(head.hidden_sizes) - 1, head.width, batch * tokens
    trained = sum(parameter.numel() for parameter in head.parameters())
    states = places * sum(head.hidden_sizes)
    after = places * (width * 3 + 2)  # merged, projected, and what ReLU leaves; the norm's two statistics
    if save == "all":
        side = places * ((2 * layers + 2) * width + 2 * (layers + 1) + layers * (2 * tokens + 3)) + after
    else:
        side = places * (layers + 1) * width + after
    state_bytes = 2 if save == "half" else dtype_bytes
    return {
        "parameters.trained": dtype_bytes * trained,
        "gradients": dtype_bytes * trained,
        "optimizer_state": 2 * dtype_bytes * trained,
        "saved_activations": state_bytes * states + dtype_bytes * side,
    }


def predict_side_bytes(
    model: nn.Module,
    batch: int,
    length: int,
    reduction: int | None = None,
    blocks: Sequence[str] | None = None,
    *,
    head: str | None = None,
    save: Save = "all",
) -> dict[str, int]:
    """What a step of an encoder under :func:`side_tune_` holds with Adam, by ledger category.

    Beside a causal language model :func:`memspan.ledger.plan` tells it.

    Args:
        model: not changed; its weights may be meta.
        batch: B.
        length: T.
        reduction: as :func:`side_tune_`, like the next three.
        blocks: likewise.
        head: likewise.
        save: likewise.

    Raises:
        BadInput: as :func:`side_tune_`; a causal model.

    Example:
        >>> block = lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        >>> model = nn.Sequential(nn.Sequential(block(), block()), nn.Linear(4, 2))
        >>> predict_side_bytes(model, 2, 3)["parameters.trained"]       # 52 numbers beside, 10 of the head
        248
    """
    if is_causal(model):
        refuse(
            "model", type(model).__name__, "this form is for encoders: plan(..., method='unipt') traces it"
        )
    _, widths, trained, layer = _places(model, blocks, head)
    chosen = _reduction("unipt", widths, layer.in_features, reduction)
    side = predict_bytes(batch, length, widths, layer.in_features, chosen, save)
    with torch.device("meta"):
        tensors = len(list(UniPTHead(widths, layer.in_features, chosen, save=save).parameters()))
    known = dict(model.named_parameters())
    own = sum(known[name].nbytes for name in trained)
    # The gate's bias has no gradient.
    learned, tensors = side["parameters.trained"] - 4 + own, tensors - 1 + len(trained)
    return {
        "parameters.trained": learned,
        "parameters.frozen": sum(p.nbytes for p in known.values()) - own + 4,
        "buffers": sum(b.nbytes for b in model.buffers()),
        "gradients": learned,
        "optimizer_state": 2 * learned + 4 * tensors,
        "saved_activations": side["saved_activations"] + 4 * batch * _by_head(model, layer, length),
    }


def _by_head(model: nn.Module, layer: nn.Linear, length: int) -> int:
    """Numbers a sample that the head keeps: its input; of a language model also the loss's, by position."""
    found = getattr(model, "get_output_embeddings", lambda: None)()
    return length * (layer.in_features + layer.out_features) if found is layer else layer.in_features


def _places(
    model: nn.Module, blocks: Sequence[str] | None, head: str | None
) -> tuple[list[str], list[int], Any, nn.Linear]:
    """Names of the blocks, their widths, the parameters of the head, and the head."""
    names = list(blocks) if blocks is not None else _outer(find_blocks(model))
    widths = [block_width(block) for block in _named(model, names)]
    if len(names) < 2:
        refuse("blocks", names, "name two blocks or more whose outputs are tokens (B, T, D)")
    trained = _head(model, head)
    top = next(iter(trained)).rpartition(".")[0]
    layer = model.get_submodule(top)
    if not isinstance(layer, nn.Linear) or any(top.startswith(f"{name}.") for name in names):
        refuse("head", top, "name a Linear layer behind the blocks")
    return names, widths, trained, layer


def _side(self: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    mask = kwargs.get("attention_mask")
    mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
    cache = kwargs.get("cache", kwargs.get("past_key_values"))  # its name from transformers 5.40 on
    past = 0 if cache is None else _past(self, cache)
    with FeatureTap(self, self._side_blocks) as tap:

        def read(_head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            given = [tap[name] for name in self._side_blocks]
            hidden = [one[0].detach() if isinstance(one, tuple) else one for one in given]
            last = hidden[0].shape[1]
            if cache is not None and self.side.causal:
                hidden = _remembered(cache, hidden, past)
            z = inputs[0].detach()
            if not self.side.causal:
                return (_joined(z, self.side(hidden, mask), mask), *inputs[1:])
            if z.dim() == 3 and z.shape[1] < last:
                last = z.shape[1]  # the head is asked for the end of the text alone
            return (_joined(z, self.side(hidden, mask, last=last), None), *inputs[1:])

        handle = self.get_submodule(self._side_head).register_forward_pre_hook(read)
        try:
            return forward(self, *args, **kwargs)
        finally:
            handle.remove()


_KEPT = "_memspan_side"


def _past(self: Any, cache: Any) -> int:
    """Tokens that a cache of keys and values holds; it must hold the blocks' outputs of all of them too."""
    if type(cache).__name__ != "DynamicCache":
        remedy = "the side network keeps its part in a DynamicCache alone; use that, or use_cache=False"
        refuse("cache", type(cache).__name__, remedy)
    length = int(cache.get_seq_length())
    kept = vars(cache).get(_KEPT)
    if length and (kept is None or any(len(cache.layers) <= at for at in kept)):
        remedy = "it was filled without the side network's part: begin with an empty DynamicCache()"
        refuse("cache", f"{length} tokens", remedy)
    if length and not self.side.causal:
        refuse("cache", f"{length} tokens", "this side network sees all positions: use_cache=False")
    return length


def _remembered(cache: Any, hidden: list[Tensor], past: int) -> list[Tensor]:
    """The blocks' outputs of all tokens: kept as more layers of the cache, which it reorders and crops."""
    layers = cache.layers
    if not past:
        import transformers.cache_utils as caches

        vars(cache)[_KEPT] = range(len(layers), len(layers) + len(hidden))
        layers.extend(caches.DynamicLayer() for _ in hidden)
    found = []
    for at, one in zip(vars(cache)[_KEPT], hidden, strict=True):
        keys, _ = layers[at].update(one[:, None], one[:, None, :, :1])
        if keys.shape[2] != past + one.shape[1]:
            refuse("cache", f"{keys.shape[2]} tokens", f"keys and values are of {past}: it was cut")
        found.append(keys[:, 0])
    return found


def _joined(z: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
    """The head's input and the side network's output, with or without positions."""
    if z.shape == y.shape:
        return z + y
    if z.dim() == 2 and len(z) == len(y):
        return z + mean_over(y, mask)
    if z.numel() == y.numel():
        return z + y.reshape(z.shape)
    refuse(
        "head", tuple(z.shape), f"its input must be (B, D) or (B, T, D), with the blocks' {tuple(y.shape)}"
    )


def _train(self: Any, base: type[nn.Module], mode: bool = True) -> nn.Module:
    """Only side network and head follow; the root keeps the mode it is given."""
    base.train(self, mode)
    for name, part in self.named_modules():
        if name and name != self._side_head and name.partition(".")[0] != "side":
            part.training = False
    return self  # type: ignore[no-any-return]


def _network(
    side: str, widths: Sequence[int], out_dim: int, reduction: int | None, save: Save, causal: bool
) -> UniPTHead | LadderHead:
    chosen = _reduction(side, widths, out_dim, reduction)
    if side == "unipt":
        network: UniPTHead | LadderHead = UniPTHead(widths, out_dim, chosen, save=save, causal=causal)
        assert isinstance(network, UniPTHead)
        assert network.up is not None
        last = network.up[-1]
    else:
        if save != "all":
            refuse("save", save, 'only side="unipt" recomputes')
        network = LadderHead(widths, out_dim, chosen, causal=causal)
        last = network.up
    assert isinstance(last, nn.Linear)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return network


def _reduction(side: str, widths: Sequence[int], out_dim: int, reduction: int | None) -> int:
    if reduction is not None:
        return reduction
    width, ways = (out_dim, (2, 1)) if side == "unipt" else (widths[-1], (8, 4, 2, 1))
    return next(r for r in ways if width % r == 0)


def _outer(found: dict[str, nn.Module]) -> list[str]:
    inner = {name for name in found for other in found if name.startswith(f"{other}.")}
    return [name for name in found if name not in inner]
