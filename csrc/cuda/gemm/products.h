// From shared memory to sums in registers, and back.
#pragma once

#include "../ptx.h"
#include "tile.h"

namespace fdda {
namespace cuda {

// A warp's products.
template <typename Tile, Operands kOperands>
class Products {
 public:
  // The products of a stage.
  __device__ void add(const uint8_t* inputs, const uint8_t* tiles) {
    if constexpr (multiplies_4_bits(kOperands)) {
      add_halves(inputs, tiles);
    } else {
      add_bytes(inputs, tiles);
    }
    // All warps of a row need the sums of its inputs, so that each makes them of 16 rows only.
#pragma unroll
    for (int depth = 0; depth < kDepths; ++depth) {
      uint32_t a[4];
      load_inputs(a, inputs, warp_column() % kRows, depth);
      input_sums_[0] = ptx::add_bytes(a[2], ptx::add_bytes(a[0], input_sums_[0]));
      input_sums_[1] = ptx::add_bytes(a[3], ptx::add_bytes(a[1], input_sums_[1]));
    }
  }

  // Sums of x - zero point: the four lanes of a row have them in parts.
  __device__ void finish_input_sums(uint32_t zero_points) {
#pragma unroll
    for (uint32_t& sum : input_sums_) {
      sum += __shfl_xor_sync(0xffffffff, sum, 1);
      sum += __shfl_xor_sync(0xffffffff, sum, 2);
      sum -= zero_points;
    }
  }

  // 16 rows of every warp, rows `r`: kSliceRows of the block.
  __device__ void store_slice(int r, int32_t* sums, int32_t* input_sums) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row() * kMmaRows + half * 8 + lane / 4;
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        const int channel = first_channel() + c * kMmaChannels + lane % 4 * 2;
        const int32_t* pair = sums_[r][c] + half * 2;
        *reinterpret_cast<int2*>(sums + row * kSliceStride + channel) = {pair[0], pair[1]};
      }
      if (warp_column() == r && lane % 4 == 0) input_sums[row] = input_sums_[half];
    }
  }

  static constexpr int kRows = Tile::kWarpRows / kMmaRows;
  static constexpr int kSliceRows = Tile::kRows / kRows;
  // 8 more, so that the lanes of half a warp store to different banks.
  static constexpr int kSliceStride = Tile::kChannels + 8;
  // What the weights' codes are too large by: halves are unpacked to bytes without a sign.
  static constexpr uint32_t kBias = in_halves(kOperands) && !multiplies_4_bits(kOperands) ? 8 : 0;

 private:
  static constexpr int kChannels = Tile::kWarpChannels / kMmaChannels;
  static constexpr int kPanels = Tile::kWarpChannels / kPanelRows;
  static constexpr int kWarpsAlongRows = Tile::kRows / Tile::kWarpRows;
  static constexpr int kDepths = kTileDepth / kMmaDepth;
  static constexpr int kTileBytes = tile_bytes(in_halves(kOperands));
  static constexpr int kRowBytes = row_bytes(kOperands);

  __device__ static int warp_row() { return threadIdx.x / 32 % kWarpsAlongRows; }
  __device__ static int warp_column() { return threadIdx.x / 32 / kWarpsAlongRows; }
  __device__ static int first_channel() { return warp_column() * Tile::kWarpChannels; }

  // The vector of a lane in the tile of the warp's panel p.
  __device__ static void load_words(uint32_t (&words)[4], const uint8_t* tiles, int p, int vector) {
    const int panel = first_channel() / kPanelRows + p;
    const uint4 v =
        ptx::load_16(tiles + panel * kTileBytes + vector * 512 + threadIdx.x % 32 * kChunk);
    words[0] = v.x;
    words[1] = v.y;
    words[2] = v.z;
    words[3] = v.w;
  }

  __device__ void add_bytes(const uint8_t* inputs, const uint8_t* tiles) {
    constexpr bool halves = in_halves(kOperands);
    uint32_t words[kPanels][4];
#pragma unroll
    for (int depth = 0; depth < kDepths; ++depth) {
      if (!halves || depth == 0) {
#pragma unroll
        for (int p = 0; p < kPanels; ++p) load_words(words[p], tiles, p, depth);
      }
      uint32_t b[kChannels][2];
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        const uint32_t* pair = words[c / 2] + c % 2 * 2;
        b[c][0] = halves ? (pair[depth] & 0x0f0f0f0f) ^ kBias * 0x01010101 : pair[0];
        b[c][1] = halves ? (pair[depth] >> 4 & 0x0f0f0f0f) ^ kBias * 0x01010101 : pair[1];
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        uint32_t a[4];
        load_inputs(a, inputs, r, depth);
#pragma unroll
        for (int c = 0; c < kChannels; ++c) ptx::mma_u8_s8(sums_[r][c], a, b[c]);
      }
    }
  }

  // The halves of weights and of packed inputs hold k and k + 16 beside each other: the products'
  // order along k is another one for both.
  __device__ void add_halves(const uint8_t* inputs, const uint8_t* tiles) {
    uint32_t words[kPanels][4];
#pragma unroll
    for (int p = 0; p < kPanels; ++p) load_words(words[p], tiles, p, 0);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      uint32_t packed[4];
      load_packed(packed, inputs, r);
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        const uint32_t b[2] = {words[c / 2][c % 2 * 2], words[c / 2][c % 2 * 2 + 1]};
        ptx::mma_u4_s4(sums_[r][c], packed, b);
      }
    }
  }

  // Of 16 rows and 64 k, as halves.
  __device__ static void load_packed(uint32_t (&packed)[4], const uint8_t* inputs, int r) {
    if constexpr (reads_packed(kOperands)) {
      const int lane = threadIdx.x % 32;
      ptx::load_matrices(packed, inputs + swizzled<kRowBytes>(matrix_row(r), lane / 16));
    } else {
#pragma unroll
      for (int depth = 0; depth < kDepths; ++depth) {
        uint32_t a[4];
        load_inputs(a, inputs, r, depth);
        packed[depth * 2] = a[0] | a[2] << 4;
        packed[depth * 2 + 1] = a[1] | a[3] << 4;
      }
    }
  }

  // Of 16 rows and 32 k, as bytes.
  __device__ static void load_inputs(uint32_t (&a)[4], const uint8_t* inputs, int r, int depth) {
    if constexpr (reads_packed(kOperands)) {
      uint32_t packed[2];
      ptx::load_matrices(packed, inputs + swizzled<kRowBytes>(matrix_row(r), depth));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        a[half] = packed[half] & 0x0f0f0f0f;
        a[half + 2] = packed[half] >> 4 & 0x0f0f0f0f;
      }
    } else {
      const int lane = threadIdx.x % 32, row = matrix_row(r);
      ptx::load_matrices(a, inputs + swizzled<kRowBytes>(row, depth * 2 + lane / 16));
    }
  }

  // The row of which the lane gives ldmatrix the address.
  __device__ static int matrix_row(int r) {
    return warp_row() * Tile::kWarpRows + r * kMmaRows + threadIdx.x % 16;
  }

  int32_t sums_[kRows][kChannels][4] = {};
  static_assert(kRows <= Tile::kChannels / Tile::kWarpChannels, "no warp for some rows");
  uint32_t input_sums_[2] = {};
};

}  // namespace cuda
}  // namespace fdda
