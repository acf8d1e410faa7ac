// The quantiser of the FDDA paper, its float32 operations in their order.
#pragma once

#include <math.h>

#include "functions.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

struct Range {
  float scale, zero_point, lo, hi;
  float position(float x) const { return scale * x - zero_point; }
  float code(float position) const { return round_half_even(clamp(position, lo, hi)); }
  float operator()(float x) const { return (code(position(x)) + zero_point) / scale; }
};

float range_width(float x_min, float x_max) {
  const float width = x_max - x_min;
  return width < 1e-8f ? 1e-8f : width;
}

Range make_range(float x_min, float x_max, int bits) {
  const float half = static_cast<float>(int64_t{1} << (bits - 1));
  const float scale = (2.0f * half - 1.0f) / range_width(x_min, x_max);
  return {scale, nearbyintf(scale * x_min) + half, -half, half - 1.0f};
}

// What an element adds to the gradient of its range (after LSQ, Esser et al., ICLR 2020): where it
// is clipped, its gradient to that end; else its rounding error times the gradient to the step.
struct RangeGradient {
  Range range;
  float x_min, x_max;
  // sum: rounding errors in codes, below, above.
  void operator()(float x, float grad, float* sum) const {
    const bool below = x<x_min, above = x> x_max;
    const float position = range.position(x);
    const float error = grad * (range.code(position) - position);
    sum[0] = below || above ? 0.0f : error;
    sum[1] = below ? grad : 0.0f;
    sum[2] = above ? grad : 0.0f;
  }
};

// The ends' gradients from the sums of RangeGradient.
void range_gradient(const RangeGradient& g, double error, double below, double above,
                    float* grad_x_min, float* grad_x_max) {
  const double levels = static_cast<double>(g.range.scale) * range_width(g.x_min, g.x_max);
  *grad_x_min = static_cast<float>(below - error / levels);
  *grad_x_max = static_cast<float>(above + error / levels);
}

}  // namespace
}  // namespace FDDA_ISA
}  // namespace fdda
