// Products of rows of u8 inputs and panels of s8 weights on AVX-512: vpdpbusd, or without VNNI
// vpmaddubsw. That adds two products with saturation; `exact_steps` such results fit the int16 in
// which they are added before they are widened. Where a single one might not, bytes are widened
// first, for vpmaddwd.
#pragma once

#include <immintrin.h>
#include <string.h>

#include "functions.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

#if defined(__AVX512VNNI__)
// Of two panels, of one: sums, weights, an input and the epilogue's factors fit the 32 registers.
constexpr int kDotRows = 8, kNarrowDotRows = 14;

// Of weights and codes up to these: any number.
inline int64_t exact_steps(int64_t, int64_t) { return INT64_MAX; }
#else
// Of two panels, of one: sums of either width, weights, an input and a product.
constexpr int kDotRows = 6, kNarrowDotRows = 12;

inline int64_t exact_steps(int64_t weight, int64_t code) {
  return 32767 / (2 * max64(1, weight) * code);
}
#endif

// sum plus those of 4 adjacent s8.
inline __m512i add_fours(__m512i sum, __m512i w) {
  const __m512i ones = _mm512_set1_epi8(1);
#if defined(__AVX512VNNI__)
  return _mm512_dpbusd_epi32(sum, ones, w);
#else
  const __m512i pairs = _mm512_maddubs_epi16(ones, w);
  return _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#endif
}

// Where weights are: a register of each panel a step.
struct Panels {
  const int8_t* next;
  int64_t panel, step;  // bytes from one to the next
};

// sums = op(sums, inputs, weights) for one step: four bytes of each row, at rows(r).
template <int ROWS, int PANELS, class Rows, class Op>
inline __attribute__((always_inline)) void add_rows(__m512i (&sums)[ROWS][PANELS], Rows& rows,
                                                    const __m512i (&w)[PANELS], Op op) {
#pragma GCC unroll 28
  for (int r = 0; r < ROWS; ++r) {
    int32_t four;
    memcpy(&four, rows(r), sizeof four);
    const __m512i a = _mm512_set1_epi32(four);
#pragma GCC unroll 2
    for (int p = 0; p < PANELS; ++p) {
      sums[r][p] = op(sums[r][p], a, w[p]);
      asm("" : "+v"(sums[r][p]));  // in this order, else gcc spills
    }
  }
  rows.next();
}

template <int ROWS, int PANELS, class Rows, class Op>
inline __attribute__((always_inline)) void add_step(__m512i (&sums)[ROWS][PANELS], Rows& rows,
                                                    Panels& w, Op op) {
  __m512i b[PANELS];
#pragma GCC unroll 2
  for (int p = 0; p < PANELS; ++p) b[p] = _mm512_load_si512(w.next + p * w.panel);
  add_rows(sums, rows, b, op);
  w.next += w.step;
}

// Adds the products of `steps` steps.
template <int ROWS, int PANELS, class Rows>
inline __attribute__((always_inline)) void add_products(__m512i (&sums)[ROWS][PANELS], Rows& rows,
                                                        Panels& w, int64_t steps,
                                                        int64_t exact_steps) {
#if defined(__AVX512VNNI__)
  const auto op = [](__m512i sum, __m512i x, __m512i w) { return _mm512_dpbusd_epi32(sum, x, w); };
  for (; steps > 1; steps -= 2) {
    add_step(sums, rows, w, op);
    add_step(sums, rows, w, op);
  }
  if (steps) add_step(sums, rows, w, op);
#else
  if (exact_steps == 0) {
    for (; steps > 0; --steps) {
      add_step(sums, rows, w, [](__m512i sum, __m512i x, __m512i w) {
        const __m512i even_x = _mm512_and_si512(x, _mm512_set1_epi16(255));
        const __m512i even_w = _mm512_srai_epi16(_mm512_slli_epi16(w, 8), 8);
        const __m512i even = _mm512_madd_epi16(even_x, even_w);
        const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(x, 8), _mm512_srai_epi16(w, 8));
        return _mm512_add_epi32(_mm512_add_epi32(sum, even), odd);
      });
    }
    return;
  }
  while (steps > 0) {
    const int64_t n = min64(steps, exact_steps);
    steps -= n;
    __m512i part[ROWS][PANELS];
    add_step(part, rows, w,
             [](__m512i, __m512i x, __m512i w) { return _mm512_maddubs_epi16(x, w); });
    for (int64_t i = 1; i < n; ++i) {
      add_step(part, rows, w, [](__m512i sum, __m512i x, __m512i w) {
        return _mm512_add_epi16(sum, _mm512_maddubs_epi16(x, w));
      });
    }
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
      for (int p = 0; p < PANELS; ++p) {
        const __m512i wide = _mm512_madd_epi16(part[r][p], _mm512_set1_epi16(1));
        sums[r][p] = _mm512_add_epi32(sums[r][p], wide);
      }
    }
  }
#endif
}

}  // namespace
}  // namespace FDDA_ISA
}  // namespace fdda
