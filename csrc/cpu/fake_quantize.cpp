// Fake quantisation: one read and one write of the tensor; ranges of a channel are taken while its
// row is in cache.

#include <math.h>

#include "channels.h"
#include "functions.h"
#include "half.h"
#include "parallel.h"
#include "range.h"
#include "stream.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

// y = (q - zero_point) * scale with q = clamp(round(x / scale + zero_point)): torch's convention.
struct Affine {
  float scale, zero_point, lo, hi;
  float operator()(float x) const {
    const float q = round_half_even(clamp(x / scale + zero_point, lo, hi));
    return (q - zero_point) * scale;
  }
};

// 1 where round(x / scale + zero_point) lies inside [lo, hi].
struct Inside {
  float scale, zero_point, lo, hi;
  // The code before it is clamped, or one beyond the end.
  float code(float position) const {
    return round_half_even(clamp(position, lo - 1.0f, hi + 1.0f));
  }
  bool operator()(float x) const {
    const float q = code(x / scale + zero_point);
    return q == clamp(q, lo, hi);
  }
};

// 1 where x lies in the range.
struct Within {
  float x_min, x_max;
  bool operator()(float x) const { return !(x < x_min || x > x_max); }
};

// `make(channel)` returns the element function of a channel.
template <bool STREAM, class T, class Make>
struct Forward {
  const T* x;
  T* y;
  Make make;
  void row(int64_t offset, int64_t n, int64_t channel) const {
    const auto f = make(channel);
    const T* in = x + offset;
    write_row<STREAM>(y + offset, n, [=](int64_t i) { return f(load(in[i])); });
  }
  void pixels(int64_t offset, int64_t rows, int64_t n) const {
    const Make f = make;
    const T* in = x + offset;
    write_pixels<STREAM>(y + offset, rows, n,
                         [=](int64_t i, int64_t c) { return f(c)(load(in[i])); });
  }
};

template <class T, class Make>
void quantize_rows(const ChannelView& v, const void* x_in, void* y_out, Make make) {
  const T* x = static_cast<const T*>(x_in);
  T* y = static_cast<T*>(y_out);
  if (streams<T>(v)) {
    for_each_row(v, Forward<true, T, Make>{x, y, make});
  } else {
    for_each_row(v, Forward<false, T, Make>{x, y, make});
  }
}

template <class T, class Make>
struct Masked {
  const T* x;
  const T* grad;
  T* y;
  Make make;
  void row(int64_t offset, int64_t n, int64_t channel) const {
    const auto inside = make(channel);
    const T* __restrict in = x + offset;
    const T* __restrict g = grad + offset;
    T* __restrict out = y + offset;
    for (int64_t i = 0; i < n; ++i) store(out[i], inside(load(in[i])) ? load(g[i]) : 0.0f);
  }
  void pixels(int64_t offset, int64_t rows, int64_t n) const {
    const Make f = make;
    const T *in = x + offset, *g = grad + offset;
    write_pixels<false>(y + offset, rows, n, [=](int64_t i, int64_t c) {
      return f(c)(load(in[i])) ? load(g[i]) : 0.0f;
    });
  }
};

// Running minimum and maximum. A NaN or an infinity makes both NaN, and with them every output:
// what the formula gives too, since the scale becomes NaN or 0.
struct MinMax {
  float lo = INFINITY, hi = -INFINITY, poison = 0.0f;
  void merge(const MinMax& o) {
    lo = o.lo < lo ? o.lo : lo;
    hi = o.hi > hi ? o.hi : hi;
    poison += o.poison;
  }
  float min() const { return lo + poison; }
  float max() const { return hi + poison; }
};

template <class T>
MinMax min_max(const T* __restrict x, int64_t n) {
  constexpr int kLanes = 64;
  float lo[kLanes], hi[kLanes], poison[kLanes];
  for (int j = 0; j < kLanes; ++j) {
    lo[j] = INFINITY;
    hi[j] = -INFINITY;
    poison[j] = 0.0f;
  }
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) {
      const float v = load(x[i + j]);
      lo[j] = v < lo[j] ? v : lo[j];
      hi[j] = v > hi[j] ? v : hi[j];
      poison[j] += v - v;
    }
  }
  MinMax m;
  for (int j = 0; j < kLanes; ++j) m.merge({lo[j], hi[j], poison[j]});
  for (; i < n; ++i) {
    const float v = load(x[i]);
    m.merge({v, v, v - v});
  }
  return m;
}

template <class T>
void channel_ranges(const T* x, const ChannelView& v, MinMax* out) {
  if (v.outer * v.channels == 1) {
    const int64_t pieces = ceil_div(v.inner, kGrain);
    MinMax* partial = static_cast<MinMax*>(scratch(kSharedRows, pieces * sizeof(MinMax)));
    parallel_for(pieces, 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        partial[p] = min_max(x + p * kGrain, min64(kGrain, v.inner - p * kGrain));
      }
    });
    out[0] = MinMax();
    for (int64_t p = 0; p < pieces; ++p) out[0].merge(partial[p]);
    return;
  }
  parallel_for(v.channels, max64(1, kGrain / max64(1, v.outer * v.inner)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t c = begin; c < end; ++c) out[c] = MinMax();
                 for (int64_t o = 0; o < v.outer; ++o) {
                   const T* row = x + (o * v.channels + begin) * v.inner;
                   for (int64_t c = begin; c < end; ++c, row += v.inner) {
                     out[c].merge(min_max(row, v.inner));
                   }
                 }
               });
}

// Scales [channels], then zero points, so that rows through the channels read them as vectors.
template <class Ends>
void channel_scales(int64_t channels, int bits, float* scale, Ends ends) {
  for (int64_t c = 0; c < channels; ++c) {
    const Within w = ends(c);
    const Range range = make_range(w.x_min, w.x_max, bits);
    scale[c] = range.scale;
    scale[channels + c] = range.zero_point;
  }
}

auto make_ranges(const float* scale, int64_t channels, int bits) {
  const float half = static_cast<float>(int64_t{1} << (bits - 1));
  return [=](int64_t c) { return Range{scale[c], scale[channels + c], -half, half - 1.0f}; };
}

template <class T>
void run_range(const FakeQuantizeRange& a) {
  const T* x = static_cast<const T*>(a.x);
  T* y = static_cast<T*>(a.y);
  const ChannelView& v = a.view;
  if (v.outer * v.channels * v.inner == 0) return;
  if (!a.x_min && v.outer == 1 && v.channels > 1) {
    parallel_for(v.channels, max64(1, kGrain / v.inner), [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        const MinMax m = min_max(x + c * v.inner, v.inner);
        const Range range = make_range(m.min(), m.max(), a.bits);
        const auto same = [&](int64_t) { return range; };
        Forward<false, T, decltype(same)>{x, y, same}.row(c * v.inner, v.inner, c);
      }
    });
    return;
  }
  float* scale = static_cast<float*>(scratch(kSums, 2 * v.channels * sizeof(float)));
  if (a.x_min) {
    channel_scales(v.channels, a.bits, scale,
                   [&](int64_t c) { return Within{a.x_min[c], a.x_max[c]}; });
  } else {
    MinMax* m = static_cast<MinMax*>(scratch(kSharedWeights, v.channels * sizeof(MinMax)));
    channel_ranges(x, v, m);
    channel_scales(v.channels, a.bits, scale,
                   [&](int64_t c) { return Within{m[c].min(), m[c].max()}; });
  }
  const auto make = make_ranges(scale, v.channels, a.bits);
  quantize_rows<T>(v, a.x, a.y, make);
}

template <class T>
void run_forward(const FakeQuantize& a) {
  const float *scale = a.scale, *zero_point = a.zero_point, lo = a.quant_min, hi = a.quant_max;
  const auto make = [=](int64_t c) { return Affine{scale[c], zero_point[c], lo, hi}; };
  quantize_rows<T>(a.view, a.x, a.y, make);
}

// An element's gradient with respect to x, written where WRITE, and its addends to those of scale
// and zero point. The rounded code's share of the scale is its distance from the position.
template <bool WRITE, class T>
struct AffineGradient {
  const T *x, *grad;
  T* grad_x;
  Inside inside;
  void operator()(int64_t i, float* sum) const {
    const float g = load(grad[i]);
    const float position = load(x[i]) / inside.scale + inside.zero_point;
    const float q = inside.code(position);
    const float code = clamp(q, inside.lo, inside.hi);
    const bool kept = q == code;
    if (WRITE) store(grad_x[i], kept ? g : 0.0f);
    sum[0] = g * (code - (kept ? position : inside.zero_point));
    sum[1] = kept ? 0.0f : g;
  }
};

template <bool WRITE, class T>
void run_affine_gradient(const FakeQuantizeBackward& b) {
  const FakeQuantize& a = b.forward;
  const T *x = static_cast<const T*>(a.x), *grad = static_cast<const T*>(b.grad);
  T* grad_x = static_cast<T*>(a.y);
  const float *scale = a.scale, *zero_point = a.zero_point, lo = a.quant_min, hi = a.quant_max;
  const int64_t channels = b.channels;
  double* sums = static_cast<double*>(scratch(kSharedRows, 2 * channels * sizeof(double)));
  channel_sums<2>(a.view, channels, sums, [=](int64_t c) {
    return AffineGradient<WRITE, T>{x, grad, grad_x, {scale[c], zero_point[c], lo, hi}};
  });
  for (int64_t c = 0; c < channels; ++c) {
    b.grad_scale[c] = static_cast<float>(sums[c]);
    b.grad_zero_point[c] = static_cast<float>(-scale[c] * sums[channels + c]);
  }
}

template <class T>
void run_backward(const FakeQuantizeBackward& b) {
  const FakeQuantize& a = b.forward;
  if (b.grad_scale) {
    return (a.y ? run_affine_gradient<true, T> : run_affine_gradient<false, T>)(b);
  }
  const float *scale = a.scale, *zero_point = a.zero_point, lo = a.quant_min, hi = a.quant_max;
  const auto make = [=](int64_t c) { return Inside{scale[c], zero_point[c], lo, hi}; };
  for_each_row(a.view,
               Masked<T, decltype(make)>{static_cast<const T*>(a.x), static_cast<const T*>(b.grad),
                                         static_cast<T*>(a.y), make});
}

template <bool WRITE, class T>
struct RangeElement {
  const T *x, *grad;
  T* grad_x;
  RangeGradient gradient;
  void operator()(int64_t i, float* sum) const {
    const float v = load(x[i]), g = load(grad[i]);
    if (WRITE) store(grad_x[i], Within{gradient.x_min, gradient.x_max}(v) ? g : 0.0f);
    gradient(v, g, sum);
  }
};

template <bool WRITE, class T>
void run_ends_gradient(const FakeQuantizeRangeBackward& b) {
  const FakeQuantizeRange& a = b.forward;
  const T *x = static_cast<const T*>(a.x), *grad = static_cast<const T*>(b.grad);
  T* grad_x = static_cast<T*>(a.y);
  const float *x_min = a.x_min, *x_max = a.x_max;
  const int64_t channels = b.channels;
  float* scale = static_cast<float*>(scratch(kSharedWeights, 2 * channels * sizeof(float)));
  channel_scales(channels, a.bits, scale, [&](int64_t c) { return Within{x_min[c], x_max[c]}; });
  const auto range = make_ranges(scale, channels, a.bits);
  double* sums = static_cast<double*>(scratch(kSharedRows, 3 * channels * sizeof(double)));
  channel_sums<3>(a.view, channels, sums, [=](int64_t c) {
    return RangeElement<WRITE, T>{x, grad, grad_x, {range(c), x_min[c], x_max[c]}};
  });
  for (int64_t c = 0; c < channels; ++c) {
    range_gradient({range(c), x_min[c], x_max[c]}, sums[c], sums[channels + c],
                   sums[2 * channels + c], b.grad_x_min + c, b.grad_x_max + c);
  }
}

template <class T>
void run_range_backward(const FakeQuantizeRangeBackward& b) {
  const FakeQuantizeRange& a = b.forward;
  if (b.grad_x_min) return (a.y ? run_ends_gradient<true, T> : run_ends_gradient<false, T>)(b);
  const float *x_min = a.x_min, *x_max = a.x_max;
  const auto make = [=](int64_t c) { return Within{x_min[c], x_max[c]}; };
  for_each_row(a.view,
               Masked<T, decltype(make)>{static_cast<const T*>(a.x), static_cast<const T*>(b.grad),
                                         static_cast<T*>(a.y), make});
}

// The moving average of the minimum and maximum.
template <class T>
void run_observe(const ObserveRange& a) {
  MinMax m;
  channel_ranges(static_cast<const T*>(a.x), {1, 1, a.count}, &m);
  float low = m.min(), high = m.max();
  if (a.include_zero) {
    low = low > 0.0f ? 0.0f : low;
    high = high < 0.0f ? 0.0f : high;
  }
  const float keep = static_cast<float>(a.keep), rest = static_cast<float>(1.0 - a.keep);
  *a.new_min = *a.x_min * keep + low * rest;
  *a.new_max = *a.x_max * keep + high * rest;
}

}  // namespace

void fake_quantize(const FakeQuantize& a) {
  switch (a.dtype) {
    case Dtype::kFloat32: return run_forward<float>(a);
    case Dtype::kBFloat16: return run_forward<BFloat16>(a);
    case Dtype::kFloat16: return run_forward<Float16>(a);
  }
}

void fake_quantize_backward(const FakeQuantizeBackward& a) {
  switch (a.forward.dtype) {
    case Dtype::kFloat32: return run_backward<float>(a);
    case Dtype::kBFloat16: return run_backward<BFloat16>(a);
    case Dtype::kFloat16: return run_backward<Float16>(a);
  }
}

void fake_quantize_range(const FakeQuantizeRange& a) {
  switch (a.dtype) {
    case Dtype::kFloat32: return run_range<float>(a);
    case Dtype::kBFloat16: return run_range<BFloat16>(a);
    case Dtype::kFloat16: return run_range<Float16>(a);
  }
}

void fake_quantize_range_backward(const FakeQuantizeRangeBackward& a) {
  switch (a.forward.dtype) {
    case Dtype::kFloat32: return run_range_backward<float>(a);
    case Dtype::kBFloat16: return run_range_backward<BFloat16>(a);
    case Dtype::kFloat16: return run_range_backward<Float16>(a);
  }
}

void observe_range(const ObserveRange& a) {
  switch (a.dtype) {
    case Dtype::kFloat32: return run_observe<float>(a);
    case Dtype::kBFloat16: return run_observe<BFloat16>(a);
    case Dtype::kFloat16: return run_observe<Float16>(a);
  }
}

}  // namespace FDDA_ISA
}  // namespace fdda
