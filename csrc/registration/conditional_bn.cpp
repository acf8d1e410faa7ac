// CPU implementation of conditional_bn_lrelu: checks and pointers, nothing numerical.
#include <tuple>

#include "moments_layout.h"

namespace fdda {
namespace {

// The group of each sample, from the sizes of consecutive groups.
std::vector<int64_t> groups_of(const std::vector<int64_t>& sizes, int64_t batch) {
  std::vector<int64_t> group;
  for (size_t g = 0; g < sizes.size(); ++g) {
    STD_TORCH_CHECK(sizes[g] >= 0 && sizes[g] <= batch, "groups: expected sizes of 0 to ", batch,
                    ", got ", sizes[g]);
    group.insert(group.end(), sizes[g], g);
  }
  STD_TORCH_CHECK(static_cast<int64_t>(group.size()) == batch, "groups: expected a sum of ", batch,
                  ", got ", group.size());
  return group;
}

std::tuple<Tensor, Tensor, Tensor> conditional_bn_lrelu(const Tensor& x, const Tensor& labels_in,
                                                        const Tensor& weight_in,
                                                        const Tensor& bias_in,
                                                        std::vector<int64_t> sizes, double eps,
                                                        double negative_slope) {
  const MomentsLayout l = moments_layout(x);
  const int64_t num_classes = weight_in.size(0), num_groups = sizes.size();
  const Tensor labels = checked_labels(labels_in, l.batch, num_classes);
  const Tensor weight = float_values(weight_in, num_classes * l.channels, "weight");
  const Tensor bias = float_values(bias_in, num_classes * l.channels, "bias");
  const std::vector<int64_t> group = groups_of(sizes, l.batch);
  Tensor y = torch::stable::empty_like(l.x);
  Tensor mean = torch::stable::new_empty(x, {num_groups, l.channels}, ScalarType::Float);
  Tensor var = torch::stable::new_empty(x, {num_groups, l.channels}, ScalarType::Float);
  std::vector<int64_t> count(num_groups);
  const Dtype dtype = float_dtype(x, "x");
  const void* values = l.x.const_data_ptr();
  active_kernels().class_moments({dtype, values, l.batch, l.channels, l.inner, l.channels_last,
                                  group.data(), num_groups, mean.mutable_data_ptr<float>(),
                                  var.mutable_data_ptr<float>(), count.data(), nullptr, nullptr,
                                  nullptr});
  if (x.numel() > 0) {
    active_kernels().conditional_bn(
        {dtype, values, y.mutable_data_ptr(), l.batch, l.channels, l.inner, l.channels_last,
         labels.const_data_ptr<int64_t>(), group.data(), mean.const_data_ptr<float>(),
         var.const_data_ptr<float>(), weight.const_data_ptr<float>(), bias.const_data_ptr<float>(),
         eps, static_cast<float>(negative_slope)});
  }
  return {as_caller(l, x, y), mean, var};
}

std::tuple<Tensor, Tensor, Tensor> conditional_bn_lrelu_backward(
    const Tensor& grad_y_in, const Tensor& x, const Tensor& labels_in, const Tensor& weight_in,
    const Tensor& bias_in, const Tensor& mean_in, const Tensor& var_in, std::vector<int64_t> sizes,
    double eps, double negative_slope) {
  const MomentsLayout l = moments_layout(x);
  const int64_t num_classes = weight_in.size(0), num_groups = sizes.size();
  const Tensor labels = checked_labels(labels_in, l.batch, num_classes);
  const Tensor weight = float_values(weight_in, num_classes * l.channels, "weight");
  const Tensor bias = float_values(bias_in, num_classes * l.channels, "bias");
  const Tensor mean = float_values(mean_in, num_groups * l.channels, "mean");
  const Tensor var = float_values(var_in, num_groups * l.channels, "var");
  const std::vector<int64_t> group = groups_of(sizes, l.batch);
  const Tensor grad_y = companion(l, grad_y_in, "grad_y");
  Tensor grad_x = torch::stable::empty_like(l.x);
  Tensor grad_weight = torch::stable::empty_like(weight);
  Tensor grad_bias = torch::stable::empty_like(bias);
  if (x.numel() > 0) {
    active_kernels().conditional_bn_backward(
        {{float_dtype(x, "x"), l.x.const_data_ptr(), grad_x.mutable_data_ptr(), l.batch, l.channels,
          l.inner, l.channels_last, labels.const_data_ptr<int64_t>(), group.data(),
          mean.const_data_ptr<float>(), var.const_data_ptr<float>(), weight.const_data_ptr<float>(),
          bias.const_data_ptr<float>(), eps, static_cast<float>(negative_slope)},
         grad_y.const_data_ptr(),
         num_classes,
         num_groups,
         sizes.data(),
         grad_weight.mutable_data_ptr<float>(),
         grad_bias.mutable_data_ptr<float>()});
  } else {
    torch::stable::zero_(grad_weight);
    torch::stable::zero_(grad_bias);
  }
  return {as_caller(l, x, grad_x), grad_weight, grad_bias};
}

}  // namespace
}  // namespace fdda

STABLE_TORCH_LIBRARY_IMPL(fdda, CPU, m) {
  m.impl("conditional_bn_lrelu", TORCH_BOX(&fdda::conditional_bn_lrelu));
  m.impl("conditional_bn_lrelu_backward", TORCH_BOX(&fdda::conditional_bn_lrelu_backward));
}
