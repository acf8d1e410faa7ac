// Packed 3x3 convolution by Winograd's F(4x4, 3x3) in 8-bit integers: products, outputs and the
// division of work. The other transforms and the layouts are in winograd_f4_u8s8.h.

#include "operand_ranges.h"
#include "planes_avx512.h"
#include "tile_u8s8_avx512.h"
#include "winograd_f4_u8s8.h"
#include "winograd_inputs.h"
#include "winograd_parts.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

constexpr int64_t kGroup = 32;  // most tiles whose sums are held at once

// int32s from one kind of sums to the next: no power of two, whose addresses would share cache
// sets.
constexpr int64_t sum_stride(int panels) { return (kGroup + 1) * panels * kPanelRows; }

// ---- products ----

constexpr int kTiles = 7;  // whose products with two panels are summed at once: two sums of each

struct Products {
  const uint8_t* inputs;  // of position 0: first tile, first 64 channels
  int64_t line_stride, position_stride;
  const Panel& panel;
  int64_t k4;
  int32_t* sums;
};

// A line of columns: its real rows, then maybe the row at i.
struct Column {
  int line;
  bool has_i;
  bool whole;     // F(4, 3), not F(2, 3)
  bool infinite;  // whether the output is needed that the row at infinity is for
};

template <int ROWS, int PANELS>
inline __attribute__((always_inline)) void add_position(__m512i (&acc)[ROWS][PANELS],
                                                        const Products& p, int position,
                                                        int64_t first) {
  const uint8_t* line = p.inputs + position * p.position_stride + first * kLine;
  const int8_t* weights = p.panel.weights + position * kWeightStep;
  for (int64_t left = p.k4; left > 0; left -= kLineSteps) {
    Lines rows{line};
    Panels panels{weights, kLine, 2 * kLine};
    add_products(acc, rows, panels, min64(left, kLineSteps), INT64_MAX);
    line += p.line_stride;
    weights += kPositions * kWeightStep;
  }
}

// op(sum of a, sum of b, where the panel's starts are, where the sum is stored) for each.
template <int ROWS, int PANELS, class Op>
inline __attribute__((always_inline)) void for_each(__m512i (&a)[ROWS][PANELS],
                                                    __m512i (&b)[ROWS][PANELS], Op op) {
#pragma GCC unroll 2
  for (int p = 0; p < PANELS; ++p) {
#pragma GCC unroll 14
    for (int r = 0; r < ROWS; ++r) {
      op(a[r][p], b[r][p], p * kPanelRows, (r * PANELS + p) * kPanelRows);
    }
  }
}

// The products of two positions.
template <int ROWS, int PANELS>
inline __attribute__((always_inline)) void multiply_two(__m512i (&a)[ROWS][PANELS],
                                                        __m512i (&b)[ROWS][PANELS],
                                                        const Products& p, int position, int next,
                                                        int64_t first) {
  const int32_t* starts = p.panel.starts[position];
  const int32_t* next_starts = p.panel.starts[next];
  for_each(a, b, [&](__m512i& a, __m512i& b, int panel, int) __attribute__((always_inline)) {
    a = _mm512_load_si512(starts + panel);
    b = _mm512_load_si512(next_starts + panel);
  });
  add_position(a, p, position, first);
  add_position(b, p, next, first);
}

// The complex product of three, `step` positions apart.
template <int ROWS, int PANELS>
inline __attribute__((always_inline)) void multiply_complex(__m512i (&re)[ROWS][PANELS],
                                                            __m512i (&im)[ROWS][PANELS],
                                                            const Products& p, int position,
                                                            int step, int64_t first) {
  multiply_two(re, im, p, position, position + step, first);
  const int32_t* starts = p.panel.starts[position + 2 * step];
  for_each(re, im, [&](__m512i& a, __m512i& b, int panel, int) __attribute__((always_inline)) {
    const __m512i sum = _mm512_add_epi32(a, b);
    a = _mm512_sub_epi32(a, b);
    b = _mm512_sub_epi32(_mm512_load_si512(starts + panel), sum);
  });
  add_position(im, p, position + 2 * step, first);
}

template <int ROWS, int PANELS>
__attribute__((noinline)) void multiply(const Products& p, const Column& c, int64_t first) {
  __m512i a[ROWS][PANELS], b[ROWS][PANELS];
  int32_t* y[F4::kStep];
  for (int i = 0; i < F4::kStep; ++i) {
    y[i] = p.sums + F4::sum(i, c.line) * sum_stride(PANELS) + first * PANELS * kPanelRows;
  }
  auto position = [&](int row) { return F4::real_row(row, c.line); };
  multiply_two(a, b, p, position(1), position(2), first);
  for_each(a, b, [&](__m512i& a, __m512i& b, int, int at) __attribute__((always_inline)) {
    const __m512i even = _mm512_add_epi32(a, b), odd = _mm512_sub_epi32(a, b);
    a = even;
    b = odd;
    if (!c.whole) return;
    _mm512_store_si512(y[2] + at, a);
    _mm512_store_si512(y[1] + at, b);
  });
  if (c.has_i) {
    multiply_complex(a, b, p, F4::complex_row(0, c.line), F4::kReal, first);
    for_each(a, b, [&](__m512i& a, __m512i& b, int, int at) __attribute__((always_inline)) {
      const __m512i re = _mm512_add_epi32(a, a), im = _mm512_add_epi32(b, b);
      const __m512i even = _mm512_load_si512(y[2] + at), odd = _mm512_load_si512(y[1] + at);
      _mm512_store_si512(y[2] + at, _mm512_sub_epi32(even, re));
      _mm512_store_si512(y[1] + at, _mm512_sub_epi32(odd, im));
      a = _mm512_add_epi32(even, re);
      b = _mm512_add_epi32(odd, im);
    });
  }
  const int32_t *starts = p.panel.starts[position(0)], *last_starts = p.panel.starts[position(3)];
  for_each(a, b, [&](__m512i& a, __m512i& b, int panel, int) __attribute__((always_inline)) {
    if (!c.whole) {
      a = _mm512_add_epi32(a, a);
      b = _mm512_add_epi32(b, b);
    }
    a = _mm512_add_epi32(a, _mm512_load_si512(starts + panel));
    b = _mm512_add_epi32(b, _mm512_load_si512(last_starts + panel));
  });
  add_position(a, p, position(0), first);
  for_each(a, b, [&](__m512i& a, __m512i&, int, int at) __attribute__((always_inline)) {
    _mm512_store_si512(y[0] + at, a);
  });
  if (!c.infinite) return;
  add_position(b, p, position(3), first);
  int32_t* const last = c.whole ? y[3] : y[1];
  for_each(a, b, [&](__m512i&, __m512i& b, int, int at) __attribute__((always_inline)) {
    _mm512_store_si512(last + at, b);
  });
}

// What is complex in rows and columns.
template <int ROWS, int PANELS>
__attribute__((noinline)) void multiply_both(const Products& p, int position, int sum,
                                             int64_t first) {
  __m512i re[ROWS][PANELS], im[ROWS][PANELS];
  multiply_complex(re, im, p, position, 1, first);
  int32_t* const out = p.sums + sum * sum_stride(PANELS) + first * PANELS * kPanelRows;
  for_each(re, im, [&](__m512i& re, __m512i& im, int, int at) __attribute__((always_inline)) {
    _mm512_store_si512(out + at, re);
    _mm512_store_si512(out + sum_stride(PANELS) + at, im);
  });
}

// ---- outputs ----

// Of 16 channels of one tile, [row][column], `step` int32s apart.
template <bool ROWS_WHOLE, bool COLUMNS_WHOLE>
__attribute__((noinline)) void transform_tile(const int32_t* sums, int64_t stride, int32_t* out,
                                              int64_t step) {
  constexpr int kRows = ROWS_WHOLE ? 4 : 2, kColumns = COLUMNS_WHOLE ? 4 : 2;
  Sums y[kRows * kColumns];
  F4::transform_sums<ROWS_WHOLE, COLUMNS_WHOLE>(
      [&](int i)
          __attribute__((always_inline)) { return (Sums)_mm512_load_si512(sums + i * stride); },
      y);
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; ++j) {
      const __m512i v = _mm512_srai_epi32((__m512i)y[i * kColumns + j], 4);
      _mm512_store_si512(out + (i * kStep + j) * step, v);
    }
  }
}

template <int PANELS, Output OUTPUT>
__attribute__((noinline)) void store_tiles(const PackedConv& conv, int64_t channel,
                                           const Panel& panel, const int32_t* sums,
                                           const TileAt* tiles, int64_t count) {
  const Columns<PANELS, OUTPUT> columns(conv, channel, min64(kWide, conv.out_channels - channel));
  constexpr int64_t stride = sum_stride(PANELS);
  alignas(64) int32_t y[kStep][kStep][PANELS][kPanelRows];
  for (int64_t t = 0; t < count; ++t, sums += PANELS * kPanelRows) {
    const TileAt at = tiles[t];
    const auto transform =
        F4::whole(at.rows)
            ? (F4::whole(at.columns) ? transform_tile<true, true> : transform_tile<true, false>)
            : (F4::whole(at.columns) ? transform_tile<false, true> : transform_tile<false, false>);
    for (int p = 0; p < PANELS; ++p) {
      transform(sums + p * kPanelRows, stride, y[0][0][p], PANELS * kPanelRows);
    }
    for (int i = 0; i < at.rows; ++i) {
      const int64_t pixel = at.pixel + i * conv.width;
      with_rows<kStep>(at.columns, [&](auto width) __attribute__((always_inline)) {
        __m512i existing[decltype(width)::kCount][PANELS];
        memcpy(existing, y[i], sizeof existing);
        columns.store(pixel, existing);
      });
    }
  }
}

// ---- driver ----

// PANELS * 16 outputs from `channel` on of the tiles [begin, end).
template <int PANELS>
void run_panel(const PackedConv& conv, bool narrow, const Block& b, int64_t channel, int64_t begin,
               int64_t end) {
  const auto store = !narrow                     ? store_tiles<PANELS, Output::kAny>
                     : conv.epilogue.residual_u8 ? store_tiles<PANELS, Output::kCodesPlusCodes>
                                                 : store_tiles<PANELS, Output::kCodes>;
  Panel panel;
  const int64_t weight_bytes = ceil_div(conv.channels, kLine) * kPositions * kWeightStep;
  panel.weights = static_cast<int8_t*>(scratch(kLocalWeights, weight_bytes));
  for (int half = 0; half < PANELS; ++half) {
    expand_panel(conv, channel + half * kPanelRows, half, &panel);
  }
  constexpr int64_t stride = sum_stride(PANELS);
  int32_t* sums = static_cast<int32_t*>(scratch(kLocalRows, F4::kSums * stride * sizeof(int32_t)));
  const int64_t columns = (conv.width - 1) % kStep + 1, rows = (conv.height - 1) % kStep + 1;
  while (begin < end) {
    const int64_t group = min64(end, b.group_end(begin, kGroup));
    const Products products{b.inputs + begin * kLine,    b.line_stride, b.position_stride, panel,
                            conv.channels / kBlockDepth, sums};
    // The tiles of the group with or without all rows; with all columns, or any.
    auto for_tiles = [&](bool all_columns, bool all_rows, auto body) {
      int64_t first, last;
      b.range(all_columns, all_rows, &first, &last);
      first = max64(first, begin) - begin;
      last = min64(last, group) - begin;
      if (first >= last) return;
      for_each_row_tile<2 * kTiles / PANELS>(
          last - first, [&](auto tiles, int64_t tile) { body(tiles, first + tile); });
    };
    for (int line = 0; line < F4::kLines; ++line) {
      const bool is_real = line < F4::kReal;
      const bool all_columns = is_real ? line == 3 && columns % 2 : !F4::whole(columns);
      for (int without = 0; without < 2; ++without) {
        const bool whole = !without || F4::whole(rows);
        const Column column{line, whole && is_real, whole, !(without && rows % 2)};
        for_tiles(all_columns, !without, [&](auto tiles, int64_t first) {
          multiply<decltype(tiles)::kCount, PANELS>(products, column, first);
        });
      }
    }
    for (int without = 0; without < 1 + F4::whole(rows); ++without) {
      for_tiles(!F4::whole(columns), !without, [&](auto tiles, int64_t first) {
        constexpr int kCount = decltype(tiles)::kCount;
        multiply_both<kCount, PANELS>(products, F4::kAtI, F4::kSumAtI, first);
        multiply_both<kCount, PANELS>(products, F4::kAtConjugate, F4::kSumAtConjugate, first);
      });
    }
    store(conv, channel, panel, sums, b.tiles + begin, group - begin);
    begin = group;
  }
}

// Everything that can be told without reading inputs or weights.
bool applies(const PackedConv& conv) {
  return suits_winograd(conv) && conv.bits <= 4 && conv.weight_fits_s8 &&
         F4::fits(largest_weight(conv), conv.x_zero_point) && F4::pays(conv);
}

}  // namespace

bool winograd_f4_conv2d(const PackedConv& conv) {
  if (!applies(conv)) return false;
  const bool narrow =
      rounds_within_int32(conv, static_cast<float>(9 * F4::kLargestCode * F4::kLargestWeight) *
                                    static_cast<float>(conv.channels));
  auto run_rows = [&](int64_t first_row, int64_t last_row, int64_t threads) {
    const Block b = plan_tiles<kStep, kPositions>(conv, first_row, last_row - first_row);
    auto transform = [&](int64_t row, int64_t c) {
      const int64_t y = (first_row + row) % ceil_div(conv.height, kStep) * kStep;
      return F4::whole(conv.height - y) ? transform_row<true>(conv, b, row, c)
                                        : transform_row<false>(conv, b, row, c);
    };
    auto multiply = [&](auto panels, int64_t channel, int64_t begin, int64_t end) {
      run_panel<decltype(panels)::kCount>(conv, narrow, b, channel, begin, end);
      return true;
    };
    return run_block(conv, b, threads, transform, multiply);
  };
  return run_parts(conv, kStep, kPositions, run_rows);
}

}  // namespace FDDA_ISA
}  // namespace fdda
