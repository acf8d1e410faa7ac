// Rows written past the caches. A tensor that no cache holds is written without being read first,
// which an ordinary store does: a third less traffic for a kernel that reads and writes once.
#pragma once

#include <stdint.h>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "functions.h"
#include "half.h"
#include "vectors.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

// From this size on the next reader would not find the tensor in a cache, either.
constexpr int64_t kStreamBytes = int64_t{16} << 20;
constexpr int64_t kLine = 64;
// Elements made in the L1 cache at a time: with more, memory is read and written by turns, which
// was measured to take 5 to 20 % longer for 2048; pixels of more channels than the most are not
// streamed.
constexpr int64_t kStreamTile = 256, kMostStreamed = 2048;

template <class T>
bool streams(const ChannelView& v) {
  return v.outer * v.channels * v.inner * static_cast<int64_t>(sizeof(T)) >= kStreamBytes;
}

// `bytes` in whole lines to an aligned address.
static inline void stream_lines(void* out, const void* tile, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += kLine) {
    char* to = static_cast<char*>(out) + b;
    const char* from = static_cast<const char*>(tile) + b;
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_load_si512(from));
#elif defined(__AVX__)
    for (int k = 0; k < kLine; k += 32) {
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to + k),
                          _mm256_load_si256(reinterpret_cast<const __m256i*>(from + k)));
    }
#elif defined(__SSE2__)
    for (int k = 0; k < kLine; k += 16) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + k),
                       _mm_load_si128(reinterpret_cast<const __m128i*>(from + k)));
    }
#else
    memcpy(to, from, kLine);
#endif
  }
}

// As store_lanes, but past the caches, to an address aligned to the vector's size there; the rest
// of the line must follow at once, and a stream_fence at the end.
template <class V, class T>
inline void stream_lanes(T* to, V v) {
  constexpr int kBytes = lanes_of<V>() * static_cast<int>(sizeof(T));
  alignas(64) T lanes[lanes_of<V>()];
  store_lanes(lanes, v);
#if defined(__AVX512F__)
  if constexpr (kBytes == 64) {
    return _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_load_si512(lanes));
  }
#endif
#if defined(__AVX__)
  if constexpr (kBytes == 32) {
    return _mm256_stream_si256(reinterpret_cast<__m256i*>(to),
                               _mm256_load_si256(reinterpret_cast<const __m256i*>(lanes)));
  }
#endif
#if defined(__SSE2__)
  if constexpr (kBytes == 16) {
    return _mm_stream_si128(reinterpret_cast<__m128i*>(to),
                            _mm_load_si128(reinterpret_cast<const __m128i*>(lanes)));
  }
#endif
  store_lanes(to, v);
}

template <class V, class T>
inline void write_lanes(bool stream, T* to, V v) {
  if (stream) {
    stream_lanes(to, v);
  } else {
    store_lanes(to, v);
  }
}

// Whether a tensor of `bytes` in rows of `row_bytes` is to be written by stream_lanes.
static inline bool streams_rows(const void* out, int64_t bytes, int64_t row_bytes) {
  return bytes >= kStreamBytes && row_bytes % kLine == 0 &&
         reinterpret_cast<uintptr_t>(out) % kLine == 0;
}

// Before another thread may read what was streamed.
static inline void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// out[i] = value(i) for i below n; STREAM: past the caches, and a stream_fence must follow.
template <bool STREAM, class T, class Value>
void write_row(T* out, int64_t n, Value value) {
  int64_t i = 0;
  if (STREAM) {
    const int64_t size = sizeof(T);
    const int64_t beyond = static_cast<int64_t>(reinterpret_cast<uintptr_t>(out) % kLine);
    const int64_t head = min64(n, (kLine - beyond) % kLine / size);
    for (; i < head; ++i) store(out[i], value(i));
    alignas(64) T tile[kStreamTile];
    while (n - i >= kLine / size) {
      const int64_t count = min64(kStreamTile, (n - i) / (kLine / size) * (kLine / size));
#pragma GCC ivdep
      for (int64_t j = 0; j < count; ++j) store(tile[j], value(i + j));
      stream_lines(out + i, tile, count * size);
      i += count;
    }
  }
#pragma GCC ivdep
  for (; i < n; ++i) store(out[i], value(i));
}

// out[r * n + c] = value(r * n + c, c) for all r below `rows` and c below n; STREAM as above.
template <bool STREAM, class T, class Value>
void write_pixels(T* out, int64_t rows, int64_t n, Value value) {
  const int64_t size = sizeof(T);
  const bool whole_lines = reinterpret_cast<uintptr_t>(out) % kLine == 0 && n * size % kLine == 0;
  int64_t done = 0;
  if (STREAM && whole_lines && n <= kMostStreamed) {
    alignas(64) T tile[kMostStreamed];
    for (int64_t count; done < rows; done += count) {
      count = min64(max64(1, kStreamTile / n), rows - done);
      for (int64_t r = 0; r < count; ++r) {
#pragma GCC ivdep
        for (int64_t c = 0; c < n; ++c) store(tile[r * n + c], value((done + r) * n + c, c));
      }
      stream_lines(out + done * n, tile, count * n * size);
    }
  }
  for (; done < rows; ++done) {
#pragma GCC ivdep
    for (int64_t c = 0; c < n; ++c) store(out[done * n + c], value(done * n + c, c));
  }
}

}  // namespace
}  // namespace FDDA_ISA
}  // namespace fdda
