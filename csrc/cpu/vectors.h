// float32 vectors as wide as the instruction set has them. Loops over plain arrays are left to the
// compiler elsewhere; these are for sums that must stay in registers from one pixel to the next.
// V is Vector, Pair or, for the channels that are left, float.
#pragma once

#include <string.h>

#include <type_traits>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "half.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorLanes = 16;
#elif defined(__AVX__)
constexpr int kVectorLanes = 8;
#else
constexpr int kVectorLanes = 4;
#endif
typedef float Vector __attribute__((vector_size(kVectorLanes * sizeof(float))));
typedef uint32_t Bits __attribute__((vector_size(kVectorLanes * sizeof(uint32_t))));
typedef uint16_t Words __attribute__((vector_size(2 * kVectorLanes * sizeof(uint16_t))));
typedef uint16_t Halves __attribute__((vector_size(kVectorLanes * sizeof(uint16_t))));

// The even and the odd ones of as many numbers of half precision as a vector has bytes for: one
// load or store for both, and no widening across lanes.
struct Pair {
  Vector even, odd;
};
inline Pair operator+(Pair a, Pair b) { return {a.even + b.even, a.odd + b.odd}; }
inline Pair operator-(Pair a, Pair b) { return {a.even - b.even, a.odd - b.odd}; }
inline Pair operator*(Pair a, Pair b) { return {a.even * b.even, a.odd * b.odd}; }
inline Pair operator+(Pair a, float b) { return {a.even + b, a.odd + b}; }
inline Pair operator-(Pair a, float b) { return {a.even - b, a.odd - b}; }
inline Pair operator*(float a, Pair b) { return {a * b.even, a * b.odd}; }
inline Pair operator/(Pair a, float b) { return {a.even / b, a.odd / b}; }

template <class V>
constexpr bool is_pair = false;
template <>
constexpr bool is_pair<Pair> = true;

template <class V>
constexpr int lanes_of() {
  return static_cast<int>(sizeof(V) / sizeof(float));
}

template <class V, class T>
inline V load_lanes(const T* from) {
  if constexpr (is_pair<V> && sizeof(T) == sizeof(float)) {
    const Vector first = load_lanes<Vector>(from), second = load_lanes<Vector>(from + kVectorLanes);
    Bits even;
    for (int i = 0; i < kVectorLanes; ++i) even[i] = 2 * i;
    return {__builtin_shuffle(first, second, even), __builtin_shuffle(first, second, even + 1)};
  } else if constexpr (is_pair<V>) {
    Bits both;
    memcpy(&both, from, sizeof both);
    return {T::template low_value<Vector>(both), T::template value<Vector>(both >> 16)};
  } else if constexpr (sizeof(V) == sizeof(float)) {
    return load(*from);
  } else if constexpr (sizeof(T) == sizeof(float)) {
    V v;
    memcpy(&v, from, sizeof v);
    return v;
  } else {
    Halves halves;
    memcpy(&halves, from, sizeof halves);
    return T::template value<V>(__builtin_convertvector(halves, Bits));
  }
}

template <class V, class T>
inline void store_lanes(T* to, V v) {
  if constexpr (is_pair<V> && sizeof(T) == sizeof(float)) {
    Bits low, high;  // of both: where the numbers of the first and of the second half are
    for (int i = 0; i < kVectorLanes; ++i) {
      low[i] = i / 2 + i % 2 * kVectorLanes;
      high[i] = low[i] + kVectorLanes / 2;
    }
    store_lanes(to, __builtin_shuffle(v.even, v.odd, low));
    store_lanes(to + kVectorLanes, __builtin_shuffle(v.even, v.odd, high));
#if defined(__AVX512BF16__)
  } else if constexpr (is_pair<V> && std::is_same_v<T, BFloat16>) {
    const __m512bh halves = _mm512_cvtne2ps_pbh(bits_as<__m512>(v.odd), bits_as<__m512>(v.even));
    Words order;
    for (int i = 0; i < 2 * kVectorLanes; ++i) order[i] = i / 2 + i % 2 * kVectorLanes;
    const Words words = __builtin_shuffle(bits_as<Words>(halves), order);
    memcpy(to, &words, sizeof words);
  } else if constexpr (std::is_same_v<V, Vector> && std::is_same_v<T, BFloat16>) {
    const __m256bh halves = _mm512_cvtneps_pbh(bits_as<__m512>(v));
    memcpy(to, &halves, sizeof halves);
#endif
  } else if constexpr (is_pair<V>) {
    const Bits both = T::template rounded<Bits>(v.even) | T::template rounded<Bits>(v.odd) << 16;
    memcpy(to, &both, sizeof both);
  } else if constexpr (sizeof(V) == sizeof(float)) {
    store(*to, v);
  } else if constexpr (sizeof(T) == sizeof(float)) {
    memcpy(to, &v, sizeof v);
  } else {
    const Halves halves = __builtin_convertvector(T::template rounded<Bits>(v), Halves);
    memcpy(to, &halves, sizeof halves);
  }
}

// sum + a * b, rounded once where the instruction set can do so: for sums that differ between
// instruction sets anyway.
inline Vector multiply_add(Vector a, Vector b, Vector sum) {
#if defined(__AVX512F__)
  return bits_as<Vector>(
      _mm512_fmadd_ps(bits_as<__m512>(a), bits_as<__m512>(b), bits_as<__m512>(sum)));
#else
  return sum + a * b;
#endif
}

inline Vector multiply_add(float a, Vector b, Vector sum) {
  return multiply_add(a - Vector{}, b, sum);
}

template <class V, class T>
inline void copy_lanes(T* to, const T* from) {
  memcpy(to, from, lanes_of<V>() * sizeof(T));
}

// Asks for what a long pass will read 2 KiB after `from`: the processor looks ahead by itself, but
// only to the end of the page.
inline void prefetch(const void* from) {
  __builtin_prefetch(static_cast<const char*>(from) + 2048);
}

// As clamp() does: NaN passes through, as it does where the processor's max has it second.
template <class V>
inline V clamp_lanes(V v, float low, float high) {
  const V lows = low - V{}, highs = high - V{};
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == sizeof(__m512)) {
    const __m512 from_low = _mm512_max_ps(bits_as<__m512>(lows), bits_as<__m512>(v));
    return bits_as<V>(_mm512_min_ps(bits_as<__m512>(highs), from_low));
  }
#endif
  v = v < lows ? lows : v;
  return v > highs ? highs : v;
}

inline Pair clamp_lanes(Pair v, float low, float high) {
  return {clamp_lanes(v.even, low, high), clamp_lanes(v.odd, low, high)};
}

// `then` where a < b, else `otherwise`.
template <class V>
inline V where_less(V a, V b, V then, V otherwise) {
  if constexpr (is_pair<V>) {
    return {where_less(a.even, b.even, then.even, otherwise.even),
            where_less(a.odd, b.odd, then.odd, otherwise.odd)};
  } else {
    return a < b ? then : otherwise;
  }
}

// `value` in all lanes.
template <class V>
inline V spread(float value) {
  if constexpr (is_pair<V>) {
    return {spread<Vector>(value), spread<Vector>(value)};
  } else {
    return value - V{};
  }
}

// `then` where low < v < high, else 0.
template <class V>
inline V where_between(V v, float low, float high, V then) {
  return where_less(spread<V>(low), v, where_less(v, spread<V>(high), then, V{}), V{});
}

// As round_half_even() does, for |v| < 2^22.
template <class V>
inline V round_lanes(V v) {
  return (v + 0x1.8p23f) - 0x1.8p23f;
}

template <class V_, int COUNT>
struct Lanes {
  using V = V_;
  static constexpr int kVectors = COUNT;
};

// body(lanes, i) for all of `size` numbers of type T: as many as COUNT vectors have, in pairs where
// T is half precision, from i on, then one vector, then a float.
template <int COUNT, class T = float, class Body>
inline void for_each_lanes(int64_t size, Body body) {
  constexpr bool kHalf = COUNT > 1 && sizeof(T) < sizeof(float);
  using Block = std::conditional_t<kHalf, Lanes<Pair, COUNT / 2>, Lanes<Vector, COUNT>>;
  int64_t i = 0;
  for (; i + COUNT * kVectorLanes <= size; i += COUNT * kVectorLanes) body(Block(), i);
  for (; i + kVectorLanes <= size; i += kVectorLanes) body(Lanes<Vector, 1>(), i);
  for (; i < size; ++i) body(Lanes<float, 1>(), i);
}

// body(V{}, i) for all of `size` numbers of type T: those that V has from i on.
template <class T, class Body>
inline void for_each_vector(int64_t size, Body body) {
  for_each_lanes<2, T>(size, [&](auto lanes, int64_t i) {
    using V = typename decltype(lanes)::V;
#pragma GCC unroll 2
    for (int k = 0; k < lanes.kVectors; ++k, i += lanes_of<V>()) body(V{}, i);
  });
}

}  // namespace
}  // namespace FDDA_ISA
}  // namespace fdda
