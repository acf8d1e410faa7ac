// Direct packed convolution: one thread per output, the arithmetic of common/packed.h. Adjacent
// threads have adjacent output channels, so they share their inputs and their planes' cache lines.
#include "packed.h"

#include "loop.h"

namespace fdda {
namespace cuda {
namespace {

// 3 blocks to a multiprocessor: left alone, ptxas spills to fit a fourth on sm_90.
__global__ void __launch_bounds__(kThreads, 3) conv_kernel(PackedConv conv, int64_t outputs) {
  for_each(outputs, [&](int64_t i) {
    store_output(conv.epilogue, i, i % conv.out_channels, conv_accumulator(conv, i));
  });
}

__global__ void __launch_bounds__(kThreads) linear_kernel(PackedLinearS32 linear, int64_t outputs) {
  for_each(outputs, [&](int64_t i) {
    store_output(linear.epilogue, i, i % linear.out_features, linear_accumulator(linear, i));
  });
}

}  // namespace

void packed_conv2d(const PackedConv& conv, cudaStream_t stream) {
  const int64_t outputs = conv.batch * conv.out_height * conv.out_width * conv.out_channels;
  launch_for_each(conv_kernel, outputs, stream, conv, outputs);
}

void packed_linear_s32(const PackedLinearS32& linear, cudaStream_t stream) {
  const int64_t outputs = linear.rows * linear.out_features;
  launch_for_each(linear_kernel, outputs, stream, linear, outputs);
}

}  // namespace cuda
}  // namespace fdda
