// Winograd's F(4x4, 3x3) in 8-bit integers, exact, on registers of any width: 46 products for 16
// outputs of a 3x3 convolution, where F(2x2, 3x3) takes 64 and the definition 144. Its points are
// 0, 1, -1, infinity, i and -i (Meng and Brothers, Efficient Winograd Convolution via Integer
// Arithmetic, 2019, section 3): no factor grows as it does with 2 and -2. What -i gives is the
// conjugate of what i gives, so both take one complex product, which is three real ones.
//
//   V     0: 2 (d0 - d4)   1, -1: (d2 + d4) +- (d1 + d3)   inf: 2 (d5 - d1)   i: d4 - d2 + i (d3 -
//   d1) U     0: 2 g0          1, -1: (g0 + g2) +- g1          inf: 2 g2          i: g0 - g2 + i g1
//   4 y   with m = U V, e = m(1) + m(-1), o = m(1) - m(-1):
//         e + 2 re m(i) + m(0), o - 2 im m(i), e - 2 re m(i), o + 2 im m(i) + m(inf)
//
// Tiles of at most two outputs a line take F(2, 3), which has the first four U:
//
//   V     0: 2 (d0 - d2)   1, -1: d2 +- d1                 inf: 2 (d3 - d1)
//   4 y   2 e + m(0), 2 o + m(inf)
//
// In two dimensions columns are transformed first, then rows. What is complex in both are two
// numbers, the values at (i, i) and (i, -i). |V| <= 8 c of codes d <= c, but at (1, 1), where it is
// their sum; |U| <= 9 |g|.
//
// Vectors V are of uint8_t or uint32_t, added modulo 2^8 or 2^32: only results have to fit.
#pragma once

#include "functions.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

struct F4 {
  static constexpr int kStep = 4, kPoints = 6, kReal = 4, kLines = 7, kPositions = 46;
  static constexpr int kLargestCode = 15, kLargestWeight = 14, kShift = 8 * kLargestCode;

  // Lines of positions are the four real points, in the order above, and the factors of the three
  // products that make a complex one: real parts, imaginary parts and their sums.
  static constexpr int kAllTaps = kLines + 1;  // (1, 1)
  static constexpr int kAtI = 40, kAtConjugate = 43;
  static constexpr int real_row(int row, int line) { return kLines * row + line; }
  static constexpr int complex_row(int part, int column) { return 28 + kReal * part + column; }

  // The point's line, of those in both 4 for that at i.
  static constexpr int row_of(int position) {
    return position < complex_row(0, 0) ? position / kLines : kReal;
  }
  static constexpr int column_of(int position) {
    if (position < complex_row(0, 0)) return position % kLines;
    return position < kAtI ? position % kReal : kReal;
  }

  // Where a position's factors are the sums of those of two others, `step` and twice that before:
  // the step, else 0.
  static constexpr int step_of_sum(int position) {
    if (position < complex_row(0, 0)) return position % kLines == kLines - 1;
    if (position < kAtI) return position >= complex_row(2, 0) ? kReal : 0;
    return position == kAtI + 2 || position == kAtConjugate + 2;
  }

  // Sums: the four rows of 4 y of each line of columns, of the last three without what the row at i
  // adds; then, of that row and these columns, two complex numbers.
  static constexpr int kSums = 32, kSumAtI = 28, kSumAtConjugate = 30;
  static constexpr int sum(int row, int line) { return kStep * line + row; }

  // Whether tiles of so many outputs a line need i.
  static constexpr bool whole(int64_t outputs) { return outputs > 2; }

  // Whether V and U fit, of weights and codes up to these.
  static bool fits(int64_t weight, int64_t code) {
    return weight <= kLargestWeight && code <= kLargestCode;
  }

  // Whether there are so many fewer products than of F(2x2, 3x3) that they make up for transforming
  // more weights; and so many channels that it is products that take the time.
  static bool pays(const PackedConv& conv) {
    const Lines rows(conv.height), columns(conv.width);
    const int64_t real = rows.real * columns.real;
    const int64_t mixed = rows.real * columns.complex + rows.complex * columns.real;
    const int64_t both = rows.complex * columns.complex;
    const int64_t saved = rows.of_pairs * columns.of_pairs - (real + 3 * mixed + 6 * both);
    const int64_t all = conv.batch * saved;
    return conv.channels >= 48 && all >= 120 && all * conv.channels >= 16384;
  }

  // put(position, U) of 9 taps.
  template <class V, class Put>
  static inline __attribute__((always_inline)) void transform_weights(const V* g, const Put& put) {
    V v[3], u[kPoints], w[kPoints];
#pragma GCC unroll 4
    for (int row = 0; row < kReal; ++row) {
#pragma GCC unroll 3
      for (int x = 0; x < 3; ++x) {
        v[x] = row == 0   ? g[x] + g[x]
               : row == 1 ? g[x] + g[6 + x] + g[3 + x]
               : row == 2 ? g[x] + g[6 + x] - g[3 + x]
                          : g[6 + x] + g[6 + x];
      }
      transform_taps(v, u);
      put_real<true>(row, u, put);
    }
#pragma GCC unroll 3
    for (int x = 0; x < 3; ++x) v[x] = g[x] - g[6 + x];
    transform_taps(v, u);
    transform_taps(g + 3, w);
    put_complex<true>(u, w, put);
  }

  // V of a line of inputs: at real points, then if WHOLE the two parts at i.
  template <bool WHOLE, class V>
  static inline __attribute__((always_inline)) void transform_inputs(const V* d, V* v) {
    V ends[2];
    if (WHOLE) {
      const V odd = d[1] + d[3], even = d[2] + d[4];
      ends[0] = d[0] - d[4];
      v[1] = even + odd;
      v[2] = even - odd;
      ends[1] = d[5] - d[1];
      v[4] = d[4] - d[2];
      v[5] = d[3] - d[1];
    } else {
      ends[0] = d[0] - d[2];
      v[1] = d[2] + d[1];
      v[2] = d[2] - d[1];
      ends[1] = d[3] - d[1];
    }
    v[0] = ends[0] + ends[0];
    v[3] = ends[1] + ends[1];
  }

  // put(position, value) of a real row.
  template <bool WHOLE, class V, class Put>
  static inline __attribute__((always_inline)) void put_real(int row, const V* v, const Put& put) {
#pragma GCC unroll 4
    for (int c = 0; c < kReal; ++c) put(real_row(row, c), v[c]);
    if (!WHOLE) return;
    put(real_row(row, 4), v[4]);
    put(real_row(row, 5), v[5]);
    put(real_row(row, 6), v[4] + v[5]);
  }

  // The same of the row at i, of which these are the parts.
  template <bool WHOLE, class V, class Put>
  static inline __attribute__((always_inline)) void put_complex(const V* re, const V* im,
                                                                const Put& put) {
#pragma GCC unroll 4
    for (int c = 0; c < kReal; ++c) {
      put(complex_row(0, c), re[c]);
      put(complex_row(1, c), im[c]);
      put(complex_row(2, c), re[c] + im[c]);
    }
    if (!WHOLE) return;
    const V real = re[4] - im[5], imaginary = re[5] + im[4];
    put(kAtI, real);
    put(kAtI + 1, imaginary);
    put(kAtI + 2, real + imaginary);
    const V other_real = re[4] + im[5], other_imaginary = im[4] - re[5];
    put(kAtConjugate, other_real);
    put(kAtConjugate + 1, other_imaginary);
    put(kAtConjugate + 2, other_real + other_imaginary);
  }

  // The sums of the tile from its products(position).
  template <bool ROWS_WHOLE, bool COLUMNS_WHOLE, class Products, class V>
  static inline __attribute__((always_inline)) void sum_products(const Products& products,
                                                                 V* sums) {
#pragma GCC unroll 7
    for (int line = 0; line < (COLUMNS_WHOLE ? kLines : kReal); ++line) {
      V* const y = sums + sum(0, line);
      const V m1 = products(real_row(1, line)), m2 = products(real_row(2, line));
      const V even = m1 + m2, odd = m1 - m2;
      const V first = products(real_row(0, line)), last = products(real_row(3, line));
      if (!ROWS_WHOLE) {
        y[0] = even + even + first;
        y[1] = odd + odd + last;
        continue;
      }
      V re = {}, im = {};
      if (line < kReal) {
        multiply_complex(products, complex_row(0, line), kReal, &re, &im);
        re += re;
        im += im;
      }
      y[0] = even + re + first;
      y[1] = odd - im;
      y[2] = even - re;
      y[3] = odd + im + last;
    }
    if (!ROWS_WHOLE || !COLUMNS_WHOLE) return;
    multiply_complex(products, kAtI, 1, sums + kSumAtI, sums + kSumAtI + 1);
    multiply_complex(products, kAtConjugate, 1, sums + kSumAtConjugate, sums + kSumAtConjugate + 1);
  }

  // 16 y of all four rows, or of the first two, from sums(i).
  template <bool ROWS_WHOLE, bool COLUMNS_WHOLE, class Sums, class V>
  static inline __attribute__((always_inline)) void transform_sums(const Sums& sums, V* y) {
    constexpr int kRows = ROWS_WHOLE ? 4 : 2;
    V re[kRows], im[kRows];
    if (COLUMNS_WHOLE) {
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const V a = sums(sum(r, 4)), b = sums(sum(r, 5));
        re[r] = a - b;
        im[r] = sums(sum(r, 6)) - a - b;
      }
      if (ROWS_WHOLE) {
        const V u_re = sums(kSumAtI), u_im = sums(kSumAtI + 1);
        const V v_re = sums(kSumAtConjugate), v_im = sums(kSumAtConjugate + 1);
        const V real = u_re + v_re, imaginary = u_im + v_im;
        re[0] += real;
        re[1] -= imaginary;
        re[2] -= real;
        re[3] += imaginary;
        const V other_real = u_im - v_im, other_imaginary = v_re - u_re;
        im[0] += other_real;
        im[1] -= other_imaginary;
        im[2] -= other_real;
        im[3] += other_imaginary;
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        re[r] += re[r];
        im[r] += im[r];
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r, y += COLUMNS_WHOLE ? 4 : 2) {
      const V plus = sums(sum(r, 1)), minus = sums(sum(r, 2));
      const V even = plus + minus, odd = plus - minus;
      const V first = sums(sum(r, 0)), last = sums(sum(r, 3));
      if (COLUMNS_WHOLE) {
        y[0] = even + re[r] + first;
        y[1] = odd - im[r];
        y[2] = even - re[r];
        y[3] = odd + im[r] + last;
      } else {
        y[0] = even + even + first;
        y[1] = odd + odd + last;
      }
    }
  }

 private:
  // From three products, `step` positions apart.
  template <class Products, class V>
  static inline __attribute__((always_inline)) void multiply_complex(const Products& products,
                                                                     int position, int step, V* re,
                                                                     V* im) {
    const V a = products(position), b = products(position + step);
    *re = a - b;
    *im = products(position + 2 * step) - a - b;
  }

  // Products of a line of outputs, real and complex ones; those of F(2, 3).
  struct Lines {
    int64_t real, complex, of_pairs;

    explicit Lines(int64_t outputs) {
      const int64_t tiles = outputs / kStep, rest = outputs % kStep;
      real = kReal * tiles + (rest > 0 ? kReal - rest % 2 : 0);
      complex = tiles + whole(rest);
      of_pairs = 2 * outputs + outputs % 2;
    }
  };

  template <class V>
  static inline __attribute__((always_inline)) void transform_taps(const V* g, V* u) {
    const V sum = g[0] + g[2];
    u[0] = g[0] + g[0];
    u[1] = sum + g[1];
    u[2] = sum - g[1];
    u[3] = g[2] + g[2];
    u[4] = g[0] - g[2];
    u[5] = g[1];
  }
};

}  // namespace
}  // namespace FDDA_ISA
}  // namespace fdda
