// Train-mode batch norm with a weight and a bias per class, and LeakyReLU; its gradients.
//
// Forward, given the statistics: one pass. Backward: one pass that sums, per sample and channel,
// g = grad_y behind the activation and g * (x - mean), float32 within a tile, double beyond; the
// samples merge in double in the order of the batch; one pass writes grad_x. The order of additions
// depends on the shape alone.

#include <math.h>
#include <string.h>

#include "functions.h"
#include "half.h"
#include "parallel.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

constexpr int64_t kGrain = 16384;  // elements a thread should have
constexpr int64_t kLanes = 64;     // shortest run of a loop, where the data allow it
constexpr int64_t kRepeats = 32;   // of fewer channels than that: a run of whole vectors
constexpr int64_t kTile = 64;      // float32 additions per lane

// What the batch norm makes of one channel of one sample, and its gradient.
struct Channel {
  float mean, scale, bias, slope;
  float norm(float x) const { return (x - mean) * scale + bias; }
  float operator()(float x) const {
    const float v = norm(x);
    return v > 0.0f ? v : v * slope;
  }
  float before_activation(float x, float grad_y) const {
    return norm(x) > 0.0f ? grad_y : grad_y * slope;
  }
};

float inverse_std(const ConditionalBn& a, int64_t at) {
  return static_cast<float>(1.0 / sqrt(static_cast<double>(a.var[at]) + a.eps));
}

Channel channel_of(const ConditionalBn& a, int64_t n, int64_t c) {
  const int64_t statistic = a.group[n] * a.channels + c;
  const int64_t affine = a.labels[n] * a.channels + c;
  return {a.mean[statistic], a.weight[affine] * inverse_std(a, statistic), a.bias[affine],
          a.negative_slope};
}

// A sample's channels as arrays, repeated until few channels fill a vector, too.
struct Period {
  int64_t size;
  float *mean, *scale, *bias;
  float* extra;  // 2 * size more
  float slope;
  Channel operator[](int64_t k) const { return {mean[k], scale[k], bias[k], slope}; }
};

Period period_of(const ConditionalBn& a) {
  const int64_t size = a.channels < kLanes ? a.channels * kRepeats : a.channels;
  float* rows = static_cast<float*>(scratch(kLocalRows, 5 * size * sizeof(float)));
  return {size, rows, rows + size, rows + 2 * size, rows + 3 * size, a.negative_slope};
}

void fill(const Period& p, const ConditionalBn& a, int64_t n) {
  for (int64_t k = 0; k < p.size; ++k) {
    const Channel channel = channel_of(a, n, k % a.channels);
    p.mean[k] = channel.mean;
    p.scale[k] = channel.scale;
    p.bias[k] = channel.bias;
  }
}

int64_t grain(const ConditionalBn& a) { return max64(1, kGrain / (a.channels * a.inner)); }

template <class T>
void run_forward(const ConditionalBn& a) {
  const int64_t sample = a.channels * a.inner;
  parallel_for(a.batch, grain(a), [&](int64_t begin, int64_t end) {
    const Period p = period_of(a);
    for (int64_t n = begin; n < end; ++n) {
      const T* __restrict x = static_cast<const T*>(a.x) + n * sample;
      T* __restrict y = static_cast<T*>(a.y) + n * sample;
      if (a.channels_last) {
        fill(p, a, n);
        for (int64_t i = 0; i < sample; i += p.size) {
          const int64_t size = min64(p.size, sample - i);
          for (int64_t k = 0; k < size; ++k) store(y[i + k], p[k](load(x[i + k])));
        }
      } else {
        for (int64_t c = 0; c < a.channels; ++c, x += a.inner, y += a.inner) {
          const Channel channel = channel_of(a, n, c);
          for (int64_t i = 0; i < a.inner; ++i) store(y[i], channel(load(x[i])));
        }
      }
    }
  });
}

// sum_g, sum_gx [channels]: sums over one channels_last sample of g and g * (x - mean).
template <class T>
void sums_of_pixels(const Period& p, const T* __restrict x, const T* __restrict grad_y,
                    int64_t sample, int64_t channels, double* sum_g, double* sum_gx) {
  float* __restrict lane_g = p.extra;
  float* __restrict lane_gx = p.extra + p.size;
  for (int64_t start = 0; start < sample; start += kTile * p.size) {
    memset(lane_g, 0, 2 * p.size * sizeof(float));
    const int64_t end = min64(sample, start + kTile * p.size);
    for (int64_t i = start; i < end; i += p.size) {
      const int64_t size = min64(p.size, end - i);
      for (int64_t k = 0; k < size; ++k) {
        const float v = load(x[i + k]);
        const float g = p[k].before_activation(v, load(grad_y[i + k]));
        lane_g[k] += g;
        lane_gx[k] += g * (v - p.mean[k]);
      }
    }
    for (int64_t k = 0; k < p.size; k += channels) {
      for (int64_t c = 0; c < channels; ++c) {
        sum_g[c] += lane_g[k + c];
        sum_gx[c] += lane_gx[k + c];
      }
    }
  }
}

// The same of one channel in a row.
template <class T>
void sums_of_row(Channel channel, const T* __restrict x, const T* __restrict grad_y, int64_t size,
                 double* sum_g, double* sum_gx) {
  for (int64_t start = 0; start < size; start += kTile * kLanes) {
    float lane_g[kLanes] = {}, lane_gx[kLanes] = {};
    const int64_t end = min64(size, start + kTile * kLanes);
    for (int64_t i = start; i < end; i += kLanes) {
      const int64_t width = min64(kLanes, end - i);
      for (int64_t k = 0; k < width; ++k) {
        const float v = load(x[i + k]);
        const float g = channel.before_activation(v, load(grad_y[i + k]));
        lane_g[k] += g;
        lane_gx[k] += g * (v - channel.mean);
      }
    }
    for (int64_t k = 0; k < kLanes; ++k) {
      *sum_g += lane_g[k];
      *sum_gx += lane_gx[k];
    }
  }
}

// Writes grad_weight and grad_bias, and per group and channel what batch norm takes from grad_x:
// shift + (x - mean) * slope.
void merge_samples(const ConditionalBnBackward& b, const double* sum_g, const double* sum_gx,
                   float* shift, float* slope) {
  const ConditionalBn& a = b.forward;
  const int64_t table = b.num_classes * a.channels, groups = b.num_groups * a.channels;
  const size_t bytes = 2 * (table + groups) * sizeof(double);
  double* grad_weight = static_cast<double*>(scratch(kPlanes, bytes));
  double* grad_bias = grad_weight + table;
  double* total_g = grad_bias + table;
  double* total_gx = total_g + groups;
  memset(grad_weight, 0, bytes);
  for (int64_t n = 0; n < a.batch; ++n) {
    for (int64_t c = 0; c < a.channels; ++c) {
      const int64_t affine = a.labels[n] * a.channels + c;
      const int64_t statistic = a.group[n] * a.channels + c;
      const double g = sum_g[n * a.channels + c], gx = sum_gx[n * a.channels + c];
      grad_weight[affine] += gx * inverse_std(a, statistic);
      grad_bias[affine] += g;
      total_g[statistic] += g * a.weight[affine];
      total_gx[statistic] += gx * a.weight[affine];
    }
  }
  for (int64_t k = 0; k < table; ++k) {
    b.grad_weight[k] = static_cast<float>(grad_weight[k]);
    b.grad_bias[k] = static_cast<float>(grad_bias[k]);
  }
  for (int64_t k = 0; k < groups; ++k) {
    const double size = static_cast<double>(b.group_size[k / a.channels] * a.inner);
    const double inverse = inverse_std(a, k);
    shift[k] = size > 0.0 ? static_cast<float>(total_g[k] * inverse / size) : 0.0f;
    slope[k] =
        size > 0.0 ? static_cast<float>(total_gx[k] * inverse * inverse * inverse / size) : 0.0f;
  }
}

template <class T>
void run_backward(const ConditionalBnBackward& b) {
  const ConditionalBn& a = b.forward;
  const int64_t sample = a.channels * a.inner, sums = a.batch * a.channels;
  const size_t table = b.num_groups * a.channels;
  double* sum_g =
      static_cast<double*>(scratch(kSums, 2 * sums * sizeof(double) + 2 * table * sizeof(float)));
  double* sum_gx = sum_g + sums;
  float* shift = reinterpret_cast<float*>(sum_gx + sums);
  float* slope = shift + table;
  memset(sum_g, 0, 2 * sums * sizeof(double));
  parallel_for(a.batch, grain(a), [&](int64_t begin, int64_t end) {
    const Period p = period_of(a);
    for (int64_t n = begin; n < end; ++n) {
      const T* x = static_cast<const T*>(a.x) + n * sample;
      const T* grad_y = static_cast<const T*>(b.grad_y) + n * sample;
      double* g = sum_g + n * a.channels;
      double* gx = sum_gx + n * a.channels;
      if (a.channels_last) {
        fill(p, a, n);
        sums_of_pixels(p, x, grad_y, sample, a.channels, g, gx);
      } else {
        for (int64_t c = 0; c < a.channels; ++c) {
          const int64_t row = c * a.inner;
          sums_of_row(channel_of(a, n, c), x + row, grad_y + row, a.inner, g + c, gx + c);
        }
      }
    }
  });
  merge_samples(b, sum_g, sum_gx, shift, slope);
  parallel_for(a.batch, grain(a), [&](int64_t begin, int64_t end) {
    const Period p = period_of(a);
    float* __restrict pixel_shift = p.extra;
    float* __restrict pixel_slope = p.extra + p.size;
    for (int64_t n = begin; n < end; ++n) {
      const T* __restrict x = static_cast<const T*>(a.x) + n * sample;
      const T* __restrict grad_y = static_cast<const T*>(b.grad_y) + n * sample;
      T* __restrict grad_x = static_cast<T*>(a.y) + n * sample;
      const float* group_shift = shift + a.group[n] * a.channels;
      const float* group_slope = slope + a.group[n] * a.channels;
      const auto gradient = [](Channel channel, float v, float grad, float shift, float slope) {
        return channel.before_activation(v, grad) * channel.scale -
               (shift + (v - channel.mean) * slope);
      };
      if (a.channels_last) {
        fill(p, a, n);
        for (int64_t k = 0; k < p.size; ++k) {
          pixel_shift[k] = group_shift[k % a.channels];
          pixel_slope[k] = group_slope[k % a.channels];
        }
        for (int64_t i = 0; i < sample; i += p.size) {
          const int64_t size = min64(p.size, sample - i);
          for (int64_t k = 0; k < size; ++k) {
            store(grad_x[i + k], gradient(p[k], load(x[i + k]), load(grad_y[i + k]), pixel_shift[k],
                                          pixel_slope[k]));
          }
        }
      } else {
        for (int64_t c = 0; c < a.channels; ++c) {
          const Channel channel = channel_of(a, n, c);
          for (int64_t i = c * a.inner; i < (c + 1) * a.inner; ++i) {
            store(grad_x[i],
                  gradient(channel, load(x[i]), load(grad_y[i]), group_shift[c], group_slope[c]));
          }
        }
      }
    }
  });
}

}  // namespace

void conditional_bn(const ConditionalBn& a) {
  switch (a.dtype) {
    case Dtype::kFloat32: return run_forward<float>(a);
    case Dtype::kBFloat16: return run_forward<BFloat16>(a);
    case Dtype::kFloat16: return run_forward<Float16>(a);
  }
}

void conditional_bn_backward(const ConditionalBnBackward& b) {
  switch (b.forward.dtype) {
    case Dtype::kFloat32: return run_backward<float>(b);
    case Dtype::kBFloat16: return run_backward<BFloat16>(b);
    case Dtype::kFloat16: return run_backward<Float16>(b);
  }
}

}  // namespace FDDA_ISA
}  // namespace fdda
