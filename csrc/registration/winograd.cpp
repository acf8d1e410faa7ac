// CPU passes of the Winograd convolutions: checks and pointers, nothing numerical. Dense
// tensors of float32, but for the passes named after bfloat16.
#include "layout.h"

namespace fdda {
namespace {

void check_dense(const Tensor& t, int64_t dim, const char* argument) {
  check_dtype(t, ScalarType::Float, argument);
  STD_TORCH_CHECK(t.dim() == dim && t.is_contiguous(), argument, ": expected a dense tensor of ",
                  dim, " dimensions");
}

// A tile's step in images, and what it and a filter are transformed to.
struct Form {
  int64_t step, parts;
};
constexpr Form kPositions{4, 36}, kProducts{8, 81};

// `images`: [N, H, W, channels]; `parts`: of the tiles from `tile` on.
WinogradTiles tiles_of(const Tensor& images, const char* argument, const Tensor& parts,
                       int64_t tile, Form form) {
  check_dense(images, 4, argument);
  check_dense(parts, parts.dim(), "parts");
  const int64_t channels = images.size(3), size = form.parts * std::max<int64_t>(1, channels);
  const int64_t count = parts.numel() / size;
  check_numel(parts, count * size, "parts");
  const int64_t tiles =
      images.size(0) * ceil_div(images.size(1), form.step) * ceil_div(images.size(2), form.step);
  STD_TORCH_CHECK(0 <= tile && tile + count <= tiles, "tile: expected tiles of ", argument,
                  ", got ", tile, " + ", count);
  return {images.size(0), images.size(1), images.size(2), channels,
          tile,           tile + count,   nullptr,        nullptr};
}

WinogradTiles to_parts(const Tensor& images, const char* argument, const Tensor& parts,
                       int64_t tile, Form form) {
  WinogradTiles a = tiles_of(images, argument, parts, tile, form);
  a.from = images.const_data_ptr<float>();
  a.to = parts.mutable_data_ptr<float>();
  return a;
}

WinogradTiles from_parts(const Tensor& parts, const Tensor& images, const char* argument,
                         int64_t tile, Form form) {
  WinogradTiles a = tiles_of(images, argument, parts, tile, form);
  a.from = parts.const_data_ptr<float>();
  a.to = images.mutable_data_ptr<float>();
  return a;
}

void winograd_input(const Tensor& x, Tensor positions, int64_t tile) {
  active_kernels().winograd_input(to_parts(x, "x", positions, tile, kPositions));
}

void winograd_gradient(const Tensor& grad_y, Tensor positions, int64_t tile) {
  active_kernels().winograd_gradient(to_parts(grad_y, "grad_y", positions, tile, kPositions));
}

void winograd_output(const Tensor& positions, Tensor y, int64_t tile) {
  active_kernels().winograd_output(from_parts(positions, y, "y", tile, kPositions));
}

void winograd_upsample_input(const Tensor& x, Tensor positions, int64_t tile) {
  active_kernels().winograd_upsample_input(to_parts(x, "x", positions, tile, kPositions));
}

void winograd_upsample_input_gradient(const Tensor& positions, Tensor grad_x, int64_t tile) {
  active_kernels().winograd_upsample_input_gradient(
      from_parts(positions, grad_x, "grad_x", tile, kPositions));
}

void winograd_upsample_gradient(const Tensor& grad_y, Tensor products, Tensor sums, int64_t tile) {
  const WinogradTiles tiles = to_parts(grad_y, "grad_y", products, tile, kProducts);
  check_dtype(sums, ScalarType::Double, "sums");
  check_numel(sums, (tiles.tile_end - tile) * tiles.channels, "sums");
  STD_TORCH_CHECK(sums.is_contiguous(), "sums: expected a dense tensor");
  active_kernels().winograd_upsample_gradient({tiles, sums.mutable_data_ptr<double>()});
}

void winograd_upsample_output(const Tensor& products, Tensor y, int64_t tile) {
  active_kernels().winograd_upsample_output(from_parts(products, y, "y", tile, kProducts));
}

void winograd_upsample_norm_output(const Tensor& products, const Tensor& tables,
                                   double negative_slope, Tensor y, int64_t tile) {
  const WinogradTiles tiles = from_parts(products, y, "y", tile, kProducts);
  active_kernels().winograd_upsample_norm_output(
      {tiles, norm_tables(tables, tiles.images * tiles.channels, negative_slope)});
}

// `weight`: [filters, 3, 3, channels]; `parts`: of all filters.
WinogradWeights weights_of(const Tensor& weight, const Tensor& parts, Form form, bool rotated,
                           const Tensor& from, const Tensor& to) {
  check_dense(weight, 4, "weight");
  check_dense(parts, parts.dim(), "parts");
  const int64_t filters = weight.size(0), channels = weight.size(3);
  check_numel(weight, filters * 9 * channels, "weight");
  check_numel(parts, form.parts * filters * channels, "parts");
  return {filters, channels, rotated, from.const_data_ptr<float>(), to.mutable_data_ptr<float>()};
}

void winograd_weights(const Tensor& weight, Tensor positions, bool rotated) {
  active_kernels().winograd_weights(
      weights_of(weight, positions, kPositions, rotated, weight, positions));
}

void winograd_weight_gradient(const Tensor& positions, Tensor grad_weight) {
  active_kernels().winograd_weight_gradient(
      weights_of(grad_weight, positions, kPositions, false, positions, grad_weight));
}

void winograd_upsample_weights(const Tensor& weight, Tensor products) {
  active_kernels().winograd_upsample_weights(
      weights_of(weight, products, kProducts, false, weight, products));
}

void winograd_upsample_weight_gradient(const Tensor& products, Tensor grad_weight) {
  active_kernels().winograd_upsample_weight_gradient(
      weights_of(grad_weight, products, kProducts, false, products, grad_weight));
}

constexpr int64_t kPanels = 32;  // what outputs are a multiple of in panels, on any instruction set

void check_panels(const Tensor& panels, int64_t inputs, int64_t outputs, const char* argument) {
  check_dense(panels, panels.dim(), argument);
  check_numel(panels, kProducts.parts * inputs * ceil_div(outputs, kPanels) * kPanels, argument);
}

// `panels`: zeros; those of the channels that are left stay so.
void winograd_upsample_panels(const Tensor& weight, Tensor panels) {
  check_dense(weight, 4, "weight");
  const int64_t filters = weight.size(0), channels = weight.size(3);
  check_numel(weight, filters * 9 * channels, "weight");
  check_panels(panels, filters, channels, "panels");
  active_kernels().winograd_upsample_panels(
      {filters, channels, false, weight.const_data_ptr<float>(), panels.mutable_data_ptr<float>()});
}

// `y` is checked by the callers.
UpsampleNorm upsample_norm_of(const Tensor& x, const Tensor& panels, const Tensor& tables,
                              double negative_slope, Tensor y) {
  check_dense(x, 4, "x");
  STD_TORCH_CHECK(tables.dim() == 3, "tables: expected [3, N, Cout]");
  const int64_t images = x.size(0), outputs = tables.size(2);
  check_panels(panels, x.size(3), outputs, "panels");
  return {images,
          x.size(1),
          x.size(2),
          x.size(3),
          outputs,
          x.const_data_ptr<float>(),
          panels.const_data_ptr<float>(),
          norm_tables(tables, images * outputs, negative_slope),
          y.mutable_data_ptr<float>()};
}

void check_upsampled(const Tensor& y, const Tensor& x, int64_t channels) {
  check_dense(y, 4, "y");
  check_numel(y, 4 * x.size(0) * x.size(1) * x.size(2) * channels, "y");
}

void upsample_norm(const Tensor& x, const Tensor& panels, const Tensor& tables,
                   double negative_slope, Tensor y) {
  const UpsampleNorm a = upsample_norm_of(x, panels, tables, negative_slope, y);
  check_upsampled(y, x, a.outputs);
  active_kernels().upsample_norm(a);
}

void upsample_norm_taps(const Tensor& x, const Tensor& panels, const Tensor& tables,
                        double negative_slope, const Tensor& taps, const Tensor& bias, Tensor y) {
  const UpsampleNorm a = upsample_norm_of(x, panels, tables, negative_slope, y);
  check_dense(bias, 1, "bias");
  check_dense(taps, 2, "taps");
  const int64_t channels = bias.size(0);
  check_numel(taps, 9 * channels * a.outputs, "taps");
  check_upsampled(y, x, channels);
  active_kernels().upsample_norm_taps(
      {a, channels, taps.const_data_ptr<float>(), bias.const_data_ptr<float>()});
}

// `weight`: dense [outputs, 3, 3, inputs]; x and y: dense bfloat16 images [N, H, W, channels], y
// `scale` times as high and wide.
Conv3x3Shape conv3x3_shape(const Tensor& weight, const Tensor& x, const char* x_name,
                           const Tensor& y, const char* y_name, int64_t scale) {
  constexpr int64_t kMultiple = 32;
  STD_TORCH_CHECK(
      weight.dim() == 4 && weight.is_contiguous() && weight.size(1) == 3 && weight.size(2) == 3,
      "weight: expected dense 3x3 filters");
  const int64_t inputs = weight.size(3), outputs = weight.size(0);
  STD_TORCH_CHECK(inputs % kMultiple == 0 && outputs % kMultiple == 0,
                  "weight: expected multiples of ", kMultiple, " channels, got ", outputs, " and ",
                  inputs);
  const auto check_images = [](const Tensor& t, int64_t channels, const char* name) {
    check_dtype(t, ScalarType::BFloat16, name);
    STD_TORCH_CHECK(t.dim() == 4 && t.is_contiguous() && t.size(3) == channels, name,
                    ": expected dense images of ", channels, " channels");
  };
  check_images(x, inputs, x_name);
  check_images(y, outputs, y_name);
  STD_TORCH_CHECK(
      y.size(0) == x.size(0) && y.size(1) == scale * x.size(1) && y.size(2) == scale * x.size(2),
      y_name, ": expected ", scale, " times the height and width of ", x_name);
  return {x.size(0), x.size(1), x.size(2), inputs, outputs};
}

// from -> to, which is y of x or, `rotated`, grad_x of grad_y.
WinogradBFloat16 convolution(const Tensor& from, const Tensor& weight, bool rotated,
                             const float* bias, Tensor& to, int64_t scale) {
  Conv3x3Shape shape = rotated ? conv3x3_shape(weight, to, "grad_x", from, "grad_y", scale)
                               : conv3x3_shape(weight, from, "x", to, "y", scale);
  if (rotated) std::swap(shape.inputs, shape.outputs);
  const Dtype dtype = float_dtype(weight, "weight");
  STD_TORCH_CHECK(dtype != Dtype::kFloat16, "weight: expected float32 or bfloat16, got float16");
  return {shape, from.const_data_ptr(), dtype, weight.const_data_ptr(), rotated,
          bias,  to.mutable_data_ptr()};
}

void winograd_bfloat16(const Tensor& x, const Tensor& weight, bool rotated, Tensor y) {
  active_kernels().winograd_bfloat16(convolution(x, weight, rotated, nullptr, y, 1));
}

void winograd_bfloat16_gradient(const Tensor& grad_y, const Tensor& x, Tensor grad_weight) {
  const Conv3x3Shape shape = conv3x3_shape(grad_weight, x, "x", grad_y, "grad_y", 1);
  active_kernels().winograd_bfloat16_gradient({shape, grad_y.const_data_ptr(), x.const_data_ptr(),
                                               grad_weight.mutable_data_ptr<float>(), nullptr});
}

void winograd_upsample_bfloat16(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                Tensor y) {
  const Tensor shift = float_values(bias, weight.size(0), "bias");
  active_kernels().winograd_upsample_bfloat16(
      convolution(x, weight, false, shift.const_data_ptr<float>(), y, 2));
}

void winograd_upsample_bfloat16_gradient(const Tensor& grad_y, const Tensor& x,
                                         const Tensor& weight, Tensor grad_x, Tensor grad_weight,
                                         Tensor grad_bias) {
  const Conv3x3Shape shape = conv3x3_shape(grad_weight, x, "x", grad_y, "grad_y", 2);
  check_dtype(grad_bias, ScalarType::Double, "grad_bias");
  check_numel(grad_bias, shape.outputs, "grad_bias");
  active_kernels().winograd_upsample_bfloat16(
      convolution(grad_y, weight, true, nullptr, grad_x, 2));
  active_kernels().winograd_upsample_bfloat16_gradient(
      {shape, grad_y.const_data_ptr(), x.const_data_ptr(), grad_weight.mutable_data_ptr<float>(),
       grad_bias.mutable_data_ptr<double>()});
}

}  // namespace
}  // namespace fdda

STABLE_TORCH_LIBRARY_IMPL(fdda, CPU, m) {
  m.impl("_winograd_input", TORCH_BOX(&fdda::winograd_input));
  m.impl("_winograd_gradient", TORCH_BOX(&fdda::winograd_gradient));
  m.impl("_winograd_output", TORCH_BOX(&fdda::winograd_output));
  m.impl("_winograd_weights", TORCH_BOX(&fdda::winograd_weights));
  m.impl("_winograd_weight_gradient", TORCH_BOX(&fdda::winograd_weight_gradient));
  m.impl("_winograd_bfloat16", TORCH_BOX(&fdda::winograd_bfloat16));
  m.impl("_winograd_bfloat16_gradient", TORCH_BOX(&fdda::winograd_bfloat16_gradient));
  m.impl("_winograd_upsample_bfloat16", TORCH_BOX(&fdda::winograd_upsample_bfloat16));
  m.impl("_winograd_upsample_bfloat16_gradient",
         TORCH_BOX(&fdda::winograd_upsample_bfloat16_gradient));
  m.impl("_winograd_upsample_input", TORCH_BOX(&fdda::winograd_upsample_input));
  m.impl("_winograd_upsample_input_gradient", TORCH_BOX(&fdda::winograd_upsample_input_gradient));
  m.impl("_winograd_upsample_gradient", TORCH_BOX(&fdda::winograd_upsample_gradient));
  m.impl("_winograd_upsample_output", TORCH_BOX(&fdda::winograd_upsample_output));
  m.impl("_winograd_upsample_norm_output", TORCH_BOX(&fdda::winograd_upsample_norm_output));
  m.impl("_winograd_upsample_weights", TORCH_BOX(&fdda::winograd_upsample_weights));
  m.impl("_winograd_upsample_weight_gradient", TORCH_BOX(&fdda::winograd_upsample_weight_gradient));
  m.impl("_winograd_upsample_panels", TORCH_BOX(&fdda::winograd_upsample_panels));
  m.impl("_upsample_norm", TORCH_BOX(&fdda::upsample_norm));
  m.impl("_upsample_norm_taps", TORCH_BOX(&fdda::upsample_norm_taps));
}
