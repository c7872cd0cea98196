"""From a model to its quantized form and back, and what the quantized form holds."""

from __future__ import annotations

import fnmatch
import functools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import Optimizer

from memspan.base import nearest, refuse
from memspan.nn.bits import pack_bits, packed_length
from memspan.nn.surgery import find_blocks
from memspan.training.peqa.grids import Grid, dequantize, groups_of, minmax_grid, optq_, quantize, rtn_grid
from memspan.training.peqa.layers import BITS, QuantConv2d, QuantEmbedding, Quantized, QuantLinear

__all__ = [
    "LayerSummary",
    "Summary",
    "check",
    "dequantize_",
    "layers",
    "predict_bytes",
    "quantize_",
    "scales",
    "suggest_lr",
    "summary",
]

Init = Literal["rtn", "minmax", "optq"]
HEADS = ("classifier", "score", "qa_outputs")  # drawn anew for each task: scales alone would not learn
SKIP = ("lm_head", "head", "embed*", *HEADS)
_RECORD = "_memspan_quantized"
BASE = "_memspan_base"
_PART = 1 << 18  # weights quantized together


def quantize_(
    model: nn.Module,
    bits: int = 4,
    group_size: int | None = None,
    init: Init = "rtn",
    calibration: Iterable[Any] | None = None,
    skip: Sequence[str] = SKIP,
    symmetric: bool = False,
    scale_dtype: torch.dtype = torch.float32,
    *,
    kinds: Sequence[str] = ("linear",),
    also_train: Sequence[str] = (),
    act_order: bool = False,
) -> nn.Module:
    """Replace layers by packed integers with trained scales, one at a time; freeze everything else.

    Linear layers and transformers' ``Conv1D`` are found wherever they are, also as base layers inside peft's
    adapters: the adapters are left as they are, and train on if they did; merging one into integers is
    refused until :func:`dequantize_`. A head that transformers draws anew for each task (``classifier``,
    ``score``, ``qa_outputs``) stays whole and trains on. A layer that stands at several places is replaced at
    all; layers that share a weight share its integers and scales.

    Args:
        model: changed in place. Make the optimizer afterwards: the old weights are gone.
        bits: 2, 3, 4 or 8 a weight.
        group_size: inputs that share a scale; None: one scale an output (per channel).
        init: ``"rtn"`` searches each group's range, ``"minmax"`` takes all of it, ``"optq"`` rounds so that
            the layer's outputs on ``calibration`` change least.
        calibration: for ``"optq"``: batches of real inputs, each a tensor, a tuple or a mapping of what the
            model takes. Blocks are quantized in their order, each on what the quantized ones before give.
        skip: patterns of names (whole, or the last part) of layers left as they are.
        symmetric: zero points fixed in the middle.
        scale_dtype: of the scales; keep float32 to train them.
        kinds: any of ``"linear"``, ``"conv2d"`` (1 x 1, one group) and ``"embedding"``.
        also_train: what is trained beside the scales: ``"norm"``, ``"bias"``, or patterns of module or
            parameter names (such modules are left whole).
        act_order: see :func:`~memspan.training.peqa.optq_`; costs a copy of each layer's input with groups.

    Returns:
        The model.

    Raises:
        BadInput: another width, a group size that does not divide, nothing to quantize, quantized already,
            weights that hold no values (meta) or are not floating or finite, OPTQ without usable calibration.
            Nothing is changed then.

    Warns:
        UserWarning: a weight shared with a layer that stays (that one is skipped); 2 bits per channel start
            far from the model.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
        >>> quantize_(model, bits=3)[0]
        QuantLinear(in_features=64, out_features=32, bits=3, group_size=None, bias=True)
        >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        ['0.scales', '2.scales']
    """
    chosen = _convert_(
        model, bits, group_size, init, calibration, skip, symmetric, scale_dtype, kinds, also_train, act_order
    )
    trained = _also(model, also_train) | _training_on(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for layer in chosen:
        layer.scales.requires_grad_(True)
    for name, parameter in model.named_parameters():
        if name in trained:
            parameter.requires_grad_(True)
    _refuse_merges_(model)
    vars(model)[BASE] = {
        name: parameter.detach().clone() for name, parameter in model.named_parameters() if name in trained
    }
    return model


def dequantize_(model: nn.Module) -> nn.Module:
    """Undo :func:`quantize_`: layers of the old kinds again, whose weight is Ŵ with the present scales.

    What was trained before is trained again.

    Raises:
        BadInput: nothing in it is quantized.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 2))
        >>> dequantize_(quantize_(model, bits=8))
        Sequential(
          (0): Linear(in_features=4, out_features=2, bias=True)
        )
    """
    if not layers(model):
        refuse("model", type(model).__name__, "quantize_ was not applied to it")
    before = vars(model).pop(_RECORD, None)
    vars(model).pop(BASE, None)
    for part in model.modules():
        if getattr(vars(part).get("merge"), "func", None) is _no_merge:
            del part.merge
    shared: dict[int, nn.Parameter] = {}

    def plain(layer: Quantized) -> nn.Module:
        if id(layer.scales) not in shared:
            shared[id(layer.scales)] = nn.Parameter(layer.dequantized().detach())
        return _plain(layer, shared[id(layer.scales)])

    _replace(model, Quantized, plain)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(before is None or name in before)
    return model


def layers(model: nn.Module) -> dict[str, Quantized]:
    """The quantized layers by name, each once."""
    return {name: part for name, part in model.named_modules() if isinstance(part, Quantized)}


def scales(model: nn.Module) -> list[nn.Parameter]:
    """What an optimizer is given: all scales, and what ``also_train`` named.

    Raises:
        BadInput: nothing in it is quantized, or everything is frozen.

    Example:
        >>> model = quantize_(nn.Sequential(nn.Linear(4, 2)), bits=4)
        >>> torch.optim.AdamW(scales(model), lr=suggest_lr(model), weight_decay=0.0).param_groups[0]["lr"] > 0
        True
    """
    _some(model)
    found = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not found:
        refuse("model", type(model).__name__, "everything in it is frozen; unfreeze its scales to train them")
    return found


def suggest_lr(model: nn.Module) -> float:
    """``2e-3`` times the median scale: a rate only means something relative to what it moves.

    About 1e-5 for large language models, where the paper's rates lie.

    Raises:
        BadInput: nothing in it is quantized.
    """
    found = [layer.scales.detach().abs().flatten().float() for layer in _some(model).values()]
    return 2e-3 * float(torch.cat(found).median())


def check(model: nn.Module, optimizer: Optimizer) -> None:
    """Look whether an optimizer trains what a quantized model trains.

    Raises:
        BadInput: scales that no group holds (as with an optimizer made before ``quantize_``), or parameters
            that are not in the model any more.

    Warns:
        UserWarning: weight decay on scales pulls every weight to zero; scales of 16 bits lose small steps.
    """
    _some(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    if missing:
        refuse(
            "optimizer",
            f"{len(missing)} trained tensors in no group, such as {missing[0]}",
            "make the optimizer after quantize_, over peqa.scales(model)",
        )
    strange = len(held - set(names))
    if strange:
        refuse(
            "optimizer",
            f"{strange} tensors that are not in the model",
            "make it anew: their weights were quantized and are gone",
        )
    ours = {id(layer.scales): layer.scales for layer in layers(model).values()}
    for group in optimizer.param_groups:
        here = [ours[id(p)] for p in group["params"] if id(p) in ours]
        if here and group.get("weight_decay"):
            warnings.warn("weight decay on scales pulls every weight to zero: set it to 0", stacklevel=2)
        if any(p.element_size() < 4 for p in here):
            warnings.warn("scales of 16 bits lose small steps: train them in float32", stacklevel=2)


@dataclass(frozen=True)
class LayerSummary:
    """One quantized layer.

    Attributes:
        name: in the model.
        shape: (outputs, inputs).
        bits: asked for.
        held_bits: bits a weight really takes, scales and zero points included.
        bytes: integers, zero points, scales (not the bias).
        trained: scalars that receive gradients.
        error: ``||W - Ŵ|| / ||W||`` when it was quantized; NaN where that is not known (a loaded layer).
        flipped: scales whose sign training has turned, which mirrors their weights: a rate too large.
    """

    name: str
    shape: tuple[int, int]
    bits: int
    held_bits: float
    bytes: int
    trained: int
    error: float
    flipped: int


@dataclass(frozen=True)
class Summary:
    """A quantized model by layer; ``str()`` is a table."""

    layers: tuple[LayerSummary, ...]

    @property
    def bytes(self) -> int:
        """Of all quantized layers."""
        return sum(layer.bytes for layer in self.layers)

    @property
    def trained(self) -> int:
        """Scalars that receive gradients in them."""
        return sum(layer.trained for layer in self.layers)

    @property
    def held_bits(self) -> float:
        """Bits a weight, over all of them."""
        return 8 * self.bytes / sum(math.prod(layer.shape) for layer in self.layers)

    @property
    def flipped(self) -> int:
        """Scales whose sign has turned."""
        return sum(layer.flipped for layer in self.layers)

    def __str__(self) -> str:
        wide = max(len(layer.name) for layer in self.layers)
        lines = [
            f"{'layer':{wide}}  {'shape':>13}  bits  held  {'bytes':>11}  {'trained':>8}  error  flipped"
        ]
        for one in self.layers:
            shape = f"{one.shape[0]} x {one.shape[1]}"
            lines.append(
                f"{one.name:{wide}}  {shape:>13}  {one.bits:>4}  {one.held_bits:4.2f}  {one.bytes:>11,}  "
                f"{one.trained:>8,}  {one.error:5.3f}  {one.flipped:>7}"
            )
        lines.append(
            f"{'all':{wide}}  {'':>13}  {'':>4}  {self.held_bits:4.2f}  {self.bytes:>11,}  {self.trained:>8,}"
        )
        return "\n".join(lines)


def summary(model: nn.Module) -> Summary:
    """The table of a quantized model.

    Raises:
        BadInput: nothing in it is quantized.

    Example:
        >>> summary(quantize_(nn.Sequential(nn.Linear(64, 32)), bits=3)).held_bits
        3.625
    """
    rows = []
    for name, layer in _some(model).items():
        size = layer.qweight.nbytes + layer.zeros.nbytes + layer.scales.nbytes
        size += 0 if layer.perm is None else layer.perm.nbytes
        shape = (layer.out_features, layer.in_features)
        rows.append(
            LayerSummary(
                name, shape, layer.bits, 8 * size / math.prod(shape), size,
                layer.scales.numel() if layer.scales.requires_grad else 0,
                layer.error, int((layer.scales < 0).sum()),
            )
        )  # fmt: skip
    return Summary(tuple(rows))


def predict_bytes(
    model: nn.Module,
    bits: int = 4,
    group_size: int | None = None,
    skip: Sequence[str] = SKIP,
    *,
    kinds: Sequence[str] = ("linear",),
    scale_bytes: int = 4,
    train_scales: bool = True,
    **_other: Any,
) -> dict[str, int]:
    """Model states of a PEQA step with Adam by ledger category, from shapes alone (a meta model will do).

    A layer takes ``n⌈m b/8⌉ + n(m/g)(scale_bytes + 1)`` bytes and its bias; a trained scale 4 bytes of
    gradient and 8 of Adam, and each tensor of scales a step counter; so does what trains on beside them (new
    heads, adapters). The rest of the model is as it was. What ``also_train`` adds is not in it.

    Args:
        model: not changed; its weights may be meta.
        bits: as :func:`quantize_`, like the next three.
        group_size: likewise.
        skip: likewise.
        kinds: likewise.
        scale_bytes: of a scale.
        train_scales: False for frozen scales.
        _other: further options of :func:`quantize_`, which change no byte.

    Example:
        >>> with torch.device("meta"):
        ...     model = nn.Sequential(nn.Linear(4096, 4096, bias=False))
        >>> predict_bytes(model)["parameters.packed"], predict_bytes(model)["parameters.trained"]
        (8392704, 16384)
    """
    chosen = _selected(model, bits, group_size, skip, kinds, (), quiet=True)
    held = {id(t): t.nbytes for t in model.parameters()}
    buffers = {id(t): t.nbytes for t in model.buffers()}
    scalars = tensors = integers = 0
    seen: set[int] = set()
    for _, part in chosen:
        weight = _weight_of(part)
        if id(weight) in seen:
            continue
        seen.add(id(weight))
        held.pop(id(weight))
        n, m = _shape_of(part)
        groups = groups_of(m, group_size)
        scalars, tensors = scalars + n * groups, tensors + 1
        integers += n * packed_length(m, bits) + n * groups
    trained = scale_bytes * scalars
    names = _training_on(model)
    whole = {id(p): p for name, p in model.named_parameters() if name in names and id(p) in held}
    for one in whole.values():  # fresh heads and adapters train on beside the scales
        trained, tensors = trained + held.pop(id(one)), tensors + 1
    return {
        "parameters.trained": trained if train_scales else 0,
        "parameters.frozen": sum(held.values()) + (0 if train_scales else trained),
        "parameters.packed": integers,
        "buffers": sum(buffers.values()),
        "gradients": trained if train_scales else 0,
        "optimizer_state": 2 * trained + 4 * tensors if train_scales else 0,
    }


# ---- selection --------------------------------------------------------------------------------------------


def _selected(
    model: nn.Module,
    bits: int,
    group_size: int | None,
    skip: Sequence[str],
    kinds: Sequence[str],
    also_train: Sequence[str],
    *,
    quiet: bool = False,
) -> list[tuple[str, nn.Module]]:
    """The layers to quantize, each once under its first name; everything is refused here, before a change."""
    if bits not in BITS or isinstance(bits, bool):
        refuse("bits", bits, "use 2, 3, 4 or 8")
    for kind in kinds:
        if kind not in _KINDS:
            refuse("kinds", kind, nearest(kind, _KINDS))
    for option, patterns in (("skip", skip), ("also_train", also_train), ("kinds", kinds)):
        if isinstance(patterns, str):
            refuse(option, patterns, f"give a sequence of texts: ({patterns!r},)")
    if any(isinstance(part, Quantized) for part in model.modules()):
        refuse("model", type(model).__name__, "it is quantized already; call dequantize_ first")
    whole = [pattern for pattern in also_train if pattern not in ("norm", "bias")]
    inside = _inside_adapters(model)
    found = [
        (name, part)
        for name, part in model.named_modules()
        if _kind(part) in kinds and part not in inside and not _matches(name, [*skip, *whole])
    ]
    found = _without_torn_ties(model, found, quiet)
    if not found:
        linear = [name or "the model itself" for name, part in model.named_modules() if _kind(part) in kinds]
        told = ", ".join(linear[:20]) + (", ..." if len(linear) > 20 else "")
        refuse(
            "skip",
            tuple(skip),
            f"nothing is left to quantize; layers of kind {', '.join(kinds)}: {told or 'none'}",
        )
    if found[0][1] is model:
        refuse(
            "model", type(model).__name__, "a single layer cannot be replaced in place: nn.Sequential(layer)"
        )
    for name, part in found:
        weight, (_, m) = _weight_of(part), _shape_of(part)
        if not weight.is_floating_point():
            refuse("model", f"{name}: {weight.dtype}", "only floating weights are quantized")
        if group_size is not None:
            try:
                groups_of(m, group_size)
            except ValueError as error:
                refuse("group_size", group_size, f"layer {name}: {error}; or skip it")
    return found


def _kind(part: nn.Module) -> str:
    if type(part) is nn.Linear or _is_conv1d(part):
        return "linear"
    if type(part) is nn.Conv2d:
        one = part.kernel_size == (1, 1) and part.groups == 1 and part.padding in (0, (0, 0), "same", "valid")
        return "conv2d" if one else ""
    if type(part) is nn.Embedding:
        return "embedding" if part.max_norm is None and not part.sparse else ""
    return ""


_KINDS = ("linear", "conv2d", "embedding")


def _is_conv1d(part: nn.Module) -> bool:
    """The linear layer of transformers whose weight is transposed (nx, nf), told without an import."""
    kind = type(part)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def _weight_of(part: nn.Module) -> Tensor:
    assert isinstance(part.weight, Tensor)
    return part.weight


def _shape_of(part: nn.Module) -> tuple[int, int]:
    """(outputs, inputs); rows of an embedding are its outputs."""
    shape = _weight_of(part).shape
    return (shape[1], shape[0]) if _is_conv1d(part) else (shape[0], shape[1])


def _matrix(part: nn.Module) -> Tensor:
    weight = _weight_of(part).detach()
    return weight.t() if _is_conv1d(part) else weight.flatten(1)


def _inside_adapters(model: nn.Module) -> set[nn.Module]:
    """An adapter's own matrices: what is inside a module that wraps a ``base_layer``, that layer aside."""
    found: set[nn.Module] = set()
    for part in model.modules():
        base = getattr(part, "base_layer", None)
        if isinstance(base, nn.Module):
            found |= set(part.modules()) - set(base.modules()) - {part}
    return found


def _matches(name: str, patterns: Iterable[str]) -> bool:
    last = name.rpartition(".")[2]
    return any(fnmatch.fnmatchcase(name, p) or fnmatch.fnmatchcase(last, p) for p in patterns)


def _without_torn_ties(
    model: nn.Module, found: list[tuple[str, nn.Module]], quiet: bool
) -> list[tuple[str, nn.Module]]:
    """Leaves out layers whose weight another module, which stays, holds too."""
    chosen = {part for _, part in found}
    staying = {
        id(parameter): name
        for name, part in model.named_modules()
        if part not in chosen
        for parameter in part._parameters.values()
        if parameter is not None
    }
    kept = []
    for name, part in found:
        other = staying.get(id(part.weight))
        if other is None:
            kept.append((name, part))
        elif not quiet:
            warnings.warn(
                f"{name} shares its weight with {other}, which is not quantized: skipped to keep the tie",
                stacklevel=4,
            )
    return kept


def _also(model: nn.Module, also_train: Sequence[str]) -> set[str]:
    """Names of the parameters that ``also_train`` means."""
    found: set[str] = set()
    for pattern in also_train:
        if pattern == "norm":
            names = {
                f"{name}.{key}" if name else key
                for name, part in model.named_modules()
                if "norm" in type(part).__name__.lower()
                for key, _ in part.named_parameters(recurse=False)
            }
        elif pattern == "bias":
            names = {name for name, _ in model.named_parameters() if name.rpartition(".")[2].endswith("bias")}
        else:
            names = {
                name
                for name, _ in model.named_parameters()
                if _matches(name, [pattern]) or any(_matches(owner, [pattern]) for owner in _owners(name))
            }
        if not names:
            refuse("also_train", pattern, "no parameter is meant; use 'norm', 'bias' or a pattern of names")
        found |= names
    return found


def _training_on(model: nn.Module) -> set[str]:
    """Names of parameters in adapters and fresh heads that are trained, and go on."""
    inside = {id(p) for part in _inside_adapters(model) for p in part.parameters(recurse=False)}
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and (id(parameter) in inside or any(_matches(owner, HEADS) for owner in _owners(name)))
    }


def _refuse_merges_(model: nn.Module) -> None:
    """A merge adds to its base layer's ``weight``, which here is built at each look: it would be lost."""
    for part in model.modules():
        if isinstance(getattr(part, "base_layer", None), Quantized) and hasattr(part, "merge"):
            vars(part)["merge"] = functools.partial(_no_merge, type(part).__name__)


def _no_merge(kind: str, *_: Any, **__: Any) -> None:
    remedy = "its base layer is packed integers: call peqa.dequantize_(model) first, then merge"
    refuse("merge", kind, f"{remedy}; or keep the adapter beside them")


def _owners(name: str) -> list[str]:
    parts = name.split(".")[:-1]
    return [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]


def _some(model: nn.Module) -> dict[str, Quantized]:
    found = layers(model)
    if not found:
        refuse("model", type(model).__name__, "nothing in it is quantized; call quantize_ first")
    return found


# ---- conversion -------------------------------------------------------------------------------------------


def _convert_(
    model: nn.Module,
    bits: int,
    group_size: int | None = None,
    init: Init = "rtn",
    calibration: Iterable[Any] | None = None,
    skip: Sequence[str] = SKIP,
    symmetric: bool = False,
    scale_dtype: torch.dtype = torch.float32,
    kinds: Sequence[str] = ("linear",),
    also_train: Sequence[str] = (),
    act_order: bool = False,
) -> list[Quantized]:
    """Swap the layers and nothing else; gives the new ones."""
    if init not in ("rtn", "minmax", "optq"):
        refuse("init", init, "use 'rtn', 'minmax' or 'optq'")
    if not scale_dtype.is_floating_point:
        refuse("scale_dtype", scale_dtype, "use a floating dtype; float32 to train")
    if act_order and init != "optq":
        refuse("act_order", act_order, "an order of columns belongs to init='optq'")
    chosen = _selected(model, bits, group_size, skip, kinds, also_train)
    _also(model, also_train)
    fake = any(isinstance(_weight_of(part), FakeTensor) for _, part in chosen)
    for name, part in chosen:
        if _weight_of(part).is_meta and not fake:
            refuse("model", f"{name}: a meta tensor", "load the weights first: there are no values to round")
        if not fake and not all(torch.isfinite(end) for end in _weight_of(part).detach().aminmax()):
            refuse("model", f"{name}: not finite", "its weight holds NaN or infinity")
    before = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    make = _Maker(bits, group_size, init, symmetric, scale_dtype, act_order)
    if init == "optq" and not fake:
        if calibration is None:
            refuse("calibration", None, "init='optq' needs batches of real inputs; or take init='rtn'")
        _swap_with_calibration(model, chosen, make, list(calibration))
    else:
        for _, part in chosen:
            make.swap_(model, part)
    vars(model)[_RECORD] = before
    made = list(layers(model).values())
    _warn_of_two_bits(made)
    return made


@dataclass
class _Maker:
    """Makes quantized layers out of plain ones; layers that share a weight get the same integers."""

    bits: int
    group_size: int | None
    init: Init
    symmetric: bool
    scale_dtype: torch.dtype
    act_order: bool

    def __post_init__(self) -> None:
        self.made: dict[int, Quantized] = {}

    def swap_(self, model: nn.Module, part: nn.Module, hessian: Tensor | None = None) -> None:
        """Replace a layer wherever it stands; its float weight is free afterwards."""
        layer = self.layer(part, hessian)
        _replace(model, nn.Module, lambda other: layer if other is part else None)

    @torch.no_grad()
    def layer(self, part: nn.Module, hessian: Tensor | None) -> Quantized:
        """The quantized twin of one plain layer."""
        weight = _weight_of(part)
        n, m = _shape_of(part)
        kind: type[Quantized] = {"linear": QuantLinear, "conv2d": QuantConv2d}.get(
            _kind(part), QuantEmbedding
        )  # type: ignore[assignment]
        bias: nn.Parameter | None = getattr(part, "bias", None)
        new = kind(
            m, n, self.bits, self.group_size, bias is not None,
            device=weight.device, scale_dtype=self.scale_dtype, dtype=weight.dtype,
        )  # fmt: skip
        new.bias = bias
        new.train(part.training)
        _remember(new, part)
        twin = self.made.get(id(weight))
        if twin is not None:
            new.qweight, new.zeros, new.perm, new.scales = twin.qweight, twin.zeros, twin.perm, twin.scales
            new.error = twin.error
        elif not isinstance(weight, FakeTensor):
            self._fill(new, _matrix(part), hessian)
        self.made[id(weight)] = new  # no other plain layer can have this id: all weights lived at once
        return new

    def _fill(self, new: Quantized, weight: Tensor, hessian: Tensor | None) -> None:
        """Integers, zero points, scales and error; without a Hessian some rows at a time, copied as float."""
        exactly = torch.promote_types(weight.dtype, torch.float32)
        n, m = weight.shape
        step = n if hessian is not None else max(1, _PART // m)
        lost = size = 0.0
        for start in range(0, n, step):
            rows = slice(start, start + step)
            exact = weight[rows].to(exactly)
            grid = self._grid(exact, hessian)
            new.qweight[rows] = pack_bits(grid.q, self.bits, check=False)
            new.scales[rows], new.zeros[rows], new.perm = grid.scales, grid.zeros, grid.perm
            back = dequantize(grid.q, grid.scales, grid.zeros)
            ordered = exact if grid.perm is None else exact[:, grid.perm]
            lost += float(back.sub_(ordered).square_().sum())
            size += float(exact.square().sum())
        if not bool((new.scales.abs() > 0).all() and torch.isfinite(new.scales).all()):
            refuse("scale_dtype", self.scale_dtype, "some scales vanish or overflow in it: use float32")
        new.error = math.sqrt(lost / size) if size else 0.0

    def _grid(self, weight: Tensor, hessian: Tensor | None) -> Grid:
        if hessian is not None:
            copied = weight.clone()
            return optq_(
                copied,
                hessian,
                self.bits,
                self.group_size,
                symmetric=self.symmetric,
                act_order=self.act_order,
            )
        search = minmax_grid if self.init == "minmax" else rtn_grid
        found = search(weight, self.bits, self.group_size, symmetric=self.symmetric)
        return Grid(quantize(weight, *found, self.bits), *found)


def _remember(new: Quantized, part: nn.Module) -> None:
    """What the plain layer needs to be made again, beside its weight and bias."""
    told: dict[str, Any] = {"kind": type(part), "dtype": _weight_of(part).dtype, "scales": new.scales.dtype}
    if isinstance(part, nn.Conv2d):
        assert isinstance(new, QuantConv2d)
        new.stride = (part.stride[0], part.stride[1])
    if isinstance(part, nn.Embedding):
        assert isinstance(new, QuantEmbedding)
        new.padding_idx = part.padding_idx
    vars(new)["plain"] = told


def _plain(layer: Quantized, weight: nn.Parameter) -> nn.Module:
    """The layer that was there before, with Ŵ as its weight; layers that shared a weight share it again."""
    told: Mapping[str, Any] = getattr(layer, "plain", None) or {"kind": nn.Linear}
    kind, (n, m) = told["kind"], (layer.out_features, layer.in_features)
    as_made = layer.scales.dtype == told.get("scales")
    with torch.no_grad():
        weight.data = weight.data.to(told["dtype"] if as_made else layer.scales.dtype)
    new: Any
    with torch.device("meta"):  # the weight is there already: nothing is drawn or allocated
        if kind is nn.Conv2d:
            assert isinstance(layer, QuantConv2d)
            new = nn.Conv2d(m, n, 1, layer.stride, bias=layer.bias is not None)
            weight.data = weight.data.view(n, m, 1, 1)
        elif kind is nn.Embedding:
            assert isinstance(layer, QuantEmbedding)
            new = nn.Embedding(n, m, layer.padding_idx)
        elif kind is nn.Linear:
            new = nn.Linear(m, n, bias=layer.bias is not None)
        else:  # transformers' Conv1D
            new = kind(n, m)
            weight.data = weight.data.t().contiguous()
    new.weight, new.bias = weight, layer.bias
    if kind is nn.Embedding:
        del new.bias
    return new.train(layer.training)  # type: ignore[no-any-return]


def _replace(model: nn.Module, kind: type[nn.Module], make: Callable[[Any], nn.Module | None]) -> None:
    """Put ``make(layer)`` in every place of every module of a kind; None leaves it."""
    made: dict[nn.Module, nn.Module | None] = {}
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if isinstance(child, kind):
                if child not in made:
                    made[child] = make(child)
                found = made[child]
                if found is not None:
                    parent._modules[key] = found


def _swap_with_calibration(
    model: nn.Module, chosen: list[tuple[str, nn.Module]], make: _Maker, batches: list[Any]
) -> None:
    """OPTQ block by block: each block's inputs come from the quantized blocks before it."""
    if not batches:
        refuse("calibration", batches, "it is empty: give batches of real inputs")
    rows = {name: part for name, part in chosen if _kind(part) != "embedding"}
    _run(model, rows, batches, _reached)  # refused here, if at all: nothing is changed yet
    blocks = [name + "." for name in find_blocks(model)]
    grouped: dict[str, dict[str, nn.Module]] = {}
    for name, part in chosen:
        owner = next((block for block in blocks if name.startswith(block)), name)
        grouped.setdefault(owner, {})[name] = part
    for members in grouped.values():
        hessians = _run(model, {n: p for n, p in members.items() if n in rows}, batches, _hessian)
        for name, part in members.items():
            make.swap_(model, part, hessians.pop(name, None))


def _reached(before: Tensor | None, x: Tensor) -> Tensor:
    return torch.isfinite(x).all() if before is None else before & torch.isfinite(x).all()


def _hessian(before: Tensor | None, x: Tensor) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x.t() @ x if before is None else before.addmm_(x.t(), x)


@torch.no_grad()
def _run(
    model: nn.Module,
    parts: Mapping[str, nn.Module],
    batches: list[Any],
    gather: Callable[[Tensor | None, Tensor], Tensor],
) -> dict[str, Tensor]:
    """Run batches through the model in eval mode and gather what each part takes in, (rows, features)."""
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def take(part: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            if isinstance(part, nn.Conv2d):
                x = x[..., :: part.stride[0], :: part.stride[1]].movedim(-3, -1)
            found[name] = gather(found.get(name), x.reshape(-1, x.shape[-1]))

        return take

    if not parts:
        return found
    training = [part for part in model.modules() if part.training]
    handles = [part.register_forward_pre_hook(hook(name)) for name, part in parts.items()]
    try:
        model.eval()
        for batch in batches:
            if isinstance(batch, Mapping):
                model(**batch)
            elif isinstance(batch, Tensor):
                model(batch)
            else:
                model(*batch)
    finally:
        for handle in handles:
            handle.remove()
        for part in training:
            part.training = True
    for name in parts:
        if name not in found:
            refuse("calibration", name, "no batch reaches this layer: give inputs that use it, or skip it")
        if found[name].dtype == torch.bool and not bool(found[name]):
            refuse("calibration", name, "NaN or infinity reaches this layer: look for them in the batches")
    return found


def _warn_of_two_bits(made: list[Quantized]) -> None:
    rough = [layer for layer in made if layer.bits == 2 and layer.groups == 1 and layer.error > 0]
    if rough:
        error = sum(layer.error for layer in rough) / len(rough)
        warnings.warn(
            f"2 bits per channel start far from the model (weights off by {100 * error:.0f} % on average): "
            "try group_size=64 or init='optq'",
            stacklevel=4,
        )
