// Float images to NHWC codes, codes to fewer bits, sums of codes over an image.
//
// Bytes may alias anything, so loops that store them read their bounds and factors from locals.

#include <string.h>

#if defined(__AVX512VNNI__)
#include <immintrin.h>
#endif

#include "functions.h"
#include "parallel.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

struct Quantizer {
  float scale, zero_point, half;
  uint8_t operator()(float x) const { return quantize_code(x, scale, zero_point, half); }
};

void quantize_line(const float* __restrict x, uint8_t* __restrict out, int64_t n, Quantizer code) {
  for (int64_t i = 0; i < n; ++i) out[i] = code(x[i]);
}

constexpr int64_t kPiece = 256;  // of a row at a time

// One channel of a row into every `channels`-th byte.
void quantize_channel(const float* x, int64_t stride, uint8_t* out, int64_t channels, int64_t n,
                      Quantizer code) {
  float values[kPiece];
  uint8_t codes[kPiece];
  for (int64_t start = 0; start < n; start += kPiece) {
    const int64_t size = min64(kPiece, n - start);
    const float* line = x + start * stride;
    if (stride != 1) {
      for (int64_t i = 0; i < size; ++i) values[i] = line[i * stride];
      line = values;
    }
    quantize_line(line, codes, size, code);
    for (int64_t i = 0; i < size; ++i) out[(start + i) * channels] = codes[i];
  }
}

#if defined(__AVX512VNNI__)
// Which of 64 reds, then 64 greens, or of 64 blues, the bytes of 64 pixels are.
struct PixelBytes {
  uint8_t from[3][64] = {};
  uint64_t blue[3] = {};
  constexpr PixelBytes() {
    for (int i = 0; i < 192; ++i) {
      from[i / 64][i % 64] = static_cast<uint8_t>(i / 3 + i % 3 % 2 * 64);
      blue[i / 64] |= static_cast<uint64_t>(i % 3 / 2) << (i % 64);
    }
  }
};
alignas(64) constexpr PixelBytes kPixelBytes;

// As many pixels as there are whole vectors of; returns their number.
__attribute__((target("avx512vbmi"))) int64_t interleave_vbmi(const uint8_t (&planes)[3][kPiece],
                                                              int64_t n, uint8_t* out) {
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    const __m512i red = _mm512_loadu_si512(planes[0] + i);
    const __m512i green = _mm512_loadu_si512(planes[1] + i);
    const __m512i blue = _mm512_loadu_si512(planes[2] + i);
    for (int k = 0; k < 3; ++k) {
      const __m512i from = _mm512_load_si512(kPixelBytes.from[k]);
      const __m512i two = _mm512_permutex2var_epi8(red, from, green);
      _mm512_storeu_si512(out + 3 * i + 64 * k,
                          _mm512_mask_permutexvar_epi8(two, kPixelBytes.blue[k], from, blue));
    }
  }
  return i;
}
#endif

// A row of interleaved pixels from three planes.
void quantize_planes(const float* x, int64_t stride, uint8_t* __restrict out, int64_t n,
                     Quantizer code) {
  uint8_t planes[3][kPiece];
  for (int64_t start = 0; start < n; start += kPiece, out += 3 * kPiece) {
    const int64_t size = min64(kPiece, n - start);
    for (int c = 0; c < 3; ++c) quantize_line(x + c * stride + start, planes[c], size, code);
    int64_t i = 0;
#if defined(__AVX512VNNI__)
    if (__builtin_cpu_supports("avx512vbmi")) i = interleave_vbmi(planes, size, out);
#endif
    for (; i < size; ++i) {
      for (int c = 0; c < 3; ++c) out[3 * i + c] = planes[c][i];
    }
  }
}

void look_up(const uint8_t* table, const uint8_t* x, uint8_t* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = table[x[i]];
}

#if defined(__AVX512VNNI__)
__attribute__((target("avx512vbmi"))) void look_up_vbmi(const uint8_t* table, const uint8_t* x,
                                                        uint8_t* out, int64_t n) {
  __m512i quarters[4];
  for (int i = 0; i < 4; ++i) quarters[i] = _mm512_loadu_si512(table + 64 * i);
  for (int64_t i = 0; i < n; i += 64) {
    const __mmask64 valid = n - i >= 64 ? ~uint64_t{0} : (uint64_t{1} << (n - i)) - 1;
    const __m512i codes = _mm512_maskz_loadu_epi8(valid, x + i);
    const __m512i low = _mm512_permutex2var_epi8(quarters[0], codes, quarters[1]);
    const __m512i high = _mm512_permutex2var_epi8(quarters[2], codes, quarters[3]);
    const __m512i found = _mm512_mask_blend_epi8(_mm512_movepi8_mask(codes), low, high);
    _mm512_mask_storeu_epi8(out + i, valid, found);
  }
}
#endif

}  // namespace

void quantize(const Quantize& a) {
  const Quantizer code{a.scale, a.zero_point, static_cast<float>(1 << (a.bits - 1))};
  const int64_t row = a.width * a.channels;
  parallel_for(
      a.batch * a.height, max64(1, 16384 / max64(1, row)), [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
          const float* x = a.x + r / a.height * a.stride_n + r % a.height * a.stride_h;
          uint8_t* out = a.out + r * row;
          if (a.stride_c == 1 && (a.width == 1 || a.stride_w == a.channels)) {
            quantize_line(x, out, row, code);
            continue;
          }
          if (a.channels == 3 && a.stride_w == 1) {
            quantize_planes(x, a.stride_c, out, a.width, code);
            continue;
          }
          for (int64_t c = 0; c < a.channels; ++c) {
            quantize_channel(x + c * a.stride_c, a.stride_w, out + c, a.channels, a.width, code);
          }
        }
      });
}

void requantize_codes(const RequantizeCodes& a) {
  const Quantizer code{a.scale, a.zero_point, static_cast<float>(1 << (a.bits - 1))};
  uint8_t table[256];
  for (int x = 0; x < 256; ++x) {
    table[x] = code((static_cast<float>(x) - a.x_zero_point) / a.x_scale);
  }
  parallel_for(a.count, 65536, [&](int64_t begin, int64_t end) {
#if defined(__AVX512VNNI__)
    if (__builtin_cpu_supports("avx512vbmi")) {
      return look_up_vbmi(table, a.x + begin, a.out + begin, end - begin);
    }
#endif
    look_up(table, a.x + begin, a.out + begin, end - begin);
  });
}

void sum_pool(const SumPool& a) {
  constexpr int64_t kBlock = 64;
  const int64_t blocks = ceil_div(a.channels, kBlock);
  parallel_for(a.batch * blocks, max64(1, 1024 / max64(1, a.pixels)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t t = begin; t < end; ++t) {
                   const int64_t n = t / blocks, c = t % blocks * kBlock;
                   const int64_t count = min64(kBlock, a.channels - c);
                   const uint8_t* x = a.x + n * a.pixels * a.channels + c;
                   int32_t sums[kBlock] = {};
                   for (int64_t p = 0; p < a.pixels; ++p, x += a.channels) {
                     for (int64_t j = 0; j < count; ++j) sums[j] += x[j];
                   }
                   memcpy(a.out + n * a.channels + c, sums, count * sizeof(int32_t));
                 }
               });
}

}  // namespace FDDA_ISA
}  // namespace fdda
