// How the packed Winograd convolutions of AVX-512 divide their work.
#pragma once

#include "row_tiles.h"
#include "winograd_tiles.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

constexpr int kPairRows = 2 * kPanelRows;          // outputs of two panels
constexpr int64_t kInputBytes = int64_t{1} << 20;  // of V at a time: it stays in L2

// body(i) of all i below count; false as soon as one of them is, and then not of all.
template <class Body>
bool all_of(int64_t count, Body body) {
  bool all = true;
  parallel_for(count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end && __atomic_load_n(&all, __ATOMIC_RELAXED); ++i) {
      if (!body(i)) __atomic_store_n(&all, false, __ATOMIC_RELAXED);
    }
  });
  return all;
}

// run(first, last, threads) of rows of tiles; false as soon as one of them is. Many tiles: each
// thread has its own and expands all weights for them, so that no transformed input moves between
// processors. A parallel_for within another one runs on its thread.
template <class Run>
bool run_parts(const PackedConv& conv, int64_t step, int64_t positions, Run run) {
  const int64_t tiles_x = ceil_div(conv.width, step);
  const int64_t rows = conv.batch * ceil_div(conv.height, step);
  const int64_t row_bytes = positions * tiles_x * ceil_div(conv.channels, kLine) * kLine;
  int64_t parts = ceil_div(rows, max64(1, kInputBytes / row_bytes));
  const int64_t threads = num_threads();
  if (parts > 1 || rows * tiles_x >= 64 * threads) {
    parts = min64(rows, ceil_div(parts, threads) * threads);
  }
  return all_of(parts, [&](int64_t part) {
    return run(part * rows / parts, (part + 1) * rows / parts, parts > 1 ? 1 : threads);
  });
}

// The tiles of a block. Several threads share the rows' inputs, then the panels of outputs, and
// where these alone would not keep them equally busy, the tiles.
//   transform(row, channel)                    of 64 channels' inputs
//   multiply(Rows<panels>, channel, begin, end)  of tiles; both: whether all fits
template <class Block, class Transform, class Multiply>
bool run_block(const PackedConv& conv, const Block& b, int64_t threads, Transform transform,
               Multiply multiply) {
  const bool fits = all_of(b.rows, [&](int64_t row) {
    for (int64_t c = 0; c < conv.channels; c += kLine) {
      if (!transform(row, c)) return false;
    }
    return true;
  });
  const int64_t panels = ceil_div(conv.out_channels, kPairRows);
  const int64_t shares = panels % threads && panels < 4 * threads ? threads : 1;
  return fits && all_of(panels * shares, [&](int64_t task) {
           const int64_t channel = task / shares * kPairRows, share = task % shares;
           const int64_t first = share * b.count / shares, last = (share + 1) * b.count / shares;
           return conv.out_channels - channel > kPanelRows
                      ? multiply(Rows<2>(), channel, first, last)
                      : multiply(Rows<1>(), channel, first, last);
         });
}

}  // namespace
}  // namespace FDDA_ISA
}  // namespace fdda
