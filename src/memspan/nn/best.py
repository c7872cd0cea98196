"""The best epoch of a training run, kept as a copy, and when to stop waiting for a better one."""

from __future__ import annotations

import math

from torch import Tensor, nn

from memspan.base import refuse

__all__ = ["BestState"]


class BestState:
    """Copies a module's parameters and buffers whenever a score on validation data is the best so far.

    A state kept by reference trains on with the module, which is the usual fault here; this one is cloned.

    Args:
        module: the module in training.
        patience: epochs without a better score after which :meth:`update` says stop; None never does.

    Attributes:
        score: the best score so far, ``-inf`` before the first.
        epoch: number of the update that brought it, from 0.

    Raises:
        BadInput: a patience below 1.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> best = BestState(layer, patience=1)
        >>> _ = nn.init.constant_(layer.weight, 1.0)
        >>> best.update(0.5)
        False
        >>> _ = nn.init.constant_(layer.weight, 2.0)
        >>> best.update(0.4)
        True
        >>> best.restore_()
        >>> layer.weight.item(), best.epoch
        (1.0, 0)
    """

    def __init__(self, module: nn.Module, patience: int | None = None) -> None:
        if patience is not None and patience < 1:
            refuse("patience", patience, "give the epochs to wait, 1 or more, or None")
        self.module, self.patience = module, patience
        self.score, self.epoch = -math.inf, -1
        self._state: dict[str, Tensor] = {}
        self._seen = 0

    def update(self, score: float) -> bool:
        """Take the score of one more epoch (greater is better); whether to stop.

        Raises:
            BadInput: the score is NaN.
        """
        if math.isnan(score):
            refuse("score", score, "training has diverged; nothing is kept of this epoch")
        if score > self.score:
            self.score, self.epoch = score, self._seen
            self._state = {name: tensor.clone() for name, tensor in self.module.state_dict().items()}
        self._seen += 1
        return self.patience is not None and self._seen - 1 - self.epoch >= self.patience

    def restore_(self) -> None:
        """Put the best state back; a module that never got a score is left as it is."""
        if self._state:
            self.module.load_state_dict(self._state)

    def memory_bytes(self) -> dict[str, int]:
        """Bytes of the copy."""
        return {"snapshot.best": sum(tensor.nbytes for tensor in self._state.values())}
