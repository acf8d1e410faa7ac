// Products of bfloat16, two neighbours of a sum at a time: a pair is those two numbers.
#pragma once

#include "vectors.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

inline Bits load_pairs(const uint32_t* from) {
  Bits pairs;
  memcpy(&pairs, from, sizeof pairs);
  return pairs;
}

// sum + the products of the first and of the second numbers of pairs.
inline Vector add_dot(uint32_t a, Bits b, Vector sum) {
#if defined(__AVX512BF16__)
  return bits_as<Vector>(_mm512_dpbf16_ps(
      bits_as<__m512>(sum), bits_as<__m512bh>(_mm512_set1_epi32(a)), bits_as<__m512bh>(b)));
#else
  const float first = bits_as<float>(a << 16), second = bits_as<float>(a & 0xffff0000u);
  return sum + first * bits_as<Vector>(b << 16) + second * bits_as<Vector>(b & 0xffff0000u);
#endif
}

}  // namespace
}  // namespace FDDA_ISA
}  // namespace fdda
