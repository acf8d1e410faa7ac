"""Triton kernels. `fdda_fast.ops` registers `OPERATORS` for CUDA devices."""

from fdda_fast.kernels import class_moments, fake_quantize, minmax

# fdda::name -> its implementation; its arguments are those of the schema.
OPERATORS = {
    "bn_relu_class_moments": class_moments.bn_relu_class_moments,
    "bn_relu_class_moments_backward": class_moments.bn_relu_class_moments_backward,
    "class_moments": class_moments.class_moments,
    "class_moments_backward": class_moments.class_moments_backward,
    "fake_quantize": fake_quantize.fake_quantize,
    "fake_quantize_backward": fake_quantize.fake_quantize_backward,
    "fake_quantize_minmax": minmax.fake_quantize_minmax,
    "fake_quantize_range": fake_quantize.fake_quantize_range,
}
