// Direct packed convolution: one thread per output, the arithmetic of common/packed.h. Adjacent
// threads have adjacent output channels, so they share their inputs and their planes' cache lines.
#include "packed.h"

#include "launch.h"

namespace fdda {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 20;  // the loops below step over what is left

int blocks_for(int64_t outputs) {
  const int64_t blocks = ceil_div(outputs, kThreads);
  return static_cast<int>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

// 3 blocks to a multiprocessor: left alone, ptxas spills to fit a fourth on sm_90.
__global__ void __launch_bounds__(kThreads, 3) conv_kernel(PackedConv conv, int64_t outputs) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < outputs;
       i += step) {
    store_output(conv.epilogue, i, i % conv.out_channels, conv_accumulator(conv, i));
  }
}

__global__ void __launch_bounds__(kThreads) linear_kernel(PackedLinearS32 linear, int64_t outputs) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < outputs;
       i += step) {
    store_output(linear.epilogue, i, i % linear.out_features, linear_accumulator(linear, i));
  }
}

}  // namespace

void packed_conv2d(const PackedConv& conv, cudaStream_t stream) {
  const int64_t outputs = conv.batch * conv.out_height * conv.out_width * conv.out_channels;
  if (outputs) launch(conv_kernel, blocks_for(outputs), kThreads, 0, stream, conv, outputs);
}

void packed_linear_s32(const PackedLinearS32& linear, cudaStream_t stream) {
  const int64_t outputs = linear.rows * linear.out_features;
  if (outputs) launch(linear_kernel, blocks_for(outputs), kThreads, 0, stream, linear, outputs);
}

}  // namespace cuda
}  // namespace fdda
