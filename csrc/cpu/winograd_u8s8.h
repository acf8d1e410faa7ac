// Winograd's F(2x2, 3x3) in 8-bit integers, exact: 16 products for 4 outputs of a 3x3 convolution
// instead of 36.
//
//   V = B^T d B + 2 c      of the inputs' codes d <= c <= 63: [0, 4 c], u8. Position (1, 1) is a
//                          plain sum, in [0, 4 c] without the addition.
//   U = (2 G) w (2 G)^T    of the weights: integers, s8 if they are small or cancel
//   4 y = A^T (sum U V) A  int32
//
// The additions and the inputs' zero point add a constant to each of the four outputs. A corner of
// the 4 x 4 positions enters just one output: the corners' sums start with these constants.
//
//   inputs:    [16 positions][ceil(C / 64)][tiles][64 channels] u8. The step from tile to tile does
//              not depend on C: constant displacements in the products' loop.
//   weights:   place_weights's, of one or two panels at a time; those of the last row of positions
//   are
//              negated
//   sums:      [2 rows][4 columns][tiles of a group][PANELS][16 outputs] s32: the products of a
//              column of positions, added and subtracted by A^T

#pragma once

#include "operand_ranges.h"
#include "parallel.h"
#include "winograd_inputs.h"
#include "winograd_parts.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

constexpr int kPositions = 16;
constexpr int64_t kLargestTransform = 126;  // of a weight
constexpr int kWide = 2 * kPanelRows;       // outputs whose weights are expanded together

typedef uint8_t Bytes __attribute__((vector_size(kLine)));  // added modulo 256

struct Block : TileBlock<2> {
  int64_t code;          // the largest one
  int64_t weight_bound;  // of |U|
};

// ---- inputs ----

// One row of tiles, 64 channels from `channel` on; whether the codes read were small enough.
bool transform_row(const PackedConv& conv, const Block& b, int64_t row, int64_t channel) {
  const int64_t tiles_y = ceil_div(conv.height, 2), tiles_x = ceil_div(conv.width, 2);
  const int64_t n = (b.first_row + row) / tiles_y, ty = (b.first_row + row) % tiles_y;
  const InputRows<4> rows(conv, n, 2 * ty - 1, channel);
  Bytes seen = {};
  auto read = [&](int64_t x, Bytes* d) __attribute__((always_inline)) {
    rows.read(x, d);
    seen |= d[1] | d[2];  // the other two rows are these of other tiles
  };
  const Bytes shift = (Bytes)_mm512_set1_epi8(static_cast<char>(2 * b.code));
  uint8_t* const inputs = b.inputs + channel / kLine * b.line_stride;
  const int32_t* slots = b.slots + row * tiles_x;
  transform_inputs(tiles_x, shift, b.position_stride, read,
                   [&](int64_t tile) { return inputs + slots[tile] * kLine; });
  const char too_large = static_cast<char>(~kLargestCode);
  return !_mm512_test_epi8_mask((__m512i)seen, _mm512_set1_epi8(too_large));
}

// ---- weights ----

struct Panel {
  int8_t* weights;
  int64_t code;                          // the inputs' largest one
  int64_t bound;                         // of |U|, whatever the weights
  int64_t largest;                       // |U|; 127 and 128 may stand for more
  alignas(64) int32_t starts[5][kWide];  // corners (0, 0), (0, 3), (3, 0), (3, 3); elsewhere: zeros
};

template <bool SATURATE>
inline __m512i add_weights(__m512i a, __m512i b) {
  return SATURATE ? _mm512_adds_epi8(a, b) : _mm512_add_epi8(a, b);
}

template <bool SATURATE>
inline __m512i subtract_weights(__m512i a, __m512i b) {
  return SATURATE ? _mm512_subs_epi8(a, b) : _mm512_sub_epi8(a, b);
}

// Stores a row of U, [4] positions, from (2 G) w of that row; returns the largest |U|s so far. With
// SATURATE a sum that does not fit ends up at 127 or -128, and so does one of those that it is
// added to, subtracted from or doubled in: the last results show it. Else all are known to fit.
template <bool SATURATE>
inline __attribute__((always_inline)) __m512i store_row(const __m512i (&g)[3], int8_t* to,
                                                        __m512i sizes) {
  const __m512i s = add_weights<SATURATE>(g[0], g[2]);
  const __m512i u[4] = {add_weights<SATURATE>(g[0], g[0]), add_weights<SATURATE>(s, g[1]),
                        subtract_weights<SATURATE>(s, g[1]), add_weights<SATURATE>(g[2], g[2])};
#pragma GCC unroll 4
  for (int x = 0; x < 4; ++x) {
    _mm512_store_si512(to + x * kWeightStep, u[x]);
    if (SATURATE) sizes = _mm512_max_epu8(sizes, _mm512_abs_epi8(u[x]));
  }
  return sizes;
}

// 16 outputs, the `half`th of the panels.
template <bool SATURATE, class Expand>
inline __attribute__((always_inline)) void expand_weights(const PackedConv& conv,
                                                          const Expand& expand, int64_t channel,
                                                          int half, Panel* panel) {
  const int64_t k4 = conv.channels / kBlockDepth;
  const __m512i offset = offsets_of(conv, channel);
  __m512i tap_sums[9], sizes = _mm512_setzero_si512();
#pragma GCC unroll 9
  for (int t = 0; t < 9; ++t) tap_sums[t] = _mm512_setzero_si512();
  for (int64_t k = 0; k < k4; ++k) {
    int8_t* const out = place_weights(panel->weights, kPositions, k) + half * kLine;
    auto read = [&](int y, __m512i* g) __attribute__((always_inline)) {
#pragma GCC unroll 3
      for (int x = 0; x < 3; ++x) {
        const int t = 3 * y + x;
        g[x] = _mm512_add_epi8(expand(t * k4 + k), offset);
        tap_sums[t] = add_fours(tap_sums[t], g[x]);
        asm("" : "+v"(tap_sums[t]));  // else gcc keeps them in memory
      }
    };
    auto store = [&](int y, const __m512i(&g)[3]) __attribute__((always_inline)) {
      sizes = store_row<SATURATE>(g, out + 4 * y * kWeightStep, sizes);
    };
    // Rows 0 and 3 first: few registers are in use at a time.
    __m512i g[3], h[3], r[3];
    read(0, g);
#pragma GCC unroll 3
    for (int x = 0; x < 3; ++x) r[x] = add_weights<SATURATE>(g[x], g[x]);
    store(0, r);
    read(2, h);
#pragma GCC unroll 3
    for (int x = 0; x < 3; ++x) {
      g[x] = add_weights<SATURATE>(g[x], h[x]);
      r[x] = subtract_weights<SATURATE>(_mm512_setzero_si512(), add_weights<SATURATE>(h[x], h[x]));
    }
    store(3, r);
    read(1, h);
#pragma GCC unroll 3
    for (int x = 0; x < 3; ++x) {
      r[x] = add_weights<SATURATE>(g[x], h[x]);
      g[x] = subtract_weights<SATURATE>(g[x], h[x]);
    }
    store(1, r);
    store(2, g);
  }

  __m512i sums[9];  // those in registers have constant indices
#pragma GCC unroll 9
  for (int t = 0; t < 9; ++t) sums[t] = tap_sums[t];
  // The sums of U come from those of the taps by A^T (2 G); those of position (1, 1) are `all`.
  static const int factors[2][3] = {{4, 0, 2}, {0, 2, -2}};
  const int shift = static_cast<int>(2 * panel->code);
  __m512i all = _mm512_setzero_si512();
  for (int t = 0; t < 9; ++t) all = _mm512_add_epi32(all, sums[t]);
  all = _mm512_mullo_epi32(all, _mm512_set1_epi32(shift - 4 * conv.x_zero_point));
  for (int i = 0; i < 4; ++i) {
    __m512i s = all;
    for (int t = 0; t < 9; ++t) {
      const int factor = -shift * factors[i / 2][t / 3] * factors[i % 2][t % 3];
      s = _mm512_add_epi32(s, _mm512_mullo_epi32(sums[t], _mm512_set1_epi32(factor)));
    }
    const bool negated = i % 2;  // by A^T, the last column of positions
    if (negated) s = _mm512_sub_epi32(_mm512_setzero_si512(), s);
    _mm512_store_si512(panel->starts[i] + half * kPanelRows, s);
  }
  alignas(64) uint8_t size[kLine];
  _mm512_store_si512(size, sizes);
  for (uint8_t u : size) panel->largest = max64(panel->largest, u);
}

#if defined(__AVX512VNNI__)
// Of which no U needs to be looked at.
FDDA_GFNI inline void expand_small_weights(const PackedConv& conv, const Planes& p, int64_t channel,
                                           int half, Panel* panel) {
  expand_weights<false>(conv, ShortBlocks<kShortAhead>(p), channel, half, panel);
}
#endif

void expand_panel(const PackedConv& conv, int64_t channel, int half, Panel* panel) {
  const Planes p = planes_of(conv, channel);
#if defined(__AVX512VNNI__)
  if (panel->bound <= kLargestTransform && has_gfni()) {
    panel->largest = panel->bound;
    return expand_small_weights(conv, p, channel, half, panel);
  }
#endif
  // Bit matrices are slower here: their instructions share a port with the saturating sums.
  with_masked_adds(
      p, [&](const auto& expand) { expand_weights<true>(conv, expand, channel, half, panel); });
}

}  // namespace
}  // namespace FDDA_ISA
}  // namespace fdda
