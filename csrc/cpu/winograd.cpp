// The transforms of Winograd's F(4x4, 3x3): a 3x3 convolution of 4 x 4 outputs by 36 products.
//
// In one dimension, a filter and a tile of 6 inputs are polynomials, evaluated at the 6 points 0,
// -a, a, -b, b and infinity; values multiply point by point, and the transposed evaluation makes 4
// outputs. With a = sqrt(1/2), b = sqrt(2) the largest error was the lowest of the pairs tried, a
// quarter of that of the usual 1 and 2; the root mean square is within 5 % of the best. In two
// dimensions, columns are transformed first, then rows.

#include "winograd.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

constexpr int kPoints = 6, kOutputs = 4, kTaps = 3, kPositions = kPoints * kPoints;
constexpr float kA = 0.70710678f, kB = 1.41421356f;

struct InputTransform {
  static constexpr int kFrom = kPoints, kTo = kPoints;
  template <class V>
  static void apply(const V* x, V* y) {
    const V even_a = x[4] - 2.0f * x[2], odd_a = kA * (x[3] - 2.0f * x[1]);
    const V even_b = x[4] - 0.5f * x[2], odd_b = kB * (x[3] - 0.5f * x[1]);
    y[0] = (x[0] + x[4]) - 2.5f * x[2];
    y[1] = even_a + odd_a;
    y[2] = even_a - odd_a;
    y[3] = even_b + odd_b;
    y[4] = even_b - odd_b;
    y[5] = (x[1] + x[5]) - 2.5f * x[3];
  }
};

struct OutputTransform {
  static constexpr int kFrom = kPoints, kTo = kOutputs;
  template <class V>
  static void apply(const V* x, V* y) {
    const V even_a = x[1] + x[2], odd_a = kA * (x[1] - x[2]);
    const V even_b = x[3] + x[4], odd_b = kB * (x[3] - x[4]);
    y[0] = x[0] + (even_a + even_b);
    y[1] = odd_a + odd_b;
    y[2] = 0.5f * even_a + 2.0f * even_b;
    y[3] = (0.5f * odd_a + 2.0f * odd_b) + x[5];
  }
};

// The transpose of OutputTransform.
struct GradientTransform {
  static constexpr int kFrom = kOutputs, kTo = kPoints;
  template <class V>
  static void apply(const V* x, V* y) {
    const V even_a = x[0] + 0.5f * x[2], odd_a = kA * (x[1] + 0.5f * x[3]);
    const V even_b = x[0] + 2.0f * x[2], odd_b = kB * (x[1] + 2.0f * x[3]);
    y[0] = x[0];
    y[1] = even_a + odd_a;
    y[2] = even_a - odd_a;
    y[3] = even_b + odd_b;
    y[4] = even_b - odd_b;
    y[5] = x[3];
  }
};

constexpr float kScaleA = -2.0f / 3.0f, kScaleB = 1.0f / 6.0f;

struct WeightTransform {
  static constexpr int kFrom = kTaps, kTo = kPoints;
  template <class V>
  static void apply(const V* x, V* y) {
    const V even_a = kScaleA * (x[0] + 0.5f * x[2]), odd_a = kScaleA * kA * x[1];
    const V even_b = kScaleB * (x[0] + 2.0f * x[2]), odd_b = kScaleB * kB * x[1];
    y[0] = x[0];
    y[1] = even_a + odd_a;
    y[2] = even_a - odd_a;
    y[3] = even_b + odd_b;
    y[4] = even_b - odd_b;
    y[5] = x[2];
  }
};

// The transpose of WeightTransform.
struct WeightGradientTransform {
  static constexpr int kFrom = kPoints, kTo = kTaps;
  template <class V>
  static void apply(const V* x, V* y) {
    const V even_a = kScaleA * (x[1] + x[2]), odd_a = kScaleA * kA * (x[1] - x[2]);
    const V even_b = kScaleB * (x[3] + x[4]), odd_b = kScaleB * kB * (x[3] - x[4]);
    y[0] = x[0] + (even_a + even_b);
    y[1] = odd_a + odd_b;
    y[2] = (0.5f * even_a + 2.0f * even_b) + x[5];
  }
};

template <class Transform>
void tiles_to_positions(const WinogradTiles& a, int64_t margin) {
  const int64_t size = (a.tile_end - a.tile) * a.channels;
  for_each_tile(a, kPositions, [&](int64_t tile, int64_t t, const float* zeros) {
    const float* pixels[Transform::kFrom * Transform::kFrom];
    float* positions[kPositions];
    split_tile<Transform::kFrom, kOutputs>(a.from, a, tile, margin, zeros, pixels);
    split<kPositions>(a.to + t * a.channels, size, positions);
    transform<Transform>(pixels, a.channels, 4 * a.channels, positions);
  });
}

}  // namespace

void winograd_input(const WinogradTiles& a) { tiles_to_positions<InputTransform>(a, 1); }

void winograd_gradient(const WinogradTiles& a) { tiles_to_positions<GradientTransform>(a, 0); }

void winograd_output(const WinogradTiles& a) {
  const int64_t size = (a.tile_end - a.tile) * a.channels;
  for_each_tile(a, kPositions, [&](int64_t tile, int64_t t, float* unused) {
    const float* positions[kPositions];
    float* pixels[kOutputs * kOutputs];
    split<kPositions>(a.from + t * a.channels, size, positions);
    split_tile<kOutputs, kOutputs>(a.to, a, tile, 0, unused, pixels);
    transform<OutputTransform>(positions, a.channels, a.channels, pixels);
  });
}

void winograd_weights(const WinogradWeights& a) {
  for_each_filter(a, kPositions, [&](int64_t filter) {
    const float* taps[kTaps * kTaps];
    float* positions[kPositions];
    const float* first = a.from + filter * kTaps * kTaps * a.channels;
    const float* last = first + (kTaps * kTaps - 1) * a.channels;
    const int64_t step = a.rotated ? -a.channels : a.channels;
    split<kTaps * kTaps>(a.rotated ? last : first, step, taps);
    split<kPositions>(a.to + filter * a.channels, a.filters * a.channels, positions);
    transform<WeightTransform>(taps, a.channels, 0, positions);
  });
}

void winograd_weight_gradient(const WinogradWeights& a) {
  for_each_filter(a, kPositions, [&](int64_t filter) {
    const float* positions[kPositions];
    float* taps[kTaps * kTaps];
    split<kPositions>(a.from + filter * a.channels, a.filters * a.channels, positions);
    split<kTaps * kTaps>(a.to + filter * kTaps * kTaps * a.channels, a.channels, taps);
    transform<WeightGradientTransform>(positions, a.channels, 0, taps);
  });
}

}  // namespace FDDA_ISA
}  // namespace fdda
