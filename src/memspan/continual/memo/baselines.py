"""The rivals on one backbone, the two bounds, and the simplest of all: nearest mean of frozen features.

iCaRL (CVPR 2017), WA (CVPR 2020) and BiC (CVPR 2019) add to replay a distillation from the frozen old
network, which lives while a task is learned. Differences from published code are told with each class.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from memspan.base import refuse
from memspan.continual.memo.learners import Replay, TaskLearner
from memspan.continual.memo.nets import ExpandableNet
from memspan.ledger import nbytes

__all__ = ["WA", "BiC", "ICaRL", "Joint", "NeverUpdate", "SimpleNCM", "distillation"]


def distillation(new: Tensor, old: Tensor, temperature: float = 2.0) -> Tensor:
    """Cross-entropy of the new network's softened answer under the old one's; no T² factor.

    Args:
        new: (N, C) logits for the old classes.
        old: (N, C) logits of the frozen network.
        temperature: divides both.

    Example:
        >>> round(float(distillation(torch.zeros(1, 2), torch.zeros(1, 2))), 4)
        0.6931
    """
    return -(F.softmax(old / temperature, 1) * F.log_softmax(new / temperature, 1)).sum(1).mean()


class Joint(TaskLearner):
    """The ceiling: keeps every image of the past, tells their bytes, and takes no budget."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.budget is not None:
            refuse("budget", self.budget, "joint training keeps all data, whatever it costs; use None")
        self.selection, self.codec = "random", "raw"


class NeverUpdate(TaskLearner):
    """The do-nothing control: learns the first task and never again, and is wrong on every later class."""

    keeps_exemplars = False

    def partial_fit_task(self, X: Any, y: Any = None) -> Self:
        """Learn the first task; leave every later one alone."""
        return super().partial_fit_task(X, y) if self.tasks_ == 0 else self


class _Distilled(Replay):
    has_teacher = True

    def _distill(self, out: Mapping[str, Tensor], x: Tensor, n_old: int) -> Tensor | None:
        """Distillation from the old network on this batch; None in the first task."""
        if self._teacher is None:
            return None
        with torch.no_grad():
            old = self._teacher(x)["logits"]
        return distillation(out["logits"][:, :n_old], old)


class ICaRL(_Distilled):
    """Replay with distillation (T = 2), read by the nearest mean of exemplars unless ``reading="linear"``."""

    default_reading: Literal["linear", "nearest_mean"] = "nearest_mean"

    def _loss(self, out: Mapping[str, Tensor], target: Tensor, x: Tensor, n_old: int) -> Tensor:
        loss = F.cross_entropy(out["logits"], target)
        old = self._distill(out, x, n_old)
        return loss if old is None else loss + old


class WA(_Distilled):
    """(1 − λ) cross-entropy + λ distillation with λ = old classes / all classes, then weight alignment."""

    aligns_weights = True

    def _loss(self, out: Mapping[str, Tensor], target: Tensor, x: Tensor, n_old: int) -> Tensor:
        loss = F.cross_entropy(out["logits"], target)
        old = self._distill(out, x, n_old)
        share = n_old / out["logits"].shape[1]
        return loss if old is None else (1 - share) * loss + share * old


class BiC(WA):
    """As WA, but the logits o of each task's new classes become α·o + β instead of alignment.

    α and β are fitted on a tenth of the exemplars a class (one at least), which the network does not train
    on, and on as many of the task's images. They are fitted on logits; published code passes soft-maxed
    values once more through a softmax. With one exemplar a class there is nothing to hold out: no
    correction, and a warning.
    """

    aligns_weights = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._correction = torch.zeros(0, 2)

    def _train(self, net: ExpandableNet, images: np.ndarray, index: np.ndarray, n_old: int) -> None:
        n_new = net.n_classes - n_old
        new = torch.tensor([1.0, 0.0]).expand(n_new, 2)
        if not n_old or not n_new:
            super()._train(net, images, index, n_old)
            self._correction = torch.cat([self._correction, new])
            return
        counts = np.bincount(index, minlength=net.n_classes)
        share = int(counts[:n_old].min()) // 10 or 1
        if counts.min() < 2:
            warnings.warn(
                "BiC: a class has one image only, none can be held out; no bias correction", stacklevel=4
            )
            super()._train(net, images, index, n_old)
            self._correction = torch.cat([self._correction, new])
            return
        last = np.concatenate([np.flatnonzero(index == c)[-share:] for c in range(net.n_classes)])
        stay = np.setdiff1d(np.arange(len(index)), last)
        super()._train(net, images[stay], index[stay], n_old)
        logits = self._corrected(self._outputs(net, images[last])["logits"])
        target = torch.as_tensor(index[last])
        self._correction = torch.cat([self._correction, _fit_bias(logits, target, n_old).expand(n_new, 2)])

    def _corrected(self, logits: Tensor) -> Tensor:
        known = len(self._correction)
        scale, shift = self._correction.to(logits).unbind(1)
        return torch.cat([logits[:, :known] * scale + shift, logits[:, known:]], dim=1)

    def decision_function(self, X: Any) -> np.ndarray:
        """Corrected logits (N, C)."""
        scores = super().decision_function(X)
        return scores if self._reading == "nearest_mean" else self._corrected(torch.as_tensor(scores)).numpy()

    def memory_bytes(self) -> dict[str, int]:
        """As :class:`TaskLearner`, with α and β."""
        return super().memory_bytes() | {"parameters.correction": nbytes(self._correction)}

    def predict_bytes(self, tasks: int, classes: int, shape: tuple[int, ...] | None = None) -> dict[str, int]:
        """As :class:`TaskLearner`, with α and β."""
        return super().predict_bytes(tasks, classes, shape) | {"parameters.correction": 8 * classes}

    def state_dict(self) -> dict[str, Tensor]:
        """As :class:`TaskLearner`, with α and β."""
        return super().state_dict() | {"correction": self._correction}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> Self:
        """As :class:`TaskLearner`, with α and β."""
        super().load_state_dict(state)
        self._correction = state["correction"].clone()
        return self


class SimpleNCM(TaskLearner):
    """Nearest class mean of a frozen, pretrained backbone's features: no training, no exemplars.

    With a strong backbone this often beats every method here (SimpleCIL, RanPAC); the backbone's bytes are
    counted. Means are exact over all images ever seen, also when a class comes again.

    Example:
        >>> import numpy as np
        >>> images = np.stack([np.full((4, 4), value, np.uint8) for value in (0, 10, 240, 255)])
        >>> SimpleNCM(torch.nn.Flatten()).partial_fit_task(images, ["dark", "dark", "light", "light"]).score(
        ...     images, ["dark", "dark", "light", "light"]
        ... )
        1.0
    """

    keeps_exemplars = False
    default_reading: Literal["linear", "nearest_mean"] = "nearest_mean"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._sums, self._counts = torch.zeros(0, 0), torch.zeros(0)

    def _learn(self, images: np.ndarray, index: np.ndarray, n_new: int) -> None:
        net = self._net or self._shell(1)
        features = F.normalize(self._outputs(net, images)["features"], dim=1)
        if not torch.isfinite(features).all():
            refuse("backbone", "NaN or infinite features", "check the transform and the weights")
        sums, counts = torch.zeros(len(self.classes_), features.shape[1]), torch.zeros(len(self.classes_))
        if len(self._counts):
            sums[: len(self._sums)], counts[: len(self._counts)] = self._sums, self._counts
        rows = torch.as_tensor(index)
        self._sums = sums.index_add(0, rows, features)
        self._counts = counts.index_add(0, rows, torch.ones(len(rows)))
        self._net = net

    def decision_function(self, X: Any) -> np.ndarray:
        """Cosines (N, C) with the class means."""
        self._means = F.normalize(self._sums, dim=1)
        try:
            return super().decision_function(X)
        finally:
            self._means = None  # made anew from the sums: held once

    def memory_bytes(self) -> dict[str, int]:
        """The backbone, its buffers, the sums of features and the counts."""
        held = super().memory_bytes()
        return held | {"memory_bank.class_means": nbytes([self._sums, self._counts])} if held else held

    def predict_bytes(self, tasks: int, classes: int, shape: tuple[int, ...] | None = None) -> dict[str, int]:
        """The same in closed form."""
        known = super().predict_bytes(tasks, classes, shape)
        width = known["parameters.head"] // (4 * classes) - 1
        return known | {"parameters.head": 0, "memory_bank.class_means": 4 * classes * (width + 1)}

    def state_dict(self) -> dict[str, Tensor]:
        """The backbone, the sums of features and the counts."""
        return super().state_dict() | {"sums": self._sums, "counts": self._counts}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> Self:
        """Take over what :meth:`state_dict` gave."""
        super().load_state_dict(state)
        self._sums, self._counts = state["sums"].clone(), state["counts"].clone()
        return self

    def _shell(self, blocks: int) -> ExpandableNet:
        net = self._fresh().add_task(1)
        net.head.weight = torch.nn.Parameter(net.head.weight[:0])  # means take the head's place
        net.head.bias = torch.nn.Parameter(net.head.bias[:0])
        net.head.out_features = 0
        return net.eval().requires_grad_(False)


def _fit_bias(logits: Tensor, target: Tensor, n_old: int) -> Tensor:
    """α and β for the columns from ``n_old`` on, by minimising cross-entropy."""
    bias = torch.tensor([1.0, 0.0], requires_grad=True)
    optimizer = torch.optim.LBFGS([bias], max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        new = logits[:, n_old:] * bias[0] + bias[1]
        # A small pull towards no correction keeps α finite when the held-out images are separated perfectly.
        value = F.cross_entropy(torch.cat([logits[:, :n_old], new], 1), target) + 1e-3 * (bias[0] - 1) ** 2
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return bias.detach() if torch.isfinite(bias).all() else torch.tensor([1.0, 0.0])
