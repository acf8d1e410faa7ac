"""Triton kernels. `fdda_fast.ops` registers those of `OPERATORS` for CUDA devices that have no
compiled kernel there.
"""

from fdda_fast.kernels import (
    bn_fake_quantize,
    class_moments,
    conditional_bn,
    convolution,
    fake_quantize,
    minmax,
    packed,
    upsample_conv,
)

# fdda::name -> its implementation; its arguments are those of the schema.
OPERATORS = {
    "bn_relu_class_moments": class_moments.bn_relu_class_moments,
    "bn_relu_class_moments_backward": class_moments.bn_relu_class_moments_backward,
    "bn_relu_fake_quantize": bn_fake_quantize.bn_relu_fake_quantize,
    "bn_relu_fake_quantize_backward": bn_fake_quantize.bn_relu_fake_quantize_backward,
    "class_moments": class_moments.class_moments,
    "class_moments_backward": class_moments.class_moments_backward,
    "conditional_bn_lrelu": conditional_bn.conditional_bn_lrelu,
    "conditional_bn_lrelu_backward": conditional_bn.conditional_bn_lrelu_backward,
    "conv3x3_few_outputs": convolution.conv3x3_few_outputs,
    "conv3x3_few_outputs_backward": convolution.conv3x3_few_outputs_backward,
    "fake_quantize": fake_quantize.fake_quantize,
    "fake_quantize_backward": fake_quantize.fake_quantize_backward,
    "fake_quantize_minmax": minmax.fake_quantize_minmax,
    "fake_quantize_range": fake_quantize.fake_quantize_range,
    "fake_quantize_range_backward": fake_quantize.fake_quantize_range_backward,
    "observe_range": minmax.observe_range,
    "packed_conv2d": packed.packed_conv2d,
    "packed_linear": packed.packed_linear,
    "unpack_weight": packed.unpack_weight,
    "upsample_conv3x3": upsample_conv.upsample_conv3x3,
    "upsample_conv3x3_backward": upsample_conv.upsample_conv3x3_backward,
}
