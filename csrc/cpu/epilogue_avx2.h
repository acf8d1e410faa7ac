// Epilogue of the packed convolutions on 256-bit registers.
#pragma once

#include "operand_ranges.h"
#include "weights_avx2.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

// The low halves of 8 int64.
inline __m256i narrow(const int64_t* from) {
  const __m256 low = _mm256_castsi256_ps(load(from)), high = _mm256_castsi256_ps(load(from + 4));
  const __m256d both = _mm256_castps_pd(_mm256_shuffle_ps(low, high, 0x88));
  return _mm256_castpd_si256(_mm256_permute4x64_pd(both, 0xd8));
}

// Whether sums with the offsets' share, offset * row sum, fit int32.
inline bool totals_fit_s32(const PackedConv& conv) {
  const int64_t largest = 128 + (conv.weight_fits_s8 ? 0 : largest_offset(conv));
  const int64_t depth = conv.kernel_h * conv.kernel_w * conv.channels / conv.groups;
  return largest <= INT32_MAX / 255 / max64(1, depth);
}

// Sums of a panel, [rows][16], which belong to rows of the output from `row` on.
struct Sums {
  const int32_t* sums;
  const int32_t* row_sums;  // of these rows, or null: offsets are in the weights
  int64_t row, rows, channel;
};

// All channels of a panel; totals fit int32.
void store_panel(const PackedConv& conv, const Sums& s) {
  const Epilogue& e = conv.epilogue;
  const int64_t channel = s.channel;
  const int32_t* sums = s.sums;
  const __m256 multiplier[2] = {_mm256_loadu_ps(e.multiplier + channel),
                                _mm256_loadu_ps(e.multiplier + channel + kHalf)};
  const __m256 bias[2] = {_mm256_loadu_ps(e.bias + channel),
                          _mm256_loadu_ps(e.bias + channel + kHalf)};
  const __m256 scale = _mm256_set1_ps(e.residual_scale);
  const __m256 lo = _mm256_set1_ps(e.lo), hi = _mm256_set1_ps(e.hi);
  int64_t index = s.row * conv.out_channels + channel;
  for (int64_t r = 0; r < s.rows; ++r, sums += kPanelRows, index += conv.out_channels) {
    __m256 v[2];
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      __m256i total = load(sums + h * kHalf);
      if (s.row_sums) {
        const __m256i offset = narrow(conv.weight_offset + channel + h * kHalf);
        const __m256i sum = _mm256_set1_epi32(s.row_sums[r]);
        total = _mm256_add_epi32(total, _mm256_mullo_epi32(offset, sum));
      }
      v[h] = _mm256_add_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(total), multiplier[h]), bias[h]);
      if (e.residual_u8) {
        const void* from = e.residual_u8 + index + h * kHalf;
        const __m256i x = _mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(from)));
        v[h] = _mm256_add_ps(v[h], _mm256_mul_ps(_mm256_cvtepi32_ps(x), scale));
      }
      if (e.residual_f32) {
        const __m256 x = _mm256_loadu_ps(e.residual_f32 + index + h * kHalf);
        v[h] = _mm256_add_ps(v[h], _mm256_mul_ps(x, scale));
      }
      if (!e.out_u8) _mm256_storeu_ps(e.out_f32 + index + h * kHalf, v[h]);
    }
    if (!e.out_u8) continue;
    __m256i code[2];
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      code[h] = _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(v[h], lo), hi));
    }
    const __m256i words = _mm256_packs_epi32(code[0], code[1]);  // 0-3, 8-11 | 4-7, 12-15
    const __m256i order = _mm256_permute4x64_epi64(words, 0xd8);
    const __m128i bytes =
        _mm_packus_epi16(_mm256_castsi256_si128(order), _mm256_extracti128_si256(order, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(e.out_u8 + index), bytes);
  }
}

// `count` channels of a panel.
void store_sums(const PackedConv& conv, const Sums& s, int64_t count, bool totals_fit) {
  if (count == kPanelRows && totals_fit) return store_panel(conv, s);
  for (int64_t r = 0; r < s.rows; ++r) {
    for (int64_t channel = s.channel; channel < s.channel + count; ++channel) {
      const int64_t offset = s.row_sums ? conv.weight_offset[channel] * s.row_sums[r] : 0;
      const int64_t sum = s.sums[r * kPanelRows + channel - s.channel];
      store_output(conv.epilogue, (s.row + r) * conv.out_channels + channel, channel, sum + offset);
    }
  }
}

}  // namespace
}  // namespace FDDA_ISA
}  // namespace fdda
