// bfloat16 and float16 in plain integer arithmetic that compilers vectorise for every target.
// F is float and U uint32_t, or F is a vector of floats and U one as long of uint32_t.
#pragma once

#include <stdint.h>
#include <string.h>

namespace fdda {

template <class To, class From>
static inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "as many bits");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

struct BFloat16 {
  uint16_t bits;

  template <class F, class U>
  static inline F value(U half) {
    return bits_as<F>(half << 16);
  }

  // The lower one of two halves.
  template <class F, class U>
  static inline F low_value(U both) {
    return value<F>(both);
  }

  template <class U, class F>
  static inline U rounded(F v) {
    const U bits = bits_as<U>(v);
    const U half = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    return v != v ? 0x7fc0u + U{} : half;
  }
};

struct Float16 {
  uint16_t bits;

  template <class F, class U>
  static inline F value(U half) {
    // Moving the exponent field into place leaves the bias 112 short; the product restores it and
    // normalises subnormals. Infinity and NaN then still lack their all-ones exponent.
    const U magnitude = (half & 0x7fffu) << 13;
    const U special = magnitude >= 0x0f800000u ? 0x7f800000u + U{} : U{};
    const U finite = bits_as<U>(bits_as<F>(magnitude) * 0x1p112f);
    return bits_as<F>(finite | special | (half & 0x8000u) << 16);
  }

  template <class F, class U>
  static inline F low_value(U both) {
    return value<F>(both & 0xffffu);
  }

  template <class U, class F>
  static inline U rounded(F v) {
    // Scaling up and down saturates what overflows to infinity; adding a power of two whose unit in
    // the last place is that of the result lets the addition do the rounding, half to even.
    const U bits = bits_as<U>(v);
    const U magnitude = bits & 0x7fffffffu;
    const F scaled = bits_as<F>(magnitude) * 0x1p112f * 0x1p-110f;
    const U exponent = bits & 0x7f800000u;
    const U base_bits = exponent < 0x38800000u ? 0x38800000u + U{} : exponent;
    const U base = bits_as<U>(bits_as<F>(base_bits + 0x07800000u) + scaled);
    const U half = (base >> 13 & 0x7c00u) + (base & 0x0fffu);
    const U sign = bits >> 16 & 0x8000u;
    return sign | (magnitude > 0x7f800000u ? 0x7e00u + U{} : half);
  }
};

static inline float load(const float& v) { return v; }

template <class T>
static inline float load(const T& v) {
  return T::template value<float>(uint32_t{v.bits});
}

static inline void store(float& out, float v) { out = v; }

template <class T>
static inline void store(T& out, float v) {
  out.bits = static_cast<uint16_t>(T::template rounded<uint32_t>(v));
}

}  // namespace fdda
