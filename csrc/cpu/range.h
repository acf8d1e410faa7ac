// The quantiser of the FDDA paper, its float32 operations in their order. V: see vectors.h.
#pragma once

#include <math.h>

#include "functions.h"
#include "vectors.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

struct Range {
  float scale, zero_point, lo, hi;
  template <class V>
  V position(V x) const {
    return scale * x - zero_point;
  }
  template <class V>
  V code(V position) const {
    return round_lanes(clamp_lanes(position, lo, hi));
  }
  template <class V>
  V operator()(V x) const {
    return (code(position(x)) + zero_point) / scale;
  }
};

// A range's values by code, in place of the division, for vectors and up to 4 bits.
struct Levels {
  Range range;
  bool few;
  float values[16];  // of code c at c mod 16

  Levels(Range range, int bits) : range(range), few(bits <= 4) {
    for (int c = -8; c < 8; ++c) values[c & 15] = (c + range.zero_point) / range.scale;
  }
  template <class V>
  V operator()(V x) const {
#if defined(__AVX512F__)
    if constexpr (is_pair<V>) {
      return {(*this)(x.even), (*this)(x.odd)};
    } else if constexpr (sizeof(V) == sizeof(__m512)) {
      if (few) {
        const __m512 at = bits_as<__m512>(clamp_lanes(range.position(x), range.lo, range.hi));
        const __mmask16 number = _mm512_cmp_ps_mask(at, at, _CMP_ORD_Q);
        return bits_as<V>(_mm512_mask_permutexvar_ps(at, number, _mm512_cvtps_epi32(at),
                                                     _mm512_loadu_ps(values)));
      }
    }
#endif
    return range(x);
  }
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
  template <class V>
  void operator()(V x, V grad, V* sum) const {
    const V low = spread<V>(x_min), high = spread<V>(x_max), position = range.position(x);
    const V error = grad * (range.code(position) - position);
    sum[0] = where_less(x, low, V{}, where_less(high, x, V{}, error));
    sum[1] = where_less(x, low, grad, V{});
    sum[2] = where_less(high, x, grad, V{});
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
