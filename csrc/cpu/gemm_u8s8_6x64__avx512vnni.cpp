// Packed convolution with vpdpbusd: u8 inputs as they are, weights (code + offset) as s8. The
// input's zero point enters through the accumulators' start, -x_zero_point * sum of the channel's
// weights.

#include <immintrin.h>

#include "packed_avx512.h"
#include "packed_driver.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

constexpr int kPanelBytes = kPanelRows * kBlockDepth;  // of one depth block: one register

// Epilogue of 16 channels of one row.
struct StoreRow {
  const Epilogue& e;
  const int64_t* offset;  // null: already in the weights

  // (float)(double)(acc + offset * sum)
  __m512 with_offset(__m512i acc, int64_t channel, __mmask16 mask, int32_t sum) const {
    const __m512i s = _mm512_set1_epi64(sum);
    const int64_t* o = offset + channel;
    const __m512i lo = _mm512_add_epi64(
        _mm512_cvtepi32_epi64(_mm512_castsi512_si256(acc)),
        _mm512_mullo_epi64(_mm512_maskz_loadu_epi64(static_cast<__mmask8>(mask), o), s));
    const __m512i hi = _mm512_add_epi64(
        _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(acc, 1)),
        _mm512_mullo_epi64(_mm512_maskz_loadu_epi64(static_cast<__mmask8>(mask >> 8), o + 8), s));
    const __m256 flo = _mm512_cvtpd_ps(_mm512_cvtepi64_pd(lo));
    const __m256 fhi = _mm512_cvtpd_ps(_mm512_cvtepi64_pd(hi));
    return _mm512_insertf32x8(_mm512_castps256_ps512(flo), fhi, 1);
  }

  void operator()(__m512i acc, int64_t index, int64_t channel, __mmask16 mask, int32_t sum) const {
    __m512 v = offset ? with_offset(acc, channel, mask, sum) : _mm512_cvtepi32_ps(acc);
    v = _mm512_mul_ps(v, _mm512_maskz_loadu_ps(mask, e.multiplier + channel));
    v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask, e.bias + channel));
    v = add_residual(e, v, index, mask);
    if (e.out_u8) {
      v = _mm512_min_ps(_mm512_max_ps(v, _mm512_set1_ps(e.lo)), _mm512_set1_ps(e.hi));
      const __m512i q = _mm512_cvt_roundps_epi32(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      _mm_mask_storeu_epi8(e.out_u8 + index, mask, _mm512_cvtepi32_epi8(q));
    } else {
      _mm512_mask_storeu_ps(e.out_f32 + index, mask, v);
    }
  }
};

template <int BITS>
void unpack_panel(const uint8_t* planes, int64_t depth, __m512i offset, int32_t zero_point,
                  int8_t* panel, int32_t* start) {
  const __m512i ones = _mm512_set1_epi8(1);
  __m512i sums = _mm512_setzero_si512();
  for (int64_t k = 0; k < depth; k += kBlockDepth) {
    __m512i w = offset;
#pragma GCC unroll 8
    for (int b = 0; b < BITS; ++b) {
      uint64_t plane;
      memcpy(&plane, planes, kPlaneBytes);
      planes += kPlaneBytes;
      const int weight = b == BITS - 1 ? -(1 << b) : 1 << b;
      w = _mm512_mask_add_epi8(w, plane, w, _mm512_set1_epi8(static_cast<char>(weight)));
    }
    if (depth - k < kBlockDepth) {  // padding weighs 0, not `offset`
      const uint64_t valid = ((uint64_t{1} << (depth - k)) - 1) * 0x1111111111111111u;
      w = _mm512_maskz_mov_epi8(valid, w);
    }
    _mm512_store_si512(panel, w);
    panel += kPanelBytes;
    sums = _mm512_dpbusd_epi32(sums, ones, w);
  }
  _mm512_storeu_si512(start, _mm512_mullo_epi32(sums, _mm512_set1_epi32(-zero_point)));
}

template <int ROWS, int PANELS, class Tile>
void multiply(const Tile& t, int64_t first, const StoreRow& store_row) {
  __m512i acc[ROWS][PANELS];
#pragma GCC unroll 4
  for (int p = 0; p < PANELS; ++p) {
    const __m512i start = _mm512_loadu_si512(t.starts + p * kPanelRows);
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) acc[r][p] = start;
  }
  const uint8_t* x = t.rows + first * t.row_stride;
  const int8_t* w = t.panels;
  const int64_t panel_size = t.depth_blocks * kPanelBytes;
  for (int64_t k = 0; k < t.depth_blocks; ++k, x += kBlockDepth, w += kPanelBytes) {
    __m512i b[PANELS];
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; ++p) b[p] = _mm512_load_si512(w + p * panel_size);
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) {
      int32_t four;
      memcpy(&four, x + r * t.row_stride, sizeof four);
      const __m512i a = _mm512_set1_epi32(four);
#pragma GCC unroll 4
      for (int p = 0; p < PANELS; ++p) acc[r][p] = _mm512_dpbusd_epi32(acc[r][p], a, b[p]);
    }
  }
  const int64_t rest = t.columns - (PANELS - 1) * kPanelRows;
  const __mmask16 tail = static_cast<__mmask16>(rest >= kPanelRows ? 0xffff : (1 << rest) - 1);
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r) {
    const int64_t index = (t.first_row + first + r) * t.conv->out_channels + t.first_channel;
    const int32_t sum = t.row_sums ? t.row_sums[first + r] : 0;
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; ++p) {
      const __mmask16 mask = p == PANELS - 1 ? tail : static_cast<__mmask16>(0xffff);
      store_row(acc[r][p], index + p * kPanelRows, t.first_channel + p * kPanelRows, mask, sum);
    }
  }
}

// ROWS * PANELS accumulators, PANELS weights and one input fit the 32 registers.
template <int ROWS, int PANELS, class Tile>
void all_rows(const Tile& t, const StoreRow& store_row) {
  for_each_row_tile<ROWS>(t.num_rows, [&](auto rows, int64_t first) {
    multiply<decltype(rows)::kCount, PANELS>(t, first, store_row);
  });
}

struct Vnni {
  using Input = uint8_t;
  using Weight = int8_t;
  static constexpr int64_t kColumns = 64;
  static constexpr bool kReadsInput = true;

  static void unpack(const PackedConv& conv, const uint8_t* planes, int64_t depth,
                     const int8_t* offset, Weight* panel, int32_t* start) {
    const __m512i spread = _mm512_mullo_epi32(
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(offset))),
        _mm512_set1_epi32(0x01010101));
    const int32_t zero = conv.x_zero_point;
    switch (conv.bits) {
      case 2: return unpack_panel<2>(planes, depth, spread, zero, panel, start);
      case 3: return unpack_panel<3>(planes, depth, spread, zero, panel, start);
      case 4: return unpack_panel<4>(planes, depth, spread, zero, panel, start);
      case 5: return unpack_panel<5>(planes, depth, spread, zero, panel, start);
      case 6: return unpack_panel<6>(planes, depth, spread, zero, panel, start);
      case 7: return unpack_panel<7>(planes, depth, spread, zero, panel, start);
      case 8: return unpack_panel<8>(planes, depth, spread, zero, panel, start);
    }
  }

  static void copy(Input* out, const uint8_t* x, int64_t n, const PackedConv&) {
    for (; n >= 64; n -= 64, out += 64, x += 64) {
      _mm512_storeu_si512(out, _mm512_loadu_si512(x));
    }
    const __mmask64 mask = (uint64_t{1} << n) - 1;
    _mm512_mask_storeu_epi8(out, mask, _mm512_maskz_loadu_epi8(mask, x));
  }

  static void pad(Input* out, int64_t n, const PackedConv& conv) {
    memset(out, conv.x_zero_point, n);
  }

  static int32_t row_sum(const Input* row, int64_t depth, const PackedConv& conv) {
    int32_t sum = 0;
    for (int64_t i = 0; i < depth; ++i) sum += row[i];
    return static_cast<int32_t>(sum - conv.x_zero_point * depth);
  }

  static void gemm(const Tile<Vnni>& t) {
    const StoreRow store_row{t.conv->epilogue, t.row_sums ? t.conv->weight_offset : nullptr};
    switch (ceil_div(t.columns, kPanelRows)) {
      case 1: return all_rows<12, 1>(t, store_row);
      case 2: return all_rows<12, 2>(t, store_row);
      case 3: return all_rows<8, 3>(t, store_row);
      case 4: return all_rows<6, 4>(t, store_row);
    }
  }
};

}  // namespace

const char* packed_conv2d(const PackedConv& conv) {
  if (conv.groups == conv.channels && conv.groups == conv.out_channels) {
    depthwise_conv2d(conv);
    return "depthwise";
  }
  if (winograd_conv2d(conv)) return "winograd";
  Driver<Vnni>(conv).run();
  return "direct";
}

}  // namespace FDDA_ISA
}  // namespace fdda
