// What the sources in csrc/cuda use of CUDA, for g++: see emulator.h for what is checked.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <tuple>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
// One block runs at a time, so a static is what its threads share; the section tells where it is.
#define __shared__ static __attribute__((section("emulated_shared")))

struct uint4 {
  uint32_t x, y, z, w;
} __attribute__((aligned(16)));

struct int2 {
  int32_t x, y;
} __attribute__((aligned(8)));

struct dim3 {
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  unsigned x, y, z;
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

using cudaStream_t = void*;
using cudaError_t = int;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  return emulation::launch(
      *config, [=, copy = std::tuple<Parameters...>(arguments...)] { std::apply(kernel, copy); });
}

inline void __syncthreads() { emulation::block_barrier(); }
inline void __syncwarp() { emulation::warp_barrier(); }

inline int emulated_lane() { return emulation::current_thread() % 32; }

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  if (mask != 0xffffffff) emulation::fail("__shfl_sync: the emulation knows whole warps only");
  uint32_t words[sizeof(T) / 4];
  __builtin_memcpy(words, &value, sizeof(T));
  for (uint32_t& word : words) word = emulation::shuffle(word, lane % 32);
  __builtin_memcpy(&value, words, sizeof(T));
  return value;
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return __shfl_sync(mask, value, emulated_lane() ^ lanes);
}

// Beyond the ends of the warp a lane keeps its own value.
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int lanes) {
  const int lane = emulated_lane();
  return __shfl_sync(mask, value, lane < lanes ? lane : lane - lanes);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, int lanes) {
  const int lane = emulated_lane();
  return __shfl_sync(mask, value, lane + lanes > 31 ? lane : lane + lanes);
}
