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

  static void sum_rows(const Input* rows, int64_t stride, int64_t depth, int64_t count,
                       const PackedConv&, int32_t* sums) {
    for (; count > 0; --count, rows += stride, ++sums) {
      *sums = 0;
      for (int64_t i = 0; i < depth; ++i) *sums += rows[i];
    }
  }
};

}  // namespace
}  // namespace FDDA_ISA
}  // namespace fdda
