"""The operators that a stage may name: a fixed list of aten overloads, all pure.

A stage comes from the network, and aten holds operators that read files, draw random numbers or write into their
arguments; so a name is looked up here and nowhere else. The list covers what `torch.export` makes of torchvision's
classification models and of transformer encoders, and what is common around them. To add one, check that it is
deterministic, writes into nothing, reads nothing but its arguments and cannot read outside of them
(`as_strided` and `empty` are left out for that), and add its name.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import torch

_ELEMENTWISE = """
    abs.default acos.default add.Scalar add.Tensor addcdiv.default addcmul.default asin.default atan.default atan2.default
    bitwise_and.Scalar bitwise_and.Tensor bitwise_not.default bitwise_or.Scalar bitwise_or.Tensor bitwise_xor.Tensor
    ceil.default celu.default clamp.default clamp.Tensor clamp_max.default clamp_max.Tensor clamp_min.default clamp_min.Tensor
    cos.default cosh.default div.Scalar div.Scalar_mode div.Tensor div.Tensor_mode elu.default
    eq.Scalar eq.Tensor erf.default erfc.default exp.default exp2.default expm1.default floor.default floor_divide.default
    floor_divide.Scalar fmod.Scalar fmod.Tensor frac.default ge.Scalar ge.Tensor gelu.default glu.default gt.Scalar gt.Tensor
    hardshrink.default hardsigmoid.default hardswish.default hardtanh.default isfinite.default isinf.default isnan.default
    le.Scalar le.Tensor leaky_relu.default lerp.Scalar lerp.Tensor log.default log10.default log1p.default log2.default
    log_sigmoid.default logical_and.default logical_not.default logical_or.default logical_xor.default
    lt.Scalar lt.Tensor masked_fill.Scalar masked_fill.Tensor max.other maximum.default min.other minimum.default mish.default
    mul.Scalar mul.Tensor nan_to_num.default ne.Scalar ne.Tensor neg.default pow.Scalar pow.Tensor_Scalar pow.Tensor_Tensor
    prelu.default reciprocal.default relu.default relu6.default remainder.Scalar remainder.Tensor round.default round.decimals
    rsqrt.default rsub.Scalar rsub.Tensor selu.default sigmoid.default sign.default silu.default sin.default sinh.default
    softplus.default softshrink.default sqrt.default square.default sub.Scalar sub.Tensor
    tan.default tanh.default threshold.default trunc.default where.default where.self where.Scalar where.ScalarOther
    where.ScalarSelf xlogy.Tensor special_erf.default
"""
_REDUCTIONS = """
    all.default all.dim amax.default amin.default any.default any.dim argmax.default argmin.default argsort.default
    cumsum.default linalg_vector_norm.default log_softmax.int logsumexp.default max.default max.dim mean.default
    mean.dim min.default min.dim norm.ScalarOpt_dim prod.default prod.dim_int softmax.int sort.default std.correction
    std.dim sum.default sum.dim_IntList topk.default var.correction var.dim var_mean.correction
    _log_softmax.default _softmax.default _safe_softmax.default
"""
_LAYERS = """
    adaptive_avg_pool1d.default adaptive_avg_pool2d.default _adaptive_avg_pool2d.default adaptive_max_pool2d.default
    addmm.default avg_pool1d.default avg_pool2d.default avg_pool3d.default baddbmm.default batch_norm.default bilinear.default
    bmm.default constant_pad_nd.default
    conv1d.default conv1d.padding conv2d.default conv2d.padding conv3d.default conv3d.padding conv_transpose1d.default
    conv_transpose2d.input conv_transpose3d.input convolution.default cosine_similarity.default einsum.default
    embedding.default group_norm.default instance_norm.default layer_norm.default linear.default matmul.default
    max_pool1d.default max_pool2d.default max_pool2d_with_indices.default max_pool3d.default mm.default mv.default
    native_group_norm.default native_layer_norm.default _native_batch_norm_legit_no_training.default
    pad.default pixel_shuffle.default pixel_unshuffle.default channel_shuffle.default
    reflection_pad1d.default reflection_pad2d.default replication_pad2d.default rms_norm.default
    scaled_dot_product_attention.default _scaled_dot_product_flash_attention_for_cpu.default dot.default outer.default
    upsample_bicubic2d.default upsample_bicubic2d.vec upsample_bilinear2d.default upsample_bilinear2d.vec
    upsample_nearest2d.default upsample_nearest2d.vec gather.default lstm.input gru.input rnn_tanh.input rnn_relu.input
"""
_SHAPES = """
    _to_copy.default _unsafe_view.default alias.default broadcast_to.default cat.default chunk.default clone.default concat.default
    contiguous.default diagonal.default expand.default expand_as.default flatten.using_ints flip.default
    index.Tensor index_select.default movedim.int movedim.intlist permute.default
    repeat.default repeat_interleave.self_int reshape.default reshape_as.default roll.default select.int select_scatter.default
    slice.Tensor slice_scatter.default split.Tensor split.sizes split_with_sizes.default squeeze.default squeeze.dim squeeze.dims
    stack.default swapaxes.default swapdims.default t.default tensor_split.sections tile.default transpose.int tril.default
    triu.default type_as.default unbind.int unflatten.int unfold.default unsqueeze.default view.default view_as.default
    to.device to.dtype to.dtype_layout to.other mT.default numpy_T.default permute_copy.default
    index_put.default scatter.src scatter.value scatter_add.default copy.default fill.Scalar fill.Tensor zero.default
"""
_CREATION = """
    arange.default arange.start arange.start_step eye.default eye.m full.default full_like.default linspace.default
    new_full.default new_ones.default new_zeros.default one_hot.default ones.default ones_like.default scalar_tensor.default
    zeros.default zeros_like.default meshgrid.default meshgrid.indexing
"""


def _size_of(tensor: torch.Tensor, dim: int) -> int:
    return tensor.size(dim)


# Their schemas do not say so, but in training they write to their running statistics, which are weights, or draw random numbers.
IMPURE_IN_TRAINING = frozenset(
    f"aten.{name}"
    for name in (
        "batch_norm.default", "instance_norm.default", "scaled_dot_product_attention.default",
        "_scaled_dot_product_flash_attention_for_cpu.default", "lstm.input", "gru.input", "rnn_tanh.input", "rnn_relu.input",
    )
)  # fmt: skip
TRAINING_FLAGS = ("train", "training", "use_input_stats", "dropout_p")

# Sizes are Python ints; a plain function is all they need.
_ON_SIZES: dict[str, Callable[..., Any]] = {
    "aten.sym_size.int": _size_of,
    "operator.add": operator.add,
    "operator.sub": operator.sub,
    "operator.mul": operator.mul,
    "operator.floordiv": operator.floordiv,
    "operator.mod": operator.mod,
    "operator.neg": operator.neg,
}


def _overload(name: str) -> torch._ops.OpOverload | None:
    packet, overload = name.split(".")
    return getattr(getattr(torch.ops.aten, packet, None), overload, None)


def _table() -> dict[str, Callable[..., Any]]:
    names = " ".join((_ELEMENTWISE, _REDUCTIONS, _LAYERS, _SHAPES, _CREATION)).split()
    overloads = {f"aten.{name}": _overload(name) for name in names}
    # A torch that lacks one of them refuses the stages that name it, not all stages.
    return {name: overload for name, overload in overloads.items() if overload is not None} | _ON_SIZES


ELEMENTWISE = frozenset(f"aten.{name}" for name in _ELEMENTWISE.split())
OPERATORS: MappingProxyType[str, Callable[..., Any]] = MappingProxyType(_table())

DTYPES: MappingProxyType[str, torch.dtype] = MappingProxyType(
    {
        name: getattr(torch, name)
        for name in ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64")
    }
)
MEMORY_FORMATS: MappingProxyType[str, torch.memory_format] = MappingProxyType(
    {name: getattr(torch, name) for name in ("contiguous_format", "preserve_format", "channels_last", "channels_last_3d")}
)
LAYOUTS: MappingProxyType[str, torch.layout] = MappingProxyType({"strided": torch.strided})
