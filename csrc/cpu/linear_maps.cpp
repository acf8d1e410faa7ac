// A linear layer whose outputs are the pixels of feature maps, NHWC, and its gradient. There are
// few images and many outputs: the weights are read, and their gradient is written, once. A tile of
// pixels and channels is multiplied with vectors across the images, or the inputs, and turned in
// the cache.

#include <string.h>

#include "functions.h"
#include "parallel.h"
#include "row_tiles.h"
#include "stream.h"
#include "vectors.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

// Of a tile. Pixels are neighbours in the weight: so many that the processor sees where it is read.
// Channels are neighbours in the maps: a line of the cache.
constexpr int64_t kPixels = 64, kChannels = 32;
constexpr int kRows = 8;    // multiplied at a time
constexpr int kAhead = 16;  // rows from one that is multiplied to one that is asked for

int64_t padded(int64_t size) { return ceil_div(size, kVectorLanes) * kVectorLanes; }

// to[c, r] = from[r, c], r up to `wide`: zeros behind the rows.
void transpose(const float* from, int64_t rows, int64_t columns, float* to, int64_t wide) {
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t r = 0; r < wide; ++r) to[c * wide + r] = r < rows ? from[r * columns + c] : 0.0f;
  }
}

// to[row * stride + image] = sum over k of weight[row, k] * z[k, image] + bias[row]; z has `wide`
// images, whole vectors of them. Asks for as many rows from `next` on.
template <int ROWS>
void multiply_rows(const float* weight, const float* next, const float* bias, int64_t inputs,
                   const float* z, int64_t wide, float* to, int64_t stride) {
  for (int64_t n = 0; n < wide; n += kVectorLanes) {
    Vector sum[ROWS];
    for (int r = 0; r < ROWS; ++r) sum[r] = spread<Vector>(bias[r]);
    for (int64_t k = 0; k < inputs; ++k) {
      const Vector value = load_lanes<Vector>(z + k * wide + n);
      if (k % 2 == 0) __builtin_prefetch(next + k * ROWS);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) sum[r] = multiply_add(weight[r * inputs + k], value, sum[r]);
    }
    for (int r = 0; r < ROWS; ++r) store_lanes(to + r * stride + n, sum[r]);
  }
}

template <class T>
void run(const LinearMaps& a) {
  const int64_t wide = padded(a.images), pixel_size = kChannels * wide;
  const int64_t blocks = ceil_div(a.channels, kChannels);
  float* z = static_cast<float*>(scratch(kSharedRows, a.inputs * wide * sizeof(float)));
  transpose(a.z, a.images, a.inputs, z, wide);
  parallel_for(ceil_div(a.pixels, kPixels) * blocks, 1, [&](int64_t begin, int64_t end) {
    float* products = static_cast<float*>(scratch(kLocalRows, kPixels * pixel_size * sizeof *z));
    for (int64_t t = begin; t < end; ++t) {
      const int64_t first = t / blocks * kPixels, count = min64(kPixels, a.pixels - first);
      const int64_t channel = t % blocks * kChannels;
      const int64_t channels = min64(kChannels, a.channels - channel);
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t row = (channel + c) * a.pixels + first;
        for_each_row_tile<kRows>(count, [&](auto rows, int64_t p) {
          const int64_t ahead = p + kAhead;
          const int64_t next = row + (ahead < count ? ahead : ahead - count + a.pixels);
          multiply_rows<decltype(rows)::kCount>(
              a.weight + (row + p) * a.inputs, a.weight + next * a.inputs, a.bias + row + p,
              a.inputs, z, wide, products + p * pixel_size + c * wide, pixel_size);
        });
      }
      for (int64_t p = 0; p < count; ++p) {
        const float* from = products + p * pixel_size;
        for (int64_t n = 0; n < a.images; ++n) {
          T* __restrict y =
              static_cast<T*>(a.y) + (n * a.pixels + first + p) * a.channels + channel;
#pragma GCC ivdep
          for (int64_t c = 0; c < channels; ++c) store(y[c], from[c * wide + n]);
        }
      }
    }
  });
}

// grads[c, p, n] of `count` pixels from `first` on and `channels` from `channel` on. `row` holds
// the images' channels apart from each other, lest all share one set of the cache.
template <class T>
void turn_gradients(const LinearMapsGradient& a, int64_t first, int64_t count, int64_t channel,
                    int64_t channels, float* row, float* grads) {
  constexpr int64_t kStride = kChannels + kVectorLanes;
  for (int64_t p = 0; p < count; ++p) {
    float sum[kChannels] = {};
    for (int64_t n = 0; n < a.images; ++n) {
      const T* from =
          static_cast<const T*>(a.grad_y) + (n * a.pixels + first + p) * a.channels + channel;
      float* values = row + n * kStride;
      for (int64_t c = 0; c < channels; ++c) values[c] = load(from[c]);
      for (int64_t c = 0; c < channels; ++c) sum[c] += values[c];
    }
    for (int64_t c = 0; c < channels; ++c) {
      float* to = grads + (c * kPixels + p) * a.images;
      for (int64_t n = 0; n < a.images; ++n) to[n] = row[n * kStride + c];
      a.grad_bias[(channel + c) * a.pixels + first + p] = sum[c];
    }
  }
}

// to[p, k] = sum over n of grads[p, n] * z[n, k] of ROWS pixels; z has `wide` inputs, whole vectors
// of them. The last vector of a row runs over into the next row, which is written later.
template <int ROWS>
void multiply_gradients(const float* grads, int64_t images, const float* z, int64_t wide,
                        int64_t inputs, float* to) {
  for (int64_t k = wide - kVectorLanes; k >= 0; k -= kVectorLanes) {
    Vector sum[ROWS] = {};
    for (int64_t n = 0; n < images; ++n) {
      const Vector value = load_lanes<Vector>(z + n * wide + k);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) sum[r] = multiply_add(grads[r * images + n], value, sum[r]);
    }
    for (int r = 0; r < ROWS; ++r) store_lanes(to + r * inputs + k, sum[r]);
  }
}

template <class T, bool STREAM>
void run_gradient(const LinearMapsGradient& a) {
  const int64_t wide = padded(a.inputs), blocks = ceil_div(a.channels, kChannels);
  const int64_t row_size = a.images * (kChannels + kVectorLanes);
  const int64_t tile_size = kRows * a.inputs + kVectorLanes;
  const int64_t size = row_size + tile_size + kChannels * kPixels * a.images;
  float* z = static_cast<float*>(scratch(kSharedRows, a.images * wide * sizeof(float)));
  memset(z, 0, a.images * wide * sizeof(float));
  for (int64_t n = 0; n < a.images; ++n) {
    memcpy(z + n * wide, a.z + n * a.inputs, a.inputs * sizeof(float));
  }
  parallel_for(ceil_div(a.pixels, kPixels) * blocks, 1, [&](int64_t begin, int64_t end) {
    float* row = static_cast<float*>(scratch(kLocalRows, size * sizeof(float)));
    float *tile = row + row_size, *grads = tile + tile_size;
    for (int64_t t = begin; t < end; ++t) {
      const int64_t first = t / blocks * kPixels, count = min64(kPixels, a.pixels - first);
      const int64_t channel = t % blocks * kChannels;
      const int64_t channels = min64(kChannels, a.channels - channel);
      turn_gradients<T>(a, first, count, channel, channels, row, grads);
      for (int64_t c = 0; c < channels; ++c) {
        for_each_row_tile<kRows>(count, [&](auto rows, int64_t p) {
          constexpr int kCount = decltype(rows)::kCount;
          multiply_gradients<kCount>(grads + (c * kPixels + p) * a.images, a.images, z, wide,
                                     a.inputs, tile);
          write_row<STREAM>(a.grad_weight + ((channel + c) * a.pixels + first + p) * a.inputs,
                            kCount * a.inputs, [=](int64_t i) { return tile[i]; });
        });
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
