// CUDA implementations of the packed operators: tensor checks and pointers, nothing numerical.
#include <cuda_runtime_api.h>

#include "../common/checks.h"
#include "gemm/gemm.h"
#include "packed.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

namespace fdda {
namespace {

using torch::stable::accelerator::DeviceGuard;

cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_device(const Tensor& t, const Tensor& x, const char* argument) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == x.get_device_index(), argument,
                  ": expected on the device of x");
}

// The weights are reordered at every call: the operator's schema has no place to keep them.
void run_conv(const PackedConv& conv, const Tensor& x) {
  const cudaStream_t stream = current_stream(x);
  if (!cuda::gemm_takes(conv)) return cuda::packed_conv2d(conv, stream);
  const int64_t depth = conv.kernel_h * conv.kernel_w * conv.channels;
  const int64_t bytes = cuda::gemm_weight_bytes(conv.bits, conv.out_channels, depth);
  Tensor memory = torch::stable::new_empty(x, {bytes}, ScalarType::Byte);
  const cuda::GemmWeights weights =
      cuda::gemm_weights(conv.bits, conv.out_channels, depth, memory.mutable_data_ptr<uint8_t>());
  cuda::reorder_weights(conv.weight, conv.bits, depth, weights, stream);
  cuda::conv_gemm(conv, weights, cuda::gemm_tile(conv), stream);
}

// The offsets are on the device: their range is the caller's to keep, see packed_conv2d in Python.
Tensor packed_conv2d(const Tensor& x_in, const Tensor& weight_in, int64_t bits,
                     int64_t out_channels, std::vector<int64_t> kernel_size,
                     std::vector<int64_t> stride, std::vector<int64_t> padding,
                     std::vector<int64_t> dilation, int64_t groups, int64_t x_zero_point,
                     const Tensor& weight_offset_in, const Tensor& multiplier, const Tensor& bias,
                     std::optional<Tensor> residual, double residual_scale,
                     std::optional<std::vector<int64_t>> output_range) {
  PackedConv p = conv_shape(x_in, bits, out_channels, kernel_size, stride, padding, dilation,
                            groups, x_zero_point);
  check_packed(weight_in, bits, out_channels, p.kernel_h * p.kernel_w * p.channels / groups);
  check_dtype(weight_offset_in, ScalarType::Long, "weight_offset");
  check_numel(weight_offset_in, out_channels, "weight_offset");
  for (const Tensor* t : {&weight_in, &weight_offset_in, &multiplier, &bias}) {
    check_device(*t, x_in, "weight, weight_offset, multiplier, bias");
  }
  if (residual) check_device(*residual, x_in, "residual");
  const DeviceGuard guard(x_in.get_device_index());
  const Tensor x = torch::stable::contiguous(x_in);
  const Tensor weight = torch::stable::contiguous(weight_in);
  const Tensor weight_offset = torch::stable::contiguous(weight_offset_in);
  EpilogueTensors e = make_epilogue(x, {p.batch, p.out_height, p.out_width, out_channels},
                                    multiplier, bias, residual, residual_scale, output_range);
  p.x = x.const_data_ptr<uint8_t>();
  p.weight = weight.const_data_ptr<uint8_t>();
  p.weight_offset = weight_offset.const_data_ptr<int64_t>();
  p.epilogue = e.view;
  run_conv(p, x);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return e.out;
}

Tensor packed_linear(const Tensor& x_in, const Tensor& weight_in, int64_t bits,
                     int64_t out_features, int64_t x_zero_point, const Tensor& weight_offset_in,
                     const Tensor& multiplier, const Tensor& bias, std::optional<Tensor> residual,
                     double residual_scale, std::optional<std::vector<int64_t>> output_range) {
  STD_TORCH_CHECK(x_in.dim() == 2, "x: expected [M, K], got ", x_in.dim(), " dimensions");
  const int64_t rows = x_in.size(0), depth = x_in.size(1);
  if (x_in.scalar_type() == ScalarType::Byte) {
    const Tensor pixels = torch::stable::view(torch::stable::contiguous(x_in), {rows, 1, 1, depth});
    const Tensor out = packed_conv2d(pixels, weight_in, bits, out_features, {1, 1}, {1, 1}, {0, 0},
                                     {1, 1}, 1, x_zero_point, weight_offset_in, multiplier, bias,
                                     residual, residual_scale, output_range);
    return torch::stable::view(out, {rows, out_features});
  }
  check_dtype(x_in, ScalarType::Int, "x");
  check_packed(weight_in, bits, out_features, depth);
  check_dtype(weight_offset_in, ScalarType::Long, "weight_offset");
  check_numel(weight_offset_in, out_features, "weight_offset");
  for (const Tensor* t : {&weight_in, &weight_offset_in, &multiplier, &bias}) {
    check_device(*t, x_in, "weight, weight_offset, multiplier, bias");
  }
  if (residual) check_device(*residual, x_in, "residual");
  const DeviceGuard guard(x_in.get_device_index());
  const Tensor x = torch::stable::contiguous(x_in);
  const Tensor weight = torch::stable::contiguous(weight_in);
  const Tensor weight_offset = torch::stable::contiguous(weight_offset_in);
  EpilogueTensors e = make_epilogue(x, {rows, out_features}, multiplier, bias, residual,
                                    residual_scale, output_range);
  cuda::packed_linear_s32({x.const_data_ptr<int32_t>(), rows, depth,
                           weight.const_data_ptr<uint8_t>(), static_cast<int>(bits), out_features,
                           x_zero_point, weight_offset.const_data_ptr<int64_t>(), e.view},
                          current_stream(x));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return e.out;
}

}  // namespace
}  // namespace fdda

STABLE_TORCH_LIBRARY_IMPL(fdda, CUDA, m) {
  m.impl("packed_conv2d", TORCH_BOX(&fdda::packed_conv2d));
  m.impl("packed_linear", TORCH_BOX(&fdda::packed_linear));
}
