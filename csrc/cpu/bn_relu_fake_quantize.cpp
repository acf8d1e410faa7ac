// Eval-mode batch norm, residual addition, clipping and fake quantisation in one pass; the backward
// pass recomputes them and reduces all parameter gradients while it reads.

#include <math.h>

#include "channels.h"
#include "functions.h"
#include "half.h"
#include "parallel.h"
#include "range.h"
#include "stream.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

template <bool RESIDUAL, bool STREAM, class T>
struct Forward {
  const T *x, *residual;
  T* y;
  const float *scale, *shift;
  float low, high;
  Range range;

  float quantized(int64_t i, float scale, float shift) const {
    float v = load(x[i]) * scale + shift;
    if (RESIDUAL) v += load(residual[i]);
    return range(clamp(v, low, high));
  }
  void row(int64_t offset, int64_t n, int64_t channel) const {
    const Forward f = *this;
    const float a = scale[channel], b = shift[channel];
    write_row<STREAM>(y + offset, n, [=](int64_t i) { return f.quantized(offset + i, a, b); });
  }
  void pixels(int64_t offset, int64_t rows, int64_t n) const {
    const Forward f = *this;
    write_pixels<STREAM>(y + offset, rows, n, [=](int64_t i, int64_t c) {
      return f.quantized(offset + i, f.scale[c], f.shift[c]);
    });
  }
};

template <bool RESIDUAL, bool STREAM, class T>
void run_forward(const BnReluFakeQuantize& a) {
  for_each_row(a.view, Forward<RESIDUAL, STREAM, T>{
                           static_cast<const T*>(a.x), static_cast<const T*>(a.residual),
                           static_cast<T*>(a.y), a.norm.scale, a.norm.shift, a.norm.low,
                           a.norm.high, make_range(a.x_min, a.x_max, a.bits)});
}

// An element's gradients with respect to x and residual, and its addends to those of weight, bias
// and (RANGE) the range's ends. Beyond [pass_low, pass_high] nothing passes.
template <bool RESIDUAL, bool RANGE, class T>
struct Gradient {
  const T *x, *residual, *grad;
  T *grad_x, *grad_residual;
  float scale, shift, mean, low, high, pass_low, pass_high;
  RangeGradient range;

  void operator()(int64_t i, float* sum) const {
    const float u = load(x[i]), g = load(grad[i]);
    float v = u * scale + shift;
    if (RESIDUAL) v += load(residual[i]);
    const float kept = clamp(v, low, high);
    const bool passes = v > low && v < high && !(kept < pass_low || kept > pass_high);
    const float through = passes ? g : 0.0f;
    store(grad_x[i], through * scale);
    if (RESIDUAL) store(grad_residual[i], through);
    sum[0] = through * (u - mean);
    sum[1] = through;
    if (RANGE) range(kept, g, sum + 2);
  }
};

template <bool RESIDUAL, bool RANGE, class T>
void run_backward(const BnReluFakeQuantizeBackward& b) {
  constexpr int kSumCount = RANGE ? 5 : 2;
  const BnReluFakeQuantize& a = b.forward;
  const RangeGradient range{make_range(a.x_min, a.x_max, a.bits), a.x_min, a.x_max};
  const Gradient<RESIDUAL, RANGE, T> common{static_cast<const T*>(a.x),
                                            static_cast<const T*>(a.residual),
                                            static_cast<const T*>(b.grad),
                                            static_cast<T*>(a.y),
                                            static_cast<T*>(b.grad_residual),
                                            0.0f,
                                            0.0f,
                                            0.0f,
                                            a.norm.low,
                                            a.norm.high,
                                            b.clipped ? a.x_min : -INFINITY,
                                            b.clipped ? a.x_max : INFINITY,
                                            range};
  const float *scale = a.norm.scale, *shift = a.norm.shift, *mean = b.mean;
  const int64_t channels = b.channels;
  double* sums = static_cast<double*>(scratch(kSharedRows, kSumCount * channels * sizeof(double)));
  channel_sums<kSumCount>(a.view, channels, sums, [=](int64_t c) {
    Gradient<RESIDUAL, RANGE, T> gradient = common;
    gradient.scale = scale[c];
    gradient.shift = shift[c];
    gradient.mean = mean[c];
    return gradient;
  });
  double ends[3] = {};
  for (int64_t c = 0; c < channels; ++c) {
    b.grad_weight[c] = static_cast<float>(sums[c] * b.inv_std[c]);
    b.grad_bias[c] = static_cast<float>(sums[channels + c]);
    for (int k = 0; RANGE && k < 3; ++k) ends[k] += sums[(2 + k) * channels + c];
  }
  if (RANGE) range_gradient(range, ends[0], ends[1], ends[2], b.grad_x_min, b.grad_x_max);
}

template <class T>
void run_forward(const BnReluFakeQuantize& a) {
  if (a.residual) {
    (streams<T>(a.view) ? run_forward<true, true, T> : run_forward<true, false, T>)(a);
  } else {
    (streams<T>(a.view) ? run_forward<false, true, T> : run_forward<false, false, T>)(a);
  }
}

template <class T>
void run_backward(const BnReluFakeQuantizeBackward& b) {
  if (b.forward.residual) {
    (b.range ? run_backward<true, true, T> : run_backward<true, false, T>)(b);
  } else {
    (b.range ? run_backward<false, true, T> : run_backward<false, false, T>)(b);
  }
}

}  // namespace

void bn_relu_fake_quantize(const BnReluFakeQuantize& a) {
  switch (a.dtype) {
    case Dtype::kFloat32: return run_forward<float>(a);
    case Dtype::kBFloat16: return run_forward<BFloat16>(a);
    case Dtype::kFloat16: return run_forward<Float16>(a);
  }
}

void bn_relu_fake_quantize_backward(const BnReluFakeQuantizeBackward& a) {
  switch (a.forward.dtype) {
    case Dtype::kFloat32: return run_backward<float>(a);
    case Dtype::kBFloat16: return run_backward<BFloat16>(a);
    case Dtype::kFloat16: return run_backward<Float16>(a);
  }
}

}  // namespace FDDA_ISA
}  // namespace fdda
