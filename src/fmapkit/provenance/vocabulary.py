"""torch's vocabulary: names of its functions, sorted by what they do to the data.

Names are those of `provenance/functions.py`: without module, overload and the "_" of an in-place
form.
"""

from __future__ import annotations

import re

from fmapkit.reasons import Reason


def words(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


METADATA = words(
    """size dim stride numel nelement element_size is_contiguous storage_offset data_ptr
    untyped_storage storage is_floating_point is_complex get_device __len__ ndimension
    is_pinned is_shared is_inference is_conj is_neg has_names is_same_size __bool__ __repr__
    __format__ __hash__ item tolist __int__ __float__ __index__ __contains__ is_nonzero
    backward register_hook register_post_accumulate_grad_hook retain_grad is_tensor iscomplexobj
    __deepcopy__ __reduce_ex__ __array__ numpy allclose equal is_set_to
    _is_view is_signed result_type finfo iinfo"""
)
# Data that becomes something of Python's: what code does next may depend on it.
DATA_TO_PYTHON = words(
    """item tolist numpy __array__ __bool__ __int__ __float__ __complex__ __index__ __contains__
    __repr__ __format__ is_nonzero equal allclose __dlpack__"""
)
# Data that becomes the size of a tensor.
DATA_TO_SIZES = words(
    """nonzero argwhere masked_select unique unique_consecutive unique_dim _unique _unique2 bincount
    segment_reduce"""
)
FRESH = words(
    """zeros_like ones_like empty_like full_like rand_like randn_like randint_like new_zeros
    new_ones new_empty new_full new_tensor zeros ones empty full rand randn randint arange
    linspace tensor as_tensor eye bernoulli"""
)
# Quantised, values are what they were but for rounding: what quantises is no nonlinearity.
LINEAR_KEEPERS = words(
    """to type float half bfloat16 double contiguous clone detach alias requires_grad type_as
    positive neg negative cpu cuda native_dropout dropout alpha_dropout feature_dropout
    feature_alpha_dropout dropout1d dropout2d dropout3d conj conj_physical resolve_conj
    resolve_neg lift_fresh pin_memory nan_to_num _to_copy __get__.data __get__.real __get__.imag
    real imag view_as_real view_as_complex int_repr checkpoint_name
    fake_quantize_per_tensor_affine fake_quantize_per_channel_affine
    fused_moving_avg_obs_fake_quant _fused_moving_avg_obs_fq_helper
    _fake_quantize_learnable_per_tensor_affine _fake_quantize_learnable_per_channel_affine
    quantize_per_tensor quantize_per_tensor_dynamic quantize_per_channel dequantize"""
)
DROPOUTS = words(
    """dropout alpha_dropout feature_dropout feature_alpha_dropout native_dropout dropout1d
    dropout2d dropout3d bernoulli rand_like randn_like"""
)
LINEAR_BINARY = words("add sub subtract rsub __rsub__ lerp complex add_scalar")
PRODUCTS = words(
    "mul multiply div divide true_divide __rdiv__ __rtruediv__ addcmul addcdiv mul_scalar"
)
NONLINEAR_POINTWISE = words(
    """abs absolute exp exp2 expm1 log log2 log10 log1p sqrt rsqrt square pow __pow__ __rpow__
    reciprocal sign sgn floor ceil round trunc frac clamp clamp_min clamp_max clip erf erfc erfinv
    sin cos tan asin acos atan sinh cosh asinh acosh atan2 maximum minimum fmax fmin where
    masked_fill fmod remainder floor_divide heaviside logit logaddexp logaddexp2 hypot xlogy
    float_power angle polar gt lt ge le eq ne greater less greater_equal less_equal isnan isinf
    isfinite logical_not logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor
    bitwise_not __and__ __or__ __xor__ __invert__"""
)
KEEP_SHAPE = words("softmax log_softmax _softmax local_response_norm normalize")
# Batch, group and instance norms count filters along axis 1, layer and rms norms along the last.
NORM_AXIS = dict.fromkeys(
    words(
        """batch_norm group_norm instance_norm native_batch_norm native_group_norm
        batch_norm1d batch_norm2d batch_norm3d _batch_norm_impl_index cudnn_batch_norm
        local_response_norm sync_batch_norm"""
    ),
    1,
) | dict.fromkeys(["layer_norm", "rms_norm", "native_layer_norm", "fused_layer_norm"], -1)
SPATIAL = re.compile(
    r"(adaptive_|fractional_)?(max|avg|lp)_(un)?pool(?P<axes>[123])d(_with_indices)?"
    r"|pad|constant_pad_nd|re(flect|plic)(ion|ation)_pad[123]d|interpolate|upsample\w*|grid_sample"
)
RESHAPES = words(
    "view reshape flatten unflatten squeeze unsqueeze view_as reshape_as _unsafe_view ravel"
)
# They copy what they are given only if they must, which may be a matter of its shape.
MAY_COPY = words(
    """contiguous reshape reshape_as flatten ravel to type type_as float half bfloat16 double cpu
    cuda sum_to_size"""
)
REDUCTIONS = words(
    "mean sum amax amin max min std var logsumexp norm prod any all nanmean nansum median mode"
)
# Their values are those of the first operand: what else they are given says which ones.
PICKS = words("__getitem__ index_select gather take_along_dim select narrow")
# They write a source into a target, at the places that an index or a mask tells.
WRITES = words(
    """__setitem__ index_add index_copy index_put index_reduce scatter scatter_add scatter_reduce
    masked_scatter"""
)
ADDING_WRITES = words("index_add scatter_add scatter_reduce index_reduce")
CONV = re.compile(r"_?conv(_transpose)?([123]d|olution)|conv_tbc|mkldnn_convolution")
BIAS_FIRST = words("addmm addbmm baddbmm addmv _sparse_addmm")  # products that take the bias first
# Where a product may have its weight; the first operand that is one decides.
MATMULS = words(
    """matmul mm bmm __matmul__ __rmatmul__ mv addmm addbmm baddbmm addmv grouped_mm _sparse_mm
    _sparse_addmm smm"""
)
GROUPED = "grouped_mm"  # whose other arguments are no factors

# What runs several nonlinearities in one call that nobody can look into.
OPAQUE = {
    **{
        kind: Reason.FUSED_RECURRENT.text(function=f"torch.{kind}", part="gates")
        for kind in ("lstm", "gru", "lstm_cell", "gru_cell")
    },
    **{
        kind: Reason.FUSED_RECURRENT.text(function=f"torch.{kind}", part="nonlinearity")
        for kind in ("rnn_tanh", "rnn_relu", "rnn_tanh_cell", "rnn_relu_cell")
    },
    **{
        f"quantized_{kind}": Reason.FUSED_RECURRENT.text(
            function=f"a quantized {kind}", part="gates"
        )
        for kind in ("lstm", "gru")
    },
    **{
        f"quantized_{kind}_cell_dynamic": Reason.FUSED_QUANTIZED_CELL.text(kind=kind)
        for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu")
    },
    "_transformer_encoder_layer_fwd": Reason.FUSED_TRANSFORMER.text(
        function="encoder layer", part="nonlinearity"
    ),
    "_native_multi_head_attention": Reason.FUSED_TRANSFORMER.text(
        function="attention", part="projections"
    ),
}
