"""A user's own transformer with compressed saved tensors: same outputs, same names, fewer bytes.

Modules keep their parameters, buffers, hooks and names: only their class changes, so an optimizer made
before still fits and a state_dict still loads.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from memspan.base import refuse
from memspan.nn.surgery import recast_, restore_
from memspan.training.slimfit import kernels
from memspan.training.slimfit.codes import CompressionPolicy

__all__ = [
    "CompressedDropout",
    "CompressedGELU",
    "CompressedLayerNorm",
    "CompressedLinear",
    "CompressedMultiheadAttention",
    "CompressedSiLU",
    "compress_",
    "decompress_",
    "summary",
]

_BY = "slimfit.compress_"
_HF_NAME = "memspan_slimfit"


def compress_(model: nn.Module, policy: CompressionPolicy | None = None) -> nn.Module:
    """Let a transformer save compressed copies for its backward pass; :func:`decompress_` undoes it.

    Known are GELU, SiLU, LayerNorm, Dropout, the second linear layer of feed-forward parts,
    ``nn.MultiheadAttention`` (where no weights are asked for), ``nn.TransformerEncoderLayer``, attention of
    transformers (BERT, MiniLM, ViT and all that go through its attention interface, eager or SDPA, and
    change no score by a cap, a sink or a bias) and of timm, and every module whose forward calls
    ``F.scaled_dot_product_attention``. Unknown attention is left alone and named in a warning.

    The first batch is measured: where more than 1 % of an 8-bit operand lies beyond the fixed range ±8, a
    warning tells the share and proposes ``scale="dynamic"``.

    Args:
        model: changed in place.
        policy: None is the paper's table.

    Returns:
        The model.

    Raises:
        BadInput: compressed already, or nothing in it that is known.

    Example:
        >>> layer = nn.TransformerEncoderLayer(16, 2, 64, activation="gelu", batch_first=True)
        >>> summary(compress_(layer))["CompressedLayerNorm"]
        2
        >>> type(decompress_(layer).norm1).__name__
        'LayerNorm'
    """
    if any("compression" in vars(part) for part in model.modules()):
        refuse("model", type(model).__name__, "parts of it are compressed already; decompress_ first")
    policy = policy or CompressionPolicy()
    monitor = _Monitor(policy)
    common = {"compression": policy, "compression_monitor": monitor}
    wide = _wide_linears(model)
    changes: list[tuple[nn.Module, type[nn.Module] | None, dict[str, Any]]] = []
    unknown = []
    for name, part in model.named_modules():
        change = _change(part, part in wide, common)
        if change is not None:
            changes.append((part, *change))
        elif _looks_like_attention(part):
            unknown.append(f"{name or 'the model'} ({type(part).__name__})")
    if not changes:
        refuse(
            "model", type(model).__name__, "it holds no GELU, LayerNorm, attention or Dropout that is known"
        )
    recast_(model, changes, by=_BY)
    monitor.watch(model)
    if unknown:
        shown = ", ".join(unknown[:4]) + (f" and {len(unknown) - 4} more" if len(unknown) > 4 else "")
        warnings.warn(f"attention that is not known keeps its scores: {shown}", stacklevel=2)
    return model


def decompress_(model: nn.Module) -> nn.Module:
    """Undo :func:`compress_`; what was learned stays.

    Raises:
        BadInput: the model is not compressed.
    """
    monitors = [
        vars(part)["compression_monitor"] for part in model.modules() if "compression_monitor" in vars(part)
    ]
    restore_(model, by=_BY)
    for monitor in monitors[:1]:
        monitor.close()
    return model


def summary(model: nn.Module) -> dict[str, int]:
    """How many modules of each kind are compressed.

    Example:
        >>> summary(compress_(nn.Sequential(nn.Linear(4, 4), nn.GELU())))
        {'CompressedGELU': 1}
    """
    kinds = [type(part).__name__ for part in model.modules() if "compression" in vars(part)]
    return dict(Counter(kind if kind.startswith("Compressed") else f"Compressed{kind}" for kind in kinds))


class _Compressed:
    """What the compressed modules share."""

    compression: CompressionPolicy = CompressionPolicy()
    compression_monitor: _Monitor | None = None


class CompressedGELU(_Compressed, nn.GELU):
    """``nn.GELU`` that keeps its input in 4 bits.

    Example:
        >>> CompressedGELU()(torch.zeros(1))
        tensor([0.])
    """

    approximate: str = "none"

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return kernels.compressed_gelu(x, self.approximate, self.compression.gelu)

    def extra_repr(self) -> str:
        """The form of GELU."""
        return f"approximate={self.approximate!r}"


class CompressedSiLU(_Compressed, nn.SiLU):
    """``nn.SiLU`` that keeps its input in 4 bits."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return kernels.compressed_silu(x, self.compression.gelu)


class CompressedLayerNorm(_Compressed, nn.LayerNorm):
    """``nn.LayerNorm`` that keeps a tenth of its normalised input while its weight is frozen.

    Example:
        >>> norm = CompressedLayerNorm(4).requires_grad_(False)
        >>> norm(torch.ones(2, 4, requires_grad=True)).shape
        torch.Size([2, 4])
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., *normalized_shape)."""
        return kernels.compressed_layer_norm(
            x, self.normalized_shape, self.weight, self.bias, self.eps, self.compression
        )


class CompressedLinear(_Compressed, nn.Linear):
    """``nn.Linear`` that keeps its input in 8 bits while its weight trains."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if self.compression_monitor is not None:
            self.compression_monitor.see(x)
        return kernels.compressed_linear(x, self.weight, self.bias, self.compression)


class CompressedDropout(_Compressed, nn.Dropout):
    """``nn.Dropout`` that keeps one byte per element on every device."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return kernels.compressed_dropout(x, self.p, self.training)


class CompressedMultiheadAttention(_Compressed, nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with compressed operands, wherever no attention weights are asked for."""

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Arguments as ``torch.nn.MultiheadAttention``; ``need_weights=True`` is torch's own way."""
        if need_weights or query.dim() != 3 or self.bias_k is not None or self.add_zero_attn:
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        q, k, v = self._projected(query, key, value)
        mask = _joined_mask(attn_mask, key_padding_mask, q)
        y = _attend(self, q, k, v, mask, dropout=self.dropout if self.training else 0.0)
        y = y.transpose(1, 2).flatten(2)
        y = F.linear(y if self.batch_first else y.transpose(0, 1), self.out_proj.weight, self.out_proj.bias)
        return y, None

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        biases: tuple[Tensor | None, ...] = (None,) * 3
        if self.in_proj_bias is not None:
            biases = self.in_proj_bias.chunk(3)
        if self._qkv_same_embed_dim and query is key and key is value:
            projected = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            weights = (
                self.in_proj_weight.chunk(3)
                if self._qkv_same_embed_dim
                else (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            )
            projected = tuple(
                F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)
            )
        first = [x if self.batch_first else x.transpose(0, 1) for x in projected]
        return tuple(x.reshape(*x.shape[:2], self.num_heads, -1).transpose(1, 2) for x in first)


# ---- attention of other libraries -------------------------------------------------------------------------


def _attend(owner: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **setting: Any) -> Tensor:
    """Compressed attention with the policy of a module; the operands of the first batch are measured."""
    policy, monitor = owner.compression, owner.compression_monitor
    if monitor is not None:
        for operand in (q, k, v):
            monitor.see(operand)
    return kernels.compressed_attention(q, k, v, mask, policy=policy, **setting)


class _Redirect(TorchFunctionMode):
    """Inside the block, torch's fused attention is ours."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self._owner = owner

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        return _instead_of_torchs(self._owner, *args, **kwargs)


def _instead_of_torchs(
    owner: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    heads = query.dim() == 4 and query.shape[:2] == key.shape[:2] == value.shape[:2]
    if not heads or enable_gqa:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    return _attend(owner, query, key, value, attn_mask, dropout=dropout_p, causal=is_causal, scale=scale)


_REDIRECTED: dict[type[nn.Module], type[nn.Module]] = {}


def _redirected(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass whose forward runs with :class:`_Redirect`."""
    if kind not in _REDIRECTED:

        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            with _Redirect(self):
                return kind.forward(self, *args, **kwargs)

        _REDIRECTED[kind] = type(f"Compressed{kind.__name__}", (kind,), {"forward": forward})
    return _REDIRECTED[kind]


def _for_transformers(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """What transformers calls where a module's configuration names ``memspan_slimfit``."""
    if given := [name for name in _CHANGES_SCORES if more.get(name) is not None]:
        refuse(given[0], more[given[0]], "compressed attention does not know it: decompress_ the model first")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # groups of queries share a key
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    causal = causal and attention_mask is None and query.shape[2] > 1
    if attention_mask is not None and attention_mask.dim() == 4:
        attention_mask = attention_mask[..., : key.shape[2]]
    y = _attend(module, query, key, value, attention_mask, dropout=dropout, causal=causal, scale=scaling)
    return y.transpose(1, 2).contiguous(), None


#: What some models hand to their attention beside operands and mask; without it the scores are others.
_CHANGES_SCORES = frozenset({"softcap", "s_aux", "sinks", "position_bias", "indices", "block_indices"})


def _transformers_change(part: nn.Module) -> dict[str, Any] | None:
    config: Any = getattr(part, "config", None)
    known = type(part).__module__.startswith("transformers.") and hasattr(config, "_attn_implementation")
    if not known or "ALL_ATTENTION_FUNCTIONS" not in _names_in(part):
        return None
    if config._attn_implementation not in ("eager", "sdpa"):  # others have masks of their own kind
        return None
    if _CHANGES_SCORES & _keywords_in(part):
        return None
    from transformers import AttentionInterface

    AttentionInterface.register(_HF_NAME, _for_transformers)
    mine = copy.copy(config)
    # The model's own configuration still tells how masks are made, so that nothing else changes.
    mine._attn_implementation_internal = _HF_NAME
    return {"config": mine}


# ---- what is changed, and how ------------------------------------------------------------------------------


def _change(
    part: nn.Module, wide: bool, common: dict[str, Any]
) -> tuple[type[nn.Module] | None, dict[str, Any]] | None:
    kind, name = type(part), type(part).__name__
    simple: dict[type[nn.Module], type[nn.Module]] = {
        nn.GELU: CompressedGELU,
        nn.SiLU: CompressedSiLU,
        nn.LayerNorm: CompressedLayerNorm,
        nn.Dropout: CompressedDropout,
        nn.MultiheadAttention: CompressedMultiheadAttention,
    }
    if kind in simple:
        return simple[kind], common
    if kind is nn.Linear and wide:
        return CompressedLinear, common
    if name == "GELUActivation" and kind.__module__.startswith("transformers."):
        return CompressedGELU, {**common, "approximate": "none"}
    if name in ("NewGELUActivation", "PytorchGELUTanh", "GELUTanh"):
        return CompressedGELU, {**common, "approximate": "tanh"}
    if name == "SiLUActivation":
        return CompressedSiLU, common
    if name == "LayerNorm" and kind.__module__.startswith("timm.") and isinstance(part, nn.LayerNorm):
        return CompressedLayerNorm, common
    if isinstance(part, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        if part.activation is not F.gelu:
            return None
        activation = CompressedGELU()
        vars(activation).update(common)
        return None, {"activation": activation}
    if isinstance(config := _transformers_change(part), dict):
        return None, {**common, **config}
    if "scaled_dot_product_attention" in _names_in(part) and not isinstance(part, nn.MultiheadAttention):
        fused = {"fused_attn": True} if hasattr(part, "fused_attn") else {}
        return _redirected(kind), {**common, **fused}
    return None


def _wide_linears(model: nn.Module) -> set[nn.Module]:
    """Linear layers at least twice as wide in as out that have a partner of the mirrored shape."""
    linears = [part for part in model.modules() if type(part) is nn.Linear]
    shapes = {(part.in_features, part.out_features) for part in linears}
    return {
        part
        for part in linears
        if part.in_features >= 2 * part.out_features and (part.out_features, part.in_features) in shapes
    }


def _looks_like_attention(part: nn.Module) -> bool:
    own = any(isinstance(child, nn.Linear) for child in part.children()) or any(
        parameter.dim() > 1 for parameter in part.parameters(recurse=False)
    )
    return own and ("attention" in type(part).__name__.lower() or "softmax" in _names_in(part))


def _names_in(part: nn.Module) -> tuple[str, ...]:
    """Names that a module's forward uses."""
    code = getattr(inspect.unwrap(type(part).forward), "__code__", None)
    return code.co_names if code is not None else ()


def _keywords_in(part: nn.Module) -> set[str]:
    """Names of keyword arguments that a module's forward passes on: they stand among its constants."""
    code = getattr(inspect.unwrap(type(part).forward), "__code__", None)
    constants = () if code is None else code.co_consts
    grouped = [one if isinstance(one, tuple) else (one,) for one in constants]
    return {name for group in grouped for name in group if isinstance(name, str)}


def _joined_mask(mask: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
    """``nn.MultiheadAttention``'s two masks (True is left out) as one that is added to the scores."""
    parts = []
    if mask is not None:
        parts.append(mask if mask.dim() == 2 else mask.view(q.shape[0], q.shape[1], *mask.shape[1:]))
    if padding is not None:
        parts.append(padding[:, None, None, :])
    joined: Tensor | None = None
    for part in parts:
        if part.dtype == torch.bool:
            low = torch.finfo(q.dtype).min / 4  # two of them still add up to a finite number
            part = torch.zeros(part.shape, dtype=q.dtype, device=q.device).masked_fill_(part, low)
        joined = part if joined is None else joined + part
    return joined


class _Monitor:
    """Share of 8-bit operands beyond the fixed range, over the first batch."""

    def __init__(self, policy: CompressionPolicy) -> None:
        self.open = policy.scale == "fixed" and (policy.matmul, policy.wide_linear) != (None, None)
        self.seen = self.clipped = 0
        self._handle: Any = None

    def watch(self, model: nn.Module) -> None:
        """Tell what was found once the model's forward pass ends."""
        if self.open:
            self._handle = model.register_forward_hook(self._told)

    def see(self, x: Tensor) -> None:
        """Count an operand."""
        if self.open and x.requires_grad and not isinstance(x, FakeTensor):
            self.seen += x.numel()
            self.clipped += int((x.detach().abs() > 8).sum())

    def close(self) -> None:
        """Look no further."""
        self.open = False
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _told(self, _module: nn.Module, _inputs: Any, _output: Any) -> None:
        if not self.seen:
            return
        share = self.clipped / self.seen
        self.close()
        if share > 0.01:
            warnings.warn(
                f"{100 * share:.1f} % of the first batch's 8-bit operands lie beyond ±8 and are clipped: "
                "use compress_(model, CompressionPolicy.paper(scale='dynamic'))",
                stacklevel=2,
            )
        elif share > 0:
            warnings.warn(
                f"{100 * share:.2g} % of the 8-bit operands of the first batch lie beyond ±8 and are clipped",
                stacklevel=2,
            )
