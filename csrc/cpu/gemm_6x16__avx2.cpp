// Packed convolution on AVX2: vpmaddubsw where sums of its int16 results are exact, else vpmaddwd.

#include "operands_s16.h"
#include "packed_avx2.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

// u8 x s8. vpmaddubsw adds two products with saturation; `exact_steps` such results, each at most
// 2 * largest weight * largest code, fit the int16 in which they are added before they are widened.
struct U8S8 : U8S8Operands {
  static constexpr int64_t kColumns = 64;
  int64_t exact_steps;

  static __m256i add(__m256i sum, __m256i x, __m256i w) {
    return _mm256_add_epi16(sum, _mm256_maddubs_epi16(x, w));
  }

  static __m256i widened(__m256i sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }

  void gemm(const Tile<U8S8>& t) const { gemm_panels(*this, t); }
};

// Weights as [depth / 2][16][2] s16.
struct S16 : S16Operands {
  static constexpr int64_t kColumns = 64;
  static constexpr int64_t exact_steps = INT64_MAX;

  static void unpack(const PackedConv& conv, const uint8_t* planes, int64_t depth,
                     const int8_t* offset, Weight* panel, int32_t* start) {
    auto widen = [](__m128i w) { return _mm256_castsi256_ps(_mm256_cvtepi8_epi16(w)); };
    expand_panel(conv.bits, planes, depth, offset, [&](__m256i low, __m256i high) {
      const __m256i w[2] = {low, high};
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        const __m256 a = widen(_mm256_castsi256_si128(w[h]));
        const __m256 b = widen(_mm256_extracti128_si256(w[h], 1));
        const __m256d first = _mm256_castps_pd(_mm256_shuffle_ps(a, b, 0x88));
        const __m256d second = _mm256_castps_pd(_mm256_shuffle_ps(a, b, 0xdd));
        store(panel + h * 16, _mm256_castpd_si256(_mm256_permute4x64_pd(first, 0xd8)));
        store(panel + (2 + h) * 16, _mm256_castpd_si256(_mm256_permute4x64_pd(second, 0xd8)));
      }
      panel += kPanelRows * kBlockDepth;
    });
    memset(start, 0, kPanelRows * sizeof *start);
  }

  static __m256i add(__m256i sum, __m256i x, __m256i w) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(x, w));
  }

  static __m256i widened(__m256i sum) { return sum; }

  static void gemm(const Tile<S16>& t) { gemm_panels(S16(), t); }
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
  const int64_t steps = 32767 / (2 * largest_weight(conv) * largest_code(conv));
  if (steps > 1) {
    Driver<U8S8>(conv, {{}, steps}).run();
  } else {  // where a single step would be exact, int16 is as fast
    Driver<S16>(conv).run();
  }
  return "direct";
}

}  // namespace FDDA_ISA
}  // namespace fdda
