// The operators on codes: tensors to the arguments of a kernel, `run`, of either device.
#pragma once

#include "pool_shape.h"

namespace fdda {

template <class Run>
Tensor quantize_with(const Tensor& x, double scale, double zero_point, int64_t bits, Run run) {
  check_bits(bits);
  check_dtype(x, ScalarType::Float, "x");
  STD_TORCH_CHECK(x.dim() == 2 || x.dim() == 4, "x: expected [N, C] or [N, C, H, W], got ", x.dim(),
                  " dimensions");
  const bool image = x.dim() == 4;
  Quantize a{};
  a.x = x.const_data_ptr<float>();
  a.batch = x.size(0);
  a.channels = x.size(1);
  a.height = image ? x.size(2) : 1;
  a.width = image ? x.size(3) : 1;
  a.stride_n = x.stride(0);
  a.stride_c = x.stride(1);
  a.stride_h = image ? x.stride(2) : 0;
  a.stride_w = image ? x.stride(3) : 0;
  a.scale = static_cast<float>(scale);
  a.zero_point = static_cast<float>(zero_point);
  a.bits = static_cast<int>(bits);
  const std::vector<int64_t> size =
      image ? std::vector<int64_t>{a.batch, a.height, a.width, a.channels}
            : std::vector<int64_t>{a.batch, a.channels};
  Tensor out = torch::stable::new_empty(x, size, ScalarType::Byte);
  a.out = out.mutable_data_ptr<uint8_t>();
  run(a);
  return out;
}

template <class Run>
Tensor requantize_codes_with(const Tensor& x_in, double x_scale, int64_t x_zero_point, double scale,
                             double zero_point, int64_t bits, Run run) {
  check_bits(bits);
  check_dtype(x_in, ScalarType::Byte, "x");
  const Tensor x = torch::stable::contiguous(x_in);
  Tensor out = torch::stable::empty_like(x);
  run(RequantizeCodes{x.const_data_ptr<uint8_t>(), x.numel(), static_cast<float>(x_scale),
                      static_cast<float>(x_zero_point), static_cast<float>(scale),
                      static_cast<float>(zero_point), static_cast<int>(bits),
                      out.mutable_data_ptr<uint8_t>()});
  return out;
}

template <class Run>
Tensor max_pool2d_codes_with(const Tensor& x_in, const std::vector<int64_t>& kernel_size,
                             const std::vector<int64_t>& stride,
                             const std::vector<int64_t>& padding,
                             const std::vector<int64_t>& dilation, bool ceil_mode, Run run) {
  check_dtype(x_in, ScalarType::Byte, "x");
  STD_TORCH_CHECK(x_in.dim() == 4, "x: expected [N, H, W, C], got ", x_in.dim(), " dimensions");
  const Tensor x = torch::stable::contiguous(x_in);
  const PoolShape shape = pool_shape(x, kernel_size, stride, padding, dilation, ceil_mode);
  Tensor out =
      torch::stable::new_empty(x, {shape.batch, shape.out_height, shape.out_width, shape.channels});
  run(MaxPool{shape, x.const_data_ptr<uint8_t>(), out.mutable_data_ptr<uint8_t>()});
  return out;
}

template <class Run>
Tensor sum_pool_codes_with(const Tensor& x_in, Run run) {
  check_dtype(x_in, ScalarType::Byte, "x");
  STD_TORCH_CHECK(x_in.dim() == 4, "x: expected [N, H, W, C], got ", x_in.dim(), " dimensions");
  const Tensor x = torch::stable::contiguous(x_in);
  const int64_t batch = x.size(0), channels = x.size(3);
  Tensor out = torch::stable::new_empty(x, {batch, channels}, ScalarType::Int);
  run(SumPool{x.const_data_ptr<uint8_t>(), batch, x.size(1) * x.size(2), channels,
              out.mutable_data_ptr<int32_t>()});
  return out;
}

}  // namespace fdda
