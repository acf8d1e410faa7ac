"""Every operator in plain PyTorch: the definition the kernels are tested against.

Signatures are those of the `fdda::` schemas. Integer results are exact: sums run in float64 where
they stay below 2^53, else in int64.
"""

from fdda_fast.ops.reference.bn_relu_fake_quantize import (
    bn_relu_fake_quantize,
    bn_relu_fake_quantize_backward,
)
from fdda_fast.ops.reference.class_moments import (
    bn_relu_class_moments,
    bn_relu_class_moments_backward,
    class_moments,
    class_moments_backward,
)
from fdda_fast.ops.reference.codes import (
    PACKED_CHANNELS,
    dequantize_codes,
    dequantize_sums,
    pack_codes,
    requantize_codes_packed,
    sum_pool_codes,
    unpack_codes,
)
from fdda_fast.ops.reference.conditional_bn import (
    conditional_bn_lrelu,
    conditional_bn_lrelu_backward,
)
from fdda_fast.ops.reference.convolutions import (
    conv3x3,
    conv3x3_few_outputs,
    conv3x3_few_outputs_backward,
    conv3x3_input_gradient,
    conv3x3_weight_gradient,
    upsample_conv3x3,
    upsample_conv3x3_backward,
)
from fdda_fast.ops.reference.fake_quantize import (
    fake_quantize,
    fake_quantize_backward,
    fake_quantize_minmax,
    fake_quantize_range,
    fake_quantize_range_backward,
    observe_range,
)
from fdda_fast.ops.reference.linear_maps import linear_to_maps, linear_to_maps_backward
from fdda_fast.ops.reference.max_pool import max_pool2d, max_pool2d_backward
from fdda_fast.ops.reference.packed import (
    BLOCK_DEPTH,
    PANEL_ROWS,
    max_pool2d_codes,
    pack_weight,
    packed_conv2d,
    packed_linear,
    quantize,
    requantize_codes,
    unpack_weight,
)
from fdda_fast.ops.reference.reordered import file_weight, reorder_weight, reordered_conv2d

__all__ = [
    "BLOCK_DEPTH",
    "PACKED_CHANNELS",
    "PANEL_ROWS",
    "bn_relu_class_moments",
    "bn_relu_class_moments_backward",
    "bn_relu_fake_quantize",
    "bn_relu_fake_quantize_backward",
    "class_moments",
    "class_moments_backward",
    "conditional_bn_lrelu",
    "conditional_bn_lrelu_backward",
    "conv3x3",
    "conv3x3_few_outputs",
    "conv3x3_few_outputs_backward",
    "conv3x3_input_gradient",
    "conv3x3_weight_gradient",
    "dequantize_codes",
    "dequantize_sums",
    "fake_quantize",
    "fake_quantize_backward",
    "fake_quantize_minmax",
    "fake_quantize_range",
    "fake_quantize_range_backward",
    "file_weight",
    "linear_to_maps",
    "linear_to_maps_backward",
    "max_pool2d",
    "max_pool2d_backward",
    "max_pool2d_codes",
    "observe_range",
    "pack_codes",
    "pack_weight",
    "packed_conv2d",
    "packed_linear",
    "quantize",
    "reorder_weight",
    "reordered_conv2d",
    "requantize_codes",
    "requantize_codes_packed",
    "sum_pool_codes",
    "unpack_codes",
    "unpack_weight",
    "upsample_conv3x3",
    "upsample_conv3x3_backward",
]
