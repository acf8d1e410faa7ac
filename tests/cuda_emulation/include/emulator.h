// Runs CUDA kernels on the CPU, every thread of a block as a fibre of one system thread, and stops
// a launch at the first of these faults:
//
//   out of bounds      an access beside a buffer of `allocate`, or beside the shared memory
//   misaligned         a vector access, cp.async or ldmatrix off its size
//   uninitialised      a read of memory that nothing has written
//   in flight          an access to what cp.async writes before its group was waited for
//   race               two accesses of a block's threads to a shared byte, one of them a write,
//                      without a barrier between; a global byte used after another use wrote it
//   divergent          __syncthreads without all threads, a warp's function without all lanes
//
// Kernels are compiled with -fsanitize=thread but linked with this in place of the sanitizer's
// library: the compiler calls a function (__tsan_read4, ...) at every access to memory, and those
// calls are where the accesses are checked. Barriers order, shuffles and mma do not.
// Variables of static shared memory lie side by side: an access from one into the next is not seen.
// In templates GCC puts them elsewhere, where no access is seen: use dynamic_shared there.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <functional>

struct cudaLaunchConfig_t;

namespace emulation {

// Shared memory a kernel can have without asking for more.
constexpr size_t kSharedBytes = 48 * 1024;

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Returns 1 and leaves a message, see emulation_error, when the kernel has a fault.
int launch(const cudaLaunchConfig_t& config, const std::function<void()>& kernel);

// Of the running thread.
int current_thread();
uint8_t* dynamic_shared();
void block_barrier();
void warp_barrier();
void check_aligned(const void* address, size_t bytes);

// Functions of whole warps. Fragments are laid out as in the PTX ISA.
uint32_t shuffle(uint32_t value, int lane);
void load_matrices(uint32_t* registers, int count, bool transposed, const void* row);

struct Format {
  int bits;
  bool is_signed;
};
// c += a b for 16 x K by K x 8 with K = 256 / bits; a: 4 registers, b: 2, c: 4.
void multiply(int32_t* c, const uint32_t* a, Format a_format, const uint32_t* b, Format b_format);

// cp.async: `bytes` of the `size` bytes come from global memory, the others are 0.
void copy_async(void* shared, const void* global, int size, int bytes);
void commit_copies();
void wait_copies(int groups_left);

}  // namespace emulation
