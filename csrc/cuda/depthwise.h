// Depthwise convolution: groups = channels = out_channels.
#pragma once

#include <cuda_runtime_api.h>

#include "../common/packed.h"

namespace fdda {
namespace cuda {

// Bytes of the weights' order: int8 codes [taps][ceil(channels/16) * 16], so that adjacent threads
// read adjacent channels. Padding codes are 0.
static inline int64_t depthwise_weight_bytes(int64_t channels, int64_t taps) {
  return taps * ceil_div(channels, kPanelRows) * kPanelRows;
}

// Pointers are device pointers, launch errors are left to cudaGetLastError.
void reorder_depthwise_weights(const uint8_t* packed, int bits, int64_t channels, int64_t taps,
                               uint8_t* codes, cudaStream_t stream);

// conv.weight is not read: `codes` stands for it.
void depthwise_conv2d(const PackedConv& conv, const uint8_t* codes, cudaStream_t stream);

}  // namespace cuda
}  // namespace fdda
