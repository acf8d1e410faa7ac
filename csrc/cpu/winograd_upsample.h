// The transforms of nearest x2 up-sampling and a 3x3 convolution by Winograd's algorithm: 8 x 8
// outputs by 81 products.
//
// In one dimension, the filter (a, b, c) behind the up-sampling is (a, b + c, 0) for the even
// outputs and (0, a + b, c) for the odd ones, on the same tile of 6 inputs. Both are F(4, 3), with
// the points 0, 1, infinity, -1, 1/2 and -2. At 0 the odd filter is zero, at infinity the even one,
// and at 1 both are equal, so that one product is enough there and two are needed elsewhere: 9 for
// 8 outputs. Of the points tried, 1 among them, these have the least error: two thirds of that of
// -1, 1/2 and -1/2. In two dimensions, columns are transformed first, then rows; positions are
// ordered by the number of products: 9 with one, 18 with two, 9 with four.

#pragma once

#include "winograd.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

constexpr int kPoints = 6, kProducts = 9, kStep = 4, kOutputs = 2 * kStep, kTaps = 3;
constexpr int kSingle = 3;  // points with one product, the first ones

struct InputTransform {
  static constexpr int kFrom = kPoints, kTo = kPoints;
  template <class V>
  static void apply(const V* x, V* y) {
    // By the factors t^2 - 1 of the points 1 and -1, and t^2 + 1.5 t - 1 of 1/2 and -2.
    const V d0 = x[2] - x[0], d1 = x[3] - x[1], d2 = x[4] - x[2], d3 = x[5] - x[3];
    const V e1 = d1 + 1.5f * x[2], e2 = d2 + 1.5f * x[3];
    y[0] = (d2 - d0) + 1.5f * d1;
    y[1] = e2 + e1;
    y[2] = (d3 - d1) + 1.5f * d2;
    y[3] = e2 - e1;
    y[4] = d2 + 2.0f * d1;
    y[5] = d2 - 0.5f * d1;
  }
};

struct OutputTransform {
  static constexpr int kFrom = kProducts, kTo = kOutputs;
  template <class V>
  static void apply(const V* x, V* y) {
    for (int odd = 0; odd < 2; ++odd) {
      const V one = x[1], minus = x[3 + odd], half = x[5 + odd], two = x[7 + odd];
      const V even = one + minus, difference = one - minus;
      y[odd] = even + (half + two);
      y[2 + odd] = difference + (0.5f * half - 2.0f * two);
      y[4 + odd] = even + (0.25f * half + 4.0f * two);
      y[6 + odd] = difference + (0.125f * half - 8.0f * two);
    }
    y[0] += x[0];
    y[7] += x[2];
  }
};

// Of the points 1 and -1, 1/2, and -2.
constexpr float kThird = 1.0f / 3.0f, kHalf = -8.0f / 15.0f, kTwo = 1.0f / 15.0f;

struct WeightTransform {
  static constexpr int kFrom = kTaps, kTo = kProducts;
  template <class V>
  static void apply(const V* x, V* y) {
    const V left = x[0] + x[1], right = x[1] + x[2];
    y[0] = x[0];
    y[1] = kThird * (left + x[2]);
    y[2] = x[2];
    y[3] = kThird * (right - x[0]);
    y[4] = kThird * (left - x[2]);
    y[5] = kHalf * (2.0f * x[0] + right);
    y[6] = kHalf * (left + 0.5f * x[2]);
    y[7] = kTwo * (x[0] - 2.0f * right);
    y[8] = kTwo * (4.0f * x[2] - 2.0f * left);
  }
};

// Where position (i, j) of points comes in the order.
constexpr int position_of(int i, int j) {
  const int block = i / kSingle * 2 + j / kSingle;
  return (block * kSingle + i % kSingle) * kSingle + j % kSingle;
}

// Product (i, j): number `variant` of `count` at its position; `first` products precede these.
struct ProductPlace {
  int position = 0, first = 0, count = 0, variant = 0;
};

struct ProductPlaces {
  ProductPlace places[kProducts * kProducts];
  constexpr ProductPlaces() : places() {
    constexpr int kBlock = kSingle * kSingle;
    for (int i = 0; i < kProducts; ++i) {
      for (int j = 0; j < kProducts; ++j) {
        const bool two_i = i >= kSingle, two_j = j >= kSingle;
        const int point_i = two_i ? (i + kSingle) / 2 : i, point_j = two_j ? (j + kSingle) / 2 : j;
        const int position = position_of(point_i, point_j);
        const int doubles = position < kBlock ? 0 : position - kBlock;
        const int fourfold = position < 3 * kBlock ? 0 : position - 3 * kBlock;
        ProductPlace& place = places[i * kProducts + j];
        place.position = position;
        place.first = position + doubles + 2 * fourfold;
        place.count = (1 + two_i) * (1 + two_j);
        place.variant =
            (two_i ? (i - kSingle) % 2 * (1 + two_j) : 0) + (two_j ? (j - kSingle) % 2 : 0);
      }
    }
  }
};

constexpr ProductPlaces kPlaces;

}  // namespace
}  // namespace FDDA_ISA
}  // namespace fdda
