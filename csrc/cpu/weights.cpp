// Packing and unpacking of weights; the layout is drawn in common/arithmetic.h.

#include <string.h>

#include "expand.h"
#include "functions.h"
#include "parallel.h"

namespace fdda {
namespace FDDA_ISA {

void pack_weight(const PackWeight& a) {
  const int64_t blocks = ceil_div(a.cols, kBlockDepth);
  parallel_for(ceil_div(a.rows, kPanelRows), 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin * blocks; t < end * blocks; ++t) {
      const int64_t row = t / blocks * kPanelRows;
      const int64_t col = t % blocks * kBlockDepth;
      const int64_t rows = min64(kPanelRows, a.rows - row);
      const int64_t cols = min64(kBlockDepth, a.cols - col);
      uint8_t* planes = a.packed + t * a.bits * kPlaneBytes;
      memset(planes, 0, a.bits * kPlaneBytes);
      for (int64_t n = 0; n < rows; ++n) {
        for (int64_t k = 0; k < cols; ++k) {
          const int32_t code = a.codes[(row + n) * a.cols + col + k];
          const int64_t j = n * kBlockDepth + k;
          for (int b = 0; b < a.bits; ++b) {
            planes[b * kPlaneBytes + j / 8] |= static_cast<uint8_t>((code >> b & 1) << (j % 8));
          }
        }
      }
    }
  });
}

void unpack_weight(const UnpackWeight& a) {
  const int64_t blocks = ceil_div(a.cols, kBlockDepth);
  parallel_for(a.rows, max64(1, 4096 / max64(1, a.cols)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t col = 0; col < a.cols; ++col) {
        a.codes[row * a.cols + col] =
            static_cast<int8_t>(packed_code(a.packed, a.bits, blocks, row, col));
      }
    }
  });
}

namespace {

// Lanes are the [4 channels][4 k] of a quarter of a block.
typedef int8_t Codes __attribute__((vector_size(16)));
typedef int16_t Halves __attribute__((vector_size(32)));
typedef int32_t Lanes __attribute__((vector_size(64)));
constexpr int kQuarters = kBlockCodes / 16;

struct Row {
  int32_t* values;  // x - x_zero_point, every four of them four times
  int64_t sum;
};

// Exact sums of 16 channels; `chunk` blocks fit int32.
void multiply(const int8_t* codes, const Row& row, int64_t blocks, int64_t chunk, int64_t* acc) {
  for (int64_t first = 0; first < blocks; first += chunk) {
    Lanes lanes[kQuarters] = {};
    for (int64_t block = first; block < min64(blocks, first + chunk); ++block) {
      Lanes x;
      memcpy(&x, row.values + block * 16, sizeof x);
#pragma GCC unroll 4
      for (int i = 0; i < kQuarters; ++i) {
        Codes quarter;
        memcpy(&quarter, codes + block * kBlockCodes + i * 16, sizeof quarter);
        // gcc 12 widens to twice the size only by vector instructions.
        lanes[i] += __builtin_convertvector(__builtin_convertvector(quarter, Halves), Lanes) * x;
      }
    }
    int32_t sums[kBlockCodes];
    memcpy(sums, lanes, sizeof lanes);
    for (int j = 0; j < kBlockCodes; ++j) acc[j / kBlockDepth] += sums[j];
  }
}

void rows_times_panels(const PackedLinearS32& a, const Row* rows, int64_t chunk) {
  const int64_t blocks = ceil_div(a.depth, kBlockDepth);
  const int64_t panel_bytes = blocks * a.bits * kPlaneBytes;
  parallel_for(ceil_div(a.out_features, kPanelRows), 1, [&](int64_t begin, int64_t end) {
    int8_t* codes = static_cast<int8_t*>(scratch(kLocalWeights, blocks * kBlockCodes));
    for (int64_t panel = begin; panel < end; ++panel) {
      for (int64_t block = 0; block < blocks; ++block) {
        expand_block(a.weight + panel * panel_bytes + block * a.bits * kPlaneBytes, a.bits,
                     codes + block * kBlockCodes);
      }
      const int64_t channel = panel * kPanelRows;
      for (int64_t r = 0; r < a.rows; ++r) {
        int64_t acc[kPanelRows] = {};
        multiply(codes, rows[r], blocks, chunk, acc);
        for (int64_t n = 0; n < min64(kPanelRows, a.out_features - channel); ++n) {
          store_output(a.epilogue, r * a.out_features + channel + n, channel + n,
                       acc[n] + a.weight_offset[channel + n] * rows[r].sum);
        }
      }
    }
  });
}

}  // namespace

void packed_linear_s32(const PackedLinearS32& a) {
#if defined(__AVX512VNNI__)
  if (linear_s32_by_bytes(a)) return;
#endif
  const int64_t blocks = ceil_div(a.depth, kBlockDepth);
  const size_t bytes = a.rows * blocks * 16 * sizeof(int32_t);
  int32_t* values = static_cast<int32_t*>(scratch(kSharedRows, bytes + a.rows * sizeof(Row)));
  Row* rows = reinterpret_cast<Row*>(values + a.rows * blocks * 16);
  memset(values, 0, bytes);
  int64_t largest = 1;
  for (int64_t r = 0; r < a.rows; ++r) {
    rows[r] = {values + r * blocks * 16, 0};
    for (int64_t k = 0; k < a.depth; ++k) {
      const int64_t value = a.x[r * a.depth + k] - a.x_zero_point;
      largest = max64(largest, value < 0 ? -value : value);
      rows[r].sum += value;
      for (int i = 0; i < 4; ++i) {
        rows[r].values[k / kBlockDepth * 16 + i * 4 + k % kBlockDepth] =
            static_cast<int32_t>(value);
      }
    }
  }
  const int64_t chunk = INT32_MAX / (128 * largest);  // a lane adds one product per block
  if (chunk > 0) return rows_times_panels(a, rows, chunk);
  parallel_for(a.rows * a.out_features, max64(1, 8192 / max64(1, a.depth)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   store_output(a.epilogue, i, i % a.out_features, linear_accumulator(a, i));
                 }
               });
}

}  // namespace FDDA_ISA
}  // namespace fdda
