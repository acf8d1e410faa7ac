// CPU implementation of batch norm with fake quantisation: checks and pointers, nothing numerical.
#include <tuple>

#include "norm.h"

namespace fdda {
namespace {

float one_value(const Tensor& t, const char* argument) {
  check_dtype(t, ScalarType::Float, argument);
  check_numel(t, 1, argument);
  return *t.const_data_ptr<float>();
}

ChannelView channel_view(const MomentsLayout& l) {
  if (l.x.numel() == 0) return {0, 0, 0};
  if (l.channels_last) return {l.batch * l.inner, l.channels, 1};
  return {l.batch, l.channels, l.inner};
}

// The residual with the strides of l.x, or nothing.
std::optional<Tensor> laid_out(const MomentsLayout& l, const std::optional<Tensor>& residual) {
  if (!residual) return std::nullopt;
  return companion(l, *residual, "residual");
}

BnReluFakeQuantize kernel_args(const MomentsLayout& l, const std::optional<Tensor>& residual,
                               const Tensor& y, const FoldedNorm& norm, const Tensor& x_min,
                               const Tensor& x_max, int64_t bits) {
  STD_TORCH_CHECK(bits >= 1 && bits <= 16, "bits: expected 1 to 16, got ", bits);
  return {float_dtype(l.x, "x"),
          l.x.const_data_ptr(),
          residual ? residual->const_data_ptr() : nullptr,
          y.mutable_data_ptr(),
          channel_view(l),
          norm.view,
          one_value(x_min, "x_min"),
          one_value(x_max, "x_max"),
          static_cast<int>(bits)};
}

Tensor bn_relu_fake_quantize(const Tensor& x, const Tensor& weight, const Tensor& bias,
                             const Tensor& running_mean, const Tensor& running_var, double eps,
                             const Tensor& x_min, const Tensor& x_max, int64_t bits, double low,
                             double high, const std::optional<Tensor>& residual_in, bool) {
  const MomentsLayout l = moments_layout(x);
  const FoldedNorm norm(weight, bias, running_mean, running_var, eps, low, high, l.channels);
  const std::optional<Tensor> residual = laid_out(l, residual_in);
  Tensor y = torch::stable::empty_like(l.x);
  active_kernels().bn_relu_fake_quantize(kernel_args(l, residual, y, norm, x_min, x_max, bits));
  return as_caller(l, x, y);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bn_relu_fake_quantize_backward(
    const Tensor& grad_in, const Tensor& x, const Tensor& weight, const Tensor& bias,
    const Tensor& running_mean, const Tensor& running_var, double eps, const Tensor& x_min,
    const Tensor& x_max, int64_t bits, double low, double high,
    const std::optional<Tensor>& residual_in, bool clipped, bool range) {
  const MomentsLayout l = moments_layout(x);
  const FoldedNorm norm(weight, bias, running_mean, running_var, eps, low, high, l.channels);
  const std::optional<Tensor> residual = laid_out(l, residual_in);
  const Tensor grad = checked_grad(grad_in, l.x);
  Tensor grad_x = torch::stable::empty_like(l.x);
  Tensor grad_residual = wanted_like(l.x, residual.has_value());
  Tensor grad_weight = torch::stable::new_empty(x, {l.channels}, ScalarType::Float);
  Tensor grad_bias = torch::stable::new_empty(x, {l.channels}, ScalarType::Float);
  Tensor grad_x_min = wanted_like(x_min, range), grad_x_max = wanted_like(x_max, range);
  active_kernels().bn_relu_fake_quantize_backward(
      {kernel_args(l, residual, grad_x, norm, x_min, x_max, bits), grad.const_data_ptr(), clipped,
       range, l.channels, norm.mean(), norm.inv_std(), grad_residual.mutable_data_ptr(),
       grad_weight.mutable_data_ptr<float>(), grad_bias.mutable_data_ptr<float>(),
       grad_x_min.mutable_data_ptr<float>(), grad_x_max.mutable_data_ptr<float>()});
  return {as_caller(l, x, grad_x),
          residual ? as_caller(l, x, grad_residual) : grad_residual,
          grad_weight,
          grad_bias,
          grad_x_min,
          grad_x_max};
}

}  // namespace
}  // namespace fdda

STABLE_TORCH_LIBRARY_IMPL(fdda, CPU, m) {
  m.impl("bn_relu_fake_quantize", TORCH_BOX(&fdda::bn_relu_fake_quantize));
  m.impl("bn_relu_fake_quantize_backward", TORCH_BOX(&fdda::bn_relu_fake_quantize_backward));
}
