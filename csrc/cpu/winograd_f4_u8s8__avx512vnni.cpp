// Packed 3x3 convolution by Winograd's F(4x4, 3x3) in 8-bit integers: outputs and the division of
// work. The other transforms and the layouts are in winograd_f4_u8s8.h.

#include "operand_ranges.h"
#include "tile_u8s8_avx512.h"
#include "winograd_f4_products.h"
#include "winograd_inputs.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

constexpr int64_t kFewChannels = 128, kFewTiles = 16;  // beyond, and up to: by positions

// ---- outputs ----

// Of 16 channels of one tile, [row][column], `step` int32s apart.
template <bool ROWS_WHOLE, bool COLUMNS_WHOLE, bool BY_POSITIONS>
__attribute__((noinline)) void transform_tile(const int32_t* sums, int64_t stride, int32_t* out,
                                              int64_t step) {
  constexpr int kRows = ROWS_WHOLE ? 4 : 2, kColumns = COLUMNS_WHOLE ? 4 : 2;
  Sums y[kRows * kColumns];
  auto load = [&](int i) __attribute__((always_inline)) {
    return (Sums)_mm512_load_si512(sums + i * stride);
  };
  if (BY_POSITIONS) {
    Sums all[F4::kSums];
    F4::sum_products<ROWS_WHOLE, COLUMNS_WHOLE>(load, all);
    auto sum = [&](int i) __attribute__((always_inline)) { return all[i]; };
    F4::transform_sums<ROWS_WHOLE, COLUMNS_WHOLE>(sum, y);
  } else {
    F4::transform_sums<ROWS_WHOLE, COLUMNS_WHOLE>(load, y);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; ++j) {
      const __m512i v = _mm512_srai_epi32((__m512i)y[i * kColumns + j], 4);
      _mm512_store_si512(out + (i * kStep + j) * step, v);
    }
  }
}

template <int PANELS, Output OUTPUT, bool BY_POSITIONS>
__attribute__((noinline)) void store_tiles(const PackedConv& conv, int64_t channel,
                                           const int32_t* sums, const TileAt* tiles,
                                           int64_t count) {
  const Columns<PANELS, OUTPUT> columns(conv, channel, min64(kWide, conv.out_channels - channel));
  constexpr int64_t stride = sum_stride(PANELS);
  alignas(64) int32_t y[kStep][kStep][PANELS][kPanelRows];
  for (int64_t t = 0; t < count; ++t, sums += PANELS * kPanelRows) {
    const TileAt at = tiles[t];
    const auto transform =
        F4::whole(at.rows) ? (F4::whole(at.columns) ? transform_tile<true, true, BY_POSITIONS>
                                                    : transform_tile<true, false, BY_POSITIONS>)
                           : (F4::whole(at.columns) ? transform_tile<false, true, BY_POSITIONS>
                                                    : transform_tile<false, false, BY_POSITIONS>);
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
template <int PANELS, bool BY_POSITIONS>
void run_panel(const PackedConv& conv, bool narrow, const Block& b, int64_t channel, int64_t begin,
               int64_t end) {
  const auto store = !narrow ? store_tiles<PANELS, Output::kAny, BY_POSITIONS>
                     : conv.epilogue.residual_u8
                         ? store_tiles<PANELS, Output::kCodesPlusCodes, BY_POSITIONS>
                         : store_tiles<PANELS, Output::kCodes, BY_POSITIONS>;
  Panel panel;
  const int64_t weight_bytes = ceil_div(conv.channels, kLine) * kPositions * kWeightStep;
  panel.weights = static_cast<int8_t*>(scratch(kLocalWeights, weight_bytes));
  for (int half = 0; half < PANELS; ++half) {
    expand_panel<!BY_POSITIONS>(conv, channel + half * kPanelRows, half, &panel);
  }
  constexpr int64_t stride = sum_stride(PANELS);
  int32_t* sums = static_cast<int32_t*>(
      scratch(kLocalRows, (BY_POSITIONS ? kPositions : F4::kSums) * stride * sizeof(int32_t)));
  const int64_t columns = (conv.width - 1) % kStep + 1, rows = (conv.height - 1) % kStep + 1;
  while (begin < end) {
    const Group group{b, begin, min64(end, b.group_end(begin, kGroup)), columns, rows};
    const Products products{b.inputs + begin * kLine,    b.line_stride, b.position_stride, panel,
                            conv.channels / kBlockDepth, sums};
    if (BY_POSITIONS) {
      multiply_positions<PANELS>(group, products);
    } else {
      multiply_columns<PANELS>(group, products);
    }
    store(conv, channel, sums, b.tiles + begin, group.end - begin);
    begin = group.end;
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
      constexpr int kPanels = decltype(panels)::kCount;
      const bool by_positions = conv.channels > kFewChannels || b.count <= kFewTiles;
      const auto run = by_positions ? run_panel<kPanels, true> : run_panel<kPanels, false>;
      run(conv, narrow, b, channel, begin, end);
      return true;
    };
    return run_block(conv, b, threads, transform, multiply);
  };
  return run_parts(conv, kStep, kPositions, run_rows);
}

}  // namespace FDDA_ISA
}  // namespace fdda
