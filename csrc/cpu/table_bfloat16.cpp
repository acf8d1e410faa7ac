#include "functions.h"

namespace fdda {
namespace FDDA_ISA {

void take_bfloat16(Kernels& kernels) {
  kernels.bn_relu_fake_quantize = bn_relu_fake_quantize;
  kernels.bn_relu_fake_quantize_backward = bn_relu_fake_quantize_backward;
  kernels.class_moments = class_moments;
  kernels.class_moments_backward = class_moments_backward;
  kernels.gather_taps = gather_taps;
  kernels.sum_taps = sum_taps;
  kernels.norm_strip = norm_strip;
  kernels.norm_strip_sums = norm_strip_sums;
  kernels.norm_strip_gradient = norm_strip_gradient;
  kernels.norm_few_outputs_sums = norm_few_outputs_sums;
  kernels.norm_few_outputs_gradient = norm_few_outputs_gradient;
  kernels.products = products;
  kernels.product_bfloat16 = product_bfloat16;
  kernels.winograd_bfloat16 = winograd_bfloat16;
  kernels.winograd_bfloat16_gradient = winograd_bfloat16_gradient;
  kernels.winograd_upsample_bfloat16 = winograd_upsample_bfloat16;
  kernels.winograd_upsample_bfloat16_gradient = winograd_upsample_bfloat16_gradient;
}

}  // namespace FDDA_ISA
}  // namespace fdda
