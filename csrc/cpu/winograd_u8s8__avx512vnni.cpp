// Winograd's F(2x2, 3x3) in 8-bit integers, exact: 16 products for 4 outputs of a 3x3 convolution
// instead of 36.
//
//   V = B^T d B            of the inputs' codes d <= 63: [-126, 126], plus 128 to be u8. Position
//                          (1, 1) is a plain sum, [0, 252], and needs nothing added.
//   U = (2 G) w (2 G)^T    of the weights: integers, s8 if they are small or cancel
//   4 y = A^T (sum U V) A  int32
//
// The 128 and the inputs' zero point add a constant to each of the four outputs. A corner of the
// 4 x 4 positions enters just one output: the corners' sums start with these constants.
//
//   inputs:    [16 positions][ceil(C / 64)][tiles][64 channels] u8. The step from tile to tile does
//              not depend on C: constant displacements in the products' loop.
//   weights:   [16 positions][C / 4][PANELS][16 outputs][4 inputs] s8, expanded from the bit planes
//              of PANELS * 16 outputs at a time
//   products:  [16 positions][tiles of a group][PANELS][16 outputs] s32

#include <immintrin.h>
#include <string.h>

#include "functions.h"
#include "parallel.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

constexpr int64_t kLine = 64;  // channels of a line of V
constexpr int kPositions = 16;
constexpr int kWide = 2 * kPanelRows;              // outputs whose weights are expanded together
constexpr int64_t kGroup = 28;                     // most tiles whose products are held at once
constexpr int64_t kInputBytes = int64_t{1} << 20;  // of V at a time: it stays in L2
constexpr int kLargestCode = 63;                   // 4 * 63 fits u8, 2 * 63 fits s8

// int32s between two positions' products: no power of two, whose addresses would share cache sets.
constexpr int64_t product_stride(int panels) { return (kGroup + 1) * panels * kPanelRows; }

// ---- tiles of outputs ----

struct TileAt {
  int64_t pixel;      // its first output, counted over the images
  bool right, below;  // whether its second column, its second row exist
};

// Rows of tiles whose transformed inputs are held at once. Tiles are ordered by which outputs do
// not exist: those of the second column, none, those of the second row, both. So every position
// has one range of tiles that need it: 225 products instead of 256 at 7 x 7.
struct Block {
  TileAt* tiles;   // by slot
  int32_t* slots;  // by (row of tiles, column)
  uint8_t* inputs;
  int64_t first_row, rows, count;
  int64_t ends[4];                       // of the classes
  int64_t line_stride, position_stride;  // of inputs, in bytes

  void range(int position, int64_t* begin, int64_t* end) const {
    const bool second_row = position / 4 == 3, second_column = position % 4 == 3;
    *begin = second_column ? ends[0] : 0;
    *end = second_row ? ends[1] : second_column ? ends[2] : count;
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
  const int64_t tiles_y = ceil_div(conv.height, 2), tiles_x = ceil_div(conv.width, 2);
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

  auto below = [&](int64_t row) { return (first_row + row) % tiles_y * 2 + 1 < conv.height; };
  int64_t full_rows = 0;
  for (int64_t r = 0; r < rows; ++r) full_rows += below(r);
  const int64_t narrow = conv.width % 2;  // tiles of a row without second column
  const int64_t wide = tiles_x - narrow;
  int64_t next[4] = {0, full_rows * narrow, full_rows * tiles_x, full_rows * tiles_x};
  next[3] += (rows - full_rows) * wide;
  for (int i = 0; i < 3; ++i) b.ends[i] = next[i + 1];
  b.ends[3] = b.count;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t n = (first_row + r) / tiles_y, y = (first_row + r) % tiles_y;
    for (int64_t x = 0; x < tiles_x; ++x) {
      const bool right = x < wide;
      const int64_t slot = next[below(r) ? (right ? 1 : 0) : (right ? 2 : 3)]++;
      b.slots[r * tiles_x + x] = static_cast<int32_t>(slot);
      b.tiles[slot] = {(n * conv.height + 2 * y) * conv.width + 2 * x, right, below(r)};
    }
  }
  return b;
}

// ---- inputs ----

// One row of tiles, 64 channels from `channel` on; whether the codes read were small enough.
// Arithmetic modulo 256: only the result has to fit.
bool transform_row(const PackedConv& conv, const Block& b, int64_t row, int64_t channel) {
  const int64_t tiles_y = ceil_div(conv.height, 2), tiles_x = ceil_div(conv.width, 2);
  const int64_t n = (b.first_row + row) / tiles_y, ty = (b.first_row + row) % tiles_y;
  const int64_t valid = min64(kLine, conv.channels - channel);
  const __mmask64 mask = ~uint64_t{0} >> (kLine - valid);
  const __m512i zero = _mm512_set1_epi8(static_cast<char>(conv.x_zero_point));
  alignas(64) uint8_t outside[kLine];
  _mm512_store_si512(outside, zero);
  const uint8_t* rows[4];
  int64_t steps[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const int64_t y = 2 * ty - 1 + i;
    const bool inside = y >= 0 && y < conv.height;
    const int64_t pixel = (n * conv.height + y) * conv.width;
    rows[i] = inside ? conv.x + pixel * conv.channels + channel : outside;
    steps[i] = inside ? conv.channels : 0;
  }
  __m512i seen = zero;
  auto column = [&](int64_t x, __m512i* t) {
    __m512i d[4];
    if (x < 0 || x >= conv.width) {
      d[0] = d[1] = d[2] = d[3] = zero;
    } else {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) d[i] = _mm512_maskz_loadu_epi8(mask, rows[i] + x * steps[i]);
    }
    // The other two rows are these of other tiles.
    seen = _mm512_or_si512(seen, _mm512_or_si512(d[1], d[2]));
    t[0] = _mm512_sub_epi8(d[0], d[2]);
    t[1] = _mm512_add_epi8(d[1], d[2]);
    t[2] = _mm512_sub_epi8(d[2], d[1]);
    t[3] = _mm512_sub_epi8(d[1], d[3]);
  };
  const __m512i offset = _mm512_set1_epi8(static_cast<char>(128));
  uint8_t* const inputs = b.inputs + channel / kLine * b.line_stride;
  const int32_t* slots = b.slots + row * tiles_x;
  __m512i t[4][4];
  column(-1, t[0]);
  column(0, t[1]);
  for (int64_t tx = 0; tx < tiles_x; ++tx) {
    column(2 * tx + 1, t[2]);
    column(2 * tx + 2, t[3]);
    uint8_t* out = inputs + slots[tx] * kLine;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      uint8_t* o = out + 4 * i * b.position_stride;
      const __m512i p = _mm512_add_epi8(t[2][i], offset), q = _mm512_add_epi8(t[1][i], offset);
      _mm512_store_si512(o, _mm512_sub_epi8(_mm512_add_epi8(t[0][i], offset), t[2][i]));
      _mm512_store_si512(o + b.position_stride, _mm512_add_epi8(t[1][i], i == 1 ? t[2][i] : p));
      _mm512_store_si512(o + 2 * b.position_stride, _mm512_sub_epi8(p, t[1][i]));
      _mm512_store_si512(o + 3 * b.position_stride, _mm512_sub_epi8(q, t[3][i]));
      t[0][i] = t[2][i];
      t[1][i] = t[3][i];
    }
  }
  return !_mm512_test_epi8_mask(seen, _mm512_set1_epi8(static_cast<char>(~kLargestCode)));
}

// ---- weights ----

struct Panel {
  int8_t* weights;
  int64_t position_stride;
  alignas(64) int32_t starts[5][kWide];  // corners (0, 0), (0, 3), (3, 0), (3, 3); elsewhere: zeros
};

// 2 G in one direction, saturating. A sum that does not fit ends up at 127 or -128, and so does one
// of those that it is added to, subtracted from or doubled in: the last results show it.
inline void transform_weights(const __m512i* g, int step, __m512i* u, int u_step) {
  const __m512i s = _mm512_adds_epi8(g[0], g[2 * step]);
  u[0] = _mm512_adds_epi8(g[0], g[0]);
  u[u_step] = _mm512_adds_epi8(s, g[step]);
  u[2 * u_step] = _mm512_subs_epi8(s, g[step]);
  u[3 * u_step] = _mm512_adds_epi8(g[2 * step], g[2 * step]);
}

// 16 outputs, the `half`th of `panels`; whether the transformed weights fit s8 (127 counts as not).
template <int BITS>
bool expand_planes(const PackedConv& conv, int64_t channel, int panels, int half, Panel* panel) {
  const int64_t k4 = conv.channels / kBlockDepth;
  const uint8_t* planes = conv.weight + channel / kPanelRows * 9 * k4 * BITS * kPlaneBytes;
  int8_t* out = panel->weights + half * kLine;
  const int64_t count = min64(kPanelRows, conv.out_channels - channel);
  int8_t offsets[kPanelRows] = {};
  for (int64_t j = 0; j < count; ++j) {
    offsets[j] = static_cast<int8_t>(conv.weight_offset[channel + j]);
  }
  const __m512i offset = _mm512_mullo_epi32(
      _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(offsets))),
      _mm512_set1_epi32(0x01010101));
  const __m512i ones = _mm512_set1_epi8(1);
  __m512i sums[9], low = _mm512_setzero_si512(), high = low;
#pragma GCC unroll 9
  for (int t = 0; t < 9; ++t) sums[t] = _mm512_setzero_si512();
  for (int64_t k = 0; k < k4; ++k, planes += BITS * kPlaneBytes, out += panels * kLine) {
    __m512i g[9], rows[12], u[kPositions];
#pragma GCC unroll 9
    for (int t = 0; t < 9; ++t) {
      __m512i w = offset;
#pragma GCC unroll 4
      for (int b = 0; b < BITS; ++b) {
        uint64_t plane;
        memcpy(&plane, planes + (t * k4 * BITS + b) * kPlaneBytes, kPlaneBytes);
        const int weight = b == BITS - 1 ? -(1 << b) : 1 << b;
        w = _mm512_mask_add_epi8(w, plane, w, _mm512_set1_epi8(static_cast<char>(weight)));
      }
      g[t] = w;
      sums[t] = _mm512_dpbusd_epi32(sums[t], ones, w);
    }
#pragma GCC unroll 3
    for (int x = 0; x < 3; ++x) transform_weights(g + x, 3, rows + x, 3);
#pragma GCC unroll 4
    for (int y = 0; y < 4; ++y) transform_weights(rows + 3 * y, 1, u + 4 * y, 1);
#pragma GCC unroll 16
    for (int p = 0; p < kPositions; ++p) {
      _mm512_store_si512(out + p * panel->position_stride, u[p]);
      low = _mm512_min_epi8(low, u[p]);
      high = _mm512_max_epi8(high, u[p]);
    }
  }

  // The sums of U come from those of the taps by A^T (2 G); those of position (1, 1) are `all`.
  static const int factors[2][3] = {{4, 0, 2}, {0, 2, -2}};
  __m512i all = _mm512_setzero_si512();
  for (int t = 0; t < 9; ++t) all = _mm512_add_epi32(all, sums[t]);
  all = _mm512_mullo_epi32(all, _mm512_set1_epi32(128 - 4 * conv.x_zero_point));
  for (int i = 0; i < 4; ++i) {
    __m512i s = all;
    for (int t = 0; t < 9; ++t) {
      const int factor = -128 * factors[i / 2][t / 3] * factors[i % 2][t % 3];
      s = _mm512_add_epi32(s, _mm512_mullo_epi32(sums[t], _mm512_set1_epi32(factor)));
    }
    const bool negated = i == 1 || i == 2;  // by A^T
    if (negated) s = _mm512_sub_epi32(_mm512_setzero_si512(), s);
    _mm512_store_si512(panel->starts[i] + half * kPanelRows, s);
  }
  return !(_mm512_cmpeq_epi8_mask(low, _mm512_set1_epi8(-128)) |
           _mm512_cmpeq_epi8_mask(high, _mm512_set1_epi8(127)));
}

bool expand_panel(const PackedConv& conv, int64_t channel, int panels, int half, Panel* panel) {
  switch (conv.bits) {
    case 2: return expand_planes<2>(conv, channel, panels, half, panel);
    case 3: return expand_planes<3>(conv, channel, panels, half, panel);
    default: return expand_planes<4>(conv, channel, panels, half, panel);
  }
}

// ---- products ----

struct Product {
  const uint8_t* inputs;  // first tile, first 64 channels
  int64_t line_stride;
  const int8_t* weights;
  int64_t k4;
  const int32_t* start;
  int32_t* out;
};

template <int ROWS, int PANELS>
__attribute__((noinline)) void multiply(const Product& m, int64_t first) {
  __m512i acc[ROWS][PANELS];
#pragma GCC unroll 2
  for (int p = 0; p < PANELS; ++p) {
    const __m512i start = _mm512_load_si512(m.start + p * kPanelRows);
#pragma GCC unroll 14
    for (int r = 0; r < ROWS; ++r) acc[r][p] = start;
  }
  const uint8_t* x = m.inputs + first * kLine;
  const int8_t* w = m.weights;
  for (int64_t left = m.k4; left > 0; left -= kLine / 4, x += m.line_stride) {
    const int64_t n = min64(left, kLine / 4);
    for (int64_t k = 0; k < n; ++k, w += PANELS * kLine) {
      __m512i b[PANELS];
#pragma GCC unroll 2
      for (int p = 0; p < PANELS; ++p) b[p] = _mm512_load_si512(w + p * kLine);
#pragma GCC unroll 14
      for (int r = 0; r < ROWS; ++r) {
        int32_t four;
        memcpy(&four, x + r * kLine + k * 4, sizeof four);
        const __m512i a = _mm512_set1_epi32(four);
#pragma GCC unroll 2
        for (int p = 0; p < PANELS; ++p) {
          acc[r][p] = _mm512_dpbusd_epi32(acc[r][p], a, b[p]);
          asm("" : "+v"(acc[r][p]));  // in this order, else gcc spills
        }
      }
    }
  }
  int32_t* out = m.out + first * PANELS * kPanelRows;
#pragma GCC unroll 14
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
    for (int p = 0; p < PANELS; ++p) {
      _mm512_store_si512(out + (r * PANELS + p) * kPanelRows, acc[r][p]);
    }
  }
}

// Calls multiply for a run-time number of rows up to ROWS.
template <int ROWS, int PANELS>
void multiply_rows(const Product& m, int64_t first, int64_t rows) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS) {
      multiply<ROWS, PANELS>(m, first);
    } else {
      multiply_rows<ROWS - 1, PANELS>(m, first, rows);
    }
  }
}

// 14 * 2 accumulators, 2 weights and an input fit the 32 registers.
template <int PANELS>
void multiply_all(const Product& m, int64_t count) {
  constexpr int kRows = 14;
  const int64_t parts = ceil_div(count, kRows);
  for (int64_t i = 0; i < parts; ++i) {  // of even height: no nearly empty last one
    const int64_t first = i * count / parts;
    multiply_rows<kRows, PANELS>(m, first, (i + 1) * count / parts - first);
  }
}

// ---- outputs ----

struct Output {
  const PackedConv& conv;
  int64_t channel, columns;
  const int32_t* products;
  alignas(64) float multiplier[kWide];  // a quarter of the channels'
  alignas(64) float bias[kWide];
};

template <int PANELS, bool FLOAT>
__attribute__((noinline)) void store_tiles(const Output& out, const TileAt* tiles, int64_t count) {
  const PackedConv& conv = out.conv;
  const Epilogue& e = conv.epilogue;
  const uint32_t mask = ~uint32_t{0} >> (kWide - out.columns);
  const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  const __m512 hi = _mm512_set1_ps(e.hi), scale = _mm512_set1_ps(e.residual_scale);
  const __m512i lo = _mm512_set1_epi8(static_cast<char>(static_cast<int>(e.lo)));
  __m512 multiplier[PANELS], bias[PANELS];
#pragma GCC unroll 2
  for (int p = 0; p < PANELS; ++p) {
    multiplier[p] = _mm512_load_ps(out.multiplier + p * kPanelRows);
    bias[p] = _mm512_load_ps(out.bias + p * kPanelRows);
  }
  constexpr int64_t stride = product_stride(PANELS);
  for (int64_t t = 0; t < count; ++t) {
    const TileAt at = tiles[t];
    __m512i y[2][2][PANELS];
    const int32_t* m = out.products + t * PANELS * kPanelRows;
#pragma GCC unroll 2
    for (int p = 0; p < PANELS; ++p, m += kPanelRows) {
      __m512i r[2][4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const __m512i m1 = _mm512_load_si512(m + (4 + j) * stride);
        const __m512i m2 = _mm512_load_si512(m + (8 + j) * stride);
        const __m512i m0 = _mm512_load_si512(m + j * stride);
        const __m512i m3 = _mm512_load_si512(m + (12 + j) * stride);
        r[0][j] = _mm512_add_epi32(_mm512_add_epi32(m1, m2), m0);
        r[1][j] = _mm512_sub_epi32(_mm512_sub_epi32(m1, m2), m3);
      }
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        y[i][0][p] = _mm512_add_epi32(_mm512_add_epi32(r[i][1], r[i][2]), r[i][0]);
        y[i][1][p] = _mm512_sub_epi32(_mm512_sub_epi32(r[i][1], r[i][2]), r[i][3]);
      }
    }
    const uint32_t valid[2] = {mask, at.right ? mask : 0};
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      if (i && !at.below) break;
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
          if (e.residual_u8) {
            const __m128i r = _mm_maskz_loadu_epi8(present, e.residual_u8 + index);
            const __m512 residual = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(r));
            v[j][p] = _mm512_add_ps(v[j][p], _mm512_mul_ps(residual, scale));
          } else if (e.residual_f32) {
            const __m512 residual = _mm512_maskz_loadu_ps(present, e.residual_f32 + index);
            v[j][p] = _mm512_add_ps(v[j][p], _mm512_mul_ps(residual, scale));
          }
          if (FLOAT) _mm512_mask_storeu_ps(e.out_f32 + index, present, v[j][p]);
        }
      }
      if (FLOAT) continue;
      __m512i q[2][2];
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        // Beyond hi it might exceed int32, which turns it negative. Below, the packs' low end is 0;
        // then comes lo.
        q[k / 2][k % 2] = _mm512_cvt_roundps_epi32(_mm512_min_ps(hi, v[k / 2][k % 2]),
                                                   _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      }
      __m512i bytes = _mm512_packus_epi16(_mm512_packs_epi32(q[0][0], q[0][1]),
                                          _mm512_packs_epi32(q[1][0], q[1][1]));
      bytes = _mm512_permutexvar_epi32(order, _mm512_max_epu8(bytes, lo));
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
  panel.position_stride = k4 * PANELS * kLine + 3 * kLine;  // no power of two either
  panel.weights = static_cast<int8_t*>(scratch(kLocalWeights, kPositions * panel.position_stride));
  for (int half = 0; half < PANELS; ++half) {
    if (!expand_panel(conv, channel + half * kPanelRows, PANELS, half, &panel)) return false;
  }
  int32_t* products = static_cast<int32_t*>(
      scratch(kLocalRows, kPositions * product_stride(PANELS) * sizeof(int32_t)));
  Output out{conv, channel, min64(kWide, conv.out_channels - channel), products, {}, {}};
  for (int64_t j = 0; j < out.columns; ++j) {
    out.multiplier[j] = conv.epilogue.multiplier[channel + j] * 0.25f;
    out.bias[j] = conv.epilogue.bias[channel + j];
  }
  static const int starts[kPositions] = {0, 4, 4, 1, 4, 4, 4, 4, 4, 4, 4, 4, 2, 4, 4, 3};
  while (begin < end) {
    const int64_t group = min64(end, b.group_end(begin));
    for (int position = 0; position < kPositions; ++position) {
      int64_t first, last;
      b.range(position, &first, &last);
      first = max64(first, begin);
      last = min64(last, group);
      if (first >= last) continue;
      multiply_all<PANELS>(
          {b.inputs + position * b.position_stride + first * kLine, b.line_stride,
           panel.weights + position * panel.position_stride, k4, panel.starts[starts[position]],
           products + position * product_stride(PANELS) + (first - begin) * PANELS * kPanelRows},
          last - first);
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
bool applies(const PackedConv& conv) {
  if (conv.kernel_h != 3 || conv.kernel_w != 3 || conv.stride_h != 1 || conv.stride_w != 1 ||
      conv.pad_h != 1 || conv.pad_w != 1 || conv.dilation_h != 1 || conv.dilation_w != 1 ||
      conv.groups != 1 || conv.channels % kBlockDepth || conv.bits > 4 || !conv.weight_fits_s8 ||
      conv.x_zero_point > kLargestCode) {
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

// What ends all threads' work: the outputs would not be exact.
class Failure {
 public:
  void set() { __atomic_store_n(&set_, true, __ATOMIC_RELAXED); }
  bool is_set() const { return __atomic_load_n(&set_, __ATOMIC_RELAXED); }

 private:
  bool set_ = false;
};

// Rows [first_row, last_row) of tiles. Several threads share the rows' inputs, then the panels of
// outputs, and where these alone would not keep them equally busy, the tiles.
void run_rows(const PackedConv& conv, int64_t first_row, int64_t last_row, int64_t threads,
              Failure* failure) {
  const Block b = plan_block(conv, first_row, last_row - first_row);
  parallel_for(b.rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end && !failure->is_set(); ++row) {
      for (int64_t c = 0; c < conv.channels; c += kLine) {
        if (!transform_row(conv, b, row, c)) failure->set();
      }
    }
  });
  const int64_t panels = ceil_div(conv.out_channels, kWide);
  const int64_t shares = panels % threads && panels < 4 * threads ? threads : 1;
  parallel_for(panels * shares, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end && !failure->is_set(); ++task) {
      const int64_t channel = task / shares * kWide, share = task % shares;
      const int64_t first = share * b.count / shares, last = (share + 1) * b.count / shares;
      const bool fits = conv.out_channels - channel > kPanelRows
                            ? run_panel<2>(conv, b, channel, first, last)
                            : run_panel<1>(conv, b, channel, first, last);
      if (!fits) failure->set();
    }
  });
}

}  // namespace

bool winograd_conv2d(const PackedConv& conv) {
  if (!applies(conv)) return false;
  const int64_t tiles_x = ceil_div(conv.width, 2), rows = conv.batch * ceil_div(conv.height, 2);
  const int64_t row_bytes = kPositions * tiles_x * ceil_div(conv.channels, kLine) * kLine;
  int64_t parts = ceil_div(rows, max64(1, kInputBytes / row_bytes));
  // Many tiles: each thread has its own and expands all weights for them, so that no transformed
  // input moves between processors. A parallel_for within another one runs on its thread.
  const int64_t threads = num_threads();
  const bool many = parts > 1 || rows * tiles_x >= 64 * threads;
  if (many) parts = min64(rows, ceil_div(parts, threads) * threads);
  Failure failure;
  parallel_for(parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end && !failure.is_set(); ++part) {
      const int64_t first_row = part * rows / parts, last_row = (part + 1) * rows / parts;
      run_rows(conv, first_row, last_row, many ? 1 : threads, &failure);
    }
  });
  return !failure.is_set();
}

}  // namespace FDDA_ISA
}  // namespace fdda
