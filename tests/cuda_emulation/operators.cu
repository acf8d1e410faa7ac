// The entries of csrc/cuda for the tests.
#include "../../csrc/cuda/codes.h"
#include "../../csrc/cuda/packed.h"
#include "../../csrc/cuda/pools.h"
#include "../../csrc/cuda/reordered.h"

namespace {

// The convolution with its packed weights reordered into `memory`.
void conv_gemm(const fdda::PackedConv& conv, void* memory, fdda::cuda::GemmTile tile, int x_bits,
               int compute_capability) {
  const int64_t depth = conv.kernel_h * conv.kernel_w * conv.channels;
  const auto weights = fdda::cuda::gemm_weights(conv.bits, conv.out_channels, depth, memory);
  const auto operands = fdda::cuda::gemm_operands(conv, x_bits, compute_capability);
  fdda::cuda::reorder_weights(conv.weight, conv.bits, depth, weights, nullptr);
  fdda::cuda::conv_gemm(conv, weights, tile, operands, nullptr);
}

}  // namespace

extern "C" {

void packed_conv2d(const fdda::PackedConv* conv) { fdda::cuda::packed_conv2d(*conv, nullptr); }

void packed_linear_s32(const fdda::PackedLinearS32* linear) {
  fdda::cuda::packed_linear_s32(*linear, nullptr);
}

bool gemm_takes(const fdda::PackedConv* conv) { return fdda::cuda::gemm_takes(*conv); }

bool gemm_tile_is_large(const fdda::PackedConv* conv) {
  return fdda::cuda::gemm_tile(*conv) == fdda::cuda::GemmTile::k128x128;
}

int gemm_operands(const fdda::PackedConv* conv, int x_bits, int compute_capability) {
  return static_cast<int>(fdda::cuda::gemm_operands(*conv, x_bits, compute_capability));
}

int64_t reordered_bytes(int bits, int64_t channels, int64_t depth, bool depthwise) {
  return fdda::cuda::reordered_bytes(bits, channels, depth, depthwise);
}

void reorder_weight(const uint8_t* packed, int bits, int64_t channels, int64_t depth,
                    bool depthwise, uint8_t* reordered) {
  fdda::cuda::reorder_weight(packed, bits, channels, depth, depthwise, reordered, nullptr);
}

// conv->weight is reordered.
void reordered_conv2d(const fdda::PackedConv* conv, int x_bits, int compute_capability) {
  fdda::cuda::reordered_conv2d(*conv, conv->weight, x_bits, compute_capability, nullptr);
}

// The same, some images at a time.
void conv_gemm_of_images(const fdda::PackedConv* conv, int x_bits, int compute_capability,
                         int64_t at_once) {
  const int64_t depth = conv->kernel_h * conv->kernel_w * conv->channels;
  const auto weights = fdda::cuda::gemm_weights(conv->bits, conv->out_channels, depth,
                                                const_cast<uint8_t*>(conv->weight));
  fdda::cuda::conv_gemm_of_images(*conv, weights, x_bits, compute_capability, at_once, nullptr);
}

int64_t images_at_once(const fdda::PackedConv* conv) { return fdda::cuda::images_at_once(*conv); }

void conv_gemm_128x128(const fdda::PackedConv* conv, void* memory, int x_bits,
                       int compute_capability) {
  conv_gemm(*conv, memory, fdda::cuda::GemmTile::k128x128, x_bits, compute_capability);
}

void conv_gemm_32x64(const fdda::PackedConv* conv, void* memory, int x_bits,
                     int compute_capability) {
  conv_gemm(*conv, memory, fdda::cuda::GemmTile::k32x64, x_bits, compute_capability);
}

void quantize(const fdda::Quantize* a) { fdda::cuda::quantize(*a, nullptr); }

void requantize_codes(const fdda::RequantizeCodes* a) { fdda::cuda::requantize_codes(*a, nullptr); }

void requantize_codes_packed(const fdda::RequantizeCodes* a) {
  fdda::cuda::requantize_codes_packed(*a, nullptr);
}

void dequantize_codes(const fdda::DequantizeCodes* a) { fdda::cuda::dequantize_codes(*a, nullptr); }

void dequantize_sums(const fdda::DequantizeSums* a) { fdda::cuda::dequantize_sums(*a, nullptr); }

void max_pool(const fdda::MaxPool* a) { fdda::cuda::max_pool(*a, nullptr); }

void sum_pool(const fdda::SumPool* a) { fdda::cuda::sum_pool(*a, nullptr); }
}
