"""The byte rule of MEMO, and how many exemplars a method may hold so that all methods hold the same bytes.

A float32 parameter is 4 bytes, an exemplar is its raw pixels. The budget is what the expanding method holds
at its last task with a given number of exemplars; other methods get the difference in images (section 3.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from memspan.base import refuse
from memspan.ledger import Budget

__all__ = ["aligned_budget", "aligned_exemplars", "image_bytes", "model_bytes"]


def image_bytes(shape: Sequence[int]) -> int:
    """Bytes of a raw uint8 image.

    Args:
        shape: (H, W) or (H, W, C).

    Example:
        >>> image_bytes((32, 32, 3))
        3072
    """
    if len(shape) not in (2, 3) or any(side < 1 for side in shape):
        refuse("shape", tuple(shape), "give (H, W) or (H, W, C)")
    return prod(shape)


def model_bytes(parameters: int) -> int:
    """Bytes of so many float32 parameters.

    Example:
        >>> model_bytes(463_504) / image_bytes((32, 32, 3))  # ResNet-32 is worth 603 images of CIFAR
        603.5208333333334
    """
    if parameters < 0:
        refuse("parameters", parameters, "give 0 or more")
    return 4 * parameters


def aligned_budget(parameters: int, exemplars: int, shape: Sequence[int]) -> Budget:
    """The bytes of a model and its exemplars.

    Args:
        parameters: of everything the method holds at the end.
        exemplars: images it holds.
        shape: of one image.

    Example:
        >>> str(aligned_budget(4_635_040, 2000, (32, 32, 3)))  # ten ResNet-32
        '23.54 MiB'
    """
    if exemplars < 0:
        refuse("exemplars", exemplars, "give 0 or more")
    return Budget(model_bytes(parameters) + exemplars * image_bytes(shape))


def aligned_exemplars(budget: Budget | str | int, parameters: int, shape: Sequence[int]) -> int:
    """How many exemplars a model with so many parameters may hold beside it.

    Args:
        budget: the bytes of the whole.
        parameters: of the model.
        shape: of one image.

    Returns:
        ⌊(budget − 4 · parameters) / image bytes⌋.

    Raises:
        BadInput: the model alone is over the budget.

    Example:
        >>> budget = aligned_budget(4_635_040, 2000, (32, 32, 3))
        >>> aligned_exemplars(budget, 3_626_896, (32, 32, 3)), aligned_exemplars(budget, 463_504, (32, 32, 3))
        (3312, 7431)
    """
    total = Budget.parse(budget).bytes
    left = total - model_bytes(parameters)
    if left < 0:
        refuse(
            "budget",
            str(Budget(total)),
            f"the model alone holds {Budget(model_bytes(parameters))}; give more",
        )
    return left // image_bytes(shape)
