// The PTX instructions of the kernels, one small function each; PTX ISA names in the comments.
// g++ compiles the kernels for tests/cuda_emulation, which has the same functions for the CPU.
#pragma once

#include <stdint.h>

#if !defined(__CUDACC__)
#include <ptx_emulation.h>
#else

namespace fdda {
namespace cuda {
namespace ptx {

// The shared memory of the launch.
__device__ inline uint8_t* dynamic_shared() {
  extern __shared__ __align__(128) uint8_t bytes[];
  return bytes;
}

__device__ inline uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

__device__ inline uint4 load_16(const void* address) { return *static_cast<const uint4*>(address); }

__device__ inline void store_16(void* address, uint4 value) {
  *static_cast<uint4*>(address) = value;
}

// cp.async: `bytes` (0 to kSize) come from global memory, the others of the kSize are 0.
// Only copies of 16 bytes can leave the L1 cache out.
template <int kSize>
__device__ inline void copy_async(void* shared, const void* global, int bytes) {
  static_assert(kSize == 4 || kSize == 8 || kSize == 16, "sizes of cp.async");
  if constexpr (kSize == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                 "l"(global), "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)),
                 "l"(global), "n"(kSize), "r"(bytes)
                 : "memory");
  }
}

// cp.async.commit_group
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// cp.async.wait_group: all of this thread's groups but the last kGroups are complete.
template <int kGroups>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// ldmatrix: kCount matrices of 8 rows of 16 bytes; lane 8 i + r has the address of row r of matrix
// i. Lane l gets bytes 4 (l % 4) and on of row l / 4 of each, or transposed in units of 2 bytes.
template <int kCount, bool kTransposed = false>
__device__ inline void load_matrices(uint32_t (&registers)[kCount], const void* row) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4, "counts of ldmatrix");
  const uint32_t address = shared_address(row);
#define FDDA_LDMATRIX(modifiers, operands, last, ...)                                              \
  if constexpr (kTransposed) {                                                                     \
    asm volatile("ldmatrix.sync.aligned.m8n8." modifiers ".trans.shared.b16 {" operands            \
                 "}, [" last "];"                                                                  \
                 : __VA_ARGS__                                                                     \
                 : "r"(address)                                                                    \
                 : "memory");                                                                      \
  } else {                                                                                         \
    asm volatile("ldmatrix.sync.aligned.m8n8." modifiers ".shared.b16 {" operands "}, [" last "];" \
                 : __VA_ARGS__                                                                     \
                 : "r"(address)                                                                    \
                 : "memory");                                                                      \
  }
  if constexpr (kCount == 1) {
    FDDA_LDMATRIX("x1", "%0", "%1", "=r"(registers[0]))
  } else if constexpr (kCount == 2) {
    FDDA_LDMATRIX("x2", "%0, %1", "%2", "=r"(registers[0]), "=r"(registers[1]))
  } else {
    FDDA_LDMATRIX("x4", "%0, %1, %2, %3", "%4", "=r"(registers[0]), "=r"(registers[1]),
                  "=r"(registers[2]), "=r"(registers[3]))
  }
#undef FDDA_LDMATRIX
}

// Whether the processor multiplies 4 bits, which those before and after sm_8x do by other means.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ / 100 != 8
constexpr bool kHasMmaOf4Bits = false;
#else
constexpr bool kHasMmaOf4Bits = true;
#endif

// mma: c += a b, a 16 x K, b K x 8, c 16 x 8; K = 32 for 8 bits, 64 for 4. With E = K / 8 elements
// to a register, group g = lane / 4 and t = lane % 4:
//   a[i]  row g + 8 (i % 2), columns E (t + 4 (i / 2)) and on
//   b[i]  rows E (t + 4 i) and on, column g
//   c[i]  row g + 8 (i / 2), column 2 t + i % 2
#define FDDA_MMA(name, types)                                                                    \
  __device__ inline void name(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
    asm volatile("mma.sync.aligned." types                                                       \
                 ".s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"          \
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])                                \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));            \
  }
FDDA_MMA(mma_u8_s8, "m16n8k32.row.col.s32.u8.s8")
FDDA_MMA(mma_s8_s8, "m16n8k32.row.col.s32.s8.s8")
FDDA_MMA(mma_u4_s4, "m16n8k64.row.col.s32.u4.s4")
FDDA_MMA(mma_s4_s4, "m16n8k64.row.col.s32.s4.s4")
#undef FDDA_MMA

// vmaxu4: of each of the four bytes.
__device__ inline uint32_t max_bytes(uint32_t a, uint32_t b) { return __vmaxu4(a, b); }

// dp4a: sum + the four bytes.
__device__ inline uint32_t add_bytes(uint32_t bytes, uint32_t sum) {
  return __dp4a(bytes, 0x01010101u, sum);
}

}  // namespace ptx
}  // namespace cuda
}  // namespace fdda

#endif
