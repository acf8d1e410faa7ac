// CPU implementations of the fake quantisation operators: checks and pointers, nothing numerical.
#include <tuple>

#include "layout.h"

namespace fdda {
namespace {

ChannelView channel_view(const Tensor& x, std::optional<int64_t> axis) {
  if (x.numel() == 0) return {0, 0, 0};
  if (!axis) return {1, 1, x.numel()};
  STD_TORCH_CHECK(*axis >= 0 && *axis < x.dim(), "axis: expected 0 to ", x.dim() - 1, ", got ",
                  *axis);
  ChannelView view{1, x.size(*axis), 1};
  if (view.channels == 1) return {1, 1, x.numel()};
  bool inside = false;
  const std::vector<int64_t> order = *dense_order(x);
  for (int64_t d : order) {
    if (d == *axis) {
      inside = true;
    } else {
      (inside ? view.inner : view.outer) *= x.size(d);
    }
  }
  return view;
}

Tensor channel_values(const Tensor& t, const Tensor& x, std::optional<int64_t> axis,
                      const char* argument) {
  return float_values(t, axis ? x.size(*axis) : 1, argument);
}

FakeQuantize fake_quantize_args(const Tensor& x, const Tensor& y, const Tensor& scale,
                                const Tensor& zero_point, int64_t quant_min, int64_t quant_max,
                                std::optional<int64_t> axis) {
  return {float_dtype(x, "x"),           x.const_data_ptr(),
          y.mutable_data_ptr(),          channel_view(x, axis),
          scale.const_data_ptr<float>(), zero_point.const_data_ptr<float>(),
          static_cast<float>(quant_min), static_cast<float>(quant_max)};
}

Tensor fake_quantize(const Tensor& x_in, const Tensor& scale_in, const Tensor& zero_point_in,
                     int64_t quant_min, int64_t quant_max, std::optional<int64_t> axis, bool) {
  const Tensor x = dense(x_in);
  const Tensor scale = channel_values(scale_in, x, axis, "scale");
  const Tensor zero_point = channel_values(zero_point_in, x, axis, "zero_point");
  Tensor y = torch::stable::empty_like(x);
  active_kernels().fake_quantize(
      fake_quantize_args(x, y, scale, zero_point, quant_min, quant_max, axis));
  return y;
}

float* pointer_or_null(const Tensor& t, bool wanted) {
  return wanted ? t.mutable_data_ptr<float>() : nullptr;
}

std::tuple<Tensor, Tensor, Tensor> fake_quantize_backward(const Tensor& grad_in, const Tensor& x_in,
                                                          const Tensor& scale_in,
                                                          const Tensor& zero_point_in,
                                                          int64_t quant_min, int64_t quant_max,
                                                          std::optional<int64_t> axis, bool clipped,
                                                          bool parameters) {
  const Tensor x = dense(x_in);
  const Tensor grad = checked_grad(grad_in, x);
  const Tensor scale = channel_values(scale_in, x, axis, "scale");
  const Tensor zero_point = channel_values(zero_point_in, x, axis, "zero_point");
  Tensor grad_x = wanted_like(x, clipped);
  Tensor grad_scale = wanted_like(scale, parameters);
  Tensor grad_zero_point = wanted_like(zero_point, parameters);
  FakeQuantizeBackward a{
      fake_quantize_args(x, grad_x, scale, zero_point, quant_min, quant_max, axis),
      grad.const_data_ptr(), scale.numel(), pointer_or_null(grad_scale, parameters),
      pointer_or_null(grad_zero_point, parameters)};
  if (!clipped) a.forward.y = nullptr;
  if (clipped || parameters) active_kernels().fake_quantize_backward(a);
  return {grad_x, grad_scale, grad_zero_point};
}

void check_fake_bits(int64_t bits) {
  STD_TORCH_CHECK(bits >= 1 && bits <= 16, "bits: expected 1 to 16, got ", bits);
}

Tensor fake_quantize_range(const Tensor& x_in, const Tensor& x_min_in, const Tensor& x_max_in,
                           int64_t bits, std::optional<int64_t> axis, bool) {
  check_fake_bits(bits);
  const Tensor x = dense(x_in);
  const Tensor x_min = channel_values(x_min_in, x, axis, "x_min");
  const Tensor x_max = channel_values(x_max_in, x, axis, "x_max");
  Tensor y = torch::stable::empty_like(x);
  active_kernels().fake_quantize_range(
      {float_dtype(x, "x"), x.const_data_ptr(), y.mutable_data_ptr(), channel_view(x, axis),
       x_min.const_data_ptr<float>(), x_max.const_data_ptr<float>(), static_cast<int>(bits)});
  return y;
}

std::tuple<Tensor, Tensor, Tensor> fake_quantize_range_backward(
    const Tensor& grad_in, const Tensor& x_in, const Tensor& x_min_in, const Tensor& x_max_in,
    int64_t bits, std::optional<int64_t> axis, bool clipped, bool ends) {
  check_fake_bits(bits);
  const Tensor x = dense(x_in);
  const Tensor grad = checked_grad(grad_in, x);
  const Tensor x_min = channel_values(x_min_in, x, axis, "x_min");
  const Tensor x_max = channel_values(x_max_in, x, axis, "x_max");
  Tensor grad_x = wanted_like(x, clipped);
  Tensor grad_x_min = wanted_like(x_min, ends);
  Tensor grad_x_max = wanted_like(x_max, ends);
  FakeQuantizeRangeBackward a{
      {float_dtype(x, "x"), x.const_data_ptr(), clipped ? grad_x.mutable_data_ptr() : nullptr,
       channel_view(x, axis), x_min.const_data_ptr<float>(), x_max.const_data_ptr<float>(),
       static_cast<int>(bits)},
      grad.const_data_ptr(),
      x_min.numel(),
      pointer_or_null(grad_x_min, ends),
      pointer_or_null(grad_x_max, ends)};
  if (clipped || ends) active_kernels().fake_quantize_range_backward(a);
  return {grad_x, grad_x_min, grad_x_max};
}

std::tuple<Tensor, Tensor> observe_range(const Tensor& x_in, const Tensor& x_min_in,
                                         const Tensor& x_max_in, double keep, bool include_zero) {
  const Tensor x = dense(x_in);
  STD_TORCH_CHECK(x.numel() > 0, "x: expected at least one element");
  const Tensor x_min = channel_values(x_min_in, x, std::nullopt, "x_min");
  const Tensor x_max = channel_values(x_max_in, x, std::nullopt, "x_max");
  Tensor new_min = torch::stable::empty_like(x_min), new_max = torch::stable::empty_like(x_max);
  active_kernels().observe_range({float_dtype(x, "x"), x.const_data_ptr(), x.numel(),
                                  x_min.const_data_ptr<float>(), x_max.const_data_ptr<float>(),
                                  keep, include_zero, new_min.mutable_data_ptr<float>(),
                                  new_max.mutable_data_ptr<float>()});
  return {new_min, new_max};
}

Tensor fake_quantize_minmax(const Tensor& x_in, int64_t bits, std::optional<int64_t> axis) {
  check_fake_bits(bits);
  const Tensor x = dense(x_in);
  Tensor y = torch::stable::empty_like(x);
  active_kernels().fake_quantize_range({float_dtype(x, "x"), x.const_data_ptr(),
                                        y.mutable_data_ptr(), channel_view(x, axis), nullptr,
                                        nullptr, static_cast<int>(bits)});
  return y;
}

}  // namespace
}  // namespace fdda

STABLE_TORCH_LIBRARY_IMPL(fdda, CPU, m) {
  m.impl("fake_quantize", TORCH_BOX(&fdda::fake_quantize));
  m.impl("fake_quantize_backward", TORCH_BOX(&fdda::fake_quantize_backward));
  m.impl("fake_quantize_range", TORCH_BOX(&fdda::fake_quantize_range));
  m.impl("fake_quantize_range_backward", TORCH_BOX(&fdda::fake_quantize_range_backward));
  m.impl("observe_range", TORCH_BOX(&fdda::observe_range));
  m.impl("fake_quantize_minmax", TORCH_BOX(&fdda::fake_quantize_minmax));
}
