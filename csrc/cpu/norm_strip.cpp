// Batch norm with an affine of its own per sample, and LeakyReLU, on strips of images between the
// matrix products of a convolution: the normalised tensor is made in cache and never stored whole.
// Channels are next to one another.

#include <string.h>

#include "functions.h"
#include "half.h"
#include "parallel.h"
#include "stream.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

constexpr int64_t kGrain = 16384;  // elements a thread should have

// One sample's row of the tables, and what the channels of its pixels become.
struct Sample {
  const float *mean, *scale, *bias;
  float slope;
  float norm(float x, int64_t c) const { return (x - mean[c]) * scale[c] + bias[c]; }
  float activation(float x, int64_t c) const {
    const float v = norm(x, c);
    return v > 0.0f ? v : v * slope;
  }
  float before_activation(float x, float grad, int64_t c) const {
    return norm(x, c) > 0.0f ? grad : grad * slope;
  }
};

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
                 stream_fence();
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
    const T* __restrict x = static_cast<const T*>(a.x) + from * channels;
    T* __restrict y = static_cast<T*>(a.y) + to * channels;
    for (int64_t j = 0; j < a.strip.width; ++j, x += channels, y += channels) {
#pragma GCC ivdep
      for (int64_t c = 0; c < channels; ++c) store(y[c], sample.activation(load(x[c]), c));
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
    const T* __restrict x = static_cast<const T*>(a.x) + from * channels;
    const T* __restrict grad = static_cast<const T*>(b.grad_y) + to * channels;
    T* __restrict y = static_cast<T*>(a.y) + to * channels;
    float* __restrict sum_g = sums + r * 2 * channels;
    float* __restrict sum_gx = sum_g + channels;
    for (int64_t j = 0; j < a.strip.width; ++j) {
#pragma GCC ivdep
      for (int64_t c = 0; c < channels; ++c) {
        const float v = load(x[c]);
        const float g = sample.before_activation(v, load(grad[c]), c);
        store(y[c], sample.activation(v, c));
        sum_g[c] += g;
        sum_gx[c] += g * (v - sample.mean[c]);
      }
      x += channels;
      grad += channels;
      y += channels;
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
    const float* __restrict shift = b.shift + n * channels;
    const float* __restrict slope = b.slope + n * channels;
    const T* __restrict x = static_cast<const T*>(a.x) + from * channels;
    const T* __restrict grad = static_cast<const T*>(b.grad_y) + to * channels;
    write_pixels<true>(static_cast<T*>(a.y) + from * channels, a.strip.width, channels,
                       [=](int64_t i, int64_t c) {
                         const float v = load(x[i]);
                         return sample.before_activation(v, load(grad[i]), c) * sample.scale[c] -
                                (shift[c] + (v - sample.mean[c]) * slope[c]);
                       });
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
