// One kernel for every function of csrc/cuda/ptx.h and of the emulated CUDA, see
// test_primitives.py.
#include "../../csrc/cuda/launch.h"
#include "../../csrc/cuda/ptx.h"

using namespace fdda::cuda;

namespace {

__global__ void index_kernel(int* out) {
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] = block * 1000 + thread;
}

__global__ void shuffle_of_8_bytes_kernel(int64_t* out) {
  const int lane = threadIdx.x;
  out[lane] = __shfl_xor_sync(0xffffffff, (int64_t{1} << 40) * lane - lane, 5);
}

__global__ void max_bytes_kernel(const uint32_t* words, uint32_t* out) {
  out[threadIdx.x] = ptx::max_bytes(words[threadIdx.x], words[31 - threadIdx.x]);
}

__global__ void shuffle_kernel(int* out) {
  const int lane = threadIdx.x;
  const unsigned all = 0xffffffff;
  out[lane] = __shfl_sync(all, lane * 3, (lane + 5) % 32);
  out[32 + lane] = __shfl_xor_sync(all, lane * 3, 2);
  out[64 + lane] = __shfl_up_sync(all, lane * 3, 4);
  out[96 + lane] = static_cast<int>(__shfl_down_sync(all, lane * 0.5f, 4) * 2);
}

__global__ void add_bytes_kernel(const uint32_t* words, uint32_t* out) {
  out[threadIdx.x] = ptx::add_bytes(words[threadIdx.x], threadIdx.x);
}

// Rows of 16 bytes in shared memory, rotated so that addresses and rows differ.
template <int kCount, bool kTransposed>
__global__ void load_matrices_kernel(const uint4* rows, uint32_t* out) {
  uint8_t* shared = ptx::dynamic_shared();
  const int lane = threadIdx.x, rotated = (lane + 3) % 32;
  ptx::store_16(shared + rotated * 16, ptx::load_16(rows + lane));
  __syncthreads();
  uint32_t registers[kCount];
  ptx::load_matrices<kCount, kTransposed>(registers, shared + rotated * 16);
  for (int i = 0; i < kCount; ++i) out[i * 32 + lane] = registers[i];
}

using Mma = void (*)(int32_t (&)[4], const uint32_t (&)[4], const uint32_t (&)[2]);

template <Mma mma>
__global__ void mma_kernel(const uint32_t* a, const uint32_t* b, const int32_t* c, int32_t* out) {
  const int lane = threadIdx.x;
  uint32_t a_registers[4], b_registers[2];
  int32_t sums[4];
  for (int i = 0; i < 4; ++i) a_registers[i] = a[lane * 4 + i];
  for (int i = 0; i < 2; ++i) b_registers[i] = b[lane * 2 + i];
  for (int i = 0; i < 4; ++i) sums[i] = c[lane * 4 + i];
  mma(sums, a_registers, b_registers);
  for (int i = 0; i < 4; ++i) out[lane * 4 + i] = sums[i];
}

// Two groups; what the second one brings is read by the neighbours, in another warp, too.
template <int kSize>
__global__ void copy_kernel(const uint8_t* in, uint8_t* out) {
  uint8_t* shared = ptx::dynamic_shared();
  const int thread = threadIdx.x, neighbour = (thread + 1) % 64;
  ptx::copy_async<kSize>(shared + thread * kSize, in + thread * kSize, thread % (kSize + 1));
  ptx::commit_copies();
  ptx::copy_async<kSize>(shared + (64 + thread) * kSize, in + (64 + thread) * kSize, kSize);
  ptx::commit_copies();
  ptx::wait_copies<1>();
  for (int i = thread * kSize; i < (thread + 1) * kSize; ++i) out[i] = shared[i];
  ptx::wait_copies<0>();
  __syncthreads();
  for (int i = neighbour * kSize; i < (neighbour + 1) * kSize; ++i) {
    out[64 * kSize + i] = shared[64 * kSize + i];
  }
}

}  // namespace

extern "C" {

void index(int* out) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(2, 3, 2);
  config.blockDim = dim3(4, 3, 2);
  cudaLaunchKernelEx(&config, index_kernel, out);
}

void shuffle(int* out) { launch(shuffle_kernel, 1, 32, 0, nullptr, out); }

void shuffle_of_8_bytes(int64_t* out) { launch(shuffle_of_8_bytes_kernel, 1, 32, 0, nullptr, out); }

void max_bytes(const uint32_t* words, uint32_t* out) {
  launch(max_bytes_kernel, 1, 32, 0, nullptr, words, out);
}

void add_bytes(const uint32_t* words, uint32_t* out) {
  launch(add_bytes_kernel, 1, 32, 0, nullptr, words, out);
}

void load_matrices(int count, bool transposed, const uint4* rows, uint32_t* out) {
  auto kernel =
      count == 1   ? transposed ? load_matrices_kernel<1, true> : load_matrices_kernel<1, false>
      : count == 2 ? transposed ? load_matrices_kernel<2, true> : load_matrices_kernel<2, false>
      : transposed ? load_matrices_kernel<4, true>
                   : load_matrices_kernel<4, false>;
  launch(kernel, 1, 32, 512, nullptr, rows, out);
}

void mma(int bits, bool is_signed, const uint32_t* a, const uint32_t* b, const int32_t* c,
         int32_t* out) {
  auto kernel = bits == 8   ? is_signed ? mma_kernel<ptx::mma_s8_s8> : mma_kernel<ptx::mma_u8_s8>
                : is_signed ? mma_kernel<ptx::mma_s4_s4>
                            : mma_kernel<ptx::mma_u4_s4>;
  launch(kernel, 1, 32, 0, nullptr, a, b, c, out);
}

void copy(int size, const uint8_t* in, uint8_t* out) {
  auto kernel = size == 4 ? copy_kernel<4> : size == 8 ? copy_kernel<8> : copy_kernel<16>;
  launch(kernel, 1, 64, 128 * size, nullptr, in, out);
}
}
