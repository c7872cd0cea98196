"""The callback that lets Hugging Face's Trainer save and resume sharded states."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from memspan.base import optional, refuse
from memspan.training.zero.buckets import exchange
from memspan.training.zero.optimizer import ZeroOptimizer

__all__ = ["save_shards_callback"]


def save_shards_callback(folder: str = "zero") -> Any:
    """A ``TrainerCallback`` that writes every rank's shards beside the Trainer's own files, and loads them.

    Trainer asks rank 0 alone for the optimizer's state. With this callback ``checkpoint-N/zero`` holds all
    of it, and ``trainer.train(resume_from_checkpoint=True)`` brings it back at any number of ranks.

    Args:
        folder: name of the folder inside each checkpoint.

    Raises:
        ImportError: transformers is not installed.
    """
    transformers = optional("transformers", extra="recipes")

    class SaveShards(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        """Shards saved after the Trainer's files, loaded before its first step."""

        def on_save(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
            _replace(_inner(optimizer), Path(args.output_dir) / f"checkpoint-{state.global_step}" / folder)

        def on_train_begin(
            self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any
        ) -> None:
            if state.global_step:
                _inner(optimizer).load(Path(args.output_dir) / f"checkpoint-{state.global_step}" / folder)

    return SaveShards()


def _replace(optimizer: ZeroOptimizer, target: Path) -> None:
    """Trainer writes a step's folder again after a resume: new shards are whole before old ones go."""
    fresh = target.with_name(f".{target.name}.new")
    if optimizer.rank == 0 and fresh.exists():
        shutil.rmtree(fresh)
    exchange(True, optimizer.group)
    optimizer.save(fresh)
    if optimizer.rank == 0:
        if target.exists():
            shutil.rmtree(target)
        fresh.rename(target)
    exchange(True, optimizer.group)


def _inner(optimizer: Any) -> ZeroOptimizer:
    """The optimizer inside accelerate's wrapper."""
    found = optimizer if isinstance(optimizer, ZeroOptimizer) else getattr(optimizer, "optimizer", None)
    if not isinstance(found, ZeroOptimizer):
        refuse("optimizer", type(optimizer).__name__, "this callback saves what zero.Sharded or shard_ made")
    return found
