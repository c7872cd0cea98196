"""What a task does to a network, layer by layer: gradients, drift of weights, similarity of features.

The finding behind MEMO (section 3.2): shallow layers move little from task to task and stay similar, deep
layers specialise. So shallow layers can be held once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memspan.base import nearest, refuse
from memspan.nn.surgery import FeatureTap

__all__ = ["GradientNorms", "LayerDrift", "layer_drift", "linear_cka"]


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment of two representations of the same items (Kornblith et al. 2019, (4)).

    CKA = ‖YᵀX‖²_F / (‖XᵀX‖_F ‖YᵀY‖_F) on centred features: 1 for features that agree up to rotation, scale
    and shift, near 0 for unrelated ones. Values from few items and many features are biased upwards: use
    more items than features.

    Args:
        x: (N, ...) features; everything after N is flattened.
        y: (N, ...) features of the same items.

    Returns:
        Between 0 and 1.

    Raises:
        BadInput: different numbers of items, fewer than two, not finite, or features that do not vary.

    Example:
        >>> x = torch.randn(50, 4)
        >>> round(linear_cka(x, 3 * x.flip(1) + 1), 6)
        1.0
    """
    if len(x) != len(y) or len(x) < 2:
        refuse(
            "y",
            tuple(y.shape),
            f"x is {tuple(x.shape)}: give two representations of the same 2 or more items",
        )
    a, b = (features.detach().double().flatten(1) for features in (x, y))
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        refuse("x", "NaN or infinite", "remove these rows or mend the network that gave them")
    a, b = a - a.mean(dim=0), b - b.mean(dim=0)
    if len(a) < max(a.shape[1], b.shape[1]):  # the kernel form is the same number from N x N matrices
        kernel_a, kernel_b = a @ a.T, b @ b.T
        cross, scale = (kernel_a * kernel_b).sum(), kernel_a.norm() * kernel_b.norm()
    else:
        cross, scale = (b.T @ a).square().sum(), (a.T @ a).norm() * (b.T @ b).norm()
    if scale == 0:
        refuse("x", "constant features", "CKA is not defined where nothing varies")
    return float((cross / scale).clamp(0, 1))


@dataclass(frozen=True)
class LayerDrift:
    """How one part differs between two models.

    Attributes:
        weights: mean squared change of a parameter, ‖θ_b − θ_a‖² / numel.
        cka: linear CKA of the part's outputs on the same items.
    """

    weights: float
    cka: float


def layer_drift(
    model_a: nn.Module,
    model_b: nn.Module,
    loader: Iterable[Any],
    layers: Sequence[str] | None = None,
) -> dict[str, LayerDrift]:
    """Compare two models of one architecture part by part.

    Args:
        model_a: before; run in eval mode, left as it was.
        model_b: after.
        loader: batches of inputs, or of (inputs, anything).
        layers: names of parts; None takes the children that have parameters.

    Returns:
        :class:`LayerDrift` by name, shallow to deep. Outputs with more than two dimensions are averaged over
        positions (all dimensions after the second).

    Raises:
        BadInput: parts that the models do not share, or no data.

    Example:
        >>> a, b = (nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)) for _ in range(2))
        >>> drift = layer_drift(a, a, [torch.randn(8, 3)])
        >>> {name: (d.weights, round(d.cka, 6)) for name, d in drift.items()}
        {'0': (0.0, 1.0), '2': (0.0, 1.0)}
    """
    names = (
        list(layers)
        if layers is not None
        else [n for n, child in model_a.named_children() if any(True for _ in child.parameters())]
    )
    for name in names:
        if name not in dict(model_b.named_modules()):
            refuse("layers", name, nearest(name, dict(model_b.named_children())))
    outputs: tuple[dict[str, list[Tensor]], ...] = ({n: [] for n in names}, {n: [] for n in names})
    for batch in loader:
        x = batch[0] if isinstance(batch, list | tuple) else batch
        for model, taken in zip((model_a, model_b), outputs, strict=True):
            _run(model, x, names, taken)
    if not names or not outputs[0][names[0]]:
        refuse("loader", "no batches", "give at least one batch, and one layer")
    result = {}
    for name in names:
        pairs = list(
            zip(
                model_a.get_submodule(name).parameters(),
                model_b.get_submodule(name).parameters(),
                strict=True,
            )
        )
        moved = sum(
            float((after.detach() - before.detach()).double().square().sum()) for before, after in pairs
        )
        count = sum(before.numel() for before, _ in pairs)
        cka = linear_cka(torch.cat(outputs[0][name]), torch.cat(outputs[1][name]))
        result[name] = LayerDrift(moved / max(count, 1), cka)
    return result


class GradientNorms:
    """Mean gradient norm of each part of a model over the backward passes inside the block.

    Args:
        model: any module.
        layers: names of parts; None takes the children that have parameters.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
        >>> with GradientNorms(model) as norms:
        ...     model(torch.ones(2, 3)).sum().backward()
        >>> sorted(norms.mean())
        ['0', '2']
    """

    def __init__(self, model: nn.Module, layers: Sequence[str] | None = None) -> None:
        names = list(layers) if layers is not None else [n for n, _ in model.named_children()]
        parts = {name: list(model.get_submodule(name).parameters()) for name in names}
        self._parts = {name: parameters for name, parameters in parts.items() if parameters}
        self._squares = dict.fromkeys(self._parts, 0.0)
        self._passes = 0
        self._first = next((p for ps in self._parts.values() for p in ps if p.requires_grad), None)
        self._handles: list[Any] = []

    def __enter__(self) -> GradientNorms:
        for name, parameters in self._parts.items():
            for parameter in parameters:
                if parameter.requires_grad:
                    adder = self._adder(name, parameter is self._first)
                    self._handles.append(parameter.register_hook(adder))  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def mean(self) -> dict[str, float]:
        """Root mean square, over the passes, of each part's gradient norm."""
        return {name: (square / max(self._passes, 1)) ** 0.5 for name, square in self._squares.items()}

    def _adder(self, name: str, first: bool) -> Any:
        def add(gradient: Tensor) -> None:
            self._squares[name] += float(gradient.detach().square().sum())
            self._passes += int(first)

        return add


@torch.no_grad()
def _run(model: nn.Module, x: Tensor, names: Sequence[str], taken: dict[str, list[Tensor]]) -> None:
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with FeatureTap(model, names) as tap:
            model(x)
    finally:
        for module, training in modes:
            module.training = training
    for name in names:
        value = tap[name]
        taken[name].append(value.flatten(2).mean(dim=2) if value.dim() > 2 else value)
