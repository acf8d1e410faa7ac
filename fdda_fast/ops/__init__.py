"""Operators of fdda-fast: `torch.library` definitions, a PyTorch reference and fast kernels.

Every operator works on every device, under autograd (where it says so) and `torch.compile`.
"""

from fdda_fast.ops import _library, reference
from fdda_fast.ops._library import backend_info
from fdda_fast.ops.bn_relu_class_moments import bn_relu_class_moments
from fdda_fast.ops.bn_relu_fake_quantize import bn_relu_fake_quantize
from fdda_fast.ops.class_moments import class_moments
from fdda_fast.ops.codes import (
    dequantize_codes,
    dequantize_sums,
    pack_codes,
    requantize_codes_packed,
    sum_pool_codes,
    unpack_codes,
)
from fdda_fast.ops.conditional_bn import conditional_bn_lrelu
from fdda_fast.ops.conditional_bn_conv import conditional_bn_lrelu_conv3x3
from fdda_fast.ops.convolutions import conv3x3, conv3x3_few_outputs, upsample_conv3x3
from fdda_fast.ops.fake_quantize import (
    fake_quantize,
    fake_quantize_minmax,
    fake_quantize_range,
    observe_range,
)
from fdda_fast.ops.fixed_bn import (
    fixed_bn_lrelu,
    fixed_bn_lrelu_conv3x3,
    upsample_twice_conv3x3,
)
from fdda_fast.ops.linear_maps import linear_to_maps
from fdda_fast.ops.max_pool import max_pool2d
from fdda_fast.ops.packed import (
    max_pool2d_codes,
    pack_weight,
    packed_conv2d,
    packed_linear,
    quantize,
    requantize_codes,
    unpack_weight,
)
from fdda_fast.ops.reordered import reorder_weight, reordered_conv2d, reordered_linear

_library.load_extension()

__all__ = [
    "backend_info",
    "bn_relu_class_moments",
    "bn_relu_fake_quantize",
    "class_moments",
    "conditional_bn_lrelu",
    "conditional_bn_lrelu_conv3x3",
    "conv3x3",
    "conv3x3_few_outputs",
    "dequantize_codes",
    "dequantize_sums",
    "fake_quantize",
    "fake_quantize_minmax",
    "fake_quantize_range",
    "fixed_bn_lrelu",
    "fixed_bn_lrelu_conv3x3",
    "linear_to_maps",
    "max_pool2d",
    "max_pool2d_codes",
    "observe_range",
    "pack_codes",
    "pack_weight",
    "packed_conv2d",
    "packed_linear",
    "quantize",
    "reference",
    "reorder_weight",
    "reordered_conv2d",
    "reordered_linear",
    "requantize_codes",
    "requantize_codes_packed",
    "sum_pool_codes",
    "unpack_codes",
    "unpack_weight",
    "upsample_conv3x3",
    "upsample_twice_conv3x3",
]
