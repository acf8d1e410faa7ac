// Winograd's F(4x4, 3x3) in 8-bit integers on AVX512-VNNI: inputs and weights.
//
//   inputs:    [46 positions][ceil(C / 64)][tiles][64 channels] u8
//   weights:   place_weights's, of one or two panels at a time
//   sums:      [32 or 46 positions][tiles of a group][PANELS][16 outputs] s32
#pragma once

#include <type_traits>

#include "parallel.h"
#include "winograd_f4.h"
#include "winograd_parts.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

constexpr int kStep = F4::kStep, kPoints = F4::kPoints, kPositions = F4::kPositions;

using Block = TileBlock<kStep, kPositions>;

typedef uint8_t Bytes __attribute__((vector_size(kLine)));  // added modulo 256
typedef uint32_t Sums __attribute__((vector_size(kLine)));  // modulo 2^32

// ---- inputs ----

// One row of tiles, 64 channels from `channel` on; whether the codes read were small enough.
// Columns are transformed first, all of them, to memory that stays in L1.
template <bool WHOLE>
bool transform_row(const PackedConv& conv, const Block& b, int64_t row, int64_t channel) {
  constexpr int kRows = WHOLE ? kPoints : F4::kReal;
  const int64_t tiles_y = ceil_div(conv.height, kStep), tiles_x = ceil_div(conv.width, kStep);
  const int64_t n = (b.first_row + row) / tiles_y, top = (b.first_row + row) % tiles_y * kStep - 1;
  const InputRows<kRows> rows(conv, n, top, channel);
  const int64_t columns = kStep * tiles_x + 2;
  Bytes* const lines = static_cast<Bytes*>(scratch(kLocalRows, columns * kRows * sizeof(Bytes)));
  Bytes seen = {};
  for (int64_t x = -1; x < columns - 1; ++x) {
    Bytes d[kRows];
    rows.read(x, d);
#pragma GCC unroll 6
    for (int i = 1; i < kRows - 1; ++i) seen |= d[i];  // the others are these of other tiles
    F4::transform_inputs<WHOLE>(d, lines + (x + 1) * kRows);
  }

  uint8_t* const inputs = b.inputs + channel / kLine * b.line_stride;
  const int32_t* slots = b.slots + row * tiles_x;
  const int64_t whole = tiles_x - !F4::whole((conv.width - 1) % kStep + 1);
  auto transform_tiles = [&](int64_t first, int64_t last, auto all) __attribute__((always_inline)) {
    constexpr bool kAll = decltype(all)::value;
    constexpr int kColumns = kAll ? kPoints : F4::kReal;
    // Fewer inputs than 16 are summed there: the start of sums is for 16.
    constexpr int kSummed = (kRows - 2) * (kColumns - 2);
    const Bytes outside_zeros =
        (Bytes)_mm512_set1_epi8(static_cast<char>((16 - kSummed) * conv.x_zero_point));
    const Bytes shift = (Bytes)_mm512_set1_epi8(static_cast<char>(F4::kShift));
    for (int64_t tile = first; tile < last; ++tile) {
      uint8_t* const out = inputs + slots[tile] * kLine;
      auto put = [&](int position, Bytes v) __attribute__((always_inline)) {
        v += position == F4::kAllTaps ? outside_zeros : shift;
        memcpy(out + position * b.position_stride, &v, sizeof v);
      };
      auto line = [&](int row, Bytes* v) __attribute__((always_inline)) {
        Bytes d[kColumns];
#pragma GCC unroll 6
        for (int x = 0; x < kColumns; ++x) d[x] = lines[(kStep * tile + x) * kRows + row];
        F4::transform_inputs<kAll>(d, v);
      };
      Bytes v[kPoints], w[kPoints];
#pragma GCC unroll 4
      for (int r = 0; r < F4::kReal; ++r) {
        line(r, v);
        F4::put_real<kAll>(r, v, put);
      }
      if (!WHOLE) continue;
      line(4, v);
      line(5, w);
      F4::put_complex<kAll>(v, w, put);
    }
  };
  transform_tiles(0, whole, std::true_type());
  transform_tiles(whole, tiles_x, std::false_type());
  const char too_large = static_cast<char>(~F4::kLargestCode);
  return !_mm512_test_epi8_mask((__m512i)seen, _mm512_set1_epi8(too_large));
}

// ---- weights ----

struct Panel {
  int8_t* weights;
  alignas(64) int32_t starts[kPositions][2 * kPanelRows];  // of sums
};

// 16 outputs, the `half`th of the panels. With ALL also weights that are the sums of two others.
template <bool ALL, class Expand>
inline __attribute__((always_inline)) void expand_weights(const PackedConv& conv,
                                                          const Expand& expand, int64_t channel,
                                                          int half, Panel* panel) {
  const int64_t k4 = conv.channels / kBlockDepth;
  const __m512i offset = offsets_of(conv, channel);
  __m512i tap_sums[9];
#pragma GCC unroll 9
  for (int t = 0; t < 9; ++t) tap_sums[t] = _mm512_setzero_si512();
  for (int64_t k = 0; k < k4; ++k) {
    int8_t* const out = place_weights(panel->weights, kPositions, k) + half * kLine;
    Bytes g[9];
#pragma GCC unroll 9
    for (int t = 0; t < 9; ++t) {
      const __m512i w = _mm512_add_epi8(expand(t * k4 + k), offset);
      tap_sums[t] = add_fours(tap_sums[t], w);
      asm("" : "+v"(tap_sums[t]));  // else gcc keeps them in memory
      g[t] = (Bytes)w;
    }
    F4::transform_weights(g, [&](int position, Bytes u) __attribute__((always_inline)) {
      if (!ALL && F4::step_of_sum(position)) return;
      _mm512_store_si512(out + position * kWeightStep, (__m512i)u);
    });
  }

  Sums sums[9];
#pragma GCC unroll 9
  for (int t = 0; t < 9; ++t) sums[t] = (Sums)tap_sums[t];
  F4::transform_weights(sums, [&](int position, Sums u) __attribute__((always_inline)) {
    const int shift = position == F4::kAllTaps ? 16 * conv.x_zero_point : F4::kShift;
    _mm512_store_si512(panel->starts[position] + half * kPanelRows,
                       (__m512i)(u * static_cast<uint32_t>(-shift)));
  });
}

template <bool ALL>
FDDA_GFNI inline void expand_by_matrices(const PackedConv& conv, const Planes& p, int64_t channel,
                                         int half, Panel* panel) {
  expand_weights<ALL>(conv, ShortBlocks<kShortAhead>(p), channel, half, panel);
}

template <bool ALL>
void expand_panel(const PackedConv& conv, int64_t channel, int half, Panel* panel) {
  const Planes p = planes_of(conv, channel);
  if (has_gfni()) return expand_by_matrices<ALL>(conv, p, channel, half, panel);
  with_masked_adds(
      p, [&](const auto& expand) { expand_weights<ALL>(conv, expand, channel, half, panel); });
}

}  // namespace
}  // namespace FDDA_ISA
}  // namespace fdda
