// bfloat16 and float16 in plain integer arithmetic that compilers vectorise for every target.
#pragma once

#include <stdint.h>
#include <string.h>

namespace fdda {

static inline uint32_t float_bits(float v) {
  uint32_t bits;
  memcpy(&bits, &v, sizeof bits);
  return bits;
}

static inline float bits_float(uint32_t bits) {
  float v;
  memcpy(&v, &bits, sizeof v);
  return v;
}

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

static inline float load(const float& v) { return v; }

static inline float load(const BFloat16& v) { return bits_float(uint32_t{v.bits} << 16); }

static inline float load(const Float16& v) {
  // Moving the exponent field into place leaves the bias 112 short; the product restores it and
  // normalises subnormals. Infinity and NaN then still lack their all-ones exponent.
  const uint32_t magnitude = uint32_t{v.bits & 0x7fffu} << 13;
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  const uint32_t finite = float_bits(bits_float(magnitude) * 0x1p112f);
  return bits_float(finite | special | uint32_t{v.bits & 0x8000u} << 16);
}

static inline void store(float& out, float v) { out = v; }

static inline void store(BFloat16& out, float v) {
  const uint32_t bits = float_bits(v);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  out.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

static inline void store(Float16& out, float v) {
  // Scaling up and down saturates what overflows to infinity; adding a power of two whose unit in
  // the last place is that of the result lets the addition do the rounding, half to even.
  const uint32_t bits = float_bits(v);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const float scaled = bits_float(magnitude) * 0x1p112f * 0x1p-110f;
  const uint32_t exponent = bits & 0x7f800000u;
  const uint32_t base_bits = exponent < 0x38800000u ? 0x38800000u : exponent;
  const uint32_t base = float_bits(bits_float(base_bits + 0x07800000u) + scaled);
  const uint32_t half = (base >> 13 & 0x7c00u) + (base & 0x0fffu);
  const uint32_t sign = bits >> 16 & 0x8000u;
  out.bits = static_cast<uint16_t>(sign | (magnitude > 0x7f800000u ? 0x7e00u : half));
}

}  // namespace fdda
