"""Streams for class-incremental learning: a labelled image set cut into tasks of new classes.

The order of the classes is a permutation drawn by seed (as in iCaRL, Rebuffi et al., CVPR 2017, section 4),
so that no order is chosen by hand; ``first`` gives the other common protocol, a large first task.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memspan.base import refuse
from memspan.base.rng import rng
from memspan.data.sets import ImageSet

__all__ = ["ClassTask", "class_tasks"]


@dataclass(frozen=True)
class ClassTask:
    """One task: all images of some classes. Tasks of one stream share no class.

    Attributes:
        classes: the labels of this task, in the order of the stream; they are those of the whole set.
        x_train: uint8 images of these classes, in the order of the set.
        y_train: int64 labels.
        x_test: like ``x_train``.
        y_test: like ``y_train``.
    """

    classes: tuple[int, ...]
    x_train: NDArray[Any]
    y_train: NDArray[Any]
    x_test: NDArray[Any]
    y_test: NDArray[Any]


def class_tasks(images: ImageSet, per_task: int, seed: int, *, first: int | None = None) -> list[ClassTask]:
    """Cut a set into tasks of ``per_task`` new classes each.

    Args:
        images: the whole set.
        per_task: classes in a task.
        seed: of the order of the classes.
        first: classes in the first task; ``per_task`` by default.

    Returns:
        The tasks; together they hold every image once.

    Raises:
        BadInput: the classes cannot be cut evenly.

    Example:
        >>> from memspan import data
        >>> tasks = class_tasks(data.load("digits", kind=ImageSet), per_task=2, seed=0)
        >>> len(tasks), sorted(label for task in tasks for label in task.classes)
        (5, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    """
    total = len(images.classes)
    if first is None:
        first = per_task
    if not 1 <= per_task <= total:
        refuse("per_task", per_task, f"{images.name} has {total} classes: use 1 to {total}")
    if not 1 <= first <= total:
        refuse("first", first, f"{images.name} has {total} classes: use 1 to {total}")
    rest = total - first
    if rest % per_task:
        fits = [count for count in range(1, rest + 1) if rest % count == 0]
        refuse("per_task", per_task, f"the {rest} classes after the first task are cut evenly by {fits}")
    order = rng("class order", seed).permutation(total)
    cuts = [0, first, *range(first + per_task, total + 1, per_task)]
    return [_task(images, order[a:b]) for a, b in pairwise(cuts)]


def _task(images: ImageSet, labels: NDArray[np.intp]) -> ClassTask:
    train, test = np.isin(images.y_train, labels), np.isin(images.y_test, labels)
    return ClassTask(
        tuple(int(label) for label in labels),
        images.x_train[train],
        images.y_train[train],
        images.x_test[test],
        images.y_test[test],
    )
