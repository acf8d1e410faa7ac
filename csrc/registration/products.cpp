// Batched products of float32 matrices, and products of bfloat16: checks and pointers, nothing
// numerical.
#include "layout.h"

namespace fdda {
namespace {

void products(const Tensor& a, const Tensor& b, Tensor out, bool add) {
  const Tensor* tensors[] = {&a, &b, &out};
  const char* names[] = {"a", "b", "out"};
  const int64_t dims = a.dim();
  STD_TORCH_CHECK(dims == 2 || dims == 3, "a: expected one matrix or a batch of them");
  const int64_t count = dims == 3 ? a.size(0) : 1;
  for (int i = 0; i < 3; ++i) {
    STD_TORCH_CHECK(tensors[i]->dim() == dims && (dims == 2 || tensors[i]->size(0) == count),
                    names[i], ": expected as many matrices as a has");
  }
  const int64_t rows = a.size(dims - 2), depth = a.size(dims - 1), columns = b.size(dims - 1);
  STD_TORCH_CHECK(b.size(dims - 2) == depth, "b: expected ", depth, " rows, got ",
                  b.size(dims - 2));
  STD_TORCH_CHECK(out.is_contiguous(), "out: expected a dense tensor");
  check_numel(out, count * rows * columns, "out");
  if (a.scalar_type() == ScalarType::BFloat16) {
    check_dtype(b, ScalarType::BFloat16, "b");
    check_dtype(out, add ? ScalarType::Float : ScalarType::BFloat16, "out");
    STD_TORCH_CHECK(dims == 2, "a: expected one matrix of bfloat16");
    void* to = out.mutable_data_ptr();
    return active_kernels().product_bfloat16(
        {rows, depth, columns, static_cast<const uint16_t*>(a.const_data_ptr()), a.stride(0),
         a.stride(1), static_cast<const uint16_t*>(b.const_data_ptr()), b.stride(0), b.stride(1),
         add ? nullptr : static_cast<uint16_t*>(to), add ? static_cast<float*>(to) : nullptr});
  }
  for (int i = 0; i < 3; ++i) check_dtype(*tensors[i], ScalarType::Float, names[i]);
  active_kernels().products({count, rows, depth, columns, a.const_data_ptr<float>(),
                             dims == 3 ? a.stride(0) : 0, a.stride(dims - 2), a.stride(dims - 1),
                             b.const_data_ptr<float>(), dims == 3 ? b.stride(0) : 0,
                             b.stride(dims - 2), b.stride(dims - 1), out.mutable_data_ptr<float>(),
                             add});
}

}  // namespace
}  // namespace fdda

STABLE_TORCH_LIBRARY_IMPL(fdda, CPU, m) { m.impl("_products", TORCH_BOX(&fdda::products)); }
