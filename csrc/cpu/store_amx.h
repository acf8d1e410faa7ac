// Epilogue of the tiles' sums.
#pragma once

#include "packed_avx512.h"
#include "tiles_amx.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

// Up to kWide channels.
struct Channels {
  int64_t first, count;
  int64_t largest_sum;  // bound of its absolute value; with the offsets' share it may leave int32
  alignas(kLineBytes) int32_t weight_sums[kWide];
};

// Outputs that follow each other, of which those beyond the end of their row do not exist.
struct Outputs {
  int64_t row, column;  // of the first one; rows are counted over the images
  int64_t width;        // of a row
  int64_t count;
  const int32_t* sums;      // [count][kWide], and memory for one more
  const int32_t* row_sums;  // [count], or null: offsets are in the weights
};

// Whether no value of the epilogue reaches int32's limits, which rounding would wrap.
inline bool fits_s32(const PackedConv& conv, const Channels& channels) {
  const Epilogue& e = conv.epilogue;
  const float largest_sum = static_cast<float>(channels.largest_sum);
  bool fits = !e.residual_f32 && __builtin_fabsf(e.residual_scale) < 0x1p20f;
  for (int64_t o = channels.first; o < channels.first + channels.count; ++o) {
    fits = fits && __builtin_fabsf(e.multiplier[o]) * largest_sum < 0x1p28f &&
           __builtin_fabsf(e.bias[o]) < 0x1p28f;
  }
  return fits;
}

// Stores outputs a few at a time, so that tiles multiply meanwhile.
template <bool FLOAT>
class Store {
 public:
  Store(const PackedConv& conv, const Channels& channels)
      : conv_(conv),
        e_(conv.epilogue),
        channels_(channels),
        mask_(~uint32_t{0} >> (kWide - channels.count)) {
    for (int p = 0; p < 2; ++p) {
      const int64_t channel = channels.first + p * kPanelRows;
      const __mmask16 half = static_cast<__mmask16>(mask_ >> (p * kPanelRows));
      multiplier_[p] = _mm512_maskz_loadu_ps(half, e_.multiplier + channel);
      bias_[p] = _mm512_maskz_loadu_ps(half, e_.bias + channel);
      const int64_t* from = conv.weight_offset + channel;
      const __mmask8 low = static_cast<__mmask8>(half), high = half >> 8;
      offset_[p] = _mm512_inserti64x4(
          _mm512_castsi256_si512(_mm512_cvtepi64_epi32(_mm512_maskz_loadu_epi64(low, from))),
          _mm512_cvtepi64_epi32(_mm512_maskz_loadu_epi64(high, from + 8)), 1);
    }
  }

  // What is left of the outputs before, then these. The weights' sums are known by now.
  void start(const Outputs& outputs) {
    finish();
    o_ = outputs;
    left_ = o_.count;
    const int64_t before = o_.row * conv_.out_width + min64(o_.column, conv_.out_width);
    index_ = before * conv_.out_channels + channels_.first;
    for (int p = 0; p < 2; ++p) {
      start_[p] = _mm512_mullo_epi32(_mm512_load_si512(channels_.weight_sums + p * kPanelRows),
                                     _mm512_set1_epi32(-conv_.x_zero_point));
    }
  }

  void finish() { some(left_); }

  // Up to so many pairs of the outputs.
  void some(int64_t pairs) {
    if (left_ <= 0 || pairs <= 0) return;
    if (o_.row_sums && channels_.largest_sum > INT32_MAX) {
      while (left_ > 0) next_wide();
    } else if (e_.residual_u8 || e_.residual_f32) {
      store_pairs<true>(pairs);
    } else {
      store_pairs<false>(pairs);
    }
  }

 private:
  // Of a pair, one or both may not exist.
  template <bool RESIDUAL>
  __attribute__((noinline)) void store_pairs(int64_t pairs) {
    // Copies: stores of bytes might change members.
    const Epilogue e = e_;
    const bool starts = conv_.x_zero_point != 0;
    const int64_t width = o_.width, out_width = conv_.out_width, channels = conv_.out_channels;
    const __mmask32 mask = mask_;
    const __mmask16 halves[2] = {static_cast<__mmask16>(mask),
                                 static_cast<__mmask16>(mask >> kPanelRows)};
    const __m512 multiplier[2] = {multiplier_[0], multiplier_[1]};
    const __m512 bias[2] = {bias_[0], bias_[1]};
    const __m512 top = _mm512_set1_ps(e.hi);
    const __m512i lo = _mm512_set1_epi8(static_cast<char>(static_cast<int>(e.lo)));
    const int32_t* from = o_.sums;
    const int32_t* row_sums = o_.row_sums;
    int64_t left = left_, index = index_, column = o_.column;
    for (; pairs > 0 && left > 0; --pairs, left -= 2, from += 2 * kWide) {
      const bool first = column < out_width;
      column = column + 1 < width ? column + 1 : 0;
      const bool second = column < out_width && left > 1;
      column = column + 1 < width ? column + 1 : 0;
      const int64_t above = index;
      index += first ? channels : 0;
      const int64_t below = second ? index : above;  // an output that exists
      index += second ? channels : 0;
      __m512 values[2][2];
      each([&](int k) {
        __m512& v = values[k / 2][k % 2];
        __m512i sum = _mm512_load_si512(from + k * kPanelRows);
        if (starts) sum = _mm512_add_epi32(sum, start_[k % 2]);
        if (row_sums) {
          const __m512i inputs = _mm512_set1_epi32(k < 2 || second ? row_sums[k / 2] : 0);
          sum = _mm512_add_epi32(sum, _mm512_mullo_epi32(inputs, offset_[k % 2]));
        }
        v = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), multiplier[k % 2]);
        v = _mm512_add_ps(v, bias[k % 2]);
        const int64_t at = (k < 2 ? above : below) + k % 2 * kPanelRows;
        if (RESIDUAL) v = add_residual(e, v, at, halves[k % 2]);
        if (FLOAT && (k < 2 ? first : second)) {
          _mm512_mask_storeu_ps(e.out_f32 + at, halves[k % 2], v);
        }
      });
      if (row_sums) row_sums += 2;
      if (FLOAT) continue;
      const __m512i codes = pack_codes(values, top, lo);
      if (first) _mm256_mask_storeu_epi8(e.out_u8 + above, mask, _mm512_castsi512_si256(codes));
      if (second) {
        _mm256_mask_storeu_epi8(e.out_u8 + below, mask, _mm512_extracti64x4_epi64(codes, 1));
      }
    }
    o_.sums = from;
    o_.row_sums = row_sums;
    o_.column = column;
    left_ = left;
    index_ = index;
  }

  template <class Body>
  static __attribute__((always_inline)) void each(Body body) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) body(k);
  }

  // One output in int64.
  void next_wide() {
    if (o_.column < conv_.out_width) {
      for (int64_t j = 0; j < channels_.count; ++j) {
        const int64_t channel = channels_.first + j;
        const int64_t start = -conv_.x_zero_point * int64_t{channels_.weight_sums[j]};
        store_output(e_, index_ + j, channel,
                     o_.sums[j] + start + conv_.weight_offset[channel] * *o_.row_sums);
      }
      index_ += conv_.out_channels;
    }
    o_.column = o_.column + 1 < o_.width ? o_.column + 1 : 0;
    o_.sums += kWide;
    ++o_.row_sums;
    --left_;
  }

  const PackedConv& conv_;
  const Epilogue e_;
  const Channels& channels_;
  const __mmask32 mask_;
  __m512 multiplier_[2], bias_[2];
  __m512i start_[2], offset_[2];
  Outputs o_{};
  int64_t left_ = 0, index_ = 0;
};

enum class Residual { kNone, kCodes, kFloats };

// What Store does, where all kWide channels exist and offsets are in the weights; codes must fit
// int32 before they are rounded, unless the residual is in floats. Its constants stay in registers
// while tiles multiply: the processor does both at once, which it does not around a call.
template <bool FLOAT, Residual RESIDUAL>
class StoreAll {
 public:
  static bool applies(const PackedConv& conv, const Channels& channels) {
    const Epilogue& e = conv.epilogue;
    return channels.count == kWide && conv.weight_fits_s8 && (e.out_u8 == nullptr) == FLOAT &&
           (e.residual_u8 != nullptr) == (RESIDUAL == Residual::kCodes) &&
           (e.residual_f32 != nullptr) == (RESIDUAL == Residual::kFloats) &&
           (FLOAT || RESIDUAL == Residual::kFloats || fits_s32(conv, channels));
  }

  StoreAll(const PackedConv& conv, const Channels& channels)
      : channels_(channels),
        e_(conv.epilogue),
        out_width_(conv.out_width),
        out_channels_(conv.out_channels),
        x_zero_point_(conv.x_zero_point),
        scale_(_mm512_set1_ps(e_.residual_scale)),
        top_(_mm512_set1_ps(e_.hi)),
        lo_(_mm512_set1_epi8(static_cast<char>(static_cast<int>(e_.lo)))),
        hi_(_mm512_set1_epi8(static_cast<char>(static_cast<int>(e_.hi)))) {
    for (int p = 0; p < 2; ++p) {
      multiplier_[p] = _mm512_loadu_ps(e_.multiplier + channels.first + p * kPanelRows);
      bias_[p] = _mm512_loadu_ps(e_.bias + channels.first + p * kPanelRows);
    }
  }

  void start(const Outputs& outputs) {
    finish();
    sums_ = outputs.sums;
    left_ = outputs.count;
    width_ = outputs.width;
    column_ = outputs.column;
    index_ =
        (outputs.row * out_width_ + min64(column_, out_width_)) * out_channels_ + channels_.first;
    for (int p = 0; p < 2; ++p) {
      start_[p] = _mm512_mullo_epi32(_mm512_load_si512(channels_.weight_sums + p * kPanelRows),
                                     _mm512_set1_epi32(-x_zero_point_));
    }
  }

  void finish() { some(left_); }

  inline __attribute__((always_inline)) void some(int64_t pairs) {
    for (; pairs > 0 && left_ > 0; --pairs, left_ -= 2, sums_ += 2 * kWide) {
      const bool first = next(), second = next() && left_ > 1;
      const int64_t above = index_;
      index_ += first ? out_channels_ : 0;
      const int64_t below = second ? index_ : above;  // an output that exists
      index_ += second ? out_channels_ : 0;
      __m512 values[2][2];
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        __m512i sum = _mm512_load_si512(sums_ + k * kPanelRows);
        sum = _mm512_add_epi32(sum, start_[k % 2]);
        __m512 v = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), multiplier_[k % 2]);
        v = _mm512_add_ps(v, bias_[k % 2]);
        const int64_t at = (k < 2 ? above : below) + k % 2 * kPanelRows;
        if (RESIDUAL == Residual::kCodes) {
          const __m128i r = _mm_loadu_si128(reinterpret_cast<const __m128i*>(e_.residual_u8 + at));
          v = _mm512_add_ps(v, _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(r)), scale_));
        }
        if (RESIDUAL == Residual::kFloats) {
          v = _mm512_add_ps(v, _mm512_mul_ps(_mm512_loadu_ps(e_.residual_f32 + at), scale_));
        }
        if (FLOAT && (k < 2 ? first : second)) _mm512_storeu_ps(e_.out_f32 + at, v);
        values[k / 2][k % 2] = v;
      }
      if (FLOAT) continue;
      const __m512i codes = RESIDUAL == Residual::kFloats
                                ? pack_codes(values, top_, lo_)
                                : _mm512_min_epu8(round_codes(values, lo_), hi_);
      if (first) store_codes(above, _mm512_castsi512_si256(codes));
      if (second) store_codes(below, _mm512_extracti64x4_epi64(codes, 1));
    }
  }

 private:
  // Whether the output exists; goes on to the next one.
  bool next() {
    const bool exists = column_ < out_width_;
    column_ = column_ + 1 < width_ ? column_ + 1 : 0;
    return exists;
  }

  void store_codes(int64_t index, __m256i codes) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(e_.out_u8 + index), codes);
  }

  const Channels& channels_;
  const Epilogue e_;
  const int64_t out_width_, out_channels_;
  const int32_t x_zero_point_;
  const __m512 scale_, top_;
  const __m512i lo_, hi_;
  __m512 multiplier_[2], bias_[2];
  __m512i start_[2] = {};
  const int32_t* sums_ = nullptr;
  int64_t left_ = 0, width_ = 1, column_ = 0, index_ = 0;
};

}  // namespace
}  // namespace FDDA_ISA
}  // namespace fdda
