"""Bytes that an operator's kernel takes and gives back before it returns: unfolded images, reordered weights.

Between operators nothing of them is left, so no dispatch ledger and no trace sees them; a convolution on the
CPU can hold more than its inputs and outputs together. How much depends on shapes, strides, dtypes, threads
and the libraries that torch was built with. So it is measured: the operators whose kernels are known to hold
memory run again, alone, on zeros of the same layout, in a process of their own, under the allocator's
account, and the answer is kept. All others are counted and not run. On CUDA, where cuDNN takes its workspaces
so, they run in this process and reset the device's peak statistics, and so only plans do it there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memspan.ledger.invocation import Invocation, invocation
from memspan.ledger.probe import Held, ask, measure

__all__ = [
    "HALVES",
    "MIXED",
    "ON_CUDA",
    "SCRATCH",
    "UNEVEN",
    "UNKNOWN",
    "held_by",
    "invocation",
    "kind_of",
    "may_hold",
    "scratch_bytes",
]

SCRATCH, MIXED, ON_CUDA, HALVES, UNEVEN, UNKNOWN = 4, 8, 16, 32, 64, 128
"""Flags of an operator: its kernel holds scratch; it does where its inputs differ in dtype; it does on CUDA
(a sum over many rows); it does with 16-bit inputs (laid out anew for the processor's tiles); it does where an
input is not dense; nobody knows (an operator of another library)."""

_PRODUCTS = frozenset(("mm", "addmm", "bmm", "baddbmm", "dot", "mv", "addmv"))
_HOLDS = """
    _adaptive_avg_pool2d_backward _adaptive_avg_pool3d_backward _batch_norm_with_update _cdist_backward
    _cdist_forward _chunk_cat _ctc_loss_backward _embedding_bag _embedding_bag_backward
    _embedding_bag_per_sample_weights_backward _fft_c2c _fft_c2r _fft_r2c
    _grid_sampler_2d_cpu_fallback_backward _histogramdd_from_bin_cts _histogramdd_from_bin_tensors
    _index_put_impl_ _linalg_check_errors _linalg_det _linalg_eigh _linalg_eigvals _linalg_slogdet
    _linalg_solve_ex _linalg_svd _native_batch_norm_legit _pdist_backward _pdist_forward _safe_softmax
    _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention_for_cpu_backward
    _segment_reduce_backward _trilinear _unique _unique2 _unsafe_index_put _unsafe_masked_index
    _unsafe_masked_index_put_accumulate _upsample_bilinear2d_aa _upsample_bilinear2d_aa_backward
    _upsample_nearest_exact1d _upsample_nearest_exact1d_backward _upsample_nearest_exact2d
    _upsample_nearest_exact2d_backward _weight_norm_interface _weight_norm_interface_backward
    adaptive_max_pool2d_backward adaptive_max_pool3d_backward all allclose any avg_pool2d_backward
    avg_pool3d_backward batch_norm_backward binary_cross_entropy binary_cross_entropy_backward
    binary_cross_entropy_with_logits bincount cdist cholesky_inverse cholesky_solve convolution
    convolution_backward count_nonzero cumsum dist fractional_max_pool2d_backward
    fractional_max_pool3d_backward gather geqrf grid_sampler_2d_backward grid_sampler_3d_backward histc
    histogram huber_loss index_add index_put_ index_reduce isin isinf kthvalue ldexp linalg_cholesky_ex
    linalg_eig linalg_eigvals linalg_householder_product linalg_inv_ex linalg_ldl_factor_ex linalg_lstsq
    linalg_lu linalg_lu_factor_ex linalg_lu_solve linalg_matrix_exp linalg_pinv linalg_qr
    linalg_vector_norm logsumexp masked_scatter_backward masked_select max_pool2d_with_indices_backward
    max_pool3d_with_indices_backward mean median mkldnn_rnn_layer mkldnn_rnn_layer_backward mode
    mse_loss multilabel_margin_loss_backward multilabel_margin_loss_forward multinomial mvlgamma
    nanmedian native_batch_norm native_batch_norm_backward native_dropout_backward
    native_group_norm_backward native_layer_norm_backward normal reflection_pad1d_backward
    reflection_pad2d_backward reflection_pad3d_backward renorm repeat repeat_interleave
    replication_pad1d_backward replication_pad2d_backward replication_pad3d_backward roll
    rrelu_with_noise scatter scatter_add scatter_reduce smooth_l1_loss soft_margin_loss
    soft_margin_loss_backward sort std sum topk unfold_backward upsample_bicubic2d
    upsample_bicubic2d_backward upsample_bilinear2d upsample_bilinear2d_backward upsample_linear1d
    upsample_linear1d_backward upsample_nearest1d upsample_nearest1d_backward upsample_nearest2d
    upsample_nearest2d_backward upsample_nearest3d upsample_nearest3d_backward upsample_trilinear3d
    upsample_trilinear3d_backward var
    """  # found by running every operator of torch 2.13 that has samples; see the tests
_HOLDS_UNEVEN = """
    _log_softmax_backward_data _softmax_backward_data channel_shuffle embedding_dense_backward
    index_select linalg_solve_triangular masked_scatter ormqr pixel_shuffle pixel_unshuffle tril triu
    """  # these copy an input that is not dense
_NEVER_ON_CUDA = """
    copy_ clone _to_copy embedding native_dropout cat stack fill_ zero_ bernoulli_ uniform_ normal_ random_
    select_backward slice_backward lift_fresh _local_scalar_dense is_pinned set_ resize_ arange item equal
    detach_ _unsafe_view _reshape_copy
    """
_TABLES = {names: frozenset(names.split()) for names in (_HOLDS, _HOLDS_UNEVEN, _NEVER_ON_CUDA)}
_BEFORE = ("_foreach", "_fused", "empty", "new_", "ones", "zeros", "full")
_BY_VALUES = frozenset(
    tag
    for name in ("dynamic_output_shape", "data_dependent_output", "inplace_view")
    if (tag := getattr(torch.Tag, name, None)) is not None
)
_SILENT = frozenset(("aten", "prim", "prims", "c10d", "_c10d_functional", "profiler", "fsdp", "inductor"))


def kind_of(operator: Any) -> int:
    """What an operator's kernel may hold: flags, or 0 for those that hold nothing worth the name.

    Example:
        >>> kind_of(torch.ops.aten.convolution.default) == SCRATCH, kind_of(torch.ops.aten.cat.default)
        (True, 0)
    """
    space = getattr(operator, "namespace", "")
    if space not in _SILENT:
        ours = torch._library.custom_ops.OPDEFS.get(operator._schema.name) if space == "memspan" else None
        return SCRATCH if ours is not None else UNKNOWN
    if space != "aten" or operator.is_view:
        return 0
    name = operator._schema.name.removeprefix("aten::")
    if name in _TABLES[_HOLDS]:
        return SCRATCH
    if name in _PRODUCTS:
        return HALVES | UNEVEN | ON_CUDA
    shaped = not _BY_VALUES.intersection(operator.tags) and not name.startswith(_BEFORE)
    kind = ON_CUDA if shaped and name not in _TABLES[_NEVER_ON_CUDA] else 0
    if torch.Tag.pointwise in operator.tags:
        return MIXED  # on CUDA too, nothing else is taken
    return kind | UNEVEN if name in _TABLES[_HOLDS_UNEVEN] else kind


def may_hold(kind: int, args: tuple[Any, ...], cuda: bool) -> bool:
    """Whether a call of an operator of this kind may hold scratch.

    Example:
        >>> may_hold(ON_CUDA, (torch.zeros(2),), cuda=False)
        False
        >>> may_hold(UNEVEN, (torch.zeros(1).expand(2),), cuda=False)
        True
    """
    if kind & (SCRATCH | UNKNOWN) or (cuda and kind & ON_CUDA):
        return True
    if kind & HALVES and not cuda and any(_is_half(one) for one in args):
        return True
    if kind & UNEVEN and any(isinstance(one, Tensor) and not _is_dense(one) for one in args):
        return True
    if not kind & MIXED or len(args) < 2:
        return False
    one, other = args[0], args[1]
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return False
    if one.dtype is other.dtype:
        return False
    # The kernel casts a copy of the one whose dtype is not the result's; a single number costs nothing.
    return other.dim() > 0 or torch.result_type(one, other) is not one.dtype


def scratch_bytes(one: Invocation, max_bytes: int) -> int | None:
    """Bytes that the kernel holds at most beyond what it was given and what it returns.

    Args:
        one: the call.
        max_bytes: do not run it where its arguments alone take more.

    Returns:
        None where it was not run (too large, or of another library), or could not be.

    Example:
        >>> x, w = torch.zeros(2, 8, 9, 9), torch.zeros(4, 8, 3, 3)
        >>> call = (x, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
        >>> scratch_bytes(invocation(torch.ops.aten.convolution.default, call, None), 10) is None
        True
    """
    held = held_by(one, max_bytes)
    return None if held is None else held.scratch


def held_by(one: Invocation, max_bytes: int) -> Held | None:
    """As :func:`scratch_bytes`, with the sizes of what the call returns."""
    setting: tuple[Any, ...] = (torch.get_num_threads(), torch.backends.mkldnn.enabled)
    cuda = one.device == "cuda"
    if cuda:
        if not torch.cuda.is_available():
            return None
        chosen = torch.backends.cudnn
        setting = (chosen.enabled, chosen.benchmark, chosen.deterministic, chosen.allow_tf32)
    key = (one, setting)
    if key in _measured:
        return _measured[key]
    if one.nbytes > max_bytes or kind_of(one.operator) == UNKNOWN:
        return None
    if cuda and torch._C._autograd._profiler_enabled():
        return None
    _measured[key] = measure(one) if cuda else ask(one)
    return _measured[key]


_measured: dict[Any, Held | None] = {}


def _is_half(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype.itemsize == 2


def _is_dense(tensor: Tensor) -> bool:
    """Whether a kernel can walk it as it lies: contiguous, or a matrix (or stack of them) turned over."""
    return tensor.is_contiguous() or (tensor.dim() > 1 and tensor.mT.is_contiguous())
