#pragma once

#include <cuda_runtime_api.h>

#include "../common/packed.h"

namespace fdda {
namespace cuda {

// Pointers are device pointers. Launch errors are left to cudaGetLastError.
void packed_conv2d(const PackedConv& conv, cudaStream_t stream);
void packed_linear_s32(const PackedLinearS32& linear, cudaStream_t stream);

}  // namespace cuda
}  // namespace fdda
