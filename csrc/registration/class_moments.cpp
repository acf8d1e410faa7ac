// CPU implementations of the moments operators: checks and pointers, nothing numerical.
#include <tuple>

#include "norm.h"

namespace fdda {
namespace {

// y and residual are laid out like l.x and may be null.
std::tuple<Tensor, Tensor, Tensor> moments_of(const MomentsLayout& l, const Tensor& labels_in,
                                              int64_t num_classes, const BnRelu* norm,
                                              const void* residual, void* y) {
  STD_TORCH_CHECK(num_classes >= 0, "num_classes: expected >= 0, got ", num_classes);
  const Tensor labels = checked_labels(labels_in, l.batch, num_classes);
  Tensor mean = torch::stable::new_empty(l.x, {num_classes, l.channels}, ScalarType::Float);
  Tensor var = torch::stable::new_empty(l.x, {num_classes, l.channels}, ScalarType::Float);
  Tensor count = torch::stable::new_empty(l.x, {num_classes}, ScalarType::Long);
  active_kernels().class_moments(
      {float_dtype(l.x, "x"), l.x.const_data_ptr(), l.batch, l.channels, l.inner, l.channels_last,
       labels.const_data_ptr<int64_t>(), num_classes, mean.mutable_data_ptr<float>(),
       var.mutable_data_ptr<float>(), count.mutable_data_ptr<int64_t>(), norm, residual, y});
  return {mean, var, count};
}

const void* pointer(const std::optional<Tensor>& t) { return t ? t->const_data_ptr() : nullptr; }

// What bn_relu adds to a gradient: grad_y and residual have the layout of l.x, grad_residual
// receives the residual's gradient.
struct NormGradient {
  const BnRelu* norm = nullptr;
  const void* grad_y = nullptr;
  const void* residual = nullptr;
  void* grad_residual = nullptr;
};

// Gradient of x through the moments and, with g.norm, through y.
Tensor moments_gradient(const MomentsLayout& l, const Tensor& x, const Tensor& labels_in,
                        const Tensor& grad_mean_in, const Tensor& grad_var_in,
                        const Tensor& mean_in, const Tensor& count_in, const NormGradient& g) {
  const int64_t num_classes = count_in.numel();
  const Tensor labels = checked_labels(labels_in, l.batch, num_classes);
  const int64_t size = num_classes * l.channels;
  const Tensor grad_mean = float_values(grad_mean_in, size, "grad_mean");
  const Tensor grad_var = float_values(grad_var_in, size, "grad_var");
  const Tensor mean = float_values(mean_in, size, "mean");
  check_dtype(count_in, ScalarType::Long, "count");
  const Tensor count = torch::stable::contiguous(count_in);
  Tensor grad_x = torch::stable::empty_like(l.x);
  active_kernels().class_moments_backward(
      {float_dtype(x, "x"), l.x.const_data_ptr(), grad_x.mutable_data_ptr(), l.batch, l.channels,
       l.inner, l.channels_last, labels.const_data_ptr<int64_t>(),
       grad_mean.const_data_ptr<float>(), grad_var.const_data_ptr<float>(),
       mean.const_data_ptr<float>(), count.const_data_ptr<int64_t>(), g.norm, g.residual, g.grad_y,
       g.grad_residual});
  return as_caller(l, x, grad_x);
}

std::tuple<Tensor, Tensor, Tensor> class_moments(const Tensor& x, const Tensor& labels,
                                                 int64_t num_classes) {
  return moments_of(moments_layout(x), labels, num_classes, nullptr, nullptr, nullptr);
}

Tensor class_moments_backward(const Tensor& grad_mean, const Tensor& grad_var, const Tensor& x,
                              const Tensor& labels, const Tensor& mean, const Tensor& count) {
  return moments_gradient(moments_layout(x), x, labels, grad_mean, grad_var, mean, count, {});
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_relu_class_moments(
    const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& running_mean,
    const Tensor& running_var, double eps, const Tensor& labels, int64_t num_classes, double low,
    double high, std::optional<Tensor> residual) {
  const MomentsLayout l = moments_layout(x);
  const FoldedNorm norm(weight, bias, running_mean, running_var, eps, low, high, l.channels);
  if (residual) residual = companion(l, *residual, "residual");
  Tensor y = torch::stable::empty_like(l.x);
  const auto [mean, var, count] =
      moments_of(l, labels, num_classes, &norm.view, pointer(residual), y.mutable_data_ptr());
  return {as_caller(l, x, y), mean, var, count};
}

// The second result is empty without residual.
std::tuple<Tensor, Tensor> bn_relu_class_moments_backward(
    const Tensor& grad_y_in, const Tensor& grad_mean, const Tensor& grad_var, const Tensor& x,
    const Tensor& weight, const Tensor& bias, const Tensor& running_mean, const Tensor& running_var,
    double eps, const Tensor& labels, const Tensor& mean, const Tensor& count, double low,
    double high, std::optional<Tensor> residual) {
  const MomentsLayout l = moments_layout(x);
  const FoldedNorm norm(weight, bias, running_mean, running_var, eps, low, high, l.channels);
  const Tensor grad_y = companion(l, grad_y_in, "grad_y");
  NormGradient g{&norm.view, grad_y.const_data_ptr()};
  Tensor grad_residual =
      residual ? torch::stable::empty_like(l.x) : torch::stable::new_empty(x, {0});
  if (residual) {
    residual = companion(l, *residual, "residual");
    g.residual = pointer(residual);
    g.grad_residual = grad_residual.mutable_data_ptr();
  }
  const Tensor grad_x = moments_gradient(l, x, labels, grad_mean, grad_var, mean, count, g);
  return {grad_x, residual ? as_caller(l, x, grad_residual) : grad_residual};
}

}  // namespace
}  // namespace fdda

STABLE_TORCH_LIBRARY_IMPL(fdda, CPU, m) {
  m.impl("class_moments", TORCH_BOX(&fdda::class_moments));
  m.impl("class_moments_backward", TORCH_BOX(&fdda::class_moments_backward));
  m.impl("bn_relu_class_moments", TORCH_BOX(&fdda::bn_relu_class_moments));
  m.impl("bn_relu_class_moments_backward", TORCH_BOX(&fdda::bn_relu_class_moments_backward));
}
