// How large the operands and results of a packed convolution may be.
#pragma once

#include <string.h>

#include "functions.h"
#include "parallel.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

// Largest |weight_offset|.
inline int64_t largest_offset(const PackedConv& conv) {
  int64_t largest = 0;
  for (int64_t o = 0; o < conv.out_channels; ++o) {
    const int64_t offset = conv.weight_offset[o];
    largest = max64(largest, offset < 0 ? -offset : offset);
  }
  return largest;
}

// Upper bound of |weight| as the panels hold them.
inline int64_t largest_weight(const PackedConv& conv) {
  const int64_t half = int64_t{1} << (conv.bits - 1);
  int64_t largest = half;
  for (int64_t o = 0; o < conv.out_channels && conv.weight_fits_s8; ++o) {
    const int64_t offset = conv.weight_offset[o];
    largest = max64(largest, max64(half - offset, half - 1 + offset));
  }
  return largest;
}

// Of the inputs and their zero point, which pads them; at least 1.
inline int64_t largest_code(const PackedConv& conv) {
  uint8_t largest = static_cast<uint8_t>(max64(1, conv.x_zero_point));
  const int64_t size = conv.batch * conv.height * conv.width * conv.channels;
  parallel_for(size, 65536, [&](int64_t begin, int64_t end) {
    uint8_t own = 0;
    for (int64_t i = begin; i < end; ++i) own = conv.x[i] > own ? conv.x[i] : own;
    uint8_t seen = __atomic_load_n(&largest, __ATOMIC_RELAXED);
    while (seen < own && !__atomic_compare_exchange_n(&largest, &seen, own, true, __ATOMIC_RELAXED,
                                                      __ATOMIC_RELAXED)) {
    }
  });
  return largest;
}

// Of |values|. As numbers, the bits of floats without signs have the same order; NaN is the
// largest.
inline float largest_magnitude(const float* values, int64_t n) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    memcpy(&bits, values + i, sizeof bits);
    bits &= 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  float value;
  memcpy(&value, &largest, sizeof value);
  return value;
}

// Whether results are codes and, before they are rounded, within int32: then packing saturates them
// as clamping would. False if they cannot be bounded.
inline bool rounds_within_int32(const PackedConv& conv, float largest_sum) {
  const Epilogue& e = conv.epilogue;
  if (!e.out_u8 || e.residual_f32) return false;
  const float scaled = largest_sum * largest_magnitude(e.multiplier, conv.out_channels);
  const float bias = largest_magnitude(e.bias, conv.out_channels);
  return scaled + bias + 255.0f * largest_magnitude(&e.residual_scale, 1) < 1e9f;
}

}  // namespace
}  // namespace FDDA_ISA
}  // namespace fdda
