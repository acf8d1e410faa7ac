// Winograd's F(4x4, 3x3) in 8-bit integers on AVX512-VNNI: products. Of few channels, the sums of a
// line of columns are transformed before they leave the registers: fewer are stored and read again.
// Of many channels, and for few tiles, each position takes twice as many tiles at once: weights are
// read half as often, and those that are sums of two others are never stored.
#pragma once

#include "dot_avx512.h"
#include "row_tiles.h"
#include "winograd_f4_u8s8.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

constexpr int64_t kGroup = 32;  // most tiles whose sums are held at once

// int32s from one kind of sums to the next: no power of two, whose addresses would share cache
// sets.
constexpr int64_t sum_stride(int panels) { return (kGroup + 1) * panels * kPanelRows; }

struct Products {
  const uint8_t* inputs;  // of position 0: first tile, first 64 channels
  int64_t line_stride, position_stride;
  const Panel& panel;
  int64_t k4;
  int32_t* sums;
};

// Tiles [begin, end) of a block.
struct Group {
  const Block& block;
  int64_t begin, end;
  int64_t columns, rows;  // outputs of the tiles that lack some

  // body(Rows<n>, first) of those of the group's tiles that are of [from, to).
  template <int MOST, class Body>
  void for_tiles(int64_t from, int64_t to, Body body) const {
    const int64_t first = max64(from, begin) - begin, last = min64(to, end) - begin;
    if (first >= last) return;
    for_each_row_tile<MOST>(last - first,
                            [&](auto tiles, int64_t tile) { body(tiles, first + tile); });
  }
};

// Whether a line of points is of no use for so many outputs.
inline bool needs_all(int line, int64_t outputs) {
  if (line < 3) return false;
  return line == 3 ? outputs % 2 : !F4::whole(outputs);
}

template <int ROWS, int PANELS>
inline __attribute__((always_inline)) void add_position(__m512i (&acc)[ROWS][PANELS],
                                                        const Products& p, int position,
                                                        int64_t first) {
  add_lines(acc, p.inputs + position * p.position_stride + first * kLine, p.line_stride,
            p.panel.weights + position * kWeightStep, kPositions * kWeightStep, p.k4, INT64_MAX);
}

// ---- by lines of columns ----

constexpr int kTiles = 7;  // whose products with two panels are summed at once: two sums of each

// A line of columns: its real rows, then maybe the row at i.
struct Column {
  int line;
  bool has_i;
  bool whole;     // F(4, 3), not F(2, 3)
  bool infinite;  // whether the output is needed that the row at infinity is for
};

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

template <int PANELS>
void multiply_columns(const Group& g, const Products& products) {
  constexpr int kMost = 2 * kTiles / PANELS;
  int64_t from, to;
  for (int line = 0; line < F4::kLines; ++line) {
    for (int without = 0; without < 2; ++without) {
      const bool whole = !without || F4::whole(g.rows);
      const Column column{line, whole && line < F4::kReal, whole, !(without && g.rows % 2)};
      g.block.range(needs_all(line, g.columns), !without, &from, &to);
      g.template for_tiles<kMost>(from, to, [&](auto tiles, int64_t first) {
        multiply<decltype(tiles)::kCount, PANELS>(products, column, first);
      });
    }
  }
  g.block.needed(!F4::whole(g.columns), !F4::whole(g.rows), &from, &to);
  g.template for_tiles<kMost>(from, to, [&](auto tiles, int64_t first) {
    constexpr int kCount = decltype(tiles)::kCount;
    multiply_both<kCount, PANELS>(products, F4::kAtI, F4::kSumAtI, first);
    multiply_both<kCount, PANELS>(products, F4::kAtConjugate, F4::kSumAtConjugate, first);
  });
}

// ---- by positions ----

constexpr int kManyTiles = 14;  // whose products with two panels are summed at once

// The two panels of weights that are the sums of two others.
template <int ROWS, int PANELS>
inline __attribute__((always_inline)) void add_of_sums(__m512i (&acc)[ROWS][PANELS], Lines rows,
                                                       const int8_t* a, const int8_t* b,
                                                       int64_t steps) {
  for (int64_t i = 0; i < steps; ++i, a += 2 * kLine, b += 2 * kLine) {
    __m512i w[PANELS];
#pragma GCC unroll 2
    for (int p = 0; p < PANELS; ++p) {
      w[p] = _mm512_add_epi8(_mm512_load_si512(a + p * kLine), _mm512_load_si512(b + p * kLine));
    }
    add_rows(acc, rows, w, _mm512_dpbusd_epi32);
  }
}

template <int ROWS, int PANELS>
__attribute__((noinline)) void multiply_position(const Products& p, int position, int64_t first) {
  __m512i acc[ROWS][PANELS];
#pragma GCC unroll 2
  for (int k = 0; k < PANELS; ++k) {
    const __m512i start = _mm512_load_si512(p.panel.starts[position] + k * kPanelRows);
#pragma GCC unroll 28
    for (int r = 0; r < ROWS; ++r) acc[r][k] = start;
  }
  const int64_t step = F4::step_of_sum(position);
  if (!step) {
    add_position(acc, p, position, first);
  } else {
    const uint8_t* line = p.inputs + position * p.position_stride + first * kLine;
    const int8_t* weights = p.panel.weights + (position - step) * kWeightStep;
    for (int64_t left = p.k4; left > 0; left -= kLineSteps) {
      add_of_sums(acc, Lines{line}, weights, weights - step * kWeightStep, min64(left, kLineSteps));
      line += p.line_stride;
      weights += kPositions * kWeightStep;
    }
  }
  int32_t* const out = p.sums + position * sum_stride(PANELS) + first * PANELS * kPanelRows;
#pragma GCC unroll 28
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
    for (int k = 0; k < PANELS; ++k) {
      _mm512_store_si512(out + (r * PANELS + k) * kPanelRows, acc[r][k]);
    }
  }
}

template <int PANELS>
void multiply_positions(const Group& g, const Products& products) {
  for (int position = 0; position < kPositions; ++position) {
    int64_t from, to;
    g.block.needed(needs_all(F4::column_of(position), g.columns),
                   needs_all(F4::row_of(position), g.rows), &from, &to);
    g.template for_tiles<kManyTiles>(from, to, [&](auto tiles, int64_t first) {
      multiply_position<decltype(tiles)::kCount, PANELS>(products, position, first);
    });
  }
}

}  // namespace
}  // namespace FDDA_ISA
}  // namespace fdda
