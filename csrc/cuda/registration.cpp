// CUDA implementations of the packed operators: tensor checks and pointers, nothing numerical.
#include <cuda_runtime_api.h>

#include "../common/code_operators.h"
#include "codes.h"
#include "packed.h"
#include "pools.h"
#include "reordered.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

namespace fdda {
namespace {

using torch::stable::accelerator::DeviceGuard;

// Calls run(stream) for the current stream of the tensor's device. Nothing here or in the kernels
// waits for the device, and all memory is torch's: CUDA graphs can capture the operators.
template <class Run>
void on_stream(const Tensor& t, Run run) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  run(static_cast<cudaStream_t>(stream));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// The same with a kernel's arguments, for code_operators.h.
template <class Arguments>
auto on_stream_of(const Tensor& x, void (*kernel)(const Arguments&, cudaStream_t)) {
  return [&x, kernel](const Arguments& a) {
    on_stream(x, [&](cudaStream_t stream) { kernel(a, stream); });
  };
}

// 80, 86, ...
int compute_capability(const Tensor& t) {
  int major = 0, minor = 0;
  const int device = t.get_device_index();
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  return major * 10 + minor;
}

void check_device(const Tensor& t, const Tensor& x, const char* argument) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == x.get_device_index(), argument,
                  ": expected on the device of x");
}

Tensor reorder_weight(const Tensor& packed_in, int64_t bits, int64_t num_rows, int64_t num_cols,
                      bool depthwise) {
  check_packed(packed_in, bits, num_rows, num_cols);
  const DeviceGuard guard(packed_in.get_device_index());
  const Tensor packed = torch::stable::contiguous(packed_in);
  const int b = static_cast<int>(bits);
  Tensor out = torch::stable::new_empty(
      packed, {cuda::reordered_bytes(b, num_rows, num_cols, depthwise)}, ScalarType::Byte);
  if (out.numel() == 0) return out;
  on_stream(packed, [&](cudaStream_t stream) {
    cuda::reorder_weight(packed.const_data_ptr<uint8_t>(), b, num_rows, num_cols, depthwise,
                         out.mutable_data_ptr<uint8_t>(), stream);
  });
  return out;
}

// The offsets are on the device: their range is the caller's to keep, see packed_conv2d in Python.
// Without x_bits the weight is in the order of files and reordered at every call then.
Tensor conv2d(const Tensor& x_in, const Tensor& weight_in, int64_t bits, int64_t out_channels,
              const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
              const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
              int64_t groups, int64_t x_zero_point, const Tensor& weight_offset_in,
              const Tensor& multiplier, const Tensor& bias, const std::optional<Tensor>& residual,
              double residual_scale, const std::optional<std::vector<int64_t>>& output_range,
              std::optional<int64_t> x_bits, bool x_packed, bool out_packed) {
  check_bits(bits);
  PackedConv p = conv_shape(x_in, bits, out_channels, kernel_size, stride, padding, dilation,
                            groups, x_zero_point, x_packed);
  const int64_t depth = p.kernel_h * p.kernel_w * p.channels / groups;
  const bool depthwise = cuda::is_depthwise(p), takes = cuda::reordered_takes(p);
  if (x_bits) {
    check_dtype(weight_in, ScalarType::Byte, "weight");
    STD_TORCH_CHECK(groups == 1 || depthwise, "groups: expected 1 or one a channel, got ", groups);
    STD_TORCH_CHECK(groups == 1 || !(x_packed || out_packed),
                    "groups: expected 1 with packed codes, got ", groups);
    STD_TORCH_CHECK(bits <= 4 || !x_packed, "bits: expected at most 4 with packed x, got ", bits);
    check_numel(weight_in, cuda::reordered_bytes(p.bits, out_channels, depth, depthwise), "weight");
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(weight_in.const_data_ptr<uint8_t>()) % 16 == 0,
                    "weight: expected at a multiple of 16 bytes");
    STD_TORCH_CHECK(takes || x_in.numel() == 0,
                    "x: expected fewer than 2^30 elements in an image with its padding, and as few "
                    "weights and output pixels, got ",
                    x_in.numel(), " elements");
  } else {
    check_packed(weight_in, bits, out_channels, depth);
  }
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
  EpilogueTensors e =
      make_epilogue(x, {p.batch, p.out_height, p.out_width, out_channels}, multiplier, bias,
                    residual, residual_scale, output_range, out_packed);
  if (e.out.numel() == 0) return e.out;
  p.x = x.const_data_ptr<uint8_t>();
  STD_TORCH_CHECK(!x_packed || reinterpret_cast<uintptr_t>(p.x) % 16 == 0,
                  "x: expected packed codes at a multiple of 16 bytes");
  p.weight = weight.const_data_ptr<uint8_t>();
  p.weight_offset = weight_offset.const_data_ptr<int64_t>();
  p.epilogue = e.view;
  if (!x_bits && !takes) {
    on_stream(x, [&](cudaStream_t stream) { cuda::packed_conv2d(p, stream); });
    return e.out;
  }
  const Tensor reordered =
      x_bits ? weight : reorder_weight(weight, bits, out_channels, depth, depthwise);
  on_stream(x, [&](cudaStream_t stream) {
    cuda::reordered_conv2d(p, reordered.const_data_ptr<uint8_t>(),
                           static_cast<int>(x_bits.value_or(8)), compute_capability(x), stream);
  });
  return e.out;
}

Tensor packed_conv2d(const Tensor& x, const Tensor& weight, int64_t bits, int64_t out_channels,
                     std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
                     std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
                     int64_t x_zero_point, const Tensor& weight_offset, const Tensor& multiplier,
                     const Tensor& bias, std::optional<Tensor> residual, double residual_scale,
                     std::optional<std::vector<int64_t>> output_range) {
  return conv2d(x, weight, bits, out_channels, kernel_size, stride, padding, dilation, groups,
                x_zero_point, weight_offset, multiplier, bias, residual, residual_scale,
                output_range, std::nullopt, false, false);
}

Tensor reordered_conv2d(const Tensor& x, const Tensor& weight, int64_t bits, int64_t out_channels,
                        std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
                        std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
                        int64_t x_zero_point, const Tensor& weight_offset, const Tensor& multiplier,
                        const Tensor& bias, std::optional<Tensor> residual, double residual_scale,
                        std::optional<std::vector<int64_t>> output_range, int64_t x_bits,
                        bool x_packed, bool out_packed) {
  return conv2d(x, weight, bits, out_channels, kernel_size, stride, padding, dilation, groups,
                x_zero_point, weight_offset, multiplier, bias, residual, residual_scale,
                output_range, x_bits, x_packed, out_packed);
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
  on_stream(x, [&](cudaStream_t stream) {
    cuda::packed_linear_s32({x.const_data_ptr<int32_t>(), rows, depth,
                             weight.const_data_ptr<uint8_t>(), static_cast<int>(bits), out_features,
                             x_zero_point, weight_offset.const_data_ptr<int64_t>(), e.view},
                            stream);
  });
  return e.out;
}

Tensor quantize(const Tensor& x, double scale, double zero_point, int64_t bits) {
  const DeviceGuard guard(x.get_device_index());
  return quantize_with(x, scale, zero_point, bits, on_stream_of(x, cuda::quantize));
}

Tensor requantize_codes(const Tensor& x, double x_scale, int64_t x_zero_point, double scale,
                        double zero_point, int64_t bits) {
  const DeviceGuard guard(x.get_device_index());
  return requantize_codes_with(x, x_scale, x_zero_point, scale, zero_point, bits,
                               on_stream_of(x, cuda::requantize_codes));
}

Tensor requantize_codes_packed(const Tensor& x_in, double x_scale, int64_t x_zero_point,
                               double scale, double zero_point, int64_t bits) {
  check_dtype(x_in, ScalarType::Byte, "x");
  STD_TORCH_CHECK(bits >= 2 && bits <= 4, "bits: expected 2 to 4, got ", bits);
  STD_TORCH_CHECK(x_in.dim() > 0, "x: expected [..., C]");
  check_packed_channels(x_in.size(-1), "x");
  const DeviceGuard guard(x_in.get_device_index());
  const Tensor x = torch::stable::contiguous(x_in);
  std::vector<int64_t> size(x.sizes().begin(), x.sizes().end());
  size.back() /= 2;
  Tensor out = torch::stable::new_empty(x, size, ScalarType::Byte);
  on_stream_of(x, cuda::requantize_codes_packed)(
      {x.const_data_ptr<uint8_t>(), x.numel(), static_cast<float>(x_scale),
       static_cast<float>(x_zero_point), static_cast<float>(scale), static_cast<float>(zero_point),
       static_cast<int>(bits), out.mutable_data_ptr<uint8_t>()});
  return out;
}

Tensor max_pool2d_codes(const Tensor& x, std::vector<int64_t> kernel_size,
                        std::vector<int64_t> stride, std::vector<int64_t> padding,
                        std::vector<int64_t> dilation, bool ceil_mode) {
  const DeviceGuard guard(x.get_device_index());
  return max_pool2d_codes_with(x, kernel_size, stride, padding, dilation, ceil_mode,
                               on_stream_of(x, cuda::max_pool));
}

Tensor sum_pool_codes(const Tensor& x) {
  const DeviceGuard guard(x.get_device_index());
  return sum_pool_codes_with(x, on_stream_of(x, cuda::sum_pool));
}

Tensor dequantize_codes(const Tensor& x_in, double scale, int64_t zero_point) {
  check_dtype(x_in, ScalarType::Byte, "x");
  const DeviceGuard guard(x_in.get_device_index());
  const Tensor x = torch::stable::contiguous(x_in);
  Tensor out = torch::stable::new_empty(x, x.sizes(), ScalarType::Float);
  on_stream_of(
      x, cuda::dequantize_codes)({x.const_data_ptr<uint8_t>(), x.numel(), static_cast<float>(scale),
                                  static_cast<float>(zero_point), out.mutable_data_ptr<float>()});
  return out;
}

Tensor dequantize_sums(const Tensor& x_in, int64_t count, double scale, int64_t zero_point) {
  check_dtype(x_in, ScalarType::Int, "x");
  const DeviceGuard guard(x_in.get_device_index());
  const Tensor x = torch::stable::contiguous(x_in);
  Tensor out = torch::stable::new_empty(x, x.sizes(), ScalarType::Float);
  on_stream_of(x, cuda::dequantize_sums)(
      {x.const_data_ptr<int32_t>(), x.numel(), scale * static_cast<double>(count),
       static_cast<double>(zero_point * count), out.mutable_data_ptr<float>()});
  return out;
}

}  // namespace
}  // namespace fdda

STABLE_TORCH_LIBRARY_IMPL(fdda, CUDA, m) {
  m.impl("packed_conv2d", TORCH_BOX(&fdda::packed_conv2d));
  m.impl("packed_linear", TORCH_BOX(&fdda::packed_linear));
  m.impl("reorder_weight", TORCH_BOX(&fdda::reorder_weight));
  m.impl("reordered_conv2d", TORCH_BOX(&fdda::reordered_conv2d));
  m.impl("quantize", TORCH_BOX(&fdda::quantize));
  m.impl("requantize_codes", TORCH_BOX(&fdda::requantize_codes));
  m.impl("requantize_codes_packed", TORCH_BOX(&fdda::requantize_codes_packed));
  m.impl("max_pool2d_codes", TORCH_BOX(&fdda::max_pool2d_codes));
  m.impl("sum_pool_codes", TORCH_BOX(&fdda::sum_pool_codes));
  m.impl("dequantize_codes", TORCH_BOX(&fdda::dequantize_codes));
  m.impl("dequantize_sums", TORCH_BOX(&fdda::dequantize_sums));
}
