// Arguments of the packed integer kernels. Every tensor is dense, activations are NHWC.
#pragma once

#include <stdint.h>

#include "arithmetic.h"

namespace fdda {

// Codes below 16 may lie packed, two to a byte, in kernels that say so: of 32 adjacent channels,
// byte j has channel j in its low half and channel j + 16 in its high one.
constexpr int kPackedChannels = 32;

// What happens to an accumulator: dequantize, add the residual, store as float32 or as a code.
struct Epilogue {
  const float* multiplier;     // [O]
  const float* bias;           // [O]
  const uint8_t* residual_u8;  // [rows, O] or null
  const float* residual_f32;   // [rows, O] or null
  float residual_scale;
  uint8_t* out_u8;  // [rows, O]; null: store out_f32
  float* out_f32;
  float lo, hi;     // range of the codes
  uint8_t* out_u4;  // packed [rows, O / 2] in place of both, of the tensor cores' kernels only
};

FDDA_HOST_DEVICE static inline float add_residual(const Epilogue& e, int64_t index, float v) {
  if (e.residual_u8) v = v + static_cast<float>(e.residual_u8[index]) * e.residual_scale;
  if (e.residual_f32) v = v + e.residual_f32[index] * e.residual_scale;
  return v;
}

// From the dequantized accumulator on.
FDDA_HOST_DEVICE static inline void store_dequantized(const Epilogue& e, int64_t index, float v) {
  v = add_residual(e, index, v);
  if (e.out_u8) {
    e.out_u8[index] = requantize(v, e.lo, e.hi);
  } else {
    e.out_f32[index] = v;
  }
}

FDDA_HOST_DEVICE static inline void store_output(const Epilogue& e, int64_t index, int64_t channel,
                                                 int64_t acc) {
  store_dequantized(e, index, dequantize(acc, e.multiplier[channel], e.bias[channel]));
}

struct PackedConv {
  const uint8_t* x;  // [batch, height, width, channels]
  int64_t batch, height, width, channels;
  const uint8_t* weight;  // packed [out_channels, kernel_h * kernel_w * channels / groups]
  int bits;
  int64_t out_channels, out_height, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups;
  int32_t x_zero_point;
  const int64_t* weight_offset;  // [O]
  bool weight_fits_s8;           // code + offset is in [-128, 127] for every channel and code
  Epilogue epilogue;
  bool x_packed;  // [batch, height, width, channels / 2], for the tensor cores' kernels only
};

struct PackedLinearS32 {
  const int32_t* x;  // [rows, depth]
  int64_t rows, depth;
  const uint8_t* weight;
  int bits;
  int64_t out_features;
  int64_t x_zero_point;
  const int64_t* weight_offset;
  Epilogue epilogue;
};

// One output of a convolution, straight from its definition.
// `index` counts the elements of [batch, out_height, out_width, out_channels].
FDDA_HOST_DEVICE static inline int64_t conv_accumulator(const PackedConv& p, int64_t index) {
  const int64_t o = index % p.out_channels;
  const int64_t ow = index / p.out_channels % p.out_width;
  const int64_t oh = index / (p.out_channels * p.out_width) % p.out_height;
  const int64_t n = index / (p.out_channels * p.out_width * p.out_height);
  const int64_t depth = p.channels / p.groups;
  const int64_t first_channel = o / (p.out_channels / p.groups) * depth;
  const int64_t blocks = ceil_div(p.kernel_h * p.kernel_w * depth, kBlockDepth);
  int32_t products = 0;  // sum (x - zx) * q
  int32_t inputs = 0;    // sum (x - zx)
  for (int64_t kh = 0; kh < p.kernel_h; ++kh) {
    const int64_t ih = oh * p.stride_h - p.pad_h + kh * p.dilation_h;
    if (ih < 0 || ih >= p.height) continue;
    for (int64_t kw = 0; kw < p.kernel_w; ++kw) {
      const int64_t iw = ow * p.stride_w - p.pad_w + kw * p.dilation_w;
      if (iw < 0 || iw >= p.width) continue;
      const uint8_t* pixel =
          p.x + ((n * p.height + ih) * p.width + iw) * p.channels + first_channel;
      for (int64_t c = 0; c < depth; ++c) {
        const int32_t value = pixel[c] - p.x_zero_point;
        const int64_t k = (kh * p.kernel_w + kw) * depth + c;
        products += value * packed_code(p.weight, p.bits, blocks, o, k);
        inputs += value;
      }
    }
  }
  return products + p.weight_offset[o] * inputs;
}

FDDA_HOST_DEVICE static inline int64_t linear_accumulator(const PackedLinearS32& p, int64_t index) {
  const int64_t o = index % p.out_features;
  const int32_t* x = p.x + index / p.out_features * p.depth;
  const int64_t blocks = ceil_div(p.depth, kBlockDepth);
  int64_t products = 0;
  int64_t inputs = 0;
  for (int64_t k = 0; k < p.depth; ++k) {
    const int64_t value = x[k] - p.x_zero_point;
    products += value * packed_code(p.weight, p.bits, blocks, o, k);
    inputs += value;
  }
  return products + p.weight_offset[o] * inputs;
}

}  // namespace fdda
