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

// How many images the tensor cores' kernels take at once; 0: not even one.
static inline int64_t images_at_once(PackedConv conv) {
  while (conv.batch > 0 && !gemm_takes(conv)) conv.batch /= 2;
  return conv.batch;
}

// Whether the kernels below have the convolution.
static inline bool reordered_takes(const PackedConv& conv) {
  return is_depthwise(conv) || images_at_once(conv) > 0;
}

// The convolution of some of the images.
static inline PackedConv images_of(PackedConv conv, int64_t first, int64_t count) {
  const int64_t outputs = first * conv.out_height * conv.out_width * conv.out_channels;
  conv.x += first * conv.height * conv.width * conv.channels / (conv.x_packed ? 2 : 1);
  conv.batch = count;
  Epilogue& e = conv.epilogue;
  if (e.residual_u8) e.residual_u8 += outputs;
  if (e.residual_f32) e.residual_f32 += outputs;
  if (e.out_u8) e.out_u8 += outputs;
  if (e.out_f32) e.out_f32 += outputs;
  if (e.out_u4) e.out_u4 += outputs / 2;
  return conv;
}

static inline void conv_gemm_of_images(const PackedConv& conv, const GemmWeights& weights,
                                       int x_bits, int compute_capability, int64_t at_once,
                                       cudaStream_t stream) {
  for (int64_t first = 0; first < conv.batch; first += at_once) {
    const int64_t left = conv.batch - first;
    const PackedConv part = images_of(conv, first, left < at_once ? left : at_once);
    conv_gemm(part, weights, gemm_tile(part), gemm_operands(part, x_bits, compute_capability),
              stream);
  }
}

// conv.weight is not read: `reordered` stands for it. Inputs are below 2^x_bits.
static inline void reordered_conv2d(const PackedConv& conv, const uint8_t* reordered, int x_bits,
                                    int compute_capability, cudaStream_t stream) {
  if (is_depthwise(conv)) return depthwise_conv2d(conv, reordered, stream);
  const int64_t depth = conv.kernel_h * conv.kernel_w * conv.channels;
  const GemmWeights weights =
      gemm_weights(conv.bits, conv.out_channels, depth, const_cast<uint8_t*>(reordered));
  conv_gemm_of_images(conv, weights, x_bits, compute_capability, images_at_once(conv), stream);
}

}  // namespace cuda
}  // namespace fdda
