// Kernels of one thread an item.
#pragma once

#include "../common/arithmetic.h"
#include "launch.h"

namespace fdda {
namespace cuda {

constexpr int kThreads = 256, kLanes = 32;
constexpr int64_t kMaxBlocks = 1 << 20;  // the threads step over what is left

template <typename... Parameters>
void launch_for_each(void (*kernel)(Parameters...), int64_t count, cudaStream_t stream,
                     Parameters... arguments) {
  const int64_t blocks = ceil_div(count, kThreads);
  if (blocks == 0) return;
  launch(kernel, static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks), kThreads, 0,
         stream, arguments...);
}

// body(i) for all i below count, by all threads of the grid; those of a warp have adjacent i.
template <typename Body>
__device__ void for_each(int64_t count, Body body) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += step) {
    body(i);
  }
}

}  // namespace cuda
}  // namespace fdda
