// Sizes of the blocks' tiles, and where their parts lie in shared memory.
#pragma once

#include "weights.h"

namespace fdda {
namespace cuda {

constexpr int kChunk = 16;  // bytes of the vector accesses
constexpr int kBankBytes = 128;
constexpr int kMmaRows = 16, kMmaChannels = 8, kMmaDepth = 32;

template <int ROWS, int CHANNELS, int WARP_ROWS, int WARP_CHANNELS, int BLOCKS>
struct BlockTile {
  static constexpr int kRows = ROWS, kChannels = CHANNELS;
  static constexpr int kWarpRows = WARP_ROWS, kWarpChannels = WARP_CHANNELS;
  static constexpr int kThreads = ROWS / WARP_ROWS * (CHANNELS / WARP_CHANNELS) * 32;
  static constexpr int kBlocks = BLOCKS;  // to a multiprocessor, bounds the registers
};

using LargeTile = BlockTile<128, 128, 64, 32, 2>;
using SmallTile = BlockTile<32, 64, 32, 16, 4>;

// What the tensor cores multiply: inputs, and weights as bytes or as halves. kU8S4: unpacked to
// bytes on the way. kU4S4: as they are, inputs below 16 packed to halves on the way. kPacked: the
// same of inputs that lie packed.
// By its data sheet sm_80 needs 256 cycles for a step's products of 4 bits in the large tile. What
// is written to and read from shared memory, 128 bytes a cycle, are 60 KiB, 480 cycles, with inputs
// in bytes and 36 KiB, 288 cycles, with packed ones.
enum class Operands { kU8S8, kU8S4, kU4S4, kPackedU8S4, kPackedU4S4 };

FDDA_HOST_DEVICE static inline constexpr bool in_halves(Operands operands) {
  return operands != Operands::kU8S8;
}

FDDA_HOST_DEVICE static inline constexpr bool multiplies_4_bits(Operands operands) {
  return operands == Operands::kU4S4 || operands == Operands::kPackedU4S4;
}

FDDA_HOST_DEVICE static inline constexpr bool reads_packed(Operands operands) {
  return operands == Operands::kPackedU8S4 || operands == Operands::kPackedU4S4;
}

// Of a pixel's inputs in a stage.
FDDA_HOST_DEVICE static inline constexpr int row_bytes(Operands operands) {
  return reads_packed(operands) ? kTileDepth / 2 : kTileDepth;
}

// Within 48 KiB, which every kernel may have.
template <typename Tile, Operands kOperands>
struct Stages {
  static constexpr int kInputBytes = Tile::kRows * row_bytes(kOperands);
  static constexpr int kBytes =
      kInputBytes + Tile::kChannels / kPanelRows * tile_bytes(in_halves(kOperands));
  static constexpr int kCount = 4 * kBytes <= 48 * 1024 ? 4 : 3;
};

// Where a chunk lies in a stage: the 8 rows that ldmatrix reads at once, and the 8 chunks that 8
// threads write at once, must lie in different banks, all of which a few rows fill.
template <int kRowBytes>
__device__ inline int swizzled(int row, int chunk) {
  constexpr int chunks = kRowBytes / kChunk, rows = kBankBytes / kRowBytes;
  return row * kRowBytes + (chunk ^ (row / rows & (chunks - 1))) * kChunk;
}

}  // namespace cuda
}  // namespace fdda
