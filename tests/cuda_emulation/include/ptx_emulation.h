// The functions of csrc/cuda/ptx.h, run by the emulator.
#pragma once

#include <string.h>

#include "cuda_runtime_api.h"

namespace fdda {
namespace cuda {
namespace ptx {

inline uint8_t* dynamic_shared() { return emulation::dynamic_shared(); }

inline uint4 load_16(const void* address) {
  emulation::check_aligned(address, 16);
  return *static_cast<const uint4*>(address);
}

inline void store_16(void* address, uint4 value) {
  emulation::check_aligned(address, 16);
  *static_cast<uint4*>(address) = value;
}

template <int kSize>
void copy_async(void* shared, const void* global, int bytes) {
  static_assert(kSize == 4 || kSize == 8 || kSize == 16);
  emulation::copy_async(shared, global, kSize, bytes);
}

inline void commit_copies() { emulation::commit_copies(); }

template <int kGroups>
void wait_copies() {
  emulation::wait_copies(kGroups);
}

template <int kCount, bool kTransposed = false>
void load_matrices(uint32_t (&registers)[kCount], const void* row) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4);
  emulation::load_matrices(registers, kCount, kTransposed, row);
}

constexpr bool kHasMmaOf4Bits = true;

inline void mma_u8_s8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::multiply(c, a, {8, false}, b, {8, true});
}

inline void mma_s8_s8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::multiply(c, a, {8, true}, b, {8, true});
}

inline void mma_u4_s4(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::multiply(c, a, {4, false}, b, {4, true});
}

inline void mma_s4_s4(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::multiply(c, a, {4, true}, b, {4, true});
}

inline uint32_t max_bytes(uint32_t a, uint32_t b) {
  uint32_t most = 0;
  for (int i = 0; i < 32; i += 8) {
    const uint32_t x = a >> i & 0xff, y = b >> i & 0xff;
    most |= (x > y ? x : y) << i;
  }
  return most;
}

inline uint32_t add_bytes(uint32_t bytes, uint32_t sum) {
  for (int i = 0; i < 4; ++i) sum += bytes >> (8 * i) & 0xff;
  return sum;
}

}  // namespace ptx
}  // namespace cuda
}  // namespace fdda
