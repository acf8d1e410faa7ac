// What the packed convolutions on AVX-512 share: register tiles of a run-time height, residuals.
#pragma once

#include <immintrin.h>

#include "functions.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

template <int ROWS>
struct Rows {
  static constexpr int kCount = ROWS;
};

// body(Rows<n>) for a run-time n of 1 to ROWS.
template <int ROWS, class Body>
void with_rows(int64_t rows, Body body) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS) {
      body(Rows<ROWS>());
    } else {
      with_rows<ROWS - 1>(rows, body);
    }
  }
}

// body(Rows<n>, first) for `count` rows in tiles of at most ROWS, all of even height: no nearly
// empty last one.
template <int ROWS, class Body>
void for_each_row_tile(int64_t count, Body body) {
  const int64_t tiles = ceil_div(count, ROWS);
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t first = i * count / tiles;
    with_rows<ROWS>((i + 1) * count / tiles - first, [&](auto rows) { body(rows, first); });
  }
}

// v plus what the epilogue has at index .. index + 15.
inline __m512 add_residual(const Epilogue& e, __m512 v, int64_t index, __mmask16 mask) {
  const __m512 scale = _mm512_set1_ps(e.residual_scale);
  if (e.residual_u8) {
    const __m128i r = _mm_maskz_loadu_epi8(mask, e.residual_u8 + index);
    v = _mm512_add_ps(v, _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(r)), scale));
  }
  if (e.residual_f32) {
    v = _mm512_add_ps(v, _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, e.residual_f32 + index), scale));
  }
  return v;
}

}  // namespace
}  // namespace FDDA_ISA
}  // namespace fdda
