// Batched products of float32 matrices: checks and pointers, nothing numerical.
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
    check_dtype(*tensors[i], ScalarType::Float, names[i]);
    STD_TORCH_CHECK(tensors[i]->dim() == dims && (dims == 2 || tensors[i]->size(0) == count),
                    names[i], ": expected as many matrices as a has");
  }
  const int64_t rows = a.size(dims - 2), depth = a.size(dims - 1), columns = b.size(dims - 1);
  STD_TORCH_CHECK(b.size(dims - 2) == depth, "b: expected ", depth, " rows, got ",
                  b.size(dims - 2));
  STD_TORCH_CHECK(out.is_contiguous(), "out: expected a dense tensor");
  check_numel(out, count * rows * columns, "out");
  active_kernels().products({count, rows, depth, columns, a.const_data_ptr<float>(),
                             dims == 3 ? a.stride(0) : 0, a.stride(dims - 2), a.stride(dims - 1),
                             b.const_data_ptr<float>(), dims == 3 ? b.stride(0) : 0,
                             b.stride(dims - 2), b.stride(dims - 1), out.mutable_data_ptr<float>(),
                             add});
}

}  // namespace
}  // namespace fdda

STABLE_TORCH_LIBRARY_IMPL(fdda, CPU, m) { m.impl("_products", TORCH_BOX(&fdda::products)); }
