// CPU passes of linear_to_maps: checks and pointers, nothing numerical. Dense tensors.
#include "layout.h"

namespace fdda {
namespace {

void check_floats(const Tensor& t, int64_t numel, const char* argument) {
  check_dtype(t, ScalarType::Float, argument);
  check_numel(t, numel, argument);
  STD_TORCH_CHECK(t.is_contiguous(), argument, ": expected a dense tensor");
}

// `maps`: [N, H, W, C]. `weight` and `bias` are values or gradients.
void check_shapes(const Tensor& z, const Tensor& maps, const char* argument, const Tensor& weight,
                  const Tensor& bias) {
  STD_TORCH_CHECK(maps.dim() == 4 && maps.is_contiguous(), argument,
                  ": expected a dense [N, H, W, C]");
  STD_TORCH_CHECK(z.dim() == 2 && z.size(0) == maps.size(0),
                  "z: expected [N, K] with N = ", maps.size(0));
  const int64_t outputs = maps.size(1) * maps.size(2) * maps.size(3);
  check_floats(z, z.numel(), "z");
  check_floats(weight, outputs * z.size(1), "weight");
  check_floats(bias, outputs, "bias");
}

void linear_maps(const Tensor& z, const Tensor& weight, const Tensor& bias, Tensor y) {
  check_shapes(z, y, "y", weight, bias);
  active_kernels().linear_maps({float_dtype(y, "y"), y.size(0), z.size(1), y.size(3),
                                y.size(1) * y.size(2), z.const_data_ptr<float>(),
                                weight.const_data_ptr<float>(), bias.const_data_ptr<float>(),
                                y.mutable_data_ptr()});
}

void linear_maps_gradient(const Tensor& grad_y, const Tensor& z, Tensor grad_weight,
                          Tensor grad_bias) {
  check_shapes(z, grad_y, "grad_y", grad_weight, grad_bias);
  active_kernels().linear_maps_gradient(
      {float_dtype(grad_y, "grad_y"), z.size(0), z.size(1), grad_y.size(3),
       grad_y.size(1) * grad_y.size(2), grad_y.const_data_ptr(), z.const_data_ptr<float>(),
       grad_weight.mutable_data_ptr<float>(), grad_bias.mutable_data_ptr<float>()});
}

}  // namespace
}  // namespace fdda

STABLE_TORCH_LIBRARY_IMPL(fdda, CPU, m) {
  m.impl("_linear_maps", TORCH_BOX(&fdda::linear_maps));
  m.impl("_linear_maps_gradient", TORCH_BOX(&fdda::linear_maps_gradient));
}
