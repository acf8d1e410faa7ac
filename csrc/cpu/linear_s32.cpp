// Linear layer of int32 inputs, which are sums over a feature map: packed weights are expanded to
// bytes, a panel at a time, and serve all rows.

#include <string.h>

#include "functions.h"
#include "parallel.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

constexpr int kBlockCodes = kPanelRows * kBlockDepth;

// A panel's codes as bytes. The top bit is flipped: code + 2^(bits - 1), not negative.
void expand_panel(const uint8_t* planes, int bits, int64_t blocks, uint8_t* codes) {
  const uint64_t ones = 0x0101010101010101u;
  const uint64_t flip = ones << (bits - 1);
  for (int64_t i = 0; i < blocks * kPlaneBytes; ++i, codes += 8) {
    const uint8_t* plane = planes + i / kPlaneBytes * bits * kPlaneBytes + i % kPlaneBytes;
    uint64_t eight = flip;
    for (int b = 0; b < bits; ++b) {
      // Bit j of the plane's byte, alone in byte j, then as 0 or 1.
      const uint64_t apart = plane[b * kPlaneBytes] * ones & 0x8040201008040201u;
      eight ^= ((apart + 0x7f7f7f7f7f7f7f7fu) >> 7 & ones) << b;
    }
    memcpy(codes, &eight, sizeof eight);
  }
}

// Sums of products of one row and a panel.
void multiply(const int32_t* row, const uint8_t* codes, int64_t blocks, int32_t* sums) {
  int32_t acc[kBlockCodes] = {};
  for (int64_t k = 0; k < blocks; ++k, row += kBlockDepth, codes += kBlockCodes) {
    for (int j = 0; j < kBlockCodes; ++j) acc[j] += row[j % kBlockDepth] * codes[j];
  }
  for (int n = 0; n < kPanelRows; ++n) {
    const int32_t* four = acc + n * kBlockDepth;
    sums[n] = four[0] + four[1] + four[2] + four[3];
  }
}

// Sums fit int32.
void small_inputs(const PackedLinearS32& a) {
  const int64_t blocks = ceil_div(a.depth, kBlockDepth), size = blocks * kBlockDepth;
  int32_t* rows =
      static_cast<int32_t*>(scratch(kSharedRows, a.rows * (size + 1) * sizeof(int32_t)));
  int32_t* totals = rows + a.rows * size;
  for (int64_t r = 0; r < a.rows; ++r) {
    int32_t* row = rows + r * size;
    totals[r] = 0;
    for (int64_t k = 0; k < a.depth; ++k) {
      row[k] = static_cast<int32_t>(a.x[r * a.depth + k] - a.x_zero_point);
      totals[r] += row[k];
    }
    for (int64_t k = a.depth; k < size; ++k) row[k] = 0;
  }
  const int64_t half = int64_t{1} << (a.bits - 1);
  parallel_for(ceil_div(a.out_features, kPanelRows), 1, [&](int64_t begin, int64_t end) {
    uint8_t* codes = static_cast<uint8_t*>(scratch(kLocalWeights, blocks * kBlockCodes));
    for (int64_t panel = begin; panel < end; ++panel) {
      expand_panel(a.weight + panel * blocks * a.bits * kPlaneBytes, a.bits, blocks, codes);
      const int64_t first = panel * kPanelRows;
      const int64_t count = min64(kPanelRows, a.out_features - first);
      for (int64_t r = 0; r < a.rows; ++r) {
        int32_t sums[kPanelRows];
        multiply(rows + r * size, codes, blocks, sums);
        for (int64_t n = 0; n < count; ++n) {
          const int64_t channel = first + n;
          store_output(a.epilogue, r * a.out_features + channel, channel,
                       sums[n] + (a.weight_offset[channel] - half) * totals[r]);
        }
      }
    }
  });
}

}  // namespace

void packed_linear_s32(const PackedLinearS32& a) {
  int64_t largest = 0;
  for (int64_t i = 0; i < a.rows * a.depth; ++i) {
    const int64_t value = a.x[i] - a.x_zero_point;
    largest = max64(largest, value < 0 ? -value : value);
  }
  if (largest <= INT32_MAX / 255 / max64(1, a.depth)) return small_inputs(a);
  parallel_for(a.rows * a.out_features, max64(1, 8192 / max64(1, a.depth)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   store_output(a.epilogue, i, i % a.out_features, linear_accumulator(a, i));
                 }
               });
}

}  // namespace FDDA_ISA
}  // namespace fdda
