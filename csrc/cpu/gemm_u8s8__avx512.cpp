// Packed convolution on AVX-512, compiled with and without VNNI: u8 inputs as they are, weights
// (code + offset) as s8. The input's zero point enters through the accumulators' start,
// -x_zero_point * sum of the channel's weights.

#include <immintrin.h>

#include "operand_ranges.h"
#include "packed_avx512.h"
#include "packed_driver.h"
#include "planes_avx512.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

constexpr int kWide = 2 * kPanelRows;
constexpr int kFusedRows = 16;  // beyond, weights are better stored than expanded again

// Every third row's next bytes: more pointers than these would not fit the registers.
template <int ROWS>
struct RowsApart {
  const uint8_t* x[(ROWS + 2) / 3];
  int64_t stride;

  RowsApart(const uint8_t* first, int64_t stride) : stride(stride) {
#pragma GCC unroll 5
    for (int r = 0; r < ROWS; r += 3) x[r / 3] = first + r * stride;
  }

  const uint8_t* operator()(int r) const { return x[r / 3] + r % 3 * stride; }

  void advance(int64_t bytes) {
#pragma GCC unroll 5
    for (int r = 0; r < ROWS; r += 3) x[r / 3] += bytes;
  }

  void next() { advance(kBlockDepth); }
};

template <int ROWS, int PANELS, class Tile>
__attribute__((noinline)) void multiply(const Tile& t, int64_t first, int64_t exact_steps,
                                        int32_t* sums) {
  __m512i acc[ROWS][PANELS];
#pragma GCC unroll 2
  for (int p = 0; p < PANELS; ++p) {
    const __m512i start = _mm512_loadu_si512(t.starts + p * kPanelRows);
#pragma GCC unroll 14
    for (int r = 0; r < ROWS; ++r) acc[r][p] = start;
  }
  RowsApart<ROWS> rows(t.rows + first * t.row_stride, t.row_stride);
  Panels weights{t.panels, t.depth_blocks * kPanelBytes, kPanelBytes};
  const int64_t skipped = t.segment_step - t.segment_blocks * kBlockDepth;
  for (int64_t left = t.depth_blocks; left > 0; left -= t.segment_blocks) {
    add_products(acc, rows, weights, t.segment_blocks, exact_steps);
    rows.advance(skipped);
  }
#pragma GCC unroll 14
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
    for (int p = 0; p < PANELS; ++p) {
      _mm512_store_si512(sums + r * kWide + p * kPanelRows, acc[r][p]);
    }
  }
}

// Epilogue of `count` rows from `first` on; sums are [count][kWide].
template <bool FLOAT, class Tile>
__attribute__((noinline)) void store(const Tile& t, int64_t first, int64_t count,
                                     const int32_t* sums) {
  // Copies: stores of bytes might change what is behind pointers.
  const Epilogue e = t.conv->epilogue;
  const int64_t width = t.conv->out_channels;
  const int32_t* row_sums = t.row_sums ? t.row_sums + first : nullptr;
  const __mmask32 mask = ~uint32_t{0} >> (kWide - t.columns);
  const __mmask16 halves[2] = {static_cast<__mmask16>(mask), static_cast<__mmask16>(mask >> 16)};
  const __m512 hi = _mm512_set1_ps(e.hi);
  const __m512i lo = _mm512_set1_epi8(static_cast<char>(static_cast<int>(e.lo)));
  __m512 multiplier[2], bias[2];
  __m512i offset[2];
#pragma GCC unroll 2
  for (int p = 0; p < 2; ++p) {
    const int64_t channel = t.first_channel + p * kPanelRows;
    multiplier[p] = _mm512_maskz_loadu_ps(halves[p], e.multiplier + channel);
    bias[p] = _mm512_maskz_loadu_ps(halves[p], e.bias + channel);
    const int64_t* o = t.conv->weight_offset + channel;
    const __mmask8 low = static_cast<__mmask8>(halves[p]), high = halves[p] >> 8;
    offset[p] = _mm512_inserti64x4(
        _mm512_castsi256_si512(_mm512_cvtepi64_epi32(_mm512_maskz_loadu_epi64(low, o))),
        _mm512_cvtepi64_epi32(_mm512_maskz_loadu_epi64(high, o + 8)), 1);
  }
  int64_t index = (t.first_row + first) * width + t.first_channel;
  auto store_row = [&](int64_t at, const int32_t* s, __m512* v) __attribute__((always_inline)) {
#pragma GCC unroll 2
    for (int p = 0; p < 2; ++p) {
      __m512i sum = _mm512_load_si512(s + p * kPanelRows);
      if (row_sums) {
        const __m512i inputs = _mm512_set1_epi32(row_sums[(s - sums) / kWide]);
        sum = _mm512_add_epi32(sum, _mm512_mullo_epi32(inputs, offset[p]));
      }
      v[p] = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), multiplier[p]);
      v[p] = _mm512_add_ps(v[p], bias[p]);
      v[p] = add_residual(e, v[p], at + p * kPanelRows, halves[p]);
      if (FLOAT) _mm512_mask_storeu_ps(e.out_f32 + at + p * kPanelRows, halves[p], v[p]);
    }
  };
  for (int64_t r = 0; r < count; r += 2, index += 2 * width) {
    const bool pair = r + 1 < count;
    __m512 v[2][2] = {};
    store_row(index, sums + r * kWide, v[0]);
    if (pair) store_row(index + width, sums + (r + 1) * kWide, v[1]);
    if (FLOAT) continue;
    const __m512i codes = pack_codes(v, hi, lo);
    uint8_t* out = e.out_u8 + index;
    _mm256_mask_storeu_epi8(out, mask, _mm512_castsi512_si256(codes));
    if (pair) _mm256_mask_storeu_epi8(out + width, mask, _mm512_extracti64x4_epi64(codes, 1));
  }
}

template <class Tile>
void store_rows(const Tile& t, int64_t first, int64_t count, const int32_t* sums) {
  if (t.row_sums && t.wide_sums) {
    for (int64_t r = 0; r < count; ++r) {
      const int64_t row = first + r, index = (t.first_row + row) * t.conv->out_channels;
      for (int64_t j = 0; j < t.columns; ++j) {
        const int64_t channel = t.first_channel + j;
        store_output(t.conv->epilogue, index + channel, channel,
                     sums[r * kWide + j] + t.conv->weight_offset[channel] * t.row_sums[row]);
      }
    }
  } else if (t.conv->epilogue.out_u8) {
    store<false>(t, first, count, sums);
  } else {
    store<true>(t, first, count, sums);
  }
}

struct U8S8 {
  using Input = uint8_t;
  using Weight = int8_t;
  static constexpr int64_t kMinColumns = kWide, kMaxColumns = 8 * kWide;
  static constexpr bool kReadsInput = true;
  static constexpr bool kUnpacksCheaply = true;
  static constexpr bool kReadsLines = true;
  int64_t exact_steps;

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

  static int32_t row_sum(const Input* row, int64_t depth, const PackedConv& conv) {
    const __m512i zero = _mm512_setzero_si512();
    __m512i sums = zero;
    int64_t k = 0;
    for (; k + 64 <= depth; k += 64) {
      sums = _mm512_add_epi64(sums, _mm512_sad_epu8(_mm512_loadu_si512(row + k), zero));
    }
    const __mmask64 rest = (uint64_t{1} << (depth - k)) - 1;
    sums = _mm512_add_epi64(sums, _mm512_sad_epu8(_mm512_maskz_loadu_epi8(rest, row + k), zero));
    return static_cast<int32_t>(_mm512_reduce_add_epi64(sums) - conv.x_zero_point * depth);
  }

#if defined(__AVX512VNNI__)
  static constexpr bool kFuses = true;

  static bool fuses(int64_t rows) { return rows <= kFusedRows && has_gfni(); }

  static void gemm_planes(const Tile<U8S8>& t, const uint8_t* planes, int64_t depth) {
    alignas(64) int32_t sums[(kFusedRows + 1) * kWide];
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
    store_rows(t, 0, t.num_rows, sums);
  }

#else
  static constexpr bool kFuses = false;
#endif

  void gemm(const Tile<U8S8>& t) const {
    alignas(64) int32_t sums[kDotRows * kWide];
    const int64_t panel_size = t.depth_blocks * kPanelBytes;
    for_each_row_tile<kDotRows>(t.num_rows, [&](auto rows, int64_t first) {
      constexpr int kRows = decltype(rows)::kCount;
      Tile<U8S8> part = t;
      for (int64_t left = t.columns; left > 0; left -= kWide) {
        part.columns = min64(kWide, left);
        if (left > kPanelRows) {
          multiply<kRows, 2>(part, first, exact_steps, sums);
        } else {
          multiply<kRows, 1>(part, first, exact_steps, sums);
        }
        store_rows(part, first, kRows, sums);
        part.panels += 2 * panel_size;
        part.starts += kWide;
        part.first_channel += kWide;
      }
    });
  }
};

}  // namespace

const char* packed_conv2d(const PackedConv& conv) {
  if (conv.groups == conv.channels && conv.groups == conv.out_channels) {
    depthwise_conv2d(conv);
    return "depthwise";
  }
#if defined(__AVX512VNNI__)
  const int64_t code = kLargestCode;  // it looks at them anyway
#else
  const int64_t code = largest_code(conv);
#endif
  if (winograd_conv2d(conv, code)) return "winograd";
  Driver<U8S8>(conv, {exact_steps(largest_weight(conv), code)}).run();
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
