// Batch norm with an affine of its own per sample, and LeakyReLU, on strips of images between the
// matrix products of a convolution: the normalised tensor is made in cache and never stored whole.
// Channels are next to one another.

#include <string.h>

#include "functions.h"
#include "parallel.h"
#include "vectors.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

constexpr int64_t kGrain = 16384;  // elements a thread should have

// One sample's row of the tables, and what the channels of its pixels from c on become.
struct Sample {
  const float *mean, *scale, *bias;
  float slope;
  template <class V>
  V centered(V x, int64_t c) const {
    return x - load_lanes<V>(mean + c);
  }
  template <class V>
  V norm(V centered, int64_t c) const {
    return centered * load_lanes<V>(scale + c) + load_lanes<V>(bias + c);
  }
  template <class V>
  V activation(V norm) const {
    return norm > 0.0f ? norm : norm * slope;
  }
  template <class V>
  V before_activation(V norm, V grad) const {
    return norm > 0.0f ? grad : grad * slope;
  }
};

// body(type of vector, c) for the channels of a pixel.
template <class Body>
inline void for_each_channel(int64_t channels, Body body) {
  for_each_lanes<1>(channels,
                    [&](auto lanes, int64_t c) { body(typename decltype(lanes)::V{}, c); });
}

// body(image, first pixel in the full tensor, first pixel in the strip, row of the strip)
template <class Body>
void for_each_row(const NormStrip& a, Body body) {
  const Strip& strip = a.strip;
  const int64_t rows = strip.rows(), width = strip.width;
  parallel_for(strip.images * rows, max64(1, kGrain / (a.channels * width)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t r = begin; r < end; ++r) {
                   const int64_t n = strip.image + r / rows, i = strip.row + r % rows;
                   body(n, (n * strip.height + i) * width, r * width, r);
                 }
               });
}

Sample sample_of(const NormStrip& a, int64_t n) {
  const int64_t at = n * a.channels;
  return {a.mean + at, a.scale + at, a.bias + at, a.negative_slope};
}

template <class T>
void run_forward(const NormStrip& a) {
  const int64_t channels = a.channels;
  for_each_row(a, [&](int64_t n, int64_t from, int64_t to, int64_t) {
    const Sample sample = sample_of(a, n);
    const T* x = static_cast<const T*>(a.x) + from * channels;
    T* y = static_cast<T*>(a.y) + to * channels;
    for (int64_t j = 0; j < a.strip.width; ++j, x += channels, y += channels) {
      for_each_channel(channels, [&](auto zero, int64_t c) {
        using V = decltype(zero);
        prefetch(x + c);
        const V v = sample.centered(load_lanes<V>(x + c), c);
        store_lanes(y + c, sample.activation(sample.norm(v, c)));
      });
    }
  });
}

// Sums in float32 along a row, in double over rows, in the order of the rows.
template <class T>
void run_sums(const NormStripSums& b) {
  const NormStrip& a = b.forward;
  const int64_t channels = a.channels, rows = a.strip.rows();
  const size_t bytes = a.strip.images * rows * 2 * channels * sizeof(float);
  float* sums = static_cast<float*>(scratch(kSums, bytes));
  memset(sums, 0, bytes);
  for_each_row(a, [&](int64_t n, int64_t from, int64_t to, int64_t r) {
    const Sample sample = sample_of(a, n);
    const T* x = static_cast<const T*>(a.x) + from * channels;
    const T* grad = static_cast<const T*>(b.grad_y) + to * channels;
    T* y = static_cast<T*>(a.y) + to * channels;
    float *sum_g = sums + r * 2 * channels, *sum_gx = sum_g + channels;
    for (int64_t j = 0; j < a.strip.width; ++j, x += channels, grad += channels, y += channels) {
      for_each_channel(channels, [&](auto zero, int64_t c) {
        using V = decltype(zero);
        prefetch(x + c);
        const V v = sample.centered(load_lanes<V>(x + c), c), norm = sample.norm(v, c);
        const V g = sample.before_activation(norm, load_lanes<V>(grad + c));
        store_lanes(y + c, sample.activation(norm));
        store_lanes(sum_g + c, load_lanes<V>(sum_g + c) + g);
        store_lanes(sum_gx + c, load_lanes<V>(sum_gx + c) + g * v);
      });
    }
  });
  for (int64_t r = 0; r < a.strip.images * rows; ++r) {
    const int64_t at = (a.strip.image + r / rows) * channels;
    const float* row = sums + r * 2 * channels;
    for (int64_t c = 0; c < channels; ++c) {
      b.sum_g[at + c] += row[c];
      b.sum_gx[at + c] += row[channels + c];
    }
  }
}

template <class T>
void run_gradient(const NormStripGradient& b) {
  const NormStrip& a = b.forward;
  const int64_t channels = a.channels;
  for_each_row(a, [&](int64_t n, int64_t from, int64_t to, int64_t) {
    const Sample sample = sample_of(a, n);
    const float *shift = b.shift + n * channels, *slope = b.slope + n * channels;
    const T* x = static_cast<const T*>(a.x) + from * channels;
    const T* grad = static_cast<const T*>(b.grad_y) + to * channels;
    T* grad_x = static_cast<T*>(a.y) + from * channels;
    for (int64_t j = 0; j < a.strip.width; ++j, x += channels, grad += channels) {
      for_each_channel(channels, [&](auto zero, int64_t c) {
        using V = decltype(zero);
        prefetch(x + c);
        const V v = sample.centered(load_lanes<V>(x + c), c);
        const V g = sample.before_activation(sample.norm(v, c), load_lanes<V>(grad + c));
        store_lanes(grad_x + c, g * load_lanes<V>(sample.scale + c) -
                                    (load_lanes<V>(shift + c) + v * load_lanes<V>(slope + c)));
      });
      grad_x += channels;
    }
  });
}

}  // namespace

void norm_strip(const NormStrip& a) {
  if (a.strip.dtype == Dtype::kBFloat16) return run_forward<BFloat16>(a);
  run_forward<float>(a);
}

void norm_strip_sums(const NormStripSums& b) {
  if (b.forward.strip.dtype == Dtype::kBFloat16) return run_sums<BFloat16>(b);
  run_sums<float>(b);
}

void norm_strip_gradient(const NormStripGradient& b) {
  if (b.forward.strip.dtype == Dtype::kBFloat16) return run_gradient<BFloat16>(b);
  run_gradient<float>(b);
}

}  // namespace FDDA_ISA
}  // namespace fdda
