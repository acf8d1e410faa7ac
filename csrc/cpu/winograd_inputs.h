// The input transform of Winograd's F(2x2, 3x3) in 8-bit integers, on registers of any width, and
// which convolutions are of that kind.
#pragma once

#include <string.h>

#include "functions.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

// 3x3, stride 1, padding 1, one group; of so few channels that no sum leaves int32.
inline bool suits_winograd(const PackedConv& conv) {
  return conv.kernel_h == 3 && conv.kernel_w == 3 && conv.stride_h == 1 && conv.stride_w == 1 &&
         conv.pad_h == 1 && conv.pad_w == 1 && conv.dilation_h == 1 && conv.dilation_w == 1 &&
         conv.groups == 1 && conv.channels % kBlockDepth == 0 && conv.channels <= 1 << 16;
}

// V = B^T d B of a row of tiles, plus `shift` but for position (1, 1). Modulo 256: only the result
// has to fit.
//   read(x, d)    the 4 inputs of column x, from -1 on, one below the other
//   place(tile)   where position 0 of a tile goes; the others are `stride` bytes apart
template <class V, class Read, class Place>
inline __attribute__((always_inline)) void transform_inputs(int64_t tiles, V shift, int64_t stride,
                                                            const Read& read, const Place& place) {
  auto column = [&](int64_t x, V* t) __attribute__((always_inline)) {
    V d[4];
    read(x, d);
    t[0] = d[0] - d[2];
    t[1] = d[1] + d[2];
    t[2] = d[2] - d[1];
    t[3] = d[1] - d[3];
  };
  auto store = [](uint8_t* to, V v) __attribute__((always_inline)) { memcpy(to, &v, sizeof v); };
  V t[4][4];
  column(-1, t[0]);
  column(0, t[1]);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    column(2 * tile + 1, t[2]);
    column(2 * tile + 2, t[3]);
    uint8_t* const out = place(tile);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      uint8_t* const o = out + 4 * i * stride;
      const V p = t[2][i] + shift, q = t[1][i] + shift;
      store(o, t[0][i] + shift - t[2][i]);
      store(o + stride, t[1][i] + (i == 1 ? t[2][i] : p));
      store(o + 2 * stride, p - t[1][i]);
      store(o + 3 * stride, q - t[3][i]);
      t[0][i] = t[2][i];
      t[1][i] = t[3][i];
    }
  }
}

}  // namespace
}  // namespace FDDA_ISA
}  // namespace fdda
