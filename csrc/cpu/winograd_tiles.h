// Tiles of outputs of the packed Winograd convolutions of AVX-512, STEP x STEP outputs each.
#pragma once

#include "functions.h"
#include "parallel.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

constexpr int64_t kLine = 64;  // channels of a line of V

// Weights are [ceil(C / 64)][positions][16][2 panels][16 outputs][4 inputs], the second panel
// perhaps empty. Bytes from a position to the next: constant, and no power of two, whose addresses
// would share cache sets.
constexpr int kLineSteps = kLine / kBlockDepth;
constexpr int64_t kWeightStep = (2 * kLineSteps + 1) * kLine;

inline int8_t* place_weights(int8_t* first, int64_t positions, int64_t k) {
  return first + k / kLineSteps * positions * kWeightStep + k % kLineSteps * 2 * kLine;
}

struct TileAt {
  int64_t pixel;      // its first output, counted over the images
  int columns, rows;  // how many of its outputs exist
};

// Rows of tiles whose transformed inputs are held at once. Tiles are ordered by which outputs do
// not exist: some columns, none, some rows, both. So the last column and the last row of positions,
// which only the last outputs need, have one range of tiles each: at 7 x 7 225 products instead of
// 256 (STEP 2), 196 instead of 225 (STEP 3).
template <int STEP, int POSITIONS = (STEP + 2) * (STEP + 2)>
struct TileBlock {
  static constexpr int kPoints = STEP + 2;  // positions of a side

  TileAt* tiles;   // by slot
  int32_t* slots;  // by (row of tiles, column)
  uint8_t* inputs;
  int64_t first_row, rows, count;
  int64_t ends[4];                       // of the classes
  int64_t line_stride, position_stride;  // of inputs, in bytes

  // The tiles with or without all rows; with all columns, or any.
  void range(bool all_columns, bool all_rows, int64_t* begin, int64_t* end) const {
    *begin = all_rows ? (all_columns ? ends[0] : 0) : ends[1];
    *end = all_rows ? ends[1] : all_columns ? ends[2] : count;
  }

  // The tiles that a position is needed by: with all columns, or any; with all rows, or any.
  void needed(bool all_columns, bool all_rows, int64_t* begin, int64_t* end) const {
    *begin = all_columns ? ends[0] : 0;
    *end = all_rows ? ends[1] : all_columns ? ends[2] : count;
  }

  // End of the group of at most so many that starts at `begin`: whole classes, or an even share of
  // one, so that no position's range meets a group in a few tiles.
  int64_t group_end(int64_t begin, int64_t most) const {
    int64_t end = begin;
    for (int64_t e : ends) {
      if (e - begin <= most) end = max64(end, e);
    }
    for (int i = 0; end == begin; ++i) {
      const int64_t rest = ends[i] - begin;
      if (rest > 0) end = begin + ceil_div(rest, ceil_div(rest, most));
    }
    return end;
  }
};

// Tiles of a line of V, at constant displacements.
struct Lines {
  const uint8_t* x;

  const uint8_t* operator()(int r) const { return x + r * kLine; }
  void next() { x += kBlockDepth; }
};

template <int STEP, int POSITIONS = (STEP + 2) * (STEP + 2)>
TileBlock<STEP, POSITIONS> plan_tiles(const PackedConv& conv, int64_t first_row, int64_t rows) {
  const int64_t tiles_y = ceil_div(conv.height, STEP), tiles_x = ceil_div(conv.width, STEP);
  TileBlock<STEP, POSITIONS> b;
  b.first_row = first_row;
  b.rows = rows;
  b.count = rows * tiles_x;
  b.line_stride = (b.count + 1) * kLine;
  b.position_stride = ceil_div(conv.channels, kLine) * b.line_stride + 3 * kLine;
  if (b.position_stride % 4096 < 4 * kLine) b.position_stride += 4 * kLine;
  const int64_t bytes = POSITIONS * b.position_stride;
  b.inputs = static_cast<uint8_t*>(
      scratch(kSharedRows, bytes + b.count * (sizeof(TileAt) + sizeof(int32_t))));
  b.tiles = reinterpret_cast<TileAt*>(b.inputs + bytes);
  b.slots = reinterpret_cast<int32_t*>(b.tiles + b.count);

  auto height = [&](int64_t row) {
    return min64(STEP, conv.height - (first_row + row) % tiles_y * STEP);
  };
  int64_t full_rows = 0;
  for (int64_t r = 0; r < rows; ++r) full_rows += height(r) == STEP;
  const int64_t wide = conv.width / STEP;  // tiles of a row with all columns
  int64_t next[4] = {0, full_rows * (tiles_x - wide), full_rows * tiles_x, full_rows * tiles_x};
  next[3] += (rows - full_rows) * wide;
  for (int i = 0; i < 3; ++i) b.ends[i] = next[i + 1];
  b.ends[3] = b.count;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t n = (first_row + r) / tiles_y, y = (first_row + r) % tiles_y * STEP;
    for (int64_t x = 0; x < tiles_x; ++x) {
      const bool all_columns = x < wide, all_rows = height(r) == STEP;
      const int64_t slot = next[all_rows ? (all_columns ? 1 : 0) : (all_columns ? 2 : 3)]++;
      b.slots[r * tiles_x + x] = static_cast<int32_t>(slot);
      b.tiles[slot] = {(n * conv.height + y) * conv.width + STEP * x,
                       static_cast<int>(min64(STEP, conv.width - STEP * x)),
                       static_cast<int>(height(r))};
    }
  }
  return b;
}

}  // namespace
}  // namespace FDDA_ISA
}  // namespace fdda
