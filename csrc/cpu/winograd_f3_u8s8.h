// Winograd's F(3x3, 3x3) in 8-bit integers, exact, for weights of 2 bits: 25 products for 9 outputs
// of a 3x3 convolution, where F(2x2, 3x3) takes 36 and the definition 81. Its points are 0, 1, -1,
// 2 and infinity (Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, 2016, section
// 4):
//
//   B^T  2 -1 -2  1  0     6 G  3  0  0     A^T  1  1  1  1  0
//        0 -2 -1  1  0         -3 -3 -3          0  1 -1  2  0
//        0  2 -3  1  0         -1  1 -1          0  1  1  4  1
//        0 -1  0  1  0          1  2  4
//        0  2 -1 -2  1          0  0  6
//
//   V = B^T d B + 126          of the inputs' codes d <= 7: [0, 252], u8
//   U = (6 G) w (6 G)^T        of weights |w| <= 2: [-126, 126], s8, but for position (1, 1), where
//                              it is 9 times the sum of all taps: the products are multiplied by
//                              -3, and U by -3
//   36 y = A^T (sum U V) A     modulo 2^32
//
// The additions add 126 A^T (sum U) A, a constant; so does the inputs' zero point.
//
//   inputs:    [25 positions][ceil(C / 64)][tiles][64 channels] u8
//   weights:   [25 positions][C / 4][PANELS][16 outputs][4 inputs] s8, of PANELS * 16 outputs
//   sums:      [3 rows][5 columns][tiles of a group][PANELS][16 outputs] s32: the products of a
//              column of positions, added up by A^T
#pragma once

#include "parallel.h"
#include "planes_avx512.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

constexpr int kStep = 3, kPoints = 5, kPositions = kPoints * kPoints;
constexpr int kTopCode = 7, kTopWeight = 2;
constexpr int kShift = 18 * kTopCode;
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

// B^T in one direction, plus `shift`.
inline __attribute__((always_inline)) void transform_inputs(const Bytes* d, Bytes shift, Bytes* v) {
  const Bytes difference = d[3] - d[1], shifted = difference + shift;
  const Bytes a = d[0] - d[2], b = d[1] - d[2];
  v[0] = shifted + a + a;
  v[1] = shifted - (d[1] + d[2]);
  v[2] = shifted + b + b + b;
  v[3] = shifted;
  v[4] = d[4] - d[2] + shift - difference - difference;
}

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
  auto column = [&](int64_t x, Bytes* t) __attribute__((always_inline)) {
    Bytes d[kPoints];
    const bool inside = x >= 0 && x < conv.width;
#pragma GCC unroll 5
    for (int i = 0; i < kPoints; ++i) {
      d[i] = (Bytes)(inside ? _mm512_maskz_loadu_epi8(mask, rows[i] + x * steps[i]) : zero);
    }
    seen |= d[1] | d[2] | d[3];  // the other two rows are these of other tiles
    transform_inputs(d, Bytes{}, t);
  };
  const Bytes shift = (Bytes)_mm512_set1_epi8(static_cast<char>(kShift));
  uint8_t* const inputs = b.inputs + channel / kLine * b.line_stride;
  const int32_t* slots = b.slots + row * tiles_x;
  Bytes t[kPoints][kPoints];
  column(-1, t[0]);
  column(0, t[1]);
  for (int64_t tile = 0; tile < tiles_x; ++tile) {
    for (int j = 2; j < kPoints; ++j) column(kStep * tile - 1 + j, t[j]);
    uint8_t* const out = inputs + slots[tile] * kLine;
#pragma GCC unroll 5
    for (int i = 0; i < kPoints; ++i) {
      const Bytes d[kPoints] = {t[0][i], t[1][i], t[2][i], t[3][i], t[4][i]};
      Bytes v[kPoints];
      transform_inputs(d, shift, v);
#pragma GCC unroll 5
      for (int j = 0; j < kPoints; ++j) {
        _mm512_store_si512(out + (kPoints * i + j) * b.position_stride, (__m512i)v[j]);
      }
      t[0][i] = t[3][i];
      t[1][i] = t[4][i];
    }
  }
  return !_mm512_test_epi8_mask((__m512i)seen, _mm512_set1_epi8(static_cast<char>(~kTopCode)));
}

// ---- weights ----

struct Panel {
  int8_t* weights;
  int64_t position_stride;
  alignas(64) int32_t constants[kStep * kStep][2 * kPanelRows];  // to be added to outputs
};

// 6 G in one direction.
inline __attribute__((always_inline)) void transform_weights(const Bytes* g, int step, Bytes* u) {
  const Bytes g0 = g[0], g1 = g[step], g2 = g[2 * step];
  const Bytes two = g2 + g2, four = two + two, difference = g1 - (g0 + g2);
  const Bytes minus_all = difference - (g1 + g1);
  u[0] = g0 + g0 + g0;
  u[1] = minus_all + minus_all + minus_all;
  u[2] = difference;
  u[3] = g0 + (g1 + g1) + four;
  u[4] = four + two;
}

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
    Bytes g[9], rows[3][kPoints], u[kPoints][kPoints];
#pragma GCC unroll 9
    for (int t = 0; t < 9; ++t) g[t] = (Bytes)_mm512_add_epi8(expand(t * k4 + k), offset);
#pragma GCC unroll 3
    for (int x = 0; x < 3; ++x) transform_weights(g + x, 3, rows[x]);
#pragma GCC unroll 5
    for (int y = 0; y < kPoints; ++y) transform_weights(rows[0] + y, kPoints, u[y]);
    u[1][1] = rows[0][1] + rows[1][1] + rows[2][1];
    const Bytes summed[5] = {g[4], g[5], g[7], g[8], u[1][1]};
#pragma GCC unroll 5
    for (int t = 0; t < 5; ++t) sums[t] = add_fours(sums[t], (__m512i)summed[t]);
#pragma GCC unroll 25
    for (int p = 0; p < kPositions; ++p) {
      _mm512_store_si512(out + p * panel->position_stride, (__m512i)u[p / kPoints][p % kPoints]);
    }
  }

  // A^T (6 G) / 6 is 0, g[2], g[1] + 3 g[2]: the share of the taps that are summed.
  static const int factors[kStep * kStep][4] = {
      {}, {}, {}, {}, {0, 0, 0, 1}, {0, 0, 1, 3}, {}, {0, 1, 0, 3}, {1, 3, 3, 9}};
  const __m512i third = _mm512_set1_epi32(static_cast<int32_t>(0xaaaaaaab));  // modulo 2^32
  const __m512i all =
      _mm512_mullo_epi32(_mm512_mullo_epi32(sums[4], third), _mm512_set1_epi32(conv.x_zero_point));
  for (int k = 0; k < kStep * kStep; ++k) {
    __m512i s = all;
    for (int t = 0; t < 4; ++t) {
      const __m512i factor = _mm512_set1_epi32(-kShift * factors[k][t]);
      s = _mm512_add_epi32(s, _mm512_mullo_epi32(sums[t], factor));
    }
    _mm512_store_si512(panel->constants[k] + half * kPanelRows, s);
  }
}

}  // namespace
}  // namespace FDDA_ISA
}  // namespace fdda
