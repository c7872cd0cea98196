"""The network of MEMO: one generalised part, one specialised block a task, one growing head.

φ(x) = [s_1(g(x)), ..., s_b(g(x))] and logits = W φ + bias (A Model or 603 Exemplars, ICLR 2023, section 4).
With an empty g it is the dynamically expandable representation (DER, CVPR 2021); with one block for ever,
an ordinary network whose head grows. One class serves all learners, so that they differ only in method.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Literal

import torch
from torch import Generator, Tensor, nn

from memspan.base import refuse
from memspan.continual.memo.heads import grow_linear_
from memspan.nn.surgery import split_at

__all__ = ["ExpandableNet", "aux_targets", "split_backbone"]


def split_backbone(model: nn.Module, at: str) -> tuple[nn.Module, nn.Module]:
    """Cut a feature extractor into a generalised and a specialised part before the module named ``at``.

    A thin face of :func:`memspan.nn.surgery.split_at`, which checks s(g(x)) = f(x).

    Args:
        model: maps images to features (N, d).
        at: name of the first module of the specialised part, as in ``model.named_modules()``.

    Returns:
        ``(g, s)``; they share their parameters with ``model``.

    Raises:
        BadInput: no such module, or the model cannot be cut there.
    """
    return split_at(model, at)


class ExpandableNet(nn.Module):
    """Specialised blocks over one generalised part, under one linear head.

    Old blocks are frozen and in eval mode for good: :meth:`train` never wakes them, so that their batch-norm
    statistics stay too. They run without a graph when the generalised part is frozen; else gradients still
    reach g through them.

    Args:
        g: generalised part, image -> hidden; ``nn.Identity()`` gives the expandable representation.
        s_factory: makes a fresh specialised part, hidden -> features (N, feature_dim).
        feature_dim: d, features of one block.
        train_base: True lets g learn after the first task as well (its old blocks then see a moving input);
            False freezes it, with its statistics, once a second block comes.
        seed: source of the head's new entries.

    Example:
        >>> net = ExpandableNet(nn.Flatten(), lambda: nn.Linear(4, 3), feature_dim=3)
        >>> _ = net.add_task(2).add_task(1)
        >>> out = net(torch.zeros(5, 2, 2))
        >>> [tuple(out[name].shape) for name in ("features", "logits", "aux_logits")]
        [(5, 6), (5, 3), (5, 2)]
    """

    def __init__(
        self,
        g: nn.Module,
        s_factory: Callable[[], nn.Module],
        feature_dim: int,
        *,
        train_base: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if feature_dim < 1:
            refuse("feature_dim", feature_dim, "give the number of features of one block, 1 or more")
        self.g = g
        self.blocks = nn.ModuleList()
        self.head = nn.Linear(
            1, 1
        )  # of no rows and columns yet; torch warns when it initialises such a layer
        self.head.weight, self.head.bias = nn.Parameter(torch.empty(0, 0)), nn.Parameter(torch.empty(0))
        self.head.in_features = self.head.out_features = 0
        self.aux: nn.Linear | None = None
        self.feature_dim, self.train_base, self.seed = feature_dim, train_base, seed
        self._s_factory = s_factory

    @property
    def n_classes(self) -> int:
        """Classes so far, C_b."""
        return self.head.out_features

    def add_task(self, n_classes: int, init: Literal["copy", "fresh"] = "copy") -> ExpandableNet:
        """Freeze the present blocks, add one, and grow the head by ``n_classes`` rows and d columns.

        From the second task on an auxiliary head of ``n_classes`` + 1 outputs reads the newest block alone:
        output 0 stands for every old class (:func:`aux_targets`).

        Args:
            n_classes: new classes, 1 or more.
            init: the new block starts as a copy of the previous one (the paper) or fresh.

        Returns:
            The network itself.

        Raises:
            BadInput: no new class, or an unknown ``init``.
        """
        if n_classes < 1:
            refuse("n_classes", n_classes, "a task with no new class adds no block; give 1 or more")
        if init not in ("copy", "fresh"):
            refuse("init", init, "use 'copy' or 'fresh'")
        first = not self.blocks
        block = self._s_factory() if first or init == "fresh" else copy.deepcopy(self.blocks[-1])
        device = self.head.weight.device
        for frozen in self.frozen_parts(adding=True):
            frozen.requires_grad_(False)
            for parameter in frozen.parameters():
                parameter.grad = None
        self.blocks.append(block.to(device).requires_grad_(True))
        self.add_classes(n_classes, columns=self.feature_dim)
        if not first:
            self.aux = nn.Linear(self.feature_dim, n_classes + 1)
            nn.init.kaiming_uniform_(self.aux.weight, nonlinearity="linear", generator=self._generator("aux"))
            nn.init.zeros_(self.aux.bias)
            self.aux.to(device)
        return self.train(self.training)

    def add_classes(self, n_classes: int, columns: int = 0) -> ExpandableNet:
        """Grow the head by ``n_classes`` rows, without a new block."""
        grow_linear_(
            self.head, self.head.in_features + columns, self.n_classes + n_classes, self._generator("head")
        )
        return self

    def drop_aux(self) -> ExpandableNet:
        """Remove the auxiliary head, which serves one task's training only."""
        self.aux = None
        return self

    def frozen_parts(self, *, adding: bool = False) -> list[nn.Module]:
        """Modules that no longer learn: old blocks, and g after task 1 where ``train_base`` is False."""
        old = list(self.blocks if adding else self.blocks[:-1])
        return [*old, self.g] if old and not self.train_base else old

    def train(self, mode: bool = True) -> ExpandableNet:
        """As ``nn.Module.train``; frozen parts stay in eval mode."""
        super().train(mode)
        for part in self.frozen_parts():
            part.eval()
        return self

    def features(self, x: Tensor) -> Tensor:
        """φ(x): (N, d·b), blocks in the order of tasks."""
        hidden = self.g(x)
        return torch.cat([block(hidden) for block in self.blocks], dim=1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Logits (N, C_b), features (N, d·b), and aux_logits (N, c_b + 1) while a task b > 1 is learned."""
        features = self.features(x)
        out = {"logits": self.head(features), "features": features}
        if self.aux is not None:
            out["aux_logits"] = self.aux(features[:, -self.feature_dim :])
        return out

    def working_copy(self) -> ExpandableNet:
        """A copy to train, so that the original survives a failure; parts frozen already are shared."""
        shared: dict[int, object] = {id(part): part for part in self.frozen_parts()}
        return copy.deepcopy(self, shared)

    def _generator(self, part: str) -> Generator:
        from memspan.base.rng import seed_of

        return torch.Generator().manual_seed(
            seed_of("expandable", self.seed, part, self.n_classes, len(self.blocks))
        )


def aux_targets(targets: Tensor, n_old: int) -> Tensor:
    """Targets of the auxiliary head: 0 for every old class, 1, 2, ... for the new ones.

    Args:
        targets: (N,) class indices.
        n_old: C_{b-1}, classes of earlier tasks.

    Example:
        >>> aux_targets(torch.arange(7), n_old=4).tolist()
        [0, 0, 0, 0, 1, 2, 3]
    """
    return (targets - n_old + 1).clamp_min(0)
