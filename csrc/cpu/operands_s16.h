// Operands of the packed convolutions in int16: inputs minus their zero point, and weights.
#pragma once

#include <string.h>

#include "functions.h"
#include "packed_driver.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

struct S16Operands : SimplePolicy {
  using Input = int16_t;
  using Weight = int16_t;
  static constexpr bool kReadsInput = false;

  static void copy(Input* out, const uint8_t* x, int64_t n, const PackedConv& conv) {
    const int zero = conv.x_zero_point;
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<int16_t>(x[i] - zero);
  }

  static void pad(Input* out, int64_t n, const PackedConv&) { memset(out, 0, n * sizeof(Input)); }

  static int32_t row_sum(const Input* row, int64_t depth, const PackedConv&) {
    int32_t sum = 0;
    for (int64_t i = 0; i < depth; ++i) sum += row[i];
    return sum;
  }
};

}  // namespace
}  // namespace FDDA_ISA
}  // namespace fdda
