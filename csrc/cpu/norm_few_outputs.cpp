// The backward passes of batch norm, LeakyReLU and a 3x3 convolution with few output channels. A
// strip of an image goes through all of its passes in one thread's second-level cache; what it adds
// to the sums is kept apart, so that the order of the strips decides the result.

#include <string.h>

#include "functions.h"
#include "half.h"
#include "parallel.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

constexpr int64_t kStripBytes = 512 << 10;

// Planes, taps and pixels of a strip, each a matrix.
template <class T>
struct Matrix {
  const T* numbers;
  int64_t row, column;  // steps
};

template <class T>
void multiply(int64_t rows, int64_t depth, int64_t columns, Matrix<T> a, Matrix<T> b, T* out,
              float* total) {
  if constexpr (sizeof(T) == sizeof(float)) {
    float* to = total ? total : out;
    products({1, rows, depth, columns, a.numbers, 0, a.row, a.column, b.numbers, 0, b.row, b.column,
              to, total != nullptr});
  } else {
    const auto bits = [](const T* numbers) { return reinterpret_cast<const uint16_t*>(numbers); };
    product_bfloat16({rows, depth, columns, bits(a.numbers), a.row, a.column, bits(b.numbers),
                      b.row, b.column, reinterpret_cast<uint16_t*>(out), total});
  }
}

// How every image is divided into strips of rows, and the memory of one.
template <class T>
class Strips {
 public:
  explicit Strips(const NormFewOutputs& a)
      : a_(a), taps_(9 * a.outputs), channels_(a.norm.channels), width_(a.norm.strip.width) {
    const int64_t row_bytes = width_ * (taps_ + 2 * channels_) * sizeof(T);
    const int64_t rows = max64(1, kStripBytes / max64(1, row_bytes));
    per_image_ = max64(1, ceil_div(height(), rows));
    most_pixels_ = ceil_div(height(), per_image_) * width_;
  }

  int64_t per_image() const { return per_image_; }

  // each(number of the strip, its place, planes and gradient of the normalised pixels, memory for
  // as many numbers as the gradient has)
  template <class Each>
  void for_each(Each each) const {
    parallel_for(a_.norm.strip.batch * per_image_, 1, [&](int64_t begin, int64_t end) {
      const int64_t numel = most_pixels_ * channels_;
      T* planes = static_cast<T*>(scratch(kStrip, (taps_ * most_pixels_ + 2 * numel) * sizeof(T)));
      T *grad = planes + taps_ * most_pixels_, *values = grad + numel;
      for (int64_t s = begin; s < end; ++s) {
        Strip strip = a_.norm.strip;
        strip.image = s / per_image_;
        strip.images = 1;
        strip.row = height() * (s % per_image_) / per_image_;
        strip.row_end = height() * (s % per_image_ + 1) / per_image_;
        gather_taps({strip, a_.outputs, a_.grad_y, planes});
        const int64_t pixels = strip.rows() * width_;
        multiply<T>(pixels, taps_, channels_, {planes, 1, pixels},
                    {static_cast<const T*>(a_.taps), channels_, 1}, grad, nullptr);
        each(s, strip, planes, grad, values);
      }
    });
  }

 private:
  const NormFewOutputs& a_;
  int64_t taps_, channels_, width_, per_image_, most_pixels_;
  int64_t height() const { return a_.norm.strip.height; }
};

NormStrip norm_of(const NormFewOutputs& a, const Strip& strip, void* y) {
  NormStrip norm = a.norm;
  norm.strip = strip;
  norm.y = y;
  return norm;
}

// to[i] += from[0][i] + from[1][i] + ...
template <class T>
void add_all(const T* from, int64_t count, int64_t size, T* to) {
  for (int64_t k = 0; k < count; ++k) {
    for (int64_t i = 0; i < size; ++i) to[i] += from[k * size + i];
  }
}

template <class T>
void run_sums(const NormFewOutputsSums& b) {
  const NormFewOutputs& a = b.forward;
  const Strips<T> strips(a);
  const int64_t channels = a.norm.channels, taps = 9 * a.outputs, each = taps * channels;
  const int64_t sums = a.norm.strip.batch * channels, per_image = strips.per_image();
  const int64_t count = a.norm.strip.batch * per_image, sums_numel = per_image * 2 * sums;
  const size_t bytes = sums_numel * sizeof(double) + count * each * sizeof(float);
  double* parts = static_cast<double*>(scratch(kSharedRows, bytes));
  float* taps_parts = reinterpret_cast<float*>(parts + sums_numel);
  memset(parts, 0, bytes);
  strips.for_each([&](int64_t s, const Strip& strip, const T* planes, const T* grad, T* values) {
    double* sum = parts + s % per_image * 2 * sums;
    norm_strip_sums({norm_of(a, strip, values), grad, sum, sum + sums});
    const int64_t pixels = strip.rows() * strip.width;
    multiply<T>(taps, pixels, channels, {planes, pixels, 1}, {values, channels, 1}, nullptr,
                taps_parts + s * each);
  });
  add_all(parts, per_image, 2 * sums, b.sums);
  add_all(taps_parts, count, each, b.grad_taps);
}

template <class T>
void run_gradient(const NormFewOutputsGradient& b) {
  const NormFewOutputs& a = b.forward;
  Strips<T>(a).for_each([&](int64_t, const Strip& strip, const T*, const T* grad, T*) {
    norm_strip_gradient({norm_of(a, strip, a.norm.y), grad, b.shift, b.slope});
  });
}

}  // namespace

void norm_few_outputs_sums(const NormFewOutputsSums& b) {
  if (b.forward.norm.strip.dtype == Dtype::kBFloat16) return run_sums<BFloat16>(b);
  run_sums<float>(b);
}

void norm_few_outputs_gradient(const NormFewOutputsGradient& b) {
  if (b.forward.norm.strip.dtype == Dtype::kBFloat16) return run_gradient<BFloat16>(b);
  run_gradient<float>(b);
}

}  // namespace FDDA_ISA
}  // namespace fdda
