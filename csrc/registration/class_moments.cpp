// CPU implementations of the moments operators: checks and pointers, nothing numerical.
#include <tuple>

#include "norm.h"

namespace fdda {
namespace {

Tensor checked_labels(const Tensor& labels, int64_t batch, int64_t num_classes) {
  check_dtype(labels, ScalarType::Long, "labels");
  check_numel(labels, batch, "labels");
  const Tensor dense_labels = torch::stable::contiguous(labels);
  const int64_t* label = dense_labels.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < batch; ++i) {
    STD_TORCH_CHECK(label[i] >= 0 && label[i] < num_classes, "labels: expected 0 to ",
                    num_classes - 1, ", got ", label[i]);
  }
  return dense_labels;
}

// y is laid out like l.x and may be null.
std::tuple<Tensor, Tensor, Tensor> moments_of(const MomentsLayout& l, const Tensor& labels_in,
                                              int64_t num_classes, const BnRelu* norm, void* y) {
  STD_TORCH_CHECK(num_classes >= 0, "num_classes: expected >= 0, got ", num_classes);
  const Tensor labels = checked_labels(labels_in, l.batch, num_classes);
  Tensor mean = torch::stable::new_empty(l.x, {num_classes, l.channels}, ScalarType::Float);
  Tensor var = torch::stable::new_empty(l.x, {num_classes, l.channels}, ScalarType::Float);
  Tensor count = torch::stable::new_empty(l.x, {num_classes}, ScalarType::Long);
  active_kernels().class_moments(
      {float_dtype(l.x, "x"), l.x.const_data_ptr(), l.batch, l.channels, l.inner, l.channels_last,
       labels.const_data_ptr<int64_t>(), num_classes, mean.mutable_data_ptr<float>(),
       var.mutable_data_ptr<float>(), count.mutable_data_ptr<int64_t>(), norm, y});
  return {mean, var, count};
}

// Gradient of x through the moments and, with `norm`, through y.
Tensor moments_gradient(const MomentsLayout& l, const Tensor& x, const Tensor& labels_in,
                        const Tensor& grad_mean_in, const Tensor& grad_var_in,
                        const Tensor& mean_in, const Tensor& count_in, const BnRelu* norm,
                        const Tensor* grad_y_in) {
  const int64_t num_classes = count_in.numel();
  const Tensor labels = checked_labels(labels_in, l.batch, num_classes);
  const auto table = [&](const Tensor& t, const char* argument) {
    check_dtype(t, ScalarType::Float, argument);
    check_numel(t, num_classes * l.channels, argument);
    return torch::stable::contiguous(t);
  };
  const Tensor grad_mean = table(grad_mean_in, "grad_mean");
  const Tensor grad_var = table(grad_var_in, "grad_var");
  const Tensor mean = table(mean_in, "mean");
  check_dtype(count_in, ScalarType::Long, "count");
  const Tensor count = torch::stable::contiguous(count_in);
  Tensor grad_x = torch::stable::empty_like(l.x);
  std::optional<Tensor> grad_y;
  if (grad_y_in) {
    check_dtype(*grad_y_in, x.scalar_type(), "grad_y");
    check_numel(*grad_y_in, x.numel(), "grad_y");
    grad_y = with_strides_of(l.x, *grad_y_in);
  }
  active_kernels().class_moments_backward(
      {float_dtype(x, "x"), l.x.const_data_ptr(), grad_x.mutable_data_ptr(), l.batch, l.channels,
       l.inner, l.channels_last, labels.const_data_ptr<int64_t>(),
       grad_mean.const_data_ptr<float>(), grad_var.const_data_ptr<float>(),
       mean.const_data_ptr<float>(), count.const_data_ptr<int64_t>(), norm,
       grad_y ? grad_y->const_data_ptr() : nullptr});
  return as_caller(l, x, grad_x);
}

std::tuple<Tensor, Tensor, Tensor> class_moments(const Tensor& x, const Tensor& labels,
                                                 int64_t num_classes) {
  return moments_of(moments_layout(x), labels, num_classes, nullptr, nullptr);
}

Tensor class_moments_backward(const Tensor& grad_mean, const Tensor& grad_var, const Tensor& x,
                              const Tensor& labels, const Tensor& mean, const Tensor& count) {
  return moments_gradient(moments_layout(x), x, labels, grad_mean, grad_var, mean, count, nullptr,
                          nullptr);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_relu_class_moments(
    const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& running_mean,
    const Tensor& running_var, double eps, const Tensor& labels, int64_t num_classes, double low,
    double high) {
  const MomentsLayout l = moments_layout(x);
  const FoldedNorm norm(weight, bias, running_mean, running_var, eps, low, high, l.channels);
  Tensor y = torch::stable::empty_like(l.x);
  const auto [mean, var, count] =
      moments_of(l, labels, num_classes, &norm.view, y.mutable_data_ptr());
  return {as_caller(l, x, y), mean, var, count};
}

Tensor bn_relu_class_moments_backward(const Tensor& grad_y, const Tensor& grad_mean,
                                      const Tensor& grad_var, const Tensor& x, const Tensor& weight,
                                      const Tensor& bias, const Tensor& running_mean,
                                      const Tensor& running_var, double eps, const Tensor& labels,
                                      const Tensor& mean, const Tensor& count, double low,
                                      double high) {
  const MomentsLayout l = moments_layout(x);
  const FoldedNorm norm(weight, bias, running_mean, running_var, eps, low, high, l.channels);
  return moments_gradient(l, x, labels, grad_mean, grad_var, mean, count, &norm.view, &grad_y);
}

}  // namespace
}  // namespace fdda

STABLE_TORCH_LIBRARY_IMPL(fdda, CPU, m) {
  m.impl("class_moments", TORCH_BOX(&fdda::class_moments));
  m.impl("class_moments_backward", TORCH_BOX(&fdda::class_moments_backward));
  m.impl("bn_relu_class_moments", TORCH_BOX(&fdda::bn_relu_class_moments));
  m.impl("bn_relu_class_moments_backward", TORCH_BOX(&fdda::bn_relu_class_moments_backward));
}
