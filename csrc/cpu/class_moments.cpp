// Mean and variance of every (class, channel), alone or beside the batch norm that reads x, too.
//
// 1. Per (sample, channel): tiles that fit the L1 cache are read twice, for their mean and for the
//    squared deviations from it, so memory is read once and nothing cancels. Lanes add in float32,
//    a tile has at most kTile elements per channel; tiles merge in double (Chan, Golub, LeVeque
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
constexpr int64_t kStrip = 64;      // channels of a channels_last tile
constexpr int64_t kStripRows = 64;  // pixels of a channels_last tile: 16 KiB with kStrip
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
  double sum = 0.0;
  for (int j = 0; j < kLanes; ++j) sum += lanes[j];
  return sum;
}

// What batch norm and clipping make of one channel.
struct ChannelNorm {
  float scale, shift, low, high;
  float operator()(float x) const { return clamp(x * scale + shift, low, high); }
};

ChannelNorm channel_norm(const BnRelu& norm, int64_t c) {
  return {norm.scale[c], norm.shift[c], norm.low, norm.high};
}

// NORM: also writes norm(x) to y.
template <bool NORM, class T>
Moments row_moments(const T* x, int64_t n, T* y, ChannelNorm norm) {
  Moments total{0.0, 0.0, 0.0};
  for (int64_t start = 0; start < n; start += kTile) {
    const T* __restrict tile = x + start;
    T* __restrict out = NORM ? y + start : nullptr;
    const int64_t size = min64(kTile, n - start);
    const int64_t whole = size / kLanes * kLanes;
    float lanes[kLanes] = {};
    for (int64_t i = 0; i < whole; i += kLanes) {
      for (int j = 0; j < kLanes; ++j) lanes[j] += load(tile[i + j]);
    }
    for (int64_t i = whole; i < size; ++i) lanes[i - whole] += load(tile[i]);
    const double n = static_cast<double>(size);
    const float center = static_cast<float>(sum_lanes(lanes) / n);
    float drift[kLanes] = {};  // sum of deviations: restores what rounding took from the center
    float squares[kLanes] = {};
    for (int64_t i = 0; i < whole; i += kLanes) {
      for (int j = 0; j < kLanes; ++j) {
        const float v = load(tile[i + j]);
        const float d = v - center;
        drift[j] += d;
        squares[j] += d * d;
        if (NORM) store(out[i + j], norm(v));
      }
    }
    for (int64_t i = whole; i < size; ++i) {
      const float v = load(tile[i]);
      const float d = v - center;
      drift[i - whole] += d;
      squares[i - whole] += d * d;
      if (NORM) store(out[i], norm(v));
    }
    const double shift = sum_lanes(drift) / n;
    const double m2 = sum_lanes(squares) - n * shift * shift;
    merge(total, n, static_cast<double>(center) + shift, m2 > 0.0 || m2 != m2 ? m2 : 0.0);
  }
  return total;
}

// `width` <= kStrip adjacent channels of pixels `stride` elements apart. WIDE: width == kStrip.
template <bool WIDE, bool NORM, class T>
void strip_moments(const T* x, int64_t pixels, int64_t stride, int64_t width, double* mean_out,
                   double* m2_out, T* y, const BnRelu* norm, int64_t channel) {
  const int64_t w = WIDE ? kStrip : width;
  float scale[kStrip], shift_by[kStrip];
  const float low = NORM ? norm->low : 0.0f, high = NORM ? norm->high : 0.0f;
  for (int64_t c = 0; NORM && c < w; ++c) {
    scale[c] = norm->scale[channel + c];
    shift_by[c] = norm->shift[channel + c];
  }
  Moments total[kStrip] = {};
  for (int64_t start = 0; start < pixels; start += kStripRows) {
    const T* tile = x + start * stride;
    T* out = NORM ? y + start * stride : nullptr;
    const int64_t size = min64(kStripRows, pixels - start);
    float sum[kStrip] = {};
    for (int64_t i = 0; i < size; ++i) {
      for (int64_t c = 0; c < w; ++c) sum[c] += load(tile[i * stride + c]);
    }
    float center[kStrip];
    for (int64_t c = 0; c < w; ++c) {
      center[c] = static_cast<float>(static_cast<double>(sum[c]) / static_cast<double>(size));
    }
    float drift[kStrip] = {};
    float squares[kStrip] = {};
    for (int64_t i = 0; i < size; ++i) {
      const T* __restrict pixel = tile + i * stride;
      T* __restrict made = NORM ? out + i * stride : nullptr;
      for (int64_t c = 0; c < w; ++c) {
        const float v = load(pixel[c]);
        const float d = v - center[c];
        drift[c] += d;
        squares[c] += d * d;
        if (NORM) store(made[c], ChannelNorm{scale[c], shift_by[c], low, high}(v));
      }
    }
    for (int64_t c = 0; c < w; ++c) {
      const double n = static_cast<double>(size);
      const double shift = static_cast<double>(drift[c]) / n;
      const double m2 = static_cast<double>(squares[c]) - n * shift * shift;
      merge(total[c], n, static_cast<double>(center[c]) + shift, m2 > 0.0 || m2 != m2 ? m2 : 0.0);
    }
  }
  for (int64_t c = 0; c < w; ++c) {
    mean_out[c] = total[c].mean;
    m2_out[c] = total[c].m2;
  }
}

template <bool NORM, class T>
void sample_moments(const ClassMoments& a, double* mean, double* m2) {
  const T* x = static_cast<const T*>(a.x);
  T* y = static_cast<T*>(a.y);
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
        const auto strip =
            width == kStrip ? strip_moments<true, NORM, T> : strip_moments<false, NORM, T>;
        strip(x + at, a.inner, a.channels, width, mean + out, m2 + out, NORM ? y + at : nullptr,
              a.bn_relu, c);
      }
    });
  } else {
    parallel_for(
        a.batch * a.channels, max64(1, kTile / max64(1, a.inner)), [&](int64_t begin, int64_t end) {
          for (int64_t r = begin; r < end; ++r) {
            const ChannelNorm norm =
                NORM ? channel_norm(*a.bn_relu, r % a.channels) : ChannelNorm{};
            const int64_t at = r * a.inner;
            const Moments m = row_moments<NORM>(x + at, a.inner, NORM ? y + at : nullptr, norm);
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
  (a.bn_relu ? sample_moments<true, T> : sample_moments<false, T>)(a, mean, m2);

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
// plus the gradient through batch norm where it did not clip.
template <bool NORM>
struct Gradient {
  float mean, shift, slope;
  ChannelNorm norm;
  float operator()(float x, float grad_y) const {
    const float moments = shift + (x - mean) * slope;
    if (!NORM) return moments;
    const float y = x * norm.scale + norm.shift;
    return moments + (y > norm.low && y < norm.high ? grad_y * norm.scale : 0.0f);
  }
};

template <bool NORM, class T>
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
      const T* __restrict grad_y = NORM ? static_cast<const T*>(a.grad_y) + n * sample : x;
      T* __restrict out = static_cast<T*>(a.grad_x) + n * sample;
      if (a.channels_last) {
        for (int64_t i = 0; i < sample; i += a.channels) {
          for (int64_t c = 0; c < a.channels; ++c) {
            store(out[i + c], channel(c)(load(x[i + c]), load(grad_y[i + c])));
          }
        }
      } else {
        for (int64_t c = 0; c < a.channels; ++c, x += a.inner, grad_y += a.inner, out += a.inner) {
          const Gradient<NORM> gradient = channel(c);
          for (int64_t i = 0; i < a.inner; ++i)
            store(out[i], gradient(load(x[i]), load(grad_y[i])));
        }
      }
    }
  });
}

template <class T>
void run_backward(const ClassMomentsBackward& a) {
  (a.bn_relu ? run_backward<true, T> : run_backward<false, T>)(a);
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
