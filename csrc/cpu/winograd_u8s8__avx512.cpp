// Packed 3x3 convolution by Winograd's algorithm in 8-bit integers: products, outputs and the
// division of work. The other transforms and the layouts are in winograd_u8s8.h.

#include "packed_avx512.h"
#include "winograd_u8s8.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

constexpr int64_t kGroup = 28;  // most tiles whose sums are held at once

// int32s between two columns' sums: no power of two, whose addresses would share cache sets.
constexpr int64_t sum_stride(int panels) { return (kGroup + 1) * panels * kPanelRows; }

// ---- products ----

// Tiles whose products with two panels are summed at once: two sums of each.
#if defined(__AVX512VNNI__)
constexpr int kTiles = 7;
#else
constexpr int kTiles = 4;
#endif

// A column of the 4 x 4 positions: with products m[0..3] the sums m[0] + m[1] + m[2] and
// m[1] - m[2] - m[3]. Weights of m[3] are negated.
struct Column {
  const uint8_t* inputs;  // of position 0: first tile, first 64 channels
  int64_t line_stride, input_stride;
  const int8_t* weights;
  int64_t k4, exact_steps;
  const int32_t* starts[2];
  int32_t* sums[2];
};

template <int ROWS, int PANELS>
inline __attribute__((always_inline)) void add_position(__m512i (&acc)[ROWS][PANELS],
                                                        const Column& c, int position,
                                                        int64_t first) {
  add_lines(acc, c.inputs + position * c.input_stride + first * kLine, c.line_stride,
            c.weights + 4 * position * kWeightStep, kPositions * kWeightStep, c.k4, c.exact_steps);
}

template <int ROWS, int PANELS>
inline __attribute__((always_inline)) void store(const __m512i (&acc)[ROWS][PANELS], int32_t* out) {
#pragma GCC unroll 14
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
    for (int p = 0; p < PANELS; ++p) {
      _mm512_store_si512(out + (r * PANELS + p) * kPanelRows, acc[r][p]);
    }
  }
}

// below: whether the second sum is needed.
template <int ROWS, int PANELS>
__attribute__((noinline)) void multiply(const Column& c, int64_t first, bool below) {
  __m512i a[ROWS][PANELS] = {}, b[ROWS][PANELS] = {};
  add_position(a, c, 1, first);
  add_position(b, c, 2, first);
#pragma GCC unroll 2
  for (int p = 0; p < PANELS; ++p) {
    const __m512i start_a = _mm512_load_si512(c.starts[0] + p * kPanelRows);
    const __m512i start_b = _mm512_load_si512(c.starts[1] + p * kPanelRows);
#pragma GCC unroll 14
    for (int r = 0; r < ROWS; ++r) {
      const __m512i difference = _mm512_sub_epi32(a[r][p], b[r][p]);
      a[r][p] = _mm512_add_epi32(_mm512_add_epi32(a[r][p], b[r][p]), start_a);
      b[r][p] = _mm512_add_epi32(difference, start_b);
    }
  }
  const int64_t at = first * PANELS * kPanelRows;
  add_position(a, c, 0, first);
  store(a, c.sums[0] + at);
  if (!below) return;
  add_position(b, c, 3, first);
  store(b, c.sums[1] + at);
}

// Tiles [first, last).
template <int PANELS>
void multiply_all(const Column& c, int64_t first, int64_t last, bool below) {
  for_each_row_tile<2 * kTiles / PANELS>(last - first, [&](auto rows, int64_t tile) {
    multiply<decltype(rows)::kCount, PANELS>(c, first + tile, below);
  });
}

// Of few tiles reading weights takes the time: up to so many, those of a position are read for
// twice as many tiles at once.
#if defined(__AVX512VNNI__)
constexpr int64_t kFewTiles = 16;
#else
constexpr int64_t kFewTiles = 0;  // there are too few registers
#endif
constexpr int kManyTiles = 14;

template <int ROWS, int PANELS>
__attribute__((noinline)) void multiply_position(const Column& c, int position, int64_t first,
                                                 int32_t* products) {
  __m512i acc[ROWS][PANELS] = {};
  add_position(acc, c, position, first);
  store(acc, products + first * PANELS * kPanelRows);
}

// As multiply_all of all tiles of the block among [begin, end) that need column `j`; sums of the
// others and those that no output needs are of anything.
template <int PANELS>
void multiply_positions(const Column& c, const Block& b, int j, int64_t begin, int64_t end) {
  constexpr int64_t stride = sum_stride(PANELS);
  alignas(64) int32_t products[4 * stride];
  for (int position = 0; position < 4; ++position) {
    int64_t first, last;
    b.needed(j == 3, position == 3, &first, &last);
    first = max64(first, begin) - begin;
    last = min64(last, end) - begin;
    if (first >= last) continue;
    for_each_row_tile<kManyTiles>(last - first, [&](auto rows, int64_t tile) {
      constexpr int kCount = decltype(rows)::kCount;
      multiply_position<kCount, PANELS>(c, position, first + tile, products + position * stride);
    });
  }
  for (int64_t i = 0; i < (end - begin) * PANELS; ++i) {
    const int64_t at = i * kPanelRows, panel = i % PANELS * kPanelRows;
    __m512i m[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) m[k] = _mm512_load_si512(products + k * stride + at);
    m[0] = _mm512_add_epi32(m[0], _mm512_load_si512(c.starts[0] + panel));
    m[3] = _mm512_add_epi32(m[3], _mm512_load_si512(c.starts[1] + panel));
    _mm512_store_si512(c.sums[0] + at, _mm512_add_epi32(_mm512_add_epi32(m[1], m[2]), m[0]));
    _mm512_store_si512(c.sums[1] + at, _mm512_add_epi32(_mm512_sub_epi32(m[1], m[2]), m[3]));
  }
}

// ---- outputs ----

struct Output {
  const PackedConv& conv;
  int64_t channel, columns;
  const int32_t* sums;
  alignas(64) float multiplier[kWide];  // a quarter of the channels'
  alignas(64) float bias[kWide];
};

template <int PANELS, bool FLOAT>
__attribute__((noinline)) void store_tiles(const Output& out, const TileAt* tiles, int64_t count) {
  const PackedConv& conv = out.conv;
  const Epilogue& e = conv.epilogue;
  const uint32_t mask = ~uint32_t{0} >> (kWide - out.columns);
  const __m512 hi = _mm512_set1_ps(e.hi);
  const __m512i lo = _mm512_set1_epi8(static_cast<char>(static_cast<int>(e.lo)));
  __m512 multiplier[PANELS], bias[PANELS];
#pragma GCC unroll 2
  for (int p = 0; p < PANELS; ++p) {
    multiplier[p] = _mm512_load_ps(out.multiplier + p * kPanelRows);
    bias[p] = _mm512_load_ps(out.bias + p * kPanelRows);
  }
  constexpr int64_t stride = sum_stride(PANELS);
  for (int64_t t = 0; t < count; ++t) {
    const TileAt at = tiles[t];
    __m512i y[2][2][PANELS];
    const int32_t* m = out.sums + t * PANELS * kPanelRows;
#pragma GCC unroll 2
    for (int p = 0; p < PANELS; ++p, m += kPanelRows) {
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        __m512i r[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) r[j] = _mm512_load_si512(m + (4 * i + j) * stride);
        y[i][0][p] = _mm512_add_epi32(_mm512_add_epi32(r[1], r[2]), r[0]);
        y[i][1][p] = _mm512_sub_epi32(_mm512_sub_epi32(r[1], r[2]), r[3]);
      }
    }
    const uint32_t valid[2] = {mask, at.columns > 1 ? mask : 0};
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      if (i == at.rows) break;
      const int64_t first = (at.pixel + i * conv.width) * conv.out_channels + out.channel;
      __m512 v[2][2] = {};
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
#pragma GCC unroll 2
        for (int p = 0; p < PANELS; ++p) {
          const int64_t index = first + j * conv.out_channels + p * kPanelRows;
          const __mmask16 present = static_cast<__mmask16>(valid[j] >> (p * kPanelRows));
          // float(4 acc) * (multiplier / 4) is float(acc) * multiplier to the bit.
          v[j][p] = _mm512_mul_ps(_mm512_cvtepi32_ps(y[i][j][p]), multiplier[p]);
          v[j][p] = _mm512_add_ps(v[j][p], bias[p]);
          v[j][p] = add_residual(e, v[j][p], index, present);
          if (FLOAT) _mm512_mask_storeu_ps(e.out_f32 + index, present, v[j][p]);
        }
      }
      if (FLOAT) continue;
      const __m512i bytes = pack_codes(v, hi, lo);
      _mm256_mask_storeu_epi8(e.out_u8 + first, valid[0], _mm512_castsi512_si256(bytes));
      _mm256_mask_storeu_epi8(e.out_u8 + first + conv.out_channels, valid[1],
                              _mm512_extracti64x4_epi64(bytes, 1));
    }
  }
}

// ---- driver ----

// PANELS * 16 outputs from `channel` on of the tiles [begin, end); whether their weights fit.
template <int PANELS>
bool run_panel(const PackedConv& conv, const Block& b, int64_t channel, int64_t begin,
               int64_t end) {
  const int64_t k4 = conv.channels / kBlockDepth;
  Panel panel{};
  const int64_t lines = ceil_div(conv.channels, kLine);
  panel.weights = static_cast<int8_t*>(scratch(kLocalWeights, lines * kPositions * kWeightStep));
  panel.code = b.code;
  panel.bound = b.weight_bound;
  for (int half = 0; half < PANELS; ++half) {
    expand_panel(conv, channel + half * kPanelRows, half, &panel);
  }
  const int64_t steps = exact_steps(panel.largest, 4 * b.code);
  if (panel.largest > kLargestTransform || steps == 0) return false;
  constexpr int64_t stride = sum_stride(PANELS);
  int32_t* sums = static_cast<int32_t*>(scratch(kLocalRows, 8 * stride * sizeof(int32_t)));
  Output out{conv, channel, min64(kWide, conv.out_channels - channel), sums, {}, {}};
  for (int64_t j = 0; j < out.columns; ++j) {
    out.multiplier[j] = conv.epilogue.multiplier[channel + j] * 0.25f;
    out.bias[j] = conv.epilogue.bias[channel + j];
  }
  while (begin < end) {
    const int64_t group = min64(end, b.group_end(begin, kGroup));
    for (int j = 0; j < 4; ++j) {
      const int corner = j == 0 ? 0 : j == 3 ? 1 : 4;
      const Column column{b.inputs + j * b.position_stride + begin * kLine,
                          b.line_stride,
                          4 * b.position_stride,
                          panel.weights + j * kWeightStep,
                          k4,
                          steps,
                          {panel.starts[corner], panel.starts[min64(corner + 2, 4)]},
                          {sums + j * stride, sums + (4 + j) * stride}};
      if constexpr (kFewTiles > 0) {
        if (b.count <= kFewTiles) {
          multiply_positions<PANELS>(column, b, j, begin, group);
          continue;
        }
      }
      for (int without = 0; without < 2; ++without) {
        int64_t first, last;
        b.range(j == Block::kPoints - 1, !without, &first, &last);
        first = max64(first, begin);
        last = min64(last, group);
        if (first < last) multiply_all<PANELS>(column, first - begin, last - begin, !without);
      }
    }
    if (conv.epilogue.out_u8) {
      store_tiles<PANELS, false>(out, b.tiles + begin, group - begin);
    } else {
      store_tiles<PANELS, true>(out, b.tiles + begin, group - begin);
    }
    begin = group;
  }
  return true;
}

// Everything that can be told without reading inputs or weights.
bool applies(const PackedConv& conv, int64_t code) {
  if (!suits_winograd(conv) || conv.bits > 4 || !conv.weight_fits_s8 || code > kLargestCode ||
      conv.x_zero_point > code) {
    return false;
  }
  // Below, the transforms cost more than they save.
  if (conv.channels < 16 || conv.batch * conv.height * conv.width <= 16) return false;
  for (int64_t o = 0; o < conv.out_channels; ++o) {
    const float multiplier = conv.epilogue.multiplier[o];
    if (multiplier * 0.25f * 4.0f != multiplier) return false;  // subnormal
  }
  return true;
}

}  // namespace

bool winograd_conv2d(const PackedConv& conv, int64_t code) {
  if (!applies(conv, code)) return false;
  auto run_rows = [&](int64_t first_row, int64_t last_row, int64_t threads) {
    const Block b{plan_tiles<2>(conv, first_row, last_row - first_row), code,
                  9 * largest_weight(conv)};
    auto transform = [&](int64_t row, int64_t c) { return transform_row(conv, b, row, c); };
    auto multiply = [&](auto panels, int64_t channel, int64_t begin, int64_t end) {
      return run_panel<decltype(panels)::kCount>(conv, b, channel, begin, end);
    };
    return run_block(conv, b, threads, transform, multiply);
  };
  return run_parts(conv, 2, kPositions, run_rows);
}

}  // namespace FDDA_ISA
}  // namespace fdda
