// How matrix products divide into pieces of work.
#pragma once

#include "functions.h"
#include "register_panel.h"
#include "vectors.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

// By the shape alone: threads do not change a sum. Few panels of columns are cut into blocks of
// rows, so that threads do not share what they read and write, then into parts of the depth.
struct ProductPieces {
  static constexpr int64_t kEnough = 16, kBlock = 40 * kRows, kPart = 512, kMostParts = 32;
  static constexpr int64_t kThreadMacs = 1 << 20;
  int64_t panels, blocks, parts;

  ProductPieces(int64_t count, int64_t rows, int64_t depth, int64_t columns, bool may_add)
      : panels(ceil_div(columns, kPanel)), blocks(1), parts(1) {
    if (count * panels < kEnough) blocks = max64(1, ceil_div(rows, kBlock));
    if (may_add && count * panels * blocks < kEnough) {
      parts = min64(kMostParts, max64(1, ceil_div(depth, kPart)));
    }
  }
  int64_t count() const { return panels * blocks * parts; }

  // Tasks that a thread should have of the `tasks` that so many multiply-adds are divided into.
  static int64_t grain(int64_t macs, int64_t tasks) {
    return max64(1, kThreadMacs / max64(1, macs / max64(1, tasks)));
  }
};

// out = the sum of its parts, in their order, or what is added to it.
inline void sum_parts(const float* from, int64_t parts, int64_t size, bool add, float* out) {
  for_each_lanes<1>(size, [&](auto lanes, int64_t i) {
    using V = typename decltype(lanes)::V;
    V sum = load_lanes<V>(from + i);
    for (int64_t k = 1; k < parts; ++k) sum = sum + load_lanes<V>(from + k * size + i);
    store_lanes(out + i, add ? load_lanes<V>(out + i) + sum : sum);
  });
}

}  // namespace
}  // namespace FDDA_ISA
}  // namespace fdda
