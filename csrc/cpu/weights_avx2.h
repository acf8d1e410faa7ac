// Weights of the packed convolutions on 256-bit registers: a panel of 16 channels is two registers
// wide.
#pragma once

#include <immintrin.h>
#include <string.h>

#include "functions.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

constexpr int kHalf = 8;  // channels of a register of sums

inline __m256i load(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}

inline void store(void* to, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(to), v); }

// 4 bytes of inputs, in all lanes.
inline __m256i broadcast(const void* x) {
  int32_t v;
  memcpy(&v, x, sizeof v);
  return _mm256_set1_epi32(v);
}

// Sums of 4 adjacent s8, as int32.
inline __m256i sum_of_fours(__m256i v) {
  return _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), v), _mm256_set1_epi16(1));
}

// Offsets of channels 8 * half .. 8 * half + 7, 4 times each.
inline __m256i spread_offsets(const int8_t* offset, int half) {
  const void* from = offset + half * kHalf;
  const __m128i o = _mm_loadl_epi64(static_cast<const __m128i*>(from));
  return _mm256_mullo_epi32(_mm256_cvtepu8_epi32(o), _mm256_set1_epi32(0x01010101));
}

// One block's weights of 8 channels, 4 inputs each.
template <int BITS>
inline __m256i expand_half(const uint8_t* planes, int half, __m256i offset) {
  const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201u));
  const __m256i spread =
      _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  planes += half * kPlaneBytes / 2;
  __m256i w = offset;
#pragma GCC unroll 8
  for (int b = 0; b < BITS; ++b, planes += kPlaneBytes) {
    const int weight = b == BITS - 1 ? -(1 << b) : 1 << b;
    const __m256i bytes = _mm256_shuffle_epi8(broadcast(planes), spread);
    const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit);
    w = _mm256_add_epi8(w, _mm256_and_si256(set, _mm256_set1_epi8(static_cast<char>(weight))));
  }
  return w;
}

// sink(low, high) for each block: weights of channels 0-7 and 8-15.
template <int BITS, class Sink>
void expand_blocks(const uint8_t* planes, int64_t depth, const int8_t* offset, Sink sink) {
  const __m256i offsets[2] = {spread_offsets(offset, 0), spread_offsets(offset, 1)};
  const int64_t panel_bytes = ceil_div(depth, kBlockDepth) * BITS * kPlaneBytes;
  for (int64_t k = 0; k < depth; k += kBlockDepth, planes += BITS * kPlaneBytes) {
    __m256i w[2] = {expand_half<BITS>(planes, 0, offsets[0]),
                    expand_half<BITS>(planes, 1, offsets[1])};
    _mm_prefetch(planes + panel_bytes, _MM_HINT_T1);  // likely the next panel to be expanded
    if (depth - k < kBlockDepth) {                    // padding weighs 0, not `offset`
      const __m256i valid = _mm256_set1_epi32((1 << 8 * (depth - k)) - 1);
      w[0] = _mm256_and_si256(w[0], valid);
      w[1] = _mm256_and_si256(w[1], valid);
    }
    sink(w[0], w[1]);
  }
}

template <class Sink>
void expand_panel(int bits, const uint8_t* planes, int64_t depth, const int8_t* offset, Sink sink) {
  switch (bits) {
    case 2: return expand_blocks<2>(planes, depth, offset, sink);
    case 3: return expand_blocks<3>(planes, depth, offset, sink);
    case 4: return expand_blocks<4>(planes, depth, offset, sink);
    case 5: return expand_blocks<5>(planes, depth, offset, sink);
    case 6: return expand_blocks<6>(planes, depth, offset, sink);
    case 7: return expand_blocks<7>(planes, depth, offset, sink);
    case 8: return expand_blocks<8>(planes, depth, offset, sink);
  }
}

}  // namespace
}  // namespace FDDA_ISA
}  // namespace fdda
