"""A linear head that grows with classes and features, and the weight alignment that follows a task.

New classes arrive with larger weight rows than old ones, because old classes are seen through few
exemplars; the head then prefers new classes whatever the image. Alignment rescales the new rows to the
old rows' mean norm (WA: Maintaining Discrimination and Fairness in Class Incremental Learning, CVPR 2020).
"""

from __future__ import annotations

import warnings

import torch
from torch import Generator, nn

from memspan.base import refuse

__all__ = ["align_weights_", "grow_linear_"]


@torch.no_grad()
def grow_linear_(
    head: nn.Linear, in_features: int, out_features: int, generator: Generator | None = None
) -> nn.Linear:
    """Enlarge a linear layer in place; the old block keeps its values.

    New entries are drawn Kaiming-uniform for a linear layer of the new size, new biases are 0 (MEMO, ICLR
    2023, and its official code).

    Args:
        head: the layer, of weight (C, d).
        in_features: columns afterwards, d or more.
        out_features: rows afterwards, C or more.
        generator: source of the new entries; None takes torch's global one.

    Returns:
        The same layer. Its weight and bias are new parameters: make the optimizer afterwards.

    Raises:
        BadInput: a size smaller than the present one.

    Example:
        >>> head = nn.Linear(2, 1)
        >>> old = head.weight.detach().clone()
        >>> grow_linear_(head, 4, 3).weight.shape, torch.equal(head.weight[:1, :2], old)
        (torch.Size([3, 4]), True)
    """
    if in_features < head.in_features:
        refuse("in_features", in_features, f"the head has {head.in_features} columns and only grows")
    if out_features < head.out_features:
        refuse("out_features", out_features, f"the head has {head.out_features} rows and only grows")
    old = head.weight
    weight = torch.empty(out_features, in_features, dtype=old.dtype)
    if weight.numel():
        # Drawn on the CPU, so that one seed gives one network on every device.
        nn.init.kaiming_uniform_(weight, nonlinearity="linear", generator=generator)
    weight = weight.to(old.device)
    weight[: head.out_features, : head.in_features] = old
    if head.bias is not None:
        bias = torch.zeros(out_features, dtype=old.dtype, device=old.device)
        bias[: head.out_features] = head.bias
        head.bias = nn.Parameter(bias)
    head.weight = nn.Parameter(weight)
    head.in_features, head.out_features = in_features, out_features
    return head


@torch.no_grad()
def align_weights_(head: nn.Linear, n_new: int) -> float:
    """Scale the rows of the newest classes to the mean norm of the older rows; biases stay.

    Args:
        head: the layer, of weight (C, d); the newest classes are its last rows.
        n_new: how many rows are new, from 0 to C.

    Returns:
        The factor γ = mean norm of old rows / mean norm of new rows. It is 1, with nothing changed, when
        there is no old or no new class; when a mean norm is zero or not finite γ is undefined, and a
        warning says so.

    Raises:
        BadInput: ``n_new`` outside 0..C.

    Example:
        >>> head = nn.Linear(2, 2)
        >>> _ = head.weight.data.copy_(torch.tensor([[3.0, 4.0], [0.0, 10.0]]))
        >>> align_weights_(head, 1), head.weight.data[1].tolist()
        (0.5, [0.0, 5.0])
    """
    total = head.out_features
    if not 0 <= n_new <= total:
        refuse("n_new", n_new, f"the head has {total} rows; give 0 to {total}")
    if n_new in (0, total):
        return 1.0
    norms = head.weight.norm(dim=1)
    old, new = float(norms[: total - n_new].mean()), float(norms[total - n_new :].mean())
    if not (0 < old < float("inf") and 0 < new < float("inf")):
        warnings.warn(
            f"weight alignment skipped: mean row norms are {old} (old classes) and {new} (new classes)",
            stacklevel=2,
        )
        return 1.0
    head.weight[total - n_new :] *= old / new
    return old / new
