// Bit planes of a panel to weights, 64 bytes a depth block; the layout is drawn in
// common/arithmetic.h.
#pragma once

#include "dot_avx512.h"
#include "expand.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

constexpr int kPanelBytes = kPanelRows * kBlockDepth;  // of one depth block: one register

// One panel as its bit planes.
struct Planes {
  const uint8_t* bytes;
  int bits;
  int64_t depth;

  int64_t whole_blocks() const { return depth / kBlockDepth; }

  // The codes of a partial last block: padding weighs 0 whatever the offset.
  __mmask64 rest() const {
    return ((uint64_t{1} << depth % kBlockDepth) - 1) * 0x1111111111111111u;
  }
};

// One masked add a plane.
template <int BITS>
class MaskedAdds {
 public:
  explicit MaskedAdds(const Planes& p) : p_(p) {}

  __m512i operator()(int64_t block) const {
    const uint8_t* bytes = p_.bytes + block * BITS * kPlaneBytes;
    return add_planes(_mm512_setzero_si512(), bytes, BITS);
  }

 private:
  const Planes p_;
};

// Weights code + offset, and what sums start with: -zero_point * sum of a channel's weights.
template <class Expand>
inline __attribute__((always_inline)) void unpack_panel(const Planes& p, const Expand& expand,
                                                        __m512i offset, int32_t zero_point,
                                                        int8_t* panel, int32_t* start) {
  __m512i sums[4] = {};  // several hide the instructions' latency
  auto store = [&](int s, int64_t block, __mmask64 valid) __attribute__((always_inline)) {
    const __m512i w = _mm512_maskz_add_epi8(valid, expand(block), offset);
    _mm512_store_si512(panel + block * kPanelBytes, w);
    sums[s] = add_fours(sums[s], w);
  };
  const int64_t blocks = p.whole_blocks();
  int64_t k = 0;
  for (; k + 4 <= blocks; k += 4) {
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) store(s, k + s, ~__mmask64{0});
  }
  for (; k < blocks; ++k) store(0, k, ~__mmask64{0});
  if (p.rest()) store(0, k, p.rest());
  const __m512i sum =
      _mm512_add_epi32(_mm512_add_epi32(sums[0], sums[1]), _mm512_add_epi32(sums[2], sums[3]));
  _mm512_storeu_si512(start, _mm512_mullo_epi32(sum, _mm512_set1_epi32(-zero_point)));
}

inline void unpack_masked_adds(const Planes& p, __m512i offset, int32_t zero_point, int8_t* panel,
                               int32_t* start) {
  switch (p.bits) {
    case 2: return unpack_panel(p, MaskedAdds<2>(p), offset, zero_point, panel, start);
    case 3: return unpack_panel(p, MaskedAdds<3>(p), offset, zero_point, panel, start);
    case 4: return unpack_panel(p, MaskedAdds<4>(p), offset, zero_point, panel, start);
    case 5: return unpack_panel(p, MaskedAdds<5>(p), offset, zero_point, panel, start);
    case 6: return unpack_panel(p, MaskedAdds<6>(p), offset, zero_point, panel, start);
    case 7: return unpack_panel(p, MaskedAdds<7>(p), offset, zero_point, panel, start);
    case 8: return unpack_panel(p, MaskedAdds<8>(p), offset, zero_point, panel, start);
  }
}

#if defined(__AVX512VNNI__)
// Processors with VNNI but without these are Cascade and Cooper Lake.
#define FDDA_GFNI __attribute__((target("gfni,avx512vbmi")))

inline bool has_gfni() {
  return __builtin_cpu_supports("gfni") && __builtin_cpu_supports("avx512vbmi");
}

constexpr int64_t kAhead = 2048;      // bytes of planes: what comes from memory while it is needed
constexpr int64_t kShortAhead = 512;  // where many places are read in turn: L1 keeps so much
constexpr int64_t kFarAhead = 4096;   // where nothing but planes is read

// Eight codes are a product of bit matrices: a byte of each plane, the top one repeated down to bit
// 7, times the unit vectors. Two instructions for any number of bits.
class BitMatrices {
 public:
  explicit BitMatrices(const Planes& p)
      : p_(p),
        step_(p.bits * kPlaneBytes),
        load_((1u << p.bits) - 1),
        load_pair_((1u << 2 * p.bits) - 1) {
    alignas(64) uint8_t order[64];
    for (int i = 0; i < 64; ++i) {
      // The instruction wants the matrix's last row first.
      const int row = 7 - i % 8;
      order[i] = static_cast<uint8_t>((row < p.bits ? row : p.bits - 1) * kPlaneBytes + i / 8);
    }
    order_ = _mm512_load_si512(order);
    next_order_ = _mm512_add_epi8(order_, _mm512_set1_epi8(static_cast<char>(step_)));
  }

  FDDA_GFNI __m512i operator()(int64_t block) const {
    const uint8_t* bytes = p_.bytes + block * step_;
    _mm_prefetch(bytes + kAhead, _MM_HINT_T0);
    return codes(_mm512_maskz_loadu_epi64(load_, bytes));
  }

  // Two blocks.
  FDDA_GFNI void pair(int64_t block, __m512i (&w)[2]) const {
    w[0] = (*this)(block);
    w[1] = (*this)(block + 1);
  }

  // Of up to 4 bits: they are read at once.
  template <int64_t AHEAD>
  FDDA_GFNI void short_pair(int64_t block, __m512i (&w)[2]) const {
    const uint8_t* bytes = p_.bytes + block * step_;
    _mm_prefetch(bytes + AHEAD, _MM_HINT_T0);
    const __m512i planes = _mm512_maskz_loadu_epi64(load_pair_, bytes);
    w[0] = codes(planes);
    w[1] = codes(planes, next_order_);
  }

  // Of up to 4 bits: a short load, which seldom reaches into a second line.
  template <int64_t AHEAD>
  FDDA_GFNI __m512i short_block(int64_t block) const {
    const uint8_t* bytes = p_.bytes + block * step_;
    _mm_prefetch(bytes + AHEAD, _MM_HINT_T0);
    const __m256i planes = _mm256_maskz_loadu_epi64(load_, bytes);
    return codes(_mm512_castsi256_si512(planes));
  }

 private:
  FDDA_GFNI __m512i codes(__m512i planes) const { return codes(planes, order_); }

  static FDDA_GFNI __m512i codes(__m512i planes, __m512i order) {
    const __m512i unit = _mm512_set1_epi64(static_cast<int64_t>(0x8040201008040201u));
    return _mm512_gf2p8affine_epi64_epi8(unit, _mm512_permutexvar_epi8(order, planes), 0);
  }

  const Planes p_;
  const int64_t step_;
  const __mmask8 load_, load_pair_;
  __m512i order_, next_order_;
};

// Of up to 4 bits.
template <int64_t AHEAD>
struct ShortBlocks {
  BitMatrices matrices;

  explicit ShortBlocks(const Planes& p) : matrices(p) {}

  FDDA_GFNI __m512i operator()(int64_t block) const {
    return matrices.template short_block<AHEAD>(block);
  }

  FDDA_GFNI void pair(int64_t block, __m512i (&w)[2]) const {
    matrices.template short_pair<AHEAD>(block, w);
  }
};

FDDA_GFNI inline void unpack_bit_matrices(const Planes& p, __m512i offset, int32_t zero_point,
                                          int8_t* panel, int32_t* start) {
  unpack_panel(p, BitMatrices(p), offset, zero_point, panel, start);
}

// `sums`, [ROWS][stride], of ROWS rows times one panel's codes; every plane is read once and no
// weight stored. Several sums of one row hide vpdpbusd's latency. ZERO: zero_point is 0.
template <int ROWS, bool ZERO, class Expand>
FDDA_GFNI void multiply_planes_by(const Planes& p, int32_t zero_point, const uint8_t* x,
                                  int64_t x_stride, int32_t* sums, int64_t stride) {
  const Expand expand(p);
  constexpr int kSplit = ROWS < 3 ? 4 : ROWS < 6 ? 2 : 1;
  __m512i acc[kSplit][ROWS], weights[kSplit];
#pragma GCC unroll 4
  for (int s = 0; s < kSplit; ++s) {
    weights[s] = _mm512_setzero_si512();
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) acc[s][r] = _mm512_setzero_si512();
  }
  // Three rows a pointer: more pointers than these would not fit the registers.
  const uint8_t* rows[(ROWS + 2) / 3];
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; r += 3) rows[r / 3] = x + r * x_stride;
  auto add = [&](int s, __m512i w) __attribute__((always_inline)) {
    if (!ZERO) weights[s] = add_fours(weights[s], w);
    asm("" : "+v"(weights[s]));
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      int32_t four;
      memcpy(&four, rows[r / 3] + r % 3 * x_stride, sizeof four);
      acc[s][r] = _mm512_dpbusd_epi32(acc[s][r], _mm512_set1_epi32(four), w);
      asm("" : "+v"(acc[s][r]));  // in this order, else gcc spills
    }
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r += 3) rows[r / 3] += kBlockDepth;
  };
  const int64_t blocks = p.whole_blocks();
  int64_t k = 0;
  constexpr int kAtOnce = kSplit < 2 ? 2 : kSplit;
  for (; k + kAtOnce <= blocks; k += kAtOnce) {
#pragma GCC unroll 2
    for (int s = 0; s < kAtOnce; s += 2) {
      __m512i w[2];
      expand.pair(k + s, w);
      add(s % kSplit, w[0]);
      add((s + 1) % kSplit, w[1]);
    }
  }
  for (; k < blocks; ++k) add(0, expand(k));
  if (p.rest()) add(0, _mm512_maskz_mov_epi8(p.rest(), expand(k)));
#pragma GCC unroll 4
  for (int s = 1; s < kSplit; ++s) {
    weights[0] = _mm512_add_epi32(weights[0], weights[s]);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) acc[0][r] = _mm512_add_epi32(acc[0][r], acc[s][r]);
  }
  const __m512i start = _mm512_mullo_epi32(weights[0], _mm512_set1_epi32(-zero_point));
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
    _mm512_store_si512(sums + r * stride, _mm512_add_epi32(acc[0][r], start));
  }
}

template <int ROWS, bool ZERO>
void multiply_planes(const Planes& p, int32_t zero_point, const uint8_t* x, int64_t x_stride,
                     int32_t* sums, int64_t stride) {
  const auto multiply = p.bits <= 4 ? multiply_planes_by<ROWS, ZERO, ShortBlocks<kFarAhead>>
                                    : multiply_planes_by<ROWS, ZERO, BitMatrices>;
  multiply(p, zero_point, x, x_stride, sums, stride);
}
#endif

}  // namespace
}  // namespace FDDA_ISA
}  // namespace fdda
