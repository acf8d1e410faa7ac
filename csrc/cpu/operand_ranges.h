// How large the operands of a packed convolution may be.
#pragma once

#include "functions.h"
#include "parallel.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

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

}  // namespace
}  // namespace FDDA_ISA
}  // namespace fdda
