// What the packed convolutions on 256-bit registers share: expansion of weights, u8 x s8 operands,
// register tiles and the epilogue. A panel of 16 channels is two registers wide.
#pragma once

#include <immintrin.h>

#include "packed_driver.h"
#include "row_tiles.h"

// Keeps accumulators in registers and their updates in this order; gcc 12 otherwise hoists the
// loads of all rows and spills.
#define FDDA_PIN(x) asm("" : "+x"(x))

namespace fdda {
namespace FDDA_ISA {
namespace {

constexpr int kHalf = 8;      // channels of a register of sums
constexpr int kTileRows = 6;  // 6 * 2 sums, 2 weights, an input and a product fit 16 registers

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

// ---- weights ----

// sink(low, high) for each block: s8 weights of channels 0-7 and 8-15, 4 inputs each.
template <int BITS, class Sink>
void expand_planes(const uint8_t* planes, int64_t depth, const int8_t* offset, Sink sink) {
  const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201u));
  const __m256i spread =
      _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  __m256i offsets[2];
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
    const __m128i o = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(offset + h * kHalf));
    offsets[h] = _mm256_mullo_epi32(_mm256_cvtepu8_epi32(o), _mm256_set1_epi32(0x01010101));
  }
  for (int64_t k = 0; k < depth; k += kBlockDepth) {
    __m256i w[2] = {offsets[0], offsets[1]};
#pragma GCC unroll 8
    for (int b = 0; b < BITS; ++b, planes += kPlaneBytes) {
      const int weight = b == BITS - 1 ? -(1 << b) : 1 << b;
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        int32_t half;
        memcpy(&half, planes + h * sizeof half, sizeof half);
        const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(half), spread);
        const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit);
        w[h] = _mm256_add_epi8(w[h],
                               _mm256_and_si256(set, _mm256_set1_epi8(static_cast<char>(weight))));
      }
    }
    if (depth - k < kBlockDepth) {  // padding weighs 0, not `offset`
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
    case 2: return expand_planes<2>(planes, depth, offset, sink);
    case 3: return expand_planes<3>(planes, depth, offset, sink);
    case 4: return expand_planes<4>(planes, depth, offset, sink);
    case 5: return expand_planes<5>(planes, depth, offset, sink);
    case 6: return expand_planes<6>(planes, depth, offset, sink);
    case 7: return expand_planes<7>(planes, depth, offset, sink);
    case 8: return expand_planes<8>(planes, depth, offset, sink);
  }
}

// ---- operands ----

// u8 inputs as they are, weights as [depth / 4][16][4] s8. The inputs' zero point enters through
// the sums' start, -x_zero_point * sum of the channel's weights.
struct U8S8Operands {
  using Input = uint8_t;
  using Weight = int8_t;
  static constexpr bool kReadsInput = true;

  static void unpack(const PackedConv& conv, const uint8_t* planes, int64_t depth,
                     const int8_t* offset, Weight* panel, int32_t* start) {
    const __m256i ones8 = _mm256_set1_epi8(1), ones16 = _mm256_set1_epi16(1);
    __m256i sums[2] = {};
    expand_panel(conv.bits, planes, depth, offset, [&](__m256i low, __m256i high) {
      store(panel, low);
      store(panel + kHalf * kBlockDepth, high);
      panel += kPanelRows * kBlockDepth;
      sums[0] =
          _mm256_add_epi32(sums[0], _mm256_madd_epi16(_mm256_maddubs_epi16(ones8, low), ones16));
      sums[1] =
          _mm256_add_epi32(sums[1], _mm256_madd_epi16(_mm256_maddubs_epi16(ones8, high), ones16));
    });
    const __m256i factor = _mm256_set1_epi32(-conv.x_zero_point);
    for (int h = 0; h < 2; ++h) {
      store(start + h * kHalf, _mm256_mullo_epi32(sums[h], factor));
    }
  }

  static void copy(Input* out, const uint8_t* x, int64_t n, const PackedConv&) {
    for (; n >= 32; n -= 32, out += 32, x += 32) store(out, load(x));
    // Of a length known here, which the compiler copies in place.
    auto part = [&](auto length) {
      constexpr int64_t kLength = sizeof length;
      if (!(n & kLength)) return;
      memcpy(out, x, kLength);
      out += kLength;
      x += kLength;
    };
    part(__m128i());
    part(int64_t());
    part(int32_t());
    part(int16_t());
    part(int8_t());
  }

  static void pad(Input* out, int64_t n, const PackedConv& conv) {
    memset(out, conv.x_zero_point, n);
  }

  static int32_t row_sum(const Input* row, int64_t depth, const PackedConv& conv) {
    int32_t sum = 0;
    for (int64_t i = 0; i < depth; ++i) sum += row[i];
    return static_cast<int32_t>(sum - conv.x_zero_point * depth);
  }
};

// ---- epilogue ----

// The low halves of 8 int64.
inline __m256i narrow(const int64_t* from) {
  const __m256 low = _mm256_castsi256_ps(load(from)), high = _mm256_castsi256_ps(load(from + 4));
  const __m256d both = _mm256_castps_pd(_mm256_shuffle_ps(low, high, 0x88));
  return _mm256_castpd_si256(_mm256_permute4x64_pd(both, 0xd8));
}

// Whether sums with the offsets' share, offset * row sum, fit int32.
inline bool totals_fit_s32(const PackedConv& conv) {
  int64_t largest = 128;
  for (int64_t o = 0; o < conv.out_channels && !conv.weight_fits_s8; ++o) {
    const int64_t offset = conv.weight_offset[o];
    largest = max64(largest, 128 + (offset < 0 ? -offset : offset));
  }
  const int64_t depth = conv.kernel_h * conv.kernel_w * conv.channels / conv.groups;
  return largest <= INT32_MAX / 255 / depth;
}

// All channels of a panel; totals fit int32.
template <class Policy>
__attribute__((noinline)) void store_panel(const Tile<Policy>& t, const int32_t* sums,
                                           int64_t first, int64_t rows, int64_t n) {
  const Epilogue& e = t.conv->epilogue;
  const int64_t channel = t.first_channel + n;
  const __m256 multiplier[2] = {_mm256_loadu_ps(e.multiplier + channel),
                                _mm256_loadu_ps(e.multiplier + channel + kHalf)};
  const __m256 bias[2] = {_mm256_loadu_ps(e.bias + channel),
                          _mm256_loadu_ps(e.bias + channel + kHalf)};
  const __m256 scale = _mm256_set1_ps(e.residual_scale);
  const __m256 lo = _mm256_set1_ps(e.lo), hi = _mm256_set1_ps(e.hi);
  int64_t index = (t.first_row + first) * t.conv->out_channels + channel;
  for (int64_t r = 0; r < rows; ++r, sums += kPanelRows, index += t.conv->out_channels) {
    __m256 v[2];
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      __m256i total = load(sums + h * kHalf);
      if (t.row_sums) {
        const __m256i offset = narrow(t.conv->weight_offset + channel + h * kHalf);
        const __m256i sum = _mm256_set1_epi32(t.row_sums[first + r]);
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

template <class Policy>
void store_sums(const Tile<Policy>& t, const int32_t* sums, int64_t first, int64_t rows, int64_t n,
                bool fit) {
  const int64_t count = min64(kPanelRows, t.columns - n);
  if (count == kPanelRows && fit) return store_panel(t, sums, first, rows, n);
  for (int64_t r = first; r < first + rows; ++r, sums += kPanelRows) {
    for (int64_t j = 0; j < count; ++j) {
      const int64_t channel = t.first_channel + n + j;
      const int64_t index = (t.first_row + r) * t.conv->out_channels + channel;
      const int64_t offset = t.row_sums ? t.conv->weight_offset[channel] * t.row_sums[r] : 0;
      store_output(t.conv->epilogue, index, channel, sums[j] + offset);
    }
  }
}

// ---- products ----

// Sums of ROWS rows, which start at x and are `stride` bytes apart, and one panel. A step is 4
// bytes of each row and two registers of weights. The policy:
//   add(sum, x, w)    sum plus the products of a step
//   exact_steps       after which the sums are to be widened
//   widened(sum)      as int32
template <int ROWS, class Policy>
__attribute__((noinline)) void multiply(const Policy& policy, const char* x, int64_t stride,
                                        const char* w, int64_t steps, const __m256i (&start)[2],
                                        int32_t* sums) {
  for (int r = 0; r < ROWS; ++r) {
    store(sums + r * kPanelRows, start[0]);
    store(sums + r * kPanelRows + kHalf, start[1]);
  }
  while (steps > 0) {
    __m256i part[ROWS][2];
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) part[r][0] = part[r][1] = _mm256_setzero_si256();
    const int64_t n = min64(steps, policy.exact_steps);
    steps -= n;
    for (int64_t i = 0; i < n; ++i, x += 4, w += 64) {
      const __m256i low = load(w), high = load(w + 32);
#pragma GCC unroll 6
      for (int r = 0; r < ROWS; ++r) {
        const __m256i a = broadcast(x + r * stride);
        part[r][0] = Policy::add(part[r][0], a, low);
        FDDA_PIN(part[r][0]);
        part[r][1] = Policy::add(part[r][1], a, high);
        FDDA_PIN(part[r][1]);
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        int32_t* sum = sums + r * kPanelRows + h * kHalf;
        store(sum, _mm256_add_epi32(load(sum), Policy::widened(part[r][h])));
      }
    }
  }
}

// A panel stays in the first cache for all rows.
template <class Policy>
void gemm_panels(const Policy& policy, const Tile<Policy>& t) {
  using Weight = typename Policy::Weight;
  const int64_t panel_bytes = t.depth_blocks * kPanelRows * kBlockDepth * sizeof(Weight);
  const int64_t stride = t.row_stride * sizeof(*t.rows);
  const bool fit = totals_fit_s32(*t.conv);
  for (int64_t n = 0; n < t.columns; n += kPanelRows) {
    const char* w = reinterpret_cast<const char*>(t.panels) + n / kPanelRows * panel_bytes;
    const __m256i start[2] = {load(t.starts + n), load(t.starts + n + kHalf)};
    for_each_row_tile<kTileRows>(t.num_rows, [&](auto rows, int64_t first) {
      constexpr int kRows = decltype(rows)::kCount;
      alignas(32) int32_t sums[kRows * kPanelRows];
      multiply<kRows>(policy, reinterpret_cast<const char*>(t.rows) + first * stride, stride, w,
                      panel_bytes / 64, start, sums);
      store_sums(t, sums, first, kRows, n, fit);
    });
  }
}

}  // namespace
}  // namespace FDDA_ISA
}  // namespace fdda
