// Arithmetic shared by the CPU and CUDA kernels, so that one definition decides every bit.
//
// Everything here has internal linkage: the CPU kernels are compiled once per instruction set, and
// a function merged by the linker across those translation units could carry the wrong
// instructions. Compile with floating-point contraction off: a fused multiply-add rounds
// differently.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define FDDA_HOST_DEVICE __host__ __device__
#else
#define FDDA_HOST_DEVICE
#endif

namespace fdda {

// Packed weights, uint8 [ceil(N/16), ceil(K/4), bits, 8]:
//
//   panel = 16 output channels        block = 16 channels x 4 consecutive k = 64 codes
//
//            k: 0..3     4..7
//   n: 0  ┌─────────┬─────────┬──        block in memory: `bits` planes of 8 bytes
//      .  │ block 0 │ block 1 │ ..         plane b, little endian uint64: bit j = bit b of code j
//     15  └─────────┴─────────┴──          code j sits at n = j / 4, k = j % 4
//
// Codes are two's complement, so the top plane weighs -2^(bits-1). Padding codes are 0.
// A plane is a 64-lane mask over the s8 operand of vpdpbusd: AVX-512 rebuilds 64 weights with one
// mask load and one masked add per plane.
constexpr int kPanelRows = 16;
constexpr int kBlockDepth = 4;
constexpr int kPlaneBytes = kPanelRows * kBlockDepth / 8;

FDDA_HOST_DEVICE static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Code of output channel `row` at depth `col`; `depth_blocks` is ceil(K/4).
FDDA_HOST_DEVICE static inline int32_t packed_code(const uint8_t* packed, int bits,
                                                   int64_t depth_blocks, int64_t row, int64_t col) {
  const int64_t block = row / kPanelRows * depth_blocks + col / kBlockDepth;
  const int lane = static_cast<int>(row % kPanelRows * kBlockDepth + col % kBlockDepth);
  const uint8_t* plane = packed + block * bits * kPlaneBytes + lane / 8;
  int32_t code = 0;
  for (int b = 0; b < bits; ++b) code |= ((plane[b * kPlaneBytes] >> (lane % 8)) & 1) << b;
  const int32_t sign = 1 << (bits - 1);
  return (code ^ sign) - sign;
}

// Round half to even for |v| < 2^22; NaN stays NaN, -0.0 becomes 0.0.
FDDA_HOST_DEVICE static inline float round_half_even(float v) {
  constexpr float magic = 12582912.0f;  // 1.5 * 2^23: its unit in the last place is 1
  return (v + magic) - magic;
}

// NaN passes through, as in torch.clamp.
FDDA_HOST_DEVICE static inline float clamp(float v, float lo, float hi) {
  v = v < lo ? lo : v;
  return v > hi ? hi : v;
}

// Integer accumulator to output scale; batch norm, bias and both scales are folded into the two.
FDDA_HOST_DEVICE static inline float dequantize(int64_t acc, float multiplier, float bias) {
  // float(double(acc)) without doubles, which most GPUs are slow at: of an int32 the double is
  // exact.
  const int32_t narrow = static_cast<int32_t>(acc);
  const float v =
      narrow == acc ? static_cast<float>(narrow) : static_cast<float>(static_cast<double>(acc));
  return v * multiplier + bias;
}

// The code of a real number, see Quantize in codes.h; half = 2^(bits - 1).
FDDA_HOST_DEVICE static inline uint8_t quantize_code(float x, float scale, float zero_point,
                                                     float half) {
  const float q = round_half_even(clamp(scale * x - zero_point, -half, half - 1.0f));
  return static_cast<uint8_t>(static_cast<int32_t>(q + half));
}

// NaN becomes lo.
FDDA_HOST_DEVICE static inline uint8_t requantize(float v, float lo, float hi) {
  v = v > lo ? v : lo;
  v = v > hi ? hi : v;
  return static_cast<uint8_t>(static_cast<int32_t>(round_half_even(v)));
}

}  // namespace fdda
