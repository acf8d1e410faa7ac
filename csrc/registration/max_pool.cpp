// CPU passes of max_pool2d: checks and pointers, nothing numerical. Dense NHWC tensors.
#include "../common/pool_shape.h"
#include "layout.h"

namespace fdda {
namespace {

void check_outputs(const PoolShape& s, const Tensor& t, const char* argument) {
  check_numel(t, s.batch * s.out_height * s.out_width * s.channels, argument);
  STD_TORCH_CHECK(t.is_contiguous(), argument, ": expected a dense tensor");
}

PoolShape checked_shape(const Tensor& x, const char* argument, const Tensor& tap,
                        const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
                        const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                        bool ceil_mode) {
  const PoolShape s = pool_shape(x, kernel_size, stride, padding, dilation, ceil_mode);
  STD_TORCH_CHECK(x.is_contiguous(), argument, ": expected a dense tensor");
  STD_TORCH_CHECK(s.kernel_h * s.kernel_w <= 255, "kernel_size: expected at most 255 taps, got ",
                  s.kernel_h * s.kernel_w);
  check_dtype(tap, ScalarType::Byte, "tap");
  check_outputs(s, tap, "tap");
  return s;
}

void max_pool2d(const Tensor& x, Tensor y, Tensor tap, std::vector<int64_t> kernel_size,
                std::vector<int64_t> stride, std::vector<int64_t> padding,
                std::vector<int64_t> dilation, bool ceil_mode) {
  const PoolShape s = checked_shape(x, "x", tap, kernel_size, stride, padding, dilation, ceil_mode);
  check_dtype(y, x.scalar_type(), "y");
  check_outputs(s, y, "y");
  active_kernels().max_pool2d({s, float_dtype(x, "x"), x.const_data_ptr(), y.mutable_data_ptr(),
                               tap.mutable_data_ptr<uint8_t>()});
}

void max_pool2d_gradient(const Tensor& grad_y, const Tensor& tap, Tensor grad_x,
                         std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
                         std::vector<int64_t> padding, std::vector<int64_t> dilation,
                         bool ceil_mode) {
  const PoolShape s =
      checked_shape(grad_x, "grad_x", tap, kernel_size, stride, padding, dilation, ceil_mode);
  check_dtype(grad_y, grad_x.scalar_type(), "grad_y");
  check_outputs(s, grad_y, "grad_y");
  active_kernels().max_pool2d_gradient({s, float_dtype(grad_x, "grad_x"), grad_y.const_data_ptr(),
                                        tap.const_data_ptr<uint8_t>(), grad_x.mutable_data_ptr()});
}

}  // namespace
}  // namespace fdda

STABLE_TORCH_LIBRARY_IMPL(fdda, CPU, m) {
  m.impl("_max_pool2d", TORCH_BOX(&fdda::max_pool2d));
  m.impl("_max_pool2d_gradient", TORCH_BOX(&fdda::max_pool2d_gradient));
}
