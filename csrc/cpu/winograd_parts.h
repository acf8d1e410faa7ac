// What the packed Winograd convolutions of AVX-512 share: how they read inputs and weights,
// multiply lines of them, and divide their work.
#pragma once

#include "planes_avx512.h"
#include "row_tiles.h"
#include "winograd_tiles.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

constexpr int kPairRows = 2 * kPanelRows;          // outputs of two panels
constexpr int64_t kInputBytes = int64_t{1} << 20;  // of V at a time: it stays in L2

// The rows that a row of tiles reads of 64 channels from `channel` on.
template <int COUNT>
class InputRows {
 public:
  // top: the first of the rows, perhaps outside of the image.
  InputRows(const PackedConv& conv, int64_t image, int64_t top, int64_t channel)
      : width_(conv.width), mask_(~uint64_t{0} >> (kLine - min64(kLine, conv.channels - channel))) {
    zero_ = _mm512_set1_epi8(static_cast<char>(conv.x_zero_point));
    _mm512_store_si512(outside_, zero_);
#pragma GCC unroll 6
    for (int i = 0; i < COUNT; ++i) {
      const int64_t y = top + i;
      const bool inside = y >= 0 && y < conv.height;
      const int64_t pixel = (image * conv.height + y) * conv.width;
      rows_[i] = inside ? conv.x + pixel * conv.channels + channel : outside_;
      steps_[i] = inside ? conv.channels : 0;
    }
  }
  InputRows(const InputRows&) = delete;

  // Those of column x, one below the other.
  template <class Bytes>
  __attribute__((always_inline)) void read(int64_t x, Bytes* d) const {
    const bool inside = x >= 0 && x < width_;
#pragma GCC unroll 6
    for (int i = 0; i < COUNT; ++i) {
      d[i] = (Bytes)(inside ? _mm512_maskz_loadu_epi8(mask_, rows_[i] + x * steps_[i]) : zero_);
    }
  }

 private:
  const int64_t width_;
  const __mmask64 mask_;
  __m512i zero_;
  const uint8_t* rows_[COUNT];
  int64_t steps_[COUNT];
  alignas(64) uint8_t outside_[kLine];
};

// Four times each of the offsets of 16 outputs, zeros beyond the last one.
inline __m512i offsets_of(const PackedConv& conv, int64_t channel) {
  alignas(64) int8_t offsets[kLine] = {};
  for (int64_t j = 0; j < min64(kLine, kBlockDepth * (conv.out_channels - channel)); ++j) {
    offsets[j] = static_cast<int8_t>(conv.weight_offset[channel + j / kBlockDepth]);
  }
  return _mm512_load_si512(offsets);
}

// The bit planes of 16 outputs.
inline Planes planes_of(const PackedConv& conv, int64_t channel) {
  const int64_t depth = 9 * conv.channels;
  const int64_t panel_bytes = depth / kBlockDepth * conv.bits * kPlaneBytes;
  return {conv.weight + channel / kPanelRows * panel_bytes, conv.bits, depth};
}

// body(how to expand up to 4 bits by masked adds)
template <class Body>
void with_masked_adds(const Planes& p, Body body) {
  switch (p.bits) {
    case 2: return body(MaskedAdds<2>(p));
    case 3: return body(MaskedAdds<3>(p));
    default: return body(MaskedAdds<4>(p));
  }
}

// Products of tiles of a position, from their first line of V and place_weights's weights on.
template <int ROWS, int PANELS>
inline __attribute__((always_inline)) void add_lines(__m512i (&acc)[ROWS][PANELS],
                                                     const uint8_t* line, int64_t line_stride,
                                                     const int8_t* weights, int64_t weight_stride,
                                                     int64_t k4, int64_t exact_steps) {
  for (; k4 > 0; k4 -= kLineSteps) {
    Lines rows{line};
    Panels panels{weights, kLine, 2 * kLine};
    add_products(acc, rows, panels, min64(k4, kLineSteps), exact_steps);
    line += line_stride;
    weights += weight_stride;
  }
}

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
