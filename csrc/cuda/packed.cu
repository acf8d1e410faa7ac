// Layers straight on packed weights: convolutions of any shape, and linear layers that read sums.
#include "packed.h"

#include "block_codes.h"
#include "loop.h"

namespace fdda {
namespace cuda {
namespace {

// A thread an output. Adjacent threads have adjacent output channels, so they share their inputs
// and their planes' cache lines. 3 blocks to a multiprocessor: left alone, ptxas spills to fit a
// fourth on sm_90.
__global__ void __launch_bounds__(kThreads, 3) conv_kernel(PackedConv conv, int64_t outputs) {
  for_each(outputs, [&](int64_t i) {
    store_output(conv.epilogue, i, i % conv.out_channels, conv_accumulator(conv, i));
  });
}

// A warp an output, as there are few of them; its lanes share the blocks of 4 k.
__global__ void __launch_bounds__(kThreads) linear_kernel(PackedLinearS32 linear, int64_t outputs) {
  const int64_t blocks = ceil_div(linear.depth, kBlockDepth);
  for_each(outputs * kLanes, [&](int64_t i) {
    const int64_t index = i / kLanes, o = index % linear.out_features;
    const int32_t* x = linear.x + index / linear.out_features * linear.depth;
    const uint8_t* panel = linear.weight + o / kPanelRows * blocks * linear.bits * kPlaneBytes;
    const int row = static_cast<int>(o % kPanelRows);
    int64_t products = 0, inputs = 0;  // as in linear_accumulator
    for (int64_t block = i % kLanes; block < blocks; block += kLanes) {
      const uint32_t codes = block_codes(panel, linear.bits, blocks, row, block);
      for (int j = 0; j < kBlockDepth; ++j) {
        const int64_t k = block * kBlockDepth + j;
        if (k >= linear.depth) break;
        const int64_t value = x[k] - linear.x_zero_point;
        products += value * static_cast<int8_t>(codes >> 8 * j);
        inputs += value;
      }
    }
    for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
      products += __shfl_xor_sync(0xffffffff, products, lanes);
      inputs += __shfl_xor_sync(0xffffffff, inputs, lanes);
    }
    if (i % kLanes > 0) return;
    store_output(linear.epilogue, index, o, products + linear.weight_offset[o] * inputs);
  });
}

}  // namespace

void packed_conv2d(const PackedConv& conv, cudaStream_t stream) {
  const int64_t outputs = conv.batch * conv.out_height * conv.out_width * conv.out_channels;
  launch_for_each(conv_kernel, outputs, stream, conv, outputs);
}

void packed_linear_s32(const PackedLinearS32& linear, cudaStream_t stream) {
  const int64_t outputs = linear.rows * linear.out_features;
  launch_for_each(linear_kernel, outputs * kLanes, stream, linear, outputs);
}

}  // namespace cuda
}  // namespace fdda
