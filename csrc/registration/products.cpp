// Batched products of float32 matrices: checks and pointers, nothing numerical.
#include "layout.h"

namespace fdda {
namespace {

void products(const Tensor& a, const Tensor& b, Tensor out, bool add) {
  const Tensor* tensors[] = {&a, &b, &out};
  const char* names[] = {"a", "b", "out"};
  for (int i = 0; i < 3; ++i) {
    check_dtype(*tensors[i], ScalarType::Float, names[i]);
    STD_TORCH_CHECK(tensors[i]->dim() == 3 && tensors[i]->size(0) == a.size(0), names[i],
                    ": expected as many matrices as a has");
  }
  STD_TORCH_CHECK(b.size(1) == a.size(2), "b: expected ", a.size(2), " rows, got ", b.size(1));
  STD_TORCH_CHECK(out.is_contiguous(), "out: expected a dense tensor");
  check_numel(out, a.size(0) * a.size(1) * b.size(2), "out");
  active_kernels().products({a.size(0), a.size(1), a.size(2), b.size(2), a.const_data_ptr<float>(),
                             a.stride(0), a.stride(1), a.stride(2), b.const_data_ptr<float>(),
                             b.stride(0), b.stride(1), b.stride(2), out.mutable_data_ptr<float>(),
                             add});
}

}  // namespace
}  // namespace fdda

STABLE_TORCH_LIBRARY_IMPL(fdda, CPU, m) { m.impl("_products", TORCH_BOX(&fdda::products)); }
