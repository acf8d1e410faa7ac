// Arguments of the operators on codes, and of those into and out of them.
#pragma once

#include <stdint.h>

namespace fdda {

struct Quantize {
  const float* x;  // [batch, channels, height, width] with any strides, in elements
  int64_t batch, channels, height, width;
  int64_t stride_n, stride_c, stride_h, stride_w;
  float scale, zero_point;
  int bits;
  uint8_t* out;  // NHWC
};

struct RequantizeCodes {
  const uint8_t* x;  // code u stands for (u - x_zero_point) / x_scale
  int64_t count;
  float x_scale, x_zero_point, scale, zero_point;
  int bits;
  uint8_t* out;
};

struct DequantizeCodes {
  const uint8_t* x;
  int64_t count;
  float scale, zero_point;
  float* out;  // (x - zero_point) / scale
};

// In double, rounded once.
struct DequantizeSums {
  const int32_t* x;
  int64_t count;
  double divisor, zero_point;
  float* out;  // (x - zero_point) / divisor
};

// NHWC tensors.
struct PoolShape {
  int64_t batch, height, width, channels, out_height, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
};

struct MaxPool {
  PoolShape shape;
  const uint8_t* x;
  uint8_t* out;
};

// Sums of codes over the pixels of an image.
struct SumPool {
  const uint8_t* x;  // [batch, pixels, channels]
  int64_t batch, pixels, channels;
  int32_t* out;  // [batch, channels]
};

}  // namespace fdda
