// Packed 3x3 convolution by Winograd's F(3x3, 3x3) in 8-bit integers: products, outputs and the
// division of work. The other transforms and the layouts are in winograd_f3_u8s8.h.

#include "operand_ranges.h"
#include "tile_u8s8_avx512.h"
#include "winograd_f3_u8s8.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

constexpr int64_t kGroup = 28;  // most tiles whose sums are held at once

// int32s between two columns' sums: no power of two, whose addresses would share cache sets.
constexpr int64_t sum_stride(int panels) { return (kGroup + 1) * panels * kPanelRows; }

// ---- products ----

constexpr int kTiles = 7;  // whose products with two panels are summed at once: two sums of each

// A column of the 5 x 5 positions.
struct Column {
  const uint8_t* inputs;  // of position 0: first tile, first 64 channels
  int64_t line_stride, input_stride;
  const int8_t* weights;
  int64_t k4;
  bool has_thirds;  // the products of position 1 are to be multiplied by -3
  int32_t* sums[kStep];
};

template <int ROWS, int PANELS>
inline __attribute__((always_inline)) void add_position(__m512i (&acc)[ROWS][PANELS],
                                                        const Column& c, int position,
                                                        int64_t first) {
  add_lines(acc, c.inputs + position * c.input_stride + first * kLine, c.line_stride,
            c.weights + kPoints * position * kWeightStep, kPositions * kWeightStep, c.k4,
            INT64_MAX);
}

// op(sum of a, sum of b, its place in memory) for each.
template <int ROWS, int PANELS, class Op>
inline __attribute__((always_inline)) void for_each(__m512i (&a)[ROWS][PANELS],
                                                    __m512i (&b)[ROWS][PANELS], Op op) {
#pragma GCC unroll 14
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
    for (int p = 0; p < PANELS; ++p) op(a[r][p], b[r][p], (r * PANELS + p) * kPanelRows);
  }
}

// With products m the sums m[0] + m[1] + m[2] + m[3], m[1] - m[2] + 2 m[3] and, if all_rows,
// m[1] + m[2] + 4 m[3] + m[4].
template <int ROWS, int PANELS>
__attribute__((noinline)) void multiply(const Column& c, int64_t first, bool all_rows) {
  __m512i a[ROWS][PANELS] = {}, b[ROWS][PANELS] = {};
  int32_t* y[kStep];
  for (int i = 0; i < kStep; ++i) y[i] = c.sums[i] + first * PANELS * kPanelRows;
  add_position(b, c, 3, first);
  for_each(a, b, [&](__m512i&, __m512i& b, int64_t at) __attribute__((always_inline)) {
    _mm512_store_si512(y[1] + at, b);
    b = _mm512_setzero_si512();
  });
  add_position(a, c, 1, first);
  if (c.has_thirds) {
    for_each(a, b, [](__m512i& a, __m512i&, int64_t) __attribute__((always_inline)) {
      a = _mm512_sub_epi32(a, _mm512_slli_epi32(a, 2));
    });
  }
  add_position(b, c, 2, first);
  for_each(a, b, [&](__m512i& a, __m512i& b, int64_t at) __attribute__((always_inline)) {
    const __m512i m = _mm512_load_si512(y[1] + at), two = _mm512_add_epi32(m, m);
    const __m512i sum = _mm512_add_epi32(a, b);
    _mm512_store_si512(y[1] + at, _mm512_add_epi32(_mm512_sub_epi32(a, b), two));
    a = _mm512_add_epi32(sum, m);
    b = _mm512_add_epi32(sum, _mm512_add_epi32(two, two));
  });
  add_position(a, c, 0, first);
  for_each(a, b, [&](__m512i& a, __m512i&, int64_t at) __attribute__((always_inline)) {
    _mm512_store_si512(y[0] + at, a);
  });
  if (!all_rows) return;  // of two rows, the second is complete
  add_position(b, c, 4, first);
  for_each(a, b, [&](__m512i&, __m512i& b, int64_t at) __attribute__((always_inline)) {
    _mm512_store_si512(y[2] + at, b);
  });
}

// Tiles [first, last).
template <int PANELS>
void multiply_all(const Column& c, int64_t first, int64_t last, bool all_rows) {
  for_each_row_tile<2 * kTiles / PANELS>(last - first, [&](auto rows, int64_t tile) {
    multiply<decltype(rows)::kCount, PANELS>(c, first + tile, all_rows);
  });
}

// ---- outputs ----

template <int PANELS, Output OUTPUT>
__attribute__((noinline)) void store_tiles(const PackedConv& conv, int64_t channel,
                                           const Panel& panel, const int32_t* sums,
                                           const TileAt* tiles, int64_t count) {
  typedef uint32_t Sums __attribute__((vector_size(64)));
  const Columns<PANELS, OUTPUT> columns(conv, channel, min64(kWide, conv.out_channels - channel));
  constexpr int64_t stride = sum_stride(PANELS);
  for (int64_t t = 0; t < count; ++t, sums += PANELS * kPanelRows) {
    const TileAt at = tiles[t];
    for (int i = 0; i < at.rows; ++i) {
      __m512i y[kStep][PANELS];
#pragma GCC unroll 2
      for (int p = 0; p < PANELS; ++p) {
        Sums m[kPoints], s[kStep];
#pragma GCC unroll 5
        for (int j = 0; j < kPoints; ++j) {
          const int32_t* from = sums + (kPoints * i + j) * stride + p * kPanelRows;
          m[j] = (Sums)_mm512_load_si512(from);
        }
        F3::transform_products(m, s);
#pragma GCC unroll 3
        for (int j = 0; j < kStep; ++j) {
          const int32_t* constants = panel.constants[kStep * i + j] + p * kPanelRows;
          y[j][p] = _mm512_add_epi32(_mm512_srai_epi32((__m512i)F3::ninth(s[j]), 2),
                                     _mm512_load_si512(constants));
        }
      }
      const int64_t pixel = at.pixel + i * conv.width;
      with_rows<kStep>(at.columns, [&](auto width) __attribute__((always_inline)) {
        constexpr int kWidth = decltype(width)::kCount;
        __m512i existing[kWidth][PANELS];
        memcpy(existing, y, sizeof existing);
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
  int32_t* sums =
      static_cast<int32_t*>(scratch(kLocalRows, kStep * kPoints * stride * sizeof(int32_t)));
  while (begin < end) {
    const int64_t group = min64(end, b.group_end(begin, kGroup));
    for (int j = 0; j < kPoints; ++j) {
      int32_t* const own = sums + j * stride;
      const Column column{b.inputs + j * b.position_stride + begin * kLine,
                          b.line_stride,
                          kPoints * b.position_stride,
                          panel.weights + j * kWeightStep,
                          conv.channels / kBlockDepth,
                          j == 1,
                          {own, own + kPoints * stride, own + 2 * kPoints * stride}};
      for (int without = 0; without < 2; ++without) {
        int64_t first, last;
        b.range(j == Block::kPoints - 1, !without, &first, &last);
        first = max64(first, begin);
        last = min64(last, group);
        if (first < last) multiply_all<PANELS>(column, first - begin, last - begin, !without);
      }
    }
    store(conv, channel, panel, sums, b.tiles + begin, group - begin);
    begin = group;
  }
}

// Everything that can be told without reading inputs or weights.
bool applies(const PackedConv& conv) {
  return suits_winograd(conv) && conv.weight_fits_s8 &&
         F3::fits(largest_weight(conv), conv.x_zero_point) && F3::pays(conv);
}

}  // namespace

bool winograd_f3_conv2d(const PackedConv& conv) {
  if (!applies(conv)) return false;
  const bool narrow =
      rounds_within_int32(conv, static_cast<float>(9 * F3::kLargestCode * F3::kLargestWeight) *
                                    static_cast<float>(conv.channels));
  auto run_rows = [&](int64_t first_row, int64_t last_row, int64_t threads) {
    const Block b = plan_tiles<kStep>(conv, first_row, last_row - first_row);
    auto transform = [&](int64_t row, int64_t c) { return transform_row(conv, b, row, c); };
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
