// Batch norm with an affine of its own per sample, and LeakyReLU, on strips of images between the
// matrix products of a convolution: the normalised tensor is made in cache and never stored whole.
// Channels are next to one another.

#include <string.h>

#include "functions.h"
#include "parallel.h"
#include "sample_norm.h"
#include "vectors.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

constexpr int64_t kGrain = 16384;  // elements a thread should have

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

template <class T>
void run_forward(const NormStrip& a) {
  const int64_t channels = a.channels;
  for_each_row(a, [&](int64_t n, int64_t from, int64_t to, int64_t) {
    const Sample sample = sample_of(a.tables, a.channels, n);
    const T* x = static_cast<const T*>(a.x) + from * channels;
    T* y = static_cast<T*>(a.y) + to * channels;
    for (int64_t j = 0; j < a.strip.width; ++j, x += channels, y += channels) {
      for_each_channel(channels, [&](auto zero, int64_t c) {
        using V = decltype(zero);
        prefetch(x + c);
        const auto channel = sample.template from<V>(c);
        const V v = channel.centered(load_lanes<V>(x + c));
        store_lanes(y + c, channel.activation(channel.norm(v)));
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
    const Sample sample = sample_of(a.tables, a.channels, n);
    const T* x = static_cast<const T*>(a.x) + from * channels;
    const T* grad = static_cast<const T*>(b.grad_y) + to * channels;
    T* y = static_cast<T*>(a.y) + to * channels;
    float *sum_g = sums + r * 2 * channels, *sum_gx = sum_g + channels;
    for (int64_t j = 0; j < a.strip.width; ++j, x += channels, grad += channels, y += channels) {
      for_each_channel(channels, [&](auto zero, int64_t c) {
        using V = decltype(zero);
        prefetch(x + c);
        const auto channel = sample.template from<V>(c);
        const V v = channel.centered(load_lanes<V>(x + c)), norm = channel.norm(v);
        const V g = channel.before_activation(norm, load_lanes<V>(grad + c));
        store_lanes(y + c, channel.activation(norm));
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
    const Sample sample = sample_of(a.tables, a.channels, n);
    const float *shift = b.shift + n * channels, *slope = b.slope + n * channels;
    const T* x = static_cast<const T*>(a.x) + from * channels;
    const T* grad = static_cast<const T*>(b.grad_y) + to * channels;
    T* grad_x = static_cast<T*>(a.y) + from * channels;
    for (int64_t j = 0; j < a.strip.width; ++j, x += channels, grad += channels) {
      for_each_channel(channels, [&](auto zero, int64_t c) {
        using V = decltype(zero);
        prefetch(x + c);
        const auto channel = sample.template from<V>(c);
        const V v = channel.centered(load_lanes<V>(x + c));
        const V g = channel.before_activation(channel.norm(v), load_lanes<V>(grad + c));
        store_lanes(grad_x + c,
                    g * channel.scale - (load_lanes<V>(shift + c) + v * load_lanes<V>(slope + c)));
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
