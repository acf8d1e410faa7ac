// CPU implementations of the fdda operators: tensor checks and pointers, nothing numerical.
// The schemas are defined in fdda_fast/ops.
#include <algorithm>
#include <cmath>
#include <tuple>

#include "common/checks.h"
#include "cpu/kernels.h"

namespace fdda {
namespace {

Dtype float_dtype(const Tensor& t, const char* argument) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat32;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Half: return Dtype::kFloat16;
    default:
      STD_TORCH_CHECK(false, argument, ": expected float32, bfloat16 or float16, got ",
                      name(t.scalar_type()));
  }
}

// Dimensions of more than one element from the outermost in memory to the innermost; empty when the
// tensor has gaps or overlaps.
std::optional<std::vector<int64_t>> dense_order(const Tensor& t) {
  std::vector<int64_t> order;
  for (int64_t d = 0; d < t.dim(); ++d) {
    if (t.size(d) != 1) order.push_back(d);
  }
  std::sort(order.begin(), order.end(),
            [&](int64_t a, int64_t b) { return t.stride(a) > t.stride(b); });
  int64_t expected = 1;
  for (auto d = order.rbegin(); d != order.rend(); ++d) {
    if (t.stride(*d) != expected) return std::nullopt;
    expected *= t.size(*d);
  }
  return order;
}

// x, or a copy of it with the strides of its empty_like.
Tensor dense(const Tensor& x) {
  return x.numel() == 0 || dense_order(x) ? x : torch::stable::clone(x);
}

// t, or a copy of it with the strides of x, which must be dense.
Tensor with_strides_of(const Tensor& x, const Tensor& t) {
  const auto wanted = x.strides(), found = t.strides();
  if (std::equal(wanted.begin(), wanted.end(), found.begin(), found.end())) return t;
  Tensor copy = torch::stable::empty_like(x);
  torch::stable::copy_(copy, t);
  return copy;
}

ChannelView channel_view(const Tensor& x, std::optional<int64_t> axis) {
  if (x.numel() == 0) return {0, 0, 0};
  if (!axis) return {1, 1, x.numel()};
  STD_TORCH_CHECK(*axis >= 0 && *axis < x.dim(), "axis: expected 0 to ", x.dim() - 1, ", got ",
                  *axis);
  ChannelView view{1, x.size(*axis), 1};
  if (view.channels == 1) return {1, 1, x.numel()};
  bool inside = false;
  const std::vector<int64_t> order = *dense_order(x);
  for (int64_t d : order) {
    if (d == *axis) {
      inside = true;
    } else {
      (inside ? view.inner : view.outer) *= x.size(d);
    }
  }
  return view;
}

Tensor channel_values(const Tensor& t, const Tensor& x, std::optional<int64_t> axis,
                      const char* argument) {
  check_dtype(t, ScalarType::Float, argument);
  check_numel(t, axis ? x.size(*axis) : 1, argument);
  return torch::stable::contiguous(t);
}

FakeQuantize fake_quantize_args(const Tensor& x, const Tensor& y, const Tensor& scale,
                                const Tensor& zero_point, int64_t quant_min, int64_t quant_max,
                                std::optional<int64_t> axis) {
  return {float_dtype(x, "x"),           x.const_data_ptr(),
          y.mutable_data_ptr(),          channel_view(x, axis),
          scale.const_data_ptr<float>(), zero_point.const_data_ptr<float>(),
          static_cast<float>(quant_min), static_cast<float>(quant_max)};
}

Tensor fake_quantize(const Tensor& x_in, const Tensor& scale_in, const Tensor& zero_point_in,
                     int64_t quant_min, int64_t quant_max, std::optional<int64_t> axis, bool) {
  const Tensor x = dense(x_in);
  const Tensor scale = channel_values(scale_in, x, axis, "scale");
  const Tensor zero_point = channel_values(zero_point_in, x, axis, "zero_point");
  Tensor y = torch::stable::empty_like(x);
  active_kernels().fake_quantize(
      fake_quantize_args(x, y, scale, zero_point, quant_min, quant_max, axis));
  return y;
}

Tensor fake_quantize_backward(const Tensor& grad_in, const Tensor& x_in, const Tensor& scale_in,
                              const Tensor& zero_point_in, int64_t quant_min, int64_t quant_max,
                              std::optional<int64_t> axis) {
  const Tensor x = dense(x_in);
  STD_TORCH_CHECK(grad_in.scalar_type() == x.scalar_type(), "grad: expected ",
                  name(x.scalar_type()), ", got ", name(grad_in.scalar_type()));
  check_numel(grad_in, x.numel(), "grad");
  const Tensor grad = with_strides_of(x, grad_in);
  const Tensor scale = channel_values(scale_in, x, axis, "scale");
  const Tensor zero_point = channel_values(zero_point_in, x, axis, "zero_point");
  Tensor grad_x = torch::stable::empty_like(x);
  active_kernels().fake_quantize_backward(
      {fake_quantize_args(x, grad_x, scale, zero_point, quant_min, quant_max, axis),
       grad.const_data_ptr()});
  return grad_x;
}

void check_fake_bits(int64_t bits) {
  STD_TORCH_CHECK(bits >= 1 && bits <= 16, "bits: expected 1 to 16, got ", bits);
}

Tensor fake_quantize_range(const Tensor& x_in, const Tensor& x_min_in, const Tensor& x_max_in,
                           int64_t bits, std::optional<int64_t> axis) {
  check_fake_bits(bits);
  const Tensor x = dense(x_in);
  const Tensor x_min = channel_values(x_min_in, x, axis, "x_min");
  const Tensor x_max = channel_values(x_max_in, x, axis, "x_max");
  Tensor y = torch::stable::empty_like(x);
  active_kernels().fake_quantize_range(
      {float_dtype(x, "x"), x.const_data_ptr(), y.mutable_data_ptr(), channel_view(x, axis),
       x_min.const_data_ptr<float>(), x_max.const_data_ptr<float>(), static_cast<int>(bits)});
  return y;
}

Tensor fake_quantize_minmax(const Tensor& x_in, int64_t bits, std::optional<int64_t> axis) {
  check_fake_bits(bits);
  const Tensor x = dense(x_in);
  Tensor y = torch::stable::empty_like(x);
  active_kernels().fake_quantize_range({float_dtype(x, "x"), x.const_data_ptr(),
                                        y.mutable_data_ptr(), channel_view(x, axis), nullptr,
                                        nullptr, static_cast<int>(bits)});
  return y;
}

struct MomentsLayout {
  Tensor x;
  int64_t batch, channels, inner;
  bool channels_last;
  bool copied;  // x is not the caller's tensor
};

MomentsLayout moments_layout(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 2 || x.dim() == 4, "x: expected [N, C] or [N, C, H, W], got ", x.dim(),
                  " dimensions");
  MomentsLayout l{x, x.size(0), x.size(1), x.dim() == 4 ? x.size(2) * x.size(3) : 1, false, false};
  const bool nhwc = x.dim() == 4 && x.stride(1) == 1 &&
                    (x.size(3) == 1 || x.stride(3) == l.channels) &&
                    (x.size(2) == 1 || x.stride(2) == x.size(3) * l.channels) &&
                    (x.size(0) == 1 || x.stride(0) == l.inner * l.channels);
  l.copied = !x.is_contiguous() && !nhwc;
  if (l.copied) l.x = torch::stable::contiguous(x);
  // With one pixel the two layouts are one, and channels_last runs along the channels.
  l.channels_last = l.inner == 1 || (nhwc && !x.is_contiguous());
  return l;
}

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

// Scale and shift of an eval-mode batch norm, and the clipping behind it.
class FoldedNorm {
 public:
  FoldedNorm(const Tensor& weight, const Tensor& bias, const Tensor& mean, const Tensor& var,
             double eps, double low, double high, int64_t channels)
      : scale_(channels), shift_(channels) {
    const Tensor tensors[] = {values(weight, channels, "weight"), values(bias, channels, "bias"),
                              values(mean, channels, "running_mean"),
                              values(var, channels, "running_var")};
    const float* value[4];
    for (int i = 0; i < 4; ++i) value[i] = tensors[i].const_data_ptr<float>();
    for (int64_t c = 0; c < channels; ++c) {
      const double scale = value[0][c] / std::sqrt(static_cast<double>(value[3][c]) + eps);
      scale_[c] = static_cast<float>(scale);
      shift_[c] = static_cast<float>(value[1][c] - value[2][c] * scale);
    }
    view = {scale_.data(), shift_.data(), static_cast<float>(low), static_cast<float>(high)};
  }
  FoldedNorm(const FoldedNorm&) = delete;

  BnRelu view;

 private:
  static Tensor values(const Tensor& t, int64_t channels, const char* argument) {
    check_dtype(t, ScalarType::Float, argument);
    check_numel(t, channels, argument);
    return torch::stable::contiguous(t);
  }

  std::vector<float> scale_, shift_;
};

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

// `made`, laid out like l.x, in the layout that x's empty_like has.
Tensor as_caller(const MomentsLayout& l, const Tensor& x, const Tensor& made) {
  if (!l.copied) return made;
  Tensor out = torch::stable::empty_like(x);
  torch::stable::copy_(out, made);
  return out;
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

Tensor quantize(const Tensor& x, double scale, double zero_point, int64_t bits) {
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
  active_kernels().quantize(a);
  return out;
}

Tensor requantize_codes(const Tensor& x_in, double x_scale, int64_t x_zero_point, double scale,
                        double zero_point, int64_t bits) {
  check_bits(bits);
  check_dtype(x_in, ScalarType::Byte, "x");
  const Tensor x = torch::stable::contiguous(x_in);
  Tensor out = torch::stable::empty_like(x);
  active_kernels().requantize_codes({x.const_data_ptr<uint8_t>(), x.numel(),
                                     static_cast<float>(x_scale), static_cast<float>(x_zero_point),
                                     static_cast<float>(scale), static_cast<float>(zero_point),
                                     static_cast<int>(bits), out.mutable_data_ptr<uint8_t>()});
  return out;
}

Tensor max_pool2d_codes(const Tensor& x_in, std::vector<int64_t> kernel_size,
                        std::vector<int64_t> stride, std::vector<int64_t> padding,
                        std::vector<int64_t> dilation, bool ceil_mode) {
  check_dtype(x_in, ScalarType::Byte, "x");
  STD_TORCH_CHECK(x_in.dim() == 4, "x: expected [N, H, W, C], got ", x_in.dim(), " dimensions");
  const Tensor x = torch::stable::contiguous(x_in);
  MaxPool a{};
  a.x = x.const_data_ptr<uint8_t>();
  a.batch = x.size(0);
  a.height = x.size(1);
  a.width = x.size(2);
  a.channels = x.size(3);
  std::tie(a.kernel_h, a.kernel_w) = std::tuple_cat(pair(kernel_size, "kernel_size"));
  std::tie(a.stride_h, a.stride_w) = std::tuple_cat(pair(stride, "stride"));
  std::tie(a.pad_h, a.pad_w) = std::tuple_cat(pair(padding, "padding"));
  std::tie(a.dilation_h, a.dilation_w) = std::tuple_cat(pair(dilation, "dilation"));
  STD_TORCH_CHECK(2 * a.pad_h <= a.kernel_h && 2 * a.pad_w <= a.kernel_w,
                  "padding: expected at most half of kernel_size, got ", a.pad_h, " and ", a.pad_w);
  a.out_height = output_extent(a.height, a.kernel_h, a.stride_h, a.pad_h, a.dilation_h, ceil_mode);
  a.out_width = output_extent(a.width, a.kernel_w, a.stride_w, a.pad_w, a.dilation_w, ceil_mode);
  Tensor out = torch::stable::new_empty(x, {a.batch, a.out_height, a.out_width, a.channels});
  a.out = out.mutable_data_ptr<uint8_t>();
  active_kernels().max_pool(a);
  return out;
}

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
  const Tensor x = torch::stable::contiguous(x_in);
  const Tensor weight = torch::stable::contiguous(weight_in);
  const Tensor weight_offset = torch::stable::contiguous(weight_offset_in);
  EpilogueTensors e = make_epilogue(x, {p.batch, p.out_height, p.out_width, out_channels},
                                    multiplier, bias, residual, residual_scale, output_range);
  p.x = x.const_data_ptr<uint8_t>();
  p.weight = weight.const_data_ptr<uint8_t>();
  p.weight_offset = weight_offset.const_data_ptr<int64_t>();
  p.weight_fits_s8 = offsets_fit_s8(p.weight_offset, out_channels, bits, depth);
  p.epilogue = e.view;
  active_kernels().packed_conv2d(p);
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
  const Tensor x = torch::stable::contiguous(x_in);
  const Tensor weight = torch::stable::contiguous(weight_in);
  const Tensor weight_offset = torch::stable::contiguous(weight_offset_in);
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
}  // namespace fdda

STABLE_TORCH_LIBRARY_IMPL(fdda, CPU, m) {
  m.impl("fake_quantize", TORCH_BOX(&fdda::fake_quantize));
  m.impl("fake_quantize_backward", TORCH_BOX(&fdda::fake_quantize_backward));
  m.impl("fake_quantize_range", TORCH_BOX(&fdda::fake_quantize_range));
  m.impl("fake_quantize_minmax", TORCH_BOX(&fdda::fake_quantize_minmax));
  m.impl("class_moments", TORCH_BOX(&fdda::class_moments));
  m.impl("class_moments_backward", TORCH_BOX(&fdda::class_moments_backward));
  m.impl("bn_relu_class_moments", TORCH_BOX(&fdda::bn_relu_class_moments));
  m.impl("bn_relu_class_moments_backward", TORCH_BOX(&fdda::bn_relu_class_moments_backward));
  m.impl("quantize", TORCH_BOX(&fdda::quantize));
  m.impl("requantize_codes", TORCH_BOX(&fdda::requantize_codes));
  m.impl("max_pool2d_codes", TORCH_BOX(&fdda::max_pool2d_codes));
  m.impl("pack_weight", TORCH_BOX(&fdda::pack_weight));
  m.impl("unpack_weight", TORCH_BOX(&fdda::unpack_weight));
  m.impl("packed_conv2d", TORCH_BOX(&fdda::packed_conv2d));
  m.impl("packed_linear", TORCH_BOX(&fdda::packed_linear));
}
