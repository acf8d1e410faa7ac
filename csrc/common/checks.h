// Tensor checks and argument structures shared by the CPU and CUDA registrations.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdlib>
#include <optional>
#include <vector>

#include "packed.h"

namespace fdda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline const char* name(ScalarType type) {
  switch (type) {
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Half: return "float16";
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    default: return "another dtype";
  }
}

// t, or a contiguous copy of it. The operator alone would take longer to find that there is nothing
// to be done.
inline Tensor row_major(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline void check_dtype(const Tensor& t, ScalarType type, const char* argument) {
  STD_TORCH_CHECK(t.scalar_type() == type, argument, ": expected ", name(type), ", got ",
                  name(t.scalar_type()));
}

inline void check_numel(const Tensor& t, int64_t numel, const char* argument) {
  STD_TORCH_CHECK(t.numel() == numel, argument, ": expected ", numel, " elements, got ", t.numel());
}

inline void check_bits(int64_t bits) {
  STD_TORCH_CHECK(bits >= 2 && bits <= 8, "bits: expected 2 to 8, got ", bits);
}

inline void check_packed(const Tensor& weight, int64_t bits, int64_t rows, int64_t cols) {
  check_bits(bits);
  check_dtype(weight, ScalarType::Byte, "weight");
  check_numel(weight, ceil_div(rows, kPanelRows) * ceil_div(cols, kBlockDepth) * bits * kPlaneBytes,
              "weight");
}

inline void check_packed_channels(int64_t channels, const char* argument) {
  STD_TORCH_CHECK(channels % kPackedChannels == 0, argument, ": expected a multiple of ",
                  kPackedChannels, " channels of packed codes, got ", channels);
}

inline std::array<int64_t, 2> pair(const std::vector<int64_t>& v, const char* argument) {
  STD_TORCH_CHECK(v.size() == 2, argument, ": expected 2 values, got ", v.size());
  return {v[0], v[1]};
}

// Extent of a convolution's or pooling's output; pooling may round up.
inline int64_t output_extent(int64_t size, int64_t kernel, int64_t stride, int64_t pad,
                             int64_t dilation, bool ceil_mode = false) {
  STD_TORCH_CHECK(kernel > 0 && stride > 0 && pad >= 0 && dilation > 0,
                  "kernel_size, stride, dilation: expected > 0 and padding >= 0, got ", kernel,
                  ", ", stride, ", ", dilation, " and ", pad);
  const int64_t room = size + 2 * pad - dilation * (kernel - 1) - 1;
  STD_TORCH_CHECK(room >= 0, "kernel_size: larger than the padded input of ", size + 2 * pad);
  int64_t out = room / stride + 1;
  // The last window starts inside the input or its left padding.
  if (ceil_mode && room % stride && out * stride < size + pad) ++out;
  return out;
}

// The tensors an epilogue points into, kept alive by the caller.
struct EpilogueTensors {
  Tensor multiplier, bias, out;
  std::optional<Tensor> residual;
  Epilogue view;
};

inline EpilogueTensors make_epilogue(const Tensor& like, const std::vector<int64_t>& out_size,
                                     const Tensor& multiplier, const Tensor& bias,
                                     const std::optional<Tensor>& residual, double residual_scale,
                                     const std::optional<std::vector<int64_t>>& output_range,
                                     bool packed = false) {
  const int64_t channels = out_size.back();
  check_dtype(multiplier, ScalarType::Float, "multiplier");
  check_numel(multiplier, channels, "multiplier");
  check_dtype(bias, ScalarType::Float, "bias");
  check_numel(bias, channels, "bias");
  const ScalarType type = output_range ? ScalarType::Byte : ScalarType::Float;
  std::vector<int64_t> stored = out_size;
  if (packed) {
    check_packed_channels(channels, "out_channels");
    stored.back() /= 2;
  }
  EpilogueTensors e{row_major(multiplier), row_major(bias),
                    torch::stable::new_empty(like, stored, type), std::nullopt, Epilogue{}};
  e.view.multiplier = e.multiplier.const_data_ptr<float>();
  e.view.bias = e.bias.const_data_ptr<float>();
  e.view.residual_scale = static_cast<float>(residual_scale);
  if (residual) {
    check_numel(*residual, e.out.numel() * (packed ? 2 : 1), "residual");
    e.residual = row_major(*residual);
    if (residual->scalar_type() == ScalarType::Byte) {
      e.view.residual_u8 = e.residual->const_data_ptr<uint8_t>();
    } else {
      check_dtype(*residual, ScalarType::Float, "residual");
      e.view.residual_f32 = e.residual->const_data_ptr<float>();
    }
  }
  if (output_range) {
    const auto [lo, hi] = pair(*output_range, "output_range");
    STD_TORCH_CHECK(0 <= lo && lo <= hi && hi <= 255,
                    "output_range: expected 0 <= lo <= hi <= 255, got ", lo, " and ", hi);
    e.view.lo = static_cast<float>(lo);
    e.view.hi = static_cast<float>(hi);
    STD_TORCH_CHECK(!packed || hi < 16, "output_range: expected hi < 16 of packed codes, got ", hi);
    (packed ? e.view.out_u4 : e.view.out_u8) = e.out.mutable_data_ptr<uint8_t>();
  } else {
    STD_TORCH_CHECK(!packed, "output_range: expected with packed outputs");
    e.view.out_f32 = e.out.mutable_data_ptr<float>();
  }
  return e;
}

inline void check_accumulator(int64_t depth, int64_t x_zero_point) {
  STD_TORCH_CHECK(x_zero_point >= 0 && x_zero_point <= 255, "x_zero_point: expected 0 to 255, got ",
                  x_zero_point);
  STD_TORCH_CHECK(depth * 255 * 128 < (int64_t{1} << 31),
                  "weight: expected fewer than 65794 inputs per output, got ", depth);
}

// Everything but pointers to x, weight and weight_offset, which differ in how devices read them.
inline PackedConv conv_shape(const Tensor& x, int64_t bits, int64_t out_channels,
                             const std::vector<int64_t>& kernel_size,
                             const std::vector<int64_t>& stride,
                             const std::vector<int64_t>& padding,
                             const std::vector<int64_t>& dilation, int64_t groups,
                             int64_t x_zero_point, bool x_packed = false) {
  check_dtype(x, ScalarType::Byte, "x");
  STD_TORCH_CHECK(x.dim() == 4, "x: expected [N, H, W, C], got ", x.dim(), " dimensions");
  PackedConv p{};
  p.batch = x.size(0);
  p.height = x.size(1);
  p.width = x.size(2);
  p.channels = x.size(3) * (x_packed ? 2 : 1);
  p.x_packed = x_packed;
  if (x_packed) {
    check_packed_channels(p.channels, "x");
    STD_TORCH_CHECK(x_zero_point < 16, "x_zero_point: expected below 16 of packed codes, got ",
                    x_zero_point);
  }
  p.bits = static_cast<int>(bits);
  p.out_channels = out_channels;
  p.groups = groups;
  STD_TORCH_CHECK(groups > 0 && p.channels % groups == 0 && out_channels % groups == 0,
                  "groups: expected a divisor of ", p.channels, " and ", out_channels, ", got ",
                  groups);
  std::tie(p.kernel_h, p.kernel_w) = std::tuple_cat(pair(kernel_size, "kernel_size"));
  std::tie(p.stride_h, p.stride_w) = std::tuple_cat(pair(stride, "stride"));
  std::tie(p.pad_h, p.pad_w) = std::tuple_cat(pair(padding, "padding"));
  std::tie(p.dilation_h, p.dilation_w) = std::tuple_cat(pair(dilation, "dilation"));
  p.out_height = output_extent(p.height, p.kernel_h, p.stride_h, p.pad_h, p.dilation_h);
  p.out_width = output_extent(p.width, p.kernel_w, p.stride_w, p.pad_w, p.dilation_w);
  p.x_zero_point = static_cast<int32_t>(x_zero_point);
  check_accumulator(p.kernel_h * p.kernel_w * p.channels / groups, x_zero_point);
  return p;
}

}  // namespace fdda
