// Dtypes and strides of tensors that kernels read as dense memory.
#pragma once

#include <algorithm>

#include "../common/checks.h"
#include "../cpu/kernels.h"

namespace fdda {

inline Dtype float_dtype(const Tensor& t, const char* argument) {
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
inline std::optional<std::vector<int64_t>> dense_order(const Tensor& t) {
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
inline Tensor dense(const Tensor& x) {
  return x.numel() == 0 || dense_order(x) ? x : torch::stable::clone(x);
}

// t, or a copy of it with the strides of x, which must be dense.
inline Tensor with_strides_of(const Tensor& x, const Tensor& t) {
  const auto wanted = x.strides(), found = t.strides();
  if (std::equal(wanted.begin(), wanted.end(), found.begin(), found.end())) return t;
  Tensor copy = torch::stable::empty_like(x);
  torch::stable::copy_(copy, t);
  return copy;
}

// t, which has `numel` float32 elements, in dense memory.
inline Tensor float_values(const Tensor& t, int64_t numel, const char* argument) {
  check_dtype(t, ScalarType::Float, argument);
  check_numel(t, numel, argument);
  return torch::stable::contiguous(t);
}

// Memory for a gradient like t; empty where it is not wanted.
inline Tensor wanted_like(const Tensor& t, bool wanted) {
  return wanted ? torch::stable::empty_like(t) : torch::stable::new_empty(t, {0});
}

// grad with the strides of x, which must be dense.
inline Tensor checked_grad(const Tensor& grad, const Tensor& x) {
  check_dtype(grad, x.scalar_type(), "grad");
  check_numel(grad, x.numel(), "grad");
  return with_strides_of(x, grad);
}

// `tables`: [3, size] of mean, scale and bias, by image and channel.
inline NormTables norm_tables(const Tensor& tables, int64_t size, double negative_slope) {
  check_dtype(tables, ScalarType::Float, "tables");
  check_numel(tables, 3 * size, "tables");
  STD_TORCH_CHECK(tables.is_contiguous(), "tables: expected a dense tensor");
  const float* table = tables.const_data_ptr<float>();
  return {table, table + size, table + 2 * size, static_cast<float>(negative_slope)};
}

}  // namespace fdda
