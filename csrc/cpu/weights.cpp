// Packing and unpacking of weights; the layout is drawn in common/arithmetic.h.

#include <string.h>

#include "functions.h"
#include "parallel.h"

namespace fdda {
namespace FDDA_ISA {

void pack_weight(const PackWeight& a) {
  const int64_t blocks = ceil_div(a.cols, kBlockDepth);
  parallel_for(ceil_div(a.rows, kPanelRows), 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin * blocks; t < end * blocks; ++t) {
      const int64_t row = t / blocks * kPanelRows;
      const int64_t col = t % blocks * kBlockDepth;
      const int64_t rows = min64(kPanelRows, a.rows - row);
      const int64_t cols = min64(kBlockDepth, a.cols - col);
      uint8_t* planes = a.packed + t * a.bits * kPlaneBytes;
      memset(planes, 0, a.bits * kPlaneBytes);
      for (int64_t n = 0; n < rows; ++n) {
        for (int64_t k = 0; k < cols; ++k) {
          const int32_t code = a.codes[(row + n) * a.cols + col + k];
          const int64_t j = n * kBlockDepth + k;
          for (int b = 0; b < a.bits; ++b) {
            planes[b * kPlaneBytes + j / 8] |= static_cast<uint8_t>((code >> b & 1) << (j % 8));
          }
        }
      }
    }
  });
}

void unpack_weight(const UnpackWeight& a) {
  const int64_t blocks = ceil_div(a.cols, kBlockDepth);
  parallel_for(a.rows, max64(1, 4096 / max64(1, a.cols)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t col = 0; col < a.cols; ++col) {
        a.codes[row * a.cols + col] =
            static_cast<int8_t>(packed_code(a.packed, a.bits, blocks, row, col));
      }
    }
  });
}

void packed_linear_s32(const PackedLinearS32& a) {
  parallel_for(a.rows * a.out_features, max64(1, 8192 / max64(1, a.depth)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   store_output(a.epilogue, i, i % a.out_features, linear_accumulator(a, i));
                 }
               });
}

// Channels are adjacent in memory and independent: every loop over them vectorises.
void depthwise_conv2d(const PackedConv& a) {
  constexpr int64_t kStrip = 64;
  const int64_t taps = a.kernel_h * a.kernel_w;
  const int64_t blocks = ceil_div(taps, kBlockDepth);
  int16_t* weights = static_cast<int16_t*>(
      scratch(kSharedWeights, taps * a.channels * sizeof(int16_t)));
  for (int64_t t = 0; t < taps; ++t) {
    for (int64_t c = 0; c < a.channels; ++c) {
      const int32_t offset = a.weight_fits_s8 ? static_cast<int32_t>(a.weight_offset[c]) : 0;
      weights[t * a.channels + c] =
          static_cast<int16_t>(packed_code(a.weight, a.bits, blocks, c, t) + offset);
    }
  }
  const int64_t rows = a.batch * a.out_height;
  const int64_t work = a.out_width * a.channels * taps;
  parallel_for(rows, max64(1, 16384 / max64(1, work)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * a.out_width; i < end * a.out_width; ++i) {
      const int64_t left = i % a.out_width * a.stride_w - a.pad_w;
      const int64_t top = i / a.out_width % a.out_height * a.stride_h - a.pad_h;
      const uint8_t* image =
          a.x + i / (a.out_width * a.out_height) * a.height * a.width * a.channels;
      for (int64_t first = 0; first < a.channels; first += kStrip) {
        const int64_t width = min64(kStrip, a.channels - first);
        int32_t products[kStrip] = {};
        int32_t inputs[kStrip] = {};
        for (int64_t t = 0; t < taps; ++t) {
          const int64_t ih = top + t / a.kernel_w * a.dilation_h;
          const int64_t iw = left + t % a.kernel_w * a.dilation_w;
          if (ih < 0 || ih >= a.height || iw < 0 || iw >= a.width) continue;
          const uint8_t* __restrict x = image + (ih * a.width + iw) * a.channels + first;
          const int16_t* __restrict w = weights + t * a.channels + first;
          const int16_t zero = static_cast<int16_t>(a.x_zero_point);
          if (width == kStrip) {
            for (int64_t c = 0; c < kStrip; ++c) {
              products[c] += static_cast<int16_t>(x[c] - zero) * static_cast<int32_t>(w[c]);
            }
          } else {
            for (int64_t c = 0; c < width; ++c) {
              products[c] += static_cast<int16_t>(x[c] - zero) * static_cast<int32_t>(w[c]);
            }
          }
          if (!a.weight_fits_s8) {
            for (int64_t c = 0; c < width; ++c) inputs[c] += x[c] - zero;
          }
        }
        const int64_t index = i * a.channels + first;
        for (int64_t c = 0; c < width; ++c) {
          const int64_t offset = a.weight_fits_s8 ? 0 : a.weight_offset[first + c];
          store_output(a.epilogue, index + c, first + c, products[c] + offset * inputs[c]);
        }
      }
    }
  });
}

}  // namespace FDDA_ISA
}  // namespace fdda
