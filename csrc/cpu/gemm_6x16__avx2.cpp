// Packed convolution on AVX2: vpmaddubsw where sums of its int16 results are exact, else vpmaddwd.

#include "operands_s16.h"
#include "packed_avx2.h"
#include "winograd_avx2.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

// u8 x s8. vpmaddubsw adds two products with saturation; `exact_steps` such results, each at most
// 2 * largest weight * largest code, fit the int16 in which they are added before they are widened.
struct U8S8 : U8S8Operands {
  static constexpr bool kWidens = true;
  int64_t exact_steps;

  static U8S8 of_ranges(int64_t weight, int64_t code) { return {{}, 32767 / (2 * weight * code)}; }

  static bool exact(int64_t weight, int64_t code) {
    return of_ranges(weight, code).exact_steps > 0;
  }

  static __m256i product(__m256i x, __m256i w) { return _mm256_maddubs_epi16(x, w); }

  static __m256i add(__m256i sum, __m256i x, __m256i w) {
    return _mm256_add_epi16(sum, product(x, w));
  }

  static __m256i widened(__m256i sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }

  void gemm(const Tile<U8S8>& t) const { gemm_panels(*this, t); }
};

// Weights as [depth / 2][16][2] s16.
struct S16 : S16Operands {
  static constexpr bool kWidens = false;

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

  static void gemm(const Tile<S16>& t) { gemm_panels(S16(), t); }
};

}  // namespace

const char* packed_conv2d(const PackedConv& conv) {
  if (conv.groups == conv.channels && conv.groups == conv.out_channels) {
    depthwise_conv2d(conv);
    return "depthwise";
  }
  const int64_t weight = largest_weight(conv), code = largest_code(conv);
  const U8S8 policy = U8S8::of_ranges(weight, code);
  if (Winograd<U8S8, Tiles2x2>::run(conv, weight, code)) return "winograd";
  if (policy.exact_steps > 1) {
    Driver<U8S8>(conv, policy).run();
  } else {  // where a single step would be exact, int16 is as fast
    Driver<S16>(conv).run();
  }
  return "direct";
}

}  // namespace FDDA_ISA
}  // namespace fdda
