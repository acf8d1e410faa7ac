// Pooling of codes; pointers are device pointers, launch errors are left to cudaGetLastError.
#pragma once

#include <cuda_runtime_api.h>

#include "../common/codes.h"

namespace fdda {
namespace cuda {

void max_pool(const MaxPool& a, cudaStream_t stream);
void sum_pool(const SumPool& a, cudaStream_t stream);

}  // namespace cuda
}  // namespace fdda
