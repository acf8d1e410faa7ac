// A tile of a packed convolution on AVX-512, from its products to its outputs, all in registers.
#pragma once

#include "dot_avx512.h"
#include "operand_ranges.h"
#include "packed_avx512.h"
#include "parallel.h"
#include "planes_avx512.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

constexpr int kWide = 2 * kPanelRows;
constexpr int64_t kLineBytes = 64;
constexpr int64_t kFetchSteps = 32;  // between fetching lines ahead

// Every third row's next bytes: more pointers than these would not fit the registers.
template <int ROWS>
struct RowsApart {
  const uint8_t* x[(ROWS + 2) / 3];
  int64_t stride;

  RowsApart(const uint8_t* first, int64_t stride) : stride(stride) {
#pragma GCC unroll 5
    for (int r = 0; r < ROWS; r += 3) x[r / 3] = first + r * stride;
  }

  const uint8_t* operator()(int r) const { return x[r / 3] + r % 3 * stride; }

  void advance(int64_t bytes) {
#pragma GCC unroll 5
    for (int r = 0; r < ROWS; r += 3) x[r / 3] += bytes;
  }

  void next() { advance(kBlockDepth); }
};

// sum + a * b, both two s16 per 32 bits.
inline __m512i add_pairs(__m512i sum, __m512i a, __m512i b) {
#if defined(__AVX512VNNI__)
  return _mm512_dpwssd_epi32(sum, a, b);
#else
  return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
#endif
}

// What a layer's sums and epilogue may rely on.
class Range {
 public:
  explicit Range(const PackedConv& conv) {
    const int64_t depth = conv.kernel_h * conv.kernel_w * conv.channels / conv.groups;
    const int64_t offset = largest_offset(conv);
    while (255 * depth >> shift_ > INT16_MAX) ++shift_;
    const int64_t weight = offset + (int64_t{1} << (conv.bits - 1));
    splits_ = offset <= INT16_MAX >> shift_ && weight <= INT32_MAX / (255 * max64(depth, 1));
    narrow_ =
        rounds_within_int32(conv, 255.0f * static_cast<float>(depth) * static_cast<float>(weight));
    if (offset == 0 || !splits_) return;
    const int64_t padded = ceil_div(conv.out_channels, kWide) * kWide + kWide;
    offsets_ = static_cast<int32_t*>(scratch(kOffsets, padded * sizeof(int32_t)));
    for (int64_t o = 0; o < conv.out_channels; ++o) {
      const uint32_t value = static_cast<uint32_t>(conv.weight_offset[o]);
      offsets_[o] = static_cast<int32_t>(value << shift_ << 16 | (value & 0xffff));
    }
  }

  // Whether results are codes and, before rounding, within int32.
  bool narrow() const { return narrow_; }

  // Whether row sums and offsets fit two s16 each, of which the products add up to theirs.
  bool splits() const { return splits_; }

  const int32_t* offsets() const { return offsets_; }  // so split, or null: all are 0

  // The same of row sums, high * 2^shift + low.
  void split(int32_t* sums, int64_t n) const {
    const uint32_t low = (1u << shift_) - 1;
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t high = static_cast<uint32_t>(sums[i] >> shift_) << 16;
      sums[i] = static_cast<int32_t>(high | (static_cast<uint32_t>(sums[i]) & low));
    }
  }

 private:
  int shift_ = 0;
  bool splits_, narrow_;
  int32_t* offsets_ = nullptr;
};

// Offsets times row sums, of rows from `first` on.
template <int ROWS, int PANELS, class Tile>
inline __attribute__((always_inline)) void add_offsets(const Tile& t, int64_t first,
                                                       const Range& range,
                                                       __m512i (&acc)[ROWS][PANELS]) {
  if (!t.row_sums || !range.offsets()) return;
#pragma GCC unroll 2
  for (int p = 0; p < PANELS; ++p) {
    const __m512i w = _mm512_loadu_si512(range.offsets() + t.first_channel + p * kPanelRows);
#pragma GCC unroll 14
    for (int r = 0; r < ROWS; ++r) {
      acc[r][p] = add_pairs(acc[r][p], _mm512_set1_epi32(t.row_sums[first + r]), w);
    }
  }
}

template <int ROWS, int PANELS, class Tile>
inline __attribute__((always_inline)) void sum_products(const Tile& t, int64_t first,
                                                        int64_t exact_steps, const Range& range,
                                                        __m512i (&acc)[ROWS][PANELS]) {
#pragma GCC unroll 2
  for (int p = 0; p < PANELS; ++p) {
    const __m512i start = _mm512_loadu_si512(t.starts + p * kPanelRows);
#pragma GCC unroll 14
    for (int r = 0; r < ROWS; ++r) acc[r][p] = start;
  }
  add_offsets(t, first, range, acc);
  RowsApart<ROWS> rows(t.rows + first * t.row_stride, t.row_stride);
  Panels weights{t.panels, t.depth_blocks * kPanelBytes, kPanelBytes};
  const int64_t skipped = t.segment_step - t.segment_blocks * kBlockDepth;
  // Half a line a step: by the time that few rows take, all of them.
  int64_t fetched = (t.rows_before + first) / ROWS * t.depth_blocks * (kLineBytes / 2);
  for (int64_t left = t.depth_blocks; left > 0; left -= t.segment_blocks) {
    for (int64_t steps = t.segment_blocks; steps > 0; steps -= kFetchSteps) {
      add_products(acc, rows, weights, min64(steps, kFetchSteps), exact_steps);
      if (fetched >= t.ahead_bytes) continue;
#pragma GCC unroll 16
      for (int64_t i = 0; i < kFetchSteps / 2; ++i, fetched += kLineBytes) {
        _mm_prefetch(t.ahead + fetched, _MM_HINT_T1);
      }
    }
    rows.advance(skipped);
  }
}

// Part k: the instruction takes constants only, which k is not before its loop is unrolled.
inline __m256i half(__m512i v, int64_t k) {
  return k == 0 ? _mm512_castsi512_si256(v) : _mm512_extracti64x4_epi64(v, 1);
}

inline __m128i quarter(__m512i v, int64_t k) {
  const __m256i pair = half(v, k / 2);
  return k % 2 == 0 ? _mm256_castsi256_si128(pair) : _mm256_extracti128_si256(pair, 1);
}

// Masked stores take longer.
inline void store_bytes(uint8_t* to, __m256i v, bool whole, __mmask32 mask) {
  if (whole) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), v);
  } else {
    _mm256_mask_storeu_epi8(to, mask, v);
  }
}

inline void store_bytes(uint8_t* to, __m128i v, bool whole, __mmask32 mask) {
  if (whole) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), v);
  } else {
    _mm_mask_storeu_epi8(to, static_cast<__mmask16>(mask), v);
  }
}

// Codes of sums alone or of sums and a residual of codes, if Range::narrow(); or any outputs.
enum class Output { kCodes, kCodesPlusCodes, kAny };

// The epilogue of adjacent channels.
template <int PANELS, Output OUTPUT>
class Columns {
 public:
  Columns(const PackedConv& conv, int64_t channel, int64_t columns)
      : e_(conv.epilogue),
        width_(conv.out_channels),
        channel_(channel),
        whole_(columns == PANELS * kPanelRows),
        mask_(~uint32_t{0} >> (kWide - columns)),
        lo_(_mm512_set1_epi8(static_cast<char>(static_cast<int>(e_.lo)))),
        hi_(_mm512_set1_epi8(static_cast<char>(static_cast<int>(e_.hi)))) {
#pragma GCC unroll 2
    for (int p = 0; p < PANELS; ++p) {
      const int64_t first = channel + p * kPanelRows;
      multiplier_[p] = _mm512_maskz_loadu_ps(present(p), e_.multiplier + first);
      bias_[p] = _mm512_maskz_loadu_ps(present(p), e_.bias + first);
    }
  }

  // Of rows of outputs from `row` on.
  template <int ROWS>
  inline __attribute__((always_inline)) void store(int64_t row,
                                                   const __m512i (&sums)[ROWS][PANELS]) const {
    constexpr int kAtOnce = 4 / PANELS;  // rows that are packed together
    int64_t index = row * width_ + channel_;
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r += kAtOnce) {
      __m512 v[2][2] = {};
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        const int own = k / PANELS, p = k % PANELS;
        if (r + own < ROWS) {
          v[k / 2][k % 2] = value(sums[r + own][p], index + own * width_ + p * kPanelRows, p);
        }
      }
      if (OUTPUT == Output::kAny && !e_.out_u8) {
        index += kAtOnce * width_;
        continue;
      }
      const __m512i codes = OUTPUT == Output::kAny ? pack_codes(v, _mm512_set1_ps(e_.hi), lo_)
                                                   : _mm512_min_epu8(round_codes(v, lo_), hi_);
#pragma GCC unroll 4
      for (int k = 0; k < kAtOnce; ++k, index += width_) {
        if (r + k >= ROWS) break;
        if (PANELS == 1) {
          store_bytes(e_.out_u8 + index, quarter(codes, k), whole_, mask_);
        } else {
          store_bytes(e_.out_u8 + index, half(codes, k), whole_, mask_);
        }
      }
    }
  }

 private:
  __mmask16 present(int p) const { return static_cast<__mmask16>(mask_ >> p * kPanelRows); }

  // Before rounding; stored if it is not to be rounded.
  inline __attribute__((always_inline)) __m512 value(__m512i sum, int64_t index, int p) const {
    __m512 v = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), multiplier_[p]);
    v = _mm512_add_ps(v, bias_[p]);
    if (OUTPUT == Output::kCodesPlusCodes) {
      const __m128i codes = _mm_maskz_loadu_epi8(present(p), e_.residual_u8 + index);
      const __m512 residual = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(codes));
      v = _mm512_add_ps(v, _mm512_mul_ps(residual, _mm512_set1_ps(e_.residual_scale)));
    } else if (OUTPUT == Output::kAny) {
      v = add_residual(e_, v, index, present(p));
      if (!e_.out_u8) _mm512_mask_storeu_ps(e_.out_f32 + index, present(p), v);
    }
    return v;
  }

  const Epilogue e_;  // a copy: stores of bytes might change what is behind pointers
  const int64_t width_, channel_;
  const bool whole_;
  const __mmask32 mask_;
  const __m512i lo_, hi_;
  __m512 multiplier_[PANELS], bias_[PANELS];
};

// `count` rows of outputs from `first` on, ROWS at a time: of so few rows that the products of the
// next ones overlap with the epilogue of these.
template <int ROWS, int PANELS, Output OUTPUT, class Tile>
__attribute__((noinline)) void multiply_and_store(const Tile& t, int64_t first, int64_t count,
                                                  int64_t exact_steps, const Range& range) {
  const Columns<PANELS, OUTPUT> columns(*t.conv, t.first_channel, t.columns);
  for (; count > 0; count -= ROWS, first += ROWS) {
    __m512i acc[ROWS][PANELS];
    sum_products(t, first, exact_steps, range, acc);
    columns.store(t.first_row + first, acc);
  }
}

}  // namespace
}  // namespace FDDA_ISA
}  // namespace fdda
