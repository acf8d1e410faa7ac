// Float images to NHWC codes, and codes to fewer bits.
//
// Bytes may alias anything, so loops that store them read their bounds and factors from locals.

#include <string.h>

#include "functions.h"
#include "parallel.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

struct Quantizer {
  float scale, zero_point, half;
  uint8_t operator()(float x) const {
    const float q = round_half_even(clamp(scale * x - zero_point, -half, half - 1.0f));
    return static_cast<uint8_t>(static_cast<int32_t>(q + half));
  }
};

void quantize_line(const float* __restrict x, uint8_t* __restrict out, int64_t n, Quantizer code) {
  for (int64_t i = 0; i < n; ++i) out[i] = code(x[i]);
}

// One channel of a row into every `channels`-th byte.
void quantize_channel(const float* x, int64_t stride, uint8_t* out, int64_t channels, int64_t n,
                      Quantizer code) {
  constexpr int64_t kPiece = 256;
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
          for (int64_t c = 0; c < a.channels; ++c) {
            quantize_channel(x + c * a.stride_c, a.stride_w, out + c, a.channels, a.width, code);
          }
        }
      });
}

void requantize_codes(const RequantizeCodes& a) {
  parallel_for(a.count, 65536, [&](int64_t begin, int64_t end) {
    const Quantizer code{a.scale, a.zero_point, static_cast<float>(1 << (a.bits - 1))};
    const float x_scale = a.x_scale, x_zero_point = a.x_zero_point;
    const uint8_t* __restrict x = a.x;
    uint8_t* __restrict out = a.out;
    for (int64_t i = begin; i < end; ++i) {
      out[i] = code((static_cast<float>(x[i]) - x_zero_point) / x_scale);
    }
  });
}

}  // namespace FDDA_ISA
}  // namespace fdda
