// Depthwise 3x3 convolution to codes, with stride 1 or 2, on AVX512-VNNI. As in depthwise.cpp,
// lanes are channels and vpdpbusd adds up the products of adjacent rows. With stride 1 the four
// rows that it has room for serve two rows of outputs:
//
//     row 0   a          outputs of row 0: weights w0 w1 w2 0
//     row 1   b   a b c d
//     row 2   c          outputs of row 1: weights 0 w0 w1 w2
//     row 3   d
//
// Where channels are few, a register holds several pixels of theirs. Interleaved columns lie in
// four streams, of channels 4 k .. 4 k + 3 of every 16: those of the next pixel are a few bytes
// further on. With stride 2 even and odd columns lie apart.
//
// Weights of nine bits are 2 * high + low.
#pragma once

#include <immintrin.h>
#include <string.h>

#include "expand.h"
#include "functions.h"
#include "operand_ranges.h"
#include "parallel.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

class Depthwise3x3 {
  static constexpr int kTaps = 3, kStreams = 4;
  static constexpr int kAtOnce = 4;  // vectors of outputs
  static constexpr int64_t kVector = 64;
  static constexpr int64_t kChunk = 64;  // outputs of a row at a time: L1 holds their columns

  // Of as many channels as a vector has bytes for each pixel; vectors[k] belongs to stream k.
  struct Weights {
    __m512i high[2][kTaps][kStreams];  // of the first and the second row of outputs
    __m512i low[2][kTaps][kStreams];   // of weights of nine bits
    __m512i start[kStreams];
    __m512 multiplier[kStreams], bias[kStreams];
  };

 public:
  static bool applies(const PackedConv& a) {
    if (a.kernel_h != 3 || a.kernel_w != 3 || a.dilation_h != 1 || a.dilation_w != 1) return false;
    if (a.stride_h != a.stride_w || a.stride_h > 2 || a.channels % kPanelRows) return false;
    if (a.epilogue.residual_u8) return false;
    bool fits = true;
    for (int64_t c = 0; c < a.channels; ++c) {
      fits &= a.weight_offset[c] >= -127 && a.weight_offset[c] <= 128;
    }
    return fits && rounds_within_int32(a, 9.0f * 255.0f * 256.0f);
  }

  explicit Depthwise3x3(const PackedConv& conv) : conv_(conv), splits_(!conv.weight_fits_s8) {}

  void run() const {
    const int64_t blocks = ceil_div(conv_.channels, kVector) + 1;  // two of less than a vector
    Weights* const weights =
        static_cast<Weights*>(scratch(kSharedWeights, blocks * sizeof(Weights)));
    for_each_block([&](auto type, int64_t channel, int64_t block) {
      fill<decltype(type)::kChannels>(channel, weights + block);
    });
    uint8_t padding[kVector];
    memset(padding, conv_.x_zero_point, sizeof padding);
    const int64_t at_once = conv_.stride_h == 1 ? 2 : 1;
    const int64_t bands = ceil_div(conv_.out_height, at_once);
    const int64_t work = at_once * conv_.out_width * conv_.channels * 9;
    parallel_for(conv_.batch * bands, max64(1, 65536 / max64(1, work)),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t i = begin; i < end; ++i) {
                     const int64_t image = i / bands, row = i % bands * at_once;
                     const int64_t rows = min64(at_once, conv_.out_height - row);
                     for_each_block([&](auto type, int64_t channel, int64_t block) {
                       constexpr int kChannels = decltype(type)::kChannels;
                       const Band band{image, row, channel, padding};
                       if (conv_.stride_w == 2) {
                         run_band<kChannels, 2, 1>(band, weights[block]);
                       } else if (rows == 1) {
                         run_band<kChannels, 1, 1>(band, weights[block]);
                       } else {
                         run_band<kChannels, 1, 2>(band, weights[block]);
                       }
                     });
                   }
                 });
  }

 private:
  template <int CHANNELS>
  struct Block {
    static constexpr int kChannels = CHANNELS;
  };

  // Rows of outputs of one block of channels.
  struct Band {
    int64_t image, row, channel;
    const uint8_t* padding;
  };

  template <class Body>
  void for_each_block(Body body) const {
    int64_t channel = 0, block = 0;
    for (; channel + 64 <= conv_.channels; channel += 64) body(Block<64>(), channel, block++);
    if (channel + 32 <= conv_.channels) {
      body(Block<32>(), channel, block++);
      channel += 32;
    }
    for (; channel < conv_.channels; channel += 16) body(Block<16>(), channel, block++);
  }

  // 32 bits for each of a panel's channels, into the streams' vectors, once per pixel.
  template <int CHANNELS, class V>
  static void scatter(const V& values, int64_t panel, V* vectors) {
    for (int k = 0; k < kStreams; ++k) {
      for (int64_t at = 16 * panel; at < kVector; at += CHANNELS) {
        memcpy(reinterpret_cast<char*>(vectors + k) + at,
               reinterpret_cast<const char*>(&values) + 16 * k, 16);
      }
    }
  }

  static __m512i byte(__m512i v, int from, int to) {
    const __m512i one = _mm512_and_si512(_mm512_srli_epi32(v, 8 * from), _mm512_set1_epi32(255));
    return _mm512_slli_epi32(one, 8 * to);
  }

  template <int CHANNELS>
  void fill(int64_t first, Weights* w) const {
    for (int64_t panel = 0; panel < CHANNELS / kPanelRows; ++panel) {
      const int64_t channel = first + panel * kPanelRows;
      alignas(64) int32_t offsets[kPanelRows];
      for (int64_t n = 0; n < kPanelRows; ++n) {
        offsets[n] = static_cast<int32_t>(conv_.weight_offset[channel + n]);
      }
      // Codes and offsets moved up to u8: their sum is w + 255.
      const __m512i offset =
          _mm512_mullo_epi32(_mm512_add_epi32(_mm512_load_si512(offsets), _mm512_set1_epi32(127)),
                             _mm512_set1_epi32(0x01010101));
      const __m512i ones = _mm512_set1_epi8(1), top = _mm512_set1_epi8(-128);
      __m512i high[kTaps], low[kTaps];
      for (int i = 0; i < kTaps; ++i) {
        constexpr int64_t kBlocks = 3;  // of nine taps
        const uint8_t* planes =
            conv_.weight + (channel / kPanelRows * kBlocks + i) * conv_.bits * kPlaneBytes;
        const __m512i code = add_planes(top, planes, conv_.bits);
        if (splits_) {
          high[i] = _mm512_sub_epi8(_mm512_avg_epu8(code, offset), top);
          low[i] = _mm512_andnot_si512(_mm512_xor_si512(code, offset), ones);
        } else {
          high[i] = _mm512_add_epi8(_mm512_add_epi8(code, offset), ones);
          low[i] = _mm512_setzero_si512();
        }
      }
      __m512i sum = _mm512_setzero_si512();
      for (int kw = 0; kw < kTaps; ++kw) {
        const __m512i h = column(high, kw), l = column(low, kw);
        __m512i s = _mm512_dpbusd_epi32(_mm512_setzero_si512(), ones, h);
        if (splits_) s = _mm512_add_epi32(s, s);
        sum = _mm512_add_epi32(sum, _mm512_dpbusd_epi32(s, ones, l));
        for (int r = 0; r < 2; ++r) {
          scatter<CHANNELS>(_mm512_slli_epi32(h, 8 * r), panel, w->high[r][kw]);
          scatter<CHANNELS>(_mm512_slli_epi32(l, 8 * r), panel, w->low[r][kw]);
        }
      }
      sum = _mm512_mullo_epi32(sum, _mm512_set1_epi32(-conv_.x_zero_point));
      scatter<CHANNELS>(sum, panel, w->start);
      scatter<CHANNELS>(_mm512_loadu_ps(conv_.epilogue.multiplier + channel), panel, w->multiplier);
      scatter<CHANNELS>(_mm512_loadu_ps(conv_.epilogue.bias + channel), panel, w->bias);
    }
  }

  // The taps of a kernel column, one a byte, of nine in the order of the kernel's rows.
  static __m512i column(const __m512i (&taps)[kTaps], int kw) {
    __m512i v = _mm512_setzero_si512();
    for (int kh = 0; kh < kTaps; ++kh) {
      const int tap = kh * kTaps + kw;
      v = _mm512_or_si512(v, byte(taps[tap / 4], tap % 4, kh));
    }
    return v;
  }

  template <int CHANNELS, int STRIDE, int ROWS>
  void run_band(const Band& band, const Weights& w) const {
    // Some more may be read than there are.
    constexpr int64_t kStream = (kChunk + 2) * CHANNELS + kAtOnce * kVector;
    uint8_t* const columns =
        static_cast<uint8_t*>(scratch(kLocalRows, STRIDE * kStreams * kStream + kVector));
    for (int64_t first = 0; first < conv_.out_width; first += kChunk) {
      const int64_t outputs = min64(kChunk, conv_.out_width - first);
      for (int parity = 0; parity < STRIDE; ++parity) {
        const int64_t count = STRIDE == 1 ? outputs + 2 : outputs + 1 - parity;
        gather<CHANNELS, STRIDE, ROWS>(band, first * STRIDE - conv_.pad_w + parity, count, kStream,
                                       columns + parity * kStreams * kStream);
      }
      const int64_t row = band.image * conv_.out_height + band.row;
      uint8_t* const out =
          conv_.epilogue.out_u8 + (row * conv_.out_width + first) * conv_.channels + band.channel;
      if (splits_) {
        store<CHANNELS, STRIDE, ROWS, true>(columns, kStream, w, outputs, out);
      } else {
        store<CHANNELS, STRIDE, ROWS, false>(columns, kStream, w, outputs, out);
      }
    }
  }

  // `count` columns of inputs, every STRIDE-th from `left` on.
  template <int CHANNELS, int STRIDE, int ROWS>
  void gather(const Band& band, int64_t left, int64_t count, int64_t stream,
              uint8_t* columns) const {
    constexpr int64_t kPixels = kVector / CHANNELS;
    const int64_t pixel = STRIDE * conv_.channels, line = conv_.width * conv_.channels;
    const uint8_t* image = conv_.x + band.image * conv_.height * line + band.channel;
    const uint8_t* x[4];
    int64_t step[4];
    for (int k = 0; k < 4; ++k) {
      const int64_t row = band.row * STRIDE - conv_.pad_h + k;
      const bool inside = k < ROWS + 2 && row >= 0 && row < conv_.height;
      x[k] = inside ? image + row * line + left * conv_.channels : band.padding;
      step[k] = inside ? pixel : 0;
    }
    for (int64_t i = 0; i < count; i += kPixels, columns += kVector) {
      const int64_t from = left + i * STRIDE, to = from + (kPixels - 1) * STRIDE;
      __m512i rows[4];
      if (from >= 0 && to < conv_.width) {
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) rows[k] = load_pixels<CHANNELS>(x[k] + i * step[k], step[k]);
      } else {
        alignas(64) uint8_t pixels[kVector];
        for (int k = 0; k < 4; ++k) {
          for (int64_t p = 0; p < kPixels; ++p) {
            const int64_t at = from + p * STRIDE;
            const bool inside = at >= 0 && at < conv_.width;
            memcpy(pixels + p * CHANNELS, inside ? x[k] + (i + p) * step[k] : band.padding,
                   CHANNELS);
          }
          rows[k] = _mm512_load_si512(pixels);
        }
      }
      const __m512i low0 = _mm512_unpacklo_epi8(rows[0], rows[1]);
      const __m512i high0 = _mm512_unpackhi_epi8(rows[0], rows[1]);
      const __m512i low1 = _mm512_unpacklo_epi8(rows[2], rows[3]);
      const __m512i high1 = _mm512_unpackhi_epi8(rows[2], rows[3]);
      _mm512_storeu_si512(columns, _mm512_unpacklo_epi16(low0, low1));
      _mm512_storeu_si512(columns + stream, _mm512_unpackhi_epi16(low0, low1));
      _mm512_storeu_si512(columns + 2 * stream, _mm512_unpacklo_epi16(high0, high1));
      _mm512_storeu_si512(columns + 3 * stream, _mm512_unpackhi_epi16(high0, high1));
    }
  }

  // CHANNELS bytes of each of the vector's pixels, `step` bytes apart.
  template <int CHANNELS>
  static inline __attribute__((always_inline)) __m512i load_pixels(const uint8_t* x, int64_t step) {
    if (CHANNELS == 64 || step == CHANNELS) return _mm512_loadu_si512(x);
    if (CHANNELS == 32) {
      const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
      const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + step));
      return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    }
    __m512i v = _mm512_castsi128_si512(load_pixel(x));
    v = _mm512_inserti32x4(v, load_pixel(x + step), 1);
    v = _mm512_inserti32x4(v, load_pixel(x + 2 * step), 2);
    return _mm512_inserti32x4(v, load_pixel(x + 3 * step), 3);
  }

  static __m128i load_pixel(const uint8_t* x) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  }

  // `outputs` outputs of each of ROWS rows, kAtOnce vectors of all together at a time.
  template <int CHANNELS, int STRIDE, int ROWS, bool SPLITS>
  void store(const uint8_t* columns, int64_t stream, const Weights& w, int64_t outputs,
             uint8_t* out) const {
    constexpr int kVectors = kAtOnce / ROWS;
    constexpr int64_t kPixels = kVector / CHANNELS;
    const __m512i lo = _mm512_set1_epi8(static_cast<char>(static_cast<int>(conv_.epilogue.lo)));
    const __m512i hi = _mm512_set1_epi8(static_cast<char>(static_cast<int>(conv_.epilogue.hi)));
    const int64_t channels = conv_.channels, row = conv_.out_width * channels;
    for (; outputs > 0; outputs -= kVectors * kPixels) {
      __m512i halves[2][kAtOnce];
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        __m512i q[2][kAtOnce];
#pragma GCC unroll 2
        for (int k = 0; k < 2; ++k) {
          round<CHANNELS, STRIDE, ROWS, SPLITS>(columns, stream, w, 2 * h + k, q[k]);
        }
#pragma GCC unroll 8
        for (int i = 0; i < kAtOnce; ++i) halves[h][i] = _mm512_packs_epi32(q[0][i], q[1][i]);
      }
#pragma GCC unroll 8
      for (int i = 0; i < kAtOnce; ++i) {
        const __m512i codes = _mm512_packus_epi16(halves[0][i], halves[1][i]);
        const int64_t pixel = i / ROWS * kPixels;
        store_pixels<CHANNELS>(out + i % ROWS * row + pixel * channels, channels,
                               _mm512_min_epu8(_mm512_max_epu8(codes, lo), hi), outputs - pixel);
      }
      columns += kVectors * kVector;
      out += kVectors * kPixels * channels;
    }
  }

  // Of stream k; vector i belongs to row i % ROWS.
  template <int CHANNELS, int STRIDE, int ROWS, bool SPLITS>
  static inline __attribute__((always_inline)) void round(const uint8_t* columns, int64_t stream,
                                                          const Weights& w, int k,
                                                          __m512i (&q)[kAtOnce]) {
    __m512i sums[kAtOnce];
    columns += k * stream;
#pragma GCC unroll 8
    for (int i = 0; i < kAtOnce; ++i) {
      sums[i] = SPLITS ? _mm512_setzero_si512() : w.start[k];
    }
    add_products<CHANNELS, STRIDE, ROWS>(columns, stream, w.high, k, sums);
    if (SPLITS) {
#pragma GCC unroll 8
      for (int i = 0; i < kAtOnce; ++i) {
        sums[i] = _mm512_add_epi32(_mm512_add_epi32(sums[i], sums[i]), w.start[k]);
      }
      add_products<CHANNELS, STRIDE, ROWS>(columns, stream, w.low, k, sums);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kAtOnce; ++i) {
      const __m512 v = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[i]), w.multiplier[k]);
      q[i] = _mm512_cvtps_epi32(_mm512_add_ps(v, w.bias[k]));
    }
  }

  template <int CHANNELS, int STRIDE, int ROWS>
  static inline __attribute__((always_inline)) void add_products(
      const uint8_t* columns, int64_t stream, const __m512i (&w)[2][kTaps][kStreams], int k,
      __m512i (&sums)[kAtOnce]) {
#pragma GCC unroll 3
    for (int kw = 0; kw < kTaps; ++kw) {
      const uint8_t* x =
          columns + (STRIDE == 1 ? kw * CHANNELS : kw % 2 * kStreams * stream + kw / 2 * CHANNELS);
#pragma GCC unroll 8
      for (int i = 0; i < kAtOnce; ++i) {
        const __m512i inputs = _mm512_loadu_si512(x + i / ROWS * kVector);
        sums[i] = _mm512_dpbusd_epi32(sums[i], inputs, w[i % ROWS][kw][k]);
        asm("" : "+v"(sums[i]));  // in this order, else gcc spills
      }
    }
  }

  template <int CHANNELS>
  static inline __attribute__((always_inline)) void store_pixels(uint8_t* out, int64_t channels,
                                                                 __m512i codes, int64_t left) {
    if (left <= 0) return;
    if (CHANNELS == 64) {
      _mm512_storeu_si512(out, codes);
    } else if (CHANNELS == 32) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_castsi512_si256(codes));
      if (left < 2) return;
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + channels),
                          _mm512_extracti64x4_epi64(codes, 1));
    } else {
      alignas(64) uint8_t pixels[kVector];
      _mm512_store_si512(pixels, codes);
      for (int64_t p = 0; p < min64(left, kVector / CHANNELS); ++p) {
        memcpy(out + p * channels, pixels + p * CHANNELS, CHANNELS);
      }
    }
  }

  const PackedConv& conv_;
  const bool splits_;  // weights into high and low
};

}  // namespace
}  // namespace FDDA_ISA
}  // namespace fdda
