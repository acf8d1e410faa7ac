// Convolutions on weights in the kernels' order; pointers are device pointers.
#pragma once

#include "depthwise.h"
#include "gemm/gemm.h"

namespace fdda {
namespace cuda {

static inline bool is_depthwise(const PackedConv& conv) {
  return conv.groups > 1 && conv.groups == conv.channels && conv.groups == conv.out_channels;
}

// Of the reordered weights, which start at a multiple of 16.
static inline int64_t reordered_bytes(int bits, int64_t channels, int64_t depth, bool depthwise) {
  return depthwise ? depthwise_weight_bytes(channels, depth)
                   : gemm_weight_bytes(bits, channels, depth);
}

static inline void reorder_weight(const uint8_t* packed, int bits, int64_t channels, int64_t depth,
                                  bool depthwise, uint8_t* reordered, cudaStream_t stream) {
  if (depthwise) {
    return reorder_depthwise_weights(packed, bits, channels, depth, reordered, stream);
  }
  reorder_weights(packed, bits, depth, gemm_weights(bits, channels, depth, reordered), stream);
}

// Whether the kernels below have the convolution.
static inline bool reordered_takes(const PackedConv& conv) {
  return is_depthwise(conv) || gemm_takes(conv);
}

// conv.weight is not read: `reordered` stands for it. Inputs are below 2^x_bits.
static inline void reordered_conv2d(const PackedConv& conv, const uint8_t* reordered, int x_bits,
                                    int compute_capability, cudaStream_t stream) {
  if (is_depthwise(conv)) return depthwise_conv2d(conv, reordered, stream);
  const int64_t depth = conv.kernel_h * conv.kernel_w * conv.channels;
  const GemmWeights weights =
      gemm_weights(conv.bits, conv.out_channels, depth, const_cast<uint8_t*>(reordered));
  const Operands operands = gemm_operands(conv, x_bits, compute_capability);
  conv_gemm(conv, weights, gemm_tile(conv), operands, stream);
}

}  // namespace cuda
}  // namespace fdda
