// The epilogue's steps of the packed convolutions on AVX-512.
#pragma once

#include <immintrin.h>

#include "functions.h"
#include "row_tiles.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

// v plus what the epilogue has at index .. index + 15.
inline __m512 add_residual(const Epilogue& e, __m512 v, int64_t index, __mmask16 mask) {
  if (e.residual_u8) {
    const __m512 scale = _mm512_set1_ps(e.residual_scale);
    const __m128i r = _mm_maskz_loadu_epi8(mask, e.residual_u8 + index);
    v = _mm512_add_ps(v, _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(r)), scale));
  }
  if (e.residual_f32) {
    const __m512 scale = _mm512_set1_ps(e.residual_scale);
    v = _mm512_add_ps(v, _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, e.residual_f32 + index), scale));
  }
  return v;
}

// Codes of at least lo: of v[0] in the low half, of v[1] in the high one. v fits int32.
inline __m512i round_codes(const __m512 (&v)[2][2], __m512i lo) {
  const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  __m512i q[4];
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    q[k] = _mm512_cvt_roundps_epi32(v[k / 2][k % 2], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  // The packs' low end is 0; then comes lo.
  const __m512i bytes =
      _mm512_packus_epi16(_mm512_packs_epi32(q[0], q[1]), _mm512_packs_epi32(q[2], q[3]));
  return _mm512_permutexvar_epi32(order, _mm512_max_epu8(bytes, lo));
}

// The same between lo and hi. Values beyond hi might exceed int32, which turns them negative.
inline __m512i pack_codes(const __m512 (&v)[2][2], __m512 hi, __m512i lo) {
  __m512 low[2][2];
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) low[k / 2][k % 2] = _mm512_min_ps(hi, v[k / 2][k % 2]);
  return round_codes(low, lo);
}

}  // namespace
}  // namespace FDDA_ISA
}  // namespace fdda
