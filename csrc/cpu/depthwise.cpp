// Depthwise convolution: channels are adjacent in memory and independent, so lanes are channels.
// |x - zero_point| * |weight| <= 255 * 128 fits int16; sums are int32.

#include <string.h>

#include "functions.h"
#include "parallel.h"
#include "window.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

// gcc 12 splits wider sums through memory for AVX2.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 16;
#endif
constexpr int kStrips = 64 / kLanes;
typedef uint8_t U8 __attribute__((vector_size(kLanes)));
typedef int16_t S16 __attribute__((vector_size(2 * kLanes)));
typedef int32_t S32 __attribute__((vector_size(4 * kLanes)));

// The taps of one output pixel that lie inside the image.
struct Window {
  const uint8_t* first;  // channel 0 of the first tap
  int64_t rows, cols;
  int64_t row_stride, col_stride;  // in bytes
  int64_t tap, taps_per_row;       // index of the first tap; taps between its rows
};

// STRIPS * kLanes channels from `channel` on; weights are [taps, channels].
template <int STRIPS>
void accumulate(const Window& w, const int16_t* weights, int64_t channels, int64_t channel,
                int zero_point, int32_t* out) {
  const S16 zero = S16{} + static_cast<int16_t>(zero_point);
  S32 acc[STRIPS] = {};
  for (int64_t i = 0; i < w.rows; ++i) {
    const uint8_t* x = w.first + i * w.row_stride + channel;
    const int16_t* q = weights + (w.tap + i * w.taps_per_row) * channels + channel;
    for (int64_t j = 0; j < w.cols; ++j, x += w.col_stride, q += channels) {
#pragma GCC unroll 8
      for (int s = 0; s < STRIPS; ++s) {
        U8 code;
        S16 weight;
        memcpy(&code, x + s * kLanes, sizeof code);
        memcpy(&weight, q + s * kLanes, sizeof weight);
        const S16 product = (__builtin_convertvector(code, S16) - zero) * weight;
        acc[s] += __builtin_convertvector(product, S32);
      }
    }
  }
  memcpy(out, acc, sizeof acc);
}

// Channels that fill no strip, and offsets that do not fit the weights.
void single_channel(const PackedConv& a, const Window& w, const int16_t* weights, int64_t index,
                    int64_t channel) {
  int32_t products = 0, inputs = 0;
  for (int64_t i = 0; i < w.rows; ++i) {
    for (int64_t j = 0; j < w.cols; ++j) {
      const int32_t value = w.first[i * w.row_stride + j * w.col_stride + channel] - a.x_zero_point;
      products += value * weights[(w.tap + i * w.taps_per_row + j) * a.channels + channel];
      inputs += value;
    }
  }
  const int64_t offset = a.weight_fits_s8 ? 0 : a.weight_offset[channel];
  store_output(a.epilogue, index + channel, channel, products + offset * inputs);
}

}  // namespace

void depthwise_conv2d(const PackedConv& a) {
  const int64_t taps = a.kernel_h * a.kernel_w;
  const int64_t blocks = ceil_div(taps, kBlockDepth);
  int16_t* weights =
      static_cast<int16_t*>(scratch(kSharedWeights, taps * a.channels * sizeof(int16_t)));
  for (int64_t c = 0; c < a.channels; ++c) {
    const int32_t offset = a.weight_fits_s8 ? static_cast<int32_t>(a.weight_offset[c]) : 0;
    for (int64_t t = 0; t < taps; ++t) {
      weights[t * a.channels + c] =
          static_cast<int16_t>(packed_code(a.weight, a.bits, blocks, c, t) + offset);
    }
  }
  const int64_t rows = a.batch * a.out_height;
  const int64_t work = a.out_width * a.channels * taps;
  parallel_for(rows, max64(1, 65536 / max64(1, work)), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t top = r % a.out_height * a.stride_h - a.pad_h;
      const uint8_t* image = a.x + r / a.out_height * a.height * a.width * a.channels;
      int64_t row, row_end;
      valid_taps(top, a.height, a.kernel_h, a.dilation_h, &row, &row_end);
      for (int64_t ow = 0; ow < a.out_width; ++ow) {
        const int64_t left = ow * a.stride_w - a.pad_w;
        int64_t col, col_end;
        valid_taps(left, a.width, a.kernel_w, a.dilation_w, &col, &col_end);
        const int64_t origin = (top + row * a.dilation_h) * a.width + left + col * a.dilation_w;
        const Window window{image + origin * a.channels,
                            row_end - row,
                            col_end - col,
                            a.dilation_h * a.width * a.channels,
                            a.dilation_w * a.channels,
                            row * a.kernel_w + col,
                            a.kernel_w};
        const int64_t index = (r * a.out_width + ow) * a.channels;
        int64_t c = 0;
        if (a.weight_fits_s8) {
          int32_t acc[kStrips * kLanes];
          for (; c + kStrips * kLanes <= a.channels; c += kStrips * kLanes) {
            accumulate<kStrips>(window, weights, a.channels, c, a.x_zero_point, acc);
            store_outputs<kStrips * kLanes>(a.epilogue, index + c, c, acc);
          }
          for (; c + kLanes <= a.channels; c += kLanes) {
            accumulate<1>(window, weights, a.channels, c, a.x_zero_point, acc);
            store_outputs<kLanes>(a.epilogue, index + c, c, acc);
          }
        }
        for (; c < a.channels; ++c) single_channel(a, window, weights, index, c);
      }
    }
  });
}

}  // namespace FDDA_ISA
}  // namespace fdda
