// Packing and unpacking of weights; the layout is drawn in common/arithmetic.h.

#include <string.h>

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

void packed_linear_s32(const PackedLinearS32& a) {
  parallel_for(a.rows * a.out_features, max64(1, 8192 / max64(1, a.depth)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   store_output(a.epilogue, i, i % a.out_features, linear_accumulator(a, i));
                 }
               });
}

}  // namespace FDDA_ISA
}  // namespace fdda
