// Eval-mode batch norm, residual addition, clipping and fake quantisation in one pass; the backward
// pass recomputes them and reduces all parameter gradients while it reads.

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

constexpr int64_t kTileRows = 64;  // pixels that a vector's channels go through at a time
constexpr int64_t kAhead = 64;     // pixels asked for ahead: the processor itself stops at pages

// What batch norm has of the channels of V.
template <class V>
struct Channels {
  V scale, shift, mean;
};

struct Norm {
  const float *scale, *shift, *mean;  // mean: of the backward pass
  float low, high;

  template <class V>
  Channels<V> at(int64_t c) const {
    return {load_lanes<V>(scale + c), load_lanes<V>(shift + c), load_lanes<V>(mean + c)};
  }
  template <class V>
  Channels<V> all(int64_t c) const {
    return {spread<V>(scale[c]), spread<V>(shift[c]), spread<V>(mean[c])};
  }
};

template <bool RESIDUAL, class T>
struct Forward {
  const T *x, *residual;
  T* y;
  bool stream;
  Norm norm;
  Levels levels;

  template <class V>
  void quantize(const Channels<V>& c, int64_t i) const {
    V v = load_lanes<V>(x + i) * c.scale + c.shift;
    if (RESIDUAL) v = v + load_lanes<V>(residual + i);
    write_lanes(stream, y + i, levels(clamp_lanes(v, norm.low, norm.high)));
  }
  void row(int64_t offset, int64_t n, int64_t channel) const {
    for_each_lanes<2, T>(n, [&](auto lanes, int64_t i) {
      using V = typename decltype(lanes)::V;
#pragma GCC unroll 8
      for (int k = 0; k < lanes.kVectors; ++k) {
        quantize(norm.template all<V>(channel), offset + i + k * lanes_of<V>());
      }
    });
  }
  void pixels(int64_t offset, int64_t rows, int64_t n) const {
    for (int64_t start = 0; start < rows; start += kTileRows) {
      for_each_lanes<2, T>(n, [&](auto lanes, int64_t c) {
        using V = typename decltype(lanes)::V;
        Channels<V> g[lanes.kVectors];
        for (int k = 0; k < lanes.kVectors; ++k) {
          g[k] = norm.template at<V>(c + k * lanes_of<V>());
        }
        int64_t at = offset + start * n + c;
        for (int64_t i = start; i < min64(start + kTileRows, rows); ++i, at += n) {
#pragma GCC unroll 8
          for (int k = 0; k < lanes.kVectors; ++k) {
            const int64_t j = at + k * lanes_of<V>();
            __builtin_prefetch(x + j + kAhead * n);
            quantize(g[k], j);
          }
        }
      });
    }
  }
};

template <class T>
bool streams_view(const ChannelView& v, const void* out) {
  const int64_t size = sizeof(T), row = v.inner == 1 ? v.channels : v.inner;
  return streams_rows(out, v.outer * v.channels * v.inner * size, row * size);
}

template <bool RESIDUAL, class T>
void run_forward(const BnReluFakeQuantize& a) {
  const Norm norm{a.norm.scale, a.norm.shift, a.norm.shift, a.norm.low, a.norm.high};
  for_each_row(a.view, Forward<RESIDUAL, T>{static_cast<const T*>(a.x),
                                            static_cast<const T*>(a.residual),
                                            static_cast<T*>(a.y),
                                            streams_view<T>(a.view, a.y),
                                            norm,
                                            {make_range(a.x_min, a.x_max, a.bits), a.bits}});
}

// An element's gradients with respect to x and residual, and its addends to those of weight, bias
// and (RANGE) the range's ends. What passes lies between pass_low and pass_high.
template <bool RESIDUAL, bool RANGE, class T>
struct Gradient {
  static constexpr int kSumCount = RANGE ? 5 : 2;
  const T *x, *residual, *grad;
  T *grad_x, *grad_residual;
  bool stream;
  Norm norm;
  float pass_low, pass_high;
  RangeGradient range;

  template <class V>
  void add(const Channels<V>& c, int64_t i, V* sum) const {
    const V u = load_lanes<V>(x + i), g = load_lanes<V>(grad + i);
    V v = u * c.scale + c.shift;
    if (RESIDUAL) v = v + load_lanes<V>(residual + i);
    const V kept = clamp_lanes(v, norm.low, norm.high);
    const V through = where_between(v, pass_low, pass_high, g);
    write_lanes(stream, grad_x + i, through * c.scale);
    if (RESIDUAL) write_lanes(stream, grad_residual + i, through);
    sum[0] = through * (u - c.mean);
    sum[1] = through;
    if (RANGE) range(kept, g, sum + 2);
  }
  // As channel_sums has it: sums stay in registers from pixel to pixel.
  void pixels(int64_t channel, int64_t offset, int64_t rows, int64_t stride, int64_t width,
              float (*sum)[kStrip]) const {
    for_each_lanes<2, T>(width, [&](auto lanes, int64_t c) {
      using V = typename decltype(lanes)::V;
      for (int j = 0; j < lanes.kVectors; ++j, c += lanes_of<V>()) {
        const Channels<V> g = norm.template at<V>(channel + c);
        V total[kSumCount] = {};
        int64_t at = offset + c;
        for (int64_t i = 0; i < rows; ++i, at += stride) {
          V s[kSumCount];
          add(g, at, s);
          __builtin_prefetch(x + at + kAhead * stride);
          __builtin_prefetch(grad + at + kAhead * stride);
#pragma GCC unroll 8
          for (int k = 0; k < kSumCount; ++k) total[k] = total[k] + s[k];
        }
        for (int k = 0; k < kSumCount; ++k) store_lanes(sum[k] + c, total[k]);
      }
    });
  }
};

template <bool RESIDUAL, bool RANGE, class T>
void run_backward(const BnReluFakeQuantizeBackward& b) {
  using Element = Gradient<RESIDUAL, RANGE, T>;
  constexpr int kSumCount = Element::kSumCount;
  const BnReluFakeQuantize& a = b.forward;
  // The range's ends themselves pass, those of the ReLU do not.
  const RangeGradient range{make_range(a.x_min, a.x_max, a.bits), a.x_min, a.x_max};
  const bool stream =
      streams_view<T>(a.view, a.y) && (!RESIDUAL || streams_view<T>(a.view, b.grad_residual));
  const Element element{static_cast<const T*>(a.x),
                        static_cast<const T*>(a.residual),
                        static_cast<const T*>(b.grad),
                        static_cast<T*>(a.y),
                        static_cast<T*>(b.grad_residual),
                        stream && a.view.inner == 1,
                        {a.norm.scale, a.norm.shift, b.mean, a.norm.low, a.norm.high},
                        b.clipped ? fmaxf(a.norm.low, nextafterf(a.x_min, -INFINITY)) : a.norm.low,
                        b.clipped ? fminf(a.norm.high, nextafterf(a.x_max, INFINITY)) : a.norm.high,
                        range};
  const int64_t channels = b.channels, stride = a.view.channels;
  double* sums = static_cast<double*>(scratch(kSharedRows, kSumCount * channels * sizeof(double)));
  channel_sums<kSumCount>(
      a.view, channels, sums,
      [&](int64_t c) {
        return [e = element, g = element.norm.template all<float>(c)](int64_t i, float* s) {
          e.add(g, i, s);
        };
      },
      [&](int64_t channel, int64_t offset, int64_t rows, int64_t width, float (*sum)[kStrip]) {
        element.pixels(channel, offset, rows, stride, width, sum);
      });
  double ends[3] = {};
  for (int64_t c = 0; c < channels; ++c) {
    b.grad_weight[c] = static_cast<float>(sums[c] * b.inv_std[c]);
    b.grad_bias[c] = static_cast<float>(sums[channels + c]);
    for (int k = 0; RANGE && k < 3; ++k) ends[k] += sums[(2 + k) * channels + c];
  }
  if (RANGE) range_gradient(range, ends[0], ends[1], ends[2], b.grad_x_min, b.grad_x_max);
}

template <class T>
void run_forward(const BnReluFakeQuantize& a) {
  (a.residual ? run_forward<true, T> : run_forward<false, T>)(a);
}

template <class T>
void run_backward(const BnReluFakeQuantizeBackward& b) {
  if (b.forward.residual) {
    (b.range ? run_backward<true, true, T> : run_backward<true, false, T>)(b);
  } else {
    (b.range ? run_backward<false, true, T> : run_backward<false, false, T>)(b);
  }
}

}  // namespace

void bn_relu_fake_quantize(const BnReluFakeQuantize& a) {
  switch (a.dtype) {
    case Dtype::kFloat32: return run_forward<float>(a);
    case Dtype::kBFloat16: return run_forward<BFloat16>(a);
    case Dtype::kFloat16: return run_forward<Float16>(a);
  }
}

void bn_relu_fake_quantize_backward(const BnReluFakeQuantizeBackward& a) {
  switch (a.forward.dtype) {
    case Dtype::kFloat32: return run_backward<float>(a);
    case Dtype::kBFloat16: return run_backward<BFloat16>(a);
    case Dtype::kFloat16: return run_backward<Float16>(a);
  }
}

}  // namespace FDDA_ISA
}  // namespace fdda
