// Max pooling of codes; that of real numbers, which remembers in a byte the tap of its window that
// each maximum is, and its gradient: every input gathers from the windows that it lies in, so that
// it is written once.

#include <math.h>
#include <string.h>

#include "functions.h"
#include "half.h"
#include "parallel.h"
#include "window.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

constexpr int64_t kBlock = 64;     // channels at a time, in the L1 cache
constexpr int64_t kGrain = 65536;  // taps a thread should have
constexpr int kMostTaps = 255;
typedef uint8_t Codes __attribute__((vector_size(kBlock)));
constexpr uint8_t kNoTap = 255;  // of a window that lies outside of the image

// body(image, row) for all of `rows` of every image.
template <class Body>
void for_each_row(const PoolShape& s, int64_t rows, int64_t width, Body body) {
  const int64_t work = max64(1, width * s.channels * s.kernel_h * s.kernel_w);
  parallel_for(s.batch * rows, max64(1, kGrain / work), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) body(r / rows, r % rows);
  });
}

// For all taps of the window of output (oh, ow): body(tap, offset of its pixel in the image).
template <class Body>
void for_each_tap(const PoolShape& s, int64_t oh, int64_t ow, Body body) {
  const int64_t top = oh * s.stride_h - s.pad_h, left = ow * s.stride_w - s.pad_w;
  int64_t row, rows, column, columns;
  valid_taps(top, s.height, s.kernel_h, s.dilation_h, &row, &rows);
  valid_taps(left, s.width, s.kernel_w, s.dilation_w, &column, &columns);
  const int64_t step = s.dilation_w * s.channels;
  for (int64_t kh = row; kh < rows; ++kh) {
    int64_t pixel =
        ((top + kh * s.dilation_h) * s.width + left + column * s.dilation_w) * s.channels;
    for (int64_t kw = column; kw < columns; ++kw, pixel += step) {
      body(static_cast<int32_t>(kh * s.kernel_w + kw), pixel);
    }
  }
}

template <class T>
void pool(const MaxPool2d& a) {
  const PoolShape& s = a.shape;
  for_each_row(s, s.out_height, s.out_width, [&](int64_t n, int64_t oh) {
    const T* image = static_cast<const T*>(a.x) + n * s.height * s.width * s.channels;
    for (int64_t ow = 0; ow < s.out_width; ++ow) {
      const int64_t out = ((n * s.out_height + oh) * s.out_width + ow) * s.channels;
      for (int64_t c = 0; c < s.channels; c += kBlock) {
        const int64_t count = min64(kBlock, s.channels - c);
        float best[kBlock];
        int32_t best_tap[kBlock];
        for (int64_t j = 0; j < kBlock; ++j) {
          best[j] = -INFINITY;
          best_tap[j] = kNoTap;
        }
        for_each_tap(s, oh, ow, [&](int32_t tap, int64_t pixel) {
          const T* x = image + pixel + c;
          for (int64_t j = 0; j < count; ++j) {
            const float v = load(x[j]);
            // The first of equals wins, -infinity among them; NaN over everything.
            const bool wins = v > best[j] || v != v || best_tap[j] == kNoTap;
            best[j] = wins ? v : best[j];
            best_tap[j] = wins ? tap : best_tap[j];
          }
        });
        T* y = static_cast<T*>(a.y) + out + c;
        for (int64_t j = 0; j < count; ++j) store(y[j], best[j]);
        for (int64_t j = 0; j < count; ++j) a.tap[out + c + j] = static_cast<uint8_t>(best_tap[j]);
      }
    }
  });
}

// Of one dimension, the outputs whose windows hold input i: body(k, output) if it is their tap k.
template <class Body>
void for_each_window(int64_t i, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation,
                     int64_t outputs, Body body) {
  for (int64_t k = 0; k < kernel; ++k) {
    const int64_t first = i + pad - k * dilation;
    if (first < 0) return;
    const int64_t out = first / stride;
    if (out * stride == first && out < outputs) body(k, out);
  }
}

template <class T>
void gradient(const MaxPool2dGradient& a) {
  const PoolShape& s = a.shape;
  for_each_row(s, s.height, s.width, [&](int64_t n, int64_t ih) {
    const int64_t first = n * s.out_height * s.out_width * s.channels;
    for (int64_t iw = 0; iw < s.width; ++iw) {
      // What every block of channels gathers.
      int64_t offsets[kMostTaps];
      int32_t taps[kMostTaps];
      int count = 0;
      for_each_window(ih, s.kernel_h, s.stride_h, s.pad_h, s.dilation_h, s.out_height,
                      [&](int64_t kh, int64_t oh) {
                        for_each_window(
                            iw, s.kernel_w, s.stride_w, s.pad_w, s.dilation_w, s.out_width,
                            [&](int64_t kw, int64_t ow) {
                              offsets[count] = first + (oh * s.out_width + ow) * s.channels;
                              taps[count++] = static_cast<int32_t>(kh * s.kernel_w + kw);
                            });
                      });
      T* grad_x = static_cast<T*>(a.grad_x) + ((n * s.height + ih) * s.width + iw) * s.channels;
      for (int64_t c = 0; c < s.channels; c += kBlock) {
        const int64_t size = min64(kBlock, s.channels - c);
        float sum[kBlock] = {};
        for (int k = 0; k < count; ++k) {
          const T* grad_y = static_cast<const T*>(a.grad_y) + offsets[k] + c;
          const uint8_t* tap = a.tap + offsets[k] + c;
          for (int64_t j = 0; j < size; ++j) {
            sum[j] += tap[j] == taps[k] ? load(grad_y[j]) : 0.0f;
          }
        }
        for (int64_t j = 0; j < size; ++j) store(grad_x[c + j], sum[j]);
      }
    }
  });
}

}  // namespace

void max_pool(const MaxPool& a) {
  const PoolShape s = a.shape;
  for_each_row(s, s.out_height, s.out_width, [&](int64_t n, int64_t oh) {
    const uint8_t* image = a.x + n * s.height * s.width * s.channels;
    for (int64_t ow = 0; ow < s.out_width; ++ow) {
      uint8_t* out = a.out + ((n * s.out_height + oh) * s.out_width + ow) * s.channels;
      int64_t c = 0;
      for (; c + kBlock <= s.channels; c += kBlock) {
        Codes best{};  // codes are unsigned: 0 never beats a valid tap
        for_each_tap(s, oh, ow, [&](int32_t, int64_t pixel) {
          Codes x;
          memcpy(&x, image + pixel + c, sizeof x);
          best = x > best ? x : best;
        });
        memcpy(out + c, &best, sizeof best);
      }
      const int64_t rest = s.channels - c;
      memset(out + c, 0, rest);
      for_each_tap(s, oh, ow, [&](int32_t, int64_t pixel) {
        const uint8_t* x = image + pixel + c;
        for (int64_t j = 0; j < rest; ++j) out[c + j] = x[j] > out[c + j] ? x[j] : out[c + j];
      });
    }
  });
}

void max_pool2d(const MaxPool2d& a) {
  switch (a.dtype) {
    case Dtype::kFloat32: return pool<float>(a);
    case Dtype::kBFloat16: return pool<BFloat16>(a);
    case Dtype::kFloat16: return pool<Float16>(a);
  }
}

void max_pool2d_gradient(const MaxPool2dGradient& a) {
  switch (a.dtype) {
    case Dtype::kFloat32: return gradient<float>(a);
    case Dtype::kBFloat16: return gradient<BFloat16>(a);
    case Dtype::kFloat16: return gradient<Float16>(a);
  }
}

}  // namespace FDDA_ISA
}  // namespace fdda
