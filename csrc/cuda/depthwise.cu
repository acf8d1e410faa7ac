#include "depthwise.h"

#include "block_codes.h"
#include "loop.h"

namespace fdda {
namespace cuda {
namespace {

// A thread has the taps of a block of a channel.
__global__ void __launch_bounds__(kThreads)
    reorder_kernel(const uint8_t* packed, int bits, int64_t stride, int64_t taps, uint8_t* codes) {
  const int64_t blocks = ceil_div(taps, kBlockDepth);
  for_each(stride * blocks, [&](int64_t i) {
    const int64_t channel = i % stride, block = i / stride;
    const uint8_t* panel = packed + channel / kPanelRows * blocks * bits * kPlaneBytes;
    const int row = static_cast<int>(channel % kPanelRows);
    const uint32_t four = block_codes(panel, bits, blocks, row, block);
    for (int j = 0; j < kBlockDepth; ++j) {
      const int64_t tap = block * kBlockDepth + j;
      if (tap < taps) codes[tap * stride + channel] = static_cast<uint8_t>(four >> 8 * j);
    }
  });
}

// Word: of so many channels as it has bytes.
template <typename Word>
__global__ void __launch_bounds__(kThreads)
    depthwise_kernel(PackedConv conv, const uint8_t* codes, int64_t stride, int64_t count) {
  constexpr int kChannels = sizeof(Word);
  const int64_t words = conv.channels / kChannels;
  for_each(count, [&](int64_t i) {
    const int64_t pixel = i / words;
    const int64_t top = pixel / conv.out_width % conv.out_height * conv.stride_h - conv.pad_h;
    const int64_t left = pixel % conv.out_width * conv.stride_w - conv.pad_w;
    const int64_t image = pixel / conv.out_width / conv.out_height * conv.height * conv.width;
    const int64_t channel = i % words * kChannels;
    int32_t products[kChannels] = {}, inputs[kChannels] = {};  // as in conv_accumulator
    for (int64_t kh = 0; kh < conv.kernel_h; ++kh) {
      const int64_t y = top + kh * conv.dilation_h;
      if (y < 0 || y >= conv.height) continue;
      for (int64_t kw = 0; kw < conv.kernel_w; ++kw) {
        const int64_t x = left + kw * conv.dilation_w;
        if (x < 0 || x >= conv.width) continue;
        const uint32_t values = *reinterpret_cast<const Word*>(
            conv.x + (image + y * conv.width + x) * conv.channels + channel);
        const uint32_t weights =
            *reinterpret_cast<const Word*>(codes + (kh * conv.kernel_w + kw) * stride + channel);
        for (int j = 0; j < kChannels; ++j) {
          const int32_t value = static_cast<int32_t>(values >> 8 * j & 255) - conv.x_zero_point;
          products[j] += value * static_cast<int8_t>(weights >> 8 * j);
          inputs[j] += value;
        }
      }
    }
    for (int j = 0; j < kChannels; ++j) {
      store_output(conv.epilogue, pixel * conv.channels + channel + j, channel + j,
                   products[j] + conv.weight_offset[channel + j] * inputs[j]);
    }
  });
}

}  // namespace

void reorder_depthwise_weights(const uint8_t* packed, int bits, int64_t channels, int64_t taps,
                               uint8_t* codes, cudaStream_t stream) {
  const int64_t stride = depthwise_weight_bytes(channels, 1);
  launch_for_each(reorder_kernel, stride * ceil_div(taps, kBlockDepth), stream, packed, bits,
                  stride, taps, codes);
}

void depthwise_conv2d(const PackedConv& conv, const uint8_t* codes, cudaStream_t stream) {
  const int64_t stride = depthwise_weight_bytes(conv.channels, 1);
  const int64_t count = conv.batch * conv.out_height * conv.out_width * conv.channels;
  if (conv.channels % 4 || reinterpret_cast<uintptr_t>(conv.x) % 4) {
    return launch_for_each(depthwise_kernel<uint8_t>, count, stream, conv, codes, stride, count);
  }
  launch_for_each(depthwise_kernel<uint32_t>, count / 4, stream, conv, codes, stride, count / 4);
}

}  // namespace cuda
}  // namespace fdda
