// Winograd's F(3x3, 3x3) in 8-bit integers on AVX512-VNNI: inputs and weights.
//
//   inputs:    [25 positions][ceil(C / 64)][tiles][64 channels] u8
//   weights:   place_weights's, of one or two panels at a time
//   sums:      [3 rows][5 columns][tiles of a group][PANELS][16 outputs] s32: the products of a
//              column of positions, added up by A^T
#pragma once

#include "parallel.h"
#include "winograd_f3.h"
#include "winograd_parts.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

constexpr int kStep = F3::kStep, kPoints = F3::kPoints, kPositions = F3::kPositions;

using Block = TileBlock<kStep>;

typedef uint8_t Bytes __attribute__((vector_size(kLine)));  // added modulo 256

// ---- inputs ----

// One row of tiles, 64 channels from `channel` on; whether the codes read were small enough.
bool transform_row(const PackedConv& conv, const Block& b, int64_t row, int64_t channel) {
  const int64_t tiles_y = ceil_div(conv.height, kStep), tiles_x = ceil_div(conv.width, kStep);
  const int64_t n = (b.first_row + row) / tiles_y, ty = (b.first_row + row) % tiles_y;
  const InputRows<kPoints> rows(conv, n, kStep * ty - 1, channel);
  Bytes seen = {};
  auto read = [&](int64_t x, Bytes* d) __attribute__((always_inline)) {
    rows.read(x, d);
    seen |= d[1] | d[2] | d[3];  // the other two rows are these of other tiles
  };
  const Bytes shift = (Bytes)_mm512_set1_epi8(static_cast<char>(F3::kShift));
  uint8_t* const inputs = b.inputs + channel / kLine * b.line_stride;
  const int32_t* slots = b.slots + row * tiles_x;
  F3::transform_inputs(tiles_x, shift, b.position_stride, read,
                       [&](int64_t tile) { return inputs + slots[tile] * kLine; });
  const char too_large = static_cast<char>(~F3::kLargestCode);
  return !_mm512_test_epi8_mask((__m512i)seen, _mm512_set1_epi8(too_large));
}

// ---- weights ----

struct Panel {
  int8_t* weights;
  alignas(64) int32_t constants[kStep * kStep][2 * kPanelRows];  // to be added to outputs
};

// 16 outputs, the `half`th of the panels.
void expand_panel(const PackedConv& conv, int64_t channel, int half, Panel* panel) {
  const int64_t k4 = conv.channels / kBlockDepth;
  const MaskedAdds<2> expand(planes_of(conv, channel));
  const __m512i offset = offsets_of(conv, channel);
  __m512i sums[5] = {};  // of taps (1, 1), (1, 2), (2, 1), (2, 2), and of -3 times all
  for (int64_t k = 0; k < k4; ++k) {
    int8_t* const out = place_weights(panel->weights, kPositions, k) + half * kLine;
    Bytes g[9], u[kPositions];
#pragma GCC unroll 9
    for (int t = 0; t < 9; ++t) g[t] = (Bytes)_mm512_add_epi8(expand(t * k4 + k), offset);
    F3::transform_weights(g, u);
    const Bytes summed[5] = {g[4], g[5], g[7], g[8], u[F3::kAllTaps]};
#pragma GCC unroll 5
    for (int t = 0; t < 5; ++t) sums[t] = add_fours(sums[t], (__m512i)summed[t]);
#pragma GCC unroll 25
    for (int p = 0; p < kPositions; ++p) {
      _mm512_store_si512(out + p * kWeightStep, (__m512i)u[p]);
    }
  }

  // What the addition to V brings: A^T (6 G) / 6 is 0, g[2], g[1] + 3 g[2].
  static const int factors[kStep * kStep][4] = {
      {}, {}, {}, {}, {0, 0, 0, 1}, {0, 0, 1, 3}, {}, {0, 1, 0, 3}, {1, 3, 3, 9}};
  const __m512i third = _mm512_set1_epi32(static_cast<int32_t>(0xaaaaaaab));  // modulo 2^32
  const __m512i all =
      _mm512_mullo_epi32(_mm512_mullo_epi32(sums[4], third), _mm512_set1_epi32(conv.x_zero_point));
  for (int k = 0; k < kStep * kStep; ++k) {
    __m512i s = all;
    for (int t = 0; t < 4; ++t) {
      const __m512i factor = _mm512_set1_epi32(-F3::kShift * factors[k][t]);
      s = _mm512_add_epi32(s, _mm512_mullo_epi32(sums[t], factor));
    }
    _mm512_store_si512(panel->constants[k] + half * kPanelRows, s);
  }
}

}  // namespace
}  // namespace FDDA_ISA
}  // namespace fdda
