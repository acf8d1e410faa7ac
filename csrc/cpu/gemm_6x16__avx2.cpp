// Packed convolution on AVX2: vpmaddubsw where sums of its int16 results are exact, else vpmaddwd.

#include "operands_s16.h"
#include "packed_avx2.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

// u8 x s8. vpmaddubsw adds two products with saturation; `steps` such results, each at most
// 2 * largest weight * largest code, fit the int16 in which they are added before they are widened.
struct U8S8 : U8S8Operands {
  static constexpr int64_t kColumns = 64;
  int64_t steps = 0;

  template <int ROWS>
  void multiply(const Input* x, int64_t stride, const Weight* w, int64_t blocks,
                __m256i (&acc)[ROWS][2]) const {
    const __m256i ones = _mm256_set1_epi16(1);
    for (int64_t k = 0; k < blocks; k += steps) {
      __m256i sums[ROWS][2] = {};
      const int64_t n = min64(steps, blocks - k);
      for (int64_t i = 0; i < n; ++i, x += kBlockDepth, w += kPanelRows * kBlockDepth) {
        const __m256i* b = reinterpret_cast<const __m256i*>(w);
        const __m256i low = _mm256_load_si256(b), high = _mm256_load_si256(b + 1);
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; ++r) {
          const __m256i a = broadcast(x + r * stride);
          sums[r][0] = _mm256_add_epi16(sums[r][0], _mm256_maddubs_epi16(a, low));
          FDDA_PIN(sums[r][0]);
          sums[r][1] = _mm256_add_epi16(sums[r][1], _mm256_maddubs_epi16(a, high));
          FDDA_PIN(sums[r][1]);
        }
      }
#pragma GCC unroll 6
      for (int r = 0; r < ROWS; ++r) {
        acc[r][0] = _mm256_add_epi32(acc[r][0], _mm256_madd_epi16(sums[r][0], ones));
        acc[r][1] = _mm256_add_epi32(acc[r][1], _mm256_madd_epi16(sums[r][1], ones));
      }
    }
  }

  void gemm(const Tile<U8S8>& t) const { gemm_tiles(*this, t); }
};

// Weights as [depth / 2][16][2] s16.
struct S16 : S16Operands {
  static constexpr int64_t kColumns = 64;

  static void unpack(const PackedConv& conv, const uint8_t* planes, int64_t depth,
                     const int8_t* offset, Weight* panel, int32_t* start) {
    auto widen = [](__m128i w) { return _mm256_castsi256_ps(_mm256_cvtepi8_epi16(w)); };
    expand_panel(conv.bits, planes, depth, offset, [&](__m256i low, __m256i high) {
      __m256i* out = reinterpret_cast<__m256i*>(panel);
      const __m256i w[2] = {low, high};
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        const __m256 a = widen(_mm256_castsi256_si128(w[h]));
        const __m256 b = widen(_mm256_extracti128_si256(w[h], 1));
        const __m256d first = _mm256_castps_pd(_mm256_shuffle_ps(a, b, 0x88));
        const __m256d second = _mm256_castps_pd(_mm256_shuffle_ps(a, b, 0xdd));
        _mm256_store_si256(out + h, _mm256_castpd_si256(_mm256_permute4x64_pd(first, 0xd8)));
        _mm256_store_si256(out + 2 + h, _mm256_castpd_si256(_mm256_permute4x64_pd(second, 0xd8)));
      }
      panel += kPanelRows * kBlockDepth;
    });
    memset(start, 0, kPanelRows * sizeof *start);
  }

  template <int ROWS>
  void multiply(const Input* x, int64_t stride, const Weight* w, int64_t blocks,
                __m256i (&acc)[ROWS][2]) const {
    for (int64_t k = 0; k < 2 * blocks; ++k, x += 2, w += 2 * kPanelRows) {
      const __m256i* b = reinterpret_cast<const __m256i*>(w);
      const __m256i low = _mm256_load_si256(b), high = _mm256_load_si256(b + 1);
#pragma GCC unroll 6
      for (int r = 0; r < ROWS; ++r) {
        const __m256i a = broadcast(x + r * stride);
        acc[r][0] = _mm256_add_epi32(acc[r][0], _mm256_madd_epi16(a, low));
        FDDA_PIN(acc[r][0]);
        acc[r][1] = _mm256_add_epi32(acc[r][1], _mm256_madd_epi16(a, high));
        FDDA_PIN(acc[r][1]);
      }
    }
  }

  void gemm(const Tile<S16>& t) const { gemm_tiles(*this, t); }
};

// Upper bound of |weight| as the panels hold them.
int64_t largest_weight(const PackedConv& conv) {
  const int64_t half = int64_t{1} << (conv.bits - 1);
  int64_t largest = half;
  for (int64_t o = 0; o < conv.out_channels && conv.weight_fits_s8; ++o) {
    const int64_t offset = conv.weight_offset[o];
    largest = max64(largest, max64(half - offset, half - 1 + offset));
  }
  return largest;
}

// Of the inputs and their zero point, which pads them; at least 1.
int64_t largest_code(const PackedConv& conv) {
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

const char* packed_conv2d(const PackedConv& conv) {
  if (conv.groups == conv.channels && conv.groups == conv.out_channels) {
    depthwise_conv2d(conv);
    return "depthwise";
  }
  const int64_t weight = largest_weight(conv);
  U8S8 policy;
  policy.steps = 32767 / (2 * weight * largest_code(conv));
  // A single step is no faster than int16.
  if (policy.steps > 1) {
    Driver<U8S8>(conv, policy).run();
  } else {
    Driver<S16>(conv).run();
  }
  return "direct";
}

}  // namespace FDDA_ISA
}  // namespace fdda
