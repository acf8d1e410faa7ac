// Codes out of the planes of packed weights.
#pragma once

#include "../common/arithmetic.h"

namespace fdda {
namespace cuda {

// The codes of a channel of a packed panel in one block, as bytes; 0 behind the last block.
FDDA_HOST_DEVICE static inline uint32_t block_codes(const uint8_t* panel, int bits,
                                                    int64_t depth_blocks, int channel,
                                                    int64_t block) {
  if (block >= depth_blocks) return 0;
  const uint8_t* plane = panel + block * bits * kPlaneBytes + channel / 2;
  uint32_t codes = 0;
  for (int b = 0; b < bits; ++b) {
    const uint32_t four = plane[b * kPlaneBytes] >> channel % 2 * 4 & 15;
    codes |= (four * 0x00204081 & 0x01010101) << b;  // bit j to byte j
  }
  const uint32_t negative = codes >> (bits - 1) & 0x01010101;
  return codes | negative * (0xff << bits & 0xff);
}

}  // namespace cuda
}  // namespace fdda
