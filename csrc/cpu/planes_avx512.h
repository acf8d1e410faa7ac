// Bit planes of a panel to vpdpbusd's weights, 64 bytes a depth block; the layout is drawn in
// common/arithmetic.h.
#pragma once

#include <immintrin.h>

#include "functions.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

constexpr int64_t kAhead = 2048;  // bytes of planes: what comes from memory while it is needed

// Eight codes are a product of bit matrices: a byte of each plane, the top one repeated down to bit
// 7, times the unit vectors. Two instructions for any number of bits.
class BitMatrices {
 public:
  BitMatrices(const uint8_t* planes, int bits)
      : planes_(planes), step_(bits * kPlaneBytes), load_((1u << bits) - 1) {
    alignas(64) uint8_t order[64];
    for (int i = 0; i < 64; ++i) {
      // The instruction wants the matrix's last row first.
      const int row = 7 - i % 8;
      order[i] = static_cast<uint8_t>((row < bits ? row : bits - 1) * kPlaneBytes + i / 8);
    }
    order_ = _mm512_load_si512(order);
  }

  __m512i operator()(int64_t block) const {
    const uint8_t* bytes = planes_ + block * step_;
    _mm_prefetch(bytes + kAhead, _MM_HINT_T0);
    const __m512i planes = _mm512_maskz_loadu_epi64(load_, bytes);
    const __m512i unit = _mm512_set1_epi64(static_cast<int64_t>(0x8040201008040201u));
    return _mm512_gf2p8affine_epi64_epi8(unit, _mm512_permutexvar_epi8(order_, planes), 0);
  }

 private:
  const uint8_t* planes_;
  const int64_t step_;
  const __mmask8 load_;
  __m512i order_;
};

}  // namespace
}  // namespace FDDA_ISA
}  // namespace fdda
