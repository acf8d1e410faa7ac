// CPU implementations of the integer operators: checks and pointers, nothing numerical.
#include <algorithm>
#include <tuple>

#include "../common/code_operators.h"
#include "../cpu/kernels.h"

namespace fdda {
namespace {

thread_local const char* conv_kernel = "";

Tensor quantize(const Tensor& x, double scale, double zero_point, int64_t bits) {
  return quantize_with(x, scale, zero_point, bits, active_kernels().quantize);
}

Tensor requantize_codes(const Tensor& x, double x_scale, int64_t x_zero_point, double scale,
                        double zero_point, int64_t bits) {
  return requantize_codes_with(x, x_scale, x_zero_point, scale, zero_point, bits,
                               active_kernels().requantize_codes);
}

Tensor max_pool2d_codes(const Tensor& x, std::vector<int64_t> kernel_size,
                        std::vector<int64_t> stride, std::vector<int64_t> padding,
                        std::vector<int64_t> dilation, bool ceil_mode) {
  return max_pool2d_codes_with(x, kernel_size, stride, padding, dilation, ceil_mode,
                               active_kernels().max_pool);
}

Tensor sum_pool_codes(const Tensor& x) { return sum_pool_codes_with(x, active_kernels().sum_pool); }

Tensor pack_weight(const Tensor& q, int64_t bits) {
  check_bits(bits);
  STD_TORCH_CHECK(q.dim() == 2, "q: expected [N, K], got ", q.dim(), " dimensions");
  const Tensor codes = torch::stable::contiguous(torch::stable::to(q, ScalarType::Int));
  const int64_t rows = q.size(0), cols = q.size(1);
  Tensor packed = torch::stable::new_empty(
      q, {ceil_div(rows, kPanelRows), ceil_div(cols, kBlockDepth), bits, kPlaneBytes},
      ScalarType::Byte);
  active_kernels().pack_weight({codes.const_data_ptr<int32_t>(), rows, cols, static_cast<int>(bits),
                                packed.mutable_data_ptr<uint8_t>()});
  return packed;
}

Tensor unpack_weight(const Tensor& packed_in, int64_t bits, int64_t num_rows, int64_t num_cols) {
  check_packed(packed_in, bits, num_rows, num_cols);
  const Tensor packed = torch::stable::contiguous(packed_in);
  Tensor codes = torch::stable::new_empty(packed, {num_rows, num_cols}, ScalarType::Char);
  active_kernels().unpack_weight({packed.const_data_ptr<uint8_t>(), static_cast<int>(bits),
                                  num_rows, num_cols, codes.mutable_data_ptr<int8_t>()});
  return codes;
}

// Whether code + offset fits int8 for every channel; refuses offsets whose products leave int64.
bool offsets_fit_s8(const int64_t* offset, int64_t channels, int64_t bits, int64_t depth) {
  const int64_t half = int64_t{1} << (bits - 1);
  const int64_t limit = (int64_t{1} << 62) / (255 * std::max<int64_t>(depth, 1));
  bool fits = true;
  for (int64_t o = 0; o < channels; ++o) {
    STD_TORCH_CHECK(offset[o] <= limit && offset[o] >= -limit,
                    "weight_offset: expected magnitudes up to ", limit, ", got ", offset[o]);
    fits = fits && offset[o] - half >= -128 && offset[o] + half - 1 <= 127;
  }
  return fits;
}

Tensor packed_conv2d(const Tensor& x_in, const Tensor& weight_in, int64_t bits,
                     int64_t out_channels, std::vector<int64_t> kernel_size,
                     std::vector<int64_t> stride, std::vector<int64_t> padding,
                     std::vector<int64_t> dilation, int64_t groups, int64_t x_zero_point,
                     const Tensor& weight_offset_in, const Tensor& multiplier, const Tensor& bias,
                     std::optional<Tensor> residual, double residual_scale,
                     std::optional<std::vector<int64_t>> output_range) {
  PackedConv p = conv_shape(x_in, bits, out_channels, kernel_size, stride, padding, dilation,
                            groups, x_zero_point);
  const int64_t depth = p.kernel_h * p.kernel_w * p.channels / groups;
  check_packed(weight_in, bits, out_channels, depth);
  check_dtype(weight_offset_in, ScalarType::Long, "weight_offset");
  check_numel(weight_offset_in, out_channels, "weight_offset");
  const Tensor x = row_major(x_in);
  const Tensor weight = row_major(weight_in);
  const Tensor weight_offset = row_major(weight_offset_in);
  EpilogueTensors e = make_epilogue(x, {p.batch, p.out_height, p.out_width, out_channels},
                                    multiplier, bias, residual, residual_scale, output_range);
  p.x = x.const_data_ptr<uint8_t>();
  p.weight = weight.const_data_ptr<uint8_t>();
  p.weight_offset = weight_offset.const_data_ptr<int64_t>();
  p.weight_fits_s8 = offsets_fit_s8(p.weight_offset, out_channels, bits, depth);
  p.epilogue = e.view;
  conv_kernel = active_kernels().packed_conv2d(p);
  return e.out;
}

Tensor packed_linear(const Tensor& x_in, const Tensor& weight_in, int64_t bits,
                     int64_t out_features, int64_t x_zero_point, const Tensor& weight_offset_in,
                     const Tensor& multiplier, const Tensor& bias, std::optional<Tensor> residual,
                     double residual_scale, std::optional<std::vector<int64_t>> output_range) {
  STD_TORCH_CHECK(x_in.dim() == 2, "x: expected [M, K], got ", x_in.dim(), " dimensions");
  const int64_t rows = x_in.size(0), depth = x_in.size(1);
  check_packed(weight_in, bits, out_features, depth);
  check_dtype(weight_offset_in, ScalarType::Long, "weight_offset");
  check_numel(weight_offset_in, out_features, "weight_offset");
  const Tensor x = row_major(x_in);
  const Tensor weight = row_major(weight_in);
  const Tensor weight_offset = row_major(weight_offset_in);
  EpilogueTensors e = make_epilogue(x, {rows, out_features}, multiplier, bias, residual,
                                    residual_scale, output_range);
  const int64_t* offset = weight_offset.const_data_ptr<int64_t>();
  if (x.scalar_type() == ScalarType::Int) {
    active_kernels().packed_linear_s32({x.const_data_ptr<int32_t>(), rows, depth,
                                        weight.const_data_ptr<uint8_t>(), static_cast<int>(bits),
                                        out_features, x_zero_point, offset, e.view});
    return e.out;
  }
  check_dtype(x, ScalarType::Byte, "x");
  check_accumulator(depth, x_zero_point);
  PackedConv p{};
  p.x = x.const_data_ptr<uint8_t>();
  p.batch = rows;
  p.height = p.width = p.out_height = p.out_width = p.kernel_h = p.kernel_w = 1;
  p.stride_h = p.stride_w = p.dilation_h = p.dilation_w = p.groups = 1;
  p.channels = depth;
  p.weight = weight.const_data_ptr<uint8_t>();
  p.bits = static_cast<int>(bits);
  p.out_channels = out_features;
  p.x_zero_point = static_cast<int32_t>(x_zero_point);
  p.weight_offset = offset;
  p.weight_fits_s8 = offsets_fit_s8(offset, out_features, bits, depth);
  p.epilogue = e.view;
  active_kernels().packed_conv2d(p);
  return e.out;
}

}  // namespace

const char* last_conv_kernel() { return conv_kernel; }

}  // namespace fdda

STABLE_TORCH_LIBRARY_IMPL(fdda, CPU, m) {
  m.impl("quantize", TORCH_BOX(&fdda::quantize));
  m.impl("requantize_codes", TORCH_BOX(&fdda::requantize_codes));
  m.impl("max_pool2d_codes", TORCH_BOX(&fdda::max_pool2d_codes));
  m.impl("sum_pool_codes", TORCH_BOX(&fdda::sum_pool_codes));
  m.impl("pack_weight", TORCH_BOX(&fdda::pack_weight));
  m.impl("unpack_weight", TORCH_BOX(&fdda::unpack_weight));
  m.impl("packed_conv2d", TORCH_BOX(&fdda::packed_conv2d));
  m.impl("packed_linear", TORCH_BOX(&fdda::packed_linear));
}
