// Float images to NHWC codes, and max pooling on codes.

#include <string.h>

#include "functions.h"
#include "parallel.h"

namespace fdda {
namespace FDDA_ISA {

void quantize(const Quantize& a) {
  const float half = static_cast<float>(1 << (a.bits - 1));
  const auto code = [&](float x) {
    const float q = round_half_even(clamp(a.scale * x - a.zero_point, -half, half - 1.0f));
    return static_cast<uint8_t>(static_cast<int32_t>(q + half));
  };
  const int64_t row = a.width * a.channels;
  parallel_for(a.batch * a.height, max64(1, 16384 / max64(1, row)), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float* x = a.x + r / a.height * a.stride_n + r % a.height * a.stride_h;
      uint8_t* __restrict out = a.out + r * row;
      if (a.stride_c == 1 && (a.width == 1 || a.stride_w == a.channels)) {
        for (int64_t i = 0; i < row; ++i) out[i] = code(x[i]);
        continue;
      }
      for (int64_t c = 0; c < a.channels; ++c) {
        for (int64_t w = 0; w < a.width; ++w) {
          out[w * a.channels + c] = code(x[c * a.stride_c + w * a.stride_w]);
        }
      }
    }
  });
}

void max_pool(const MaxPool& a) {
  const int64_t rows = a.batch * a.out_height;
  const int64_t work = a.out_width * a.channels * a.kernel_h * a.kernel_w;
  parallel_for(rows, max64(1, 65536 / max64(1, work)), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const uint8_t* image = a.x + r / a.out_height * a.height * a.width * a.channels;
      const int64_t top = r % a.out_height * a.stride_h - a.pad_h;
      for (int64_t ow = 0; ow < a.out_width; ++ow) {
        uint8_t* __restrict out = a.out + (r * a.out_width + ow) * a.channels;
        memset(out, 0, a.channels);  // codes are unsigned: 0 never beats a valid tap
        for (int64_t kh = 0; kh < a.kernel_h; ++kh) {
          const int64_t ih = top + kh * a.dilation_h;
          if (ih < 0 || ih >= a.height) continue;
          for (int64_t kw = 0; kw < a.kernel_w; ++kw) {
            const int64_t iw = ow * a.stride_w - a.pad_w + kw * a.dilation_w;
            if (iw < 0 || iw >= a.width) continue;
            const uint8_t* __restrict in = image + (ih * a.width + iw) * a.channels;
            for (int64_t c = 0; c < a.channels; ++c) out[c] = in[c] > out[c] ? in[c] : out[c];
          }
        }
      }
    }
  });
}

}  // namespace FDDA_ISA
}  // namespace fdda
