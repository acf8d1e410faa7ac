// Winograd's F(3x3, 3x3) in 8-bit integers on AVX512-VNNI: tiles, inputs and weights.
//
//   inputs:    [25 positions][ceil(C / 64)][tiles][64 channels] u8
//   weights:   [25 positions][C / 4][PANELS][16 outputs][4 inputs] s8, of PANELS * 16 outputs
//   sums:      [3 rows][5 columns][tiles of a group][PANELS][16 outputs] s32: the products of a
//              column of positions, added up by A^T
#pragma once

#include "parallel.h"
#include "planes_avx512.h"
#include "winograd_f3.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

constexpr int kStep = F3::kStep, kPoints = F3::kPoints, kPositions = F3::kPositions;
constexpr int64_t kLine = 64;                      // channels of a line of V
constexpr int64_t kGroup = 28;                     // most tiles whose products are held at once
constexpr int64_t kInputBytes = int64_t{1} << 20;  // of V at a time: it stays in L2

// ---- tiles of outputs ----

struct TileAt {
  int64_t pixel;      // its first output, counted over the images
  int columns, rows;  // how many of its outputs exist
};

// Rows of tiles whose transformed inputs are held at once. Tiles are ordered by which outputs do
// not exist: some columns, none, some rows, both. So the last column and the last row of positions,
// which only the last outputs need, have one range of tiles each: 196 products instead of 225 at
// 7 x 7.
struct Block {
  TileAt* tiles;   // by slot
  int32_t* slots;  // by (row of tiles, column)
  uint8_t* inputs;
  int64_t first_row, rows, count;
  int64_t ends[4];                       // of the classes
  int64_t line_stride, position_stride;  // of inputs, in bytes

  // The tiles with or without all rows that need a column of positions.
  void range(int column, bool all_rows, int64_t* begin, int64_t* end) const {
    const bool last = column == kPoints - 1;
    *begin = all_rows ? (last ? ends[0] : 0) : ends[1];
    *end = all_rows ? ends[1] : last ? ends[2] : count;
  }

  // End of the group that starts at `begin`: as many whole classes as fit, else an even share of
  // one, so that no position's range meets a group in a few tiles.
  int64_t group_end(int64_t begin) const {
    int64_t end = begin;
    for (int64_t e : ends) {
      if (e - begin <= kGroup) end = max64(end, e);
    }
    for (int i = 0; end == begin; ++i) {
      const int64_t rest = ends[i] - begin;
      if (rest > 0) end = begin + ceil_div(rest, ceil_div(rest, kGroup));
    }
    return end;
  }
};

Block plan_block(const PackedConv& conv, int64_t first_row, int64_t rows) {
  const int64_t tiles_y = ceil_div(conv.height, kStep), tiles_x = ceil_div(conv.width, kStep);
  Block b;
  b.first_row = first_row;
  b.rows = rows;
  b.count = rows * tiles_x;
  b.line_stride = (b.count + 1) * kLine;
  b.position_stride = ceil_div(conv.channels, kLine) * b.line_stride + 3 * kLine;
  if (b.position_stride % 4096 < 4 * kLine) b.position_stride += 4 * kLine;
  const int64_t bytes = kPositions * b.position_stride;
  b.inputs = static_cast<uint8_t*>(
      scratch(kSharedRows, bytes + b.count * (sizeof(TileAt) + sizeof(int32_t))));
  b.tiles = reinterpret_cast<TileAt*>(b.inputs + bytes);
  b.slots = reinterpret_cast<int32_t*>(b.tiles + b.count);

  auto height = [&](int64_t row) {
    return min64(kStep, conv.height - (first_row + row) % tiles_y * kStep);
  };
  int64_t full_rows = 0;
  for (int64_t r = 0; r < rows; ++r) full_rows += height(r) == kStep;
  const int64_t wide = conv.width / kStep;  // tiles of a row with all columns
  int64_t next[4] = {0, full_rows * (tiles_x - wide), full_rows * tiles_x, full_rows * tiles_x};
  next[3] += (rows - full_rows) * wide;
  for (int i = 0; i < 3; ++i) b.ends[i] = next[i + 1];
  b.ends[3] = b.count;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t n = (first_row + r) / tiles_y, y = (first_row + r) % tiles_y * kStep;
    for (int64_t x = 0; x < tiles_x; ++x) {
      const bool all_columns = x < wide, all_rows = height(r) == kStep;
      const int64_t slot = next[all_rows ? (all_columns ? 1 : 0) : (all_columns ? 2 : 3)]++;
      b.slots[r * tiles_x + x] = static_cast<int32_t>(slot);
      b.tiles[slot] = {(n * conv.height + y) * conv.width + kStep * x,
                       static_cast<int>(min64(kStep, conv.width - kStep * x)),
                       static_cast<int>(height(r))};
    }
  }
  return b;
}

typedef uint8_t Bytes __attribute__((vector_size(kLine)));  // added modulo 256

// ---- inputs ----

// One row of tiles, 64 channels from `channel` on; whether the codes read were small enough.
bool transform_row(const PackedConv& conv, const Block& b, int64_t row, int64_t channel) {
  const int64_t tiles_y = ceil_div(conv.height, kStep), tiles_x = ceil_div(conv.width, kStep);
  const int64_t n = (b.first_row + row) / tiles_y, ty = (b.first_row + row) % tiles_y;
  const int64_t valid = min64(kLine, conv.channels - channel);
  const __mmask64 mask = ~uint64_t{0} >> (kLine - valid);
  const __m512i zero = _mm512_set1_epi8(static_cast<char>(conv.x_zero_point));
  alignas(64) uint8_t outside[kLine];
  _mm512_store_si512(outside, zero);
  const uint8_t* rows[kPoints];
  int64_t steps[kPoints];
#pragma GCC unroll 5
  for (int i = 0; i < kPoints; ++i) {
    const int64_t y = kStep * ty - 1 + i;
    const bool inside = y >= 0 && y < conv.height;
    const int64_t pixel = (n * conv.height + y) * conv.width;
    rows[i] = inside ? conv.x + pixel * conv.channels + channel : outside;
    steps[i] = inside ? conv.channels : 0;
  }
  Bytes seen = {};
  auto read = [&](int64_t x, Bytes* d) __attribute__((always_inline)) {
    const bool inside = x >= 0 && x < conv.width;
#pragma GCC unroll 5
    for (int i = 0; i < kPoints; ++i) {
      d[i] = (Bytes)(inside ? _mm512_maskz_loadu_epi8(mask, rows[i] + x * steps[i]) : zero);
    }
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
  int64_t position_stride;
  alignas(64) int32_t constants[kStep * kStep][2 * kPanelRows];  // to be added to outputs
};

// 16 outputs, the `half`th of `panels`.
void expand_panel(const PackedConv& conv, int64_t channel, int panels, int half, Panel* panel) {
  const int64_t k4 = conv.channels / kBlockDepth, depth = 9 * conv.channels;
  const int64_t panel_bytes = depth / kBlockDepth * conv.bits * kPlaneBytes;
  const MaskedAdds<2> expand({conv.weight + channel / kPanelRows * panel_bytes, conv.bits, depth});
  alignas(64) int8_t offsets[kLine] = {};
  for (int64_t j = 0; j < min64(kLine, kBlockDepth * (conv.out_channels - channel)); ++j) {
    offsets[j] = static_cast<int8_t>(conv.weight_offset[channel + j / kBlockDepth]);
  }
  const __m512i offset = _mm512_load_si512(offsets);
  __m512i sums[5] = {};  // of taps (1, 1), (1, 2), (2, 1), (2, 2), and of -3 times all
  int8_t* out = panel->weights + half * kLine;
  for (int64_t k = 0; k < k4; ++k, out += panels * kLine) {
    Bytes g[9], u[kPositions];
#pragma GCC unroll 9
    for (int t = 0; t < 9; ++t) g[t] = (Bytes)_mm512_add_epi8(expand(t * k4 + k), offset);
    F3::transform_weights(g, u);
    const Bytes summed[5] = {g[4], g[5], g[7], g[8], u[F3::kAllTaps]};
#pragma GCC unroll 5
    for (int t = 0; t < 5; ++t) sums[t] = add_fours(sums[t], (__m512i)summed[t]);
#pragma GCC unroll 25
    for (int p = 0; p < kPositions; ++p) {
      _mm512_store_si512(out + p * panel->position_stride, (__m512i)u[p]);
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
