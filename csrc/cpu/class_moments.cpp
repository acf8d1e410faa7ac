// Mean and variance of every (class, channel), alone or beside the batch norm that reads x, too.
//
// 1. Per (sample, channel), tile by tile: sums of d = x - center and of d * d. The center of the
//    first tile is the mean of its first numbers, that of a later one the mean so far. Memory is
//    read once, and little cancels: a share p of the numbers that lies e beside the mean of all has
//    p * e * e in the variance, so that the squares are at most 1 / p times as large. Lanes add in
//    float32, 16 numbers and then up to 4 such sums; tiles merge in double (Chan, Golub, LeVeque
//    1979).
// 2. Per class: its samples merge in double in the order of the batch.
// The order of additions depends on the shape alone, never on the number of threads.

#include <string.h>

#include "functions.h"
#include "half.h"
#include "parallel.h"
#include "stream.h"
#include "vectors.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

constexpr int64_t kTile = 4096;     // elements of a contiguous row: 16 KiB in float32
constexpr int64_t kRun = 16;        // numbers that are added before their sum is: less rounding
constexpr int64_t kSample = 512;    // of a row's first tile, for its center
constexpr int64_t kStrip = 64;      // channels of a channels_last tile
constexpr int64_t kStripRows = 64;  // pixels of a channels_last tile: 16 KiB with kStrip
constexpr int kLanes = 64;
// Pixels asked for ahead, since the processor itself stops at pages: 4 KiB, and 16 KiB of half
// precision, which is done with sooner.
template <class T>
constexpr int64_t kAhead = (sizeof(T) == 4 ? 4096 : 16384) / (kStrip * sizeof(T));

struct Moments {
  double count, mean, m2;
};

static inline void merge(Moments& a, double count, double mean, double m2) {
  const double total = a.count + count;
  const double delta = mean - a.mean;
  a.mean += delta * (count / total);
  a.m2 += m2 + delta * delta * (a.count * count / total);
  a.count = total;
}

double sum_lanes(const float* lanes) {
  double part[8] = {};  // a vector's worth, so that the additions do not wait for each other
  for (int j = 0; j < kLanes; j += 8) {
    for (int k = 0; k < 8; ++k) part[k] += lanes[j + k];
  }
  return ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7]));
}

// What batch norm, an addition and clipping make of one channel.
struct ChannelNorm {
  float scale, shift, low, high;
  float operator()(float x, float r) const { return clamp(x * scale + shift + r, low, high); }
};

ChannelNorm channel_norm(const BnRelu& norm, int64_t c) {
  return {norm.scale[c], norm.shift[c], norm.low, norm.high};
}

// What goes with x, at the same offset: y is made of x and, where it is not null, r. stream: y is
// written past the caches.
template <class T>
struct Companions {
  T* y;
  const T* r;
  bool stream;
  Companions at(int64_t offset) const { return {y + offset, r ? r + offset : nullptr, stream}; }
};

// Adds n numbers less `center` to drift and squares, number i to lane i mod kLanes.
// NORM: also y = norm(x). ADD: y = norm(x, r).
template <bool NORM, bool ADD, class T>
void add_row(const T* __restrict x, int64_t n, float center, float* __restrict drift,
             float* __restrict squares, Companions<T> c, ChannelNorm norm) {
  T* __restrict y = c.y;
  const T* __restrict r = c.r;
  const auto one = [&](int64_t i, int64_t lane, T* out) {
    const float v = load(x[i]);
    const float d = v - center;
    drift[lane] += d;
    squares[lane] += d * d;
    if (NORM) store(*out, norm(v, ADD ? load(r[i]) : 0.0f));
  };
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    if (NORM && c.stream) {
      alignas(64) T lines[kLanes];
      for (int j = 0; j < kLanes; ++j) one(i + j, j, lines + j);
      stream_lines(y + i, lines, sizeof lines);
    } else {
      for (int j = 0; j < kLanes; ++j) one(i + j, j, y + i + j);
    }
  }
  for (int64_t i = whole; i < n; ++i) one(i, i - whole, y + i);
}

template <bool NORM, bool ADD, class T>
Moments row_moments(const T* x, int64_t size, Companions<T> with, ChannelNorm norm) {
  Moments total{0.0, 0.0, 0.0};
  float center = 0.0f;
  for (int64_t start = 0; start < size; start += kTile) {
    const int64_t length = min64(kTile, size - start);
    const double n = static_cast<double>(length);
    if (start == 0) {
      float drift[kLanes] = {}, squares[kLanes] = {};
      const int64_t sample = min64(kSample, length);
      add_row<false, false, T>(x, sample, 0.0f, drift, squares, {}, norm);
      center = static_cast<float>(sum_lanes(drift) / static_cast<double>(sample));
    } else {
      center = static_cast<float>(total.mean);
    }
    float drift[kLanes] = {}, squares[kLanes] = {};
    for (int64_t i = 0; i < length; i += kRun * kLanes) {
      float d[kLanes] = {}, s[kLanes] = {};
      const int64_t at = start + i, count = min64(kRun * kLanes, length - i);
      add_row<NORM, ADD, T>(x + at, count, center, d, s, NORM ? with.at(at) : with, norm);
      for (int j = 0; j < kLanes; ++j) {
        drift[j] += d[j];
        squares[j] += s[j];
      }
    }
    const double shift = sum_lanes(drift) / n;
    const double m2 = sum_lanes(squares) - n * shift * shift;
    merge(total, n, static_cast<double>(center) + shift, m2 > 0.0 || m2 != m2 ? m2 : 0.0);
  }
  return total;
}

// sum + d * d, in pairs rounded once where the instruction set can: half precision is read so fast
// that additions are what takes longest.
template <class V>
V add_square(V sum, V d) {
  if constexpr (is_pair<V>) {
    return {multiply_add(d.even, d.even, sum.even), multiply_add(d.odd, d.odd, sum.odd)};
  } else {
    return sum + d * d;
  }
}

// The sums of the differences of `rows` pixels from `center`, and of their squares, for the
// channels that LANES are. NORM: also y = norm(x). ADD: y = norm(x, r).
template <class LANES, bool NORM, bool ADD, class T>
void sum_pixels(const T* x, int64_t rows, int64_t stride, const float* center, float* drift,
                float* squares, Companions<T> with, const BnRelu* norm, int64_t channel) {
  using V = typename LANES::V;
  constexpr int kVectors = LANES::kVectors, kEach = lanes_of<V>();
  V middle[kVectors], d_total[kVectors] = {}, s_total[kVectors] = {};
  V scale[kVectors], shift[kVectors];
#pragma GCC unroll 8
  for (int k = 0; k < kVectors; ++k) {
    middle[k] = load_lanes<V>(center + k * kEach);
    if (NORM) scale[k] = load_lanes<V>(norm->scale + channel + k * kEach);
    if (NORM) shift[k] = load_lanes<V>(norm->shift + channel + k * kEach);
  }
  for (int64_t start = 0; start < rows; start += kRun) {
    V d_sum[kVectors] = {}, s_sum[kVectors] = {};
    const int64_t end = min64(start + kRun, rows);
    for (int64_t i = start; i < end; ++i) {
#pragma GCC unroll 8
      for (int k = 0; k < kVectors; ++k) {
        const int64_t at = i * stride + k * kEach;
        const V v = load_lanes<V>(x + at);
        if (k * kEach * sizeof(T) % kLine == 0) __builtin_prefetch(x + at + kAhead<T> * stride);
        const V d = v - middle[k];
        d_sum[k] = d_sum[k] + d;
        s_sum[k] = add_square(s_sum[k], d);
        if (NORM) {
          const V y = v * scale[k] + shift[k];
          const V sum = ADD ? y + load_lanes<V>(with.r + at) : y;
          write_lanes(with.stream, with.y + at, clamp_lanes(sum, norm->low, norm->high));
        }
      }
    }
#pragma GCC unroll 8
    for (int k = 0; k < kVectors; ++k) {
      d_total[k] = d_total[k] + d_sum[k];
      s_total[k] = s_total[k] + s_sum[k];
    }
  }
#pragma GCC unroll 8
  for (int k = 0; k < kVectors; ++k) {
    store_lanes(drift + k * kEach, d_total[k]);
    store_lanes(squares + k * kEach, s_total[k]);
  }
}

// The same for `width` channels.
template <bool NORM, bool ADD, class T>
void sum_tile(const T* x, int64_t rows, int64_t stride, int64_t width, const float* center,
              float* drift, float* squares, Companions<T> with, const BnRelu* norm,
              int64_t channel) {
  for_each_lanes<4, T>(width, [&](auto lanes, int64_t c) {
    sum_pixels<decltype(lanes), NORM, ADD>(x + c, rows, stride, center + c, drift + c, squares + c,
                                           NORM ? with.at(c) : with, norm, channel + c);
  });
}

// `width` <= kStrip adjacent channels of pixels `stride` elements apart.
template <bool NORM, bool ADD, class T>
void strip_moments(const T* x, int64_t pixels, int64_t stride, int64_t width, double* mean,
                   double* m2, Companions<T> with, const BnRelu* norm, int64_t channel) {
  for (int64_t c = 0; c < width; ++c) mean[c] = m2[c] = 0.0;
  for (int64_t start = 0; start < pixels; start += kStripRows) {
    const int64_t size = min64(kStripRows, pixels - start), at = start * stride;
    const double n = static_cast<double>(size);
    float center[kStrip] = {}, drift[kStrip], squares[kStrip];
    if (start == 0) {
      float sum[kStrip], unused[kStrip];
      sum_tile<false, false>(x, size, stride, width, center, sum, unused, with, norm, channel);
      for (int64_t c = 0; c < width; ++c) {
        center[c] = static_cast<float>(static_cast<double>(sum[c]) / n);
      }
    } else {
      for (int64_t c = 0; c < width; ++c) center[c] = static_cast<float>(mean[c]);
    }
    sum_tile<NORM, ADD>(x + at, size, stride, width, center, drift, squares,
                        NORM ? with.at(at) : with, norm, channel);
    // As merge() has it, the counts alike for all channels.
    const double before = static_cast<double>(start), after = before + n, part = 1.0 / n;
    for (int64_t c = 0; c < width; ++c) {
      const double shift = static_cast<double>(drift[c]) * part;
      const double tile_m2 = static_cast<double>(squares[c]) - n * shift * shift;
      const double delta = static_cast<double>(center[c]) + shift - mean[c];
      mean[c] += delta * (n / after);
      m2[c] += (tile_m2 < 0.0 ? 0.0 : tile_m2) + delta * delta * (before * n / after);
    }
  }
}

template <bool NORM, bool ADD, class T>
void sample_moments(const ClassMoments& a, double* mean, double* m2) {
  const T* x = static_cast<const T*>(a.x);
  const int64_t sample = a.channels * a.inner, size = sizeof(T);
  const Companions<T> with{static_cast<T*>(a.y), static_cast<const T*>(a.residual),
                           NORM && streams_rows(a.y, a.batch * sample * size,
                                                (a.channels_last ? a.channels : a.inner) * size)};
  if (a.channels_last) {
    const int64_t strips = ceil_div(a.channels, kStrip);
    parallel_for(a.batch * strips, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t n = t / strips;
        const int64_t c = t % strips * kStrip;
        const int64_t width = min64(kStrip, a.channels - c);
        const int64_t out = n * a.channels + c;
        const int64_t at = n * sample + c;
        strip_moments<NORM, ADD>(x + at, a.inner, a.channels, width, mean + out, m2 + out,
                                 NORM ? with.at(at) : with, a.bn_relu, c);
      }
      stream_fence();
    });
  } else {
    parallel_for(a.batch * a.channels, max64(1, kTile / max64(1, a.inner)),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t r = begin; r < end; ++r) {
                     const ChannelNorm norm =
                         NORM ? channel_norm(*a.bn_relu, r % a.channels) : ChannelNorm{};
                     const int64_t at = r * a.inner;
                     const Moments m =
                         row_moments<NORM, ADD>(x + at, a.inner, NORM ? with.at(at) : with, norm);
                     mean[r] = m.mean;
                     m2[r] = m.m2;
                   }
                   stream_fence();
                 });
  }
}

template <class T>
void run_forward(const ClassMoments& a) {
  const int64_t size = a.batch * a.channels;
  double* mean = static_cast<double*>(scratch(kSums, 2 * size * sizeof(double)));
  double* m2 = mean + size;
  (!a.bn_relu    ? sample_moments<false, false, T>
   : !a.residual ? sample_moments<true, false, T>
                 : sample_moments<true, true, T>)(a, mean, m2);

  // order: the samples sorted by class, stable; class k owns [first[k], first[k + 1]).
  int64_t* first =
      static_cast<int64_t*>(scratch(kSharedRows, (a.num_classes + 1 + a.batch) * sizeof(int64_t)));
  int64_t* order = first + a.num_classes + 1;
  memset(a.count, 0, a.num_classes * sizeof(int64_t));
  for (int64_t n = 0; n < a.batch; ++n) ++a.count[a.labels[n]];
  first[0] = 0;
  for (int64_t k = 0; k < a.num_classes; ++k) first[k + 1] = first[k] + a.count[k];
  for (int64_t n = 0; n < a.batch; ++n) order[first[a.labels[n]]++] = n;
  for (int64_t k = a.num_classes; k > 0; --k) first[k] = first[k - 1];
  first[0] = 0;

  parallel_for(a.num_classes, 8, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      float* class_mean = a.mean + k * a.channels;
      float* class_var = a.var + k * a.channels;
      for (int64_t c = 0; c < a.channels; ++c) {
        Moments total{0.0, 0.0, 0.0};
        for (int64_t i = first[k]; i < first[k + 1]; ++i) {
          const int64_t s = order[i] * a.channels + c;
          merge(total, static_cast<double>(a.inner), mean[s], m2[s]);
        }
        class_mean[c] = static_cast<float>(total.mean);
        class_var[c] = total.count > 0.0 ? static_cast<float>(total.m2 / total.count) : 0.0f;
      }
    }
  });
}

// What the backward pass reads and writes; out is the gradient of x. stream: past the caches.
template <class T>
struct Gradients {
  const T *x, *grad_y, *r;
  T *grad_r, *out;
  bool stream;
};

// dx = shift + (x - mean) * slope, the mean taken into the difference first: no cancellation. NORM:
// plus the gradient through batch norm where it did not clip; what passes there is also that of r.
template <class V>
struct Channels {
  V mean, shift, slope, norm_scale, norm_shift;
};

// `rows` pixels, `stride` elements apart, from element `at` on; each has the channels g.
template <class LANES, bool NORM, bool ADD, class T>
void move_pixels(const Gradients<T>& t, const Channels<typename LANES::V> (&g)[LANES::kVectors],
                 const BnRelu* norm, int64_t at, int64_t rows, int64_t stride) {
  using V = typename LANES::V;
  const float low = NORM ? norm->low : 0.0f, high = NORM ? norm->high : 0.0f;
  for (int64_t i = 0; i < rows; ++i, at += stride) {
#pragma GCC unroll 8
    for (int k = 0; k < LANES::kVectors; ++k) {
      const int64_t j = at + k * lanes_of<V>();
      const V v = load_lanes<V>(t.x + j);
      const bool new_line = k * lanes_of<V>() * sizeof(T) % kLine == 0;
      if (new_line) __builtin_prefetch(t.x + j + kAhead<T> * stride);
      V grad = g[k].shift + (v - g[k].mean) * g[k].slope;
      if (NORM) {
        if (new_line) __builtin_prefetch(t.grad_y + j + kAhead<T> * stride);
        V y = v * g[k].norm_scale + g[k].norm_shift;
        if (ADD) y = y + load_lanes<V>(t.r + j);
        const V through = where_between(y, low, high, load_lanes<V>(t.grad_y + j));
        if (ADD) write_lanes(t.stream, t.grad_r + j, through);
        grad = grad + through * g[k].norm_scale;
      }
      write_lanes(t.stream, t.out + j, grad);
    }
  }
}

template <bool NORM, bool ADD, class T>
void run_backward(const ClassMomentsBackward& a) {
  const int64_t sample = a.channels * a.inner;
  const BnRelu* norm = a.bn_relu;
  const int64_t size = sizeof(T), row_bytes = (a.channels_last ? a.channels : a.inner) * size;
  const int64_t bytes = a.batch * sample * size;
  const bool stream = streams_rows(a.grad_x, bytes, row_bytes) &&
                      (!ADD || streams_rows(a.grad_residual, bytes, row_bytes));
  const Gradients<T> t{static_cast<const T*>(a.x),        static_cast<const T*>(a.grad_y),
                       static_cast<const T*>(a.residual), static_cast<T*>(a.grad_residual),
                       static_cast<T*>(a.grad_x),         stream};
  parallel_for(a.batch, max64(1, 16384 / max64(1, sample)), [&](int64_t begin, int64_t end) {
    float* shift = static_cast<float*>(scratch(kLocalRows, 2 * a.channels * sizeof(float)));
    float* slope = shift + a.channels;
    for (int64_t n = begin; n < end; ++n) {
      const int64_t k = a.labels[n] * a.channels;
      const float size = static_cast<float>(a.count[a.labels[n]] * a.inner);
      for (int64_t c = 0; c < a.channels; ++c) {
        shift[c] = a.grad_mean[k + c] / size;
        slope[c] = 2.0f * a.grad_var[k + c] / size;
      }
      const float* mean = a.mean + k;
      // value(parameters): those of a vector's channels.
      const auto channels = [&](auto zero, auto value) {
        return Channels<decltype(zero)>{value(mean), value(shift), value(slope),
                                        NORM ? value(norm->scale) : zero,
                                        NORM ? value(norm->shift) : zero};
      };
      if (a.channels_last) {
        for (int64_t i = 0; i < a.inner; i += kStripRows) {
          for_each_lanes<4, T>(a.channels, [&](auto lanes, int64_t c) {
            using L = decltype(lanes);
            using V = typename L::V;
            Channels<V> g[L::kVectors];
            for (int j = 0; j < L::kVectors; ++j) {
              g[j] = channels(V{}, [&](const float* values) {
                return load_lanes<V>(values + c + j * lanes_of<V>());
              });
            }
            move_pixels<L, NORM, ADD>(t, g, norm, n * sample + i * a.channels + c,
                                      min64(kStripRows, a.inner - i), a.channels);
          });
        }
      } else {
        for (int64_t c = 0; c < a.channels; ++c) {
          const int64_t at = n * sample + c * a.inner, left = a.inner % kVectorLanes;
          const auto spread = [&](auto zero) {
            return channels(zero, [&](const float* values) { return values[c] - zero; });
          };
          const Channels<Vector> g[] = {spread(Vector{})};
          move_pixels<Lanes<Vector, 1>, NORM, ADD>(t, g, norm, at, a.inner / kVectorLanes,
                                                   kVectorLanes);
          const Channels<float> one[] = {spread(0.0f)};
          move_pixels<Lanes<float, 1>, NORM, ADD>(t, one, norm, at + a.inner - left, left, 1);
        }
      }
    }
    stream_fence();
  });
}

template <class T>
void run_backward(const ClassMomentsBackward& a) {
  (!a.bn_relu    ? run_backward<false, false, T>
   : !a.residual ? run_backward<true, false, T>
                 : run_backward<true, true, T>)(a);
}

}  // namespace

void class_moments(const ClassMoments& a) {
  switch (a.dtype) {
    case Dtype::kFloat32: return run_forward<float>(a);
    case Dtype::kBFloat16: return run_forward<BFloat16>(a);
    case Dtype::kFloat16: return run_forward<Float16>(a);
  }
}

void class_moments_backward(const ClassMomentsBackward& a) {
  switch (a.dtype) {
    case Dtype::kFloat32: return run_backward<float>(a);
    case Dtype::kBFloat16: return run_backward<BFloat16>(a);
    case Dtype::kFloat16: return run_backward<Float16>(a);
  }
}

}  // namespace FDDA_ISA
}  // namespace fdda
