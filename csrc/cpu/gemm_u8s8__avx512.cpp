// Packed convolution on AVX-512, compiled with and without VNNI: u8 inputs as they are, weights
// (code + offset) as s8. The input's zero point enters through the accumulators' start,
// -x_zero_point * sum of the channel's weights; so do offsets that do not fit s8, times the row's
// sum of inputs: split into two s16 each, they take one product instruction.

#include <immintrin.h>

#include "operand_ranges.h"
#include "packed_driver.h"
#include "planes_avx512.h"
#include "tile_u8s8_avx512.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

constexpr int64_t kBlockRows = 128;  // of outputs: L1 holds those of a task
constexpr int kFusedRows = 16;       // beyond, weights are better stored than expanded again

struct U8S8 {
  using Input = uint8_t;
  using Weight = int8_t;
  static constexpr int64_t kMinColumns = kWide, kMaxColumns = 8 * kWide;
  static constexpr bool kReadsInput = true;
  static constexpr bool kUnpacksCheaply = true;
  static constexpr bool kReadsLines = true;
  int64_t exact_steps;
  Range range;

  static void unpack(const PackedConv& conv, const uint8_t* planes, int64_t depth,
                     const int8_t* offset, Weight* panel, int32_t* start) {
    const __m512i spread = _mm512_mullo_epi32(
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(offset))),
        _mm512_set1_epi32(0x01010101));
    const Planes p{planes, conv.bits, depth};
#if defined(__AVX512VNNI__)
    if (has_gfni()) return unpack_bit_matrices(p, spread, conv.x_zero_point, panel, start);
#endif
    unpack_masked_adds(p, spread, conv.x_zero_point, panel, start);
  }

  static void copy(Input* out, const uint8_t* x, int64_t n, const PackedConv&) {
    for (; n >= 64; n -= 64, out += 64, x += 64) {
      _mm512_storeu_si512(out, _mm512_loadu_si512(x));
    }
    if (n == 0) return;
    const __mmask64 mask = (uint64_t{1} << n) - 1;
    _mm512_mask_storeu_epi8(out, mask, _mm512_maskz_loadu_epi8(mask, x));
  }

  static void pad(Input* out, int64_t n, const PackedConv& conv) {
    memset(out, conv.x_zero_point, n);
  }

  static void sum_rows(const Input* rows, int64_t stride, int64_t depth, int64_t count,
                       const PackedConv& conv, int32_t* sums) {
    const __m256i zeros = _mm256_set1_epi32(static_cast<int32_t>(conv.x_zero_point * depth));
    for (; count > 0; count -= 8, rows += 8 * stride, sums += 8) {
      const int64_t last = min64(count, 8) - 1;
      __m512i s[8];
#pragma GCC unroll 8
      for (int r = 0; r < 8; ++r) s[r] = sum_bytes(rows + min64(r, last) * stride, depth);
#pragma GCC unroll 4
      for (int r = 0; r < 8; r += 2) {
        const __m512i low = _mm512_unpacklo_epi64(s[r], s[r + 1]);
        s[r] = _mm512_add_epi64(low, _mm512_unpackhi_epi64(s[r], s[r + 1]));
      }
      const __m512i all = add_halves(add_halves(s[0], s[2]), add_halves(s[4], s[6]));
      const __mmask8 present = static_cast<__mmask8>((2 << last) - 1);
      _mm256_mask_storeu_epi32(sums, present, _mm256_sub_epi32(_mm512_cvtepi64_epi32(all), zeros));
    }
  }

  // How gemm wants them.
  void finish_sums(int32_t* sums, int64_t n) const {
    if (range.splits()) range.split(sums, n);
  }

  // Of eight bytes each.
  static __m512i sum_bytes(const Input* row, int64_t n) {
    const __m512i zero = _mm512_setzero_si512();
    __m512i sums = zero;
    for (; n > 64; n -= 64, row += 64) {
      sums = _mm512_add_epi64(sums, _mm512_sad_epu8(_mm512_loadu_si512(row), zero));
    }
    const __mmask64 rest = ~uint64_t{0} >> (64 - n);
    return _mm512_add_epi64(sums, _mm512_sad_epu8(_mm512_maskz_loadu_epi8(rest, row), zero));
  }

  // Sums of two adjacent quarters of a, then of b.
  static __m512i add_halves(__m512i a, __m512i b) {
    return _mm512_add_epi64(_mm512_shuffle_i64x2(a, b, 0x88), _mm512_shuffle_i64x2(a, b, 0xdd));
  }

#if defined(__AVX512VNNI__)
  static constexpr bool kFuses = true;

  static bool fuses(int64_t rows) { return rows <= kFusedRows && has_gfni(); }

  void gemm_planes(const Tile<U8S8>& t, const uint8_t* planes, int64_t depth) const {
    alignas(64) int32_t sums[kFusedRows * kWide];
    const int64_t panel_bytes = t.depth_blocks * t.conv->bits * kPlaneBytes;
    for (int64_t j = 0; j < t.columns; j += kPanelRows, planes += panel_bytes) {
      const Planes p{planes, t.conv->bits, depth};
      with_rows<kFusedRows>(t.num_rows, [&](auto rows) {
        constexpr int kRows = decltype(rows)::kCount;
        const int32_t zero_point = t.conv->x_zero_point;
        if (zero_point == 0) {
          multiply_planes<kRows, true>(p, 0, t.rows, t.row_stride, sums + j, kWide);
        } else {
          multiply_planes<kRows, false>(p, zero_point, t.rows, t.row_stride, sums + j, kWide);
        }
      });
    }
    if (t.row_sums && !range.splits()) {
      for (int64_t r = 0; r < t.num_rows; ++r) store_unsplit(t, r, sums + r * kWide);
      return;
    }
    const Columns<2, Output::kAny> columns(*t.conv, t.first_channel, t.columns);
    for (int64_t r = 0; r < t.num_rows; ++r) {
      __m512i row[1][2] = {
          {_mm512_load_si512(sums + r * kWide), _mm512_load_si512(sums + r * kWide + kPanelRows)}};
      add_offsets(t, r, range, row);
      columns.store(t.first_row + r, row);
    }
  }

#else
  static constexpr bool kFuses = false;
#endif

  void gemm(const Tile<U8S8>& t) const {
    if (t.row_sums && !range.splits()) return gemm_unsplit(t);
    if (!range.narrow()) return gemm<Output::kAny>(t);
    if (t.conv->epilogue.residual_u8) return gemm<Output::kCodesPlusCodes>(t);
    gemm<Output::kCodes>(t);
  }

 private:
  template <Output OUTPUT>
  void gemm(const Tile<U8S8>& t) const {
    for (int64_t first = 0; first < t.num_rows; first += kBlockRows) {
      const int64_t count = min64(kBlockRows, t.num_rows - first);
      for_each_columns(t, [&](const Tile<U8S8>& part) {
        if (part.columns > kPanelRows) {
          rows<kDotRows, 2, OUTPUT>(part, first, count);
        } else {
          rows<kNarrowDotRows, 1, OUTPUT>(part, first, count);
        }
      });
    }
  }

  // Of even height, but for the last.
  template <int ROWS, int PANELS, Output OUTPUT>
  void rows(const Tile<U8S8>& t, int64_t first, int64_t count) const {
    const int64_t height = ceil_div(count, ceil_div(count, ROWS)), rest = count % height;
    auto run = [&](int64_t from, int64_t n, int64_t at_once) {
      with_rows<ROWS>(at_once, [&](auto type) {
        multiply_and_store<decltype(type)::kCount, PANELS, OUTPUT>(t, from, n, exact_steps, range);
      });
    };
    run(first, count - rest, height);
    if (rest) run(first + count - rest, rest, rest);
  }

  // body(tile) for every kWide columns.
  template <class Body>
  static void for_each_columns(const Tile<U8S8>& t, Body body) {
    const int64_t panel_size = t.depth_blocks * kPanelBytes;
    Tile<U8S8> part = t;
    for (int64_t left = t.columns; left > 0; left -= kWide) {
      part.columns = min64(kWide, left);
      body(part);
      part.panels += 2 * panel_size;
      part.starts += kWide;
      part.first_channel += kWide;
    }
  }

  // One output at a time, where row sums or offsets are too large to be split.
  void gemm_unsplit(const Tile<U8S8>& t) const {
    alignas(64) int32_t sums[kWide];
    for_each_columns(t, [&](const Tile<U8S8>& part) {
      for (int64_t r = 0; r < t.num_rows; ++r) {
        __m512i row[1][1];
        for (int64_t j = 0; j < part.columns; j += kPanelRows) {
          Tile<U8S8> panel = part;
          panel.panels += j / kPanelRows * t.depth_blocks * kPanelBytes;
          panel.starts += j;
          sum_products(panel, r, exact_steps, range, row);
          _mm512_store_si512(sums + j, row[0][0]);
        }
        store_unsplit(part, r, sums);
      }
    });
  }

  static void store_unsplit(const Tile<U8S8>& t, int64_t row, const int32_t* sums) {
    const int64_t index = (t.first_row + row) * t.conv->out_channels;
    for (int64_t j = 0; j < t.columns; ++j) {
      const int64_t channel = t.first_channel + j;
      store_output(t.conv->epilogue, index + channel, channel,
                   sums[j] + t.conv->weight_offset[channel] * t.row_sums[row]);
    }
  }
};

}  // namespace

const char* packed_conv2d(const PackedConv& conv) {
  if (conv.groups == conv.channels && conv.groups == conv.out_channels) {
    depthwise_conv2d(conv);
    return "depthwise";
  }
#if defined(__AVX512VNNI__)
  if (winograd_f3_conv2d(conv)) return "winograd_f3";
  if (winograd_f4_conv2d(conv)) return "winograd_f4";
  const int64_t code = kLargestCode;  // it looks at them anyway
#else
  const int64_t code = largest_code(conv);
#endif
  if (winograd_conv2d(conv, code)) return "winograd";
  Driver<U8S8>(conv, {exact_steps(largest_weight(conv), code), Range(conv)}).run();
  return "direct";
}

#if defined(__AVX512VNNI__)
// Inputs are two bytes, each a row of its own; a row of ones gives the weights' sums, which the
// zero point is multiplied with.
bool linear_s32_by_bytes(const PackedLinearS32& a) {
  constexpr int64_t kRowsAtOnce = (kFusedRows - 1) / 2;
  if (!has_gfni() || a.depth > INT32_MAX / (255 * 128)) return false;
  for (int64_t i = 0; i < a.rows * a.depth; ++i) {
    if (a.x[i] < 0 || a.x[i] > 0xffff) return false;
  }
  const int64_t blocks = ceil_div(a.depth, kBlockDepth), stride = blocks * kBlockDepth;
  const int64_t panel_bytes = blocks * a.bits * kPlaneBytes;
  for (int64_t first = 0; first < a.rows; first += kRowsAtOnce) {
    const int64_t count = min64(kRowsAtOnce, a.rows - first);
    uint8_t* bytes = static_cast<uint8_t*>(scratch(kSharedRows, (2 * count + 1) * stride));
    int64_t inputs[kRowsAtOnce];
    memset(bytes, 0, 2 * count * stride);
    memset(bytes + 2 * count * stride, 1, stride);
    for (int64_t r = 0; r < count; ++r) {
      const int32_t* x = a.x + (first + r) * a.depth;
      inputs[r] = -a.x_zero_point * a.depth;
      for (int64_t k = 0; k < a.depth; ++k) {
        inputs[r] += x[k];
        bytes[r * stride + k] = static_cast<uint8_t>(x[k]);
        bytes[(count + r) * stride + k] = static_cast<uint8_t>(x[k] >> 8);
      }
    }
    parallel_for(ceil_div(a.out_features, kPanelRows), 4, [&](int64_t begin, int64_t end) {
      alignas(64) int32_t sums[kFusedRows][kPanelRows];
      for (int64_t panel = begin; panel < end; ++panel) {
        const Planes p{a.weight + panel * panel_bytes, a.bits, a.depth};
        with_rows<kFusedRows>(2 * count + 1, [&](auto rows) {
          multiply_planes<decltype(rows)::kCount, true>(p, 0, bytes, stride, *sums, kPanelRows);
        });
        const int64_t channel = panel * kPanelRows;
        for (int64_t r = 0; r < count; ++r) {
          for (int64_t j = 0; j < min64(kPanelRows, a.out_features - channel); ++j) {
            const int64_t products = sums[r][j] + int64_t{256} * sums[count + r][j] -
                                     a.x_zero_point * sums[2 * count][j];
            store_output(a.epilogue, (first + r) * a.out_features + channel + j, channel + j,
                         products + a.weight_offset[channel + j] * inputs[r]);
          }
        }
      }
    });
  }
  return true;
}
#endif

}  // namespace FDDA_ISA
}  // namespace fdda
