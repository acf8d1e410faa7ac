// Winograd's F(3x3, 3x3) in 8-bit integers, exact, on registers of any width: 25 products for 9
// outputs of a 3x3 convolution, where F(2x2, 3x3) takes 36 and the definition 81. Its points are 0,
// 1, -1, 2 and infinity (Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, 2016,
// section 4):
//
//   B^T  2 -1 -2  1  0     6 G  3  0  0     A^T  1  1  1  1  0
//        0 -2 -1  1  0         -3 -3 -3          0  1 -1  2  0
//        0  2 -3  1  0         -1  1 -1          0  1  1  4  1
//        0 -1  0  1  0          1  2  4
//        0  2 -1 -2  1          0  0  6
//
//   V = B^T d B + 126          of the inputs' codes d <= 7: [0, 252], u8
//   U = (6 G) w (6 G)^T        of weights |w| <= 2: [-126, 126], s8, but for position (1, 1), where
//                              it is 9 times the sum of all taps: U has it times -3, so that the
//                              products are to be multiplied by -3
//   36 y = A^T (sum U V) A     modulo 2^32
//
// Vectors V are of uint8_t or uint32_t, added modulo 2^8 or 2^32: only results have to fit.
#pragma once

#include <string.h>

#include "functions.h"
#include "winograd_inputs.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

struct F3 {
  static constexpr int kStep = 3, kPoints = 5, kPositions = kPoints * kPoints;
  static constexpr int kAllTaps = kPoints + 1, kAllTapsFactor = -3;  // position (1, 1)
  static constexpr int kLargestCode = 7, kLargestWeight = 2;
  static constexpr int kShift = 18 * kLargestCode;

  // Whether V and U fit, of weights and codes up to these.
  static bool fits(int64_t weight, int64_t code) {
    return weight <= kLargestWeight && code <= kLargestCode;
  }

  // Whether there are so many fewer products than of F(2x2, 3x3) that they make up for transforming
  // more weights; and so many channels that it is products that take the time.
  static bool pays(const PackedConv& conv) {
    auto products = [&](int64_t step) {
      const int64_t tiles = ceil_div(conv.height, step) * ceil_div(conv.width, step);
      return conv.batch * tiles * (step + 2) * (step + 2);
    };
    return conv.channels >= 48 && products(2) - products(kStep) >= 100;
  }

  // V of a row of tiles, of which `shift` is added.
  //   read(x, d)    the 5 inputs of column x, from -1 on, one below the other
  //   place(tile)   where position 0 of a tile goes; the others are `stride` bytes apart
  template <class V, class Read, class Place>
  static inline __attribute__((always_inline)) void transform_inputs(int64_t tiles, V shift,
                                                                     int64_t stride,
                                                                     const Read& read,
                                                                     const Place& place) {
    V t[kPoints][kPoints];
    auto column = [&](int64_t x, V* t) __attribute__((always_inline)) {
      V d[kPoints];
      read(x, d);
      transform(d, V{}, t);
    };
    column(-1, t[0]);
    column(0, t[1]);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      for (int j = 2; j < kPoints; ++j) column(kStep * tile - 1 + j, t[j]);
      uint8_t* const out = place(tile);
#pragma GCC unroll 5
      for (int i = 0; i < kPoints; ++i) {
        const V d[kPoints] = {t[0][i], t[1][i], t[2][i], t[3][i], t[4][i]};
        V v[kPoints];
        transform(d, shift, v);
#pragma GCC unroll 5
        for (int j = 0; j < kPoints; ++j) {
          memcpy(out + (kPoints * i + j) * stride, &v[j], sizeof v[j]);
        }
        t[0][i] = t[3][i];
        t[1][i] = t[4][i];
      }
    }
  }

  // U of 9 taps.
  template <class V>
  static inline __attribute__((always_inline)) void transform_weights(const V* g, V* u) {
    V columns[3][kPoints];
#pragma GCC unroll 3
    for (int x = 0; x < 3; ++x) multiply_by_g(g + x, 3, columns[x]);
#pragma GCC unroll 5
    for (int y = 0; y < kPoints; ++y) multiply_by_g(columns[0] + y, kPoints, u + kPoints * y);
    u[kAllTaps] = columns[0][1] + columns[1][1] + columns[2][1];
  }

  // A^T m.
  template <class V>
  static inline __attribute__((always_inline)) void transform_products(const V* m, V* y) {
    const V sum = m[1] + m[2], two = m[3] + m[3];
    y[0] = sum + m[3] + m[0];
    y[1] = m[1] - m[2] + two;
    y[2] = sum + m[4] + (two + two);
  }

  // 4 y of 36 y.
  template <class V>
  static inline __attribute__((always_inline)) V ninth(V v) {
    return v * 0x38e38e39u;  // its inverse
  }

 private:
  // B^T d + shift.
  template <class V>
  static inline __attribute__((always_inline)) void transform(const V* d, V shift, V* v) {
    const V difference = d[3] - d[1], shifted = difference + shift;
    const V a = d[0] - d[2], b = d[1] - d[2];
    v[0] = shifted + a + a;
    v[1] = shifted - (d[1] + d[2]);
    v[2] = shifted + b + b + b;
    v[3] = shifted;
    v[4] = d[4] - d[2] + shift - difference - difference;
  }

  template <class V>
  static inline __attribute__((always_inline)) void multiply_by_g(const V* g, int step, V* u) {
    const V g0 = g[0], g1 = g[step], g2 = g[2 * step];
    const V two = g2 + g2, four = two + two, difference = g1 - (g0 + g2);
    const V minus_all = difference - (g1 + g1);
    u[0] = g0 + g0 + g0;
    u[1] = minus_all + minus_all + minus_all;
    u[2] = difference;
    u[3] = g0 + (g1 + g1) + four;
    u[4] = four + two;
  }
};

}  // namespace
}  // namespace FDDA_ISA
}  // namespace fdda
