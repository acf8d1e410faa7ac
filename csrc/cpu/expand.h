// Bit planes to bytes; the layout is drawn in common/arithmetic.h.
#pragma once

#include <string.h>

#include "functions.h"

#if defined(__AVX512BW__)
#include <immintrin.h>
#endif

namespace fdda {
namespace FDDA_ISA {
namespace {

constexpr int kBlockCodes = kPanelRows * kBlockDepth;

#if defined(__AVX512BW__)
// sum plus the 64 codes of a block: one masked add a plane.
inline __attribute__((always_inline)) __m512i add_planes(__m512i sum, const uint8_t* planes,
                                                         int bits) {
#pragma GCC unroll 8
  for (int b = 0; b < bits; ++b) {
    uint64_t plane;
    memcpy(&plane, planes + b * kPlaneBytes, kPlaneBytes);
    const int weight = b == bits - 1 ? -(1 << b) : 1 << b;
    sum = _mm512_mask_add_epi8(sum, plane, sum, _mm512_set1_epi8(static_cast<char>(weight)));
  }
  return sum;
}
#endif

// The 64 codes of a block, [16 channels][4 k].
inline void expand_block(const uint8_t* planes, int bits, int8_t* codes) {
#if defined(__AVX512BW__)
  _mm512_storeu_si512(codes, add_planes(_mm512_setzero_si512(), planes, bits));
#else
  // Eight codes are the bytes of a number; no sum of theirs reaches the next byte.
  constexpr uint64_t kOnes = 0x0101010101010101, kDiagonal = 0x8040201008040201;
  for (int i = 0; i < kPlaneBytes; ++i) {
    uint64_t sum = 0;
    for (int b = 0; b < bits; ++b) {
      const uint64_t lanes = planes[b * kPlaneBytes + i] * kOnes & kDiagonal;
      const uint64_t weight = b == bits - 1 ? 256 - (1u << b) : 1u << b;
      sum += ((lanes + 0x7f * kOnes) >> 7 & kOnes) * weight;
    }
    for (int j = 0; j < 8; ++j) codes[8 * i + j] = static_cast<int8_t>(sum >> (8 * j));
  }
#endif
}

}  // namespace
}  // namespace FDDA_ISA
}  // namespace fdda
