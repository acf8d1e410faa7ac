// The entries of csrc/cuda for test_cuda_operators.py.
#include "../../csrc/cuda/gemm/gemm.h"
#include "../../csrc/cuda/packed.h"

namespace {

// The convolution with its packed weights reordered into `memory`.
void conv_gemm(const fdda::PackedConv& conv, void* memory, fdda::cuda::GemmTile tile) {
  const int64_t depth = conv.kernel_h * conv.kernel_w * conv.channels;
  const auto weights = fdda::cuda::gemm_weights(conv.bits, conv.out_channels, depth, memory);
  fdda::cuda::reorder_weights(conv.weight, conv.bits, depth, weights, nullptr);
  fdda::cuda::conv_gemm(conv, weights, tile, nullptr);
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

int64_t gemm_weight_bytes(int bits, int64_t channels, int64_t depth) {
  return fdda::cuda::gemm_weight_bytes(bits, channels, depth);
}

void reorder_weights(const uint8_t* packed, int bits, int64_t channels, int64_t depth,
                     void* memory) {
  fdda::cuda::reorder_weights(packed, bits, depth,
                              fdda::cuda::gemm_weights(bits, channels, depth, memory), nullptr);
}

void conv_gemm_128x128(const fdda::PackedConv* conv, void* memory) {
  conv_gemm(*conv, memory, fdda::cuda::GemmTile::k128x128);
}

void conv_gemm_32x64(const fdda::PackedConv* conv, void* memory) {
  conv_gemm(*conv, memory, fdda::cuda::GemmTile::k32x64);
}
}
