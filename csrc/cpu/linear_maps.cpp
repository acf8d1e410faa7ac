// A linear layer whose outputs are the pixels of feature maps, NHWC, and its gradient. There are
// few images and many outputs: the weights are read, and their gradient is written, once. A tile of
// pixels is multiplied with vectors across the images, or the inputs, and turned in the cache.

#include <string.h>

#include "functions.h"
#include "parallel.h"
#include "stream.h"
#include "vectors.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

constexpr int64_t kPixels = 16;  // of a tile, neighbours in the weight
constexpr int kRows = 8;         // multiplied at a time

int64_t padded(int64_t size) { return ceil_div(size, kVectorLanes) * kVectorLanes; }

// to[c, r] = from[r, c], r up to `wide`: zeros behind the rows.
void transpose(const float* from, int64_t rows, int64_t columns, float* to, int64_t wide) {
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t r = 0; r < wide; ++r) to[c * wide + r] = r < rows ? from[r * columns + c] : 0.0f;
  }
}

// Asks for the rows that the next channel has: they are far from this one's.
void prefetch_rows(const float* rows, int64_t count) {
  for (int64_t i = 0; i < count; i += kLine / static_cast<int64_t>(sizeof(float))) {
    __builtin_prefetch(rows + i);
  }
}

// to[row * stride + image] = sum over k of weight[row, k] * z[k, image] + bias[row]; z has `wide`
// images, whole vectors of them.
template <int ROWS>
void multiply_rows(const float* weight, const float* bias, int64_t inputs, const float* z,
                   int64_t wide, float* to, int64_t stride) {
  for (int64_t n = 0; n < wide; n += kVectorLanes) {
    Vector sum[ROWS];
    for (int r = 0; r < ROWS; ++r) sum[r] = spread<Vector>(bias[r]);
    for (int64_t k = 0; k < inputs; ++k) {
      const Vector value = load_lanes<Vector>(z + k * wide + n);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) sum[r] += weight[r * inputs + k] * value;
    }
    for (int r = 0; r < ROWS; ++r) store_lanes(to + r * stride + n, sum[r]);
  }
}

template <class T>
void run(const LinearMaps& a) {
  const int64_t wide = padded(a.images), pixel_size = a.channels * wide;
  float* z = static_cast<float*>(scratch(kSharedRows, a.inputs * wide * sizeof(float)));
  transpose(a.z, a.images, a.inputs, z, wide);
  parallel_for(ceil_div(a.pixels, kPixels), 1, [&](int64_t begin, int64_t end) {
    float* products = static_cast<float*>(scratch(kLocalRows, kPixels * pixel_size * sizeof *z));
    for (int64_t first = begin * kPixels; first < min64(end * kPixels, a.pixels);
         first += kPixels) {
      const int64_t count = min64(kPixels, a.pixels - first);
      for (int64_t c = 0; c < a.channels; ++c) {
        const int64_t row = c * a.pixels + first;
        const auto multiply = [&](auto rows, int64_t p) {
          if (c + 1 < a.channels) {
            prefetch_rows(a.weight + (row + p + a.pixels) * a.inputs, rows.value * a.inputs);
          }
          multiply_rows<decltype(rows)::value>(a.weight + (row + p) * a.inputs, a.bias + row + p,
                                               a.inputs, z, wide,
                                               products + p * pixel_size + c * wide, pixel_size);
        };
        int64_t p = 0;
        for (; p + kRows <= count; p += kRows) multiply(std::integral_constant<int, kRows>(), p);
        for (; p < count; ++p) multiply(std::integral_constant<int, 1>(), p);
      }
      for (int64_t p = 0; p < count; ++p) {
        const float* from = products + p * pixel_size;
        for (int64_t n = 0; n < a.images; ++n) {
          T* __restrict y = static_cast<T*>(a.y) + (n * a.pixels + first + p) * a.channels;
#pragma GCC ivdep
          for (int64_t c = 0; c < a.channels; ++c) store(y[c], from[c * wide + n]);
        }
      }
    }
  });
}

// grads[c, p, n] of `count` pixels from `first` on, zeros behind them; `row` has a padded image's
// channels for every image, lest all images' share one set of the cache.
template <class T>
void turn_gradients(const LinearMapsGradient& a, int64_t first, int64_t count, float* row,
                    float* grads) {
  const int64_t stride = padded(a.channels) + kVectorLanes, plane = kPixels * a.images;
  if (count < kPixels) memset(grads, 0, a.channels * plane * sizeof(float));
  for (int64_t p = 0; p < count; ++p) {
    for (int64_t n = 0; n < a.images; ++n) {
      const T* from = static_cast<const T*>(a.grad_y) + (n * a.pixels + first + p) * a.channels;
      for (int64_t c = 0; c < a.channels; ++c) row[n * stride + c] = load(from[c]);
    }
    for (int64_t c = 0; c < a.channels; ++c) {
      float *to = grads + c * plane + p * a.images, sum = 0.0f;
      for (int64_t n = 0; n < a.images; ++n) to[n] = row[n * stride + c];
      for (int64_t n = 0; n < a.images; ++n) sum += to[n];
      a.grad_bias[c * a.pixels + first + p] = sum;
    }
  }
}

// to[p, k] = sum over n of grads[p, n] * z[n, k] of kPixels pixels; z has `wide` inputs, whole
// vectors of them. The last vector of a row runs over into the next row, which is written later.
void multiply_gradients(const float* grads, int64_t images, const float* z, int64_t wide,
                        int64_t inputs, float* to) {
  for (int64_t p = 0; p < kPixels; p += kRows) {
    for (int64_t k = wide - kVectorLanes; k >= 0; k -= kVectorLanes) {
      Vector sum[kRows] = {};
      for (int64_t n = 0; n < images; ++n) {
        const Vector value = load_lanes<Vector>(z + n * wide + k);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) sum[r] += grads[(p + r) * images + n] * value;
      }
      for (int r = 0; r < kRows; ++r) store_lanes(to + (p + r) * inputs + k, sum[r]);
    }
  }
}

template <class T, bool STREAM>
void run_gradient(const LinearMapsGradient& a) {
  const int64_t wide = padded(a.inputs), plane = kPixels * a.images;
  const int64_t row_size = a.images * (padded(a.channels) + kVectorLanes);
  const int64_t tile_size = kPixels * a.inputs + kVectorLanes;
  const int64_t size = row_size + tile_size + a.channels * plane;
  float* z = static_cast<float*>(scratch(kSharedRows, a.images * wide * sizeof(float)));
  memset(z, 0, a.images * wide * sizeof(float));
  for (int64_t n = 0; n < a.images; ++n) {
    memcpy(z + n * wide, a.z + n * a.inputs, a.inputs * sizeof(float));
  }
  parallel_for(ceil_div(a.pixels, kPixels), 1, [&](int64_t begin, int64_t end) {
    float* row = static_cast<float*>(scratch(kLocalRows, size * sizeof(float)));
    float *tile = row + row_size, *grads = tile + tile_size;
    for (int64_t first = begin * kPixels; first < min64(end * kPixels, a.pixels);
         first += kPixels) {
      const int64_t count = min64(kPixels, a.pixels - first);
      turn_gradients<T>(a, first, count, row, grads);
      for (int64_t c = 0; c < a.channels; ++c) {
        multiply_gradients(grads + c * plane, a.images, z, wide, a.inputs, tile);
        write_row<STREAM>(a.grad_weight + (c * a.pixels + first) * a.inputs, count * a.inputs,
                          [=](int64_t i) { return tile[i]; });
      }
    }
    if (STREAM) stream_fence();
  });
}

template <class T>
void run_gradient(const LinearMapsGradient& a) {
  const int64_t bytes = a.channels * a.pixels * a.inputs * static_cast<int64_t>(sizeof(float));
  bytes >= kStreamBytes ? run_gradient<T, true>(a) : run_gradient<T, false>(a);
}

}  // namespace

void linear_maps(const LinearMaps& a) {
  switch (a.dtype) {
    case Dtype::kFloat32: return run<float>(a);
    case Dtype::kBFloat16: return run<BFloat16>(a);
    case Dtype::kFloat16: return run<Float16>(a);
  }
}

void linear_maps_gradient(const LinearMapsGradient& a) {
  switch (a.dtype) {
    case Dtype::kFloat32: return run_gradient<float>(a);
    case Dtype::kBFloat16: return run_gradient<BFloat16>(a);
    case Dtype::kFloat16: return run_gradient<Float16>(a);
  }
}

}  // namespace FDDA_ISA
}  // namespace fdda
