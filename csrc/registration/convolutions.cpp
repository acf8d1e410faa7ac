// CPU passes of the generator's convolutions: checks and pointers, nothing numerical. The buffers
// of a strip are dense; shapes are those of the structures in kernels.h.
#include "layout.h"

namespace fdda {
namespace {

// `full`: [N, height * scale, width * scale, channels], dense.
Strip strip_of(const Tensor& full, const char* argument, int64_t scale, int64_t image,
               int64_t images, int64_t row, int64_t row_end) {
  STD_TORCH_CHECK(full.dim() == 4 && full.is_contiguous(), argument,
                  ": expected a dense [N, H, W, C]");
  const Strip s{float_dtype(full, argument),
                full.size(0),
                full.size(1) / scale,
                full.size(2) / scale,
                image,
                images,
                row,
                row_end};
  STD_TORCH_CHECK(s.dtype != Dtype::kFloat16, argument, ": expected float32 or bfloat16");
  STD_TORCH_CHECK(0 <= image && 0 <= images && image + images <= full.size(0),
                  "image: expected images of ", argument, ", got ", image, " + ", images);
  STD_TORCH_CHECK(0 <= row && row < row_end && row_end <= s.height, "row: expected rows of ",
                  argument, ", got ", row, " to ", row_end);
  return s;
}

void* buffer(const Tensor& t, const Tensor& full, int64_t numel, const char* argument) {
  check_dtype(t, full.scalar_type(), argument);
  check_numel(t, numel, argument);
  STD_TORCH_CHECK(t.is_contiguous(), argument, ": expected a dense tensor");
  return t.mutable_data_ptr();
}

void upsample_differences(const Tensor& x, Tensor row_map, Tensor column_map, Tensor mixed_map,
                          int64_t image, int64_t images, int64_t row, int64_t row_end) {
  const Strip s = strip_of(x, "x", 1, image, images, row, row_end);
  const int64_t channels = x.size(3), pixel_rows = images * channels;
  active_kernels().upsample_differences(
      {s, channels, x.const_data_ptr(),
       buffer(row_map, x, pixel_rows * s.differences() * s.width, "row_map"),
       buffer(column_map, x, pixel_rows * s.rows() * (s.width + 1), "column_map"),
       buffer(mixed_map, x, pixel_rows * s.differences() * (s.width + 1), "mixed_map")});
}

void upsample_sum(const Tensor& x, const Tensor& row_map, const Tensor& column_map,
                  const Tensor& mixed_map, const Tensor& bias, Tensor y, int64_t image,
                  int64_t images, int64_t row, int64_t row_end) {
  const Strip s = strip_of(y, "y", 2, image, images, row, row_end);
  const int64_t channels = y.size(3), pixel_rows = images * channels;
  check_dtype(bias, ScalarType::Float, "bias");
  check_numel(bias, channels, "bias");
  const Tensor dense_bias = torch::stable::contiguous(bias);
  active_kernels().upsample_sum(
      {s, channels, buffer(x, y, pixel_rows * s.rows() * s.width, "x"),
       buffer(row_map, y, pixel_rows * (s.rows() + 1) * s.width * 2, "row_map"),
       buffer(column_map, y, pixel_rows * s.rows() * (s.width + 1) * 2, "column_map"),
       buffer(mixed_map, y, pixel_rows * (s.rows() + 1) * (s.width + 1) * 4, "mixed_map"),
       dense_bias.const_data_ptr<float>(), y.mutable_data_ptr()});
}

void upsample_reduce(const Tensor& grad_y, Tensor x, Tensor row_map, Tensor column_map,
                     Tensor mixed_map, Tensor sum, int64_t image, int64_t images, int64_t row,
                     int64_t row_end) {
  const Strip s = strip_of(grad_y, "grad_y", 2, image, images, row, row_end);
  const int64_t channels = grad_y.size(3), pixel_rows = images * channels;
  check_dtype(sum, ScalarType::Float, "sum");
  check_numel(sum, pixel_rows * s.rows(), "sum");
  STD_TORCH_CHECK(sum.is_contiguous(), "sum: expected a dense tensor");
  active_kernels().upsample_reduce(
      {s, channels, grad_y.const_data_ptr(),
       buffer(x, grad_y, pixel_rows * s.rows() * s.width, "x"),
       buffer(row_map, grad_y, pixel_rows * s.differences() * s.width * 2, "row_map"),
       buffer(column_map, grad_y, pixel_rows * s.rows() * (s.width + 1) * 2, "column_map"),
       buffer(mixed_map, grad_y, pixel_rows * s.differences() * (s.width + 1) * 4, "mixed_map"),
       sum.mutable_data_ptr<float>()});
}

void upsample_adjoint(const Tensor& x, const Tensor& row_map, const Tensor& column_map,
                      const Tensor& mixed_map, Tensor grad_x, int64_t image, int64_t images,
                      int64_t row, int64_t row_end) {
  const Strip s = strip_of(grad_x, "grad_x", 1, image, images, row, row_end);
  const int64_t channels = grad_x.size(3), pixel_rows = images * channels;
  active_kernels().upsample_adjoint(
      {s, channels, buffer(x, grad_x, pixel_rows * s.rows() * s.width, "x"),
       buffer(row_map, grad_x, pixel_rows * (s.rows() + 1) * s.width, "row_map"),
       buffer(column_map, grad_x, pixel_rows * s.rows() * (s.width + 1), "column_map"),
       buffer(mixed_map, grad_x, pixel_rows * (s.rows() + 1) * (s.width + 1), "mixed_map"),
       grad_x.mutable_data_ptr()});
}

void gather_taps(const Tensor& grad_y, Tensor planes, int64_t image, int64_t images, int64_t row,
                 int64_t row_end) {
  const Strip s = strip_of(grad_y, "grad_y", 1, image, images, row, row_end);
  const int64_t channels = grad_y.size(3);
  active_kernels().gather_taps(
      {s, channels, grad_y.const_data_ptr(),
       buffer(planes, grad_y, 9 * channels * images * s.rows() * s.width, "planes")});
}

void sum_taps(const Tensor& planes, const Tensor& bias, Tensor y, int64_t image, int64_t images,
              int64_t row, int64_t row_end) {
  const Strip s = strip_of(y, "y", 1, image, images, row, row_end);
  const int64_t channels = y.size(3);
  const int64_t rows = s.rows() + (row > 0) + (row_end < s.height);
  check_dtype(bias, ScalarType::Float, "bias");
  check_numel(bias, channels, "bias");
  const Tensor dense_bias = torch::stable::contiguous(bias);
  active_kernels().sum_taps({s, channels,
                             buffer(planes, y, 9 * channels * images * rows * s.width, "planes"),
                             dense_bias.const_data_ptr<float>(), y.mutable_data_ptr()});
}

void add_parts(const Tensor& parts, Tensor total) {
  check_dtype(parts, ScalarType::BFloat16, "parts");
  check_dtype(total, ScalarType::Float, "total");
  STD_TORCH_CHECK(parts.is_contiguous(), "parts: expected a dense tensor");
  STD_TORCH_CHECK(total.is_contiguous(), "total: expected a dense tensor");
  const int64_t count = parts.size(0), size = total.numel();
  check_numel(parts, count * size, "parts");
  active_kernels().add_parts(
      {count, size, parts.const_data_ptr(), total.mutable_data_ptr<float>()});
}

// `y` is checked by the callers.
NormStrip norm_strip_of(const Tensor& x, const Tensor& tables, double negative_slope, void* y,
                        int64_t image, int64_t images, int64_t row, int64_t row_end) {
  const Strip s = strip_of(x, "x", 1, image, images, row, row_end);
  const NormTables norm = norm_tables(tables, x.size(0) * x.size(3), negative_slope);
  return {s, x.size(3), x.const_data_ptr(), norm, y};
}

int64_t strip_numel(const Tensor& x, int64_t images, int64_t row, int64_t row_end) {
  return images * (row_end - row) * x.size(2) * x.size(3);
}

void norm_strip(const Tensor& x, const Tensor& tables, double negative_slope, Tensor y,
                int64_t image, int64_t images, int64_t row, int64_t row_end) {
  void* out = buffer(y, x, strip_numel(x, images, row, row_end), "y");
  active_kernels().norm_strip(
      norm_strip_of(x, tables, negative_slope, out, image, images, row, row_end));
}

// [2, N, channels]
double* sums_of(const Tensor& sums, const Tensor& x) {
  check_dtype(sums, ScalarType::Double, "sums");
  check_numel(sums, 2 * x.size(0) * x.size(3), "sums");
  STD_TORCH_CHECK(sums.is_contiguous(), "sums: expected a dense tensor");
  return sums.mutable_data_ptr<double>();
}

// [2, N, channels] of shift and slope.
const float* corrections_of(const Tensor& corrections, const Tensor& x) {
  check_dtype(corrections, ScalarType::Float, "corrections");
  check_numel(corrections, 2 * x.size(0) * x.size(3), "corrections");
  STD_TORCH_CHECK(corrections.is_contiguous(), "corrections: expected a dense tensor");
  return corrections.const_data_ptr<float>();
}

void norm_strip_sums(const Tensor& x, const Tensor& tables, double negative_slope,
                     const Tensor& grad_y, Tensor y, Tensor sums, int64_t image, int64_t images,
                     int64_t row, int64_t row_end) {
  const int64_t numel = strip_numel(x, images, row, row_end), size = x.size(0) * x.size(3);
  void* out = buffer(y, x, numel, "y");
  double* sum = sums_of(sums, x);
  active_kernels().norm_strip_sums(
      {norm_strip_of(x, tables, negative_slope, out, image, images, row, row_end),
       buffer(grad_y, x, numel, "grad_y"), sum, sum + size});
}

void norm_strip_gradient(const Tensor& x, const Tensor& tables, double negative_slope,
                         const Tensor& grad_y, const Tensor& corrections, Tensor grad_x,
                         int64_t image, int64_t images, int64_t row, int64_t row_end) {
  const int64_t size = x.size(0) * x.size(3);
  void* out = buffer(grad_x, x, x.numel(), "grad_x");
  const float* correction = corrections_of(corrections, x);
  active_kernels().norm_strip_gradient(
      {norm_strip_of(x, tables, negative_slope, out, image, images, row, row_end),
       buffer(grad_y, x, strip_numel(x, images, row, row_end), "grad_y"), correction,
       correction + size});
}

// `y` is checked by the callers.
NormFewOutputs norm_few_outputs_of(const Tensor& x, const Tensor& tables, double negative_slope,
                                   const Tensor& grad_y, const Tensor& taps, void* y) {
  STD_TORCH_CHECK(grad_y.dim() == 4, "grad_y: expected a dense [N, H, W, C]");
  const int64_t outputs = grad_y.size(3), pixels = x.size(0) * x.size(1) * x.size(2);
  const void* weights = buffer(taps, x, 9 * outputs * x.size(3), "taps");
  return {norm_strip_of(x, tables, negative_slope, y, 0, x.size(0), 0, x.size(1)), outputs,
          buffer(grad_y, x, pixels * outputs, "grad_y"), weights};
}

void norm_few_outputs_sums(const Tensor& x, const Tensor& tables, double negative_slope,
                           const Tensor& grad_y, const Tensor& taps, Tensor sums,
                           Tensor grad_taps) {
  const NormFewOutputs a = norm_few_outputs_of(x, tables, negative_slope, grad_y, taps, nullptr);
  check_dtype(grad_taps, ScalarType::Float, "grad_taps");
  check_numel(grad_taps, taps.numel(), "grad_taps");
  STD_TORCH_CHECK(grad_taps.is_contiguous(), "grad_taps: expected a dense tensor");
  active_kernels().norm_few_outputs_sums(
      {a, sums_of(sums, x), grad_taps.mutable_data_ptr<float>()});
}

void norm_few_outputs_gradient(const Tensor& x, const Tensor& tables, double negative_slope,
                               const Tensor& grad_y, const Tensor& taps, const Tensor& corrections,
                               Tensor grad_x) {
  void* out = buffer(grad_x, x, x.numel(), "grad_x");
  const float* correction = corrections_of(corrections, x);
  active_kernels().norm_few_outputs_gradient(
      {norm_few_outputs_of(x, tables, negative_slope, grad_y, taps, out), correction,
       correction + x.size(0) * x.size(3)});
}

}  // namespace
}  // namespace fdda

STABLE_TORCH_LIBRARY_IMPL(fdda, CPU, m) {
  m.impl("_upsample_differences", TORCH_BOX(&fdda::upsample_differences));
  m.impl("_upsample_sum", TORCH_BOX(&fdda::upsample_sum));
  m.impl("_upsample_reduce", TORCH_BOX(&fdda::upsample_reduce));
  m.impl("_upsample_adjoint", TORCH_BOX(&fdda::upsample_adjoint));
  m.impl("_gather_taps", TORCH_BOX(&fdda::gather_taps));
  m.impl("_sum_taps", TORCH_BOX(&fdda::sum_taps));
  m.impl("_add_parts", TORCH_BOX(&fdda::add_parts));
  m.impl("_norm_strip", TORCH_BOX(&fdda::norm_strip));
  m.impl("_norm_strip_sums", TORCH_BOX(&fdda::norm_strip_sums));
  m.impl("_norm_strip_gradient", TORCH_BOX(&fdda::norm_strip_gradient));
  m.impl("_norm_few_outputs_sums", TORCH_BOX(&fdda::norm_few_outputs_sums));
  m.impl("_norm_few_outputs_gradient", TORCH_BOX(&fdda::norm_few_outputs_gradient));
}
