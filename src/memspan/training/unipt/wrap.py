"""A frozen backbone with a small trained network beside it, and the backbone's features computed once.

The backbone always runs in eval mode under ``no_grad``: no gradient enters it, it keeps nothing for the
backward pass, and it may be quantized, compiled, or (through :func:`cache_hidden`) absent.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from memspan.base import refuse
from memspan.nn.surgery import FeatureTap
from memspan.training.unipt.head import Preset, Save, UniPTHead

__all__ = [
    "HiddenCache",
    "SideTuned",
    "SpatialUniPT",
    "UniPT",
    "cache_hidden",
    "is_causal",
    "probe_sizes",
]

Pick = Callable[[Any], Tensor] | int | None
Head = Callable[..., Tensor]


class SideTuned(nn.Module):
    """A backbone that is only read, and a head that trains on what its layers give.

    Args:
        backbone: any module. The caller's own keeps its mode and its trained parameters; what is read here
            shares its weights (no byte is copied), is frozen, and stays in eval mode, whatever ``train()``
            says (dropout would make cached features wrong, running statistics would drift).
        taps: where to read, see :class:`~memspan.nn.FeatureTap`.
        head: ``head(hidden, mask)``; trains.
        pick: what to take of a tapped module's output where that is no tensor.
        embedding: takes e (B, D) from the backbone's own output, for heads that need it.
        dtype: what hidden states are stored as at once; None leaves them.

    Raises:
        BadInput: nothing is tapped; in forward, a backbone parameter that asks for a gradient, which could
            not be trained.

    Warns:
        UserWarning: a backbone in train mode, which is read in eval mode; inputs that ask for a gradient,
            which they will not get.
    """

    def __init__(
        self,
        backbone: nn.Module,
        taps: str | Sequence[str],
        head: nn.Module,
        *,
        pick: Pick = None,
        embedding: Callable[[Any], Tensor] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if backbone.training:
            warnings.warn("the backbone was in train mode; here it is read in eval mode", stacklevel=3)
        backbone = _read_only(backbone)
        self._tap = FeatureTap(backbone, taps, pick=pick, dtype=dtype)
        self._embedding, self._warned = embedding, False
        self.backbone = backbone
        self.head = head

    def train(self, mode: bool = True) -> SideTuned:
        """Set the head's mode; the backbone stays in eval mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    def hidden(self, *inputs: Any, **named: Any) -> list[Tensor]:
        """What the taps give for the backbone's inputs: one detached tensor per layer."""
        self._closed((*inputs, *named.values()))
        return self._tap.run(*inputs, **named)

    def forward(
        self, *inputs: Any, mask: Tensor | None = None, position: Tensor | None = None, **named: Any
    ) -> Tensor:
        """The head's answer.

        Args:
            inputs: of the backbone.
            mask: (B, T), 1 where a position counts; None takes the backbone's own ``attention_mask``, where
                it is given by name and is of this kind.
            position: (B,) the class or end-of-text place, for preset ``embedding``.
            named: inputs of the backbone.
        """
        hidden = self.hidden(*inputs, **named)
        if mask is None:
            mask = named.get("attention_mask")
        more: dict[str, Any] = {}
        if self._embedding is not None:
            more["embedding"] = self._embedding(self._tap.output).detach()
            more["position"] = position
        self._tap.output = None
        answer: Tensor = self.head(hidden, mask, **more)
        return answer

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the head: what an optimizer is given."""
        return self.head.parameters()

    def state_dict(  # type: ignore[override]
        self, *args: Any, only: str = "all", **named: Any
    ) -> dict[str, Any]:
        """The whole state, or with ``only="head"`` the head's, as its own ``load_state_dict`` takes it.

        Raises:
            BadInput: another word.
        """
        if only not in ("all", "head"):
            refuse("only", only, 'use "all" or "head"')
        if only == "head":
            return self.head.state_dict(*args, **named)
        return super().state_dict(*args, **named)

    def memory_bytes(self) -> dict[str, int]:
        """Bytes of weights, the backbone's apart."""
        own = list(self.head.parameters())
        kept = [*self.backbone.parameters(), *self.backbone.buffers()]
        seen = {id(one) for one in own}
        return {
            "parameters.head": sum(one.nbytes for one in own),
            "parameters.backbone": sum(
                one.nbytes for one in {id(k): k for k in kept if id(k) not in seen}.values()
            ),
            "buffers.head": sum(one.nbytes for one in self.head.buffers()),
        }

    def _closed(self, inputs: Iterable[Any]) -> None:
        """No gradient may seem to enter the backbone."""
        for name, parameter in self.backbone.named_parameters():
            if parameter.requires_grad:
                refuse(
                    f"backbone.{name}.requires_grad",
                    True,
                    "no gradient enters the backbone, so it would never train; set it to False, or put the "
                    "parameter behind the head",
                )
        asking = any(isinstance(one, Tensor) and one.requires_grad for one in inputs)
        if asking and torch.is_grad_enabled() and not self._warned:
            self._warned = True
            warnings.warn(
                "an input of the backbone asks for a gradient (a trainable prompt?); it is detached",
                stacklevel=4,
            )


class UniPT(SideTuned):
    """UniPT beside a backbone of tokens: memory near inference, and nothing asked of the backbone but layers.

    Source: Diao et al., "UniPT: Universal Parallel Tuning for Transfer Learning with Efficient Parameter and
    Memory", CVPR 2024. A linear probe is simpler where the last layer separates the task; LoRA is better
    where the task needs new features.

    Args:
        backbone: see :class:`SideTuned`.
        taps: likewise; ``"hidden_states"`` for transformers models.
        out_dim: width of the output; None takes the last layer's.
        reduction: out_dim / d.
        preset: ``"token"``, ``"joint"`` or ``"embedding"``, see :class:`UniPTHead`.
        save: likewise.
        pick: see :class:`SideTuned`.
        embedding: likewise, for preset ``"embedding"``.
        example: inputs for one pass that tells the layers' widths (a tensor, tuple or mapping); None reads
            them from ``config.hidden_size`` or the tapped modules' last norm or Linear layer.
        causal: see :class:`UniPTHead`; None asks :func:`is_causal`. False lets a backbone of a language model
            be read as a whole, for one answer a text.

    Raises:
        BadInput: as :class:`SideTuned` and :class:`UniPTHead`; widths that cannot be read without an example.

    Example:
        >>> block = lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        >>> backbone = nn.Sequential(block(), block(), block()).eval()
        >>> model = UniPT(backbone, "?", out_dim=6, reduction=3)
        >>> model(torch.randn(2, 5, 8), mask=torch.ones(2, 5)).shape
        torch.Size([2, 5, 6])
        >>> len(list(model.trainable_parameters())), len(list(model.parameters()))
        (20, 26)
    """

    head: UniPTHead

    def __init__(
        self,
        backbone: nn.Module,
        taps: str | Sequence[str],
        out_dim: int | None = None,
        reduction: int = 2,
        preset: Preset = "token",
        *,
        save: Save = "all",
        pick: Pick = None,
        embedding: Callable[[Any], Tensor] | None = None,
        example: Any = None,
        causal: bool | None = None,
    ) -> None:
        if preset == "map":
            refuse("preset", preset, "feature maps go to SpatialUniPT")
        if (preset == "embedding") != (embedding is not None):
            refuse(
                "embedding", embedding, "preset embedding needs a function from output to e; others take none"
            )
        sizes = probe_sizes(backbone, taps, example, pick=pick)
        ordered = causal if causal is not None else preset != "embedding" and is_causal(backbone)
        width = sizes[-1] if out_dim is None else out_dim
        head = UniPTHead(sizes, width, reduction, preset, save=save, causal=ordered)
        half = torch.bfloat16 if save == "half" else None
        super().__init__(backbone, taps, head, pick=pick, embedding=embedding, dtype=half)


class SpatialUniPT(SideTuned):
    """UniPT beside a CNN: stages of different size are brought to the last one's by guided windows.

    Args:
        backbone: see :class:`SideTuned`.
        taps: stages, shallow first; each size a whole multiple of the last one's.
        out_dim: width of the output.
        reduction: out_dim / d.
        pick: see :class:`SideTuned`.
        example: inputs for one pass that tells the channels; None reads them from the tapped modules.

    Shape:
        the output is (B, h w, out_dim), positions of the last stage.

    Raises:
        BadInput: as :class:`UniPT`.

    Example:
        >>> stage = lambda a, b: nn.Sequential(nn.Conv2d(a, b, 2, 2), nn.BatchNorm2d(b))
        >>> cnn = nn.Sequential(stage(3, 4), stage(4, 8)).eval()
        >>> SpatialUniPT(cnn, ["0", "1"], out_dim=6)(torch.randn(2, 3, 16, 16)).shape
        torch.Size([2, 16, 6])
    """

    head: UniPTHead

    def __init__(
        self,
        backbone: nn.Module,
        taps: str | Sequence[str],
        out_dim: int,
        reduction: int = 2,
        *,
        pick: Pick = None,
        example: Any = None,
    ) -> None:
        sizes = probe_sizes(backbone, taps, example, pick=pick)
        super().__init__(backbone, taps, UniPTHead(sizes, out_dim, reduction, "map"), pick=pick)


class HiddenCache:
    """Hidden states of a whole data set: ``cache[rows]`` gives what a head reads.

    Attributes:
        flat: (N, all numbers of a sample), in the dtype they are kept in.
        shapes: of each layer, one sample.
    """

    def __init__(self, flat: Tensor, shapes: Sequence[torch.Size]) -> None:
        self.flat, self.shapes = flat, list(shapes)

    def __len__(self) -> int:
        return len(self.flat)

    def __getitem__(self, rows: Tensor | slice) -> list[Tensor]:
        """Hidden states of samples, by places (n,) or a slice: one tensor per layer.

        They have the dtype of the cache: a head casts what it reads.
        """
        chosen = self.flat[rows]
        parts = torch.split(chosen, [shape.numel() for shape in self.shapes], dim=1)
        return [part.reshape(-1, *shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def memory_bytes(self) -> dict[str, int]:
        """Bytes held."""
        return {"store.hidden_states": self.flat.nbytes}


def cache_hidden(
    model: SideTuned,
    loader: Iterable[Any],
    key: Mapping[str, Any],
    dtype: torch.dtype | None = torch.float16,
) -> HiddenCache:
    """Hidden states of every batch, computed once: training on them needs no backbone.

    Right only where inputs are the same in every epoch: no augmentation, and one padded length for all
        batches.
    In float32 training is the same, bit by bit, as with the live backbone on the same batches.

    Args:
        model: whose backbone is read.
        loader: batches of backbone inputs: a tensor, a tuple, or a mapping of names; fixed order.
        key: JSON values that tell the data and its preparation, such as ``{"data": dataset.sha256}``; the
            backbone's weights and the taps are added.
        dtype: what hidden states are kept as; float16 halves the bytes.

    Raises:
        BadInput: samples of different shapes; as :func:`memspan.data.features.cache_features`.
    """
    from memspan.data.features import cache_features

    full = {
        "hidden": 1,
        "weights": _checksum(model.backbone.state_dict()),
        "taps": model._tap.names,
        "data": dict(key),
    }
    whole = getattr(model._tap, "_whole", "")
    full["whole"] = whole
    shapes: list[list[torch.Size]] = []

    def pack(batch: Any) -> Tensor:
        with torch.no_grad():
            hidden = _on(model, batch)
        found = [one.shape[1:] for one in hidden]
        if shapes and found != shapes[0]:
            refuse(
                "loader",
                [tuple(s) for s in found],
                f"all samples must have the shapes {shapes[0]}: pad to one length",
            )
        shapes.append(found)
        return torch.cat([one.flatten(1) for one in hidden], dim=1)

    batches = iter(loader)
    first = next(batches, None)
    if first is None:
        refuse("loader", "no batch", "give at least one batch")
    with torch.no_grad():
        known = [one.shape[1:] for one in _on(model, first)]

    def again() -> Iterator[Any]:
        yield first
        yield from batches

    return HiddenCache(cache_features(pack, again(), full, dtype), known)


def is_causal(model: nn.Module) -> bool:
    """Whether positions see earlier ones alone, as the modules say: an attribute ``is_causal`` that is true.

    The attention layers of transformers and memspan carry it; of others it is not known.

    Example:
        >>> is_causal(nn.Linear(2, 2))
        False
    """
    return any(
        vars(part).get("is_causal", getattr(type(part), "is_causal", None)) is True
        for part in model.modules()
    )


def probe_sizes(
    backbone: nn.Module, taps: str | Sequence[str], example: Any, *, pick: Pick = None
) -> list[int]:
    """Widths of what the taps give: channels of maps, features of tokens.

    Args:
        backbone: a module.
        taps: see :class:`~memspan.nn.FeatureTap`.
        example: inputs to run once in eval mode, or None to read the widths without running.
        pick: see :class:`~memspan.nn.FeatureTap`.

    Raises:
        BadInput: no such taps; widths that cannot be read without an example.

    Example:
        >>> probe_sizes(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4)), "*", None)
        [3, 4]
    """
    tap = FeatureTap(backbone, taps, pick=pick)
    if example is not None:
        modes = [part for part in backbone.modules() if part.training]
        backbone.eval()
        try:
            hidden = tap.run(**example) if isinstance(example, Mapping) else tap.run(*_tuple(example))
        finally:
            for part in modes:
                part.training = True
        return [one.shape[1] if one.dim() == 4 else one.shape[-1] for one in hidden]
    config = getattr(backbone, "config", None)
    if not tap.names and config is not None and hasattr(config, "num_hidden_layers"):
        return [int(config.hidden_size)] * (int(config.num_hidden_layers) + 1)
    if not tap.names:
        refuse("example", example, "give inputs for one pass, which tells the widths of the layers")
    return [last_width(name, backbone.get_submodule(name)) for name in tap.names]


def last_width(name: str, module: nn.Module) -> int:
    """Width of a module's output, read from its last layer that has one."""
    for part in reversed(list(module.modules())):
        if isinstance(part, nn.LayerNorm):
            return int(part.normalized_shape[-1])
        if isinstance(part, nn.Linear):
            return part.out_features
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            return part.num_features
        if isinstance(part, nn.modules.conv._ConvNd):
            return part.out_channels
        if isinstance(part, nn.Embedding):
            return part.embedding_dim
    refuse("example", None, f"{name} has no layer that tells its width; give inputs for one pass")


def _read_only(backbone: nn.Module) -> nn.Module:
    """The same weights behind frozen parameters of their own, in eval mode; the given one stays as it is."""
    memo: dict[int, Any] = {
        id(one): nn.Parameter(one.detach(), requires_grad=False) for one in backbone.parameters()
    }
    memo |= {id(one): one for one in backbone.buffers()}
    return copy.deepcopy(backbone, memo).eval()


def _on(model: SideTuned, batch: Any) -> list[Tensor]:
    return model.hidden(**batch) if isinstance(batch, Mapping) else model.hidden(*_tuple(batch))


def _tuple(batch: Any) -> tuple[Any, ...]:
    return tuple(batch) if isinstance(batch, tuple | list) else (batch,)


def _checksum(state: Mapping[str, Tensor]) -> str:
    from memspan.data.sets import content_sha256

    arrays = {
        name: tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        for name, tensor in state.items()
        if isinstance(tensor, Tensor) and tensor.numel()
    }
    return content_sha256(arrays)
