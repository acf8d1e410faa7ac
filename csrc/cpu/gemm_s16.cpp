// Packed convolution on any processor: compilers turn sums of int16 products into pmaddwd and its
// kin.

#include "operands_s16.h"
#include "packed_driver.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

struct S16 : S16Operands {
  static constexpr int kRows = 3;
  static constexpr int kChannels = 4;

  // A panel holds 16 rows of weights.
  static void unpack(const PackedConv& conv, const uint8_t* planes, int64_t depth,
                     const int8_t* offset, Weight* panel, int32_t* start) {
    const int64_t size = ceil_div(depth, kBlockDepth) * kBlockDepth;
    for (int64_t block = 0; block < size / kBlockDepth; ++block) {
      const uint8_t* bytes = planes + block * conv.bits * kPlaneBytes;
      int16_t codes[kPanelRows * kBlockDepth] = {};
      for (int b = 0; b < conv.bits; ++b, bytes += kPlaneBytes) {
        const int weight = b == conv.bits - 1 ? -(1 << b) : 1 << b;
        for (int j = 0; j < kPanelRows * kBlockDepth; ++j) {
          const int bit = bytes[j / 8] >> (j % 8) & 1;
          codes[j] = static_cast<int16_t>(codes[j] + bit * weight);
        }
      }
      for (int n = 0; n < kPanelRows; ++n) {
        for (int k = 0; k < kBlockDepth; ++k) {
          panel[n * size + block * kBlockDepth + k] =
              static_cast<int16_t>(codes[n * kBlockDepth + k] + offset[n]);
        }
      }
    }
    for (int n = 0; n < kPanelRows; ++n) start[n] = 0;
  }

  // Sums of ROWS rows times kChannels channels in one pass: each load serves several products. On
  // its own, gcc finds registers for more of them.
  template <int ROWS>
  static __attribute__((noinline)) void multiply(const Tile<S16>& t, int64_t first, int64_t n) {
    const int64_t size = t.depth_blocks * kBlockDepth;
    const Weight* __restrict w = t.panels + n * size;
    const Input* __restrict x = t.rows + first * t.row_stride;
    const int64_t stride = t.row_stride;
    int32_t acc[ROWS][kChannels] = {};
    for (int64_t k = 0; k < size; ++k) {
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
        for (int j = 0; j < kChannels; ++j) {
          acc[r][j] += int32_t{x[r * stride + k]} * w[j * size + k];
        }
      }
    }
    const int64_t channel = t.first_channel + n;
    const int64_t count = min64(kChannels, t.columns - n);
    for (int r = 0; r < ROWS; ++r) {
      const int64_t row = first + r;
      const int64_t index = (t.first_row + row) * t.conv->out_channels + channel;
      for (int64_t j = 0; j < count; ++j) {
        const int64_t offset =
            t.row_sums ? t.conv->weight_offset[channel + j] * t.row_sums[row] : 0;
        store_output(t.conv->epilogue, index + j, channel + j, acc[r][j] + offset);
      }
    }
  }

  static void gemm(const Tile<S16>& t) {
    for (int64_t n = 0; n < t.columns; n += kChannels) {
      int64_t r = 0;
      for (; r + kRows <= t.num_rows; r += kRows) multiply<kRows>(t, r, n);
      for (; r < t.num_rows; ++r) multiply<1>(t, r, n);
    }
  }
};

}  // namespace

const char* packed_conv2d(const PackedConv& conv) {
  if (conv.groups == conv.channels && conv.groups == conv.out_channels) {
    depthwise_conv2d(conv);
    return "depthwise";
  }
  Driver<S16>(conv).run();
  return "direct";
}

}  // namespace FDDA_ISA
}  // namespace fdda
