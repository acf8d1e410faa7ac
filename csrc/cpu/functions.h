// The kernels of one instruction set. Sources that include this are compiled once per rung, with
// FDDA_ISA naming the rung; they avoid library templates, whose merged copies could be called on a
// processor that lacks the rung's instructions.
#pragma once

#include "kernels.h"

namespace fdda {
namespace FDDA_ISA {

void fake_quantize(const FakeQuantize&);
void fake_quantize_backward(const FakeQuantizeBackward&);
void fake_quantize_range(const FakeQuantizeRange&);
void fake_quantize_range_backward(const FakeQuantizeRangeBackward&);
void observe_range(const ObserveRange&);
void bn_relu_fake_quantize(const BnReluFakeQuantize&);
void bn_relu_fake_quantize_backward(const BnReluFakeQuantizeBackward&);
void class_moments(const ClassMoments&);
void class_moments_backward(const ClassMomentsBackward&);
void quantize(const Quantize&);
void requantize_codes(const RequantizeCodes&);
void max_pool(const MaxPool&);
void sum_pool(const SumPool&);
void pack_weight(const PackWeight&);
void unpack_weight(const UnpackWeight&);
const char* packed_conv2d(const PackedConv&);
void packed_linear_s32(const PackedLinearS32&);
void conditional_bn(const ConditionalBn&);
void conditional_bn_backward(const ConditionalBnBackward&);
void upsample_differences(const UpsampleDifferences&);
void upsample_sum(const UpsampleSum&);
void upsample_reduce(const UpsampleReduce&);
void upsample_adjoint(const UpsampleAdjoint&);
void gather_taps(const GatherTaps&);
void sum_taps(const SumTaps&);
void add_parts(const AddParts&);
void norm_strip(const NormStrip&);
void norm_strip_sums(const NormStripSums&);
void norm_strip_gradient(const NormStripGradient&);
void norm_few_outputs_sums(const NormFewOutputsSums&);
void norm_few_outputs_gradient(const NormFewOutputsGradient&);
void products(const Products&);
void product_bfloat16(const ProductBFloat16&);
void linear_maps(const LinearMaps&);
void linear_maps_gradient(const LinearMapsGradient&);
void max_pool2d(const MaxPool2d&);
void max_pool2d_gradient(const MaxPool2dGradient&);
void winograd_input(const WinogradTiles&);
void winograd_output(const WinogradTiles&);
void winograd_gradient(const WinogradTiles&);
void winograd_weights(const WinogradWeights&);
void winograd_weight_gradient(const WinogradWeights&);
void winograd_bfloat16(const WinogradBFloat16&);
void winograd_bfloat16_gradient(const WinogradBFloat16Gradient&);
void winograd_upsample_bfloat16(const WinogradBFloat16&);
void winograd_upsample_bfloat16_gradient(const WinogradBFloat16Gradient&);
void winograd_upsample_input(const WinogradTiles&);
void winograd_upsample_input_gradient(const WinogradTiles&);
void winograd_upsample_output(const WinogradTiles&);
void winograd_upsample_norm_output(const WinogradNormTiles&);
void winograd_upsample_gradient(const WinogradGradientTiles&);
void winograd_upsample_weights(const WinogradWeights&);
void winograd_upsample_weight_gradient(const WinogradWeights&);
void winograd_upsample_panels(const WinogradWeights&);
void upsample_norm(const UpsampleNorm&);
void upsample_norm_taps(const UpsampleNormTaps&);

// Groups of one channel in, one channel out.
void depthwise_conv2d(const PackedConv&);

// Of avx512 and avx512vnni, for codes up to kLargestCode. False if it does not apply, be it because
// there are larger codes than `code`: then the outputs are still to be computed, all of them.
constexpr int kLargestCode = 63;
bool winograd_conv2d(const PackedConv&, int64_t code);
// The same for weights up to 2 and codes up to 7, and for weights up to 14 and codes up to 15; of
// avx512vnni.
bool winograd_f3_conv2d(const PackedConv&);
bool winograd_f4_conv2d(const PackedConv&);
// The same of packed_linear_s32; of avx512vnni.
bool linear_s32_by_bytes(const PackedLinearS32&);

}  // namespace FDDA_ISA

static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace fdda
