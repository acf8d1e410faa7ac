#include "functions.h"

namespace fdda {
namespace FDDA_ISA {

extern const Kernels kernels = {
    fake_quantize,
    fake_quantize_backward,
    fake_quantize_range,
    fake_quantize_range_backward,
    observe_range,
    bn_relu_fake_quantize,
    bn_relu_fake_quantize_backward,
    class_moments,
    class_moments_backward,
    quantize,
    requantize_codes,
    max_pool,
    sum_pool,
    pack_weight,
    unpack_weight,
    packed_conv2d,
    packed_linear_s32,
    conditional_bn,
    conditional_bn_backward,
    upsample_differences,
    upsample_sum,
    upsample_reduce,
    upsample_adjoint,
    gather_taps,
    sum_taps,
    add_parts,
    norm_strip,
    norm_strip_sums,
    norm_strip_gradient,
    linear_maps,
    linear_maps_gradient,
    max_pool2d,
    max_pool2d_gradient,
    winograd_input,
    winograd_output,
    winograd_gradient,
    winograd_weights,
    winograd_weight_gradient,
    winograd_upsample_input,
    winograd_upsample_input_gradient,
    winograd_upsample_output,
    winograd_upsample_gradient,
    winograd_upsample_weights,
    winograd_upsample_weight_gradient,
};

}  // namespace FDDA_ISA
}  // namespace fdda
