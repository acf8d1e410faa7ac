// Residuals of the packed convolutions on AVX-512.
#pragma once

#include <immintrin.h>

#include "functions.h"
#include "row_tiles.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

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
