// Transposed squares of vectors.
#pragma once

#include "vectors.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

// Exchanges lane i of rows j with lane j of rows i, for all i and j that differ by STEP and more.
template <int STEP>
inline void transpose(Vector* rows) {
  if constexpr (STEP < kVectorLanes) {
    Bits first, second;  // lanes of two rows, numbered through
    for (int lane = 0; lane < kVectorLanes; ++lane) {
      first[lane] = lane & STEP ? kVectorLanes + lane - STEP : lane;
      second[lane] = first[lane] + STEP;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kVectorLanes; ++i) {
      if (i & STEP) continue;
      const Vector a = rows[i], b = rows[i + STEP];
      rows[i] = __builtin_shuffle(a, b, first);
      rows[i + STEP] = __builtin_shuffle(a, b, second);
    }
    transpose<2 * STEP>(rows);
  }
}

}  // namespace
}  // namespace FDDA_ISA
}  // namespace fdda
