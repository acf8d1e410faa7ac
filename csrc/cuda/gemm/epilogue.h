// From sums to outputs.
#pragma once

#include "../../common/packed.h"
#include "products.h"

namespace fdda {
namespace cuda {

// Two lanes' codes to a byte. The warp has 32 adjacent channels of a pixel.
__device__ inline void store_packed(const Epilogue& e, int64_t index, float v) {
  const uint32_t code = requantize(add_residual(e, index, v), e.lo, e.hi);
  const uint32_t other = __shfl_xor_sync(0xffffffff, code, 16);
  if (threadIdx.x & 16) return;
  e.out_u4[index / kPackedChannels * 16 + index % 16] = static_cast<uint8_t>(code | other << 4);
}

// A thread has one channel and many pixels: it keeps what belongs to the channel, and a warp stores
// adjacent channels. The sums go through shared memory in slices, which replace the stages there.
template <typename Tile, Operands kOperands>
__device__ void store_products(const PackedConv& conv, const GemmWeights& weights,
                               Products<Tile, kOperands>& products, int first_pixel,
                               int first_channel, int pixels) {
  using P = Products<Tile, kOperands>;
  constexpr uint32_t bias = P::kBias;
  const uint32_t zero_points = conv.x_zero_point * static_cast<int>(weights.steps) * kTileDepth;
  products.finish_input_sums(zero_points);

  const int column = threadIdx.x % Tile::kChannels, channel = first_channel + column;
  const bool inside = channel < conv.out_channels;
  const float multiplier = inside ? conv.epilogue.multiplier[channel] : 0;
  const float channel_bias = inside ? conv.epilogue.bias[channel] : 0;
  const int64_t offset = inside ? conv.weight_offset[channel] : 0;
  uint32_t weight_sum = bias * zero_points;
  if (inside) weight_sum += conv.x_zero_point * weights.sums[channel];

  int32_t* sums = reinterpret_cast<int32_t*>(ptx::dynamic_shared());
  int32_t* input_sums = sums + P::kSliceRows * P::kSliceStride;
#pragma unroll
  for (int r = 0; r < P::kRows; ++r) {
    __syncthreads();  // all are done with the stages, or the slice before
    products.store_slice(r, sums, input_sums);
    __syncthreads();
    if (!inside) continue;
    for (int row = threadIdx.x / Tile::kChannels; row < P::kSliceRows;
         row += Tile::kThreads / Tile::kChannels) {
      const int pixel =
          first_pixel + row / kMmaRows * Tile::kWarpRows + r * kMmaRows + row % kMmaRows;
      if (pixel >= pixels) continue;
      // sum (x - z) (q + offset)
      //     = sum x (q + bias) - z sum (q + bias) - bias sum (x - z) + offset sum (x - z)
      // up to the offset modulo 2^32: sum (x - z) q fits int32, its terms need not.
      const uint32_t inputs = input_sums[row];
      const uint32_t codes = sums[row * P::kSliceStride + column] - weight_sum - bias * inputs;
      const int64_t acc = static_cast<int32_t>(codes) + offset * static_cast<int32_t>(inputs);
      const int64_t index = pixel * conv.out_channels + channel;
      const float v = dequantize(acc, multiplier, channel_bias);
      if (conv.epilogue.out_u4) {
        store_packed(conv.epilogue, index, v);
      } else {
        store_dequantized(conv.epilogue, index, v);
      }
    }
  }
}

}  // namespace cuda
}  // namespace fdda
