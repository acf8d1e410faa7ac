// What the packed convolutions on 256-bit registers share: u8 x s8 operands, products in register
// tiles.
#pragma once

#include "epilogue_avx2.h"
#include "operand_ranges.h"
#include "packed_driver.h"
#include "row_tiles.h"

// Keeps accumulators in registers and their updates in this order; gcc 12 otherwise hoists the
// loads of all rows and spills.
#define FDDA_PIN(x) asm("" : "+x"(x))

namespace fdda {
namespace FDDA_ISA {
namespace {

constexpr int kTileRows = 6;  // 6 * 2 sums, 2 weights, an input and a product fit 16 registers

// u8 inputs as they are, weights as [depth / 4][16][4] s8. The inputs' zero point enters through
// the sums' start, -x_zero_point * sum of the channel's weights.
struct U8S8Operands : SimplePolicy {
  using Input = uint8_t;
  using Weight = int8_t;
  static constexpr bool kReadsInput = true;

  static void unpack(const PackedConv& conv, const uint8_t* planes, int64_t depth,
                     const int8_t* offset, Weight* panel, int32_t* start) {
    __m256i sums[2] = {};
    expand_panel(conv.bits, planes, depth, offset, [&](__m256i low, __m256i high) {
      store(panel, low);
      store(panel + kHalf * kBlockDepth, high);
      panel += kPanelRows * kBlockDepth;
      sums[0] = _mm256_add_epi32(sums[0], sum_of_fours(low));
      sums[1] = _mm256_add_epi32(sums[1], sum_of_fours(high));
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

  static void sum_rows(const Input* rows, int64_t stride, int64_t depth, int64_t count,
                       const PackedConv& conv, int32_t* out) {
    for (; count > 0; --count, rows += stride, ++out) {
      __m256i sums = _mm256_setzero_si256();
      int64_t i = 0;
      for (; i + 32 <= depth; i += 32) {
        sums = _mm256_add_epi64(sums, _mm256_sad_epu8(load(rows + i), _mm256_setzero_si256()));
      }
      int64_t parts[4], sum = -conv.x_zero_point * depth;
      store(parts, sums);
      for (int64_t part : parts) sum += part;
      for (; i < depth; ++i) sum += rows[i];
      *out = static_cast<int32_t>(sum);
    }
  }
};

// Adds to `sums` the products of 4 bytes of ROWS rows and two registers of weights.
template <class Policy, int ROWS>
__attribute__((always_inline)) inline void add_step(__m256i (&sums)[ROWS][2], const char* x,
                                                    int64_t stride, const char* w) {
  const __m256i low = load(w), high = load(w + 32);
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r) {
    const __m256i a = broadcast(x + r * stride);
    sums[r][0] = Policy::add(sums[r][0], a, low);
    FDDA_PIN(sums[r][0]);
    sums[r][1] = Policy::add(sums[r][1], a, high);
    FDDA_PIN(sums[r][1]);
  }
}

// To `sums`, [ROWS][16]: `start` plus the products of ROWS rows, which start at x and are `stride`
// bytes apart, and one panel. The policy:
//   add(sum, x, w)    sum plus the products of a step
//   kWidens           whether sums are to be widened after `exact_steps` steps
//   product(x, w)     products of a step    } if so
//   widened(sum)      as int32              }
template <int ROWS, class Policy>
__attribute__((noinline)) void multiply(const Policy& policy, const char* x, int64_t stride,
                                        const char* w, int64_t steps, const int32_t* start,
                                        int32_t* sums) {
  __m256i part[ROWS][2];
  if constexpr (Policy::kWidens) {
    for (int r = 0; r < ROWS; ++r) {
      store(sums + r * kPanelRows, load(start));
      store(sums + r * kPanelRows + kHalf, load(start + kHalf));
    }
    while (steps > 0) {
      const int64_t n = min64(steps, policy.exact_steps);
      steps -= n;
      const __m256i low = load(w), high = load(w + 32);
#pragma GCC unroll 6
      for (int r = 0; r < ROWS; ++r) {
        const __m256i a = broadcast(x + r * stride);
        part[r][0] = Policy::product(a, low);
        FDDA_PIN(part[r][0]);
        part[r][1] = Policy::product(a, high);
        FDDA_PIN(part[r][1]);
      }
      x += 4;
      w += 64;
      for (int64_t i = 1; i < n; ++i, x += 4, w += 64) add_step<Policy>(part, x, stride, w);
#pragma GCC unroll 6
      for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
          int32_t* sum = sums + r * kPanelRows + h * kHalf;
          store(sum, _mm256_add_epi32(load(sum), Policy::widened(part[r][h])));
        }
      }
    }
  } else {
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) {
      part[r][0] = load(start);
      part[r][1] = load(start + kHalf);
    }
    for (int64_t i = 0; i < steps; ++i, x += 4, w += 64) add_step<Policy>(part, x, stride, w);
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) {
      store(sums + r * kPanelRows, part[r][0]);
      store(sums + r * kPanelRows + kHalf, part[r][1]);
    }
  }
}

// A panel stays in the first cache for all rows.
template <class Policy>
void gemm_panels(const Policy& policy, const Tile<Policy>& t) {
  using Weight = typename Policy::Weight;
  const int64_t panel_bytes = t.depth_blocks * kPanelRows * kBlockDepth * sizeof(Weight);
  const int64_t stride = t.row_stride * sizeof(*t.rows);
  const bool totals_fit = totals_fit_s32(*t.conv);
  for (int64_t n = 0; n < t.columns; n += kPanelRows) {
    const char* w = reinterpret_cast<const char*>(t.panels) + n / kPanelRows * panel_bytes;
    for_each_row_tile<kTileRows>(t.num_rows, [&](auto rows, int64_t first) {
      constexpr int kRows = decltype(rows)::kCount;
      alignas(32) int32_t sums[kRows * kPanelRows];
      multiply<kRows>(policy, reinterpret_cast<const char*>(t.rows) + first * stride, stride, w,
                      panel_bytes / 64, t.starts + n, sums);
      const int32_t* row_sums = t.row_sums ? t.row_sums + first : nullptr;
      store_sums(*t.conv, {sums, row_sums, t.first_row + first, kRows, t.first_channel + n},
                 min64(kPanelRows, t.columns - n), totals_fit);
    });
  }
}

}  // namespace
}  // namespace FDDA_ISA
}  // namespace fdda
