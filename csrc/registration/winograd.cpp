// CPU passes of conv3x3: checks and pointers, nothing numerical. Dense float32 tensors.
#include "layout.h"

namespace fdda {
namespace {

void check_dense(const Tensor& t, int64_t dim, const char* argument) {
  check_dtype(t, ScalarType::Float, argument);
  STD_TORCH_CHECK(t.dim() == dim && t.is_contiguous(), argument, ": expected a dense tensor of ",
                  dim, " dimensions");
}

// `images`: [N, H, W, channels]; `positions`: [36, tiles from `tile` on, channels].
WinogradTiles tiles_of(const Tensor& images, const char* argument, const Tensor& positions,
                       int64_t tile) {
  check_dense(images, 4, argument);
  check_dense(positions, 3, "positions");
  const int64_t count = positions.size(1), channels = images.size(3);
  check_numel(positions, 36 * count * channels, "positions");
  const int64_t tiles = images.size(0) * ceil_div(images.size(1), 4) * ceil_div(images.size(2), 4);
  STD_TORCH_CHECK(0 <= tile && tile + count <= tiles, "tile: expected tiles of ", argument,
                  ", got ", tile, " + ", count);
  return {images.size(1), images.size(2), channels, tile, tile + count, nullptr, nullptr};
}

WinogradTiles to_positions(const Tensor& images, const char* argument, const Tensor& positions,
                           int64_t tile) {
  WinogradTiles a = tiles_of(images, argument, positions, tile);
  a.from = images.const_data_ptr<float>();
  a.to = positions.mutable_data_ptr<float>();
  return a;
}

void winograd_input(const Tensor& x, Tensor positions, int64_t tile) {
  active_kernels().winograd_input(to_positions(x, "x", positions, tile));
}

void winograd_gradient(const Tensor& grad_y, Tensor positions, int64_t tile) {
  active_kernels().winograd_gradient(to_positions(grad_y, "grad_y", positions, tile));
}

void winograd_output(const Tensor& positions, Tensor y, int64_t tile) {
  WinogradTiles a = tiles_of(y, "y", positions, tile);
  a.from = positions.const_data_ptr<float>();
  a.to = y.mutable_data_ptr<float>();
  active_kernels().winograd_output(a);
}

// `weight`: [filters, 3, 3, channels]; `positions`: [36, filters, channels].
WinogradWeights weights_of(const Tensor& weight, const Tensor& positions, bool rotated,
                           const Tensor& from, const Tensor& to) {
  check_dense(weight, 4, "weight");
  check_dense(positions, 3, "positions");
  const int64_t filters = weight.size(0), channels = weight.size(3);
  check_numel(weight, filters * 9 * channels, "weight");
  check_numel(positions, 36 * filters * channels, "positions");
  return {filters, channels, rotated, from.const_data_ptr<float>(), to.mutable_data_ptr<float>()};
}

void winograd_weights(const Tensor& weight, Tensor positions, bool rotated) {
  active_kernels().winograd_weights(weights_of(weight, positions, rotated, weight, positions));
}

void winograd_weight_gradient(const Tensor& positions, Tensor grad_weight) {
  active_kernels().winograd_weight_gradient(
      weights_of(grad_weight, positions, false, positions, grad_weight));
}

}  // namespace
}  // namespace fdda

STABLE_TORCH_LIBRARY_IMPL(fdda, CPU, m) {
  m.impl("_winograd_input", TORCH_BOX(&fdda::winograd_input));
  m.impl("_winograd_gradient", TORCH_BOX(&fdda::winograd_gradient));
  m.impl("_winograd_output", TORCH_BOX(&fdda::winograd_output));
  m.impl("_winograd_weights", TORCH_BOX(&fdda::winograd_weights));
  m.impl("_winograd_weight_gradient", TORCH_BOX(&fdda::winograd_weight_gradient));
}
