// Weights in the order in which the tensor cores' registers want them, so that a lane loads 16
// bytes at once and the kernels copy them as they lie:
//
//   tiles  [ceil(N/16)][ceil(K/64)] of 16 channels x 64 k, 32 lanes x 16 bytes each
//          5 to 8 bits: two of those, 32 k each. A byte is a code.
//          2 to 4 bits: one. A byte is two codes: k in the low half, k + 16 in the high one.
//   sums   [ceil(N/16) * 16] int32: of every channel's codes
//
// Word i of a lane has the codes of channel lane / 4 + 8 (i / 2), see mma in ptx.h. Its byte j:
//
//   bytes    k = 16 (i % 2) + 4 (lane % 4) + j
//   halves   k = 32 (i % 2) + 4 (lane % 4) + j, and k + 16
//
// Padding codes are 0. Halves are as s4 wants them, if the inputs' halves are in the same order;
// the same tiles, unpacked, serve s8.
#pragma once

#include "../block_codes.h"

namespace fdda {
namespace cuda {

constexpr int kTileDepth = 64;

FDDA_HOST_DEVICE static inline bool in_halves(int bits) { return bits <= 4; }
FDDA_HOST_DEVICE static inline constexpr int tile_bytes(bool halves) { return halves ? 512 : 1024; }

struct GemmWeights {
  int64_t panels, steps;  // tiles
  uint8_t* tiles;
  int32_t* sums;
};

// `memory` of gemm_weight_bytes, for a device or not.
static inline GemmWeights gemm_weights(int bits, int64_t channels, int64_t depth, void* memory) {
  GemmWeights w{ceil_div(channels, kPanelRows), ceil_div(depth, kTileDepth), nullptr, nullptr};
  w.tiles = static_cast<uint8_t*>(memory);
  w.sums = reinterpret_cast<int32_t*>(w.tiles + w.panels * w.steps * tile_bytes(in_halves(bits)));
  return w;
}

static inline int64_t gemm_weight_bytes(int bits, int64_t channels, int64_t depth) {
  const GemmWeights w = gemm_weights(bits, channels, depth, nullptr);
  return w.panels * (w.steps * tile_bytes(in_halves(bits)) + kPanelRows * sizeof(int32_t));
}

// Word of a tile, see above.
FDDA_HOST_DEVICE static inline uint32_t tile_word(const uint8_t* panel, int bits,
                                                  int64_t depth_blocks, int64_t step, int word) {
  const int i = word % 4, lane = word / 4 % 32, channel = lane / 4 + i / 2 * 8;
  const int64_t first = step * (kTileDepth / kBlockDepth) + lane % 4;
  if (!in_halves(bits)) {
    return block_codes(panel, bits, depth_blocks, channel, first + word / 128 * 8 + i % 2 * 4);
  }
  const uint32_t low = block_codes(panel, bits, depth_blocks, channel, first + i % 2 * 8);
  const uint32_t high = block_codes(panel, bits, depth_blocks, channel, first + i % 2 * 8 + 4);
  return (low & 0x0f0f0f0f) | (high & 0x0f0f0f0f) << 4;
}

}  // namespace cuda
}  // namespace fdda
