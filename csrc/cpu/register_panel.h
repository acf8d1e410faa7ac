// Float32 sums of a matrix product in registers: some rows of a, times a panel of columns of b.
#pragma once

#include "functions.h"
#include "row_tiles.h"
#include "vectors.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

constexpr int kVectors = 2;
constexpr int64_t kPanel = kVectors * kVectorLanes;  // columns
#if defined(__AVX512F__)
constexpr int kRows = 12;  // 12 * 2 sums, 2 vectors of b
#else
constexpr int kRows = 4;
#endif

// sum[r, n] += a[r * row] * b[n]
template <int ROWS>
inline void add_outer_product(const float* a, int64_t row, const float* b,
                              Vector (&sum)[ROWS][kVectors]) {
  Vector columns[kVectors];
  for (int v = 0; v < kVectors; ++v) columns[v] = load_lanes<Vector>(b + v * kVectorLanes);
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sum[r][v] = multiply_add(a[r * row], columns[v], sum[r][v]);
  }
}

}  // namespace
}  // namespace FDDA_ISA
}  // namespace fdda
