#pragma once

#include <cuda_runtime_api.h>

namespace fdda {
namespace cuda {

// kernel<<<blocks, threads, shared_bytes, stream>>>(arguments...) without syntax of its own.
// Errors are left to cudaGetLastError.
template <typename... Parameters>
void launch(void (*kernel)(Parameters...), dim3 blocks, int threads, size_t shared_bytes,
            cudaStream_t stream, Parameters... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace cuda
}  // namespace fdda
