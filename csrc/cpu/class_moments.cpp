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

namespace fdda {
namespace FDDA_ISA {
namespace {

constexpr int64_t kTile = 4096;     // elements of a contiguous row: 16 KiB in float32
constexpr int64_t kRun = 16;        // numbers that are added before their sum is: less rounding
constexpr int64_t kSample = 512;    // of a row's first tile, for its center
constexpr int64_t kStrip = 64;      // channels of a channels_last tile
constexpr int64_t kStripRows = 64;  // pixels of a channels_last tile: 16 KiB with kStrip
constexpr int64_t kBlock = 512;     // numbers whose gradient through batch norm waits in a buffer
constexpr int kLanes = 64;

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

// What goes with x, at the same offset: y is made of x and, where it is not null, r.
template <class T>
struct Companions {
  T* y;
  const T* r;
  Companions at(int64_t offset) const { return {y + offset, r ? r + offset : nullptr}; }
};

// Adds n numbers less `center` to drift and squares, number i to lane i mod kLanes.
// NORM: also y = norm(x). ADD: y = norm(x, r).
template <bool NORM, bool ADD, class T>
void add_row(const T* __restrict x, int64_t n, float center, float* __restrict drift,
             float* __restrict squares, Companions<T> c, ChannelNorm norm) {
  T* __restrict y = c.y;
  const T* __restrict r = c.r;
  const auto one = [&](int64_t i, int64_t lane) {
    const float v = load(x[i]);
    const float d = v - center;
    drift[lane] += d;
    squares[lane] += d * d;
    if (NORM) store(y[i], norm(v, ADD ? load(r[i]) : 0.0f));
  };
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) one(i + j, j);
  }
  for (int64_t i = whole; i < n; ++i) one(i, i - whole);
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

// `width` <= kStrip adjacent channels of pixels `stride` elements apart. WIDE: width == kStrip.
template <bool WIDE, bool NORM, bool ADD, class T>
void strip_moments(const T* x, int64_t pixels, int64_t stride, int64_t width, double* mean_out,
                   double* m2_out, Companions<T> with, const BnRelu* norm, int64_t channel) {
  const int64_t w = WIDE ? kStrip : width;
  float scale[kStrip], shift_by[kStrip];
  const float low = NORM ? norm->low : 0.0f, high = NORM ? norm->high : 0.0f;
  for (int64_t c = 0; NORM && c < w; ++c) {
    scale[c] = norm->scale[channel + c];
    shift_by[c] = norm->shift[channel + c];
  }
  double mean[kStrip] = {}, m2[kStrip] = {};
  for (int64_t start = 0; start < pixels; start += kStripRows) {
    const T* tile = x + start * stride;
    const int64_t size = min64(kStripRows, pixels - start);
    const double n = static_cast<double>(size);
    float center[kStrip];
    if (start == 0) {
      float sum[kStrip] = {};
      for (int64_t i = 0; i < size; ++i) {
        for (int64_t c = 0; c < w; ++c) sum[c] += load(tile[i * stride + c]);
      }
      for (int64_t c = 0; c < w; ++c) {
        center[c] = static_cast<float>(static_cast<double>(sum[c]) / n);
      }
    } else {
      for (int64_t c = 0; c < w; ++c) center[c] = static_cast<float>(mean[c]);
    }
    float drift[kStrip] = {}, squares[kStrip] = {};
    for (int64_t run = 0; run < size; run += kRun) {
      float d_sum[kStrip] = {}, s_sum[kStrip] = {};
      for (int64_t i = run; i < min64(run + kRun, size); ++i) {
        const int64_t at = (start + i) * stride;
        const T* __restrict pixel = x + at;
        T* __restrict y = NORM ? with.y + at : nullptr;
        const T* __restrict r = ADD ? with.r + at : nullptr;
        for (int64_t c = 0; c < w; ++c) {
          const float v = load(pixel[c]);
          const float d = v - center[c];
          d_sum[c] += d;
          s_sum[c] += d * d;
          if (NORM) {
            store(y[c], ChannelNorm{scale[c], shift_by[c], low, high}(v, ADD ? load(r[c]) : 0.0f));
          }
        }
      }
      for (int64_t c = 0; c < w; ++c) {
        drift[c] += d_sum[c];
        squares[c] += s_sum[c];
      }
    }
    // As merge() has it, the counts alike for all channels.
    const double before = static_cast<double>(start), after = before + n;
    for (int64_t c = 0; c < w; ++c) {
      const double shift = static_cast<double>(drift[c]) / n;
      const double tile_m2 = static_cast<double>(squares[c]) - n * shift * shift;
      const double delta = static_cast<double>(center[c]) + shift - mean[c];
      mean[c] += delta * (n / after);
      m2[c] += (tile_m2 < 0.0 ? 0.0 : tile_m2) + delta * delta * (before * n / after);
    }
  }
  for (int64_t c = 0; c < w; ++c) {
    mean_out[c] = mean[c];
    m2_out[c] = m2[c];
  }
}

template <bool NORM, bool ADD, class T>
void sample_moments(const ClassMoments& a, double* mean, double* m2) {
  const T* x = static_cast<const T*>(a.x);
  const Companions<T> with{static_cast<T*>(a.y), static_cast<const T*>(a.residual)};
  const int64_t sample = a.channels * a.inner;
  if (a.channels_last) {
    const int64_t strips = ceil_div(a.channels, kStrip);
    parallel_for(a.batch * strips, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t n = t / strips;
        const int64_t c = t % strips * kStrip;
        const int64_t width = min64(kStrip, a.channels - c);
        const int64_t out = n * a.channels + c;
        const int64_t at = n * sample + c;
        const auto strip = width == kStrip ? strip_moments<true, NORM, ADD, T>
                                           : strip_moments<false, NORM, ADD, T>;
        strip(x + at, a.inner, a.channels, width, mean + out, m2 + out, NORM ? with.at(at) : with,
              a.bn_relu, c);
      }
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

// dx = shift + (x - mean) * slope, the mean taken into the difference first: no cancellation. NORM:
// plus the gradient through batch norm where it did not clip; what passes there is also that of r.
template <bool NORM>
struct Gradient {
  float mean, shift, slope;
  ChannelNorm norm;
  float through(float x, float r, float grad_y) const {
    const float y = x * norm.scale + norm.shift + r;
    return y > norm.low && y < norm.high ? grad_y : 0.0f;
  }
  float operator()(float x, float through) const {
    const float moments = shift + (x - mean) * slope;
    return NORM ? moments + through * norm.scale : moments;
  }
};

template <bool NORM, bool ADD, class T>
void run_backward(const ClassMomentsBackward& a) {
  const int64_t sample = a.channels * a.inner;
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
      const auto channel = [&](int64_t c) -> Gradient<NORM> {
        if (!NORM) return {mean[c], shift[c], slope[c], {}};
        return {mean[c], shift[c], slope[c], channel_norm(*a.bn_relu, c)};
      };
      const T* __restrict x = static_cast<const T*>(a.x) + n * sample;
      const T* __restrict grad_y = NORM ? static_cast<const T*>(a.grad_y) + n * sample : nullptr;
      const T* __restrict r = ADD ? static_cast<const T*>(a.residual) + n * sample : nullptr;
      T* __restrict grad_r = ADD ? static_cast<T*>(a.grad_residual) + n * sample : nullptr;
      T* __restrict out = static_cast<T*>(a.grad_x) + n * sample;
      // `size` numbers from `at` on; one output a loop, which compilers then vectorise.
      const auto run = [&](auto gradient, int64_t at, int64_t size) {
        for (int64_t start = 0; start < size; start += kBlock) {
          const int64_t length = min64(kBlock, size - start), first = at + start;
          float through[kBlock];
#pragma GCC ivdep
          for (int64_t k = 0; NORM && k < length; ++k) {
            through[k] = gradient(start + k).through(
                load(x[first + k]), ADD ? load(r[first + k]) : 0.0f, load(grad_y[first + k]));
          }
          for (int64_t k = 0; ADD && k < length; ++k) store(grad_r[first + k], through[k]);
#pragma GCC ivdep
          for (int64_t k = 0; k < length; ++k) {
            store(out[first + k],
                  gradient(start + k)(load(x[first + k]), NORM ? through[k] : 0.0f));
          }
        }
      };
      if (a.channels_last) {
        for (int64_t i = 0; i < sample; i += a.channels) run(channel, i, a.channels);
      } else {
        for (int64_t c = 0; c < a.channels; ++c) {
          run([one = channel(c)](int64_t) { return one; }, c * a.inner, a.inner);
        }
      }
    }
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
