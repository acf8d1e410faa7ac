// Max pooling of codes; that of real numbers, which remembers in a byte the tap of its window that
// each maximum is, and its gradient: every input gathers from the windows that it lies in, so that
// it is written once.

#include <math.h>
#include <string.h>

#include "functions.h"
#include "parallel.h"
#include "stream.h"
#include "vectors.h"
#include "window.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

constexpr int64_t kBlock = 64;     // codes at a time
constexpr int64_t kGrain = 65536;  // taps a thread should have
constexpr int kMostTaps = 255;
typedef uint8_t Codes __attribute__((vector_size(kBlock)));
typedef uint8_t Bytes __attribute__((vector_size(kVectorLanes)));
constexpr uint32_t kNoTap = 255;  // of a window that lies outside of the image

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

// The taps of as many numbers as V has.
template <class V>
struct Taps {
  Bits tap;
  void load(const uint8_t* from) {
    Bytes bytes;
    memcpy(&bytes, from, sizeof bytes);
    tap = __builtin_convertvector(bytes, Bits);
  }
  void store(uint8_t* to) const {
    const Bytes bytes = __builtin_convertvector(tap, Bytes);
    memcpy(to, &bytes, sizeof bytes);
  }
};

template <>
struct Taps<float> {
  uint32_t tap;
  void load(const uint8_t* from) { tap = *from; }
  void store(uint8_t* to) const { *to = static_cast<uint8_t>(tap); }
};

template <>
struct Taps<Pair> {
  Taps<Vector> even, odd;
  void load(const uint8_t* from) {
    Halves both;
    memcpy(&both, from, sizeof both);
    even.tap = __builtin_convertvector(both & 0xff, Bits);
    odd.tap = __builtin_convertvector(both >> 8, Bits);
  }
  void store(uint8_t* to) const {
    const Halves both = __builtin_convertvector(even.tap | odd.tap << 8, Halves);
    memcpy(to, &both, sizeof both);
  }
};

template <class V>
Taps<V> all_taps(uint32_t tap) {
  if constexpr (is_pair<V>) {
    return {all_taps<Vector>(tap), all_taps<Vector>(tap)};
  } else {
    return {tap + decltype(Taps<V>::tap){}};
  }
}

// Keeps x and its tap where x is the larger: the first of equals, NaN over everything.
template <class V>
void keep_larger(V x, uint32_t tap, V& best, Taps<V>& best_tap) {
  if constexpr (is_pair<V>) {
    keep_larger(x.even, tap, best.even, best_tap.even);
    keep_larger(x.odd, tap, best.odd, best_tap.odd);
  } else {
    const auto taps = all_taps<V>(tap).tap;
    best_tap.tap = best < x ? taps : best_tap.tap;
    best_tap.tap = x != x ? taps : best_tap.tap;
    best = best < x ? x : best;
    best = x != x ? x : best;
  }
}

// `then` where the taps are `tap`, else 0.
template <class V>
V where_tap(Taps<V> taps, uint32_t tap, V then) {
  if constexpr (is_pair<V>) {
    return {where_tap(taps.even, tap, then.even), where_tap(taps.odd, tap, then.odd)};
  } else {
    return taps.tap == all_taps<V>(tap).tap ? then : V{};
  }
}

template <class T>
void pool(const MaxPool2d& a) {
  const PoolShape& s = a.shape;
  for_each_row(s, s.out_height, s.out_width, [&](int64_t n, int64_t oh) {
    const T* image = static_cast<const T*>(a.x) + n * s.height * s.width * s.channels;
    for (int64_t ow = 0; ow < s.out_width; ++ow) {
      const int64_t out = ((n * s.out_height + oh) * s.out_width + ow) * s.channels;
      // What every block of channels reads.
      int64_t pixels[kMostTaps];
      pixels[0] = 0;
      uint32_t taps[kMostTaps];
      int count = 0;
      for_each_tap(s, oh, ow, [&](int32_t tap, int64_t pixel) {
        pixels[count] = pixel;
        taps[count++] = static_cast<uint32_t>(tap);
      });
      for_each_lanes<4, T>(s.channels, [&](auto lanes, int64_t c) {
        using V = typename decltype(lanes)::V;
        V best[lanes.kVectors];
        Taps<V> tap[lanes.kVectors];
        for (int i = 0; i < lanes.kVectors; ++i) {
          const T* x = image + pixels[0] + c + i * lanes_of<V>();
          best[i] = count ? load_lanes<V>(x) : spread<V>(-INFINITY);
          tap[i] = all_taps<V>(count ? taps[0] : kNoTap);
        }
        for (int k = 1; k < count; ++k) {
          const T* x = image + pixels[k] + c;
#pragma GCC unroll 4
          for (int i = 0; i < lanes.kVectors; ++i) {
            keep_larger(load_lanes<V>(x + i * lanes_of<V>()), taps[k], best[i], tap[i]);
          }
        }
        for (int i = 0; i < lanes.kVectors; ++i, c += lanes_of<V>()) {
          store_lanes(static_cast<T*>(a.y) + out + c, best[i]);
          tap[i].store(a.tap + out + c);
        }
      });
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
  const int64_t row_bytes = s.channels * static_cast<int64_t>(sizeof(T));
  const bool stream = streams_rows(a.grad_x, s.batch * s.height * s.width * row_bytes, row_bytes);
  // Of every column, how many outputs' windows hold it, and of each of these (tap, output): the
  // same for all rows, and found by divisions.
  const int64_t entry = 1 + 2 * s.kernel_w;
  int64_t* columns = static_cast<int64_t*>(scratch(kSharedRows, s.width * entry * sizeof(int64_t)));
  for (int64_t iw = 0; iw < s.width; ++iw) {
    int64_t* end = columns + iw * entry + 1;
    for_each_window(iw, s.kernel_w, s.stride_w, s.pad_w, s.dilation_w, s.out_width,
                    [&](int64_t kw, int64_t ow) {
                      *end++ = kw;
                      *end++ = ow;
                    });
    columns[iw * entry] = (end - columns - iw * entry) / 2;
  }
  for_each_row(s, s.height, s.width, [&](int64_t n, int64_t ih) {
    int64_t rows[2 * kMostTaps], *rows_end = rows;
    for_each_window(ih, s.kernel_h, s.stride_h, s.pad_h, s.dilation_h, s.out_height,
                    [&](int64_t kh, int64_t oh) {
                      *rows_end++ = kh * s.kernel_w;
                      *rows_end++ = (n * s.out_height + oh) * s.out_width;
                    });
    for (int64_t iw = 0; iw < s.width; ++iw) {
      // What every block of channels gathers.
      int64_t offsets[kMostTaps];
      uint32_t taps[kMostTaps];
      int count = 0;
      const int64_t *column = columns + iw * entry + 1, *column_end = column + 2 * column[-1];
      for (const int64_t* row = rows; row < rows_end; row += 2) {
        for (const int64_t* c = column; c < column_end; c += 2) {
          offsets[count] = (row[1] + c[1]) * s.channels;
          taps[count++] = static_cast<uint32_t>(row[0] + c[0]);
        }
      }
      T* grad_x = static_cast<T*>(a.grad_x) + ((n * s.height + ih) * s.width + iw) * s.channels;
      for_each_lanes<4, T>(s.channels, [&](auto lanes, int64_t c) {
        using V = typename decltype(lanes)::V;
        V sum[lanes.kVectors] = {};
        for (int k = 0; k < count; ++k) {
          int64_t at = offsets[k] + c;
#pragma GCC unroll 4
          for (int i = 0; i < lanes.kVectors; ++i, at += lanes_of<V>()) {
            Taps<V> tap;
            tap.load(a.tap + at);
            const V grad = load_lanes<V>(static_cast<const T*>(a.grad_y) + at);
            sum[i] = sum[i] + where_tap(tap, taps[k], grad);
          }
        }
        for (int i = 0; i < lanes.kVectors; ++i, c += lanes_of<V>()) {
          write_lanes(stream, grad_x + c, sum[i]);
        }
      });
    }
    if (stream) stream_fence();
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
